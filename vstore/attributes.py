"""Inode attributes by path, for showattr and setattr, in the words of the original.

A stock kernel has one of the original's attributes, the immutable flag. Files are reached by
O_PATH descriptors, which open nothing: a FIFO or a device in a file's place does no harm.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path
from typing import Final

from vstore import inode, pool, scan, syscalls, window
from vstore.errors import NotPermitted, ToolError, WrongUsage

_LOOK: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_OPEN_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Attribute(IntFlag):
    """The original's attributes, with its numbers."""

    ADMIN = 0x1
    WATCH = 0x2
    HIDE = 0x4
    WRITE = 0x8
    BARRIER = 0x10000
    IUNLINK = 0x20000
    IMMUTABLE = 0x40000
    COW = 0x80000
    XID = 0x1000000


NONE: Final = Attribute(0)
_KNOWN: Final = Attribute(sum(Attribute))


@dataclass(frozen=True, slots=True)
class Shown:
    """The attributes of a path; `letters` is ERR where they cannot be read, `error` says why."""

    path: bytes
    letters: str
    is_immutable: bool = False
    error: ToolError | None = None


@dataclass(frozen=True, slots=True)
class Changed:
    """One path whose attributes were to be changed; `error` says why they were not."""

    path: bytes
    error: ToolError | None = None


@dataclass(frozen=True, slots=True)
class Reach:
    """What a path stands for besides itself."""

    contents: bool = False
    """What is in a directory."""
    recursive: bool = False
    """And in its directories, at any depth."""
    hidden: bool = True
    """Names that begin with a dot too."""
    one_filesystem: bool = False
    """Nothing on other file systems."""


def parse_attributes(text: str) -> Attribute:
    """A number as --flags takes it: decimal, 0x hexadecimal, 0o octal. Raises WrongUsage."""
    try:
        number = int(text, 0)
    except ValueError:
        number = -1
    if number < 0 or number & ~int(_KNOWN):
        raise WrongUsage(f"{text!r} is no number of known attributes")
    return Attribute(number)


def plan_immutable(wanted: Attribute, unwanted: Attribute) -> bool | None:
    """What the attributes to set and to clear come to on a stock kernel.

    True: set the immutable flag, False: clear it, None: nothing, since no inode has what is to be
    cleared. What is to be cleared is never set. Raises NotPermitted for what this kernel has not.
    """
    wanted &= ~unwanted
    missing = wanted & ~(Attribute.IMMUTABLE | Attribute.IUNLINK)
    if missing or wanted == Attribute.IUNLINK:
        names = ", ".join((flag.name or "").lower() for flag in missing or wanted)
        raise NotPermitted(
            f"this kernel has no attribute {names}",
            hint="a stock kernel has the immutable flag alone: --immutable, or --iunlink for both",
        )
    if Attribute.IMMUTABLE in wanted:
        return True
    return False if Attribute.IMMUTABLE in unwanted else None


def show(start: bytes, reach: Reach) -> Iterator[Shown]:
    """The attributes of `start`, or of what is in it where `reach` says so."""
    for path, found in _find(start, reach, with_folder=False):
        if isinstance(found, OSError):
            yield Shown(path, "ERR", error=_explain(path, found))
        else:
            yield _shown(path, found)


def change(start: bytes, reach: Reach, *, immutable: bool) -> Iterator[Changed]:
    """Set or clear the immutable flag of `start` and what `reach` adds, as the result is read.

    Symlinks, devices, FIFOs and sockets have no flags: below a directory they are passed over. An
    object, which guests share, is never thawed.
    """
    for path, found in _find(start, reach, with_folder=True):
        try:
            if isinstance(found, OSError):
                raise found
            if path == start or _has_flags(os.fstat(found)):
                _change_one(path, found, immutable=immutable)
                yield Changed(path)
        except OSError as error:
            yield Changed(path, _explain(path, error))
        except ToolError as error:
            yield Changed(path, error)


def _shown(path: bytes, fd: int) -> Shown:
    try:
        status = syscalls.statx(fd, 0)
    except OSError as error:
        return Shown(path, "ERR", error=_explain(path, error))
    is_set = bool(status.attributes & syscalls.STATX_ATTR_IMMUTABLE)
    is_known = status.attributes_mask & syscalls.STATX_ATTR_IMMUTABLE and _has_flags(os.fstat(fd))
    letter = "I" if is_set else "i" if is_known else "-"
    return Shown(path, f"------{letter}--", is_set)


def _has_flags(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)


def _change_one(path: bytes, look_fd: int, *, immutable: bool) -> None:
    if not _has_flags(os.fstat(look_fd)):
        raise WrongUsage(f"{os.fsdecode(path)}: is no file or directory, so it has no flags")
    with _opened(look_fd) as fd:
        if immutable:
            inode.set_immutable(fd)
        else:
            _refuse_object(path, fd)
            _thaw(path, fd)


