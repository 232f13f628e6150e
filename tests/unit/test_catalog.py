"""The catalog answers a plan's questions: linked where, equal to whom, read or not."""

from collections.abc import Iterator
from contextlib import closing
from itertools import count

import pytest

from vstore.catalog import Catalog
from vstore.scan import FileRow

_VOLUME = 1


def row(name: str, ino: int, *, size: int = 100, mtime: int = 5, nlink: int = 1) -> FileRow:
    return (name.encode(), ino, size, 0o100644, 0, 0, mtime, 7, nlink, 8)


@pytest.fixture
def catalog() -> Iterator[Catalog]:
    with closing(Catalog(None, ignore_mtime=False)) as made:
        yield made


def add(catalog: Catalog, tree: int, *rows: FileRow, path: str = "") -> None:
    catalog.add_folder(tree, _VOLUME, (path.encode(), 1, 2, list(rows)))


def choose(catalog: Catalog, *, twins: bool = False, everything: bool = False) -> list[list[bytes]]:
    """The names of each group that is found, in order."""
    catalog.choose(twins=twins, everything=everything)
    return [[member[5] for member in group] for group, _ in catalog.list_groups(1_000)]


def read_all(catalog: Catalog, contents: dict[int, bytes]) -> list[int]:
    """Choose everything and note these contents by inode number; returns what was unread."""
    catalog.choose_contents(0)
    files = list(catalog.list_unread())
    catalog.add_contents([(file, contents[file.ino].ljust(32), b"", False) for file in files])
    return [file.ino for file in files]


def test_names_of_one_inode_in_one_tree_are_linked(catalog: Catalog) -> None:
    add(catalog, 0, row("a", 10, nlink=2), row("b", 10, nlink=2), row("c", 11))
    add(catalog, 1, row("a", 20))
    assert catalog.drop_linked() == {"linked": 2}
    assert choose(catalog) == [[b"c", b"a"]]


def test_names_that_nobody_has_seen_are_elsewhere(catalog: Catalog) -> None:
    add(catalog, 0, row("a", 10, nlink=2))
    add(catalog, 1, row("a", 11, nlink=3), row("b", 12))
    assert catalog.drop_linked() == {"linked-elsewhere": 2}


def test_an_inode_of_several_trees_with_all_names_seen_is_kept(catalog: Catalog) -> None:
    add(catalog, 0, row("a", 10, nlink=2))
    add(catalog, 1, row("b", 10, nlink=2))
    assert catalog.drop_linked() == {}
    assert choose(catalog) == [[b"a", b"b"]]


def test_names_in_a_pool_of_the_original_are_known(catalog: Catalog) -> None:
    add(catalog, 0, row("a", 10, nlink=3))
    add(catalog, 1, row("b", 10, nlink=3))
    catalog.add_foreign_names([(10, 1)])
    assert catalog.drop_linked() == {}
    catalog.choose(twins=False, everything=False)
    ((group, _),) = catalog.list_groups(1_000)
    assert [member[13] for member in group] == [2, 2]  # names in guests


def test_linked_in_one_tree_is_linked_in_all(catalog: Catalog) -> None:
    add(catalog, 0, row("a", 10, nlink=3), row("b", 10, nlink=3))
    add(catalog, 1, row("c", 10, nlink=3))
    assert catalog.drop_linked() == {"linked": 3}


def test_a_file_that_none_can_equal_is_in_no_group(catalog: Catalog) -> None:
    add(catalog, 0, row("a", 10), row("size", 11, size=7), row("time", 12, mtime=6))
    add(catalog, 1, row("a", 20), row("size", 21, size=8), row("time", 22, mtime=7))
    assert choose(catalog) == [[b"a", b"a"]]
    assert catalog.count_unchosen() == 4
    assert catalog.count_chosen() == 2


def test_without_mtime_files_of_any_time_can_be_equal() -> None:
    with closing(Catalog(None, ignore_mtime=True)) as catalog:
        add(catalog, 0, row("a", 10, mtime=1))
        add(catalog, 1, row("a", 20, mtime=2))
        assert choose(catalog) == [[b"a", b"a"]]


def test_twins_alone_are_no_group_unless_they_count(catalog: Catalog) -> None:
    add(catalog, 0, row("a", 10), row("b", 11))
    assert choose(catalog) == []
    assert choose(catalog, twins=True) == [[b"a", b"b"]]


def test_everything_is_chosen_where_each_file_gets_an_object(catalog: Catalog) -> None:
    add(catalog, 0, row("a", 10), row("b", 11, size=7))
    assert choose(catalog, everything=True) == [[b"a"], [b"b"]]


