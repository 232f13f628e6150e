"""The figures of the benchmark of copies, from copies that are made up."""

import json
from pathlib import Path

import pytest

from bench import copies, copyreport
from bench.channels import Carried
from bench.copies import FIRST, OURS, RSYNC, SIBLING, TAR, Copy, Results
from bench.report import Machine

_MACHINE = Machine("a processor", 2, 1 << 30, "6.1", "Linux", "xfs", "CPython", (0.0, 0.0))


def _copy(program: str, scenario: str, number: int, wall_s: float, sent: int) -> Copy:
    rate = "100 Mbit/s" if scenario == SIBLING else "unlimited"
    return Copy(program, rate, scenario, number, wall_s, 0.1, sent)


COPIES = [
    _copy(OURS, FIRST, 1, 2.0, 100),
    _copy(RSYNC, FIRST, 1, 4.0, 400),
    _copy(OURS, FIRST, 2, 3.0, 100),
    _copy(RSYNC, FIRST, 2, 3.0, 200),
    _copy(TAR, FIRST, 1, 1.0, 90),
    _copy(OURS, SIBLING, 1, 1.0, 10),
]


def test_parts_are_of_the_same_round() -> None:
    part = copies.part_of(COPIES, FIRST, "unlimited", copies.wall_of)
    assert part is not None
    assert (part.least, part.most) == pytest.approx((0.5, 1.0))
    sent = copies.part_of(COPIES, FIRST, "unlimited", copies.bytes_of)
    assert sent is not None
    assert (sent.least, sent.most) == pytest.approx((0.25, 0.5))


def test_what_a_peer_did_not_do_is_not_measured() -> None:
    assert copies.part_of(COPIES, SIBLING, "100 Mbit/s", copies.wall_of) is None
    found = {target.what: target.is_met for target in copies.targets(Results(COPIES))}
    assert found[f"{FIRST}, unlimited: time, as a part of rsync's"] is True
    assert found[f"{SIBLING}, 100 Mbit/s: time, as a part of rsync's"] is None


def test_a_report_has_every_copy(tmp_path: Path) -> None:
    results = Results(COPIES, 1000, 10)
    report = copyreport.CopyReport(
        "2026-01-01", "small", 2, _MACHINE, results, copies.targets(results)
    )
    copyreport.write(report, tmp_path, "copy")
    facts = json.loads((tmp_path / "copy.json").read_text())
    assert len(facts["results"]["copies"]) == len(COPIES)
    text = (tmp_path / "copy.md").read_text()
    assert RSYNC in text
    assert "## 100 Mbit/s" in text


def test_what_the_channel_carries_is_held_against_its_targets(tmp_path: Path) -> None:
    carried = {copies.BYTES: Carried(10**9, 0, 4.0), copies.FAR: Carried(10**7, 0, 1.25)}
    results = Results(COPIES, carried=carried)
    found = {target.what: target for target in copies.targets(results)}
    assert found[f"the ssh channel alone: {copies.BYTES}"].reached == pytest.approx(250)
    assert found[f"the ssh channel alone: {copies.BYTES}"].is_met is True
    assert found[f"the ssh channel alone: {copies.OBJECTS}"].is_met is None
    far = found[f"the ssh channel alone: {copies.FAR}, as a part of the link"]
    assert far.reached == pytest.approx(0.64)
    assert far.is_met is False
    report = copyreport.CopyReport(
        "2026-01-01", "small", 2, _MACHINE, results, copies.targets(results)
    )
    copyreport.write(report, tmp_path, "copy")
    assert "## The ssh channel alone" in (tmp_path / "copy.md").read_text()
