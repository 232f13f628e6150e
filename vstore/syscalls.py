"""System calls that Python does not offer, declared once.

The one module that imports ctypes. Every function raises OSError with the call's errno. Structures
and numbers are those of the 64-bit Linux interfaces (linux/openat2.h, linux/stat.h, linux/fs.h);
x86_64 and aarch64 share them.
"""

import ctypes
import os
import struct
from typing import Any, Final

libc = ctypes.CDLL(None, use_errno=True)

_AT_EMPTY_PATH: Final = 0x1000
_AT_SYMLINK_NOFOLLOW: Final = 0x100


def check(result: int, function: Any, arguments: tuple[Any, ...]) -> int:
    """A function's `errcheck`: what is below 0 becomes an OSError with errno."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def declare(name: str, *argument_types: Any) -> Any:
    """A function of the C library that returns an int and raises OSError with errno."""
    function = getattr(libc, name)
    function.argtypes = argument_types
    function.restype = ctypes.c_int
    function.errcheck = check
    return function


# --- openat2(2)
# -------------------------------------------------------------------------------------------

RESOLVE_NO_XDEV: Final = 0x01
RESOLVE_NO_MAGICLINKS: Final = 0x02
RESOLVE_NO_SYMLINKS: Final = 0x04
RESOLVE_BENEATH: Final = 0x08
RESOLVE_IN_ROOT: Final = 0x10
_SYS_OPENAT2: Final = 437
_TRIES: Final = 1000


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


_syscall = declare(
    "syscall",
    ctypes.c_long,
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(_OpenHow),
    ctypes.c_size_t,
)


def openat2(directory_fd: int, path: bytes, *, flags: int, resolve: int) -> int:
    """Open `path` below `directory_fd` under the RESOLVE_ rules of openat2(2); close-on-exec.

    Raises OSError: EXDEV for a mount point or an escape, ELOOP for a symlink, ENAMETOOLONG past
    4,095 bytes.
    """
    how = _OpenHow(flags | os.O_CLOEXEC, 0, resolve)
    # A `..` is uncertain while anybody on the machine renames or mounts; with O_NONBLOCK the same
    # errno speaks of a lease.
    tries = 1 if flags & os.O_NONBLOCK else _TRIES
    while True:
        tries -= 1
        try:
            result: int = _syscall(_SYS_OPENAT2, directory_fd, path, how, ctypes.sizeof(how))
        except BlockingIOError:
            if not tries:
                raise
        else:
            return result


# --- renameat2(2), syncfs(2)
# ------------------------------------------------------------------------------

RENAME_NOREPLACE: Final = 1
RENAME_EXCHANGE: Final = 2

_renameat2 = declare(
    "renameat2", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint
)
_syncfs = declare("syncfs", ctypes.c_int)


def renameat2(source_fd: int, source: bytes, target_fd: int, target: bytes, *, flags: int) -> None:
    """Rename between two folders under the RENAME_ flags of renameat2(2). Raises OSError."""
    _renameat2(source_fd, source, target_fd, target, flags)


def syncfs(fd: int) -> None:
    """Write everything of the file system behind `fd` to disk.

    Raises OSError (EIO, ENOSPC) if that failed.
    """
    _syncfs(fd)


# --- name_to_handle_at(2), open_by_handle_at(2)
# ----------------------------------------------------------------------------------

_HANDLE_HEAD: Final = struct.Struct("=Ii")  # struct file_handle: handle_bytes, handle_type
_MAX_HANDLE_SZ: Final = 128  # linux/exportfs.h

_name_to_handle_at = declare(
    *("name_to_handle_at", ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p),
    *(ctypes.POINTER(ctypes.c_int), ctypes.c_int),
)
_open_by_handle_at = declare("open_by_handle_at", ctypes.c_int, ctypes.c_void_p, ctypes.c_int)


def load_handle(fd: int) -> bytes:
    """What names the inode behind `fd` on its file system for good, as its number does not: that
    may be another file's later. Raises OSError.
    """
    head = _HANDLE_HEAD.pack(_MAX_HANDLE_SZ, 0)
    handle = ctypes.create_string_buffer(head, len(head) + _MAX_HANDLE_SZ)
    _name_to_handle_at(fd, b"", handle, ctypes.c_int(), _AT_EMPTY_PATH)
    return handle.raw[: len(head) + _HANDLE_HEAD.unpack_from(handle)[0]]


def open_by_handle(mount_fd: int, handle: bytes, flags: int) -> int:
    """Open the inode of that handle by way of the mount that `mount_fd` is on; close-on-exec.

    Needs CAP_DAC_READ_SEARCH. Raises OSError: ESTALE where there is none any more.
    """
    buffer = ctypes.create_string_buffer(handle, len(handle))
    result: int = _open_by_handle_at(mount_fd, buffer, flags | os.O_CLOEXEC)
    return result


# --- statx(2)
# ---------------------------------------------------------------------------------------------

STATX_BTIME: Final = 0x800
STATX_ATTR_IMMUTABLE: Final = 0x10


class _Timestamp(ctypes.Structure):
    _fields_ = (
        ("tv_sec", ctypes.c_int64),
        ("tv_nsec", ctypes.c_uint32),
        ("reserved", ctypes.c_int32),
    )


class Statx(ctypes.Structure):
    """struct statx as far as btime; the rest is padding up to its 256 bytes."""

    _fields_ = (
        ("mask", ctypes.c_uint32),
        ("blksize", ctypes.c_uint32),
        ("attributes", ctypes.c_uint64),
        ("nlink", ctypes.c_uint32),
        ("uid", ctypes.c_uint32),
        ("gid", ctypes.c_uint32),
        ("mode", ctypes.c_uint16),
        ("spare0", ctypes.c_uint16),
        ("ino", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("blocks", ctypes.c_uint64),
        ("attributes_mask", ctypes.c_uint64),
        ("atime", _Timestamp),
        ("btime", _Timestamp),
        ("spare", ctypes.c_uint8 * 160),
    )


_statx = declare(
    "statx", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.POINTER(Statx)
)


def statx(fd: int, mask: int, *, name: bytes = b"") -> Statx:
    """What statx(2) says of the inode behind `fd`, or of the entry `name` of that folder; look at
    `mask` and `attributes_mask` for what is known.
    """
    result = Statx()
    _statx(fd, name, _AT_SYMLINK_NOFOLLOW if name else _AT_EMPTY_PATH, mask, result)
    return result