@contextmanager
def _opened(look_fd: int) -> Iterator[int]:
    """A descriptor that ioctl(2) takes, of the very inode that was looked at."""
    fd = os.open(f"/proc/self/fd/{look_fd}", _OPEN)
    try:
        yield fd
    finally:
        os.close(fd)


def _thaw(path: bytes, fd: int) -> None:
    if not inode.get_flags(fd) & inode.FS_IMMUTABLE_FL:
        return
    try:
        window.thaw_private(fd)
    except NotPermitted as error:
        raise NotPermitted(f"{os.fsdecode(path)}: {error.message}", hint=error.hint) from error


def _refuse_object(path: bytes, fd: int) -> None:
    """An object that no guest uses has one name as well, the pool's own."""
    try:
        real = Path(f"/proc/self/fd/{fd}").readlink()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # no pool lies so deep
            return
        raise
    if real.parent.parent.name != "objects":
        return
    try:
        pool.parse_object(real.name)
    except ValueError:
        return
    raise NotPermitted(
        f"{os.fsdecode(path)}: is an object of a pool",
        hint="give one guest a private copy with: vpool break PATH; "
        "objects that no guest uses go with: vpool reclaim",
    )


def _explain(path: bytes, error: OSError) -> ToolError:
    shown = os.fsdecode(path)
    if error.errno in (errno.ENOTTY, errno.EOPNOTSUPP):
        return NotPermitted(f"{shown}: this file system has no immutable flag")
    if error.errno == errno.EPERM:
        return NotPermitted(
            f"{shown}: {error.strerror}", hint="flags need root, with CAP_LINUX_IMMUTABLE"
        )
    return ToolError(f"{shown}: {error.strerror}")


def _find(
    start: bytes, reach: Reach, *, with_folder: bool
) -> Iterator[tuple[bytes, int | OSError]]:
    """Each path with an O_PATH descriptor, which is closed when the next one is asked for."""
    try:
        start_fd = os.open(start, _LOOK)
    except OSError as error:
        yield start, error
        return
    try:
        is_folder = reach.contents and stat.S_ISDIR(os.fstat(start_fd).st_mode)
        if with_folder or not is_folder:
            yield start, start_fd
        if is_folder:
            yield from _Walk(start, start_fd, reach).run()
    finally:
        os.close(start_fd)


class _Walk:
    """What is below a directory, reached from it by descriptor and single component."""

    def __init__(self, start: bytes, start_fd: int, reach: Reach) -> None:
        self._reach = reach
        self._device = os.fstat(start_fd).st_dev
        self._root_fds = [os.dup(start_fd)]  # the start and each mount point below it
        self._pending = [(self._root_fds[0], b"", start)]  # root, path below it, path to show

    def run(self) -> Iterator[tuple[bytes, int | OSError]]:
        try:
            while self._pending:
                root_fd, below, shown = self._pending.pop()
                yield from self._read_folder(root_fd, below, shown)
        finally:
            for fd in self._root_fds:
                os.close(fd)

    def _read_folder(
        self, root_fd: int, below: bytes, shown: bytes
    ) -> Iterator[tuple[bytes, int | OSError]]:
        try:
            fd = self._enter(root_fd, below, shown)
        except OSError as error:
            yield shown, error
            return
        if fd is None:
            return
        try:
            if not self._reach.one_filesystem or os.fstat(fd).st_dev == self._device:
                yield from self._read_entries(fd, root_fd, below, shown)
        except OSError as error:
            yield shown, error
        finally:
            os.close(fd)

    def _enter(self, root_fd: int, below: bytes, shown: bytes) -> int | None:
        """A mount point is a new start of the walk, for later, unless that is unwanted."""
        try:
            return scan.open_below(root_fd, below, flags=_OPEN_FOLDER)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
        if not self._reach.one_filesystem:
            parent, _, name = below.rpartition(b"/")
            parent_fd = scan.open_below(root_fd, parent, flags=_OPEN_FOLDER)
            try:
                self._root_fds.append(os.open(name, _OPEN_FOLDER, dir_fd=parent_fd))
            finally:
                os.close(parent_fd)
            self._pending.append((self._root_fds[-1], b"", shown))
        return None

    def _read_entries(
        self, fd: int, root_fd: int, below: bytes, shown: bytes
    ) -> Iterator[tuple[bytes, int | OSError]]:
        folders = []
        for name in sorted(os.fsencode(entry) for entry in os.listdir(fd)):
            if name.startswith(b".") and not self._reach.hidden:
                continue
            path = os.path.join(shown, name)  # noqa: PTH118  (bytes)
            try:
                entry_fd = os.open(name, _LOOK, dir_fd=fd)
            except FileNotFoundError:
                continue  # removed since the folder was read
            try:
                yield path, entry_fd
                if self._reach.recursive and stat.S_ISDIR(os.fstat(entry_fd).st_mode):
                    folders.append((root_fd, below + b"/" + name if below else name, path))
            finally:
                os.close(entry_fd)
        self._pending += reversed(folders)
