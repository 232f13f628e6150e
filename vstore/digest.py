"""Digests of content:

BLAKE3 over a file's bytes, read under a lease that proves nobody was writing.
"""

import os
from collections.abc import Callable, Iterator
from functools import cache
from typing import Final

from blake3 import blake3

from vstore import extents

_BUFFER: Final = 1 << 20
SMALL: Final = _BUFFER
"""Smaller files (bytes) are read in one piece."""
_ASK_EACH: Final = 16 << 20
_ZEROS: Final = bytes(_BUFFER)


def digest_content(
    fd: int, status: os.stat_result, *, wanted: Callable[[], bool] | None = None
) -> bytes:
    """BLAKE3 (32 bytes) over the `status.st_size` bytes behind `fd`. Holes are not read.

    `wanted` is asked every some MiB; once it says no the digest of a part is returned.

    A file that turns out shorter gives the digest of what there is: the caller compares its size.
    Raises OSError.
    """
    size = status.st_size
    if size < _BUFFER:
        return blake3(os.pread(fd, size, 0)).digest()
    hasher = blake3()
    for start, end, is_hole in _stretches(fd, status):
        for step in range(start, end, _ASK_EACH):
            if wanted is not None and not wanted():
                return hasher.digest()
            stop = min(end, step + _ASK_EACH)
            if is_hole:
                _update_zeros(hasher, stop - step)
            else:
                _update(hasher, fd, step, stop)
    return hasher.digest()


def _stretches(fd: int, status: os.stat_result) -> Iterator[tuple[int, int, bool]]:
    """The whole file in order: (start, end, whether it is a hole)."""
    if status.st_blocks * 512 >= status.st_size:
        yield 0, status.st_size, False
        return
    position = 0
    for start, end in extents.data_ranges(fd, status.st_size):
        yield position, start, True
        yield start, end, False
        position = end
    yield position, status.st_size, True


@cache
def _buffer() -> memoryview:
    """Not there before it is needed: who stays in memory for long may never read a large file."""
    return memoryview(bytearray(_BUFFER))


def _update(hasher: blake3, fd: int, start: int, end: int) -> None:
    view = _buffer()
    while start < end:
        got = os.preadv(fd, [view[: min(_BUFFER, end - start)]], start)
        if got == 0:
            return
        hasher.update(view[:got])
        start += got


def _update_zeros(hasher: blake3, count: int) -> None:
    while count > 0:
        hasher.update(_ZEROS[: min(count, _BUFFER)])
        count -= _BUFFER
