"""What a run has seen, in a private database that is on disk once it is large.

Memory does not grow with files. The catalog answers the questions of a plan: which inodes have
names that we do not know; which files can have an equal at all, so that they are worth reading;
which have the same identity.
"""

import sqlite3
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from typing import Any, Final, NamedTuple

from vstore.index import DigestRow, load_index, renew_index, store_digests
from vstore.member import Member
from vstore.plan import KnownObject
from vstore.pool import InodeNumbers, Pool, parse_object
from vstore.scan import FolderRows

LINKED: Final = "linked"
LINKED_ELSEWHERE: Final = "linked-elsewhere"

_SCHEMA: Final = """
    PRAGMA journal_mode = OFF;
    PRAGMA synchronous = OFF;
    PRAGMA cache_size = -24000;
    PRAGMA temp_store = FILE;
    CREATE TABLE folders (
        id INTEGER PRIMARY KEY, tree INTEGER, path BLOB, read_atime INTEGER, read_mtime INTEGER
    );
    CREATE TABLE files (
        id INTEGER PRIMARY KEY, folder INTEGER, tree INTEGER, volume INTEGER, name BLOB,
        ino INTEGER, size INTEGER, mode INTEGER, uid INTEGER, gid INTEGER,
        mtime INTEGER, ctime INTEGER, nlink INTEGER, blocks INTEGER
    );
    CREATE TABLE shared_names (tree INTEGER, path BLOB, name BLOB, ino INTEGER);
    CREATE TABLE foreign_names (ino INTEGER PRIMARY KEY, names INTEGER) WITHOUT ROWID;
    CREATE TABLE objects (
        digest BLOB, size INTEGER, mode INTEGER, uid INTEGER, gid INTEGER, mtime INTEGER,
        xattrs BLOB, number INTEGER, ino INTEGER, is_full INTEGER
    );
    CREATE TABLE contents (
        volume INTEGER, ino INTEGER, digest BLOB, xattrs BLOB, fresh INTEGER,
        PRIMARY KEY (volume, ino)
    ) WITHOUT ROWID;
    CREATE TABLE known (
        volume INTEGER, ino INTEGER, digest BLOB, xattrs BLOB, PRIMARY KEY (volume, ino)
    ) WITHOUT ROWID;
"""
_FOLDERS_KEPT: Final = 4096  # in memory: neighbours are asked for one after the other
_HASH_MASK: Final = (1 << 64) - 1


class ToRead(NamedTuple):
    """A file whose content nobody knows yet; `path` is its folder below the tree's root."""

    row: int
    tree: int
    path: bytes
    name: bytes
    ino: int
    size: int
    mtime: int
    ctime: int
    volume: int


