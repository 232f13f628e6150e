"""Reads how a guest shares the machine: sched/, cpuset/ and cgroup/."""

import re
from collections.abc import Iterator
from typing import Final

from vrun.errors import ConfigInvalid
from vrun.keys import Keys, Line, parse_number
from vrun.spec import CgroupFile, CgroupSettings, CpuLimit, Cpuset
from vstore.record import replace

_CPU_LIST: Final = r"\d+(-\d+(:\d+/\d+)?)?(,\d+(-\d+(:\d+/\d+)?)?)*"
_CONTROL_FILE: Final = r"[a-z_]+(\.[A-Za-z0-9_-]+)+"
_CGROUP_PATH: Final = r"/*[A-Za-z0-9_][A-Za-z0-9_.@:-]*(/+[A-Za-z0-9_][A-Za-z0-9_.@:-]*)*/*"
_PLACE_KEYS: Final = frozenset({"mnt", "subsys", "inherit", "name", "base", "per-ss"})
_MOUNT_KEYS: Final = ("mnt", "subsys", "per-ss")
_KERNEL_RATE: Final = (1, 4)
"""The token bucket that the original's kernel gave a guest without one."""
_MOST: Final = (1 << 63) - 1


# --- sched/


def load_cpu(guest: Keys, flags: frozenset[str]) -> CpuLimit:
    """The token bucket (sched/, else the file `schedule`) as far as the flags put it in force.

    Raises ConfigInvalid with the file.
    """
    folder = guest / "sched"
    if folder.exists:
        values = _sched_values(folder)
        if guest.has("schedule"):
            guest.warn("schedule", "is obsolete and not read, since there is sched/")
    elif guest.has("schedule"):
        values = _schedule_values(guest)
    else:
        values = {}
    if values and not flags & {"sched_hard", "sched_prio"}:
        name = "sched" if folder.exists else "schedule"
        guest.warn(name, "has no effect without cflags sched_hard or sched_prio")
    return _cpu_limit(values, flags)


def _cpu_limit(values: dict[str, int], flags: frozenset[str]) -> CpuLimit:
    bias = values.get("priority-bias")
    weight = None if bias is None or "sched_prio" not in flags else max(-20, min(19, bias))
    if "sched_hard" not in flags:
        return CpuLimit(weight_nice=weight)
    return CpuLimit(
        fill_rate=values.get("fill-rate", _KERNEL_RATE[0]),
        interval=values.get("interval", _KERNEL_RATE[1]),
        burst_ticks=values.get("tokens-max"),
        weight_nice=weight,
    )


def _sched_values(folder: Keys) -> dict[str, int]:
    found = {}
    for key in folder.files():
        name = {"prio-bias": "priority-bias"}.get(key.replace("_", "-"), key.replace("_", "-"))
        if name not in _SCHED:
            folder.warn(key, "is no setting of the scheduler that is known; it is not read")
            continue
        least, reason = _SCHED[name]
        value = folder.number(key, least=least, most=_MOST)
        if value is not None and reason:
            folder.warn(key, reason)
        elif value is not None:
            found[name] = value
    for entry in folder.entries():
        folder.warn(entry, "there is one limit for all cpus; cpuset/ chooses the cpus")
    return found


_SCHED: Final = {
    "fill-rate": (1, ""),
    "interval": (1, ""),
    "tokens": (0, "how full the bucket is at first cannot be said"),
    "tokens-min": (0, "a guest that has used up its share goes on as soon as it has any again"),
    "tokens-max": (0, ""),
    "priority-bias": (-(1 << 31), ""),
    "fill-rate2": (0, "idle cpu time is not handed out beyond the limit"),
    "interval2": (0, "idle cpu time is not handed out beyond the limit"),
    "idle-time": (0, "idle cpu time is not handed out beyond the limit"),
}
"""Least value of each setting, and why it cannot be had."""

_SCHEDULE: Final = (
    "fill-rate",
    "interval",
    "tokens",
    "tokens-min",
    "tokens-max",
    "priority-bias",
)


