"""Blocks of large files: which of them differ from those that the other side has.

A block's digest is 8 bytes: enough to find what differs, since the whole file is held against its
own digest afterwards.
"""

import os
from collections.abc import Callable, Iterator
from typing import Final

from blake3 import blake3

from vstore import extents

LARGE: Final = 4 << 20
"""Only larger files (bytes) travel as the blocks that differ."""
DIGEST_BYTES: Final = 8
_SMALLEST: Final = 16 << 10  # a page of many databases
_DIGESTS_AT_MOST: Final = 2 << 20  # bytes
_BUFFER: Final = 1 << 20


def choose_block(size: int, most: int = _DIGESTS_AT_MOST) -> int:
    """The block size for a file of `size` bytes, so that the digests of all take `most` bytes at
    most; that is one digest or more.
    """
    block = _SMALLEST
    while count_blocks(size, block) * DIGEST_BYTES > most:
        block *= 2
    return block


def count_blocks(size: int, block: int) -> int:
    return (size + block - 1) // block


def digest_blocks(fd: int, size: int, block: int) -> bytes:
    """The digests of all blocks of the file behind `fd`, whose holes are not read."""
    found = bytearray(blank(block) * count_blocks(size, block))
    for start, end in aligned_ranges(fd, size, block):
        place = start // block * DIGEST_BYTES
        for digest in _digests(fd, start, end, block):
            found[place : place + DIGEST_BYTES] = digest
            place += DIGEST_BYTES
    if size % block:  # the last block is shorter, also where it is a hole
        start = size - size % block
        found[-DIGEST_BYTES:] = digest_of(_pread(fd, size - start, start))
    return bytes(found)


def digest_both(
    fd: int, size: int, block: int, *, wanted: Callable[[], bool] = lambda: True
) -> tuple[bytes, bytes]:
    """BLAKE3 of the file behind `fd`, and the digests of its blocks, in one reading of it all.

    Once `wanted` says no, both are of a part.
    """
    whole = blake3()
    found = bytearray()
    for at in range(0, size, _step(block)):
        if not wanted():
            break
        view = memoryview(_pread(fd, min(_step(block), size - at), at))
        whole.update(view)
        for place in range(0, len(view), block):
            found += digest_of(view[place : place + block])
    return whole.digest(), bytes(found)


def differing_known(
    fd: int, size: int, block: int, own: bytes, base: bytes, base_size: int
) -> Iterator[tuple[int, bytes]]:
    """As `differing`, of a file whose blocks' digests are `own`."""
    same = base_size // block
    first = -1
    for number in range(count_blocks(size, block) + 1):
        place = number * DIGEST_BYTES
        is_equal = number >= count_blocks(size, block) or (
            number < same
            and own[place : place + DIGEST_BYTES] == base[place : place + DIGEST_BYTES]
        )
        is_full = first >= 0 and (number - first) * block >= _BUFFER
        if first >= 0 and (is_equal or is_full):
            end = min(size, number * block)
            yield first * block, _pread(fd, end - first * block, first * block)
            first = -1
        if not is_equal and first < 0:
            first = number


def are_as(data: bytes, digests: bytes, at: int, block: int) -> bool:
    """Whether whole blocks from offset `at` on have the digests that were noted for them."""
    place = at // block * DIGEST_BYTES
    view = memoryview(data)
    found = b"".join(digest_of(view[s : s + block]) for s in range(0, len(data), block))
    return digests[place : place + len(found)] == found


def blank(block: int) -> bytes:
    """The digest of a block of zeros."""
    return digest_of(bytes(block))


def digest_of(data: bytes | memoryview) -> bytes:
    return blake3(data).digest(length=DIGEST_BYTES)


def aligned_ranges(fd: int, size: int, block: int) -> Iterator[tuple[int, int]]:
    """The stretches of the file that are no holes, widened to whole blocks, each byte once."""
    done = 0
    for start, end in extents.data_ranges(fd, size):
        start = max(done, start - start % block)
        end = min(size, end + -end % block)
        if start < end:
            yield start, end
            done = end


def differing(
    fd: int, size: int, block: int, base: bytes, base_size: int
) -> Iterator[tuple[int, bytes]]:
    """The stretches (offset, bytes) of the file behind `fd` whose blocks are not as `base` says."""
    same = base_size // block  # the last block of the base is compared if it is a whole one
    zeros = blank(block)
    done = 0
    for start, end in aligned_ranges(fd, size, block):
        yield from _differing_holes(done, start, block, base, zeros, same)
        yield from _differing_data(fd, start, end, block, base, same)
        done = end
    yield from _differing_holes(done, size, block, base, zeros, same)


def _differing_data(
    fd: int, start: int, end: int, block: int, base: bytes, same: int
) -> Iterator[tuple[int, bytes]]:
    for at in range(start, end, _step(block)):
        data = _pread(fd, min(_step(block), end - at), at)
        view = memoryview(data)
        first = -1
        for place in range(0, len(data), block):
            number = (at + place) // block
            known = base[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]
            if number < same and digest_of(view[place : place + block]) == known:
                if first >= 0:
                    yield at + first, data[first:place]
                first = -1
            elif first < 0:
                first = place
        if first >= 0:
            yield at + first, data[first:]


def _differing_holes(
    start: int, end: int, block: int, base: bytes, zeros: bytes, same: int
) -> Iterator[tuple[int, bytes]]:
    """Blocks of a hole where the base has data; beyond the base there is nothing to clear."""
    for number in range(
        count_blocks(start, block), min(count_blocks(end, block), len(base) // DIGEST_BYTES)
    ):
        known = base[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]
        if known != zeros or number >= same:
            yield number * block, bytes(min(block, end - number * block))


def _step(block: int) -> int:
    return max(block, _BUFFER - _BUFFER % block)


def _digests(fd: int, start: int, end: int, block: int) -> Iterator[bytes]:
    for at in range(start, end, _step(block)):
        view = memoryview(_pread(fd, min(_step(block), end - at), at))
        for place in range(0, len(view), block):
            yield digest_of(view[place : place + block])


def _pread(fd: int, count: int, at: int) -> bytes:
    """So many bytes from there; a file that has become shorter gives less."""
    data = os.pread(fd, count, at)
    while 0 < len(data) < count:
        more = os.pread(fd, count - len(data), at + len(data))
        if not more:
            break
        data += more
    return data
