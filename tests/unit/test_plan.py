"""Who shares with whom: places, twins, full objects, and what --ignore-mtime and twins change."""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from vstore.member import Member
from vstore.plan import (
    NAMES_A_BATCH,
    OBJECTS_A_BATCH,
    KnownObject,
    Reclaimed,
    Rules,
    Slot,
    batch_slots,
    plan_group,
    take_turns,
)

_DIGEST = b"d" * 32
_PLAIN = Rules()
_TWINS = Rules(link_twins=True)
_ANY_TIME = Rules(ignore_mtime=True)

_rows = iter(range(1, 1 << 30))


def member(tree: int, ino: int, *, nlink: int = 1, mtime: int = 5, blocks: int = 8) -> Member:
    row = next(_rows)
    name = b"%d" % row
    owner = (0o100644, 0, 0)
    times = (mtime, 7)
    size = 100
    place = (0, 0, tree, row, 1, name, ino, size)
    return Member(*place, *owner, *times, nlink, blocks, 1, _DIGEST, b"", 0)


def known(number: int, ino: int, *, mtime: int = 5, is_full: bool = False) -> KnownObject:
    return (_DIGEST, b"", mtime, number, ino, is_full)


def plan(
    members: Iterable[Member],
    objects: Sequence[KnownObject] = (),
    *,
    used: Iterable[tuple[int, int]] = (),
    rules: Rules = _PLAIN,
) -> list[Slot]:
    return list(plan_group(take_turns(list(members)), objects, frozenset(used), rules))


def shape(slots: Iterable[Slot]) -> list[tuple[int, int, list[int]]]:
    """Number, inode number and the members' inodes of each slot, by number."""
    found = [(slot.number, slot.ino, sorted(item.ino for item in slot.members)) for slot in slots]
    return sorted(found)


def test_equal_files_of_trees_share_one_slot() -> None:
    slots = plan([member(0, 10), member(1, 11), member(2, 12)])
    assert shape(slots) == [(0, 0, [10, 11, 12])]
    assert slots[0].is_worth_it(_PLAIN)
    assert slots[0].object_name.endswith("-0")


def test_twins_take_different_slots_with_the_twins_of_other_trees() -> None:
    slots = plan([member(0, 10), member(0, 11), member(1, 20), member(1, 21), member(1, 22)])
    assert shape(slots) == [(0, 0, [10, 20]), (1, 0, [11, 21]), (2, 0, [22])]
    assert [slot.is_worth_it(_PLAIN) for slot in slots] == [True, True, False]


def test_an_object_that_is_there_is_worth_a_single_file() -> None:
    slots = plan([member(0, 10)], [known(0, 99)])
    assert shape(slots) == [(0, 99, [10])]
    assert slots[0].is_worth_it(_PLAIN)
    assert slots[0].sources() == []


def test_a_single_file_is_worth_an_object_only_where_all_are() -> None:
    (slot,) = plan([member(0, 10)])
    assert not slot.is_worth_it(_PLAIN)
    assert slot.is_worth_it(Rules(everything=True))


def test_a_new_twin_takes_the_lowest_object_that_its_tree_does_not_use() -> None:
    objects = [known(0, 90), known(1, 91), known(2, 92)]
    slots = plan([member(0, 10), member(1, 11)], objects, used=[(0, 90), (0, 92), (1, 91)])
    assert shape(slots) == [(0, 90, [11]), (1, 91, [10])]


def test_a_twin_beyond_all_objects_gets_a_number_of_its_own() -> None:
    objects = [known(0, 90), known(1, 91)]
    slots = plan([member(0, 10)], objects, used=[(0, 90), (0, 91)])
    assert shape(slots) == [(2, 0, [10])]


def test_a_number_that_is_free_again_is_taken_first() -> None:
    slots = plan([member(0, 10), member(1, 11)], [known(1, 91)])
    assert shape(slots) == [(0, 0, [10, 11])]


def test_an_object_that_takes_no_more_links_is_passed_over() -> None:
    slots = plan([member(0, 10), member(1, 11)], [known(0, 90, is_full=True)])
    assert shape(slots) == [(1, 0, [10, 11])]
    slots = plan([member(0, 10)], [known(0, 90, is_full=True), known(1, 91)])
    assert shape(slots) == [(1, 91, [10])]


def test_linked_twins_share_one_slot() -> None:
    slots = plan([member(0, 10), member(0, 11), member(1, 20)], rules=_TWINS)
    assert shape(slots) == [(0, 0, [10, 11, 20])]
    slots = plan([member(0, 10)], [known(0, 90)], used=[(0, 90)], rules=_TWINS)
    assert shape(slots) == [(0, 90, [10])]


def test_many_linked_twins_come_in_pieces_of_one_object() -> None:
    members = [member(0, number) for number in range(1, 2 * NAMES_A_BATCH + 3)]
    slots = plan(members, rules=_TWINS)
    assert {slot.object_name for slot in slots} == {slots[0].object_name}
    assert sum(len(slot.members) for slot in slots) == len(members)
    assert all(slot.is_worth_it(_TWINS) for slot in slots)


