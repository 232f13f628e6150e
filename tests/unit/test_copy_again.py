"""Both sides of a copy agree on which rows come again."""

import stat
from contextlib import closing

from vstore.copy.again import Again
from vstore.copy.manifest import Row

_FILE = stat.S_IFREG | 0o644


def _row(digest: bytes = b"", link: int = 0) -> Row:
    return Row(b"f", _FILE, size=9, digest=digest, link=link)


def test_names_of_a_file_that_went_away_come_again() -> None:
    again = Again()
    again.note_gone(5, _row(b"a"), is_first=True)
    again.note_gone(6, _row(b"b"), is_first=False)
    assert again.takes(9, _row(link=4), is_first=False)
    assert not again.takes(9, _row(link=3), is_first=False)
    assert not again.takes(9, _row(link=5), is_first=False)


def test_who_waits_for_a_content_comes_again_until_it_is_sent() -> None:
    again = Again()
    again.note_gone(5, _row(b"a"), is_first=False)
    assert again.takes(6, _row(b"a"), is_first=False)
    assert not again.takes(6, _row(b"b"), is_first=False)
    again.note_sent(_row(b"a"))
    assert not again.takes(7, _row(b"a"), is_first=False)


def test_who_comes_again_does_so_with_all_its_names() -> None:
    again = Again()
    again.note_gone(5, _row(b"a"), is_first=False)
    assert again.takes(6, _row(b"a"), is_first=True)
    again.note_sent(_row(b"a"))
    assert again.takes(8, _row(link=2), is_first=False)


def test_very_many_may_change() -> None:
    """As by chmod -R: there is room for them, on disk."""
    again = Again()
    with closing(again):
        for number in range(100_000):
            again.note_gone(number, _row(b"%d" % number), is_first=True)
        for number in (0, 70_000, 99_999):
            assert again.takes(1 << 20, _row(b"%d" % number), is_first=False)
            assert again.takes(number + 1, _row(link=1), is_first=False)
