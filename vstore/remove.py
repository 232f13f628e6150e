"""Delete a tree whose files are shared: rm(1) cannot, since no name of an object may be taken off.

A worker goes through the tree twice: it takes every name off, those of objects in thaw windows,
many at a time; then it removes the folders from the deepest up. Nothing is reached by a path, so a
folder that is swapped for a symlink leads nowhere.
"""

import errno
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Final

from vstore import inode, scan
from vstore.descent import Barred, Descent, Entered, Left
from vstore.errors import PoolBusy, WrongUsage
from vstore.guest import Guest, confdir, rundir, vdirbase
from vstore.hold import hold_guests
from vstore.hostpath import HostPath, describe_kind, open_parent
from vstore.pool import InodeNumbers, Pool
from vstore.progress import SILENT, Progress
from vstore.quarantine import load_quarantined
from vstore.undo import guarded_worker
from vstore.window import Windows

_OBJECTS_A_BATCH: Final = 150
_NAMES_A_BATCH: Final = 1000
_NOT_REMOVED: Final = frozenset((errno.ENOTEMPTY, errno.EEXIST))

Answer = tuple[int, int, list[tuple[bytes, str]]]
"""Names deleted, those of objects among them, errors (path, reason): since the answer before."""


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
        done: set[Tree] = set()
        with guarded_worker(pool, lambda pool, windows, _: Remover(pool, windows, numbers)) as crew:
            for tree, answer in crew.map(_jobs(trees, done)):
                if answer is None:
                    done.add(tree)
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


def _jobs(trees: Sequence[Tree], done: set[Tree]) -> Iterator[tuple[int, Tree]]:
    """Each tree again and again until the worker is done with it."""
    for tree in trees:
        while tree not in done:
            yield tree.fd, tree


def _remove_top(tree: Tree, result: RemoveResult) -> None:
    now = os.stat(tree.name, dir_fd=tree.parent_fd, follow_symlinks=False)
    if not os.path.samestat(now, os.fstat(tree.fd)):
        result.errors.append((tree.path, "another file has taken its place"))
        return
    try:
        os.rmdir(tree.name, dir_fd=tree.parent_fd)
        result.names += 1
    except OSError as error:
        if not (result.errors and error.errno in _NOT_REMOVED):
            result.errors.append((tree.path, _explain(error)))


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
    real = os.fspath(Path(f"/proc/self/fd/{tree.fd}").readlink())
    for mount in _list_mounts():
        if mount == real or mount.startswith(f"{real}/"):
            raise WrongUsage(
                f"{tree.path}: something is mounted at {mount}", hint="unmount it first"
            )


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


# --- the worker's side


@dataclass(slots=True)
class _Shared:
    """An object and its names in a batch, each (its folder's descriptor, name, path)."""

    fd: int
    names: list[tuple[int, bytes, bytes]] = field(default_factory=list)


