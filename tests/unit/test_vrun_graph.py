"""graph.py: each step after those before it, and no cycle that is not told."""

from hypothesis import given
from hypothesis import strategies as st

from vrun.graph import Before, Key, Schedule, find_cycles


def start(name: str) -> Key:
    return ("start", name)


def needs(*names: str) -> Before:
    return Before(needs=frozenset(map(start, names)))


def after(*names: str) -> Before:
    return Before(after=frozenset(map(start, names)))


def carry_out(schedule: Schedule, failing: frozenset[str] = frozenset()) -> tuple[str, list[str]]:
    """The names in the order in which they were done, and `a<b` for those given up."""
    done, given_up = "", []
    while key := schedule.take():
        done += key[1]
        given_up += [
            f"{one[1]}<{other[1]}" for one, other in schedule.end(key, well=key[1] not in failing)
        ]
    return done, sorted(given_up)


def test_a_step_waits_for_all_before_it() -> None:
    schedule = Schedule({start("a"): needs("b", "c"), start("b"): needs("c"), start("c"): Before()})
    assert carry_out(schedule) == ("cba", [])


def test_steps_that_wait_for_nothing_can_be_taken_at_once() -> None:
    schedule = Schedule({start("a"): Before(), start("b"): Before(), start("c"): needs("a")})
    assert schedule.take() == start("a")
    assert schedule.take() == start("b")
    assert schedule.take() is None
    assert list(schedule.end(start("b"), well=True)) == []
    assert schedule.take() is None
    assert list(schedule.end(start("a"), well=True)) == []
    assert schedule.take() == start("c")


def test_what_needs_a_step_that_failed_is_given_up_down_to_the_last() -> None:
    steps = {
        start("a"): Before(),
        start("b"): needs("a"),
        start("c"): needs("b"),
        start("d"): after("a"),
        start("e"): needs("d", "c"),
    }
    done, given_up = carry_out(Schedule(steps), frozenset("a"))
    assert done == "ad"
    assert given_up == ["b<a", "c<b", "e<c"]


def test_what_is_no_step_is_not_waited_for() -> None:
    assert carry_out(Schedule({start("a"): needs("x"), start("b"): after("y")})) == ("ab", [])


def test_cycles_are_found() -> None:
    assert find_cycles({"a": ("b",), "b": ("c",), "c": ("a",), "d": ("a",)}) == [["a", "b", "c"]]
    assert find_cycles({"a": ("a",), "b": ("x",)}) == [["a"]]
    assert find_cycles({"a": ("b", "c"), "b": ("d",), "c": ("d",), "d": ()}) == []


_LETTERS = "abcdef"


@given(st.dictionaries(st.sampled_from(_LETTERS), st.sets(st.sampled_from(_LETTERS), max_size=3)))
def test_without_what_closes_the_cycles_every_step_is_done_in_its_turn(
    given_needs: dict[str, set[str]],
) -> None:
    wanted = {name: tuple(sorted(others)) for name, others in given_needs.items()}
    for cycle in find_cycles(wanted):
        for name, other in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
            assert other in given_needs[name]
        wanted[cycle[-1]] = tuple(one for one in wanted[cycle[-1]] if one != cycle[0])
    done, given_up = carry_out(Schedule({start(name): needs(*wanted[name]) for name in wanted}))
    assert sorted(done) == sorted(wanted)
    assert given_up == []
    for name, others in wanted.items():
        assert all(done.index(other) < done.index(name) for other in others if other in wanted)
