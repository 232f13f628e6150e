"""What a listing need not read again: digests that the pool's index knows, and contents that were
read a moment ago and are likely to be asked for.
"""

import sqlite3
import threading
from collections.abc import Sequence
from typing import Final, NamedTuple

from vstore import index
from vstore.pool import Pool

_FRESH_AT_ONCE: Final = 20_000  # rows: each time the disk is waited for
_INODES_AT_ONCE: Final = 500
_ALL_AT_ONCE: Final = 50_000  # rows of the index, of some 400 bytes each
_SEEN: Final = 50_000
_CONTENTS_BYTES: Final = 64 << 20

Key = tuple[int, int, int, int]
"""Inode number, size, mtime and ctime (ns) of a file when it was listed."""


class Digest(NamedTuple):
    """Of a file's content, and of its xattrs (empty: it has none)."""

    content: bytes
    xattrs: bytes


class Digests:
    """The pool's index; without a pool one in memory. It is read at once, or where it is large for
    one folder after the other: a question for each file would take and drop its locks each time.
    """

    def __init__(self, pool: Pool | None, root_fd: int) -> None:
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._pool = pool
        index.load_index(self._database, pool)
        self._volume = index.volume_of(root_fd)
        self._fresh: list[index.DigestRow] = []
        self._seen: dict[Key, bytes] = {}
        self._near = self._load("LIMIT ?", _ALL_AT_ONCE + 1)
        self._is_whole = len(self._near) <= _ALL_AT_ONCE

    def close(self) -> None:
        """Keep the new digests for the next run."""
        self.store()
        self._database.close()

    def load(self, inodes: Sequence[int]) -> None:
        """These are asked for next."""
        if self._is_whole:
            return
        self._near = {}
        for start in range(0, len(inodes), _INODES_AT_ONCE):
            some = inodes[start : start + _INODES_AT_ONCE]
            places = ", ".join("?" * len(some))
            self._near.update(self._load(f"AND ino IN ({places})", *map(index.signed, some)))

    def _load(self, which: str, *values: int) -> dict[int, tuple[int, int, int, bytes, bytes]]:
        try:
            found = self._database.execute(
                "SELECT ino, size, mtime, ctime, digest, xattrs FROM idx.digests"  # noqa: S608
                f" WHERE volume = ? {which}",
                (self._volume, *values),
            )
            return {row[0]: row[1:] for row in found}
        except sqlite3.DatabaseError as error:
            index.renew_index(self._database, self._pool, error)
            return {}

    def find(self, key: Key) -> Digest | None:
        """The digests of the file that has this key, if it is one of those that were loaded."""
        found = self._near.get(index.signed(key[0]))
        return Digest(found[3], found[4]) if found and found[:3] == key[1:] else None

    def find_seen(self, key: Key) -> bytes:
        """The content's digest of a file that was read in this run; b"" where it was not."""
        return self._seen.get(key, b"")

    def see(self, key: Key, digest: bytes) -> None:
        """The file with this key was read; good for this run, whatever the index may know."""
        if len(self._seen) < _SEEN:
            self._seen[key] = digest

    def keep(self, key: Key, digest: bytes, xattrs: bytes) -> None:
        """Note the digests of a file's content and xattrs; the rule of `vstore.index` was met."""
        ino, size, mtime, ctime = key
        if -(1 << 63) <= mtime < 1 << 63:
            row = (self._volume, index.signed(ino), size, mtime, ctime, digest, xattrs)
            self._fresh.append(row)
        if len(self._fresh) >= _FRESH_AT_ONCE:
            self.store()

    def store(self) -> None:
        """Put what is new into the index."""
        if self._fresh:
            index.store_digests(self._database, self._fresh)
            self._fresh = []


class Contents:
    """Contents of small files that were listed and are not served yet: a sender reads them once.

    What finds no room is read again. The oldest stay, since they are served next: a listing that is
    far ahead would otherwise put out each of them before its turn.
    """

    def __init__(self, most: int = _CONTENTS_BYTES) -> None:
        self._most = most
        self._kept: dict[Key, bytes] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def keep(self, key: Key, content: bytes) -> None:
        with self._lock:
            if key not in self._kept and self._bytes + len(content) <= self._most:
                self._bytes += len(content)
                self._kept[key] = content

    def take(self, key: Key | None) -> bytes | None:
        """The content of the file that has this key, once; None where it is not kept any more."""
        with self._lock:
            content = self._kept.pop(key, None) if key is not None else None
            self._bytes -= len(content or b"")
            return content

    def drop(self, keys: Sequence[Key | None]) -> None:
        """Nobody asks for these any more."""
        with self._lock:
            for key in keys:
                if key is not None:
                    self._bytes -= len(self._kept.pop(key, b""))
