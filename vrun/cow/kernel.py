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
_SEEN: Final = struct.Struct("=8xQ12xH")
"""Of struct statx: attributes, mode."""
_DEVICE: Final = struct.Struct("=136xIIQ")
"""Of struct statx: major and minor of the device, mount id."""


def _declare_quick(name: str, result: Any = ctypes.c_int) -> Any:
    """A function without argument types, which take a microsecond to check: a number is passed as
    an int, bytes as their address; all else has to be an object of ctypes.
    """
    function = _libc[name]
    function.restype = result
    return function


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
_quick_statx = _declare_quick("statx")
_quick_answer = ctypes.c_void_p(_answer_address)


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


def glance(
    path: bytes,
    flags: int,
    *,
    _statx: Any = _quick_statx,
    _wanted: int = _STATX_WANTED,
    _answer: Any = _quick_answer,
) -> int:
    """As look(), of a path from the working directory on: the errno, 0 where seen() tells more."""
    how = flags | 0x4800  # _AT_NO_AUTOMOUNT | _AT_STATX_DONT_SYNC
    if _statx(-100, path, how, _wanted, _answer) < 0:  # AT_FDCWD
        return _errno()
    return 0


def seen(*, _unpack: Any = _SEEN.unpack_from) -> tuple[int, int]:
    """(attributes, mode) of the last glance()."""
    found: tuple[int, int] = _unpack(_answer)
    return found


# --- another process's memory: process_vm_readv(2)

_MOST_READ: Final = 1 << 16
_FIRST_READ: Final = 256
"""Bytes in which most paths end."""
_IOVEC: Final = struct.Struct("@PN")
_IOVECS: Final = struct.Struct("@PNPN")
_ADDRESSES: Final = (1 << 8 * struct.calcsize("P")) - 1

_process_vm_readv = _declare_quick("process_vm_readv", ctypes.c_ssize_t)
_block = ctypes.create_string_buffer(_MOST_READ)
_here_iovec = ctypes.create_string_buffer(_IOVEC.pack(ctypes.addressof(_block), _MOST_READ))
_there_iovecs = ctypes.create_string_buffer(_IOVECS.size)
_here = ctypes.c_void_p(ctypes.addressof(_here_iovec))
_there = ctypes.c_void_p(ctypes.addressof(_there_iovecs))
_NONE, _ONE, _TWO = ctypes.c_ulong(0), ctypes.c_ulong(1), ctypes.c_ulong(2)


def read_text(tid: int, address: int) -> bytes | None:
    """The text up to its NUL at `address` of the thread's memory; None where there is none, or one
    of more than 4,095 bytes.

    What is there may change at any moment. Raises OSError: ESRCH where the thread is gone.
    """
    count = _read_up_to(tid, address, _FIRST_READ)
    text: bytes = _block.value  # up to the first NUL
    if len(text) < count:
        return text
    if count < _FIRST_READ:
        return None
    count = _read_up_to(tid, address, _PATH_MAX)
    text = _block.value
    return text if len(text) < count else None


def _read_up_to(
    tid: int, address: int, size: int, *, _readv: Any = _process_vm_readv, _there: Any = _there
) -> int:
    """Read so many bytes, at most a page, to `_block`; how many are there."""
    first = _PAGE - (address & (_PAGE - 1))
    if first >= size:
        _IOVEC.pack_into(_there_iovecs, 0, address, size)
        parts = _ONE
    else:  # a page at a time: the next one need not be there
        second = (address + first) & _ADDRESSES
        _IOVECS.pack_into(_there_iovecs, 0, address, first, second, size - first)
        parts = _TWO
    count: int = _readv(tid, _here, _ONE, _there, parts, _NONE)
    if count < 0:
        number = _errno()
        if number == errno.EFAULT:
            return 0
        raise OSError(number, os.strerror(number))
    return count


def read_bytes(tid: int, address: int, count: int) -> bytes | None:
    """So many bytes (65,536 at most) at `address` of the thread's memory; None where they are not
    all there.

    Raises OSError.
    """
    if not count:
        return b""
    _IOVEC.pack_into(_there_iovecs, 0, address & _ADDRESSES, min(count, _MOST_READ))
    done = _process_vm_readv(tid, _here, _ONE, _there, _ONE, _NONE)
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


# --- statfs(2)

_fstatfs = _declare("fstatfs", ctypes.c_int, ctypes.c_int, ctypes.c_void_p)


def is_procfs(fd: int) -> bool:
    """Whether the inode behind `fd` is one of proc(5)."""
    answer = ctypes.create_string_buffer(_STATFS_SIZE)
    if _fstatfs(fd, answer) < 0:
        raise OSError(_errno(), os.strerror(_errno()))
    return int(struct.unpack_from("=q", answer)[0]) == _PROC_SUPER_MAGIC