class Catalog:
    """The files of one run; `ignore_mtime` widens what counts as equal."""

    def __init__(self, pool: Pool | None, *, ignore_mtime: bool) -> None:
        # A private database, kept in memory while it is small, on disk without a name later.
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.executescript(_SCHEMA)
        self._pool = pool
        load_index(self._database, pool)
        self._ignore_mtime = ignore_mtime
        columns = ("size", "mode", "uid", "gid", *(() if ignore_mtime else ("mtime",)))
        self._key = ", ".join(columns)
        self._same_key = " AND ".join(f"one.{column} = other.{column}" for column in columns)
        self._folders = 0
        self._known_folder = lru_cache(maxsize=_FOLDERS_KEPT)(self._find_folder)

    def close(self) -> None:
        """Forget everything."""
        self._database.close()

    # --- filling ---

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Add in here: all is one transaction, whose end alone costs a look at each cached page."""
        self._database.execute("BEGIN")
        try:
            yield
        finally:
            self._database.execute("COMMIT")

    def add_folder(self, tree: int, volume: int, found: FolderRows) -> None:
        """Note the files of one folder of a tree."""
        path, atime, mtime, rows = found
        self._folders += 1
        folder = self._folders
        self._database.execute(
            "INSERT INTO folders VALUES (?, ?, ?, ?, ?)", (folder, tree, path, atime, mtime)
        )
        self._database.executemany(
            "INSERT INTO files VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [(folder, tree, volume, *row) for row in rows],
        )

    def add_shared_names(self, tree: int, names: Iterable[tuple[bytes, bytes, int]]) -> None:
        """Note where in a reference tree objects are: (folder path, name, inode number)."""
        self._database.executemany(
            "INSERT INTO shared_names VALUES (?, ?, ?, ?)", ((tree, *name) for name in names)
        )

    def add_foreign_names(self, counts: Iterable[tuple[int, int]]) -> None:
        """Note names in a pool of the original: (inode number, how many)."""
        self._database.executemany("INSERT OR REPLACE INTO foreign_names VALUES (?, ?)", counts)

    def drop_linked(self) -> dict[str, int]:
        """Forget inodes with several names in one tree, or with names that this run has not seen.

        Returns how many names went for which reason.
        """
        self._database.execute(
            """CREATE TEMP TABLE outsiders AS
            SELECT volume, ino, CASE WHEN max(here) > 1 THEN ? ELSE ? END AS reason FROM (
                SELECT volume, ino, count(*) AS here, max(nlink) AS nlink FROM files
                WHERE nlink > 1 GROUP BY volume, ino, tree
            ) LEFT JOIN foreign_names USING (ino)
            GROUP BY volume, ino
            HAVING max(here) > 1 OR sum(here) + ifnull(names, 0) <> max(nlink)""",
            (LINKED, LINKED_ELSEWHERE),
        )
        counts = dict(
            self._database.execute(
                """SELECT reason, count(*) FROM files JOIN outsiders USING (volume, ino)
                WHERE nlink > 1 GROUP BY reason"""
            )
        )
        if counts:
            self._database.execute(
                """DELETE FROM files
                WHERE nlink > 1 AND (volume, ino) IN (SELECT volume, ino FROM outsiders)"""
            )
        return counts

    def keep_only(self, rows: list[int]) -> None:
        """Forget every file but these rows."""
        self._database.execute("CREATE TEMP TABLE kept (id INTEGER PRIMARY KEY)")
        self._database.executemany("INSERT INTO kept VALUES (?)", ((row,) for row in rows))
        self._database.execute("DELETE FROM files WHERE id NOT IN (SELECT id FROM kept)")
        self._database.execute("DROP TABLE kept")

    # --- the pool's objects ---

    def load_objects(self, pool: Pool, full: set[str]) -> None:
        """Note the objects whose size, mode, owner and time a file of the catalog has.

        `full` are the names of those that take no more links.
        """
        self._database.execute("DELETE FROM objects")
        if next(pool.list_objects(), None) is None:
            return
        text = "size || '.' || printf('%o', mode) || '.' || uid || '.' || gid"
        if not self._ignore_mtime:
            text += " || '.' || mtime"
        wanted = array("Q")
        wanted.extend(
            hash(key) & _HASH_MASK
            for (key,) in self._database.execute(f"SELECT DISTINCT {text} FROM files")  # noqa: S608
        )
        self._database.executemany(
            "INSERT INTO objects VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            self._matching_objects(pool, InodeNumbers(wanted), full),
        )
        self._database.execute(
            f"CREATE INDEX IF NOT EXISTS object_keys ON objects ({self._key}, digest)"
        )

    def _matching_objects(
        self, pool: Pool, wanted: InodeNumbers, full: set[str]
    ) -> Iterator[tuple[object, ...]]:
        fields = 2 if self._ignore_mtime else 1
        for path, ino in pool.list_objects():
            key = path[3:].rsplit(".", fields)[0].partition(".")[2]
            if hash(key) & _HASH_MASK in wanted:
                try:
                    found, number = parse_object(path[3:])
                except ValueError:
                    continue
                owner = (found.size, found.mode, found.uid, found.gid, found.mtime_ns)
                yield (found.digest, *owner, found.xattrs, number, ino, path in full)

    # --- choosing ---

    def choose(self, *, twins: bool, everything: bool) -> None:
        """Find the groups of files that can be equal, to each other or to an object.

        `twins`: equal files of one tree count; `everything`: every file is a group's.
        """
        differs = "ino" if twins else "tree"
        having = (
            ""
            if everything
            else f"HAVING min({differs}) <> max({differs})"  # noqa: S608 - columns of our own
            f" OR ({self._key}) IN (SELECT {self._key} FROM objects)"
        )
        self._database.execute("DROP TABLE IF EXISTS groups")
        self._database.execute(f"CREATE INDEX IF NOT EXISTS file_keys ON files ({self._key})")
        self._database.execute(
            f"""CREATE TEMP TABLE groups AS
            SELECT {self._key}, min(id) AS first, count(*) AS names FROM files
            GROUP BY {self._key} {having} ORDER BY first"""  # noqa: S608 - columns of our own
        )
        self._take_known()

    def _take_known(self) -> None:
        """Copy what the index knows of the chosen files: other programs may write to it then."""
        self._database.execute("DELETE FROM known")
        try:
            if self._database.execute("SELECT 1 FROM idx.digests LIMIT 1").fetchone():
                self._database.execute(
                    f"""INSERT OR IGNORE INTO known SELECT volume, ino, digest, xattrs
                    FROM groups JOIN files USING ({self._key})
                    JOIN idx.digests USING (volume, ino, size, mtime, ctime)"""  # noqa: S608 - our own
                )
        except sqlite3.DatabaseError as error:
            self._database.execute("DELETE FROM known")
            renew_index(self._database, self._pool, error)

    def count_unchosen(self) -> int:
        """How many files no other can equal, so that they are not read."""
        total = "(SELECT count(*) FROM files) - (SELECT ifnull(sum(names), 0) FROM groups)"
        return int(self._database.execute(f"SELECT {total}").fetchone()[0])

    def count_chosen(self) -> int:
        """How many files are in groups."""
        total = "SELECT ifnull(sum(names), 0) FROM groups"
        return int(self._database.execute(total).fetchone()[0])

    # --- groups that fit into one batch ---

    def list_groups(self, limit: int) -> Iterator[tuple[list[tuple[Any, ...]], list[KnownObject]]]:
        """The groups of at most `limit` names in the order of the walk.

        Each with its files (fields of Member; the digest where the index knows it) and the objects
        that these may equal.
        """
        has_objects = self._database.execute("SELECT 1 FROM objects LIMIT 1").fetchone()
        for _, group in groupby(self._rows_of_groups(limit), key=itemgetter(0)):
            members = list(group)
            yield members, self._objects_like(members[0]) if has_objects else []

    def _rows_of_groups(self, limit: int) -> Iterator[tuple[Any, ...]]:
        query = f"""SELECT first, 0, tree, files.id, folder, name, files.ino, files.size, mode,
            uid, gid, files.mtime, files.ctime, nlink - ifnull(foreign_names.names, 0), blocks,
            files.volume, known.digest, known.xattrs, 0
            FROM groups CROSS JOIN files USING ({self._key})
            LEFT JOIN foreign_names ON foreign_names.ino = files.ino
            LEFT JOIN known ON known.volume = files.volume AND known.ino = files.ino
            WHERE groups.names <= ? ORDER BY groups.rowid"""  # noqa: S608 - our own
        return self._database.execute(query, (limit,))

    def _objects_like(self, member: tuple[Any, ...]) -> list[KnownObject]:
        values = member[7:11] if self._ignore_mtime else member[7:12]
        return self._find_objects(values, "")

    def _find_objects(self, key: Sequence[object], more: str, *values: object) -> list[KnownObject]:
        marks = ", ".join("?" * len(key))
        rows = self._database.execute(
            f"""SELECT digest, xattrs, mtime, number, ino, is_full FROM objects
            WHERE ({self._key}) = ({marks}) {more}""",  # noqa: S608 - columns of our own
            (*key, *values),
        )
        return [(*row[:5], bool(row[5])) for row in rows]

    # --- all other groups: read first, then link ---

    def choose_contents(self, above: int) -> None:
        """Choose the files in groups of more than `above` names; take what the index knows."""
        self._database.execute("DELETE FROM contents")
        if not self._database.execute("SELECT 1 FROM groups WHERE names > ?", (above,)).fetchone():
            return
        self._database.execute(
            f"""INSERT INTO contents (volume, ino) SELECT DISTINCT volume, ino
            FROM groups JOIN files USING ({self._key}) WHERE names > ?""",  # noqa: S608 - our own
            (above,),
        )
        self._database.execute("CREATE INDEX IF NOT EXISTS file_inodes ON files (ino, volume)")
        self._database.execute(
            """UPDATE contents SET (digest, xattrs, fresh) = (known.digest, known.xattrs, 0)
            FROM known WHERE known.volume = contents.volume AND known.ino = contents.ino"""
        )

    def has_contents(self) -> bool:
        """Whether any file was chosen by `choose_contents`."""
        return self._database.execute("SELECT 1 FROM contents LIMIT 1").fetchone() is not None

    def list_unread(self) -> Iterator[ToRead]:
        """One name of each inode that must be read, in the order of the walk."""
        cursor = self._database.execute(
            """SELECT min(files.id) AS first, files.tree, path, name, ino, size, mtime, ctime,
                volume
            FROM contents JOIN files USING (volume, ino) JOIN folders ON folders.id = folder
            WHERE digest IS NULL GROUP BY volume, ino ORDER BY first"""
        )
        return map(ToRead._make, cursor)

    def count_unread(self) -> int:
        """The bytes that must be read."""
        return int(
            self._database.execute(
                """SELECT ifnull(sum(size), 0) FROM (
                    SELECT max(size) AS size FROM contents JOIN files USING (volume, ino)
                    WHERE digest IS NULL GROUP BY volume, ino)"""
            ).fetchone()[0]
        )

    def add_contents(self, found: Iterable[tuple[ToRead, bytes, bytes, bool]]) -> None:
        """Note what was read: (file, digest, digest of the xattrs, fresh)."""
        self._database.executemany(
            "UPDATE contents SET digest = ?, xattrs = ?, fresh = ? WHERE volume = ? AND ino = ?",
            [
                (digest, xattrs, fresh, file.volume, file.ino)
                for file, digest, xattrs, fresh in found
            ],
        )

    def keep_digests(self, rows: Sequence[DigestRow]) -> None:
        """Put digests into the index, for the next run."""
        if rows:
            store_digests(self._database, rows)

    def drop_inode(self, file: ToRead) -> int:
        """Forget the inode of a file; returns how many names it had among the chosen ones.

        A file that was renamed and changed during the walk has two, and may have been chosen under
        one of them alone.
        """
        where = "WHERE volume = ? AND ino = ?"
        ((chosen,),) = self._database.execute(
            f"SELECT count(*) FROM files JOIN groups USING ({self._key}) {where}",  # noqa: S608
            (file.volume, file.ino),
        )
        self._database.execute(f"DELETE FROM files {where}", (file.volume, file.ino))  # noqa: S608
        return int(chosen)

    def drop_outside_references(self, tree: int, references: Sequence[int]) -> int:
        """Forget the tree's files that equal none at the same path in a reference tree.

        Returns how many names went.
        """
        marks = ", ".join("?" * len(references))
        equal = f"""SELECT 1 FROM files AS other JOIN folders AS there ON there.id = other.folder
            JOIN contents AS that ON that.volume = other.volume AND that.ino = other.ino
            WHERE there.tree IN ({marks}) AND there.path = here.path AND other.name = one.name
            AND {self._same_key} AND that.digest = this.digest AND that.xattrs = this.xattrs"""  # noqa: S608
        shared = f"""SELECT 1 FROM shared_names AS there JOIN objects AS other USING (ino)
            WHERE there.tree IN ({marks}) AND there.path = here.path AND there.name = one.name
            AND {self._same_key} AND other.digest = this.digest AND other.xattrs = this.xattrs"""  # noqa: S608
        return self._database.execute(
            f"""DELETE FROM files WHERE id IN (
                SELECT one.id FROM files AS one JOIN folders AS here ON here.id = one.folder
                JOIN contents AS this ON this.volume = one.volume AND this.ino = one.ino
                WHERE one.tree = ? AND NOT EXISTS ({equal}) AND NOT EXISTS ({shared}))""",  # noqa: S608
            (tree, *references, *references),
        ).rowcount

    def index_paths(self) -> None:
        """Make looking for a path quick; needed before `drop_outside_references`."""
        self._database.execute("CREATE INDEX IF NOT EXISTS folder_paths ON folders (path)")
        self._database.execute("CREATE INDEX IF NOT EXISTS file_names ON files (folder, name)")
        self._database.execute("CREATE INDEX IF NOT EXISTS shared_paths ON shared_names (name)")

    def list_members(self) -> Iterator[Member]:
        """Every file whose content is known, equal ones together in the order of their turns."""
        same = f"digest, xattrs, {self._key}"
        cursor = self._database.execute(
            f"""SELECT first_value(id) OVER (PARTITION BY {same} ORDER BY id) AS first, turn, tree,
                id, folder, name, ino, size, mode, uid, gid, mtime, ctime,
                nlink - ifnull(names, 0), blocks, volume, digest, xattrs, fresh
            FROM (
                SELECT row_number() OVER (
                    PARTITION BY {same}, tree ORDER BY nlink > 1 DESC, nlink, ino, files.id
                ) - 1 AS turn, *
                FROM files JOIN contents USING (volume, ino) WHERE digest IS NOT NULL
            ) LEFT JOIN foreign_names USING (ino)
            ORDER BY first, turn, tree"""  # noqa: S608 - columns of our own
        )
        return map(Member._make, cursor)

    def find_objects(self, member: Member) -> list[KnownObject]:
        """The pool's objects that equal a member whose content is known."""
        key = member[7:11] if self._ignore_mtime else member[7:12]
        return self._find_objects(
            key, "AND digest = ? AND xattrs = ?", member.digest, member.xattrs
        )

    def load_folder(self, folder: int) -> tuple[bytes, int, int]:
        """A folder's path below its tree's root, and its atime and mtime (ns) at the walk."""
        return self._known_folder(folder)

    def _find_folder(self, folder: int) -> tuple[bytes, int, int]:
        row: tuple[bytes, int, int] = self._database.execute(
            "SELECT path, read_atime, read_mtime FROM folders WHERE id = ?", (folder,)
        ).fetchone()
        return row
