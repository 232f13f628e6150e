"""What a reader gets of the case `start`: Markdown, and every single start as JSON."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.bulk import GUESTS, Bulk
from bench.figures import MIB, Target, spread
from bench.report import (
    FORMAT,
    Listed,
    Machine,
    show_machine,
    show_programs,
    show_spread,
    show_targets,
    table,
)
from bench.starts import (
    VSERVER,
    Results,
    Start,
    cycle_of,
    first_of,
    part_of,
    part_of_many,
    started_of,
)


@dataclass(frozen=True, slots=True)
class StartReport:
    day: str
    rounds: int
    machine: Machine
    programs: Sequence[Listed]
    results: Results
    targets: Sequence[Target]
    notes: str = ""
    """Markdown of a person: where the time goes."""


def as_json(report: StartReport) -> str:
    """The report with every single start."""
    facts = {"format": FORMAT, "case": "start", **asdict(report)}
    facts["targets"] = [{**asdict(target), "is_met": target.is_met} for target in report.targets]
    return json.dumps(facts, indent=1) + "\n"


def as_markdown(report: StartReport) -> str:
    """The report for a reader."""
    names = [one.name for one in report.programs if not one.is_missing]
    parts = [
        "# bench: start\n",
        f"{report.rounds} rounds in turn, {report.day}. Figures are least / median / most.\n",
        "## Targets\n",
        show_targets(report.targets),
        "## Machine\n",
        show_machine(report.machine),
        "## Programs\n",
        show_programs(report.programs),
        *_refused(report.results.refused),
        "## One guest: from the command to the first instruction of its init\n",
        _times(report.results.starts, names, first_of),
        "## One guest: until it is started and gone again\n",
        _times(report.results.starts, names, cycle_of),
        "## One guest: until the command that starts it is done\n",
        "`vserver start` looks on while the init works its first 30 ms; the others stay.\n",
        _times(report.results.starts, [VSERVER], started_of),
        *_many(report.results),
        "## Memory outside a guest that runs\n",
        _memory(report.results, names),
    ]
    if report.notes:
        parts += ["## Where the time goes\n", report.notes]
    return "\n".join(parts)


def _refused(refused: dict[str, str]) -> list[str]:
    lines = [f"- {name}: {said.splitlines()[0]}\n" for name, said in refused.items()]
    return ["Could not start the guest here:\n", "".join(lines)] if lines else []


def _times(starts: Sequence[Start], names: Iterable[str], value: Callable[[Start], float]) -> str:
    rows = []
    for name in names:
        own = spread(value(start) * 1000 for start in starts if start.program == name)
        part = None if name == VSERVER else part_of(starts, name, value)
        rows.append([name, show_spread(own, digits=1), show_spread(part)])
    return table(["program", "ms", "vserver as a part of it"], rows)


def _many(results: Results) -> list[str]:
    """The table of guests that one command started."""
    values: list[tuple[str, Callable[[Bulk], float]]] = [
        ("first instruction of the last guest", lambda one: one.first_s),
        ("the command that starts them is done", lambda one: one.started_s),
        ("the command that stops them", lambda one: one.stopped_s),
    ]
    rows = []
    for name, value in values:
        own = spread(value(one) * 1000 for one in results.bulks)
        rows.append([name, show_spread(own, digits=0), show_spread(part_of_many(results, value))])
    heading = f"part of {GUESTS} x systemd-nspawn to the first instruction"
    memory = spread(one.private / MIB for one in results.bulks)
    pss = spread(one.pss / MIB for one in results.bulks)
    return [
        f"## {GUESTS} guests by one command: vservers start\n",
        table(["until", "ms", heading], rows),
        f"Of a monitor then: {show_spread(memory)} MiB private, {show_spread(pss)} MiB PSS.\n",
    ]


def _memory(results: Results, names: Iterable[str]) -> str:
    rows = []
    for name in names:
        own = [one for one in results.memory if one.program == name]
        rows.append(
            [
                name,
                show_spread(spread(one.private / MIB for one in own)),
                show_spread(spread(one.pss / MIB for one in own)),
                show_spread(spread(one.processes for one in own), digits=0),
            ]
        )
    return table(["program", "private MiB", "PSS MiB", "processes"], rows)


def write(report: StartReport, folder: Path, name: str) -> None:
    """Put NAME.md and NAME.json into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(as_markdown(report))
    (folder / f"{name}.json").write_text(as_json(report))
