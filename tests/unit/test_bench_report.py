"""The figures of a benchmark report, from runs that are made up."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import figures, report
from bench.figures import Run, Spread, State, Target
from bench.ledger import File, Ledger, count
from bench.measure import Peak
from bench.report import Listed, Machine, Report
from bench.seeded import GUESTS, KINDS, content

MIB = 1 << 20
LEDGER = Ledger(
    guests=12,
    files=90_000,
    apparent_bytes=4000 * MIB,
    allocated_bytes=4100 * MIB,
    linked_files=6,
    twin_files=900,
    hardlink_bytes=3000 * MIB,
    linked_bytes=10 * MIB,
    twin_bytes=20 * MIB,
    attribute_bytes=MIB,
)


def a_run(
    program: str,
    wall_s: float,
    *,
    round: int = 1,
    step: int = 1,
    state: State = "warm",
    files: int = 100,
    exit_code: int = 0,
    reclaimed: int = 0,
    peak: Peak | None = None,
) -> Run:
    return Run(
        data="guests",
        files=files,
        program=program,
        state=state,
        round=round,
        step=step,
        wall_s=wall_s,
        user_s=wall_s / 2,
        system_s=wall_s / 4,
        flush_s=0.1,
        exit_code=exit_code,
        reclaimed_bytes=reclaimed,
        peak=peak,
        trees_kept=True if state == "watched" else None,
    )


def a_file(guest: int, content: bytes, *, names: int = 1, mtime_ns: int = 0) -> File:
    return File(
        guest=guest,
        names=names,
        size=100,
        allocated=4096,
        content=content,
        mode=0o644,
        uid=0,
        gid=0,
        mtime_ns=mtime_ns,
        xattrs=b"",
    )


def a_report(runs: list[Run]) -> Report:
    machine = Machine(
        processor="a processor",
        cores=2,
        memory_bytes=4 << 30,
        kernel="6.1",
        system="Debian",
        file_system="xfs",
        python="CPython 3.11",
        load=(0.1, 0.2),
    )
    programs = [
        Listed("vunify", "vunify --offline", "1.0", "vserver-tools", is_missing=False),
        Listed("hardlink", "hardlink TREE...", "2.38", "util-linux", is_missing=False),
        Listed("rdfind", "rdfind TREE...", None, "rdfind", is_missing=True),
    ]
    targets = figures.unify_targets(runs, ["hardlink", "rdfind"], LEDGER)
    return Report("unify", "full", "2026-01-01", 3, machine, programs, runs, targets, LEDGER)


def test_a_spread_is_least_middle_most() -> None:
    assert figures.spread([3.0, 1.0, 2.0, 10.0]) == Spread(1.0, 2.5, 10.0)


def test_no_figures_have_no_spread() -> None:
    assert figures.spread([]) is None


def test_ratios_pair_the_runs_of_one_round() -> None:
    ours = [a_run("vunify", 1.0, round=1), a_run("vunify", 4.0, round=2)]
    theirs = [a_run("hardlink", 8.0, round=2), a_run("hardlink", 2.0, round=1)]
    assert figures.ratios(ours, theirs) == Spread(0.5, 0.5, 0.5)


def test_a_round_without_its_peer_has_no_ratio() -> None:
    assert figures.ratios([a_run("vunify", 1.0, round=2)], [a_run("hardlink", 2.0)]) is None


def test_a_failed_run_is_no_figure() -> None:
    runs = [a_run("hardlink", 0.1, exit_code=1), a_run("hardlink", 2.0, round=2)]
    assert figures.wall(figures.select(runs, program="hardlink", step=1)) == Spread(2.0, 2.0, 2.0)


def test_the_fastest_peer_is_that_of_the_least_median() -> None:
    runs = [a_run("rdfind", 3.0), a_run("hardlink", 1.0), a_run("hardlink", 9.0, round=2)]
    assert figures.fastest(runs, ["hardlink", "rdfind"], step=1) == "rdfind"


def test_time_in_step_with_files_has_slope_one() -> None:
    assert figures.slope(Spread(1, 2, 3), Spread(10, 20, 30), times=10) == pytest.approx(1)


def test_targets_compare_first_with_fastest_and_second_with_hardlink() -> None:
    runs = [
        *(a_run("vunify", 1.0, reclaimed=2970 * MIB), a_run("vunify", 0.4, step=2)),
        *(a_run("hardlink", 4.0, reclaimed=3000 * MIB), a_run("hardlink", 0.5, step=2)),
        *(a_run("rdfind", 2.0), a_run("rdfind", 0.1, step=2)),
    ]
    first, second, _, room = figures.unify_targets(runs, ["hardlink", "rdfind"], LEDGER)
    assert (first.reached, second.reached, room.reached) == (0.5, 0.8, 1.0)
    assert (first.is_met, second.is_met, room.is_met) == (True, True, True)


def test_what_is_set_free_is_held_against_hardlink_less_twins_and_linked() -> None:
    held = {"vunify": 1200 * MIB, "hardlink": 1100 * MIB}  # of 4100: 2900 free, and 3000 less 30
    runs = [
        replace(a_run(name, 1.0, state="watched"), held_bytes=left) for name, left in held.items()
    ]
    blocks = figures.unify_targets(runs, ["hardlink"], LEDGER)[2]
    assert blocks.reached == pytest.approx(2900 / 2970)
    assert blocks.is_met is False


def test_a_target_without_a_figure_is_neither_met_nor_missed() -> None:
    assert [target.is_met for target in figures.unify_targets([], ["hardlink"], None)] == [
        None,
        None,
    ]


def test_scale_targets_hold_slope_and_memory() -> None:
    big = Peak(rss=400 * MIB, pss=200 * MIB, processes=3)
    runs = [
        *(a_run("vunify", 1.0, files=100), a_run("vunify", 13.0, files=1000)),
        a_run("vunify", 14.0, files=1000, state="watched", peak=big),
    ]
    slope, second, memory = figures.scale_targets(runs, ["guests"])
    assert slope.reached == pytest.approx(1.3)
    assert slope.is_met is False
    assert second.is_met is None
    assert (memory.reached, memory.is_met) == (400, False)


def test_the_ledger_tells_twins_linked_and_sub_second_apart() -> None:
    files = [
        *(a_file(0, b"shared"), a_file(1, b"shared")),  # 1 to gain for both
        *(a_file(0, b"twin"), a_file(0, b"twin"), a_file(1, b"twin")),  # 2 and 1
        *(a_file(0, b"linked", names=2), a_file(1, b"linked")),  # 1 and 0
        *(a_file(0, b"time", mtime_ns=1), a_file(1, b"time", mtime_ns=2)),  # 1 and 0
    ]
    ledger = count(files, guests=2)
    assert ledger.hardlink_bytes == 5 * 4096
    assert (ledger.linked_bytes, ledger.twin_bytes, ledger.attribute_bytes) == (4096, 4096, 4096)
    assert ledger.vunify_bytes == 2 * 4096
    assert (ledger.files, ledger.linked_files, ledger.twin_files) == (10, 1, 2)


def test_a_table_escapes_what_would_break_it() -> None:
    assert (
        report.table(["a", "b"], [["x|y", "1\n2"]])
        == "| a | b |\n| --- | ---: |\n| x\\|y | 1 2 |\n"
    )


def test_a_spread_of_one_figure_shows_one() -> None:
    assert report.show_spread(Spread(2, 2, 2)) == "2.00"
    assert report.show_spread(Spread(1, 2, 3), digits=1) == "1.0 / 2.0 / 3.0"
    assert report.show_spread(None) == "-"


def test_a_target_says_whether_it_is_met() -> None:
    shown = report.show_targets([Target("first pass", 0.6, 0.7, "x"), Target("room", 1, None, "x")])
    assert "| first pass | at most 0.6 | 0.700 | x | no |" in shown
    assert "| room | at most 1 | - | x | not measured |" in shown


def test_the_markdown_names_missing_programs_and_bad_runs() -> None:
    runs = [a_run("vunify", 1.0), a_run("hardlink", 2.0), a_run("hardlink", 1.0, exit_code=3)]
    text = report.as_markdown(a_report(runs))
    assert "missing (package rdfind)" in text
    assert "- hardlink, warm, pass 1: exit code 3" in text
    assert "| vunify | 1.00 |" in text


def test_the_cold_run_stands_apart_from_the_warm_ones() -> None:
    runs = [a_run("vunify", 1.0), a_run("vunify", 9.0, state="cold")]
    text = report.as_markdown(a_report(runs))
    warm, cold = text.split("### First pass, cold cache")
    assert "9.00" not in warm
    assert "| vunify | 9.00 |" in cold


def test_the_json_has_every_run_and_its_format(tmp_path: Path) -> None:
    peak = Peak(rss=MIB, pss=MIB, processes=1)
    report.write(a_report([a_run("vunify", 1.5, state="watched", peak=peak)]), tmp_path, "unify")
    told = json.loads((tmp_path / "unify.json").read_text())
    assert told["format"] == 1
    assert told["runs"][0]["peak"] == {"rss": MIB, "pss": MIB, "processes": 1}
    assert (tmp_path / "unify.md").read_text().startswith("# bench: unify\n")


@pytest.mark.parametrize("kind", KINDS)
def test_a_seeded_tree_is_the_same_every_time(kind: str) -> None:
    grow = KINDS[kind]
    once, again = ([content(grow(g, i)) for g in (0, 9) for i in range(50)] for _ in range(2))
    assert once == again


def test_seeded_kinds_share_what_their_names_say() -> None:
    def contents(kind: str) -> int:
        files = ((g, i) for g in range(GUESTS) for i in range(20))
        return len({content(KINDS[kind](g, i)) for g, i in files})

    assert contents("equal") == 1
    assert contents("copies") == 20
    assert contents("different") == 20 * GUESTS
    assert 20 < contents("mix") < 20 * GUESTS
