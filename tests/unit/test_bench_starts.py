"""The figures of the benchmark of starts, from starts that are made up."""

import json
from pathlib import Path

import pytest

from bench import startreport, starts
from bench.bulk import Bulk
from bench.report import Listed, Machine
from bench.starts import NSPAWN, VSERVER, Memory, Results, Start

MIB = 1 << 20
STARTS = [
    Start(VSERVER, 1, 0.02, 0.05, 0.10),
    Start(NSPAWN, 1, 0.04, 0.05, 0.05),
    Start(VSERVER, 2, 0.06, 0.09, 0.30),
    Start(NSPAWN, 2, 0.06, 0.07, 0.10),
    Start(VSERVER, 3, 9, 9, 9),
]
RESULTS = Results(
    STARTS,
    [Memory(VSERVER, 1, 1, 8 * MIB, 9 * MIB)],
    {"runc": "ended with 1: no"},
    [Bulk(1, 50, 0.5, 0.6, 0.2, 4 * MIB, 5 * MIB), Bulk(2, 50, 1.5, 1.8, 0.3, 4 * MIB, 5 * MIB)],
)


def test_parts_are_of_the_same_round() -> None:
    part = starts.part_of(STARTS, NSPAWN, starts.first_of)
    assert part is not None
    assert (part.least, part.most) == pytest.approx((0.5, 1.0))


def test_a_peer_that_never_ran_is_no_part() -> None:
    assert starts.part_of(STARTS, "lxc-start", starts.first_of) is None


def test_targets_say_what_was_reached() -> None:
    first, cycle, memory, many = starts.targets(RESULTS)
    assert first.reached == pytest.approx(0.75)
    assert cycle.reached == pytest.approx(2.5)
    assert (first.is_met, cycle.is_met) == (True, False)
    assert (memory.reached, memory.is_met) == (8, True)
    assert many.reached == pytest.approx(0.375)
    assert many.is_met


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    targets = starts.targets(Results([], [], {}, []))
    assert {target.is_met for target in targets} == {None}


def test_the_report_names_who_is_missing_and_who_was_refused(tmp_path: Path) -> None:
    machine = Machine("a processor", 2, 4 << 30, "6", "Debian", "ext4", "CPython 3", (0.1, 0.2))
    programs = [
        Listed(VSERVER, "vserver NAME start", "vserver 1", "vserver-tools", False),
        Listed(NSPAWN, "systemd-nspawn", "systemd 252", "systemd-container", False),
        Listed("lxc-start", "lxc-start", None, "lxc", True),
    ]
    made = startreport.StartReport(
        "2026-01-01", 3, machine, programs, RESULTS, starts.targets(RESULTS)
    )
    startreport.write(made, tmp_path, "start")
    text = (tmp_path / "start.md").read_text()
    assert "missing (package lxc)" in text
    assert "- runc: ended with 1: no" in text
    assert "| systemd-nspawn | 40.0 / 50.0 / 60.0 | 0.50 / 0.75 / 1.00 |" in text
    assert (
        "| first instruction of the last guest | 500 / 1000 / 1500 | 0.25 / 0.38 / 0.50 |" in text
    )
    assert json.loads((tmp_path / "start.json").read_text())["results"]["starts"][0]["round"] == 1
