"""What a running guest uses now, as its control groups count it."""

from contextlib import suppress
from pathlib import Path

from vrun.cgroup import Group
from vstore.record import dataclass


@dataclass(frozen=True, slots=True)
class Usage:
    """None where the machine does not count it."""

    tasks: int
    """Processes and threads."""
    cpu_user_us: int
    """Of all that ever ran in it, as the next."""
    cpu_system_us: int
    memory: int | None
    """Bytes: what its memory limit is compared with, the page cache that it filled included."""
    anonymous: int | None
    """Bytes of memory without a file behind it."""
    throttled_us: int
    """How long it was kept from running by its limit of cpu time."""
    oom_kills: int
    """How many of its processes the kernel ended because it had no more memory."""


def read_usage(group: Group) -> Usage:
    """Ask the control files of the guest. Raises OSError when its group is gone."""
    cpu = _pairs(group.path / "cpu.stat")
    limited = _pairs(_file(group, "cpu", "cpu.stat", "cpu.stat"))
    memory = _pairs(_file(group, "memory", "memory.stat", "memory.stat"))
    events = _pairs(_file(group, "memory", "memory.oom_control", "memory.events"))
    return Usage(
        tasks=_count_tasks(group),
        cpu_user_us=cpu.get("user_usec", 0),
        cpu_system_us=cpu.get("system_usec", 0),
        memory=_number(_file(group, "memory", "memory.usage_in_bytes", "memory.current")),
        anonymous=memory.get("total_rss", memory.get("anon")),
        throttled_us=limited.get("throttled_usec", limited.get("throttled_time", 0) // 1000),
        oom_kills=events.get("oom_kill", 0),
    )


def _count_tasks(group: Group) -> int:
    counted = _number(_file(group, "pids", "pids.current", "pids.current"))
    if counted is not None:
        return counted
    return sum(len(list(Path(f"/proc/{pid}/task").glob("*"))) for pid in group.pids())


def _file(group: Group, controller: str, v1: str, v2: str) -> Path | None:
    folder = group.folder_of(controller)
    if folder is None:
        return None
    return folder / (v1 if controller in group.v1 else v2)


def _number(path: Path | None) -> int | None:
    with suppress(FileNotFoundError):
        return None if path is None else int(path.read_text())
    return None


def _pairs(path: Path | None) -> dict[str, int]:
    """The lines `name number` of a control file."""
    if path is None:
        return {}
    pairs = (line.split() for line in path.read_text().splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
