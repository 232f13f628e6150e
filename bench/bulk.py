"""Many guests that are started by one command: a part of the case `start`.

Each has a tree of its own, with the one program in common as unified guests have it, and all leave
their mark in one FIFO.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Final

from bench.guestsite import (
    STAYS,
    Site,
    await_marks,
    check,
    configure,
    held,
    mark,
    program,
    running,
)

GUESTS: Final = 50
_NAME: Final = "many{}"


@dataclass(frozen=True, slots=True)
class Bulk:
    """One time that all were started and stopped."""

    round: int
    guests: int
    first_s: float
    """From the command to the first instruction of the last guest's init."""
    started_s: float
    """To the end of that command."""
    stopped_s: float
    """How long the command took that stopped all."""
    private: int
    """Bytes that the guests' monitors have each for itself, on average; see proc_pid_smaps(5)."""
    pss: int
    """Shared pages count by their part."""


def prepare(site: Site) -> list[str]:
    """Make the guests; their names."""
    names = [_NAME.format(number) for number in range(GUESTS)]
    for name in names:
        root = site.folder / "base" / name
        _copy(site.root, root)
        configure(site, name, root, STAYS)
    return names


def _copy(source: Path, target: Path) -> None:
    """The tree, with hard links for all files, the FIFO among them."""
    for folder, _, files in os.walk(source):
        here = target / Path(folder).relative_to(source)
        here.mkdir()
        for name in files:
            os.link(Path(folder, name), here / name, follow_symlinks=False)


def measure_once(site: Site, names: Sequence[str], number: int) -> Bulk:
    """Start all and stop them again. Raises BenchError."""
    with mark(site) as mark_fd:
        began = perf_counter()
        with running([program("vservers"), "start", *names], site) as starting:
            await_marks(mark_fd, starting, len(names))
            first_s = perf_counter() - began
            check(starting)
            started_s = perf_counter() - began
    monitors = [_monitor_of(site, name) for name in names]
    sizes = [held(pid) for pid in monitors]
    began = perf_counter()
    with running([program("vservers"), "stop", *names], site) as stopping:
        check(stopping)
    private, pss = (sum(each) // len(names) for each in zip(*sizes, strict=True))
    stopped_s = perf_counter() - began
    return Bulk(number, len(names), first_s, started_s, stopped_s, private, pss)


def _monitor_of(site: Site, name: str) -> int:
    """The parent of the guest's first process."""
    state = json.loads((site.folder / "run" / name / "state.json").read_text())
    status = Path(f"/proc/{state['init_pid']}/status").read_text()
    return int(status.partition("PPid:")[2].split()[0])
