"""Where the cgroup hierarchies of this machine are: one of v2, of v1, or controllers on both.

See cgroups(7). A controller is in one hierarchy only; v2 is there on every machine that can run
guests, with or without controllers, because that is where their processes are tracked.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from vrun.errors import NotPermitted
from vstore.record import dataclass

_MOUNTINFO: Final = Path("/proc/self/mountinfo")
_OWN: Final = Path("/proc/self/cgroup")
_MOUNT_OPTIONS: Final = frozenset({"rw", "ro", "xattr", "clone_children", "cpuset_v2_mode"})
_OCTAL: Final = r"\\([0-7]{3})"


@dataclass(frozen=True, slots=True)
class Hierarchies:
    """The mount points."""

    v2: Path
    v1: Mapping[str, Path]
    """By controller: `memory`, `cpu`, ...; two of one mount have the same path."""


def find_hierarchies() -> Hierarchies:
    """Look at what is mounted. Raises NotPermitted where there is no v2 hierarchy."""
    return parse_mountinfo(_MOUNTINFO.read_text())


def parse_mountinfo(text: str) -> Hierarchies:
    """The hierarchies in a file such as /proc/self/mountinfo; see proc(5). Raises NotPermitted."""
    v2: Path | None = None
    v1: dict[str, Path] = {}
    for line in text.splitlines():
        place, _, what = line.partition(" - ")
        fstype, _, options = what.split(" ", 2)
        if fstype == "cgroup2":
            v2 = v2 or _unescape(place.split(" ")[4])
        elif fstype == "cgroup":
            for word in set(options.split(" ")[-1].split(",")) - _MOUNT_OPTIONS:
                v1.setdefault(word, _unescape(place.split(" ")[4]))
    if v2 is None:
        raise NotPermitted(
            "no cgroup v2 hierarchy is mounted, and guests' processes are tracked there",
            hint="mount -t cgroup2 none /sys/fs/cgroup/unified, or start the host with "
            "systemd.unified_cgroup_hierarchy=1",
        )
    return Hierarchies(v2, MappingProxyType(v1))


def own_cgroup(hierarchies: Hierarchies) -> Path:
    """The folder of this process's group in the v2 hierarchy."""
    for line in _OWN.read_text().splitlines():
        if line.startswith("0::"):
            return hierarchies.v2 / line.removeprefix("0::/")
    raise NotPermitted("this process is in no group of the cgroup v2 hierarchy")


def _unescape(text: str) -> Path:
    """A path of mountinfo, where blanks and backslashes are written in octal; see proc(5)."""
    return Path(re.sub(_OCTAL, lambda found: chr(int(found[1], 8)), text))
