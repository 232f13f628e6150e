"""What a tree has in each of its folders, in a digest: to find the smallest tree of folders that
all changes are in.

A refresh makes that one anew and leaves all others as they are. Names of one inode belong together:
a tree that one of them is in and another is not cannot be exchanged alone.
"""

import sqlite3
import stat
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

import msgspec
from blake3 import blake3

from vstore.copy.manifest import Row, check_path
from vstore.copy.messages import Folders, FolderSum, Hostile
from vstore.copy.scratch import Scratch
from vstore.folders import join

_BODY_LIMIT: Final = 1 << 20  # bytes of a message
_FOLDERS_LIMIT: Final = 4000  # of one
_AT_ONCE: Final = 500
_DIGEST_BYTES: Final = 16

_SCHEMA: Final = (
    "ours (path BLOB PRIMARY KEY, digest BLOB, rows INTEGER, files INTEGER, size INTEGER)"
    " WITHOUT ROWID",
    "spans (path BLOB, reach INTEGER)",
    "theirs (path BLOB PRIMARY KEY, digest BLOB, reach INTEGER) WITHOUT ROWID",
)
_SUMS: Final = """
SELECT ours.path, digest, min(coalesce(min(reach), 1 << 30), depth(ours.path))
FROM ours LEFT JOIN spans USING (path) GROUP BY ours.path
"""
_DIFFERING: Final = """
SELECT path, theirs.path IS NOT NULL FROM ours LEFT JOIN theirs USING (path)
WHERE theirs.digest IS NOT ours.digest
UNION ALL
SELECT path, 0 FROM theirs LEFT JOIN ours USING (path) WHERE ours.path IS NULL
"""


class Extent(NamedTuple):
    """How much something is: rows of a manifest, files, their bytes."""

    rows: int = 0
    files: int = 0
    size: int = 0


NOTHING: Final = Extent()


class Outline:
    """The folders of a tree, on disk where they are many. Raises NoSpace throughout."""

    def __init__(self, database: Scratch | None = None) -> None:
        self._database = database or Scratch()
        self._database.create_function("depth", 1, _depth, deterministic=True)
        for table in _SCHEMA:
            self._database.execute(f"CREATE TABLE {table}")
        self._path: bytes | None = None
        self._hasher = blake3()
        self._extent = NOTHING
        self._ours: list[tuple[bytes, bytes, int, int, int]] = []
        self._spans: dict[bytes, int] = {}
        self._firsts: dict[bytes, blake3] = {}  # of folders whose rows have not all come

    def close(self) -> None:
        self._database.close()

    # --- our tree

    def add(self, path: bytes, rows: Sequence[Row], packed: msgspec.Raw) -> None:
        """More rows of the folder `path`; those of one folder come one after the other."""
        if path != self._path:
            self._end_folder()
            self._path = path
        header = 1 if len(rows) < 16 else 3  # of a msgpack array: how many are in it
        self._hasher.update(memoryview(packed)[header:])
        was = self._extent
        self._extent = Extent(
            was.rows + len(rows),
            was.files + sum([stat.S_ISREG(row.mode) for row in rows]),
            was.size + sum([row.size for row in rows]),
        )

    def tie(self, one: bytes, name: bytes, other: bytes) -> None:
        """An inode whose first name is `name` in the folder `one` has another in `other`, the rows
        of which have not all come.

        Its row there says how many rows back the first one is: which name that is depends on the
        folders between.
        """
        self._firsts.setdefault(other, blake3()).update(join(one, name) + b"\0")
        reach = _depth(common(one, other))
        for path in (one, other):
            self._spans[path] = min(reach, self._spans.get(path, reach))
        if len(self._spans) >= _AT_ONCE:
            self._store()

    def _end_folder(self) -> None:
        if self._path is None:
            return
        if self._path in self._firsts:
            self._hasher.update(self._firsts.pop(self._path).digest())
        digest = self._hasher.digest(_DIGEST_BYTES)
        self._ours.append((self._path, digest, *self._extent))
        self._path, self._hasher, self._extent = None, blake3(), NOTHING
        if len(self._ours) >= _AT_ONCE:
            self._store()

    def _store(self) -> None:
        self._database.execute("BEGIN")
        self._database.executemany("INSERT INTO ours VALUES (?, ?, ?, ?, ?)", self._ours)
        self._database.executemany("INSERT INTO spans VALUES (?, ?)", self._spans.items())
        self._database.execute("COMMIT")
        self._ours, self._spans = [], {}

    def messages(self) -> Iterator[Folders]:
        """What the other side needs to compare; the last one says that it is."""
        self._end_folder()
        self._store()
        some: list[FolderSum] = []
        weight = 0
        for path, digest, reach in self._database.execute(_SUMS):
            some.append((path, digest, reach))
            weight += len(path) + 32
            if weight >= _BODY_LIMIT or len(some) >= _FOLDERS_LIMIT:
                yield Folders(some)
                some, weight = [], 0
        yield Folders(some, last=True)

    def measure_outside(self, folder: bytes) -> Extent:
        """How much is not in the tree at `folder`."""
        self._end_folder()
        self._store()
        where, values = _inside(folder)
        found = self._database.execute(
            "SELECT coalesce(sum(rows), 0), coalesce(sum(files), 0), coalesce(sum(size), 0)"  # noqa: S608
            f" FROM ours WHERE NOT ({where})",
            values,
        )
        return Extent(*found.fetchone())

    # --- the other side's

    def compare(self, folders: Iterable[Folders]) -> bytes:
        """The path of the smallest tree that has all that differs, in both; b"" for all.

        Raises Hostile.
        """
        self._end_folder()
        self._store()
        for message in folders:
            for path, _, _ in message.folders:
                check_path(path)
            try:
                self._database.execute("BEGIN")
                self._database.executemany("INSERT INTO theirs VALUES (?, ?, ?)", message.folders)
                self._database.execute("COMMIT")
            except sqlite3.IntegrityError as error:
                raise Hostile("a folder twice") from error
        found: bytes | None = None
        for path, is_in_both in self._database.execute(_DIFFERING):
            # to make one or take it away is a change of the folder that it is in
            wanted = path if is_in_both else path.rpartition(b"/")[0]
            found = wanted if found is None else common(found, wanted)
        return self.with_all_names(found or b"")

    def with_all_names(self, folder: bytes) -> bytes:
        """The smallest tree around that one of which no inode of theirs has names elsewhere."""
        while folder:
            where, values = _inside(folder)
            (reach,) = self._database.execute(
                f"SELECT min(reach) FROM theirs WHERE {where}",  # noqa: S608
                values,
            ).fetchone()
            if reach is None or reach >= _depth(folder):
                break
            folder = b"/".join(folder.split(b"/")[:reach])
        return folder


def common(one: bytes, other: bytes) -> bytes:
    """The deepest folder that both of these are, or are in."""
    names = []
    for a, b in zip(one.split(b"/"), other.split(b"/"), strict=False):
        if a != b:
            break
        names.append(a)
    return b"/".join(names)


def _depth(path: bytes) -> int:
    return path.count(b"/") + 1 if path else 0


def _inside(folder: bytes) -> tuple[str, tuple[bytes, ...]]:
    """The condition of SQL for a path that is that of `folder` or below it, and its values."""
    if not folder:
        return "1", ()
    return "path = ? OR (path > ? AND path < ?)", (folder, folder + b"/", folder + b"0")
