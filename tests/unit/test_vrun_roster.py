"""roster.py: which guests are meant, what comes before what, and what is refused with a reason."""

from pathlib import Path

import pytest

from tests.fixtures.guestconfig import Configuration, configure
from vrun import roster
from vrun.errors import WrongUsage
from vrun.roster import Plan, Wanted, Word


@pytest.fixture
def etc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configuration:
    return configure(tmp_path, monkeypatch)


def add(etc: Configuration, **depends: str) -> None:
    """Guests, each with those that it needs, blanks between them."""
    for name, others in depends.items():
        lines = others.replace(" ", "\n")
        etc.add_guest(name, {"apps/init/depends": lines, "apps/init/mark": f"of-{name}"})


def waits(plan: Plan, word: Word, name: str) -> tuple[set[str], set[str]]:
    """Of whom the guest needs the same step to be done well, and of whom anyhow."""
    before = plan.before[word, name]
    return {one for _, one in before.needs}, {one for _, one in before.after}


# --- which


def test_marks_are_lines_and_any_of_them_counts(etc: Configuration) -> None:
    etc.add_guest("a", {"apps/init/mark": "default\nnight"})
    etc.add_guest("b", {"apps/init/mark": "# none\nday"})
    etc.add_guest("c")
    etc.add_guest("d", {"apps/init/mark": "default", "disabled": True})
    assert roster.choose(Wanted(marks=("default",))) == ["a"]
    assert roster.choose(Wanted(marks=("day", "night"))) == ["a", "b"]
    assert roster.choose(Wanted(marks=("default",), with_disabled=True)) == ["a", "d"]
    assert roster.choose(Wanted(marks=("def",))) == []
    assert roster.choose(Wanted(is_running=False)) == ["a", "b", "c"]
    assert roster.choose(Wanted(is_running=True, everyone=True)) == []


def test_onboot_of_an_old_style_guest_is_the_mark_default(etc: Configuration) -> None:
    etc.add_old_guest("old", "ONBOOT=yes\n")
    etc.add_old_guest("off", "ONBOOT=no\n")
    assert roster.choose(Wanted(marks=("default",))) == ["old"]


@pytest.mark.parametrize(
    "wanted", [Wanted(), Wanted(("a",), everyone=True), Wanted(("a",), marks=("m",))]
)
def test_names_or_something_that_is_true_of_them(etc: Configuration, wanted: Wanted) -> None:
    with pytest.raises(WrongUsage):
        roster.choose(wanted)


# --- start


def test_what_is_needed_is_started_before_though_nobody_named_it(etc: Configuration) -> None:
    add(etc, web="db cache", db="disk", cache="", disk="", other="")
    plan = roster.plan("start", ["web"])
    assert {name for _, name in plan.before} == {"web", "db", "cache", "disk"}
    assert waits(plan, "start", "web") == ({"db", "cache"}, set())
    assert waits(plan, "start", "db") == ({"disk"}, set())
    assert (plan.refused, plan.warnings) == ({}, ())


def test_a_cycle_is_named_and_keeps_what_needs_it_from_starting(etc: Configuration) -> None:
    add(etc, a="b", b="c", c="a", user="b", free="", self="self")
    plan = roster.plan("start", ["a", "user", "free", "self"])
    assert {name for _, name in plan.before} == {"free"}
    cycle = "not started: guests need each other: a needs b, b needs c, c needs a"
    assert {plan.refused[name] for name in "abc"} == {cycle}
    assert plan.refused["user"] == "not started: it needs guest b, which cannot be started"
    assert plan.refused["self"] == "not started: guest self needs itself"


def test_what_is_needed_and_not_there_or_disabled_is_said(etc: Configuration) -> None:
    add(etc, web="gone", mail="off", off="")
    (etc.confdir / "off/disabled").touch()
    plan = roster.plan("start", ["web", "mail"])
    assert plan.before == {}
    assert plan.refused["gone"].startswith("there is no guest gone")
    assert "is disabled" in plan.refused["off"]
    assert plan.refused["web"] == "not started: it needs guest gone, which cannot be started"
    assert list(roster.plan("start", ["off"]).before) == [("start", "off")]


def test_priority_orders_old_style_guests_among_themselves(etc: Configuration) -> None:
    for name, priority in (("last", "200"), ("first", "10"), ("also", "10"), ("usual", "")):
        etc.add_old_guest(name, f"ONBOOT=yes\nPRIORITY={priority}\n")
    etc.add_guest("new", {"apps/init/mark": "default"})
    chosen = roster.choose(Wanted(marks=("default",)))
    plan = roster.plan("start", chosen, by_mark=True)
    assert waits(plan, "start", "first") == (set(), set())
    assert waits(plan, "start", "usual") == (set(), {"first", "also"})
    assert waits(plan, "start", "last") == (set(), {"usual"})
    assert waits(plan, "start", "new") == (set(), set())
    backwards = roster.plan("stop", chosen, by_mark=True)
    assert waits(backwards, "stop", "first") == (set(), {"usual"})
    assert waits(backwards, "stop", "last") == (set(), set())


def test_a_mark_that_cannot_be_read_is_a_failure_of_that_guest(etc: Configuration) -> None:
    etc.add_old_guest("bad", "ONBOOT=yes\nif\n")
    etc.add_guest("good", {"apps/init/mark": "default"})
    chosen = roster.choose(Wanted(marks=("default",)))
    assert chosen == ["bad", "good"]
    for word in ("start", "stop"):
        plan = roster.plan(word, chosen, by_mark=True)
        assert list(plan.before) == [(word, "good")]
        assert "bad.conf" in plan.refused["bad"]
    assert ("stop", "bad") in roster.plan("stop", ["bad"]).before


# --- stop and restart


def test_a_stop_goes_backwards_and_touches_only_what_is_meant(etc: Configuration) -> None:
    add(etc, web="db", mail="db", db="disk", disk="", other="web")
    plan = roster.plan("stop", ["web", "mail", "db", "disk"])
    assert {name for _, name in plan.before} == {"web", "mail", "db", "disk"}
    assert waits(plan, "stop", "db") == (set(), {"web", "mail"})
    assert waits(plan, "stop", "disk") == (set(), {"db"})
    assert waits(plan, "stop", "web") == (set(), set())


def test_a_stop_breaks_cycles_with_a_warning(etc: Configuration) -> None:
    add(etc, a="b", b="a", c="a")
    plan = roster.plan("stop", ["a", "b", "c"])
    assert len(plan.before) == 3
    assert plan.warnings == (
        "guests need each other: a needs b, b needs a; they are stopped in any order",
    )
    assert plan.refused == {}


def test_a_restart_stops_users_first_and_starts_them_last(etc: Configuration) -> None:
    add(etc, web="db", db="", lone="")
    plan = roster.plan("restart", ["web", "db", "lone"])
    assert waits(plan, "stop", "db") == (set(), {"web"})
    assert plan.before["start", "db"].needs == {("stop", "db")}
    assert plan.before["start", "web"].needs == {("stop", "web"), ("start", "db")}
    assert plan.before["start", "lone"].needs == {("stop", "lone")}


def test_a_guest_in_a_cycle_is_not_stopped_by_a_restart(etc: Configuration) -> None:
    add(etc, a="b", b="a", user="a")
    plan = roster.plan("restart", ["user"])
    assert plan.before == {}
    assert plan.refused["user"] == "not restarted: it needs guest a, which cannot be started"
