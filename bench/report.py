"""What a reader gets: the figures as Markdown, and every run as JSON.

A report names no path, no user and no host: it is to be read elsewhere.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from bench.figures import MIB, Run, Spread, State, Target, ratios, select, spread, wall
from bench.ledger import Ledger
from bench.rivals import VUNIFY

FORMAT: Final = 1


@dataclass(frozen=True, slots=True)
class Machine:
    processor: str
    cores: int
    memory_bytes: int
    kernel: str
    system: str
    file_system: str
    python: str
    load: tuple[float, float]
    """Tasks that wanted a core in the last minute, before the first and after the last run."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A program as the report lists it."""

    name: str
    shown: str
    version: str | None
    package: str
    is_missing: bool


@dataclass(frozen=True, slots=True)
class Report:
    case: str
    size: str
    day: str
    rounds: int
    machine: Machine
    programs: Sequence[Listed]
    runs: Sequence[Run]
    targets: Sequence[Target]
    ledger: Ledger | None = None
    notes: str = ""
    """Markdown of a person: where the time goes."""


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    lines = [headers, ["---", *["---:"] * (len(headers) - 1)], *rows]
    return "".join(f"| {' | '.join(_cell(word) for word in line)} |\n" for line in lines)


def _cell(word: str) -> str:
    return word.replace("|", "\\|").replace("\n", " ")


def show_spread(value: Spread | None, *, digits: int = 2) -> str:
    """`min / median / max`, one figure where they are the same, or a dash."""
    if value is None:
        return "-"
    if value.least == value.most:
        return f"{value.middle:.{digits}f}"
    return " / ".join(f"{part:.{digits}f}" for part in (value.least, value.middle, value.most))


def show_mib(size: float | None) -> str:
    return "-" if size is None else f"{size / MIB:,.1f}"


def _show_number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def as_json(report: Report) -> str:
    """The report with every single run."""
    facts = {"format": FORMAT, **asdict(report)}
    facts["targets"] = [{**asdict(target), "is_met": target.is_met} for target in report.targets]
    return json.dumps(facts, indent=1) + "\n"


def as_markdown(report: Report) -> str:
    """The report for a reader."""
    parts = [
        f"# bench: {report.case}\n",
        f"Size `{report.size}`, {report.rounds} rounds in turn, {report.day}.\n",
        "## Targets\n",
        show_targets(report.targets),
        "## Machine\n",
        show_machine(report.machine),
        "## Programs\n",
        show_programs(report.programs),
        *([] if report.ledger is None else ["## Trees\n", _ledger(report.ledger)]),
        *(part for data in _data_sets(report.runs) for part in _data_part(report, *data)),
    ]
    if report.notes:
        parts += ["## Where the time goes\n", report.notes]
    return "\n".join(parts)


def show_targets(targets: Iterable[Target]) -> str:
    rows = [
        [
            target.what,
            f"{'at most' if target.at_most else 'at least'} {target.wanted:g}",
            _show_number(target.reached, 3),
            target.unit,
            {None: "not measured", True: "yes", False: "no"}[target.is_met],
        ]
        for target in targets
    ]
    return table(["target", "wanted", "reached", "unit", "met"], rows)


def show_machine(machine: Machine) -> str:
    before, after = machine.load
    facts = [
        ["processor", machine.processor],
        ["cores", str(machine.cores)],
        ["memory", f"{machine.memory_bytes / (1 << 30):.1f} GiB"],
        ["kernel", machine.kernel],
        ["system", machine.system],
        ["file system of the trees", machine.file_system],
        ["Python", machine.python],
        ["load before, after", f"{before:.2f}, {after:.2f}"],
    ]
    return table(["fact", "value"], facts)


def show_programs(programs: Iterable[Listed]) -> str:
    rows = [
        [
            program.name,
            f"`{program.shown}`",
            f"missing (package {program.package})"
            if program.is_missing
            else program.version or "?",
        ]
        for program in programs
    ]
    return table(["program", "command", "version"], rows)


