"""The limits of a guest that runs: what they are, what it uses and how often it met them; changed
until it stops.

Units are those of rlimits/: pages of 4096 bytes, and processes with their threads. Files and their
meaning: kernel documentation, admin-guide/cgroup-v2.rst and cgroup-v1/.
"""

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal

from vrun import names
from vrun.cgroup import Group
from vrun.errors import NotPermitted, ToolError
from vrun.grouplimits import write_cpu
from vrun.hierarchy import find_hierarchies
from vrun.spec import CpuLimit
from vrun.state import find_running, load_resources
from vstore.record import dataclass

Kind = Literal["min", "soft", "hard"]

UNLIMITED: Final = -1
_KINDS: Final[tuple[Kind, ...]] = ("min", "soft", "hard")
_PAGE: Final = 4096
_INFINITE: Final = 1 << 62
"""What v1 shows where there is no limit is not less."""


@dataclass(frozen=True, slots=True)
class _File:
    """The control file of a limit."""

    controller: str
    v2: str
    v1: str | None
    unit: int = 1


_FILES: Final[dict[tuple[str, Kind], _File]] = {
    ("rss", "min"): _File("memory", "memory.low", None, _PAGE),
    ("rss", "soft"): _File("memory", "memory.high", "memory.soft_limit_in_bytes", _PAGE),
    ("rss", "hard"): _File("memory", "memory.max", "memory.limit_in_bytes", _PAGE),
    ("nproc", "hard"): _File("pids", "pids.max", "pids.max"),
}
RESOURCES: Final = ("nproc", "rss")
_USED: Final = {
    "rss": _File("memory", "memory.current", "memory.usage_in_bytes", _PAGE),
    "nproc": _File("pids", "pids.current", "pids.current"),
}


@dataclass(frozen=True, slots=True)
class Total:
    """A resource of the guest; None is what the machine does not have or count."""

    name: str
    low: int | None
    soft: int | None
    hard: int | None
    used: int | None
    hits: int | None
    """How often the guest wanted more than the hard limit."""


def find_group(word: str) -> Group:
    """The groups of the guest that the word of a command line means.

    Raises NoConfiguration, ToolError where it does not run.
    """
    guest = names.find(word)
    running = find_running(guest.name)
    if running is None:
        raise ToolError(
            f"guest {guest.name}: does not run",
            hint="what it is to have at the next start is written in its rlimits/ and sched/",
        )
    made = load_resources(guest.name)
    return Group.from_record(made.cgroup) if made and made.cgroup else Group.load(running.cgroup)


def count_cpus(group: Group) -> int:
    """On how many processors the guest's processes may run."""
    for pid in group.pids():
        with suppress(OSError):
            return len(os.sched_getaffinity(pid))
    return len(os.sched_getaffinity(0))


def read_totals(group: Group) -> list[Total]:
    """What the guest is held to, by the resource's name; UNLIMITED where it is not."""
    return [_read_total(group, name) for name in RESOURCES]


def _read_total(group: Group, name: str) -> Total:
    low, soft, hard = (_read(group, _FILES.get((name, kind))) for kind in _KINDS)
    return Total(name, low, soft, hard, _read(group, _USED[name]), _count_hits(group, name))


def change(group: Group, name: str, kind: Kind, value: int | None) -> None:
    """Set a limit; None takes it away.

    Raises NotPermitted where the guest cannot have it, ToolError for a value that the kernel does
    not take.
    """
    file = _FILES.get((name, kind))
    path = _path(group, file) if file else None
    if file is None or path is None:
        if file is not None and group.folder_of(file.controller) is None:
            raise _no_group(file.controller, f"rlimits/{name}")
        raise NotPermitted(f"{name}: this machine has no {kind} limit for the guest")
    text = "max" if value is None else str(value * file.unit)
    if value is None and file.controller in group.v1 and file.controller == "memory":
        text = "-1"
    try:
        path.write_text(text)
    except OSError as error:
        hint = "it uses more at the moment" if error.errno == errno.EBUSY else None
        raise ToolError(f"{path}: {text} is not taken: {error.strerror}", hint=hint) from error


