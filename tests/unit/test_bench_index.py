"""The page over all reports says what the reports beside it say."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bench import index
from bench.charts import Bars, Lines

_REPORTS = Path(__file__).parents[2] / "bench/reports"


def _facts(case: str, **more: Any) -> dict[str, Any]:
    """What every report has."""
    names = "processor kernel system file_system python"
    machine = {**dict.fromkeys(names.split(), "some"), "cores": 2, "memory_bytes": 1 << 30}
    return {"case": case, "day": "2026-01-02", "machine": {**machine, "load": [0.5, 1]}, **more}


def _save(folder: Path, name: str, facts: dict[str, Any]) -> dict[str, Any]:
    (folder / f"{name}.json").write_text(json.dumps(facts))
    return index.load(folder)


def _copy(program: str, number: int, seconds: float, sent: int) -> dict[str, Any]:
    job = {"scenario": "first guest", "rate": "100 Mbit/s", "round": number}
    return {"program": program, **job, "wall_s": seconds, "wire_bytes": sent}


def test_the_page_is_that_of_the_reports_beside_it() -> None:
    assert (_REPORTS / index.INDEX).read_text() == index.as_markdown(index.load(_REPORTS))


def test_each_chart_of_the_page_is_there_and_is_svg() -> None:
    names = index.find_charts(index.load(_REPORTS))
    files = sorted((_REPORTS / index.CHARTS).iterdir())
    assert [path.name for path in files] == sorted(f"{name}.svg" for name in names)
    for path in files:
        assert ElementTree.parse(path).getroot().tag.endswith("}svg")  # noqa: S314 (our own)


def test_a_ratio_is_the_median_of_rounds_in_which_both_ran(tmp_path: Path) -> None:
    copies = [
        *(_copy("vserver-copy", number, seconds, 10) for number, seconds in enumerate((2, 3, 9))),
        *(_copy("rsync", number, 4, 100) for number in range(4)),
    ]
    reports = _save(tmp_path, "copy", _facts("copy", results={"copies": copies}))
    said = index.as_markdown(reports)
    assert "| first guest, 100 Mbit/s: time | rsync | 0.75 |" in said
    assert "| first guest, 100 Mbit/s: bytes | rsync | 0.10 |" in said


def test_what_was_not_measured_is_named_with_its_command(tmp_path: Path) -> None:
    said = index.as_markdown(index.load(tmp_path))
    for part in index.PARTS:
        assert f"## {part.title}\n\nNot measured: `{part.command}`." in said


def test_memory_is_drawn_as_measured_first_and_further(tmp_path: Path) -> None:
    held = {"cache": 1 << 20, "pss": 2 << 20, "runtime": 0}
    memory = [{"state": "unified", "guests": 20, "first": held, "further": held}]
    results = {"rounds": [], "missing": {}, "memory": memory}
    reports = _save(tmp_path, "cow-ext4", _facts("cow", results=results))
    chart = index.find_charts(reports)["memory"]
    assert isinstance(chart, Lines)
    assert (chart.x, chart.series["unified"]) == ([1, 20], [3.0, 60.0])


def test_a_program_that_did_not_run_leaves_a_gap(tmp_path: Path) -> None:
    copies = [_copy("rsync", 1, 4, 100)]
    copies.append({**_copy("vserver-copy", 1, 2, 10), "scenario": "the same again"})
    reports = _save(tmp_path, "copy", _facts("copy", results={"copies": copies}))
    chart = index.find_charts(reports)["copy-seconds"]
    assert isinstance(chart, Bars)
    assert chart.series == {"vserver-copy": [None, 2], "rsync": [4, None]}


def test_each_part_says_the_command_that_made_it(tmp_path: Path) -> None:
    small = _facts("copy", results={"copies": [_copy("rsync", 1, 4, 100)]}, rounds=1)
    said = index.as_markdown(_save(tmp_path, "copy-small", small))
    command = "python -m bench copy --size small --repeat 1"
    assert f"`{command}`, 2026-01-02; [all of it](copy-small.md)." in said
    results: dict[str, Any] = {"rounds": [], "missing": {}, "memory": []}
    said = index.as_markdown(_save(tmp_path, "cow-btrfs-small", _facts("cow", results=results)))
    assert "`python -m bench cow --fs btrfs --size small`, 2026-01-02" in said
    said = index.as_markdown(_save(tmp_path, "copy", {**small, "rounds": 3}))
    assert "`python -m bench copy`, 2026-01-02; [all of it](copy.md)." in said