def test_the_object_is_made_of_an_inode_all_of_whose_names_are_in_the_slot() -> None:
    single, shared = member(0, 10), [member(1, 11, nlink=2), member(2, 11, nlink=2)]
    outside = member(3, 12, nlink=2)
    (slot,) = plan([single, *shared, outside])
    assert [item.ino for item in slot.sources()] == [11, 11, 10]


def test_no_source_is_left_when_each_inode_has_names_elsewhere() -> None:
    (slot,) = plan([member(0, 10, nlink=2), member(1, 11, nlink=3)])
    assert slot.sources() == []


def test_without_mtime_the_object_has_that_of_its_oldest_source() -> None:
    (slot,) = plan([member(0, 10, mtime=9), member(1, 11, mtime=3)], rules=_ANY_TIME)
    assert slot.identity.mtime_ns == 3
    assert [item.ino for item in slot.sources()] == [11]


def test_without_mtime_an_older_file_that_can_be_no_source_does_not_count() -> None:
    members = [member(0, 10, mtime=9), member(1, 11, mtime=3, nlink=2), member(2, 12, mtime=7)]
    (slot,) = plan(members, rules=_ANY_TIME)
    assert slot.identity.mtime_ns == 7
    assert [item.ino for item in slot.sources()] == [12]


def test_without_mtime_objects_of_any_time_are_taken_oldest_first() -> None:
    objects = [known(0, 90, mtime=8), known(0, 91, mtime=2), known(1, 92, mtime=2)]
    slots = plan([member(0, 10), member(0, 11), member(0, 12)], objects, rules=_ANY_TIME)
    found = {slot.ino: slot.identity.mtime_ns for slot in slots}
    assert found == {91: 2, 92: 2, 90: 8}


def test_without_mtime_a_new_object_takes_a_number_that_none_of_its_time_has() -> None:
    objects = [known(0, 90, mtime=5), known(1, 91, mtime=5)]
    slots = plan([member(0, 10, mtime=5)], objects, used=[(0, 90), (0, 91)], rules=_ANY_TIME)
    assert [(slot.number, slot.ino, slot.identity.mtime_ns) for slot in slots] == [(2, 0, 5)]


_trees = st.lists(st.integers(0, 4), min_size=1, max_size=30)
_objects = st.lists(st.tuples(st.integers(0, 6), st.booleans()), unique_by=lambda item: item[0])


@given(_trees, _objects, st.sets(st.tuples(st.integers(0, 4), st.integers(0, 6))))
def test_every_file_has_one_place_and_twins_never_the_same(
    trees: list[int], found: list[tuple[int, bool]], taken: set[tuple[int, int]]
) -> None:
    members = [member(tree, 1_000 + number) for number, tree in enumerate(trees)]
    objects = [known(number, 500 + number, is_full=full) for number, full in found]
    full = {number for number, is_full in found if is_full}
    used = {(tree, 500 + number) for tree, number in taken}
    slots = plan(members, objects, used=used)
    placed = list(chain.from_iterable(slot.members for slot in slots))
    assert sorted(item.row for item in placed) == sorted(item.row for item in members)
    assert len({slot.number for slot in slots}) == len(slots)
    for slot in slots:
        trees_here = Counter(item.tree for item in slot.members)
        assert max(trees_here.values()) == 1
        assert slot.number not in full
        assert slot.ino == next((500 + number for number, _ in found if number == slot.number), 0)
        assert not any((tree, slot.ino) in used for tree in trees_here)


@given(_trees)
def test_the_order_of_files_does_not_matter(trees: list[int]) -> None:
    members = [member(tree, 1_000 + number) for number, tree in enumerate(trees)]
    assert shape(plan(members)) == shape(plan(reversed(members)))


@given(st.lists(st.integers(1, 1_200), max_size=40), st.sampled_from([200, NAMES_A_BATCH]))
def test_batches_are_bounded_and_nothing_is_lost(sizes: list[int], names: int) -> None:
    slots = [Slot(member(0, 1).identity, 0, 0, [member(0, 1)] * size) for size in sizes]
    batches = list(batch_slots(slots, names=names))
    assert sum(len(slot.members) for batch in batches for slot in batch) == sum(sizes)
    for batch in batches:
        assert 0 < sum(len(slot.members) for slot in batch) <= names
        assert len(batch) <= OBJECTS_A_BATCH


def test_an_inode_gives_its_bytes_back_with_its_last_name() -> None:
    counted = Reclaimed()
    counted.replace(member(0, 10), 4_096)
    assert counted.bytes == 4_096
    counted.replace(member(0, 11, nlink=2), 8_192)
    assert counted.bytes == 4_096
    counted.replace(member(1, 11, nlink=2), 8_192)
    assert counted.bytes == 4_096 + 8_192
