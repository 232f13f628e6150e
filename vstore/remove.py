"""Delete a tree whose files are shared: rm(1) cannot, since no name of an object may be taken off.

Workers go through the tree twice: they take every name off, those of objects in thaw windows, many
at a time; then one of them removes the folders from the deepest up. Nothing is reached by a path,
so a folder that is swapped for a symlink leads nowhere.
"""

import errno
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vstore import inode, scan
from vstore.errors import PoolBusy, WrongUsage
from vstore.guest import Guest, confdir, rundir, vdirbase
from vstore.hold import hold_guests
from vstore.hostpath import HostPath, describe_kind, open_parent
from vstore.pool import Pool
from vstore.progress import SILENT, Progress
from vstore.quarantine import load_quarantined
from vstore.remover import FOLDERS, NOT_EMPTY, Remover, Share, explain
from vstore.undo import guarded_worker
from vstore.workers import core_count

_WORKERS: Final = 2


@dataclass(frozen=True, slots=True)
class Tree:
    """A tree to delete, held and open."""

    path: str
    parent_fd: int
    name: bytes
    fd: int


@dataclass(slots=True)
class RemoveResult:
    """What was deleted: names, folders among them; `errors` are (path, why it is left)."""

    names: int = 0
    shared: int = 0  # names of objects among them
    errors: list[tuple[str, str]] = field(default_factory=list)


@contextmanager
def open_trees(
    places: Sequence[HostPath], guests: Sequence[Guest], pool: Pool
) -> Iterator[list[Tree]]:
    """Open the trees, once it is certain that each may be deleted; guests in them are held.

    `guests` are all that are configured. Raises WrongUsage for what is no tree of its own, or holds
    or belongs to something that must stay; PoolBusy for a guest that runs or that somebody works
    on.
    """
    with ExitStack() as stack:
        trees = [_open(place, stack) for place in places]
        for tree in trees:
            _check(tree, pool)
        for guest in _concerned(trees, guests):
            (held,) = stack.enter_context(hold_guests([guest], pool.path, offline=True))
            if held.is_running:
                raise PoolBusy(
                    f"{guest.root}: the guest {guest.name} runs", hint="stop the guest first"
                )
        yield trees


def remove(trees: Sequence[Tree], pool: Pool, progress: Progress = SILENT) -> RemoveResult:
    """Delete the trees; what cannot be deleted is left, with the folders that lead to it.

    Raises PoolBusy; ToolError when somebody moves folders of a tree meanwhile.
    """
    result = RemoveResult()
    progress.phase("remove")
    with pool.share():
        numbers = pool.load_numbers(), load_quarantined(pool)
        work = _Work(trees, min(_WORKERS, core_count()))
        with guarded_worker(
            pool, lambda pool, windows, _: Remover(pool, windows, numbers), count=work.parts
        ) as crew:
            for (tree, share), answer in crew.map_each(work.choose):
                if answer is None:
                    work.done.add((tree, share))
                    continue
                names, shared, errors = answer
                result.names += names
                result.shared += shared
                result.errors += [
                    (f"{tree.path}/{os.fsdecode(path)}", reason) for path, reason in errors
                ]
                progress.advance(names)
    for tree in trees:
        _remove_top(tree, result)
    return result


@dataclass(slots=True)
class _Work:
    """Which share of which tree a worker is to go on with."""

    trees: Sequence[Tree]
    parts: int
    done: set[tuple[Tree, Share]] = field(default_factory=set)

    def choose(self, number: int) -> tuple[tuple[int, Share], tuple[Tree, Share]] | None:
        """The same share again and again until its worker is done with it; the first one removes
        the folders. None while there is nothing for this worker: one tree may lie in another, so
        the next one has to wait.
        """
        tree = next((tree for tree in self.trees if (tree, FOLDERS) not in self.done), None)
        if tree is None:
            return None
        share = (number, self.parts)
        if (tree, share) in self.done:
            left = [
                part for part in range(self.parts) if ((tree, (part, self.parts)) not in self.done)
            ]
            if left or number:
                return None
            share = FOLDERS
        return (tree.fd, share), (tree, share)


