"""The cgroup v2 freezer:

a running guest held still for some milliseconds. See cgroups(7), cgroup-v2.rst.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

TIMEOUT_S: Final = 0.05


@contextmanager
def opened(cgroup: str) -> Iterator[int]:
    """The cgroup's `cgroup.freeze`, open for writing. Raises OSError."""
    fd = os.open(Path(cgroup, "cgroup.freeze"), os.O_RDWR | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def frozen(cgroup: str, fd: int) -> Iterator[bool]:
    """Hold every process of `cgroup` still; `fd` is its open `cgroup.freeze`.

    Yields False when they did not all stop within TIMEOUT_S. A cgroup that was frozen before stays
    so.
    """
    fcntl.flock(fd, fcntl.LOCK_EX)  # one holder at a time, so that none ends another's freeze
    was_frozen = os.pread(fd, 8, 0).strip() == b"1"
    if not was_frozen:
        os.write(fd, b"1")
    try:
        yield _wait(Path(cgroup, "cgroup.events"))
    finally:
        if not was_frozen:
            os.write(fd, b"0")
        fcntl.flock(fd, fcntl.LOCK_UN)


def _wait(events: Path) -> bool:
    deadline = time.monotonic() + TIMEOUT_S
    while "frozen 1" not in events.read_text().splitlines():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.0002)
    return True
