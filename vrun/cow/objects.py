"""Which inodes are objects of the pool, asked while others add and remove some.

Each folder of the pool is read when its mtime is another than before, which changes with every name
in it. An object takes some 40 bytes of memory here, a sixth of what its name would: a pool may have
very many, and each guest's supervisor has a list of its own.
"""

import os
import time
from array import array
from bisect import bisect_left
from typing import Final

from vstore.pool import FOLDERS, Pool, find_metadata, load_metadata

_TICK_NS: Final = 50_000_000
"""A folder that changed so shortly before it was read may change again under the same mtime."""
_UNREAD: Final = -1
_FOLDER_BITS: Final = 0xFF
_METADATA_BITS: Final = 0xFFFF_FFFF_FFFF_FF00
_PARTS: Final = 251
"""A prime: file systems number inodes in steps."""


class Objects:
    """The inode numbers of the pool's objects, and what their names state of each.

    A mark stands for an object's name: its lowest byte is the folder, the others are a hash of the
    metadata that the name states. Two metadata have the same one once in 2^56 times.
    """

    def __init__(self, pool: Pool) -> None:
        self.device = pool.device
        self._pool = pool
        self._mtimes = [_UNREAD] * len(FOLDERS)
        self._members = [array("Q") for _ in FOLDERS]
        """Each folder's inode numbers, in any order."""
        self._numbers = [array("Q") for _ in range(_PARTS)]
        """All of them by their remainders, sorted."""
        self._marks = [array("Q") for _ in range(_PARTS)]
        """In the same places."""

    def __contains__(self, number: int) -> bool:
        """Whether the inode of that number has a name among the objects at this moment."""
        return self._find(number) is not None

    def is_sound(self, fd: int) -> bool:
        """Whether the inode behind `fd` is an object, with the metadata that its name states.

        One that has not has been attacked, and is being put right. Raises OSError.
        """
        mark = self._find(os.fstat(fd).st_ino)
        if mark is None:
            return False
        return mark == _mark(mark & _FOLDER_BITS, load_metadata(fd))

    def load(self) -> None:
        """Read what has changed since it was read last; takes 2 µs an object and 0.3 ms."""
        for folder in range(len(FOLDERS)):
            self._refresh(folder)

    def _find(self, number: int) -> int | None:
        """The mark of the inode of that number, if it is an object at this moment."""
        mark = self._look_up(number)
        if mark is not None:
            has_changed = self._refresh(mark & _FOLDER_BITS)
            if not has_changed or self._look_up(number) == mark:
                return mark
        self.load()
        return self._look_up(number)

    def _look_up(self, number: int) -> int | None:
        part = number % _PARTS
        numbers = self._numbers[part]
        place = bisect_left(numbers, number)
        if place < len(numbers) and numbers[place] == number:
            return self._marks[part][place]
        return None

    def _refresh(self, folder: int) -> bool:
        """Read the folder if it is not known as it is now; whether that was needed."""
        try:
            mtime_ns = os.stat(FOLDERS[folder], dir_fd=self._pool.objects_fd).st_mtime_ns
        except FileNotFoundError:
            mtime_ns = 0
        if self._mtimes[folder] == mtime_ns:
            return False
        now_ns = time.time_ns()
        found = {
            entry.inode(): _mark(folder, find_metadata(entry.name))
            for entry in (self._pool.scan_folder(FOLDERS[folder]) if mtime_ns else ())
        }
        for number in self._members[folder]:
            if number not in found:
                self._drop(number, folder)
        for number, mark in found.items():
            self._put(number, mark)
        self._members[folder] = array("Q", found)
        self._mtimes[folder] = mtime_ns if now_ns - mtime_ns > _TICK_NS else _UNREAD
        return True

    def _put(self, number: int, mark: int) -> None:
        part = number % _PARTS
        numbers, marks = self._numbers[part], self._marks[part]
        place = bisect_left(numbers, number)
        if place < len(numbers) and numbers[place] == number:
            marks[place] = mark
        else:
            numbers.insert(place, number)
            marks.insert(place, mark)

    def _drop(self, number: int, folder: int) -> None:
        """Forget the number, unless a new object of another folder has it by now."""
        part = number % _PARTS
        numbers, marks = self._numbers[part], self._marks[part]
        place = bisect_left(numbers, number)
        if (
            place < len(numbers)
            and numbers[place] == number
            and marks[place] & _FOLDER_BITS == folder
        ):
            del numbers[place], marks[place]


def _mark(folder: int, metadata: str) -> int:
    return hash(metadata) & _METADATA_BITS | folder
