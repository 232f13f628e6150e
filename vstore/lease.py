"""Read leases: the proof that nobody has a file open for writing, and the brake on whoever wants
to.

A read lease is refused while anyone has the inode open for writing or mapped shared and writable.
While it is held, an open for writing or a truncate waits in the kernel. It belongs to the open file
description, so every process that holds a copy of the descriptor keeps it alive. The kernel breaks
one by force after /proc/sys/fs/lease-break-time seconds. See fcntl(2), "Leases".
"""

import errno
import fcntl
import os
import signal
from pathlib import Path
from typing import Final

_LOCKS: Final = Path("/proc/locks")


def ignore_break_signals() -> None:
    """Ignore SIGIO, which the kernel sends to the holder of a lease that somebody wants broken.

    Once a process.
    """
    signal.signal(signal.SIGIO, signal.SIG_IGN)


def take(fd: int) -> bool:
    """Take a read lease on the inode behind `fd`, which is open for reading only.

    False: somebody has it open for writing or mapped writable. Raises OSError: EACCES without
    CAP_LEASE on another's file, EINVAL where the file system has no leases.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            return False
        raise
    return True


def is_unbroken(fd: int) -> bool:
    """Whether the lease on `fd` is held and nobody has asked for it."""
    return fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_RDLCK


def release(fd: int) -> None:
    """Give the lease on `fd` up; whoever waited goes on."""
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def find_waiters(fd: int) -> list[int]:
    """The pids (thread group ids) of the processes that wait for the lease on the inode behind `fd`
    to go away.

    Read from /proc/locks, where a waiter stands below the lease that holds it up; see
    proc_locks(5).
    """
    wanted = _lock_suffix(fd)
    waiting: list[int] = []
    ours = False
    for line in _LOCKS.read_text().splitlines():
        fields = line.split()
        if "->" in fields:
            if ours:
                waiting.append(int(fields[-4]))
        else:
            ours = fields[1] == "LEASE" and fields[-3].endswith(wanted)
    return [pid for pid in waiting if pid > 0]


def _lock_suffix(fd: int) -> str:
    """The end of the `major:minor:inode` field.

    btrfs names another device there than stat(2), so it is left out.
    """
    return f":{os.fstat(fd).st_ino}"
