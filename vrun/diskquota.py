"""Project quota: how much of a file system the files of one project may take up.

A file's project is a number in its inode; what is made in a folder with FS_XFLAG_PROJINHERIT gets
the folder's. Hard links and renames across projects into such a folder answer EXDEV. Sources:
quotactl(2), linux/quota.h, linux/dqblk_xfs.h, ioctl_fsgetxattr of linux/fs.h.
"""

import errno
import fcntl
import os
import stat
import struct
from typing import Final

from vrun import syscalls
from vstore.inode import FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR
from vstore.record import dataclass

_GET_QUOTA: Final = 0x800007
_SET_QUOTA: Final = 0x800008
_GET_STATE: Final = 0x5805  # Q_XGETQSTAT, which ext4 answers too
_PROJECT: Final = 2  # PRJQUOTA
_DQBLK: Final = struct.Struct("=8QI4x")
"""struct if_dqblk: hard and soft limit (KiB) and use (bytes) of space, the same of inodes, times,
which of them count."""
_LIMITS_COUNT: Final = 1 | 4  # QIF_BLIMITS | QIF_ILIMITS
_STATE: Final = struct.Struct("=bxH")  # how struct fs_quota_stat begins: version, flags
_STATE_SIZE: Final = 128
_IS_ENFORCED: Final = 1 << 5  # FS_QUOTA_PDQ_ENFD
_NONE: Final = frozenset({errno.ENOSYS, errno.EINVAL, errno.ESRCH, errno.EOPNOTSUPP, errno.ENOTTY})

_FSXATTR: Final = struct.Struct("=5I8x")
_IMMUTABLE: Final = 0x8  # FS_XFLAG_IMMUTABLE
_INHERIT: Final = 0x200  # FS_XFLAG_PROJINHERIT


@dataclass(frozen=True, slots=True)
class Quota:
    """Of one project on one file system."""

    space_total: int | None
    """Bytes, a multiple of 1024; None is no limit."""
    inodes_total: int | None
    space_used: int = 0
    inodes_used: int = 0


class Shared(Exception):
    """A file is immutable and has several names, as objects of a pool have."""

    def __init__(self, path: bytes) -> None:
        super().__init__(path)
        self.path = path
        """From the folder that was to be given to the project."""


def is_enforced(fd: int) -> bool:
    """Whether the file system of `fd` counts and limits projects. Raises OSError."""
    try:
        answer = syscalls.quotactl_fd(fd, _GET_STATE, _PROJECT, 0, bytes(_STATE_SIZE))
    except OSError as error:
        if error.errno not in _NONE:
            raise
        return False
    return bool(_STATE.unpack_from(answer)[1] & _IS_ENFORCED)


def load(fd: int, project: int) -> Quota | None:
    """What the project has on the file system of `fd`; None where projects are not counted.

    Raises OSError.
    """
    try:
        answer = syscalls.quotactl_fd(fd, _GET_QUOTA, _PROJECT, project, bytes(_DQBLK.size))
    except OSError as error:
        if error.errno not in _NONE:
            raise
        return None
    space, _, used, inodes, _, inodes_used, *_ = _DQBLK.unpack(answer)
    return Quota(space << 10 or None, inodes or None, used, inodes_used)


def store(fd: int, project: int, quota: Quota) -> None:
    """Limit the project from now on; what `quota` says to be in use does not count.

    Raises OSError: ESRCH where projects are not counted.
    """
    space, inodes = (quota.space_total or 0) >> 10, quota.inodes_total or 0
    limits = _DQBLK.pack(space, space, 0, inodes, inodes, 0, 0, 0, _LIMITS_COUNT)
    syscalls.quotactl_fd(fd, _SET_QUOTA, _PROJECT, project, limits)


def give_tree(root_fd: int, project: int) -> int:
    """Give the folder and all files and folders in it to the project; how many were changed.

    The folder itself is the last: one that has the project is done, whoever was killed. Left out is
    what is mounted in it, what is no file or folder (the kernel has no call for that), and what the
    administrator has made immutable.
    Raises Shared, OSError.
    """
    if _has(root_fd, project, is_folder=True):
        return 0
    changed = 0
    device = os.fstat(root_fd).st_dev
    stack = [(os.dup(root_fd), os.scandir(root_fd), b"")]
    try:
        while stack:
            folder_fd, entries, path = stack[-1]
            entry = next(entries, None)
            if entry is None:
                changed += _give(folder_fd, project, path, is_folder=True)
                os.close(folder_fd)
                stack.pop()
            elif fd := _open(folder_fd, entry, device):
                below = path + b"/" + os.fsencode(entry.name)
                if stat.S_ISDIR(os.fstat(fd).st_mode):
                    stack.append((fd, os.scandir(fd), below))
                else:
                    try:
                        changed += _give(fd, project, below, is_folder=False)
                    finally:
                        os.close(fd)
    finally:
        for folder_fd, entries, _ in stack:
            entries.close()
            os.close(folder_fd)
    return changed


def _open(folder_fd: int, entry: "os.DirEntry[str]", device: int) -> int:
    """A descriptor of a file or folder of the same file system; 0 for anything else."""
    if not (entry.is_dir(follow_symlinks=False) or entry.is_file(follow_symlinks=False)):
        return 0
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOATIME | os.O_CLOEXEC
    fd = os.open(entry.name, flags, dir_fd=folder_fd)
    if os.fstat(fd).st_dev == device:
        return fd
    os.close(fd)
    return 0


def _fields(fd: int) -> list[int]:
    return list(_FSXATTR.unpack(fcntl.ioctl(fd, FS_IOC_FSGETXATTR, bytes(_FSXATTR.size))))


def _has(fd: int, project: int, *, is_folder: bool) -> bool:
    flags, _, _, current, _ = _fields(fd)
    return current == project and (not is_folder or bool(flags & _INHERIT))


def _give(fd: int, project: int, path: bytes, *, is_folder: bool) -> bool:
    """Whether the inode was another's. xfs would change the project of an immutable one, too."""
    fields = _fields(fd)
    if fields[0] & _IMMUTABLE:
        if not is_folder and os.fstat(fd).st_nlink > 1:
            raise Shared(path)
        return False
    if _has(fd, project, is_folder=is_folder):
        return False
    fields[0] |= _INHERIT if is_folder else 0
    fields[3] = project
    fcntl.ioctl(fd, FS_IOC_FSSETXATTR, _FSXATTR.pack(*fields))
    return True
