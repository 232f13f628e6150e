"""System calls of the supervisor that Python does not offer.

Beside vrun.syscalls the one module of vrun that imports ctypes. What is called for each call of a
guest works in memory that is set up once, since a notified call costs microseconds.
"""

import ctypes
import errno
import os
import struct
from typing import Any, Final

_libc = ctypes.CDLL(None, use_errno=True)
_errno = ctypes.get_errno

AT_FDCWD: Final = -100
AT_SYMLINK_NOFOLLOW: Final = 0x100
AT_SYMLINK_FOLLOW: Final = 0x400
AT_REMOVEDIR: Final = 0x200
AT_EMPTY_PATH: Final = 0x1000

_PAGE: Final = 4096
_PATH_MAX: Final = 4096
_AT_NO_AUTOMOUNT: Final = 0x800
_AT_STATX_DONT_SYNC: Final = 0x4000
_STATX_WANTED: Final = 0x107 | 0x1000  # type, mode, link count, inode number; mount id
_STATX_SIZE: Final = 256
IMMUTABLE: Final = 0x10  # STATX_ATTR_IMMUTABLE
_PROC_SUPER_MAGIC: Final = 0x9FA0
_STATFS_SIZE: Final = 120

_LOOK: Final = struct.Struct("=8xQI8xH2xQ")
"""Of struct statx: attributes, nlink, mode, ino."""
_DEVICE: Final = struct.Struct("=136xIIQ")
"""Of struct statx: major and minor of the device, mount id."""


def _declare(name: str, result: Any, *argument_types: Any) -> Any:
    function = getattr(_libc, name)
    function.argtypes = argument_types
    function.restype = result
    return function


_statx = _declare(
    *("statx", ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint),
    ctypes.c_void_p,
)
_answer = ctypes.create_string_buffer(_STATX_SIZE)
_answer_address = ctypes.addressof(_answer)


def look(
    directory_fd: int,
    path: bytes,
    flags: int = 0,
    *,
    _statx: Any = _statx,
    _unpack: Any = _LOOK.unpack_from,
) -> tuple[int, int, int, int]:
    """(attributes, link count, mode, inode number) of what `path` is; statx(2).

    Opens nothing and mounts nothing. Raises OSError.
    """
    how = flags | _AT_NO_AUTOMOUNT | _AT_STATX_DONT_SYNC
    if _statx(directory_fd, path, how, _STATX_WANTED, _answer_address) < 0:
        number = _errno()
        raise OSError(number, os.strerror(number))
    found: tuple[int, int, int, int] = _unpack(_answer)
    return found


def device_and_mount() -> tuple[int, int]:
    """Of the last `look`: the device number as in os.stat(), and the mount id (Linux 5.8)."""
    major, minor, mount = _DEVICE.unpack_from(_answer)
    return os.makedev(major, minor), mount


# --- another process's memory: process_vm_readv(2)


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_process_vm_readv = _declare(
    *("process_vm_readv", ctypes.c_ssize_t, ctypes.c_int),
    *(ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong),
)
_MOST_READ: Final = 1 << 16
_block = ctypes.create_string_buffer(_MOST_READ)
_here = _Iovec(ctypes.addressof(_block), _MOST_READ)
_here_address = ctypes.addressof(_here)
_there = (_Iovec * 2)()
_there_address = ctypes.addressof(_there)
_there_first, _there_second = _there[0], _there[1]


def read_text(
    tid: int, address: int, *, _readv: Any = _process_vm_readv, _text: Any = _block
) -> bytes | None:
    """The text up to its NUL at `address` of the thread's memory; None where there is none, or one
    of more than 4,095 bytes.

    What is there may change at any moment. Raises OSError: ESRCH where the thread is gone.
    """
    # A page at a time: the next one need not be there.
    first = _PAGE - (address & (_PAGE - 1))
    _there_first.base, _there_first.length = address, first
    _there_second.base, _there_second.length = address + first, _PATH_MAX - first
    count = _readv(tid, _here_address, 1, _there_address, 2, 0)
    if count < 0:
        number = _errno()
        if number == errno.EFAULT:
            return None
        raise OSError(number, os.strerror(number))
    text: bytes = _text.value  # up to the first NUL
    return text if len(text) < count else None


def read_bytes(tid: int, address: int, count: int) -> bytes | None:
    """So many bytes (65,536 at most) at `address` of the thread's memory; None where they are not
    all there.

    Raises OSError.
    """
    if not count:
        return b""
    _there_first.base, _there_first.length = address, min(count, _MOST_READ)
    done = _process_vm_readv(tid, _here_address, 1, _there_address, 1, 0)
    if done < 0 and _errno() != errno.EFAULT:
        raise OSError(_errno(), os.strerror(_errno()))
    return ctypes.string_at(_block, count) if done == count else None


# --- on whose behalf: setfsuid(2)

_setfsuid = _declare("setfsuid", ctypes.c_int, ctypes.c_uint)
_setfsgid = _declare("setfsgid", ctypes.c_int, ctypes.c_uint)
_NO_ID: Final = 0xFFFFFFFF


def set_filesystem_ids(*, uid: int, gid: int) -> None:
    """The user and group for what this thread does with files. Raises PermissionError."""
    _setfsgid(gid)
    _setfsuid(uid)
    if _setfsgid(_NO_ID) != gid or _setfsuid(_NO_ID) != uid:  # they tell nothing else
        raise PermissionError(errno.EPERM, f"cannot act as user {uid} and group {gid}")


# --- the same folder on another mount: open_by_handle_at(2)

_HANDLE_BYTES: Final = 128
_name_to_handle_at = _declare(
    *("name_to_handle_at", ctypes.c_int, ctypes.c_int, ctypes.c_char_p),
    *(ctypes.c_void_p, ctypes.POINTER(ctypes.c_int), ctypes.c_int),
)
_open_by_handle_at = _declare(
    "open_by_handle_at", ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_int
)


def reopen_on(mount_fd: int, fd: int, flags: int) -> int:
    """Open the inode behind `fd` by way of the mount that `mount_fd` is on: renames and links stay
    within one mount.

    Both are of one file system. Needs CAP_DAC_READ_SEARCH. Raises OSError.
    """
    handle = ctypes.create_string_buffer(struct.pack("=Ii", _HANDLE_BYTES, 0), 8 + _HANDLE_BYTES)
    mount_id = ctypes.c_int()
    if _name_to_handle_at(fd, b"", handle, mount_id, AT_EMPTY_PATH) < 0:
        raise OSError(_errno(), os.strerror(_errno()))
    opened: int = _open_by_handle_at(mount_fd, handle, flags | os.O_CLOEXEC)
    if opened < 0:
        raise OSError(_errno(), os.strerror(_errno()))
    return opened


# --- statfs(2)

_fstatfs = _declare("fstatfs", ctypes.c_int, ctypes.c_int, ctypes.c_void_p)


def is_procfs(fd: int) -> bool:
    """Whether the inode behind `fd` is one of proc(5)."""
    answer = ctypes.create_string_buffer(_STATFS_SIZE)
    if _fstatfs(fd, answer) < 0:
        raise OSError(_errno(), os.strerror(_errno()))
    return int(struct.unpack_from("=q", answer)[0]) == _PROC_SUPER_MAGIC