def _remove_top(tree: Tree, result: RemoveResult) -> None:
    try:
        now = os.stat(tree.name, dir_fd=tree.parent_fd, follow_symlinks=False)
    except FileNotFoundError:
        return  # it was part of another one
    if not os.path.samestat(now, os.fstat(tree.fd)):
        result.errors.append((tree.path, "another file has taken its place"))
        return
    try:
        os.rmdir(tree.name, dir_fd=tree.parent_fd)
        result.names += 1
    except OSError as error:
        if not (result.errors and error.errno in NOT_EMPTY):
            result.errors.append((tree.path, explain(error)))


# --- which trees may go


def _open(place: HostPath, stack: ExitStack) -> Tree:
    root_fd = -1
    try:
        if place.guest is not None:
            root_fd = os.open(place.guest.root, inode.OPEN_FOLDER)
            stack.callback(os.close, root_fd)
        parent_fd = open_parent(place.parent, root_fd)
        stack.callback(os.close, parent_fd)
        mode = os.stat(place.name, dir_fd=parent_fd, follow_symlinks=False).st_mode
        if not stat.S_ISDIR(mode):
            raise WrongUsage(
                f"{place.given}: is {describe_kind(mode)}, no tree",
                hint="name a folder; a single file goes with rm after: vpool break FILE",
            )
        fd = scan.open_below(parent_fd, place.name)
        stack.callback(os.close, fd)
    except OSError as error:
        reason = "is a mount point" if error.errno == errno.EXDEV else error.strerror
        raise WrongUsage(f"{place.given}: {reason}") from error
    return Tree(place.given.rstrip("/"), parent_fd, place.name, fd)


def _check(tree: Tree, pool: Pool) -> None:
    """Refuse what must stay. Folders are compared by inode: a bind mount is no disguise."""
    if os.fstat(tree.fd).st_dev != pool.device:
        raise WrongUsage(
            f"{tree.path}: is not on the file system of the pool {pool.path}",
            hint="nothing there is shared with this pool: use rm, or name its pool with --pool DIR",
        )
    kept = {
        "the host's root": Path("/"),
        "the folder of the guests' roots": vdirbase(),
        "the pool": pool.path,
        "the guests' configuration": confdir(),
        "the guests' run state": rundir(),
    }
    for what, path in kept.items():
        if _is_within(path, tree.fd):
            raise WrongUsage(f"{tree.path}: is or holds {what}, {path}, which is never deleted")
    if _key(pool.fd) in _lineage(tree.fd):
        raise WrongUsage(
            f"{tree.path}: lies inside the pool {pool.path}",
            hint="objects that no guest uses go with: vpool reclaim",
        )
    refuse_mounts(tree.path, tree.fd)


def refuse_mounts(path: str, fd: int) -> None:
    """Raises WrongUsage where something is mounted on or in the folder behind `fd`."""
    real = os.fspath(Path(f"/proc/self/fd/{fd}").readlink())
    for mount in _list_mounts():
        if mount == real or mount.startswith(f"{real}/"):
            raise WrongUsage(f"{path}: something is mounted at {mount}", hint="unmount it first")


def _key(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _lineage(fd: int) -> set[tuple[int, int]]:
    """The folder behind `fd` and every one above it, up to the root."""
    found: set[tuple[int, int]] = set()
    fd = os.dup(fd)
    try:
        while _key(fd) not in found:
            found.add(_key(fd))
            above = os.open("..", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
            os.close(fd)
            fd = above
    finally:
        os.close(fd)
    return found


def _is_within(path: Path, top_fd: int) -> bool:
    """Whether the folder at `path` is the one behind `top_fd` or lies in it."""
    try:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return _key(top_fd) in _lineage(fd)
    finally:
        os.close(fd)


def _list_mounts() -> Iterator[str]:
    """Every mount point that we see; see proc_pid_mountinfo(5)."""
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        yield re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line.split(" ")[4])


def _concerned(trees: Sequence[Tree], guests: Sequence[Guest]) -> Iterator[Guest]:
    """The guests whose roots a tree is, holds, or lies in."""
    lineages = [_lineage(tree.fd) for tree in trees]
    for guest in guests:
        status = guest.root.stat()
        key = (status.st_dev, status.st_ino)
        if any(key in lineage for lineage in lineages) or any(
            _is_within(guest.root, tree.fd) for tree in trees
        ):
            yield guest