def _ledger(ledger: Ledger) -> str:
    rows = [
        ["guests", str(ledger.guests), ""],
        ["files", f"{ledger.files:,}", show_mib(ledger.apparent_bytes)],
        ["on disk", "", show_mib(ledger.allocated_bytes)],
        [
            "to gain: all that `hardlink` (with mtime) holds equal",
            "",
            show_mib(ledger.hardlink_bytes),
        ],
        [
            "less linked: inodes with several names",
            f"{ledger.linked_files:,}",
            show_mib(ledger.linked_bytes),
        ],
        [
            "less twins: equal files in one guest",
            f"{ledger.twin_files:,}",
            show_mib(ledger.twin_bytes),
        ],
        [
            "less files that differ in xattrs or below a second",
            "",
            show_mib(ledger.attribute_bytes),
        ],
        ["to gain for `vunify`", "", show_mib(ledger.vunify_bytes)],
    ]
    return table(["counted in the trees themselves", "number", "MiB"], rows)


def _data_sets(runs: Iterable[Run]) -> list[tuple[str, int]]:
    return list(dict.fromkeys((run.data, run.files) for run in runs))


def _data_part(report: Report, data: str, files: int) -> list[str]:
    runs = [run for run in report.runs if (run.data, run.files) == (data, files)]
    names = [program.name for program in report.programs if not program.is_missing]
    names = [name for name in names if any(run.program == name for run in runs)]
    parts = [f"## {data}: {files:,} files\n"]
    for step, title in ((1, "First pass"), (2, "Second pass")):
        parts += [f"### {title}, warm cache\n", _times(runs, names, step)]
    if any(run.state == "cold" for run in runs):
        parts += ["### First pass, cold cache\n", _times(runs, names, 1, "cold")]
    return [*parts, "### Memory and room\n", _memory(runs, names), *_failures(runs)]


def _times(runs: Sequence[Run], names: Iterable[str], step: int, state: State = "warm") -> str:
    first = select(runs, program=VUNIFY, step=step, state=state)
    rows = []
    for name in names:
        own = select(runs, program=name, step=step, state=state)
        rows.append(
            [
                name,
                show_spread(wall(own)),
                show_spread(spread(run.user_s for run in own)),
                show_spread(spread(run.system_s for run in own)),
                show_spread(spread(run.flush_s for run in own)),
                "-" if name == VUNIFY else show_spread(ratios(first, own)),
            ]
        )
    return table(
        ["program", "wall s", "user s", "system s", "flush s", "vunify as a part of it"], rows
    )


def _memory(runs: Sequence[Run], names: Iterable[str]) -> str:
    """By statvfs and, with the peaks of both passes, from a run that was watched."""
    rows = []
    for name in names:
        passes = [select(runs, program=name, step=step, state="watched") for step in (1, 2)]
        first, second = ([run.peak for run in step if run.peak] for step in passes)
        room = spread(run.reclaimed_bytes for run in select(runs, program=name, step=1))
        rows.append(
            [
                name,
                show_mib(room.middle if room else None),
                show_mib(max((peak.rss for peak in first), default=None)),
                show_mib(max((peak.rss for peak in second), default=None)),
                show_mib(max((peak.pss for peak in [*first, *second]), default=None)),
                str(max((peak.processes for peak in [*first, *second]), default="-")),
                _kept(run for step in passes for run in step),
            ]
        )
    headers = ["program", "reclaimed MiB", "first pass RSS MiB", "second pass RSS MiB"]
    return table([*headers, "PSS MiB", "processes", "attributes kept"], rows)


def _kept(runs: Iterable[Run]) -> str:
    answers = [run.trees_kept for run in runs if run.trees_kept is not None]
    return "-" if not answers else "yes" if all(answers) else "no"


def _failures(runs: Iterable[Run]) -> list[str]:
    bad = [run for run in runs if run.exit_code]
    lines = [
        f"- {run.program}, {run.state}, pass {run.step}: exit code {run.exit_code}\n" for run in bad
    ]
    return ["Runs that ended badly are in no table:\n", "".join(lines)] if lines else []


def write(report: Report, folder: Path, name: str) -> None:
    """Put NAME.md and NAME.json into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(as_markdown(report))
    (folder / f"{name}.json").write_text(as_json(report))
