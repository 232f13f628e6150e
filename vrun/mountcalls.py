"""System calls for mounts: by path as ever, and by descriptor; linux/mount.h, linux/fcntl.h.

Every function raises OSError with the call's errno, and takes away or adds nothing to what its
manual page says.
"""

import ctypes
import os
from typing import Final

from vrun.syscalls import call
from vstore.syscalls import declare

AT_EMPTY_PATH: Final = 0x1000
AT_RECURSIVE: Final = 0x8000

OPEN_TREE_CLONE: Final = 0x1
OPEN_TREE_CLOEXEC: Final = os.O_CLOEXEC

MOUNT_ATTR_RDONLY: Final = 0x00000001
MOUNT_ATTR_NOSUID: Final = 0x00000002
MOUNT_ATTR_NODEV: Final = 0x00000004
MOUNT_ATTR_NOEXEC: Final = 0x00000008
MOUNT_ATTR__ATIME: Final = 0x00000070
MOUNT_ATTR_RELATIME: Final = 0x00000000
MOUNT_ATTR_NOATIME: Final = 0x00000010
MOUNT_ATTR_STRICTATIME: Final = 0x00000020
MOUNT_ATTR_NODIRATIME: Final = 0x00000080
MOUNT_ATTR_NOSYMFOLLOW: Final = 0x00200000

MS_REC: Final = 0x4000
MS_UNBINDABLE: Final = 1 << 17
MS_PRIVATE: Final = 1 << 18
MS_SLAVE: Final = 1 << 19
MS_SHARED: Final = 1 << 20

MNT_FORCE: Final = 0x1
MNT_DETACH: Final = 0x2

_SYS_OPEN_TREE: Final = 428
_SYS_MOVE_MOUNT: Final = 429
_SYS_FSOPEN: Final = 430
_SYS_FSCONFIG: Final = 431
_SYS_FSMOUNT: Final = 432
_SYS_MOUNT_SETATTR: Final = 442
_MOVE_MOUNT_F_EMPTY_PATH: Final = 0x04
_MOVE_MOUNT_T_EMPTY_PATH: Final = 0x40
_FSOPEN_CLOEXEC: Final = 0x1
_FSMOUNT_CLOEXEC: Final = 0x1
_FSCONFIG_SET_FLAG: Final = 0
_FSCONFIG_SET_STRING: Final = 1
_FSCONFIG_CMD_CREATE: Final = 6

_mount = declare(
    "mount", ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p
)
_umount2 = declare("umount2", ctypes.c_char_p, ctypes.c_int)
_pivot_root = declare("pivot_root", ctypes.c_char_p, ctypes.c_char_p)


class _MountAttr(ctypes.Structure):
    """struct mount_attr."""

    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def set_propagation(path: bytes, flags: int) -> None:
    """Change how mounts of `path` spread: MS_PRIVATE or MS_SLAVE, with MS_REC for all below it.

    See mount_namespaces(7). EINVAL where `path` is no mount point.
    """
    _mount(None, path, None, flags, None)


def umount2(path: bytes, flags: int) -> None:
    """Unmount what is mounted on `path`; MNT_DETACH takes the tree away at once, see umount2(2)."""
    _umount2(path, flags)


def pivot_root(new_root: bytes, put_old: bytes) -> None:
    """Make the mount `new_root` the root of this mount namespace; the old one goes to `put_old`.

    pivot_root(".", ".") stacks the old root on the new one, from where umount2(".") takes it off;
    see pivot_root(2). The parent mounts of both must not be shared.
    """
    _pivot_root(new_root, put_old)


def open_tree(directory_fd: int, path: bytes, flags: int) -> int:
    """A descriptor of the mount at `path`; close-on-exec. See open_tree(2).

    OPEN_TREE_CLONE makes a copy that is mounted nowhere and goes with its last descriptor, with
    AT_RECURSIVE all below it too. An empty `path` and AT_EMPTY_PATH mean `directory_fd` itself.
    The source of a copy must be mounted in this namespace (EINVAL, up to Linux 6.14).
    """
    return call(_SYS_OPEN_TREE, directory_fd, path, flags | OPEN_TREE_CLOEXEC)


def move_mount(mount_fd: int, target_fd: int) -> None:
    """Mount what open_tree() or fsmount() gave on the inode behind `target_fd`.

    No path is walked, so nothing can be swapped on the way. See move_mount(2). Raises OSError:
    ENOTDIR where only one of the two is a directory, EINVAL for a target in another namespace.
    """
    flags = _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH
    call(_SYS_MOVE_MOUNT, mount_fd, b"", target_fd, b"", flags)


def mount_setattr(
    fd: int, *, attr_set: int = 0, attr_clr: int = 0, propagation: int = 0, recursive: bool = False
) -> None:
    """Set and clear MOUNT_ATTR_ flags of the mount whose root is behind `fd`; mount_setattr(2).

    To change MOUNT_ATTR__ATIME settings, clear the whole mask and set one. `propagation` is
    MS_PRIVATE, MS_SLAVE, MS_SHARED or 0. Linux 5.12.
    """
    wanted = _MountAttr(attr_set, attr_clr, propagation, 0)
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    call(_SYS_MOUNT_SETATTR, fd, b"", flags, ctypes.byref(wanted), ctypes.sizeof(wanted))


def fsopen(fstype: bytes) -> int:
    """Begin a mount of the file system `fstype`; close-on-exec. See fsopen(2).

    proc, sysfs, mqueue and cgroup2 show the namespaces that the caller has at this moment.
    """
    return call(_SYS_FSOPEN, fstype, _FSOPEN_CLOEXEC)


def fsconfig_flag(fs_fd: int, key: bytes) -> None:
    """Give the mount that `fs_fd` began an option without a value ("newinstance")."""
    call(_SYS_FSCONFIG, fs_fd, _FSCONFIG_SET_FLAG, key, 0, 0)


def fsconfig_string(fs_fd: int, key: bytes, value: bytes) -> None:
    """Give the mount that `fs_fd` began an option with a value ("size", "4m"), or its "source"."""
    call(_SYS_FSCONFIG, fs_fd, _FSCONFIG_SET_STRING, key, value, 0)


def fsconfig_create(fs_fd: int) -> None:
    """Make or find the file system that was described; what is wrong with it comes out here."""
    call(_SYS_FSCONFIG, fs_fd, _FSCONFIG_CMD_CREATE, 0, 0, 0)


def fsmount(fs_fd: int, attributes: int) -> int:
    """A mount of the file system that fsconfig_create() made, mounted nowhere; close-on-exec.

    `attributes` are MOUNT_ATTR_ flags: they are this mount's, never the file system's.
    """
    return call(_SYS_FSMOUNT, fs_fd, _FSMOUNT_CLOEXEC, attributes)
