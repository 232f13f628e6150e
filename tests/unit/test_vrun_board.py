"""vtop without a terminal: what it counts, sorts, chooses and draws."""

from pathlib import Path

import pytest

from vrun.board import GUESTS, ORDERS, PROCESSES, Board
from vrun.figures import Row
from vrun.live import Load, Look, Scene, Task, compare
from vrun.membership import Contexts, Member
from vrun.procs import TICKS, Process

WIDTH, HEIGHT = 79, 24


def process(
    pid: int, xid: int = 7, *, ticks: int = 0, name: str = "httpd", moved: int | None = 0
) -> Process:
    return Process(
        pid=pid,
        xid=xid,
        name=name,
        state="S",
        parent=1,
        user=ticks,
        system=0,
        reaped_user=0,
        reaped_system=0,
        nice=0,
        threads=2,
        start=pid * 10,
        virtual=1 << 20,
        resident=pid << 12,
        moved=moved,
    )


def row(xid: int, *, name: str = "", cpu_ms: int = 0) -> Row:
    return Row(xid, name, 1, 2, 1 << 20, xid << 12, cpu_ms, 0, 61_230)


def contexts(*xids: int) -> Contexts:
    members = {xid: Member(xid, f"guest{xid}", Path("/no/group")) for xid in xids}
    return Contexts(members, {})


def scene(*xids: int, tasks: tuple[Task, ...] = ()) -> Scene:
    loads = [Load(row(xid, name=f"guest{xid}"), None, float(xid), 0.0) for xid in (0, *xids)]
    by_xid = {7: list(tasks)}
    return Scene(contexts(*xids), loads, by_xid)


def drawn(board: Board, height: int = HEIGHT) -> tuple[list[str], str]:
    """The lines, and the chosen one."""
    lines, chosen = board.draw(WIDTH, height)
    assert {len(line) for line in lines} == {WIDTH}
    assert len(lines) == height
    return lines, lines[chosen]


# --- what happened between two looks


def test_rates_are_what_was_used_between_two_looks() -> None:
    before = Look(
        10.0, contexts(7), [row(0), row(7, cpu_ms=1000)], [process(1, 0), process(5, moved=100)]
    )
    now = Look(
        12.0,
        contexts(7),
        [row(0), row(7, cpu_ms=2000)],
        [process(1, 0, ticks=TICKS, moved=None), process(5, ticks=TICKS, moved=4100)],
    )
    first = compare(None, before)
    assert [(load.cpu, load.io) for load in first.loads] == [(None, None)] * 2
    second = compare(before, now)
    assert [(load.cpu, load.io) for load in second.loads] == [(50.0, None), (50.0, 2000.0)]
    assert [task.cpu for task in second.tasks[7]] == [50.0]


def test_a_number_that_means_another_process_has_no_rate() -> None:
    before = Look(10.0, contexts(7), [row(7)], [process(5, ticks=900)])
    other = process(5, ticks=1000)
    now = Look(11.0, contexts(7), [row(7)], [_begun(other, start=77)])
    assert [task.cpu for task in compare(before, now).tasks[7]] == [None]


def _begun(one: Process, *, start: int) -> Process:
    from vstore.record import replace

    return replace(one, start=start)


# --- the list


def test_the_screen_has_a_line_for_each_context() -> None:
    board = Board()
    board.take(scene(7, 8))
    lines, chosen = drawn(board)
    assert lines[1].rstrip() == GUESTS
    assert [line.split()[:2] for line in lines[2:5]] == [
        ["8", "guest8"],
        ["7", "guest7"],
        ["0", "guest0"],
    ]
    assert chosen.split()[0] == "0"


def test_headers_fit_eighty_columns_and_stand_above_what_they_say() -> None:
    assert len(GUESTS) <= WIDTH
    assert len(PROCESSES) <= WIDTH - 15  # a command has 15 bytes
    board = Board()
    board.take(scene(7))
    line = drawn(board)[0][2]
    for word, value in (("TASKS", "2"), ("%CPU", "7.0"), ("CPUTIME", "0m00s00"), ("UPTIME", "s23")):
        assert line[: GUESTS.index(word) + len(word)].endswith(value)


@pytest.mark.parametrize(("key", "first"), [("c", "9"), ("m", "9"), ("n", "0"), ("x", "0")])
def test_lists_are_sorted_and_turned(key: str, first: str) -> None:
    board = Board()
    board.take(scene(7, 9, 8))
    board.sort(key)
    assert board.loads()[0].row.xid == int(first)
    board.turn()
    assert board.loads()[-1].row.xid == int(first)
    assert set(ORDERS) == set("cmitnx")


def test_the_choice_stays_with_what_was_chosen() -> None:
    board = Board()
    board.take(scene(7, 8))
    board.sort("x")
    board.move(1)
    assert drawn(board)[1].split()[0] == "7"
    board.take(scene(3, 5, 7, 8))
    assert drawn(board)[1].split()[0] == "7"
    board.move_to_end(last=True)
    assert drawn(board)[1].split()[0] == "8"
    board.move(5)
    board.take(scene(3, 5, 7))
    assert drawn(board)[1].split()[0] == "0"
    board.move(-1)
    assert drawn(board)[1].split()[0] == "0"


def test_a_long_list_is_scrolled_to_what_is_chosen() -> None:
    board = Board()
    board.take(scene(*range(2, 202)))
    board.sort("x")
    board.move(100)
    for height in (24, 8, 6, 40):
        assert drawn(board, height)[1].split()[0] == "101"
    drawn(board, 24)
    board.page(1)
    assert drawn(board)[1].split()[0] == "121"
    board.page(-30)
    assert drawn(board)[1].split()[0] == "0"


def test_processes_of_the_chosen_context() -> None:
    board = Board()
    tasks = (
        Task(process(5, name="a\x1b[31m\n"), 1.0, 10.0),
        Task(process(6, name="日本語"), 2.0, None),
    )
    board.take(scene(7, tasks=tasks))
    board.sort("x")
    board.move(1)
    board.open()
    lines, chosen = board.draw(WIDTH, HEIGHT)
    assert lines[1].rstrip() == PROCESSES
    assert lines[2].split()[-1] == "a\\x1b[31m\\n"
    assert "\x1b" not in "".join(lines)
    assert lines[3].rstrip().endswith("日本語")
    assert len(lines[3]) == WIDTH - 3  # three letters take two places each
    assert chosen == 2
    board.take(scene(8))
    assert board.opened is None
    assert "context 7 has ended" in drawn(board)[0][-1]


def test_whom_a_signal_is_for() -> None:
    board = Board()
    assert board.victim() is None
    board.take(scene(7, tasks=(Task(process(5, name="x\n"), 1.0, None),)))
    board.sort("x")
    assert board.victim() is None
    assert "host" in board.note
    board.move(1)
    victim = board.victim()
    assert victim is not None
    assert (victim.xid, victim.task, victim.shown) == (7, None, "all of context 7 guest7")
    board.open()
    victim = board.victim()
    assert victim is not None
    assert (victim.xid, victim.task, victim.shown) == (7, (5, 50), "process 5 (x\\n)")


def test_an_empty_board_can_be_drawn() -> None:
    board = Board()
    lines, chosen = board.draw(WIDTH, HEIGHT)
    assert (len(lines), chosen) == (HEIGHT, -1)
    board.move(1)
    board.open()
    assert board.opened is None
