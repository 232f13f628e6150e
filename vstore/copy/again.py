"""Which rows of a manifest come again, since a file is not what it was when it was listed.

Both sides keep this from the same messages in the same order, so that they agree: the sender lists
such a row once more, and the receiver passes it by.
"""

from vstore.copy.manifest import Row
from vstore.copy.table import Table


class Again:
    """What went away: rows that are first names of inodes, and contents that others wait for."""

    def __init__(self) -> None:
        self._firsts: Table[int, int] = Table()
        self._digests: Table[bytes, int] = Table()

    def close(self) -> None:
        self._firsts.close()
        self._digests.close()

    def note_gone(self, number: int, row: Row, *, is_first: bool) -> None:
        """The content of this row was asked for, and cannot be sent as it was announced."""
        self._digests.put(row.digest, 1)
        if is_first:
            self._firsts.put(number, 1)

    def note_sent(self, row: Row) -> None:
        """The content of this row was sent."""
        self._digests.drop(row.digest)

    def takes(self, number: int, row: Row, *, is_first: bool) -> bool:
        """Whether this row, which needs what another one brings, comes again. Rows are asked about
        in their order: the names of one that does come again with it.
        """
        if row.link:
            return self._firsts.get(number - row.link) is not None
        if self._digests.get(row.digest) is None:
            return False
        if is_first:
            self._firsts.put(number, 1)
        return True
