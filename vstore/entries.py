"""Copies of single entries of a folder, with all that their metadata say, by descriptor."""

import os
import stat
from typing import Final

from vstore import extents, inode

_NEW_FILE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def copy_file(source_fd: int, target_fd: int, name: bytes) -> int:
    """Make `name` in the folder `target_fd` a copy of the file behind `source_fd`, all of it or
    none; its size in bytes. Raises OSError.
    """
    status = os.fstat(source_fd)
    fd = os.open(name, _NEW_FILE, 0o600, dir_fd=target_fd)
    try:
        extents.copy_data(source_fd, fd, size=status.st_size)
        inode.copy_ownership(status, inode.load_xattrs(source_fd), fd)
    except OSError:
        os.unlink(name, dir_fd=target_fd)
        raise
    finally:
        os.close(fd)
    return status.st_size


def copy_other(source_fd: int, target_fd: int, name: bytes, status: os.stat_result) -> None:
    """Make `name` of the folder `source_fd` again in `target_fd`: a symlink, device or FIFO, which
    cannot be opened. Raises OSError.
    """
    if stat.S_ISLNK(status.st_mode):
        os.symlink(os.readlink(name, dir_fd=source_fd), name, dir_fd=target_fd)
    else:
        os.mknod(name, stat.S_IFMT(status.st_mode) | 0o600, status.st_rdev, dir_fd=target_fd)
    source, target = place_of(source_fd, name), place_of(target_fd, name)
    os.chown(target, status.st_uid, status.st_gid, follow_symlinks=False)
    if not stat.S_ISLNK(status.st_mode):
        os.chmod(target, stat.S_IMODE(status.st_mode))  # noqa: PTH101 - we have just made it
    for key in os.listxattr(source, follow_symlinks=False):
        value = os.getxattr(source, key, follow_symlinks=False)
        os.setxattr(target, key, value, follow_symlinks=False)
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)


def place_of(folder_fd: int, name: bytes) -> bytes:
    """A path for the calls that take no descriptor."""
    return b"/proc/self/fd/%d/%s" % (folder_fd, name)
