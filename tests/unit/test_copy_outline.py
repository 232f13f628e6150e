"""The smallest tree that all changes are in: found from digests of folders, for any two trees."""

from collections.abc import Iterator, Mapping
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vstore.copy.manifest import Row, is_below, pack_rows
from vstore.copy.messages import Folders, Hostile
from vstore.copy.outline import Outline, common
from vstore.copy.packing import Packer
from vstore.copy.scratch import Scratch
from vstore.errors import NoSpace

Tree = Mapping[bytes, bytes]
"""Folders by their paths, each with what stands for all that is in it."""

_paths = st.lists(st.sampled_from([b"a", b"b", b"a0"]), max_size=4).map(b"/".join)
_trees = st.dictionaries(_paths, st.sampled_from([b"1", b"2"]), max_size=12).map(
    lambda tree: {b"": b"0"} | {above: b"0" for path in tree for above in _lineage(path)} | tree
)


def _lineage(path: bytes) -> Iterator[bytes]:
    """The folder and all above it."""
    names = path.split(b"/")
    for count in range(len(names) + 1):
        yield b"/".join(names[:count])


def _outline(tree: Tree, ties: list[tuple[bytes, bytes]] | None = None) -> Outline:
    outline = Outline()
    for one, other in ties or ():
        outline.tie(one, b"first", other)
    for path in sorted(tree):
        for name in (b"", tree[path]):
            rows = [Row(name, 0o100644, size=3)]
            outline.add(path, rows, pack_rows(rows))
    return outline


def _compare(ours: Tree, theirs: Tree, ties: list[tuple[bytes, bytes]] | None = None) -> bytes:
    with closing(_outline(ours, ties)) as one, closing(_outline(theirs, ties)) as other:
        return one.compare(other.messages())


def _outside(tree: Tree, folder: bytes) -> Tree:
    return {path: what for path, what in tree.items() if not is_below(path, folder)}


@settings(deadline=None)
@given(ours=_trees, theirs=_trees)
def test_all_that_differs_is_in_the_tree_and_in_none_that_is_smaller(
    ours: Tree, theirs: Tree
) -> None:
    found = _compare(ours, theirs)
    assert _outside(ours, found) == _outside(theirs, found)
    assert found in ours
    assert found in theirs
    if ours != theirs:
        for smaller in set(ours) & set(theirs):
            if smaller != found and is_below(smaller, found):
                assert _outside(ours, smaller) != _outside(theirs, smaller)


@settings(deadline=None)
@given(ours=_trees, theirs=_trees, data=st.data())
def test_names_of_one_inode_are_all_in_the_tree_or_none(
    ours: Tree, theirs: Tree, data: st.DataObject
) -> None:
    folders = st.sampled_from(sorted(theirs))
    ties = data.draw(st.lists(st.tuples(folders, folders), max_size=4))
    found = _compare(ours, theirs, ties)
    assert is_below(_compare(ours, theirs), found)
    for one, other in ties:
        assert is_below(one, found) == is_below(other, found)


def test_another_first_name_is_a_difference_where_all_rows_are_equal() -> None:
    found = []
    for folder, name in ((b"a", b"x"), (b"a", b"y"), (b"a/x", b"")):
        with closing(Outline()) as outline:
            outline.tie(folder, name, b"b")
            for path in (b"", b"a", b"b"):
                outline.add(path, [Row(b"", 0o40755)], pack_rows([Row(b"", 0o40755)]))
            found.append({path: digest for path, digest, _ in next(outline.messages()).folders})
    assert len({sums[b"b"] for sums in found}) == 3
    assert len({(sums[b""], sums[b"a"]) for sums in found}) == 1


@settings(deadline=None)
@given(tree=_trees, folder=_paths)
def test_what_is_outside_is_measured(tree: Tree, folder: bytes) -> None:
    count = len(_outside(tree, folder))
    with closing(_outline(tree)) as outline:
        assert outline.measure_outside(folder) == (2 * count, 2 * count, 6 * count)


def test_a_folder_is_the_same_in_whichever_batches_its_rows_come() -> None:
    rows = [Row(b"%d" % number, 0o100644, size=1) for number in range(40)]
    with closing(Outline()) as one, closing(Outline()) as other:
        for path in (b"", b"a"):
            one.add(path, rows, pack_rows(rows))
            for some in (rows[:1], rows[1:15], rows[15:31], rows[31:]):
                other.add(path, some, pack_rows(some))
        assert list(one.messages()) == list(other.messages())


@pytest.mark.parametrize("spare", range(-2, 3))
def test_a_tree_comes_in_the_same_batches_wherever_it_is(spare: int) -> None:
    """Else what was made could not be held against what was sent."""
    digests = set()
    for below in (b"", b"top", b"top/folder"):
        packer = Packer(below)
        left = (2 << 20) - spare
        for number in range(400):
            row = Row(b"link", 0o120777, text=b"x" * (5000 if number < 399 else left - 150 - 3))
            left -= 150 + 3 + len(row.text)
            path = b"/".join(filter(None, (below, b"%03d" % number)))
            for _ in packer.add(path, row, None, is_shared=False):
                pass
        for _ in packer.add(below, Row(b"last", 0o120777, text=b"x"), None, is_shared=False):
            pass
        for _ in packer.end():
            pass
        digests.add((packer.digest.digest(), packer.batches))
    assert len(digests) == 1


def test_many_folders_travel_in_several_messages() -> None:
    with closing(_outline({b"%d" % number: b"x" for number in range(9000)})) as outline:
        messages = list(outline.messages())
    assert [message.last for message in messages] == [False, False, True]
    assert sum(len(message.folders) for message in messages) == 9000
    with closing(_outline({b"%d" % n + b"/x" * (1 << 18): b"x" for n in range(9)})) as outline:
        long = list(outline.messages())
    assert all(sum(len(path) for path, _, _ in some.folders) < 2 << 20 for some in long)


@pytest.mark.parametrize(
    "paths", [[b"", b"a", b"a"], [b"", b"../a"], [b"/"], [b"a//b"], [b"", b"."]]
)
def test_folders_that_cannot_be_are_refused(paths: list[bytes]) -> None:
    folders = Folders([(path, bytes(16), 0) for path in paths], True)
    with closing(_outline({b"": b"x"})) as outline, pytest.raises(Hostile):
        outline.compare([folders])


def test_a_full_folder_for_temporary_files_is_said() -> None:
    outline = Outline(Scratch(most_pages=20))
    for number in range(400):  # fewer than are stored at once
        outline.add(b"%d" % number + b"x" * 500, [Row(b"", 0o040755)], pack_rows([]))
    with pytest.raises(NoSpace, match="in a temporary file"):
        outline.measure_outside(b"")
    outline.close()


def test_a_tree_without_a_root_differs_in_all() -> None:
    with closing(_outline({b"": b"x", b"a": b"x"})) as outline:
        assert outline.compare([Folders([], True)]) == b""


@pytest.mark.parametrize(
    ("one", "other", "wanted"),
    [
        (b"a/b", b"a/c", b"a"),
        (b"a/b", b"a/b/c", b"a/b"),
        (b"a", b"ab", b""),
        (b"", b"a", b""),
        (b"a/b", b"a/b", b"a/b"),
    ],
)
def test_the_deepest_folder_of_two(one: bytes, other: bytes, wanted: bytes) -> None:
    assert common(one, other) == common(other, one) == wanted
