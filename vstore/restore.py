"""Make a guest whole again from a manifest: what a backup of its own entries lacks.

Shared files become links to the pool's objects again, made in thaw windows; a name that is there
stays as it is. Names that had an object each get one each again: where the one that the manifest
names is gone or taken, another of the same identity is used, else a private copy is made of one.
Folders get the owner, mode, times and attributes that the manifest says.
"""

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import groupby
from typing import Final

from vstore import inode, syscalls
from vstore.breaklink import correct_copy, make_private_copy
from vstore.errors import NotPermitted
from vstore.folders import Missed, join, list_shared
from vstore.hold import Held
from vstore.manifest import Manifest, SavedFolder
from vstore.pool import InodeNumbers, Pool
from vstore.progress import SILENT, Progress
from vstore.recovery import is_sound
from vstore.scan import open_below
from vstore.undo import guarded_worker
from vstore.window import Windows

# What became of a name.
LINKED: Final = "linked"
COPIED: Final = "copied"
FULL: Final = "full"  # the object takes no more links: another one is needed
COPY: Final = "copy"  # no link can be made here (another project): a copy is needed

_NAMES_A_JOB: Final = 100
_PROC_FDS: Final = "/proc/self/fd"
_NO_OBJECT: Final = "its object is no longer in the pool"
_NOT_FROZEN: Final = "its object is not frozen; see vpool verify"
_OPEN_FOR_WRITING: Final = "its object is open for writing; see vpool verify"
_OTHER_FILE: Final = "another file is there, which was left as it is"

Wanted = tuple[bytes, str, int, bool]
"""One name of a job: name, object's path below `objects`, its inode number, whether to copy it."""


@dataclass(slots=True)
class RestoreResult:
    """What was made, and what could not be: errors are (path below the guest's root, reason)."""

    files_linked: int = 0
    files_copied: int = 0
    files_present: int = 0
    folders_made: int = 0
    errors: list[tuple[bytes, str]] = field(default_factory=list)


def restore(
    manifest: Manifest, held: Held, pool: Pool, progress: Progress = SILENT
) -> RestoreResult:
    """Make what the manifest names and the guest lacks. Nothing that is there is replaced.

    Raises NotPermitted for a pool without objects; PoolBusy.
    """
    with pool.share():
        objects = pool.load_numbers()
        if not objects:
            raise NotPermitted(
                f"{pool.path}: the pool has no objects that files could be made from",
                hint="guests that share blocks (--link reflink) must be backed up whole",
            )
        run = _Restore(manifest, held, pool, objects)
        run.make_folders()
        missing = run.find_missing()
        progress.phase("link", len(missing))
        with guarded_worker(pool, lambda pool, windows, _: _Maker(pool, windows)) as crew:
            while missing:
                jobs = list(run.plan(missing))
                missing = []
                for (path, names), outcomes in crew.map(jobs):
                    missing += run.count(path, names, outcomes)
                    progress.advance(len(names))
        run.finish_folders()
        syscalls.syncfs(pool.fd)
    return run.result


class _Offers:
    """The objects of the identities that a manifest names, and which of them the guest uses."""

    def __init__(self, manifest: Manifest, pool: Pool) -> None:
        self._users: dict[int, str | None] = {}
        self._full: set[int] = set()
        self._objects: dict[str, dict[int, tuple[str, int]]] = {
            _identity_of(name): {} for name in manifest.files.values()
        }
        for path, ino in pool.list_objects():
            found = self._objects.get(_identity_of(path[3:]))
            if found is not None:
                found[_number_of(path)] = (path, ino)

    def use(self, ino: int, name: str | None) -> None:
        """Note a name that is the object `ino`; for it the manifest says `name` (None: nothing)."""
        self._users[ino] = name if self._users.get(ino, name) == name else None

    def mark_full(self, ino: int) -> None:
        self._full.add(ino)

    def find_exact(self, name: str) -> tuple[str, int] | None:
        """The object of that very name (path, inode number), if the guest may use it."""
        found = self._objects[_identity_of(name)].get(_number_of(name))
        return found if found and self._is_free(found[1], name) else None

    def find_other(self, name: str) -> tuple[str, int] | None:
        """The first object of the same identity that the guest may use."""
        for _, found in sorted(self._objects[_identity_of(name)].items()):
            if self._is_free(found[1], name):
                return found
        return None

    def find_any(self, name: str) -> tuple[str, int] | None:
        """An object of the same identity, to copy."""
        return next(iter(self._objects[_identity_of(name)].values()), None)

    def has(self, name: str, ino: int) -> bool:
        """Whether `ino` is an object of the same identity."""
        return any(ino == number for _, number in self._objects[_identity_of(name)].values())

    def _is_free(self, ino: int, name: str) -> bool:
        return ino not in self._full and self._users.get(ino, name) == name


def _identity_of(name: str) -> str:
    return name.rpartition("-")[0]


