"""What a pool has, to be asked for by inode number or by digest: for one run, in bounded memory.

The names of all objects are read once, into a temporary database that spills to disk. Others may
add and reclaim objects meanwhile: whoever uses an answer looks whether it is still so.
"""

import os
import sqlite3
from contextlib import suppress
from typing import Final

from vstore.index import signed
from vstore.pool import Identity, Pool, parse_object

_SCHEMA: Final = """
    CREATE TABLE objects (ino INTEGER NOT NULL, digest BLOB NOT NULL, name TEXT NOT NULL);
    CREATE TABLE asked (digest BLOB PRIMARY KEY) WITHOUT ROWID;
    CREATE TABLE uses (identity BLOB PRIMARY KEY, times INTEGER NOT NULL) WITHOUT ROWID;
"""
_CACHE_KIB: Final = 24_000
_ROWS_AT_ONCE: Final = 5000


class Shelf:
    """The objects of a pool as they were when it was read, and those that were added by `add`."""

    def __init__(self, pool: Pool | None, *, by_digest: bool) -> None:
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("PRAGMA synchronous = OFF")
        self._database.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        for statement in _SCHEMA.split(";\n"):
            if statement.strip():
                self._database.execute(statement)
        if pool is not None:
            self._load(pool)
        self._is_empty = not self._database.execute("SELECT 1 FROM objects").fetchone()
        column = "digest" if by_digest else "ino"
        self._database.execute(f"CREATE INDEX found ON objects ({column})")

    def close(self) -> None:
        self._database.close()

    def _load(self, pool: Pool) -> None:
        rows = []
        self._database.execute("BEGIN")
        for path, ino in pool.list_objects():
            with suppress(ValueError):
                rows.append((signed(ino), bytes.fromhex(path[3:67]), path[3:]))
            if len(rows) >= _ROWS_AT_ONCE:
                self._insert(rows)
                rows = []
        self._insert(rows)
        self._database.execute("COMMIT")

    def _insert(self, rows: list[tuple[int, bytes, str]]) -> None:
        self._database.executemany("INSERT INTO objects VALUES (?, ?, ?)", rows)

    # --- of the side that sends

    def find_inode(self, ino: int) -> Identity | None:
        """What the object with this inode number is; None where none has it."""
        if self._is_empty:
            return None
        found = self._database.execute(
            "SELECT name FROM objects WHERE ino = ?", (signed(ino),)
        ).fetchone()
        if found is None:
            return None
        with suppress(ValueError):
            return parse_object(found[0])[0]
        return None

    # --- of the side that receives

    def add(self, name: str) -> None:
        """An object of this name (without its folder) is there now."""
        self._insert([(0, bytes.fromhex(name[:64]), name)])

    def drop(self, name: str) -> None:
        """The object of this name is gone."""
        self._database.execute(
            "DELETE FROM objects WHERE digest = ? AND name = ?", (bytes.fromhex(name[:64]), name)
        )

    def list_same(self, digest: bytes) -> list[tuple[str, bool]]:
        """The names (without folders) of all objects of this content, and whether `add` told."""
        found = self._database.execute(
            "SELECT name, ino = 0 FROM objects WHERE digest = ?", (digest,)
        )
        return [(name, bool(is_ours)) for name, is_ours in found]

    def take_turn(self, identity: Identity) -> int:
        """How many files of this run had this identity before: the number of this one's object."""
        key = os.fsencode(identity.name(0))
        times: int = self._database.execute(
            "INSERT INTO uses VALUES (?, 1) ON CONFLICT DO UPDATE SET times = times + 1"
            " RETURNING times",
            (key,),
        ).fetchone()[0]
        return times - 1

    def ask(self, digest: bytes) -> bool:
        """Whether this content is asked for now for the first time; it is noted as asked for."""
        done = self._database.execute("INSERT OR IGNORE INTO asked VALUES (?)", (digest,))
        return done.rowcount > 0

    def forget(self, digest: bytes) -> None:
        """This content will not come after all."""
        self._database.execute("DELETE FROM asked WHERE digest = ?", (digest,))