def _schedule_values(guest: Keys) -> dict[str, int]:
    """The obsolete file `schedule`: six numbers, one a line."""
    guest.warn("schedule", "is obsolete; use sched/")
    lines = [line for line in guest.numbered("schedule") if line.text]
    if len(lines) != len(_SCHEDULE):
        raise ConfigInvalid(
            f"{guest.path / 'schedule'}: has {len(lines)} lines, and six belong into it",
            hint=f"they are {', '.join(_SCHEDULE)}",
        )
    return {
        name: parse_number(line, least=_SCHED[name][0], most=_MOST)
        for name, line in zip(_SCHEDULE, lines, strict=True)
        if not _SCHED[name][1]
    }


# --- cpuset/ and cgroup/


def load_cpuset(guest: Keys) -> Cpuset | None:
    """The cpuset, None where no file asks for one; raises ConfigInvalid with the file."""
    folder = guest / "cpuset"
    if folder.has("virtualized"):
        folder.warn("virtualized", "the guest sees all cpus of the machine in /proc/cpuinfo")
    name = folder.scalar("name")
    found = Cpuset(
        name=parse_group_path(name) if name else None,
        cpus=_cpu_list(folder, "cpus"),
        mems=_cpu_list(folder, "mems") or _cpu_list(folder, "mem"),
        cpu_exclusive=_is_on(folder, "cpu_exclusive") or _is_on(folder, "cpus_exclusive"),
        mem_exclusive=_is_on(folder, "mem_exclusive") or _is_on(folder, "mems_exclusive"),
        create=not folder.has("nocreate"),
    )
    is_empty = not (found.name or found.cpus or found.mems)
    return None if is_empty else found


def _cpu_list(folder: Keys, key: str) -> str | None:
    line = folder.scalar(key)
    return parse_cpu_list(line) if line else None


def parse_cpu_list(line: Line) -> str:
    """A list of processors or memory nodes, see cpuset(7); raises ConfigInvalid with the file."""
    text = "".join(line.text.split())
    if not re.fullmatch(_CPU_LIST, text):
        raise ConfigInvalid(f"{line.where}: {line.text!r} is no list of numbers such as 0-3,6")
    return text


def _is_on(folder: Keys, key: str) -> bool:
    return bool(folder.number(key, least=0, most=1))


def load_cgroup(guest: Keys, defaults: Keys) -> CgroupSettings:
    """The guest's cgroup/, else .defaults/cgroup unless a file `nocgroup` is there.

    Raises ConfigInvalid with the file.
    """
    common = defaults / "cgroup"
    own = guest / "cgroup"
    source = own if own.exists else None if guest.has("nocgroup") else common
    for key in filter(common.has, _MOUNT_KEYS if source is common else ()):
        common.warn(key, "groups are made in the hierarchies that the host has mounted")
    base = common.scalar("base")
    name = source.scalar("name") if source else None
    settings = CgroupSettings(
        name=parse_group_path(name) if name else None,
        base=parse_group_path(base) if base else None,
        files=tuple(_control_files(source)) if source else (),
    )
    if not common.has("inherit"):
        return settings
    return replace(settings, inherit=tuple(line.text for line in common.items("inherit")))


def parse_group_path(line: Line) -> str:
    """A path below a cgroup's mount point, without slashes at its ends.

    Raises ConfigInvalid with the file.
    """
    if not re.fullmatch(_CGROUP_PATH, line.text):
        raise ConfigInvalid(
            f"{line.where}: {line.text!r} cannot be the path of a cgroup",
            hint="its parts have letters, digits and _ . @ : - and do not begin with a dot",
        )
    return "/".join(filter(None, line.text.split("/")))


def _control_files(folder: Keys) -> Iterator[CgroupFile]:
    for key in folder.files():
        if key in _PLACE_KEYS:
            continue
        if not re.fullmatch(_CONTROL_FILE, key) or key.startswith("cgroup."):
            folder.warn(key, "is no limit of a cgroup; it is not written")
            continue
        text = folder.text(key)
        if text and text.strip():
            yield CgroupFile(key, text, f"{folder.path / key}")