def _number_of(name: str) -> int:
    text = name.rpartition("-")[2]
    return int(text) if text.isdecimal() else -1


class _Restore:
    """One run: what the manifest wants, what is there, what is to be made."""

    def __init__(self, manifest: Manifest, held: Held, pool: Pool, objects: InodeNumbers) -> None:
        self._manifest = manifest
        self._root_fd = held.fd
        self._pool = pool
        self._offers = _Offers(manifest, pool)
        self._to_copy: set[bytes] = set()
        self.result = RestoreResult()
        missed = Missed()
        pool_ino = os.fstat(pool.fd).st_ino
        for item in list_shared(held.fd, objects, missed, skip_ino=pool_ino):
            self._offers.use(item.ino, manifest.files.get(item.path))
        self.result.errors += missed.errors

    # --- folders

    def make_folders(self) -> None:
        """Make those that are missing, for root alone until they are finished."""
        for folder in self._manifest.folders:
            if folder.path:
                try:
                    self._make_folder(folder.path)
                except OSError as error:
                    self._note(folder.path, f"cannot be made: {error.strerror}")

    def _make_folder(self, path: bytes) -> None:
        above, _, name = path.rpartition(b"/")
        fd = open_below(self._root_fd, above)
        try:
            os.mkdir(name, 0o700, dir_fd=fd)
            self.result.folders_made += 1
        except FileExistsError:
            if not stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
                raise
        finally:
            os.close(fd)

    def finish_folders(self) -> None:
        """Give the folders what the manifest says, now that nothing is made in them any more."""
        failed = {path for path, _ in self.result.errors}
        for folder in self._manifest.folders:
            if folder.path not in failed:
                try:
                    _finish_folder(self._root_fd, folder)
                except OSError as error:
                    self._note(folder.path, f"owner, mode or times not set: {error.strerror}")

    # --- files

    def find_missing(self) -> list[bytes]:
        """The paths of the manifest where nothing is; what is there is counted or noted."""
        missing: list[bytes] = []
        files = sorted(self._manifest.files, key=_place_of)
        for folder, paths in groupby(files, key=lambda path: path.rpartition(b"/")[0]):
            try:
                fd = open_below(self._root_fd, folder)
            except OSError as error:
                for path in paths:
                    self._note(path, f"its folder cannot be opened: {error.strerror}")
                continue
            try:
                missing += [path for path in paths if self._is_missing(fd, path)]
            finally:
                os.close(fd)
        return missing

    def _is_missing(self, folder_fd: int, path: bytes) -> bool:
        try:
            is_same = self._is_same(folder_fd, path)
        except FileNotFoundError:
            return True
        except OSError as error:
            self._note(path, f"cannot be compared: {error.strerror}")
            return False
        if is_same:
            self.result.files_present += 1
        else:
            self._note(path, _OTHER_FILE)
        return False

    def _is_same(self, folder_fd: int, path: bytes) -> bool:
        """Whether the file that is there is the one that the manifest names, shared or not."""
        name, wanted = path.rpartition(b"/")[2], self._manifest.files[path]
        status = os.stat(name, dir_fd=folder_fd, follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode):
            return False
        if self._offers.has(wanted, status.st_ino):
            return True
        fd = os.open(name, inode.OPEN_TO_READ, dir_fd=folder_fd)
        try:
            return is_sound(f"{wanted[:2]}/{wanted}", fd)
        finally:
            os.close(fd)

    def plan(
        self, missing: Sequence[bytes]
    ) -> Iterator[tuple[tuple[int, bytes, list[Wanted]], tuple[bytes, list[Wanted]]]]:
        """The jobs that make these paths; what cannot be made is noted."""
        chosen = self._choose(missing)
        files = [path for path in missing if path in chosen]
        for folder, paths in groupby(files, key=lambda path: path.rpartition(b"/")[0]):
            names = [(path.rpartition(b"/")[2], *chosen[path]) for path in paths]
            for start in range(0, len(names), _NAMES_A_JOB):
                some = names[start : start + _NAMES_A_JOB]
                yield (self._root_fd, folder, some), (folder, some)

    def _choose(self, missing: Sequence[bytes]) -> dict[bytes, tuple[str, int, bool]]:
        """For each path its object (path, inode number), and whether to copy that."""
        chosen: dict[bytes, tuple[str, int, bool]] = {}
        for find in (self._offers.find_exact, self._offers.find_other):
            for path in missing:
                name = self._manifest.files[path]
                if path not in chosen and path not in self._to_copy and (found := find(name)):
                    self._offers.use(found[1], name)
                    chosen[path] = (*found, False)
        for path in missing:
            if path not in chosen:
                found = self._offers.find_any(self._manifest.files[path])
                if found is None:
                    self._note(path, _NO_OBJECT)
                else:
                    chosen[path] = (*found, True)
        return chosen

    def count(self, folder: bytes, names: Sequence[Wanted], outcomes: Sequence[str]) -> list[bytes]:
        """Take in what became of the names of a job; returns the paths to be planned anew."""
        again = []
        for (name, _, ino, is_copy), outcome in zip(names, outcomes, strict=True):
            path = join(folder, name)
            if outcome == LINKED:
                self.result.files_linked += 1
            elif outcome == COPIED:
                self.result.files_copied += 1
            elif outcome in (FULL, COPY) and not is_copy:
                again.append(path)
                if outcome == FULL:
                    self._offers.mark_full(ino)
                else:
                    self._to_copy.add(path)
            else:
                self._note(path, outcome)
        return again

    def _note(self, path: bytes, reason: str) -> None:
        self.result.errors.append((path, reason))


