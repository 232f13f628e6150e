"""Which rows of a manifest come again, since a file is not what it was when it was listed.

Both sides keep this from the same messages in the same order, so that they agree: the sender lists
such a row once more, and the receiver passes it by.
"""

from typing import Final

from vstore.copy.manifest import Row
from vstore.copy.messages import Hostile

_MOST: Final = 100_000


class Again:
    """What went away: rows that are first names of inodes, and contents that others wait for."""

    def __init__(self) -> None:
        self._firsts: set[int] = set()
        self._digests: set[bytes] = set()

    def note_gone(self, number: int, row: Row, *, is_first: bool) -> None:
        """The content of this row was asked for, and cannot be sent as it was announced.

        Raises Hostile where that are more than can be.
        """
        self._digests.add(row.digest)
        if is_first:
            self._firsts.add(number)
        if len(self._firsts) + len(self._digests) > _MOST:
            raise Hostile("more files that change than can be")

    def note_sent(self, row: Row) -> None:
        """The content of this row was sent."""
        self._digests.discard(row.digest)

    def takes(self, number: int, row: Row, *, is_first: bool) -> bool:
        """Whether this row, which needs what another one brings, comes again. Rows are asked about
        in their order: the names of one that does come again with it.
        """
        if row.link:
            return number - row.link in self._firsts
        if row.digest not in self._digests:
            return False
        if is_first:
            self._firsts.add(number)
        return True
