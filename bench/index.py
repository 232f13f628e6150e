"""One page over all reports: headline figures, a ratio for each peer, and charts.

Everything is read from the JSON of the reports in the folder, nothing is measured here: the page
says of each figure on which machine, with which versions and by which command it came about. A
report that is not there is named as missing.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from bench import charts
from bench.charts import Bars, Chart, Lines
from bench.figures import MIB, Target
from bench.report import Machine, show_machine, show_targets, table

CHARTS: Final = "charts"
INDEX: Final = "index.md"
_SMALL: Final = "small"
_ROUNDS: Final = 3
"""If no other number is asked for."""

Facts = dict[str, Any]
Ratios = list[tuple[str, str, float]]
"""What was done, the peer, and our figure as a part of the peer's: median of paired rounds."""

_MINE: Final = {"unify": "vunify", "start": "vserver", "cow": "vserver", "copy": "vserver-copy"}


@dataclass(frozen=True, slots=True)
class Part:
    """One report of the page."""

    title: str
    name: str
    """Of its files, without .json: that of the full size on the usual file system."""
    command: str
    ratios: Callable[[Facts], Ratios] = lambda facts: []


def _paired(rows: Iterable[Facts], mine: str, key: str, value: str, what: Sequence[str]) -> Ratios:
    """The ratios of one figure; rows of equal `what` and round are a pair."""
    found: defaultdict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row[value] is not None:
            job = (*(str(row[name]) for name in what), str(row["round"]))
            found[job][row[key]] = float(row[value])
    ratios: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for job, figures in found.items():
        for peer, figure in figures.items():
            if peer != mine and mine in figures and figure:
                ratios[", ".join(job[:-1]), peer].append(figures[mine] / figure)
    return [(job, peer, median(values)) for (job, peer), values in ratios.items()]


def _unify_ratios(facts: Facts) -> Ratios:
    warm = [
        {**run, "pass": f"pass {run['step']}"} for run in facts["runs"] if run["state"] == "warm"
    ]
    return _paired(warm, _MINE["unify"], "program", "wall_s", ("pass",))


def _scale_ratios(facts: Facts) -> Ratios:
    warm = [
        {**run, "job": f"{run['data']}, {run['files']:,} files, pass {run['step']}"}
        for run in facts["runs"]
        if run["state"] == "warm" and run["round"] == 1
    ]
    return _paired(warm, _MINE["unify"], "program", "wall_s", ("job",))


def _start_ratios(facts: Facts) -> Ratios:
    starts = facts["results"]["starts"]
    return [
        (job, peer, ratio)
        for value, job in (("first_s", "first instruction"), ("cycle_s", "start to end"))
        for _, peer, ratio in _paired(starts, _MINE["start"], "program", value, ())
    ]


def _cow_ratios(facts: Facts) -> Ratios:
    rows = [
        {"place": one["place"], "round": one["round"], "job": job, "seconds": seconds}
        for one in facts["results"]["rounds"]
        for job, seconds in one["seconds"].items()
    ]
    return _paired(rows, _MINE["cow"], "place", "seconds", ("job",))


def _copy_ratios(facts: Facts) -> Ratios:
    copies = facts["results"]["copies"]
    return [
        (f"{job}: {word}", peer, ratio)
        for value, word in (("wall_s", "time"), ("wire_bytes", "bytes"))
        for job, peer, ratio in _paired(
            copies, _MINE["copy"], "program", value, ("scenario", "rate")
        )
    ]


PARTS: Final = (
    Part("Unify real guests", "unify", "python -m bench unify", _unify_ratios),
    Part("Many files", "scale", "python -m bench scale --repeat 1", _scale_ratios),
    Part("More and more guests", "growth", "python -m bench growth"),
    Part("Start", "start", "python -m bench start --repeat 20", _start_ratios),
    Part("Copy on write", "cow-ext4", "python -m bench cow --fs ext4", _cow_ratios),
    Part("Copy to another machine", "copy", "python -m bench copy", _copy_ratios),
)


def load(folder: Path) -> dict[str, Facts]:
    """The reports that are there, by title of their part; `name` is that of the file.

    Where the usual one is missing, another of the same case counts.
    """
    found: dict[str, Facts] = {}
    for part in PARTS:
        case = part.name.partition("-")[0]
        others = sorted({*folder.glob(f"{case}.json"), *folder.glob(f"{case}-*.json")})
        for path in (folder / f"{part.name}.json", *others):
            if part.title not in found and path.exists():
                found[part.title] = {**json.loads(path.read_text()), "name": path.stem}
    return found


def write(folder: Path) -> None:
    """Write FOLDER/index.md and FOLDER/charts/*.svg anew. Raises BenchError without matplotlib."""
    reports = load(folder)
    drawn = find_charts(reports)
    charts.draw(drawn, folder / CHARTS)
    (folder / INDEX).write_text(as_markdown(reports))


# --- the page


def as_markdown(reports: dict[str, Facts]) -> str:
    """The page for a reader; links lead to the reports and charts beside it."""
    parts = [
        "# bench: all\n",
        "Ratios are ours as a part of the peer's, the median of rounds in turn: below 1 is less "
        "time or fewer bytes. `python -m bench all` measures everything anew, `python -m bench "
        "index` writes this page from the reports that are there.\n",
        *(
            f"![{chart.title}]({CHARTS}/{name}.svg)\n"
            for name, chart in find_charts(reports).items()
        ),
    ]
    for part in PARTS:
        parts += [f"## {part.title}\n", *_part(part, reports.get(part.title))]
    return "\n".join(parts)


