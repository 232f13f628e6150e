"""One inode: its flags, extended attributes, birth time and ownership.

Thin wrappers: they know no guest and no pool and print nothing. They set the immutable flag; only
`vstore.window` clears it.
"""

import fcntl
import os
import struct
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

from vstore import syscalls

try:
    from xattr import pyxattr_compat as _xattr  # the package "xattr"
except ImportError:
    import xattr as _xattr  # the package "pyxattr", whose interface the other one imitates

# linux/fs.h; the argument is declared long but the kernel reads and writes an int.
FS_IOC_GETFLAGS: Final = 0x80086601
FS_IOC_SETFLAGS: Final = 0x40086602
FS_IOC_FSGETXATTR: Final = 0x801C581F
FS_IOC_FSSETXATTR: Final = 0x401C5820

FS_SECRM_FL: Final = 0x1
FS_UNRM_FL: Final = 0x2
FS_COMPR_FL: Final = 0x4
FS_SYNC_FL: Final = 0x8
FS_IMMUTABLE_FL: Final = 0x10
FS_APPEND_FL: Final = 0x20
FS_NODUMP_FL: Final = 0x40
FS_NOATIME_FL: Final = 0x80
FS_ENCRYPT_FL: Final = 0x800
FS_JOURNAL_DATA_FL: Final = 0x4000
FS_NOTAIL_FL: Final = 0x8000
FS_VERITY_FL: Final = 0x100000
FS_NOCOW_FL: Final = 0x800000
FS_DAX_FL: Final = 0x2000000
FS_PROJINHERIT_FL: Final = 0x20000000

_ACLS: Final = ("system.posix_acl_access", "system.posix_acl_default")
_ACLS_OF_XFS: Final = (b"trusted.SGI_ACL_FILE", b"trusted.SGI_ACL_DEFAULT")

CHOSEN_FLAGS: Final = (
    FS_SECRM_FL
    | FS_UNRM_FL
    | FS_COMPR_FL
    | FS_SYNC_FL
    | FS_APPEND_FL
    | FS_NODUMP_FL
    | FS_NOATIME_FL
    | FS_ENCRYPT_FL
    | FS_JOURNAL_DATA_FL
    | FS_NOTAIL_FL
    | FS_VERITY_FL
    | FS_NOCOW_FL
    | FS_DAX_FL
)
"""Flags that somebody gave a file on purpose and can see with lsattr(1):

such a file is no one else's equal.
"""

_FLAGS: Final = struct.Struct("=II")
_NO_FLAGS: Final = bytes(_FLAGS.size)
_FSXATTR: Final = struct.Struct("=5I8x")  # xflags, extsize, nextents, projid, cowextsize, padding

OPEN_TO_READ: Final = (
    os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC | os.O_NOATIME
)
"""Opens a guest's file for a look:

never hangs on a FIFO, follows no symlink, leaves no access time.
"""
OPEN_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOATIME


def get_flags(fd: int) -> int:
    """The FS_..._FL flags of the inode behind `fd`.

    Raises OSError: ENOTTY, EOPNOTSUPP. See ioctl_iflags(2).
    """
    flags: int = _FLAGS.unpack(fcntl.ioctl(fd, FS_IOC_GETFLAGS, _NO_FLAGS))[0]
    return flags


def put_flags(fd: int, flags: int) -> None:
    """Give the inode behind `fd` these flags. The immutable flag must be among them if the inode
    has it.

    Raises OSError: EPERM without CAP_LINUX_IMMUTABLE; ENOTTY or EOPNOTSUPP where the file system
    has no flags.
    """
    if get_flags(fd) & FS_IMMUTABLE_FL & ~flags:
        raise PermissionError(1, "the immutable flag is lifted in a thaw window only")
    fcntl.ioctl(fd, FS_IOC_SETFLAGS, _FLAGS.pack(flags, 0))


def set_immutable(fd: int) -> None:
    """Set the immutable flag of the inode behind `fd`.

    The flag is the inode's, so it holds for each of its hard links: link(2), unlink(2), rename(2)
    and open for writing give EPERM. A descriptor opened for writing before still writes. Needs
    CAP_LINUX_IMMUTABLE in the first user namespace.

    Raises OSError: EPERM without the capability; ENOTTY or EOPNOTSUPP where the file system has no
    flags. See ioctl_iflags(2).
    """
    flags = get_flags(fd)
    if not flags & FS_IMMUTABLE_FL:
        fcntl.ioctl(fd, FS_IOC_SETFLAGS, _FLAGS.pack(flags | FS_IMMUTABLE_FL, 0))


def is_immutable(fd: int) -> bool:
    """Whether the inode behind `fd` has the immutable flag; False where the file system has no
    flags.
    """
    try:
        return bool(get_flags(fd) & FS_IMMUTABLE_FL)
    except OSError:
        return False


