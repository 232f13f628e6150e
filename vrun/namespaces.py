"""The namespaces of a guest: taken at its start, entered by those who join it later."""

import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from vrun import mountcalls, syscalls

FLAGS: Final[Mapping[str, int]] = {
    "mnt": syscalls.CLONE_NEWNS,
    "pid": syscalls.CLONE_NEWPID,
    "uts": syscalls.CLONE_NEWUTS,
    "ipc": syscalls.CLONE_NEWIPC,
    "cgroup": syscalls.CLONE_NEWCGROUP,
    "time": syscalls.CLONE_NEWTIME,
    "net": syscalls.CLONE_NEWNET,
}
"""The kinds, by their names in /proc/PID/ns."""


def enter_new(kinds: Iterable[str]) -> None:
    """Leave the namespaces of `kinds` (keys of FLAGS) for new ones, all of them or none.

    pid and time hold for children only. In a new mount namespace nothing that is mounted gets out
    to the one before, and unmounts there still arrive. Raises OSError: EINVAL where the kernel has
    no such kind, ENOSPC past a limit of /proc/sys/user.
    """
    flags = _flags(kinds)
    syscalls.unshare(flags)
    if flags & syscalls.CLONE_NEWNS:
        receive_only()


def receive_only() -> None:
    """Make each mount of this namespace a slave: the host's unmounts arrive, nothing goes out."""
    mountcalls.set_propagation(b"/", mountcalls.MS_REC | mountcalls.MS_SLAVE)


def has_time() -> bool:
    """Whether the kernel has time namespaces (Linux 5.6, CONFIG_TIME_NS)."""
    return Path("/proc/self/ns/time").exists()


def zero_uptime() -> None:
    """Have the clocks "since boot" start now in the time namespace that this process made.

    To be called after enter_new() with "time" and before the first fork: time_namespaces(7).
    Raises OSError: EACCES once a process is in it.
    """
    lines = [
        f"{name} -{time.clock_gettime_ns(clock) // 1_000_000_000} 0\n"
        for name, clock in (("monotonic", time.CLOCK_MONOTONIC), ("boottime", time.CLOCK_BOOTTIME))
    ]
    Path("/proc/self/timens_offsets").write_text("".join(lines))


def begin_uptime() -> int:
    """Have uptime of children to come count from now on; end_uptime() takes what is returned.

    Children forked in between are in a time namespace of their own, the caller is not.
    """
    own_fd = os.open("/proc/self/ns/time", os.O_RDONLY | os.O_CLOEXEC)
    enter_new({"time"})
    zero_uptime()
    return own_fd


def end_uptime(own_fd: int) -> None:
    """Have later children of the caller be in its own time namespace again; closes `own_fd`."""
    try:
        syscalls.setns(own_fd, FLAGS["time"])
    finally:
        os.close(own_fd)


def flags_of(kinds: Iterable[str]) -> int:
    """The CLONE_NEW* flags of `kinds`, keys of FLAGS."""
    return _flags(kinds)


def join(pidfd: int, kinds: Iterable[str]) -> None:
    """Enter the namespaces of `kinds` of the process behind `pidfd`, all of them or none.

    pid holds for children only; mnt moves root and working directory to the guest's root. To be
    done before capabilities are given up. Raises OSError: ESRCH where the process has ended.
    """
    syscalls.setns(pidfd, _flags(kinds))


def identities(pid: int) -> Mapping[str, int]:
    """The inode numbers of the namespaces of a process, by kind; two alike are the same namespace.

    pid and time are those of its children to come. Kinds that the kernel lacks are left out. Raises
    OSError: ENOENT or ESRCH where the process has ended.
    """
    found: dict[str, int] = {}
    for kind in FLAGS:
        name = f"{kind}_for_children" if kind in ("pid", "time") else kind
        with suppress(FileNotFoundError):
            found[kind] = Path(f"/proc/{pid}/ns/{name}").stat().st_ino
    if not found:
        raise ProcessLookupError(f"/proc/{pid}/ns: {os.strerror(3)}")
    return found


def _flags(kinds: Iterable[str]) -> int:
    flags = 0
    for kind in kinds:
        flags |= FLAGS[kind]
    return flags
