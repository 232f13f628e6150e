"""What this machine and these tools can do, in the words of the original's `vserver-info FEATURE`.

What depends on the machine is looked at each time; nothing is told from a version.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from vrun import capabilities, namespaces
from vrun.errors import NotPermitted
from vrun.hierarchy import find_hierarchies
from vstore import __version__
from vstore.guest import confdir, rundir, vdirbase

_NEEDED: Final = ("SYS_ADMIN", "SYS_CHROOT", "SETPCAP", "LINUX_IMMUTABLE", "LEASE", "KILL")
"""Without these no guest can be started, or no file be shared."""


def can_run_guests() -> bool:
    """Whether this process has the rights, as VERIFYCAP asks."""
    return not capabilities.missing(_NEEDED)


def sees_all_of_proc() -> bool:
    """Whether /proc shows every process, as VERIFYPROC asks: no hidepid, the host's pid namespace.

    Process 2 of the host is the kernel's own, whose pid namespace is that of nobody else.
    """
    with suppress(OSError):
        if (Path("/proc/2/comm").read_text().strip()) == "kthreadd":
            return Path("/proc/uptime").exists()
    return False


def has_controller(*names: str) -> bool:
    """Whether cgroups have one of the controllers, of either kind."""
    try:
        hierarchies = find_hierarchies()
        there = set((hierarchies.v2 / "cgroup.controllers").read_text().split())
    except (NotPermitted, OSError):
        return False
    return bool({*names} & (there | set(hierarchies.v1)))


def _has(kind: str) -> bool:
    return kind in namespaces.identities(os.getpid())


def _yes() -> bool:
    return True


def _no() -> bool:
    return False


FEATURES: Final[Mapping[str, Callable[[], bool]]] = {
    "bme": _no,
    "compat": _no,
    "cpuset": lambda: has_controller("cpuset"),
    "dynamic": _yes,
    "iattr": lambda: not capabilities.missing(["LINUX_IMMUTABLE"]),
    "memcg": lambda: has_controller("memory"),
    "migrate": _yes,
    "namespace": lambda: _has("mnt"),
    "persistent": _no,
    "pidspace": lambda: _has("pid"),
    "pivot_root": _yes,
    "pptag": _no,
    "rlimit": lambda: has_controller("memory", "pids"),
    "sched": lambda: has_controller("cpu"),
    "spaces": lambda: _has("net"),
    "timespace": namespaces.has_time,
    "vhi": lambda: _has("uts"),
    "vinfo": _yes,
    "vkill": _yes,
    "vnet": lambda: not capabilities.missing(["BPF", "NET_ADMIN"]),
    "vshelper": _yes,
    "vshelper0": _no,
    "vstat": _yes,
    "vwait": _no,
}
"""By name; `cpuset` and `timespace` are ours."""


def system_lines() -> list[str]:
    """What SYSINFO shows, a line each."""
    kernel = os.uname()
    try:
        hierarchies = find_hierarchies()
        v2, v1 = f"{hierarchies.v2}", " ".join(sorted(hierarchies.v1)) or "none"
    except NotPermitted as error:
        v2, v1 = error.message, "-"
    present = " ".join(name for name, asks in FEATURES.items() if asks())
    return [
        f"Version:       {__version__}",
        f"Kernel:        {kernel.release} {kernel.machine}",
        f"CONFDIR:       {confdir()}",
        f"VDIRBASE:      {vdirbase()}",
        f"RUNDIR:        {rundir()}",
        f"cgroup v2:     {v2}",
        f"v1 with:       {v1}",
        f"Features:      {present}",
    ]