def is_fixed(fd: int) -> bool:
    """Whether the inode behind `fd` can have no other name, since it is immutable or append-only;
    False where the file system has no flags.
    """
    try:
        return bool(get_flags(fd) & (FS_IMMUTABLE_FL | FS_APPEND_FL))
    except OSError:
        return False


def project_id(fd: int) -> int:
    """The project id (quota) of the inode behind `fd`; 0 where the file system has none.

    See xfs_quota(8).
    """
    try:
        answer = fcntl.ioctl(fd, FS_IOC_FSGETXATTR, bytes(_FSXATTR.size))
    except OSError:
        return 0
    project: int = _FSXATTR.unpack(answer)[3]
    return project


def put_project_id(fd: int, project: int) -> None:
    """Give the inode behind `fd` the project id `project`; the rest of its attributes stays.

    Raises OSError: EPERM while it is immutable, EOPNOTSUPP where the file system has no projects.
    """
    fields = list(_FSXATTR.unpack(fcntl.ioctl(fd, FS_IOC_FSGETXATTR, bytes(_FSXATTR.size))))
    fields[3] = project
    fcntl.ioctl(fd, FS_IOC_FSSETXATTR, _FSXATTR.pack(*fields))


def birth_time_ns(fd: int, name: bytes = b"") -> int:
    """When the inode behind `fd`, or that of the entry `name` of the folder, was made, in ns since
    the epoch; 0 where the file system does not say.
    """
    answer = syscalls.statx(fd, syscalls.STATX_BTIME, name=name)
    if not answer.mask & syscalls.STATX_BTIME:
        return 0
    return int(answer.btime.tv_sec) * 10**9 + int(answer.btime.tv_nsec)


def is_immutable_by_statx(fd: int) -> bool:
    """As `is_immutable`, from statx(2): works on an O_PATH descriptor too."""
    return bool(syscalls.statx(fd, 0).attributes & syscalls.STATX_ATTR_IMMUTABLE)


def load_xattrs(fd: int) -> dict[bytes, bytes]:
    """All extended attributes of the inode behind `fd`: ACLs, file capabilities and labels are
    among them.

    What xfs tells of an ACL a second time is left out: it would be no ACL elsewhere, and goes and
    comes with the first. Raises OSError. A file system without extended attributes gives an empty
    dict.
    """
    try:
        names = _xattr.list(fd)
    except OSError as error:
        if error.errno == 95:  # EOPNOTSUPP
            return {}
        raise
    if not names:
        return {}
    found = {os.fsencode(name): _xattr.get(fd, name) for name in names}
    for name in _ACLS_OF_XFS:
        found.pop(name, None)
    return found


def store_xattrs(fd: int, wanted: Mapping[bytes, bytes]) -> None:
    """Make the extended attributes of the inode behind `fd` exactly `wanted`. Raises OSError.

    File capabilities are lost by a change of owner or content: call this after both.
    """
    present = load_xattrs(fd)
    for name in present.keys() - wanted.keys():
        _xattr.remove(fd, name)
    for name, value in wanted.items():
        if present.get(name) != value:
            _xattr.set(fd, name, value)


def remove_acls(fd: int) -> None:
    """Take the POSIX ACLs from the inode behind `fd`, where it has any: a folder gives its default
    one to all that is made in it.
    """
    for name in _ACLS:
        with suppress(OSError):
            os.removexattr(fd, name)


def copy_ownership(source: os.stat_result, xattrs: Mapping[bytes, bytes], target_fd: int) -> None:
    """Give the inode behind `target_fd` the owner, xattrs, mode and times (ns) of `source`, in the
    order that keeps them.

    Raises OSError.
    """
    os.fchown(
        target_fd, source.st_uid, source.st_gid
    )  # drops setuid bits and file capabilities, so first
    os.fchmod(target_fd, source.st_mode & 0o7777)
    store_xattrs(target_fd, xattrs)
    if os.fstat(target_fd).st_mode != source.st_mode:  # an ACL's mask stands in the group bits
        os.fchmod(target_fd, source.st_mode & 0o7777)
    os.utime(target_fd, ns=(source.st_atime_ns, source.st_mtime_ns))


def is_owned_like(fd: int, source_fd: int) -> bool:
    """Whether the inode behind `fd` has what `copy_ownership` gives, but for the access time."""
    one, source = os.fstat(fd), os.fstat(source_fd)
    return (one.st_mode, one.st_uid, one.st_gid, one.st_mtime_ns) == (
        *(source.st_mode, source.st_uid, source.st_gid, source.st_mtime_ns),
    ) and load_xattrs(fd) == load_xattrs(source_fd)