class Remover:
    """Deletes what is below a folder; a holder of windows for `guarded_worker`.

    `frozen` are the inode numbers of all objects, and of those in quarantine.
    """

    def __init__(
        self, pool: Pool, windows: Windows, frozen: tuple[InodeNumbers, frozenset[int]]
    ) -> None:
        self._windows = windows
        self._pool_ino = os.fstat(pool.fd).st_ino
        self._objects, self._quarantined = frozen
        self._runs: dict[int, Iterator[Answer]] = {}
        self._folders: list[int] = []
        self._batch: list[tuple[int, bytes, bytes]] = []
        self._names = 0
        self._shared = 0
        self._errors: list[tuple[bytes, str]] = []

    def serve(self, root_fd: int) -> Iterator[Answer | None]:
        """Go on deleting all below `root_fd`, for a while; yields None at the end."""
        if root_fd not in self._runs:
            names, folders = self._take_names_off(root_fd), self._remove_folders(root_fd)
            self._runs[root_fd] = chain(names, folders)
        yield next(self._runs[root_fd], None)

    def _take_names_off(self, root_fd: int) -> Iterator[Answer]:
        descent = Descent(root_fd, barred_ino=self._pool_ino)
        for step in descent.steps():
            if isinstance(step, Entered):
                own_fd = -1
                for entry in step.entries:
                    number = entry.inode()
                    name = os.fsencode(entry.name)
                    if number not in self._objects and number not in self._quarantined:
                        self._unlink(step.fd, name, descent)
                        continue
                    if own_fd < 0:
                        own_fd = self._keep_open(step.fd)
                    self._batch.append((own_fd, name, descent.path(name)))
                    if len(self._batch) >= _OBJECTS_A_BATCH:
                        yield self._flush()
                        own_fd = -1
            elif isinstance(step, Barred):
                self._note_barred(descent.path(step.name), step.error)
            if self._names >= _NAMES_A_BATCH:
                yield self._flush()
        self._errors += descent.errors
        yield self._flush()

    def _keep_open(self, folder_fd: int) -> int:
        self._folders.append(os.dup(folder_fd))
        return self._folders[-1]

    def _unlink(self, folder_fd: int, name: bytes, descent: Descent) -> None:
        try:
            os.unlink(name, dir_fd=folder_fd)
            self._names += 1
        except FileNotFoundError:
            pass
        except OSError as error:
            self._errors.append((descent.path(name), _explain(error)))

    def _note_barred(self, path: bytes, error: OSError) -> None:
        if error.errno == errno.EXDEV:
            self._errors.append((path, "another file system is mounted there, or a subvolume"))
        elif error.errno != errno.ENOENT:
            self._errors.append((path, f"cannot be entered: {error.strerror}"))

    def _flush(self) -> Answer:
        """Take the names of the batch off, in one window for each object."""
        objects = self._open_objects()
        with self._windows.guard([item.fd for item in objects]) as refused:
            for item in objects:
                self._take_off(item, is_refused=item.fd in refused)
        for fd in self._folders:
            os.close(fd)
        answer = self._names, self._shared, self._errors
        self._folders, self._batch, self._errors = [], [], []
        self._names = self._shared = 0
        return answer

    def _open_objects(self) -> list[_Shared]:
        found: dict[int, _Shared] = {}
        for folder_fd, name, path in self._batch:
            try:
                fd = os.open(name, inode.OPEN_TO_READ, dir_fd=folder_fd)
            except FileNotFoundError:
                continue
            except OSError as error:
                self._errors.append((path, f"cannot be opened: {error.strerror}"))
                continue
            number = os.fstat(fd).st_ino
            if number in found:
                os.close(fd)
            else:
                found[number] = _Shared(fd)
            found[number].names.append((folder_fd, name, path))
        return list(found.values())

    def _take_off(self, item: _Shared, *, is_refused: bool) -> None:
        try:
            if not inode.is_immutable(item.fd):
                self._unlink_all(item)
            elif is_refused:
                reason = "somebody has the shared file open for writing"
                self._errors += [(path, reason) for _, _, path in item.names]
            else:
                with self._windows.thawed(item.fd):
                    self._unlink_all(item)
        except OSError as error:
            self._errors += [(path, _explain(error)) for _, _, path in item.names]

    def _unlink_all(self, item: _Shared) -> None:
        for folder_fd, name, path in item.names:
            try:
                os.unlink(name, dir_fd=folder_fd)
            except FileNotFoundError:
                continue
            except OSError as error:
                self._errors.append((path, _explain(error)))
            else:
                self._names += 1
                self._shared += 1

    def _remove_folders(self, root_fd: int) -> Iterator[Answer]:
        descent = Descent(root_fd, barred_ino=self._pool_ino)
        for step in descent.steps():
            if isinstance(step, Left) and step.fd >= 0:
                try:
                    os.rmdir(step.name, dir_fd=step.fd)
                    self._names += 1
                except OSError as error:
                    if error.errno not in _NOT_REMOVED:
                        self._errors.append((descent.path(step.name), _explain(error)))
            if self._names >= _NAMES_A_BATCH:
                yield self._flush()
        yield self._flush()


def _explain(error: OSError) -> str:
    if error.errno == errno.EPERM:
        return "is immutable or append-only, or its folder is, and no object: see setattr, lsattr"
    return f"cannot be deleted: {error.strerror}"
