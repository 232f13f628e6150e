"""Trees of known redundancy, grown from a seed: any number of small files in ten guests.

    g0/00/0000/f00000000 ...     32 files a folder, 64 folders a branch

Every kind has the same names and, but for `mix`, the same sizes; only who equals whom differs.
"""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Final

GUESTS: Final = 10
SEED: Final = 20_031

_FILES_A_FOLDER: Final = 32
_FOLDERS_A_BRANCH: Final = 64
_MASK: Final = (1 << 64) - 1
_EPOCH_NS: Final = 1_700_000_000_000_000_000
_LARGE_EVERY: Final = 50


@dataclass(frozen=True, slots=True)
class Leaf:
    """One file to write: files of one token and size have one content."""

    token: int
    size: int
    mtime_ns: int
    mode: int = 0o644
    is_link: bool = False
    """A second name of the file before it instead of a file of its own."""


def scramble(number: int) -> int:
    """A 64-bit number that looks like chance and is always the same one (splitmix64's mixer)."""
    number = (number + 0x9E3779B97F4A7C15) & _MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _MASK
    return number ^ (number >> 31)


def _small_size(chance: int) -> int:
    return 200 + chance % 3800


def _equal(_guest: int, _index: int) -> Leaf:
    """All files are one content: each guest is full of twins."""
    return Leaf(token=1, size=2000, mtime_ns=_EPOCH_NS)


def _copies(_guest: int, index: int) -> Leaf:
    """Each guest is a copy of the first one, in which no two files are equal."""
    return Leaf(index, _small_size(scramble(SEED + index)), _EPOCH_NS + index)


def _different(guest: int, index: int) -> Leaf:
    """No two files are equal, but sizes meet often enough that all must be read."""
    same = _copies(guest, index)
    return Leaf(index * GUESTS + guest, same.size, same.mtime_ns)


def _mix(guest: int, index: int) -> Leaf:
    """As guests of one release are: most is shared, some was changed, a little is odd."""
    chance = scramble(SEED + index)
    large = 10 if chance >> 32 and (chance >> 32) % _LARGE_EVERY == 0 else 1
    size, when = _small_size(chance >> 16) * large, _EPOCH_NS + index
    mode = 0o755 if chance % 7 == 0 else 0o644
    share = chance % 100
    if share < 72:  # in every guest
        return Leaf(index, size, when, mode)
    if share < 80:  # two generations of it
        return Leaf(index * 2 + guest % 2, size, when + guest % 2, mode)
    if share < 84:  # installed at another time in every guest
        return Leaf(index, size, when + guest * 1_000_000_000, mode)
    if share < 87:  # licences and the like: equal ones in one guest
        return Leaf(share, 1500, _EPOCH_NS, mode)
    if share < 97:  # a guest's own
        return Leaf(scramble(index * GUESTS + guest), size, when, mode)
    if share < 99:
        return Leaf(0, 0, when, mode)
    return Leaf(index, size, when, mode, is_link=True)


KINDS: Final[dict[str, Callable[[int, int], Leaf]]] = {
    "equal": _equal,
    "copies": _copies,
    "different": _different,
    "mix": _mix,
}


def grow(kind: str, files: int, root: Path) -> list[Path]:
    """Write `files` files of that kind below `root`, a tenth in each guest; gives the guests."""
    trees = [root / f"g{guest}" for guest in range(GUESTS)]
    with ProcessPoolExecutor() as workers:
        list(workers.map(_grow_guest, repeat(kind), trees, range(GUESTS), repeat(files // GUESTS)))
    return trees


def _grow_guest(kind: str, tree: Path, guest: int, files: int) -> None:
    leaf_of = KINDS[kind]
    for first in range(0, files, _FILES_A_FOLDER):
        number = first // _FILES_A_FOLDER
        folder = tree / f"{number // _FOLDERS_A_BRANCH:02x}" / f"{number:04x}"
        folder.mkdir(parents=True)
        folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for index in range(first, min(first + _FILES_A_FOLDER, files)):
                _write(leaf_of(guest, index), index, folder_fd, is_first=index == first)
        finally:
            os.close(folder_fd)


def _write(leaf: Leaf, index: int, folder_fd: int, *, is_first: bool) -> None:
    name = f"f{index:08x}"
    if leaf.is_link and not is_first:
        os.link(f"f{index - 1:08x}", name, src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
        return
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, leaf.mode, dir_fd=folder_fd)
    try:
        os.write(fd, content(leaf))
        os.utime(fd, ns=(leaf.mtime_ns, leaf.mtime_ns))
    finally:
        os.close(fd)


def content(leaf: Leaf) -> bytes:
    """What stands in that file."""
    word = scramble(leaf.token).to_bytes(8, "little")
    return (word * (leaf.size // 8 + 1))[: leaf.size]
