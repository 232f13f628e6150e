"""What the host changes in a guest's tree right before it starts: leftovers of its last run.

Everything is reached from a descriptor of the guest's root, and no link leads out of it. What
cannot be changed (a tree mounted read-only) is left as it is.
"""

import errno
import os
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from vrun.spec import GuestSpec
from vstore import syscalls

_IN_GUEST: Final = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY
_NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_UTMP: Final = struct.Struct("hi32s4s32s256shhiii4i20s")  # struct utmp of utmp.h, 384 bytes
_RUN_LVL: Final = 1
_DEEPEST: Final = 32  # a guest may nest folders until we have no descriptors left


def resolve(root_fd: int, path: str) -> str:
    """What `path` of the guest is by the guest's own links, as the host names it; "" if nothing."""
    try:
        fd = _open(root_fd, path, os.O_PATH)
    except OSError:
        return ""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115 (text, no Path)
    finally:
        os.close(fd)


def prepare(spec: GuestSpec, root_fd: int) -> None:
    """Take away what the last run left, as the init style needs it. Raises OSError."""
    with suppress_read_only():
        if spec.init.style == "plain":
            _prepare_plain(root_fd)
        elif spec.init.style == "sysv":
            _empty(root_fd, "var/run")
            _empty(root_fd, "var/lock")
            _write_runlevel(root_fd, spec.init.runlevel_start or "3")


def write_mtab(spec: GuestSpec, root_fd: int) -> None:
    """Write the guest's /etc/mtab, where it has a fstab and no link to what the kernel says.

    Raises OSError.
    """
    if not spec.mounts:
        return
    try:
        folder = _open(root_fd, "etc", _FOLDER)
    except OSError:
        return
    with suppress_read_only():
        try:
            if _is_mtab_ours(folder):
                with suppress(FileNotFoundError):
                    os.unlink("mtab", dir_fd=folder)
                fd = os.open("mtab", _NEW_FILE, 0o644, dir_fd=folder)
                with os.fdopen(fd, "wb") as file:
                    file.write(os.fsencode(_mtab(spec)))
        finally:
            os.close(folder)


def _is_mtab_ours(folder: int) -> bool:
    try:
        return stat.S_ISREG(os.stat("mtab", dir_fd=folder, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return True


def _mtab(spec: GuestSpec) -> str:
    """The template and the fstab; disks go as `ufs`, which df(1) inside does not look into."""
    lines = [spec.init.mtab.rstrip("\n")]
    for mount in spec.mounts:
        kind = "ufs" if mount.fstype.startswith("ext") else mount.fstype
        if mount.target != "/" and "nomtab" not in mount.options:
            words = (mount.source, mount.target, kind, ",".join(mount.options) or "defaults")
            lines.append(f"{' '.join(words)} 0 0")
    return "\n".join(filter(None, lines)) + "\n"


@contextmanager
def suppress_read_only() -> Iterator[None]:
    """A tree that cannot be written is left as it is."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EPERM, errno.EACCES):
            raise


def _prepare_plain(root_fd: int) -> None:
    """No file system check when the guest starts: its file systems are the host's."""
    for name in (".autofsck", "forcefsck"):
        with suppress(FileNotFoundError, IsADirectoryError):
            os.unlink(name, dir_fd=root_fd)
    with suppress(FileExistsError):
        os.close(os.open("fastboot", _NEW_FILE, 0o644, dir_fd=root_fd))


def _open(root_fd: int, path: str, flags: int) -> int:
    return syscalls.openat2(root_fd, os.fsencode(path), flags=flags, resolve=_IN_GUEST)


def _empty(root_fd: int, path: str) -> None:
    """Remove all that is no folder at and below `path`; nothing if it is none."""
    try:
        fd = _open(root_fd, path, _FOLDER)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return
        raise
    try:
        _empty_folder(fd, os.fstat(fd).st_dev)
    finally:
        os.close(fd)


def _empty_folder(fd: int, device: int, depth: int = 0) -> None:
    for name in os.listdir(fd):
        status = os.stat(name, dir_fd=fd, follow_symlinks=False)
        if not stat.S_ISDIR(status.st_mode):
            with suppress_read_only():
                os.unlink(name, dir_fd=fd)
        elif status.st_dev == device and depth < _DEEPEST:
            flags = _FOLDER | os.O_NOFOLLOW | os.O_CLOEXEC
            below = os.open(name, flags, dir_fd=fd)
            try:
                _empty_folder(below, device, depth + 1)
            finally:
                os.close(below)


def _write_runlevel(root_fd: int, level: str) -> None:
    """A utmp that says in which runlevel the guest is: programs of packages ask for it."""
    try:
        folder = _open(root_fd, "var/run", _FOLDER)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return
        raise
    try:
        fd = os.open("utmp", _NEW_FILE, 0o664, dir_fd=folder)
        with os.fdopen(fd, "wb") as file:
            file.write(_runlevel_record(level))
    finally:
        os.close(folder)


def _runlevel_record(level: str) -> bytes:
    pid = ord(level[0]) + 256 * ord("N")  # runlevel(8): this one, and the one before
    seconds = int(time.time()) & 0x7FFFFFFF
    words = (b"~", b"~~", b"runlevel", b"")
    return _UTMP.pack(_RUN_LVL, pid, *words, 0, 0, 0, seconds, 0, 0, 0, 0, 0, b"")
