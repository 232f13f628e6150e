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
from contextlib import suppress
from pathlib import Path
from typing import Final

_LOCKS: Final = Path("/proc/locks")
_BREAK_TIME: Final = Path("/proc/sys/fs/lease-break-time")
_PIDS: Final = Path("/proc/self/ns/pid")
_PIDS_OF_HOST: Final = 0xEFFFFFFC  # linux/proc_ns.h, PROC_PID_INIT_INO


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


def is_held(fd: int) -> bool:
    """Whether there is a lease on `fd`, be it that somebody has asked for it."""
    lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    return any(line.startswith("lock:") and "LEASE" in line.split() for line in lines)


def release(fd: int) -> None:
    """Give the lease on `fd` up; whoever waited goes on."""
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def break_time_s() -> int:
    """Seconds after which the kernel breaks a lease by force; 0: it never does."""
    try:
        return int(_BREAK_TIME.read_text())
    except (OSError, ValueError):
        return 0


def are_all_seen() -> bool:
    """Whether /proc/locks shows all leases and all who wait for one: in another namespace of
    processes than the host's it hides a lease whose taker has died, and whoever waits for it.
    """
    return _PIDS.stat().st_ino == _PIDS_OF_HOST


def is_being_broken(fd: int) -> bool:
    """Whether a lease on the inode behind `fd` has been asked for: no other is granted then."""
    status = os.fstat(fd)
    major, minor = os.major(status.st_dev), os.minor(status.st_dev)
    place = f"{major:02x}:{minor:02x}" if major else ""  # that of btrfs is not the one of stat(2)
    wanted = f"{place}:{status.st_ino}"
    lines = [line.split() for line in _LOCKS.read_text().splitlines() if " BREAKING " in line]
    return any("->" not in fields and fields[-3].endswith(wanted) for fields in lines)


def find_waiters(fd: int) -> list[int]:
    """The pids (thread group ids) of the processes that wait for a lease on the inode behind `fd`
    to go away; this process has one.

    Whose lease it is makes no difference: a waiter goes from one to the next. Read from
    /proc/locks, where a waiter stands below the lease that holds it up; see proc_locks(5).
    """
    wanted = _lock_place(fd)
    waiting: list[int] = []
    is_wanted = False
    for line in _LOCKS.read_text().splitlines():
        if "->" in line:
            if is_wanted:
                waiting.append(int(line.split()[-4]))
        else:
            fields = line.split()
            is_wanted = (
                fields[1] == "LEASE"
                and fields[-3].endswith(wanted)
                and _is_on_same_file(int(fields[-4]), fd)
            )
    return [pid for pid in dict.fromkeys(waiting) if pid > 0]  # one stands there more than once


def _lock_place(fd: int) -> str:
    """How /proc/locks names the inode behind `fd`, as our own lease on it shows.

    Its device is the file system's, which on btrfs is not the one of stat(2).
    """
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
        fields = line.split()
        if line.startswith("lock:") and "LEASE" in fields:
            return fields[-3]
    return f":{os.fstat(fd).st_ino}"


def _is_on_same_file(pid: int, fd: int) -> bool:
    """Whether the lease of process `pid` is on the inode behind `fd`, and not on one of the same
    number in another subvolume of a btrfs.

    A process that is dead or cannot be looked at counts: its lease lives on in a copy of ours.
    """
    if pid <= 0 or pid == os.getpid():
        return True
    wanted = os.fstat(fd)
    try:
        paths = list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return True
    for path in paths:
        with suppress(OSError):
            if os.path.samestat(path.stat(), wanted):
                return True
    return not paths
