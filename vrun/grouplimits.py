"""Limits of a guest as a whole, written into its control groups of v1 or v2.

Names and units of the files: kernel documentation, admin-guide/cgroup-v1/ and cgroup-v2.rst. What
the machine has no controller or file for is told, so that no limit is missing in silence.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from vrun.cgroup import Group
from vrun.errors import ConfigInvalid
from vrun.spec import CgroupFile, ContextLimits, CpuLimit, Cpuset, GuestSpec

_PERIOD_US: Final = 100_000
_LEAST_QUOTA_US: Final = 1_000
_TICK_US: Final = 1_000
_NICE_STEP: Final = 1.25  # between the weights of two nice levels, kernel/sched/core.c
_DEFAULT_SHARES: Final = 1024

_MEMORY: Final = (
    # of ContextLimits, of v2, of v1, what it is
    ("memory_max", "memory.max", "memory.limit_in_bytes", "limit of memory"),
    ("memory_high", "memory.high", "memory.soft_limit_in_bytes", "soft limit of memory"),
    ("memory_low", "memory.low", None, "protected share of memory"),
)


def controllers_of(spec: GuestSpec) -> frozenset[str]:
    """The controllers that limit_group() needs for the guest, beside those of files and cpuset."""
    limits, cpu = spec.limits, spec.cpu
    memory = (limits.memory_max, limits.memory_high, limits.memory_low)
    wanted = {
        "memory": any(value is not None for value in memory),
        "pids": limits.pids_max is not None,
        "cpu": cpu.fill_rate is not None or cpu.weight_nice is not None,
    }
    return frozenset(name for name, is_wanted in wanted.items() if is_wanted)


def limit_group(group: Group, spec: GuestSpec) -> tuple[str, ...]:
    """Write the guest's limits before anything runs in it; what cannot be had, a line each.

    The control files that an administrator wrote come last, and win. Raises ConfigInvalid for a
    value that the kernel does not take.
    """
    writer = _Writer(group)
    writer.write_totals(spec.limits)
    if spec.cpuset is not None:
        writer.write_cpuset(spec.cpuset)
    writer.write_cpu(spec.cpu, cpus=_count_cpus(spec.cpuset))
    for file in spec.cgroup.files:
        writer.write_file(file)
    return tuple(writer.missing)


def write_cpu(group: Group, cpu: CpuLimit, *, cpus: int) -> tuple[str, ...]:
    """Give a guest that runs another share of its `cpus`; what cannot be had, a line each.

    Raises ConfigInvalid for a value that the kernel does not take.
    """
    writer = _Writer(group)
    writer.write_cpu(cpu, cpus=cpus)
    return tuple(writer.missing)


class _Writer:
    """Writes control files, and gathers what the machine lacks."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self.missing: list[str] = []

    def write_totals(self, limits: ContextLimits) -> None:
        for attribute, v2, v1, what in _MEMORY:
            value = getattr(limits, attribute)
            if value is not None:
                self._write("memory", v2, v1, str(value), what)
        if limits.pids_max is not None:
            self._write("pids", "pids.max", "pids.max", str(limits.pids_max), "limit of processes")

    def write_cpu(self, cpu: CpuLimit, *, cpus: int) -> None:
        """The token bucket as a quota, see the reference, 14.2.

        A running task takes a token a tick, and each processor gets fill_rate of them every
        interval: fill_rate / interval of each of `cpus` processors, and so
        cpus * fill_rate / interval * 100 ms in every 100 ms (7 / 32 of two: 43.75 ms, cpu.max
        "43750 100000"). A bucket that holds tokens-max lets a guest that has rested run ahead by so
        many ticks of 1 ms; the kernel takes no burst above the quota (cpu.max.burst).
        """
        if cpu.fill_rate is not None and cpu.interval:
            quota = max(_PERIOD_US * cpus * cpu.fill_rate // cpu.interval, _LEAST_QUOTA_US)
            self._write_quota(quota)
            if cpu.burst_ticks:
                burst = str(min(cpu.burst_ticks * _TICK_US, quota))
                self._write("cpu", "cpu.max.burst", "cpu.cfs_burst_us", burst, "burst of cpu time")
        if cpu.weight_nice is not None:
            self._write_weight(cpu.weight_nice)

    def _write_quota(self, quota: int) -> None:
        what = "limit of cpu time"
        if "cpu" in self._group.v1:
            self._write("cpu", None, "cpu.cfs_period_us", str(_PERIOD_US), what)
            self._write("cpu", None, "cpu.cfs_quota_us", str(quota), what)
        else:
            self._write("cpu", "cpu.max", None, f"{quota} {_PERIOD_US}", what)

    def _write_weight(self, nice: int) -> None:
        what = "priority of the guest"
        if "cpu" in self._group.v1:
            shares = round(_DEFAULT_SHARES * _NICE_STEP**-nice)
            self._write("cpu", None, "cpu.shares", str(max(shares, 2)), what)
        else:
            self._write("cpu", "cpu.weight.nice", None, str(nice), what)

    def write_cpuset(self, cpuset: Cpuset) -> None:
        for key, value in (("cpus", cpuset.cpus), ("mems", cpuset.mems)):
            if value is not None:
                self._write_or_tell("cpuset", f"cpuset.{key}", value, f"cpuset/{key}")
        for key, wanted in (
            ("cpu_exclusive", cpuset.cpu_exclusive),
            ("mem_exclusive", cpuset.mem_exclusive),
        ):
            if wanted:
                self._write_or_tell("cpuset", f"cpuset.{key}", "1", f"cpuset/{key}")

    def _write_or_tell(self, controller: str, name: str, value: str, where: str) -> None:
        """Write a setting that a guest also runs without."""
        folder = self._group.folder_of(controller)
        if folder is None or not (folder / name).exists():
            self.missing.append(f"{where}: this machine has no {name} for the guest")
            return
        try:
            (folder / name).write_text(value)
        except OSError as error:
            self.missing.append(f"{where}: {value!r} is not taken: {error.strerror}")

    def _write(
        self, controller: str, v2: str | None, v1: str | None, value: str, what: str
    ) -> None:
        """Write `value` to the file that the machine has; tell where it has none."""
        name = v1 if controller in self._group.v1 else v2
        folder = self._group.folder_of(controller)
        if folder is None or name is None or not (folder / name).exists():
            self.missing.append(f"{what}: this machine has no {v2 or v1} for the guest")
            return
        _write_text(folder / name, value, what)

    def write_file(self, file: CgroupFile) -> None:
        """Write an administrator's control file; one named after v1 or v2 to its equal of the
        other.
        """
        for name, text in ((file.name, file.text), *equals(file)):
            controller = name.partition(".")[0]
            folder = self._group.folder_of(controller)
            if folder is None and controller == "cgroup":
                folder = self._group.path
            if folder is not None and (folder / name).exists():
                for line in text.splitlines() or [""]:
                    _write_text(folder / name, line, file.where)
                return
        self.missing.append(f"{file.where}: this machine has no {file.name} for the guest")


def _write_text(path: Path, text: str, where: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise ConfigInvalid(
            f"{where}: {text!r} is not taken by {path}: {error.strerror}"
        ) from error


def _count_cpus(cpuset: Cpuset | None) -> int:
    """How many processors the guest may run on."""
    usable = os.sched_getaffinity(0)
    if cpuset is not None and cpuset.cpus:
        with suppress(ValueError):
            usable &= set(parse_cpus(cpuset.cpus))
    return max(len(usable), 1)


def parse_cpus(text: str) -> Iterator[int]:
    """The members of a list as in cpuset(7): "0-3,6"."""
    for part in text.split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


# --- the same setting under the name and in the unit of the other version


def equals(file: CgroupFile) -> Iterator[tuple[str, str]]:
    """(name, text) of the same setting in the other version; none where there is no such."""
    if file.name in _EQUALS:
        name, convert = _EQUALS[file.name]
        with suppress(ValueError):
            yield name, convert(file.text.strip())


def _to_v2_bytes(text: str) -> str:
    return "max" if text.startswith("-") else text


def _to_v1_bytes(text: str) -> str:
    return "-1" if text == "max" else text


def _to_weight(shares: str) -> str:
    """cpu.shares, 2 to 262144, as cpu.weight, 1 to 10000; 1024 is 100 there."""
    return str(min(max(round(int(shares) * 100 / _DEFAULT_SHARES), 1), 10_000))


def _to_shares(weight: str) -> str:
    return str(max(round(int(weight) * _DEFAULT_SHARES / 100), 2))


def _to_cpu_max(quota: str) -> str:
    return f"{_to_v2_bytes(quota)} {_PERIOD_US}"


def _to_quota(cpu_max: str) -> str:
    quota, _, period = cpu_max.partition(" ")
    if quota == "max":
        return "-1"
    return str(int(quota) * _PERIOD_US // int(period or _PERIOD_US))


_EQUALS: Final[dict[str, tuple[str, Callable[[str], str]]]] = {
    "memory.limit_in_bytes": ("memory.max", _to_v2_bytes),
    "memory.soft_limit_in_bytes": ("memory.high", _to_v2_bytes),
    "cpu.shares": ("cpu.weight", _to_weight),
    "cpu.cfs_quota_us": ("cpu.max", _to_cpu_max),
    "cpu.cfs_burst_us": ("cpu.max.burst", str),
    "blkio.weight": ("io.weight", str),
    "memory.max": ("memory.limit_in_bytes", _to_v1_bytes),
    "memory.high": ("memory.soft_limit_in_bytes", _to_v1_bytes),
    "cpu.weight": ("cpu.shares", _to_shares),
    "cpu.max": ("cpu.cfs_quota_us", _to_quota),
    "cpu.max.burst": ("cpu.cfs_burst_us", str),
}
