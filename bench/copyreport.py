"""What a reader gets of the case `copy`: Markdown, and every single copy as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.copies import (
    DATABASE,
    FIRST,
    PROGRAMS,
    RATES,
    SAME,
    SIBLING,
    UPGRADE,
    Copy,
    Results,
)
from bench.figures import Target, spread
from bench.report import FORMAT, Machine, show_machine, show_spread, show_targets, table


@dataclass(frozen=True, slots=True)
class CopyReport:
    day: str
    size: str
    rounds: int
    machine: Machine
    results: Results
    targets: Sequence[Target]
    notes: str = ""


def as_json(report: CopyReport) -> str:
    """The report with every single copy."""
    facts = {"format": FORMAT, "case": "copy", **asdict(report)}
    facts["targets"] = [{**asdict(target), "is_met": target.is_met} for target in report.targets]
    return json.dumps(facts, indent=1) + "\n"


def as_markdown(report: CopyReport) -> str:
    """The report for a reader."""
    results = report.results
    parts = [
        "# bench: copy\n",
        f"Size `{report.size}`, rounds in turn: {report.rounds}, {report.day}. Figures are least / "
        "median / most. Two network namespaces on one machine are the two ends of the wire, so "
        "both share its processor; bytes are those that the wire's device counted, both ways.\n",
        f"A guest has {results.guest_files} files, {results.guest_bytes / 1e6:.0f} MB.\n",
        "## Targets\n",
        show_targets(report.targets),
        "## Machine\n",
        show_machine(report.machine),
    ]
    if results.carried:
        parts += ["## The ssh channel alone\n", _channel(results)]
    for rate in RATES:
        parts += [f"## {rate}\n", _copies([copy for copy in results.copies if copy.rate == rate])]
    if report.notes:
        parts += ["## Notes\n", report.notes]
    return "\n".join(parts)


def _copies(copies: Sequence[Copy]) -> str:
    rows = []
    for scenario in (FIRST, SIBLING, SAME, UPGRADE, DATABASE):
        for program in PROGRAMS:
            own = [copy for copy in copies if (copy.scenario, copy.program) == (scenario, program)]
            if own:
                rows.append(
                    [
                        scenario,
                        program,
                        show_spread(spread(copy.wall_s for copy in own)),
                        show_spread(spread(copy.flush_s for copy in own)),
                        show_spread(spread(copy.wire_bytes / 1e6 for copy in own)),
                    ]
                )
    headers = ["what", "program", "s", "s to write out what it left", "MB on the wire"]
    return table(headers, rows)


def _channel(results: Results) -> str:
    rows = [
        [name, f"{found.seconds:.2f}", f"{found.mb_per_s:.1f}", f"{found.objects_per_s:.0f}"]
        for name, found in results.carried.items()
    ]
    return table(["what", "s", "MB/s", "objects/s"], rows)


def write(report: CopyReport, folder: Path, name: str) -> None:
    """Put NAME.md and NAME.json into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(as_markdown(report))
    (folder / f"{name}.json").write_text(as_json(report))
