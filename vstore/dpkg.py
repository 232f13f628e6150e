"""What a Debian guest's dpkg knows of it, read from its tree; nothing of the guest is run.

The tree belongs to a stranger: its files are opened below its root only, whatever its symlinks say,
never a FIFO or device, and not past a size that no dpkg reaches.
"""

import errno
import logging
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from vstore import syscalls

log = logging.getLogger(__name__)

DATABASE: Final = b"var/lib/dpkg"

_OPEN_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_MOST_BYTES: Final = 16 << 20
"""Twice the status file of a machine with ten thousand packages."""
_CONFFILES_FIELD: Final = re.compile(
    rb"^Conffiles:[^\n]*\n((?:[ \t][^\n]*(?:\n|\Z))+)", re.M | re.I
)
_STATUS_LINE: Final = re.compile(
    rb"^[ \t]+(/[^\n]*?) (?:[0-9a-f]{32}|newconffile)(?: obsolete| remove-on-upgrade)*[ \t]*$",
    re.M,
)
_LIST_LINE: Final = re.compile(rb"^(?:remove-on-upgrade +)?(/[^\n]*)", re.M)


def conffiles(root: Path | int) -> frozenset[bytes]:
    """The configuration files that dpkg manages in the tree `root` (a path or a descriptor).

    From var/lib/dpkg/status and info/*.conffiles; each with a leading slash. A tree without dpkg
    data, of an rpm guest say, has none; data that cannot be read counts as missing, with a warning.
    """
    root_fd = os.open(root, _OPEN_FOLDER) if isinstance(root, Path) else os.dup(root)
    try:
        return frozenset((*_from_status(root_fd), *_from_lists(root_fd)))
    finally:
        os.close(root_fd)


def _from_status(root_fd: int) -> Iterator[bytes]:
    text = _read(root_fd, DATABASE + b"/status")
    for field in _CONFFILES_FIELD.finditer(text):
        yield from _STATUS_LINE.findall(field[1])


def _from_lists(root_fd: int) -> Iterator[bytes]:
    """Those of packages that are unpacked but not configured, which status does not name yet."""
    folder = DATABASE + b"/info"
    for name in _names_in(root_fd, folder):
        if name.endswith(b".conffiles"):
            paths = _LIST_LINE.findall(_read(root_fd, folder + b"/" + name))
            yield from (path.rstrip() for path in paths)


def _names_in(root_fd: int, folder: bytes) -> list[bytes]:
    try:
        with _opened_inside(root_fd, folder, flags=_OPEN_FOLDER) as fd:
            return [os.fsencode(name) for name in os.listdir(fd)]  # noqa: PTH208
    except OSError as error:
        _tell(root_fd, folder, error)
        return []


def _read(root_fd: int, path: bytes) -> bytes:
    """The content of a regular file below the root; nothing where it cannot be had."""
    try:
        with _opened_inside(root_fd, path, flags=os.O_PATH) as look_fd:
            status = os.fstat(look_fd)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "it is no regular file")
            if status.st_size > _MOST_BYTES:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
            with Path(f"/proc/self/fd/{look_fd}").open("rb") as file:
                return file.read(_MOST_BYTES)
    except OSError as error:
        _tell(root_fd, path, error)
        return b""


@contextmanager
def _opened_inside(root_fd: int, path: bytes, *, flags: int) -> Iterator[int]:
    """Open `path` as a process with the root `root_fd` would: no symlink, no `..` leads out."""
    resolve = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS
    fd = syscalls.openat2(root_fd, path, flags=flags, resolve=resolve)
    try:
        yield fd
    finally:
        os.close(fd)


def _tell(root_fd: int, path: bytes, error: OSError) -> None:
    if error.errno != errno.ENOENT:
        root = Path(f"/proc/self/fd/{root_fd}").readlink()
        reason = error.strerror
        log.warning("%s: taken as missing: %s", root / os.fsdecode(path), reason)
