"""What guests use at this moment: two looks at everything, and what happened between them."""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from vrun import figures
from vrun.figures import Row
from vrun.hierarchy import Hierarchies, find_hierarchies
from vrun.membership import HOST, Contexts, find_contexts
from vrun.procs import TICKS, Process, list_processes
from vstore.record import dataclass

_MS: Final = 1000
_PERCENT: Final = 100
Key = tuple[int, int]
"""A process for good: its number and when it began."""


@dataclass(frozen=True, slots=True)
class Look:
    """Everything at one moment."""

    at_s: float
    contexts: Contexts
    rows: Sequence[Row]
    processes: Sequence[Process]


@dataclass(frozen=True, slots=True)
class Task:
    """A process and how busy it is."""

    process: Process
    cpu: float | None
    """Per cent of one cpu since the look before; None where that is not known."""
    io: float | None
    """Bytes a second from and to disks."""

    @property
    def key(self) -> Key:
        return self.process.pid, self.process.start

    @property
    def cpu_ms(self) -> int:
        return (self.process.user + self.process.system) * _MS // TICKS


@dataclass(frozen=True, slots=True)
class Load:
    """A context and how busy it is."""

    row: Row
    memory: int | None
    """Bytes as its limit of memory counts them, cached files included; None: nobody counts."""
    cpu: float | None
    io: float | None

    @property
    def cpu_ms(self) -> int:
        return self.row.user_ms + self.row.system_ms


@dataclass(frozen=True, slots=True)
class Scene:
    """What is shown."""

    contexts: Contexts
    loads: Sequence[Load]
    tasks: Mapping[int, Sequence[Task]]
    """By context."""


def take_look() -> Look:
    """One pass over all run folders and all of /proc."""
    contexts = find_contexts()
    processes = list(list_processes(contexts, io=True))
    rows = figures.sum_up(processes, contexts)
    return Look(time.monotonic(), contexts, rows, processes)


def compare(before: Look | None, now: Look) -> Scene:
    """How busy each was between two looks; of the first there is nothing to compare with."""
    tasks = _tasks(before, now)
    rows = {row.xid: row for row in before.rows} if before else {}
    elapsed = now.at_s - before.at_s if before else 0
    hierarchies = find_hierarchies()
    loads = []
    for row in now.rows:
        own = tasks.get(row.xid, [])
        then = rows.get(row.xid)
        cpu = None
        if row.xid == HOST:  # its sums fall when a process ends
            cpu = _sum([task.cpu for task in own])
        elif then is not None and elapsed > 0:
            spent = row.user_ms + row.system_ms - then.user_ms - then.system_ms
            cpu = max(0.0, _PERCENT * spent / _MS / elapsed)
        member = now.contexts.by_xid.get(row.xid)
        memory = _memory_of(member.group, hierarchies) if member else None
        loads.append(Load(row, memory, cpu, _sum([task.io for task in own])))
    return Scene(now.contexts, loads, tasks)


def _tasks(before: Look | None, now: Look) -> dict[int, list[Task]]:
    known = {(one.pid, one.start): one for one in before.processes} if before else {}
    elapsed = now.at_s - before.at_s if before else 0
    found: dict[int, list[Task]] = defaultdict(list)
    for one in now.processes:
        then = known.get((one.pid, one.start))
        cpu = io = None
        if then is not None and elapsed > 0:
            ticks = one.user + one.system - then.user - then.system
            cpu = max(0.0, _PERCENT * ticks / TICKS / elapsed)
            if one.moved is not None and then.moved is not None:
                io = max(0, one.moved - then.moved) / elapsed
        found[one.xid].append(Task(one, cpu, io))
    return found


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _memory_of(group: Path, hierarchies: Hierarchies) -> int | None:
    """By the memory controller, of whichever kind."""
    with suppress(OSError, ValueError):
        if "memory" not in hierarchies.v1:
            return int((group / "memory.current").read_text())
        place: Path = hierarchies.v1["memory"] / group.relative_to(hierarchies.v2)
        return int((place / "memory.usage_in_bytes").read_text())
    return None
