"""Rewrites that leave no trace in a file's times, which kernels before 6.13 allow.

Such a kernel stamps a file with the time of the last timer tick, up to some milliseconds ago, so a
second write within the tick changes neither mtime nor ctime. See inode_set_ctime_current() of 6.13.
"""

import os
from collections.abc import Callable
from typing import Final

import pytest

_TRIES: Final = 500


def times_of(file_fd: int) -> tuple[int, int, int]:
    """Size in bytes, mtime and ctime in ns."""
    status = os.fstat(file_fd)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def rewrite_unnoticed(
    file_fd: int, old: bytes, new: bytes, *, between: Callable[[], object] = bool
) -> None:
    """Write `old`, call `between`, write `new` of the same length within one tick of the clock.

    Size, mtime and ctime are then as after `old`. All of it is done again until that succeeds, so
    `between` should take less than a tick (4 ms on Debian 12). Skips the test where the kernel
    gives each write a time of its own.
    """
    for _ in range(_TRIES):
        os.pwrite(file_fd, old, 0)
        before = times_of(file_fd)
        between()
        os.pwrite(file_fd, new, 0)
        if times_of(file_fd) == before:
            return
    pytest.skip(f"Linux {os.uname().release} gave each of {_TRIES} rewrites a time of its own")
