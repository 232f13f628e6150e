"""Which inodes are objects of the pool, asked while others add and remove some.

The inode numbers of each of the pool's folders are kept, together with its mtime, which changes
with every name in it.
"""

import os
import time
from typing import Final

from vstore.pool import Pool, digest_xattrs, parse_object

_TICK_NS: Final = 50_000_000
"""A folder that changed so shortly before it was read may change again under the same mtime."""
_FOLDERS: Final = tuple(f"{number:02x}" for number in range(256))


class Objects:
    """The inode numbers of the pool's objects, and their names."""

    def __init__(self, pool: Pool) -> None:
        self.device = pool.device
        self._pool = pool
        self._mtimes: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._numbers: dict[str, list[int]] = {}

    def __contains__(self, number: int) -> bool:
        """Whether the inode of that number has a name among the objects at this moment."""
        return self.find_name(number) is not None

    def is_sound(self, fd: int) -> bool:
        """Whether the inode behind `fd` is an object, with the metadata that its name states.

        One that has not has been attacked, and is being put right. Raises OSError.
        """
        status = os.fstat(fd)
        name = self.find_name(status.st_ino)
        if name is None:
            return False
        wanted, _ = parse_object(name.split("/")[1])
        found = (status.st_size, status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns)
        return (
            found == (wanted.size, wanted.mode, wanted.uid, wanted.gid, wanted.mtime_ns)
            and digest_xattrs(fd) == wanted.xattrs
        )

    def find_name(self, number: int) -> str | None:
        """The path below the pool's `objects` of the inode of that number, if it has one."""
        name = self._names.get(number)
        if name is not None:
            folder = name[:2]
            self._refresh(folder)
            if self._names.get(number) == name:
                return name
        self.load()
        return self._names.get(number)

    def load(self) -> None:
        """Read what has changed since it was read last; takes 2 µs an object and 0.3 ms."""
        for folder in _FOLDERS:
            self._refresh(folder)

    def _refresh(self, folder: str) -> None:
        try:
            mtime_ns = os.stat(folder, dir_fd=self._pool.objects_fd).st_mtime_ns
        except FileNotFoundError:
            mtime_ns = 0
        if self._mtimes.get(folder) == mtime_ns:
            return
        now_ns = time.time_ns()
        for number in self._numbers.pop(folder, ()):
            self._names.pop(number, None)
        found = {
            entry.inode(): f"{folder}/{entry.name}"
            for entry in (self._pool.scan_folder(folder) if mtime_ns else ())
        }
        self._numbers[folder] = list(found)
        self._names.update(found)
        self._mtimes[folder] = mtime_ns if now_ns - mtime_ns > _TICK_NS else -1
