"""The CONTEXT column: where it stands, and that no name is taken for a pid."""

import os
from pathlib import Path

import pytest

from vrun import pscolumn
from vrun.membership import Contexts, Member

WEB = Member(49152, "web", Path("/sys/fs/cgroup/vservers/49152"))
LONG = "a-name-of-fourteen"
NOBODY = 2**22 + 1
"""No process has that number: it is above any pid_max."""


class _Fixed(Contexts):
    """Contexts in which processes are that a test names; all others have ended."""

    __slots__ = ("places",)

    def __init__(self, **places: int) -> None:
        super().__init__({49152: WEB, 7: Member(7, LONG, Path("/x"))}, {})
        object.__setattr__(self, "places", {int(pid[1:]): xid for pid, xid in places.items()})

    def xid_of(self, pid: int) -> int | None:
        places: dict[int, int] = self.places  # type: ignore[attr-defined]  # of __setattr__
        return places.get(pid)


def test_the_column_stands_behind_the_pid() -> None:
    text = "    PID TTY      STAT\n      1 ?        Ss\n  49987 pts/0    R+\n"
    shown = pscolumn.add_column(text, _Fixed(p1=0, p49987=49152))
    assert shown == (
        "    PID CONTEXT             TTY      STAT\n"
        "      1     0 MAIN          ?        Ss\n"
        "  49987 49152 web           pts/0    R+\n"
    )


def test_longer_names_push_the_rest_by_one_blank() -> None:
    shown = pscolumn.add_column("PID CMD\n 12 x\n", _Fixed(p12=7))
    assert shown == f"PID CONTEXT             CMD\n 12     7 {LONG} x\n"


def test_pid_may_be_the_last_column() -> None:
    shown = pscolumn.add_column("USER PID\nroot   1\nbob   22", _Fixed(p1=0, p22=1))
    assert shown == "USER PID CONTEXT\nroot   1     0 MAIN\nbob   22     1 ALL_PROC"


def test_what_has_ended_is_in_no_context() -> None:
    shown = pscolumn.add_column(f"    PID CMD\n{NOBODY:>7} x", _Fixed())
    assert shown == f"    PID CONTEXT             CMD\n{NOBODY:>7}   ERR               x"


def test_a_column_of_parents_is_not_taken_for_that_of_pids() -> None:
    shown = pscolumn.add_column("   PPID     PID CMD\n      1      22 x", _Fixed(p1=0, p22=49152))
    assert shown is not None
    assert shown.splitlines()[1] == "      1      22 49152 web           x"


def test_numbers_in_the_names_of_processes_are_no_pids() -> None:
    text = "COMMAND             PID CMD\n1 2 3 49152 web      22 1 2 3\n"
    shown = pscolumn.add_column(text, _Fixed(p1=0, p2=0, p3=0, p22=49152))
    assert shown is not None
    assert shown.splitlines()[1] == "1 2 3 49152 web      22 49152 web           1 2 3"


def test_names_of_wide_letters_take_two_places_each() -> None:
    text = "COMMAND   PID CMD\n日本 1 e\u0301   22 x\n日 1       22 x"
    shown = pscolumn.add_column(text, _Fixed(p1=0, p22=49152))
    assert shown is not None
    assert [line.index("49152 web") for line in shown.splitlines()[1:]] == [13, 13]


@pytest.mark.parametrize("row", ["16744 10103 x", "1674400000 10103 x"])
def test_a_column_that_was_pushed_is_found_to_the_right(row: str) -> None:
    shown = pscolumn.add_column(f"VSZ   PID CMD\n{row}", _Fixed(p10103=49152))
    assert shown is not None
    assert "10103 49152 web           x" in shown


def test_rows_of_threads_have_a_blank_column() -> None:
    shown = pscolumn.add_column("  PID TTY\n    - -  LWP 7", _Fixed(p7=0))
    assert shown == "  PID CONTEXT             TTY\n    -                     -  LWP 7"


def test_each_repeated_header_has_the_column() -> None:
    shown = pscolumn.add_column("PID CMD\n  1 x\nPID CMD\n  1 y", _Fixed(p1=0))
    assert shown is not None
    assert shown.count("PID CONTEXT             CMD") == 2


@pytest.mark.parametrize("header", ["", "PPID CMD", "SPID", "USER CMD"])
def test_without_a_header_of_pids_nothing_is_shown(header: str) -> None:
    assert pscolumn.add_column(f"{header}\n  1 x", _Fixed(p1=0)) is None


def test_the_innermost_context_of_a_group_counts() -> None:
    places = {"/vservers/5": 5, "/vservers/5/guest/bound/6": 6}
    contexts = Contexts({}, places)
    assert contexts.xid_of_place("/vservers/5/guest/bound/6/guest/x") == 6
    assert contexts.xid_of_place("/vservers/5/guest/bound") == 5
    assert contexts.xid_of_place("/vservers/55") == 0
    assert contexts.xid_of_place("/x/vservers/5") == 0
    assert contexts.xid_of_place("/") == 0
    assert Contexts({}, {}).xid_of(os.getpid()) == 0
    assert Contexts({}, {}).xid_of(NOBODY) is None
