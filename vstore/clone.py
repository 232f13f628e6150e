"""Clone a tree: links for what is unified, copies for the rest.

The new tree grows under a name of its own beside the target and takes the target's name when it is
complete and on disk. Names of objects are linked in thaw windows, many at a time; all else is
copied with owner, mode, times, extended attributes, ACLs and holes. Names of one inode that is no
object stay names of one inode: the first copy keeps another name in the stage while the clone
grows.
"""

import errno
import fcntl
import logging
import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from vstore import inode, syscalls
from vstore.errors import PoolBusy, ToolError, WrongUsage
from vstore.exclude import Excludes
from vstore.guest import Guest, list_guests, load_guest, tree_guest
from vstore.hold import Held, check_same_mount
from vstore.hostpath import HostPath, describe_kind, open_parent
from vstore.pool import Pool, find_mount_id
from vstore.progress import SILENT, Progress
from vstore.remove import Tree, remove
from vstore.replica import Replicator
from vstore.undo import guarded_worker

log = logging.getLogger(__name__)

_MARK: Final = b".clone-"
_LONGEST_STEM: Final = 200  # bytes of the target's name in that of a clone that grows


@dataclass(slots=True)
class CloneResult:
    """What a clone consists of; `errors` are (path in the source, why it is missing)."""

    linked: int = 0
    copied: int = 0
    copied_bytes: int = 0
    folders: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    errors: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, counts: dict[str, int], skipped: dict[str, int]) -> None:
        self.linked += counts["linked"]
        self.copied += counts["copied"]
        self.copied_bytes += counts["copied_bytes"]
        self.folders += counts["folders"]
        for reason, number in skipped.items():
            self.skipped[reason] = self.skipped.get(reason, 0) + number


def choose_source(text: str) -> Guest:
    """The guest of that name; with a slash in it, the tree at that path.

    A path to the root of a configured guest means that guest. Raises GuestNotFound, WrongUsage.
    """
    if "/" not in text:
        return load_guest(text)
    tree = tree_guest(Path(text))
    known = (guest for guest in list_guests(include_disabled=True) if guest.root == tree.root)
    return next(known, tree)


def clone(
    source: Held,
    place: HostPath,
    pool: Pool,
    progress: Progress = SILENT,
    *,
    excludes: Excludes | None = None,
) -> CloneResult:
    """Make the tree at `place`, which is absent or an empty folder, a clone of the source, without
    what `excludes` excludes.

    Where that fails nothing is left. Raises PoolBusy for a guest that runs, WrongUsage for a target
    that cannot be, NoSpace.
    """
    if source.is_running:
        raise PoolBusy(
            f"the guest {source.guest.name} runs, so its clone would not be of one moment",
            hint="stop it first",
        )
    began = time.monotonic()
    result = CloneResult()
    with _open_target(place, source, pool) as parent_fd, _growing(place, parent_fd) as tree:
        try:
            with pool.share():
                _replicate(source, tree, pool, result, progress, excludes)
                syscalls.syncfs(pool.fd)
            _rename(tree, place)
        except BaseException:
            _discard(tree, pool)
            raise
    result.seconds = time.monotonic() - began
    return result


@contextmanager
def _open_target(place: HostPath, source: Held, pool: Pool) -> Iterator[int]:
    """The folder that the clone will stand in."""
    check_same_mount(source, pool.fd, pool=pool.path)
    with ExitStack() as stack:
        root_fd = -1
        try:
            if place.guest is not None:
                root_fd = os.open(place.guest.root, inode.OPEN_FOLDER)
                stack.callback(os.close, root_fd)
            parent_fd = open_parent(place.parent, root_fd)
            stack.callback(os.close, parent_fd)
            _check_absent(place, parent_fd)
        except OSError as error:
            raise WrongUsage(f"{place.given}: cannot be made: {error.strerror}") from error
        if find_mount_id(parent_fd) != find_mount_id(pool.fd) or (
            os.fstat(parent_fd).st_dev != pool.device
        ):
            raise WrongUsage(
                f"{place.given}: is not on the file system of the pool {pool.path}",
                hint="only there can a clone share inodes with its source",
            )
        _check_outside(place, parent_fd, source, pool)
        _warn_of_leftovers(place, parent_fd)
        yield parent_fd


