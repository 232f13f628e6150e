"""A database for one run: in memory, and beyond that in the folder for temporary files."""

import sqlite3
from collections.abc import Iterable
from typing import Any, Final

from vstore.errors import NoSpace

_CACHE_KIB: Final = 8_000


class Scratch(sqlite3.Connection):
    """Of no one else, gone when it is closed. Each statement raises NoSpace where there is no room
    left, in that folder or beyond `most_pages` of 4 KiB.
    """

    def __init__(self, most_pages: int = 1 << 30) -> None:
        super().__init__("", isolation_level=None, check_same_thread=False)
        self.execute("PRAGMA journal_mode = OFF")
        self.execute("PRAGMA synchronous = OFF")
        self.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        self.execute(f"PRAGMA max_page_count = {most_pages}")

    def execute(self, statement: str, values: Any = (), /) -> sqlite3.Cursor:
        try:
            return super().execute(statement, values)
        except sqlite3.OperationalError as error:
            raise _no_room(error) from error

    def executemany(self, statement: str, rows: Iterable[Any], /) -> sqlite3.Cursor:
        try:
            return super().executemany(statement, rows)
        except sqlite3.OperationalError as error:
            raise _no_room(error) from error


def _no_room(error: sqlite3.OperationalError) -> NoSpace:
    return NoSpace(
        f"a list that does not fit into memory cannot be kept in a temporary file: {error}",
        hint="free some space in the folder for temporary files, or name another in TMPDIR",
    )
