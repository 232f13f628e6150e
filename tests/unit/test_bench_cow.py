"""The figures of the benchmark of copy-on-write links, from rounds that are made up."""

import json
from pathlib import Path

import pytest

from bench import cow
from bench.cow import NATIVE, NSPAWN, OVERLAY, VSERVER, CowReport, Results, Round
from bench.cowturns import SQLITE, TAR, Turn, Turns
from bench.report import Machine

_NATIVE = {
    **{"read-open": 2e-6, "write-open": 2e-6, "create and unlink": 2e-5, "chmod": 2e-6},
    **{"first write-open of a shared file": 3e-6, "unlink of a shared file": 2e-5},
    "install 50 packages again": 10.0,
}
_OURS = {**_NATIVE, "write-open": 20e-6, "read-open": 2.2e-6}
RESULTS = Results(
    [
        Round(VSERVER, 1, _OURS),
        Round(NATIVE, 1, _NATIVE),
        Round(OVERLAY, 1, {**_NATIVE, "install 50 packages again": 8.0}),
    ],
    {NSPAWN: "is not installed"},
    Turns(
        [
            Turn(TAR, place, number, seconds)
            for number, ours, theirs in ((1, 3.0, 1.0), (2, 40.0, 20.0), (3, 5.0, 1.0))
            for place, seconds in ((VSERVER, ours), (NATIVE, theirs))
        ]
        + [Turn(SQLITE, VSERVER, 1, 1.0), Turn(SQLITE, NATIVE, 2, 1.0)],
        {},
    ),
)


def test_targets_are_parts_of_the_same_round() -> None:
    found = {target.what: target for target in cow.targets(RESULTS)}
    reached = {what: target.reached for what, target in found.items()}
    assert reached["write-open of a private file"] == pytest.approx(20)
    assert reached["read-open, more than native"] == pytest.approx(0.2)
    assert reached["unpack a tar, of native"] == pytest.approx(3)
    assert reached["sqlite, of native"] is None
    assert reached["packages again, of overlayfs"] == pytest.approx(1.25)
    assert [target.is_met for target in found.values()] == [True, True, True, False, None, None]


def test_a_place_that_could_not_be_had_is_named(tmp_path: Path) -> None:
    machine = Machine("one", 2, 1 << 30, "6.18", "Debian", "ext4", "CPython 3.11", (0.0, 1.0))
    made = CowReport("2026-01-01", 1, machine, RESULTS, cow.targets(RESULTS))
    cow.write(made, tmp_path, "cow")
    text = (tmp_path / "cow.md").read_text()
    assert "systemd-nspawn: is not installed" in text
    assert json.loads((tmp_path / "cow.json").read_text())["results"]["missing"] == {
        NSPAWN: "is not installed"
    }
