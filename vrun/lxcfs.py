"""lxcfs: files of /proc that show a guest its own memory, processors and load. See lxcfs(1).

It is a program of the host's that somebody else starts; a guest gets the files that its cflags ask
for, mounted over the kernel's.
"""

import os
from pathlib import Path
from typing import Final

FILES: Final = {
    "virt_mem": ("meminfo", "swaps"),
    "virt_cpu": ("cpuinfo", "stat"),
    "virt_load": ("loadavg",),
}
"""What each flag asks for."""


def folder() -> Path:
    """Where a running lxcfs has its files; VSERVER_LXCFS names another mount point than its own."""
    return Path(os.environ.get("VSERVER_LXCFS") or "/var/lib/lxcfs").absolute() / "proc"


def find_files(flags: frozenset[str]) -> tuple[Path, ...]:
    """Those that these context flags ask for; none where lxcfs does not run."""
    place = folder()
    if not FILES.keys() & flags or not place.is_dir():
        return ()
    return tuple(place / name for flag, names in FILES.items() if flag in flags for name in names)