def _part(part: Part, facts: Facts | None) -> list[str]:
    if facts is None:
        return [f"Not measured: `{part.command}`.\n"]
    said = [f"`{_command(facts)}`, {facts['day']}; [all of it]({facts['name']}.md).\n"]
    if facts.get("targets"):
        said.append(show_targets(_target(one) for one in facts["targets"]))
    if "part_of_further" in facts:
        part_of = facts["part_of_further"]
        said.append(f"A further guest takes {part_of:.3f} of the disk of a private one.\n")
    ratios = part.ratios(facts)
    if ratios:
        rows = [[job, peer, f"{ratio:.2f}"] for job, peer, ratio in ratios]
        said.append(table(["what", "peer", "ratio"], rows))
    return [*said, _machine(facts)]


def _command(facts: Facts) -> str:
    """What made the report, from its name and rounds."""
    case, *marks = facts["name"].split("-")
    words = ["python -m bench", case]
    words += ["--size small" if mark == _SMALL else f"--fs {mark}" for mark in marks]
    if facts.get("rounds", _ROUNDS) != _ROUNDS:
        words.append(f"--repeat {facts['rounds']}")
    return " ".join(words)


def _target(facts: Facts) -> Target:
    return Target(**{key: value for key, value in facts.items() if key != "is_met"})


def _machine(facts: Facts) -> str:
    machine = Machine(**{**facts["machine"], "load": tuple(facts["machine"]["load"])})
    versions = [
        f"{one['name']} ({one['version']})"
        for one in facts.get("programs", ())
        if not one["is_missing"]
    ]
    listed = f"Versions: {', '.join(versions)}.\n\n" if versions else ""
    return f"{listed}<details><summary>Machine</summary>\n\n{show_machine(machine)}\n</details>\n"


# --- the charts


def find_charts(reports: dict[str, Facts]) -> dict[str, Chart]:
    """What can be drawn of these reports, by the name of the chart's file."""
    made: dict[str, Chart] = {}
    for title, chart_of in _CHARTS.items():
        if title in reports:
            made |= chart_of(reports[title])
    return made


def _ours_first(programs: Iterable[str], mine: str) -> list[str]:
    """Each once; ours has the same colour in every chart."""
    return sorted(dict.fromkeys(programs), key=lambda program: program != mine)


def _disk_chart(facts: Facts) -> dict[str, Chart]:
    steps = facts["steps"]
    series = {name: [step[name] / (MIB << 10) for step in steps] for name in ("private", "unified")}
    numbers = [step["guests"] for step in steps]
    return {"disk": Lines("Disk of so many guests", "guests", "GiB", numbers, series)}


def _memory_chart(facts: Facts) -> dict[str, Chart]:
    """Straight lines: measured were the first guest, and the mean of all further ones."""
    states = facts["results"].get("memory") or ()
    if not states:
        return {}
    numbers = [1, max(state["guests"] for state in states)]
    series = {}
    for state in states:
        first, further = (
            sum(state[which][kind] for kind in ("cache", "pss", "runtime")) / MIB
            for which in ("first", "further")
        )
        series[state["state"]] = [first + further * (number - 1) for number in numbers]
    series = {state: series[state] for state in _ours_first(series, "unified")}
    title = "Memory of so many guests with one server each: page cache, Pss, runtime"
    return {"memory": Lines(title, "guests", "MiB", numbers, series)}


def _pass_chart(facts: Facts) -> dict[str, Chart]:
    found: defaultdict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in facts["runs"]:
        if run["state"] == "warm":
            found[run["program"]][run["step"]].append(run["wall_s"])
    series: dict[str, Sequence[float | None]] = {
        program: [median(found[program][step]) if found[program][step] else None for step in (1, 2)]
        for program in _ours_first(found, _MINE["unify"])
    }
    groups = ("first pass", "second pass")
    return {"passes": Bars("Unify twelve real guests", "seconds", groups, series)}


def _start_chart(facts: Facts) -> dict[str, Chart]:
    found: defaultdict[str, list[float]] = defaultdict(list)
    for start in facts["results"]["starts"]:
        if start["first_s"] is not None:
            found[start["program"]].append(start["first_s"] * 1000)
    series: dict[str, Sequence[float | None]] = {
        program: [median(found[program])] for program in _ours_first(found, _MINE["start"])
    }
    title = "Start of one guest"
    return {"start": Bars(title, "milliseconds", ("first instruction",), series)}


def _copy_chart(facts: Facts) -> dict[str, Chart]:
    """At the limited rate, where what is sent decides."""
    copies = [one for one in facts["results"]["copies"] if one["rate"] != "unlimited"]
    groups = list(dict.fromkeys(one["scenario"] for one in copies))
    programs = _ours_first((one["program"] for one in copies), _MINE["copy"])

    def series(value: str, unit: float) -> dict[str, Sequence[float | None]]:
        found: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        for one in copies:
            found[one["program"], one["scenario"]].append(one[value] / unit)
        return {
            program: [
                median(found[program, group]) if (program, group) in found else None
                for group in groups
            ]
            for program in programs
        }

    rate = copies[0]["rate"] if copies else ""
    shown = [group.replace(" ", "\n", 1) for group in groups]
    return {
        "copy-seconds": Bars(f"Copies at {rate}", "seconds", shown, series("wall_s", 1)),
        "copy-bytes": Bars(f"Copies at {rate}", "MiB sent", shown, series("wire_bytes", MIB)),
    }


_CHARTS: Final[dict[str, Callable[[Facts], dict[str, Chart]]]] = {
    "More and more guests": _disk_chart,
    "Copy on write": _memory_chart,
    "Unify real guests": _pass_chart,
    "Start": _start_chart,
    "Copy to another machine": _copy_chart,
}
