"""The page that outlives a supervisor: what its successor finds there."""

import pytest

from vrun.cow.notifications import Begun, Call, Page


def _call(number: int) -> Call:
    return Call(number, 7, 0, 257, 0xC000003E, 0, 1, 2, 3, 4, 5, 6)


@pytest.fixture
def page() -> Page:
    return Page()


def test_a_new_page_holds_no_call(page: Page) -> None:
    assert page.load_all() == []


def test_a_call_that_waits_is_found_until_it_is_forgotten(page: Page) -> None:
    slot = page.keep(_call(5), 3)
    for _ in range(2):  # one successor may die over it as well
        (left,) = page.load_all()
        assert (left.call, left.place, left.slot) == (_call(5), 3, slot)
        assert (left.result, left.begun) == (None, None)
    page.forget(left.slot)
    assert page.load_all() == []


def test_results_belong_to_their_calls_alone(page: Page) -> None:
    for number in (5, 6):
        page.keep(_call(number), 0)
    page.note_result(6, -1, 13)
    first, second = page.load_all()
    assert (first.call.id, first.result) == (6, (-1, 13))
    assert (second.call.id, second.result) == (5, None)


def test_what_may_be_done_already_comes_first(page: Page) -> None:
    for number in (5, 6, 7):
        page.keep(_call(number), 0)
    page.note_begun(7, Begun(1 << 40, 12, b"/etc/a name"))
    assert [left.call.id for left in page.load_all()] == [7, 5, 6]
    assert page.load_all()[0].begun == Begun(1 << 40, 12, b"/etc/a name")


def test_a_path_may_be_as_long_as_the_kernel_lets_it(page: Page) -> None:
    path = b"/" + b"x" * 4095
    page.keep(_call(5), 0)
    page.note_begun(5, Begun(1, 2, path))
    assert page.load_all()[0].begun == Begun(1, 2, path)


def test_there_is_no_more_room_than_there_is(page: Page) -> None:
    slots = [page.keep(_call(number), 0) for number in range(1, 50)]
    assert slots[39] == 40
    assert slots[40] == 0
    page.forget(0)  # of a call that had no slot: harms nobody
    assert len(page.load_all()) == 40
