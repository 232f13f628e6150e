"""The locks of objects: byte ranges of the pool's file `windows`, at the objects' inode numbers.

They belong to the open file description (fcntl(2), "Open file description locks"), so every holder
opens the file for itself, and the kernel gives them up with it.
"""

import errno
import fcntl
import os
import struct
import time
from collections.abc import Iterator, Sequence
from typing import Final

_NAME: Final = "windows"
_FLOCK: Final = struct.Struct("@hhqqi4x")  # struct flock of fcntl(2)
_PAUSE_S: Final = 0.001


class ObjectLocks:
    """What one holder has locked. `pool_fd` is the pool's folder."""

    def __init__(self, pool_fd: int) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._fd = os.open(_NAME, flags, 0o600, dir_fd=pool_fd)

    def take(self, numbers: Sequence[int]) -> None:
        """Lock the objects of these inode numbers, in ascending order; waits for other holders."""
        for first, count in _find_runs(numbers):
            self._set(fcntl.F_OFD_SETLKW, fcntl.F_WRLCK, first, count)

    def try_take(self, number: int, *, wait_s: float) -> bool:
        """Lock one object within `wait_s` seconds; returns whether that went."""
        deadline = time.monotonic() + wait_s
        while True:
            try:
                self._set(fcntl.F_OFD_SETLK, fcntl.F_WRLCK, number, 1)
                return True
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
            if time.monotonic() > deadline:
                return False
            time.sleep(_PAUSE_S)

    def drop(self) -> None:
        """Unlock all."""
        self._set(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, 0, 0)

    def close(self) -> None:
        """Unlock all and close the file; once more does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _set(self, command: int, kind: int, start: int, length: int) -> None:
        fcntl.fcntl(self._fd, command, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))


def _find_runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as (first, how many that follow each other)."""
    first = count = 0
    for number in numbers:
        if count and number == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = number, 1
    if count:
        yield first, count