def _check_absent(place: HostPath, parent_fd: int) -> None:
    try:
        mode = os.stat(place.name, dir_fd=parent_fd, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(mode):
        raise WrongUsage(f"{place.given}: is there already: {describe_kind(mode)}")
    fd = os.open(place.name, inode.OPEN_FOLDER, dir_fd=parent_fd)
    try:
        if os.listdir(fd):  # noqa: PTH208 - by descriptor
            raise WrongUsage(
                f"{place.given}: is there already, and not empty",
                hint="name a folder that does not exist; an old clone goes with: vpool rm DIR",
            )
    finally:
        os.close(fd)


def _check_outside(place: HostPath, parent_fd: int, source: Held, pool: Pool) -> None:
    target = Path(f"/proc/self/fd/{parent_fd}").readlink() / os.fsdecode(place.name)
    if target.is_relative_to(source.guest.root):
        raise WrongUsage(f"{place.given}: lies inside the source {source.guest.root}")
    pool_path = pool.path.resolve()
    if target.is_relative_to(pool_path):
        raise WrongUsage(f"{place.given}: lies inside the pool {pool.path}")
    if pool_path.is_relative_to(source.guest.root):
        raise WrongUsage(f"{source.guest.root}: the pool {pool.path} lies inside the source")


def _warn_of_leftovers(place: HostPath, parent_fd: int) -> None:
    stem = os.fsdecode(place.name[:_LONGEST_STEM] + _MARK)
    for name in os.listdir(parent_fd):
        if name.startswith(stem):
            with suppress(OSError):
                fd = os.open(name, inode.OPEN_FOLDER, dir_fd=parent_fd)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    folder = os.fspath(Path(f"/proc/self/fd/{parent_fd}").readlink())
                finally:
                    os.close(fd)
                log.warning(
                    "%s/%s: left by a clone that was killed; delete it with: vpool rm",
                    folder,
                    name,
                )


@contextmanager
def _growing(place: HostPath, parent_fd: int) -> Iterator[Tree]:
    """A new folder beside the target, under a flock that says that we live."""
    name = place.name[:_LONGEST_STEM] + _MARK + secrets.token_hex(4).encode()
    try:
        os.mkdir(name, 0o700, dir_fd=parent_fd)
        fd = os.open(name, inode.OPEN_FOLDER, dir_fd=parent_fd)
    except OSError as error:
        raise WrongUsage(f"{place.given}: cannot be made: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        folder = Path(f"/proc/self/fd/{parent_fd}").readlink()
        yield Tree(os.fspath(folder / os.fsdecode(name)), parent_fd, name, fd)
    finally:
        os.close(fd)


def _replicate(
    source: Held,
    tree: Tree,
    pool: Pool,
    result: CloneResult,
    progress: Progress,
    excludes: Excludes | None,
) -> None:
    progress.phase("clone")
    objects = pool.load_numbers()
    is_done = False

    def jobs() -> Iterator[tuple[tuple[int, int], None]]:
        while not is_done:
            yield (source.fd, tree.fd), None

    with guarded_worker(
        pool, lambda pool, windows, stage: Replicator(pool, windows, stage, objects, excludes)
    ) as crew:
        for _, answer in crew.map(jobs()):
            if answer is None:
                is_done = True
                continue
            counts, skipped, errors = answer
            result.add(counts, skipped)
            root = os.fspath(source.guest.root)
            result.errors += [(f"{root}/{os.fsdecode(path)}", reason) for path, reason in errors]
            progress.advance(counts["linked"] + counts["copied"])


def _rename(tree: Tree, place: HostPath) -> None:
    try:
        os.rename(tree.name, place.name, src_dir_fd=tree.parent_fd, dst_dir_fd=tree.parent_fd)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise WrongUsage(f"{place.given}: has been made by somebody else meanwhile") from error
        raise ToolError(f"{place.given}: cannot be made: {error.strerror}") from error


def _discard(tree: Tree, pool: Pool) -> None:
    """Delete what has grown; the reason why stands in the error that ends the clone."""
    try:
        left: Any = remove([tree], pool).errors
    except (ToolError, OSError) as error:
        left = error
    if left:
        log.warning("%s: an unfinished clone is left; delete it with: vpool rm", tree.path)
