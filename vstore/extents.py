"""The data of an inode: clones, shared extents, and copies that keep holes.

Where the file system can clone, a copy costs no space and no time; else copy_file_range(2) moves
the data inside the kernel. See ioctl_ficlonerange(2), ioctl_fideduperange(2), linux/fiemap.h.
"""

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

FICLONE: Final = 0x40049409
FIDEDUPERANGE: Final = 0xC0189436
FS_IOC_FIEMAP: Final = 0xC020660B
EXT4_IOC_ALLOC_DA_BLKS: Final = 0x660C

FIEMAP_FLAG_SYNC: Final = 0x1
FIEMAP_EXTENT_LAST: Final = 0x1
FIEMAP_EXTENT_DATA_INLINE: Final = 0x200
FIEMAP_EXTENT_SHARED: Final = 0x2000
FILE_DEDUPE_RANGE_SAME: Final = 0

_DEDUPE: Final = struct.Struct("=QQHHI qQQiI")  # header, then one file_dedupe_range_info
_FIEMAP_HEADER: Final = struct.Struct("=QQIIII")
_FIEMAP_EXTENT: Final = struct.Struct("=QQQ16xI12x")  # logical, physical, length, flags
_NO_END: Final = (1 << 64) - 1
_EXTENTS_A_CALL: Final = 16
_DEDUPE_STEP: Final = 16 << 20  # btrfs takes at most 16 MiB a call
_FIEMAP_SIZE: Final = _FIEMAP_HEADER.size + _EXTENTS_A_CALL * _FIEMAP_EXTENT.size
_COPY_STEP: Final = 1 << 30

CLONING: Final = frozenset(("btrfs", "xfs"))
"""File systems whose files can share blocks."""

_CANNOT_CLONE: Final = frozenset(
    (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.ETXTBSY)
)


class Extent(NamedTuple):
    """One stretch of a file: offsets and length in bytes, flags as in linux/fiemap.h."""

    logical: int
    physical: int
    length: int
    flags: int


def clone(source_fd: int, target_fd: int) -> bool:
    """Make the file behind `target_fd` share all data of `source_fd`; False where the file system
    cannot.
    """
    try:
        fcntl.ioctl(target_fd, FICLONE, source_fd)
    except OSError as error:
        if error.errno in _CANNOT_CLONE:
            return False
        raise
    return True


def copy_data(source_fd: int, target_fd: int, *, size: int) -> None:
    """Fill the empty file behind `target_fd` with the `size` bytes of `source_fd`; holes stay
    holes.

    Raises OSError: ENOSPC, EIO. The offsets of `source_fd` move.
    """
    if size and clone(source_fd, target_fd):
        return
    os.ftruncate(target_fd, size)
    for start, end in data_ranges(source_fd, size):
        _copy_range(source_fd, target_fd, start, end)


def order_data(fd: int) -> None:
    """Have the new data of the file behind `fd` on the disk before any name that it gets from now
    on: after a loss of power a name must not lead to a file of zeros.

    ext4 does so by itself when a file is renamed over another, but not when two are exchanged;
    asked for it, it begins to write, and its journal waits. Elsewhere we wait. See
    ext4_alloc_da_blocks() in fs/ext4/inode.c. Raises OSError.
    """
    try:
        fcntl.ioctl(fd, EXT4_IOC_ALLOC_DA_BLKS)
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.fdatasync(fd)


def data_ranges(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """The stretches [start, end) of the file behind `fd` that are no holes, in order.

    See lseek(2).
    """
    position = 0
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        position = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        if start < position:
            yield start, position


def _copy_range(source_fd: int, target_fd: int, start: int, end: int) -> None:
    while start < end:
        moved = os.copy_file_range(
            source_fd, target_fd, min(end - start, _COPY_STEP), offset_src=start, offset_dst=start
        )
        if moved == 0:
            raise OSError(errno.EIO, "the file became shorter while it was copied")
        start += moved


def dedupe(source_fd: int, target_fd: int, *, size: int) -> int:
    """Let the file behind `target_fd` share the extents of `source_fd`, whose bytes the kernel
    finds equal.

    Returns the bytes that are shared now: `size`, or where the first difference was met less than
    that. Raises OSError: EOPNOTSUPP, EXDEV, EINVAL, EPERM.
    """
    done = 0
    while done < size:
        request = bytearray(
            _DEDUPE.pack(done, min(_DEDUPE_STEP, size - done), 1, 0, 0, target_fd, done, 0, 0, 0)
        )
        fcntl.ioctl(source_fd, FIDEDUPERANGE, request)
        shared, status = _DEDUPE.unpack(request)[7:9]
        if status < 0:
            raise OSError(-status, os.strerror(-status))
        if status != FILE_DEDUPE_RANGE_SAME or shared == 0:
            return done
        done += shared
    return done


def load_extents(fd: int) -> list[Extent]:
    """The extents of the file behind `fd`, in order, after its data were written out.

    Raises OSError.
    """
    extents: list[Extent] = []
    position = 0
    while True:
        request = bytearray(_FIEMAP_SIZE)
        _FIEMAP_HEADER.pack_into(
            request, 0, position, _NO_END - position, FIEMAP_FLAG_SYNC, 0, _EXTENTS_A_CALL, 0
        )
        fcntl.ioctl(fd, FS_IOC_FIEMAP, request)
        count = _FIEMAP_HEADER.unpack_from(request)[3]
        for at in range(_FIEMAP_HEADER.size, _FIEMAP_SIZE, _FIEMAP_EXTENT.size)[:count]:
            extents.append(Extent(*_FIEMAP_EXTENT.unpack_from(request, at)))
        if count == 0 or extents[-1].flags & FIEMAP_EXTENT_LAST:
            return extents
        position = extents[-1].logical + extents[-1].length


def own_bytes(fd: int, allocated: int) -> int:
    """How many of the `allocated` bytes of the file behind `fd` it shares with no other file."""
    shared = [extent[2] for extent in load_extents(fd) if extent[3] & FIEMAP_EXTENT_SHARED]
    return max(0, allocated - sum(shared))


def is_inline(extents: list[Extent]) -> bool:
    """Whether the data stand in the inode itself, where nothing can share them (small files on
    btrfs).
    """
    return any(extent.flags & FIEMAP_EXTENT_DATA_INLINE for extent in extents)