def test_only_small_groups_are_listed_and_only_large_ones_are_chosen_to_be_read(
    catalog: Catalog,
) -> None:
    add(catalog, 0, row("a", 10), row("b", 11, size=7))
    add(catalog, 1, row("a", 20), row("b", 21, size=7))
    add(catalog, 2, row("b", 31, size=7))
    catalog.choose(twins=False, everything=False)
    assert [[member[5] for member in group] for group, _ in catalog.list_groups(2)] == [
        [b"a", b"a"]
    ]
    catalog.choose_contents(2)
    assert [file.name for file in catalog.list_unread()] == [b"b", b"b", b"b"]
    assert catalog.count_unread() == 21


def test_an_inode_is_read_once_whatever_its_names(catalog: Catalog) -> None:
    add(catalog, 0, row("a", 10, nlink=2))
    add(catalog, 1, row("b", 10, nlink=2))
    add(catalog, 2, row("c", 11))
    catalog.choose(twins=False, everything=False)
    assert read_all(catalog, {10: b"x", 11: b"x"}) == [10, 11]
    assert [member.name for member in catalog.list_members()] == [b"a", b"b", b"c"]


def test_members_come_by_content_and_turn(catalog: Catalog) -> None:
    add(catalog, 0, row("a", 10), row("other", 11), row("b", 12))
    add(catalog, 1, row("c", 20), row("d", 21))
    catalog.choose(twins=False, everything=False)
    read_all(catalog, {10: b"x", 11: b"y", 12: b"x", 20: b"x", 21: b"y"})
    found = [(member.name, member.turn, member.tree) for member in catalog.list_members()]
    assert found == [
        (b"a", 0, 0),
        (b"c", 0, 1),
        (b"b", 1, 0),
        (b"other", 0, 0),
        (b"d", 0, 1),
    ]


def test_inodes_that_are_shared_already_come_first_among_twins(catalog: Catalog) -> None:
    add(catalog, 0, row("single", 5), row("shared", 10, nlink=2))
    add(catalog, 1, row("shared too", 10, nlink=2))
    catalog.choose(twins=False, everything=False)
    read_all(catalog, {5: b"x", 10: b"x"})
    turns = {member.name: member.turn for member in catalog.list_members()}
    assert turns == {b"shared": 0, b"shared too": 0, b"single": 1}


def test_a_file_that_could_not_be_read_takes_no_part(catalog: Catalog) -> None:
    add(catalog, 0, row("a", 10, nlink=2))
    add(catalog, 1, row("b", 10, nlink=2), row("c", 11))
    catalog.choose(twins=False, everything=False)
    catalog.choose_contents(0)
    first = next(catalog.list_unread())
    assert catalog.drop_inode(first) == 2
    assert [file.ino for file in catalog.list_unread()] == [11]


def test_a_file_that_moved_during_the_walk_is_counted_for_each_name_once(catalog: Catalog) -> None:
    add(catalog, 0, row("before", 10, size=7), row("after", 10))
    add(catalog, 1, row("equal", 20))
    catalog.choose(twins=False, everything=False)
    assert catalog.count_unchosen() == 1
    catalog.choose_contents(0)
    moved = next(file for file in catalog.list_unread() if file.ino == 10)
    assert catalog.drop_inode(moved) == 1


def test_references_keep_what_is_equal_at_the_same_path(catalog: Catalog) -> None:
    add(catalog, 0, row("same", 10), row("content", 11), row("moved", 12), path="etc")
    add(catalog, 1, row("same", 20), row("content", 21), path="etc")
    add(catalog, 1, row("moved", 22), path="usr")
    catalog.index_paths()
    catalog.choose(twins=False, everything=False)
    read_all(catalog, {10: b"x", 11: b"y", 12: b"z", 20: b"x", 21: b"Y", 22: b"z"})
    assert catalog.drop_outside_references(0, [1]) == 2
    assert [member.name for member in catalog.list_members() if member.tree == 0] == [b"same"]


def test_what_is_kept_for_another_round_is_all_there_is(catalog: Catalog) -> None:
    add(catalog, 0, row("a", 10), row("b", 11, size=7))
    add(catalog, 1, row("a", 20), row("b", 21, size=7))
    catalog.choose(twins=False, everything=False)
    groups = [group for group, _ in catalog.list_groups(1_000)]
    catalog.keep_only([member[3] for member in groups[1]])
    assert choose(catalog) == [[b"b", b"b"]]


def test_a_folder_is_known_by_its_path_and_times(catalog: Catalog) -> None:
    numbers = count(1)
    for path in ("", "etc", "new\nline"):
        add(catalog, 0, row("a", next(numbers)), path=path)
    assert catalog.load_folder(2) == (b"etc", 1, 2)
    assert catalog.load_folder(3) == (b"new\nline", 1, 2)