# --- cpu time


@dataclass(frozen=True, slots=True)
class Share:
    """How much of the processors the guest may use."""

    quota_us: int | None
    """In each period, of all processors together; None is no limit."""
    period_us: int
    throttled: int
    """In so many periods it was kept waiting."""


def read_share(group: Group) -> Share | None:
    """None where the guest has no control files for that."""
    folder = group.folder_of("cpu")
    if folder is None:
        return None
    if "cpu" in group.v1:
        quota = (folder / "cpu.cfs_quota_us").read_text().strip()
        period = (folder / "cpu.cfs_period_us").read_text()
    else:
        quota, period = (folder / "cpu.max").read_text().split()
    words = (folder / "cpu.stat").read_text().split()
    throttled = int(words[words.index("nr_throttled") + 1]) if "nr_throttled" in words else 0
    return Share(None if quota in ("-1", "max") else int(quota), int(period), throttled)


def change_cpu(group: Group, cpu: CpuLimit, *, cpus: int) -> None:
    """Give the guest another share of its `cpus`; one without a fill_rate leaves it as it is.

    Raises NotPermitted where the guest has no control files for that, ConfigInvalid.
    """
    folder = _cpu_folder(group)
    if cpu.fill_rate is not None:
        _forget_burst(folder)  # one that is more than the new quota would be in its way
    if missing := write_cpu(group, cpu, cpus=cpus):
        raise NotPermitted(missing[0])


def lift_cpu(group: Group) -> None:
    """Take the limit of cpu time away. Raises NotPermitted, OSError."""
    folder = _cpu_folder(group)
    _forget_burst(folder)
    if "cpu" in group.v1:
        (folder / "cpu.cfs_quota_us").write_text("-1")
    else:
        (folder / "cpu.max").write_text("max")


def _cpu_folder(group: Group) -> Path:
    folder = group.folder_of("cpu")
    if folder is None:
        raise _no_group("cpu", "sched/")
    return folder


def _forget_burst(folder: Path) -> None:
    for name in ("cpu.cfs_burst_us", "cpu.max.burst"):
        with suppress(OSError):
            if (folder / name).exists():
                (folder / name).write_text("0")


# --- control files


def _no_group(controller: str, key: str) -> NotPermitted:
    """Why the guest has no control files of `controller`; `key` is where limits are written."""
    if controller in find_hierarchies().v1:
        return NotPermitted(
            f"the guest was started without a limit that the controller {controller} keeps, and "
            "where that is in a v1 hierarchy it has no control group of it",
            hint=f"write the limit to {key} and restart the guest; then it can be changed",
        )
    return NotPermitted(f"this machine's control groups do not have the controller {controller}")


def _path(group: Group, file: _File) -> Path | None:
    folder = group.folder_of(file.controller)
    name = file.v1 if file.controller in group.v1 else file.v2
    if folder is None or name is None or not (folder / name).exists():
        return None
    return folder / name


def _read(group: Group, file: _File | None) -> int | None:
    path = _path(group, file) if file else None
    if path is None or file is None:
        return None
    text = path.read_text().strip()
    if text == "max" or int(text) >= _INFINITE:
        return UNLIMITED
    return int(text) // file.unit


def _count_hits(group: Group, name: str) -> int | None:
    if name == "rss":
        return _count_memory_hits(group)
    folder = group.folder_of("pids")
    if folder is None:
        return None
    if (folder / "pids.events.local").exists():  # then the other counts all below it
        return _pair(folder / "pids.events", "max")
    found = [_pair(Path(place, "pids.events"), "max") for place, _, _ in os.walk(folder)]
    return sum(count or 0 for count in found)


def _count_memory_hits(group: Group) -> int | None:
    folder = group.folder_of("memory")
    if folder is None:
        return None
    if "memory" in group.v1:
        return int((folder / "memory.failcnt").read_text())
    return _pair(folder / "memory.events", "max")


def _pair(path: Path, key: str) -> int | None:
    with suppress(OSError, ValueError):
        words = path.read_text().split()
        return int(words[words.index(key) + 1])
    return None