def _place_of(path: bytes) -> tuple[bytes, bytes]:
    folder, _, name = path.rpartition(b"/")
    return folder, name


def _finish_folder(root_fd: int, folder: SavedFolder) -> None:
    fd = open_below(root_fd, folder.path)
    try:
        before = os.fstat(fd)
        if (before.st_uid, before.st_gid) != (folder.uid, folder.gid):
            os.fchown(fd, folder.uid, folder.gid)
        inode.store_xattrs(fd, folder.xattrs)  # an ACL's mask changes the mode, so first
        if stat.S_IMODE(os.fstat(fd).st_mode) != folder.mode:
            os.fchmod(fd, folder.mode)
        if os.fstat(fd).st_mtime_ns != folder.mtime_ns:
            os.utime(fd, ns=(before.st_atime_ns, folder.mtime_ns))
    finally:
        os.close(fd)


# --- the worker's part


class _Maker:
    """Makes names that are links to objects, in windows of its own, or copies of them."""

    def __init__(self, pool: Pool, windows: Windows) -> None:
        self._pool = pool
        self._windows = windows
        self._proc_fd = os.open(_PROC_FDS, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def serve(self, job: tuple[int, bytes, list[Wanted]]) -> Iterable[list[str]]:
        """Make names in one folder: (root, the folder's path, names). Yields all outcomes."""
        root_fd, path, wanted = job
        try:
            folder_fd = open_below(root_fd, path)
        except OSError as error:
            yield [f"its folder cannot be opened: {error.strerror}"] * len(wanted)
            return
        try:
            before = os.fstat(folder_fd)
            outcomes = self._make_all(folder_fd, wanted)
            with suppress(OSError):
                os.utime(folder_fd, ns=(before.st_atime_ns, before.st_mtime_ns))
        finally:
            os.close(folder_fd)
        yield outcomes

    def _make_all(self, folder_fd: int, wanted: Sequence[Wanted]) -> list[str]:
        outcomes: dict[int, str] = {}
        opened: dict[int, int] = {}
        copies: dict[int, int] = {}
        with ExitStack() as stack:
            for place, (_, path, ino, is_copy) in enumerate(wanted):
                try:
                    if ino not in opened:
                        opened[ino] = self._open(path, ino)
                    if is_copy:
                        copies[place] = make_private_copy(opened[ino], folder_fd)
                        stack.callback(os.close, copies[place])
                except OSError as error:
                    outcomes[place] = _explain(error)
            refused = stack.enter_context(self._windows.guard(list(opened.values())))
            for place, (name, path, ino, _) in enumerate(wanted):
                if place in outcomes:
                    continue
                if opened[ino] in refused:
                    outcomes[place] = _OPEN_FOR_WRITING
                elif place in copies:
                    outcomes[place] = self._put(folder_fd, name, copies[place], opened[ino])
                else:
                    outcomes[place] = self._link(folder_fd, name, path, opened[ino])
        return [outcomes[place] for place in range(len(wanted))]

    def _open(self, path: str, ino: int) -> int:
        fd = self._pool.open_object(path)
        if os.fstat(fd).st_ino == ino and inode.is_immutable(fd):
            return fd
        os.close(fd)
        raise OSError(errno.ESTALE, "not the object that it was")

    def _put(self, folder_fd: int, name: bytes, copy_fd: int, object_fd: int) -> str:
        try:
            correct_copy(copy_fd, object_fd)
            os.link(str(copy_fd), name, src_dir_fd=self._proc_fd, dst_dir_fd=folder_fd)
        except OSError as error:
            return _explain(error)
        return COPIED

    def _link(self, folder_fd: int, name: bytes, path: str, fd: int) -> str:
        """link(2) makes the whole name at once and never replaces one, so no spare is needed."""
        try:
            with self._windows.thawed(fd):
                os.link(path, name, src_dir_fd=self._pool.objects_fd, dst_dir_fd=folder_fd)
        except OSError as error:
            return _explain(error)
        return LINKED


def _explain(error: OSError) -> str:
    if error.errno == errno.EMLINK:
        return FULL
    if error.errno == errno.EXDEV:
        return COPY
    if error.errno == errno.EEXIST:
        return _OTHER_FILE
    if error.errno == errno.ESTALE:
        return _NOT_FROZEN
    return f"cannot be made: {error.strerror}"
