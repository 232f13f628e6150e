"""What a copy keeps in memory, and where it spills; the thread that lists ahead."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from vstore.copy import listing
from vstore.copy.ahead import Ahead
from vstore.copy.batches import Tally
from vstore.copy.incoming import Follower
from vstore.copy.known import Contents
from vstore.copy.shelf import Shelf
from vstore.copy.table import Table
from vstore.exclude import parse
from vstore.pool import Identity


@settings(deadline=None)
@given(
    steps=st.lists(st.tuples(st.binary(max_size=2), st.none() | st.integers(0, 9)), max_size=60),
    most=st.integers(1, 5),
)
def test_a_table_is_a_dict_wherever_its_rows_are(
    steps: list[tuple[bytes, int | None]], most: int
) -> None:
    table: Table[bytes, int] = Table(in_memory=most)
    plain: dict[bytes, int] = {}
    for key, value in steps:
        if value is None:
            table.drop(key)
            plain.pop(key, None)
        else:
            table.put(key, value)
            plain[key] = value
        assert {found: table.get(found) for found, _ in steps} == {
            found: plain.get(found) for found, _ in steps
        }
    table.close()


def test_a_shelf_tells_of_the_very_object_first_and_of_few_others() -> None:
    shelf = Shelf(None)
    digest = b"d" * 32
    names = [Identity(digest, 20, 0o100644, uid, 0, 0, b"").name(0)[3:] for uid in range(9)]
    for name in names:
        assert not shelf.knows(name)
        shelf.add(name)
        assert shelf.is_ours(name)
    found = list(shelf.list_same(digest, names[7]))
    assert found[0] == names[7]
    assert 1 < len(found) < 9
    for name in found:
        shelf.drop(name)
        assert name not in shelf.list_same(digest, name)
    assert list(shelf.list_same(b"e" * 32, names[0])) == []
    assert shelf.ask(digest)
    assert not shelf.ask(digest)
    assert shelf.was_asked(digest)
    shelf.forget(digest)
    assert shelf.ask(digest)
    identity = Identity(digest, 20, 0o100644, 1, 0, 0, b"")
    names = [identity.name(number)[3:] for number in range(3)]
    assert [shelf.take_name(identity) for _ in range(3)] == names
    shelf.close()


def test_contents_are_given_once_and_the_oldest_stay() -> None:
    """However far a listing is ahead, what is served next was kept; what was served makes room."""
    contents = Contents(most=10)
    for number in range(4):
        contents.keep((number, 4, 0, 0), b"%04d" % number)
    contents.keep((0, 4, 0, 0), b"0000")
    assert contents.take((0, 4, 0, 0)) == b"0000"
    assert contents.take((0, 4, 0, 0)) is None
    assert contents.take((2, 4, 0, 0)) is None
    assert contents.take(None) is None
    contents.keep((5, 4, 0, 0), b"abcd")
    contents.keep((6, 4, 0, 0), b"efgh")
    contents.drop([(1, 4, 0, 0), None, (9, 4, 0, 0)])
    assert contents.take((1, 4, 0, 0)) is None
    contents.keep((7, 4, 0, 0), b"ijkl")
    assert contents.take((5, 4, 0, 0)) == b"abcd"
    assert contents.take((6, 4, 0, 0)) is None
    assert contents.take((7, 4, 0, 0)) == b"ijkl"


def test_ahead_is_so_many_items_ahead_and_no_more() -> None:
    made: list[int] = []
    is_full = threading.Event()

    def make() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            if number == 5:
                is_full.set()
            yield number

    ahead = Ahead(make(), 5)
    items = iter(ahead)
    assert next(items) == 0
    assert is_full.wait(60)
    assert len(made) <= 7
    assert list(items) == list(range(1, 20))
    ahead.close()


def test_an_error_comes_where_its_item_would_have() -> None:
    def make() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError(5, "broken")

    found = []
    with pytest.raises(OSError, match="broken"):
        found += list(Ahead(make(), 9))
    items = iter(Ahead(make(), 1))
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(OSError, match="broken"):
        next(items)


def test_who_closes_it_waits_for_nothing_but_the_item_in_hand() -> None:
    ahead = Ahead(iter(range(1_000_000)), 3)
    ahead.close()
    ahead.close()
    assert len(list(ahead)) <= 4


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (1, 3), (3, 1), (0, 0, 1), ()])
@pytest.mark.parametrize("has_base", [True, False])
def test_what_follows_the_pieces_has_the_digest_or_none(
    tmp_path: Path, order: tuple[int, ...], has_base: bool
) -> None:
    """Pieces in their order over a base; others make it say that the file must be read."""
    base = tmp_path / "base"
    base.write_bytes(os.urandom(9000))
    path = tmp_path / "part"
    path.write_bytes(base.read_bytes() if has_base else b"")
    with path.open("r+b") as file, base.open("rb") as source:
        follower = Follower(file.fileno(), 10_000, os.dup(source.fileno()) if has_base else -1)
        os.truncate(path, 10_000)
        for place in order:
            data = os.urandom(2500)
            os.pwrite(file.fileno(), data, place * 2500)
            follower.take(place * 2500, data)
        found = follower.end()
        follower.close()
    assert found in (b"", blake3(path.read_bytes()).digest())
    if order == (0, 1, 2, 3) or (has_base and order == (1, 3)):
        assert found
    if order in ((3, 1), (0, 0, 1)):
        assert not found


def test_a_base_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    base, path = tmp_path / "base", tmp_path / "part"
    for one in (base, path):
        one.write_bytes(bytes(9000))
    with path.open("r+b") as file, base.open("rb") as source:
        follower = Follower(file.fileno(), 9000, os.dup(source.fileno()))
        base.write_bytes(b"x" * 9001)
        assert follower.end() == b""
        follower.close()


def test_so_many_entries_as_are_left_out_or_fail_are_named_in_bounded_room() -> None:
    tally = Tally()
    for number in range(5000):
        tally.note_left_out(b"%d" % number * 2000, "a device node")
        tally.note_error(b"%d" % number * 2000, "cannot be made")
    assert len(tally.left_out) == len(tally.errors) == 1000
    assert sum(len(path) for path, _ in tally.left_out) <= 4_000_000
    assert tally.error_count == 5000


def test_names_that_are_elsewhere_are_awaited_in_bounded_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of inodes with one more name in a backup; some have another name here."""
    monkeypatch.setattr(listing, "Table", lambda: Table[int, bytes](50))
    (tmp_path / "backup").mkdir()
    (tmp_path / "web/more").mkdir(parents=True)
    for number in range(300):
        path = tmp_path / f"web/{number}"
        path.write_bytes(b"%d" % number)
        (tmp_path / f"backup/{number}").hardlink_to(path)
        if not number % 10:
            (tmp_path / f"web/more/{number}").hardlink_to(path)
    fd = os.open(tmp_path / "web", os.O_RDONLY)
    found = listing.Listing(fd, None, parse(b"", source=""), rewritten={}, is_still=True)
    rows = [row for batch in found.batches() for _, row in batch.rows()]
    names = [row.name for row in rows]
    links = {row.name: names[at - row.link] for at, row in enumerate(rows) if row.link}
    assert links == {b"%d" % number: b"%d" % number for number in range(0, 300, 10)}
    assert len(found._groups._rows) < 50
    found.close()
    os.close(fd)
