"""Which inodes are objects of the pool, asked while others add and remove some.

The inode numbers of each of the pool's folders are kept, together with its mtime, which changes
with every name in it.
"""

import os
import time
from typing import Final

from vstore.pool import Pool

_TICK_NS: Final = 50_000_000
"""A folder that changed so shortly before it was read may change again under the same mtime."""
_FOLDERS: Final = tuple(f"{number:02x}" for number in range(256))


class Objects:
    """The inode numbers of the pool's objects."""

    def __init__(self, pool: Pool) -> None:
        self.device = pool.device
        self._pool = pool
        self._mtimes: dict[str, int] = {}
        self._folder_of: dict[int, str] = {}
        self._numbers: dict[str, list[int]] = {}

    def __contains__(self, number: int) -> bool:
        """Whether the inode of that number has a name among the objects at this moment."""
        folder = self._folder_of.get(number)
        if folder is not None:
            self._refresh(folder)
            if self._folder_of.get(number) == folder:
                return True
        for other in _FOLDERS:
            self._refresh(other)
        return number in self._folder_of

    def _refresh(self, folder: str) -> None:
        try:
            mtime_ns = os.stat(folder, dir_fd=self._pool.objects_fd).st_mtime_ns
        except FileNotFoundError:
            mtime_ns = 0
        if self._mtimes.get(folder) == mtime_ns:
            return
        now_ns = time.time_ns()
        for number in self._numbers.pop(folder, ()):
            self._folder_of.pop(number, None)
        numbers = [entry.inode() for entry in self._pool.scan_folder(folder)] if mtime_ns else []
        self._numbers[folder] = numbers
        self._folder_of.update(dict.fromkeys(numbers, folder))
        self._mtimes[folder] = mtime_ns if now_ns - mtime_ns > _TICK_NS else -1
