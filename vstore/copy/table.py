"""A dict for one run, in bounded memory: what there is no room for goes to a temporary database,
which spills to disk.
"""

from typing import Final, Generic, TypeVar

from vstore.copy.scratch import Scratch

_IN_MEMORY: Final = 40_000
"""Rows, of some 300 bytes each."""

Key = TypeVar("Key", int, str, bytes)
Value = TypeVar("Value", int, str, bytes)


class Table(Generic[Key, Value]):
    """Keys with a value each. Nearly every guest fits into memory, where a question costs nothing
    beside one to a database.
    """

    def __init__(self, in_memory: int = _IN_MEMORY) -> None:
        self._in_memory = in_memory
        self._rows: dict[Key, Value] = {}
        self._database: Scratch | None = None

    def close(self) -> None:
        if self._database is not None:
            self._database.close()

    def get(self, key: Key) -> Value | None:
        found = self._rows.get(key)
        if found is not None or self._database is None:
            return found
        row = self._database.execute("SELECT value FROM rows WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def put(self, key: Key, value: Value) -> None:
        """Give the key this value, whatever it had."""
        self._rows[key] = value
        if len(self._rows) >= self._in_memory:
            self._spill()

    def drop(self, key: Key) -> None:
        """Forget the key, if it is there."""
        self._rows.pop(key, None)
        if self._database is not None:
            self._database.execute("DELETE FROM rows WHERE key = ?", (key,))

    def _spill(self) -> None:
        if self._database is None:
            self._database = Scratch()
            self._database.execute("CREATE TABLE rows (key PRIMARY KEY, value) WITHOUT ROWID")
        self._database.execute("BEGIN")
        rows = sorted(self._rows.items())
        self._database.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?)", rows)
        self._database.execute("COMMIT")
        self._rows = {}
