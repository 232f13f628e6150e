"""On what the figures were made: enough to compare them, nothing that names the machine."""

import os
import platform
from pathlib import Path

from bench.report import Machine


def look(*, file_system: str, load_before: float) -> Machine:
    """Ask the kernel and the system's own files."""
    return Machine(
        processor=_find_value(Path("/proc/cpuinfo"), "model name", ":") or platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        kernel=platform.release(),
        system=(_find_value(Path("/etc/os-release"), "PRETTY_NAME", "=") or "Linux").strip('"'),
        file_system=f"{file_system} on a loop device, noatime",
        python=f"{platform.python_implementation()} {platform.python_version()}",
        load=(load_before, os.getloadavg()[0]),
    )


def _find_value(path: Path, key: str, mark: str) -> str | None:
    for line in path.read_text().splitlines():
        name, _, value = line.partition(mark)
        if name.strip() == key:
            return value.strip()
    return None
