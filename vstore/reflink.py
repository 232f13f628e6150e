"""Share blocks, not inodes: files of equal content come to use the same extents (btrfs, xfs).

One run: walk the trees, read the files whose size another has and that the index does not know, let
the kernel share the blocks of those that are equal. It compares them under its own locks before it
does, so nothing is frozen, nobody is kept from writing, and guests may run. Of a file nothing
changes but where its blocks lie: owner, mode, times and attributes need not be equal, and a later
write is private again. No objects are made; those of the pool lend their blocks.
"""

import os
import socket
import sqlite3
import time
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby
from operator import attrgetter
from typing import Any, Final, Protocol

from vstore import index, scan
from vstore.blocks import ALREADY, LEAD, READ, REASONS, UNIFIED, File, Hand, check_sharing
from vstore.exclude import Excludes
from vstore.hold import Held
from vstore.order import Options, UnifyResult
from vstore.pace import TimeBudget, batches
from vstore.pool import InodeNumbers, Pool, parse_object
from vstore.progress import SILENT, Progress
from vstore.workers import Crew, core_count

UNIQUE: Final = "unique"

_FILES_A_JOB: Final = 200
_BYTES_A_JOB: Final = 32 << 20
_SCHEMA: Final = """
    PRAGMA journal_mode = OFF;
    PRAGMA synchronous = OFF;
    PRAGMA cache_size = -24000;
    PRAGMA temp_store = FILE;
    CREATE TABLE folders (id INTEGER PRIMARY KEY, tree INTEGER, path BLOB);
    CREATE TABLE inodes (
        volume INTEGER, ino INTEGER, place INTEGER, folder INTEGER, name BLOB,
        size INTEGER, mtime INTEGER, ctime INTEGER, names INTEGER, digest BLOB,
        PRIMARY KEY (volume, ino)
    ) WITHOUT ROWID;
    CREATE TABLE objects (digest BLOB, size INTEGER, name TEXT);
"""


class Source(Protocol):
    """A guest that is held, and what is left alone in it."""

    @property
    def held(self) -> Held: ...

    @property
    def excludes(self) -> Excludes: ...


def reflink(
    sources: Sequence[Source],
    pool: Pool | None,
    options: Options,
    progress: Progress = SILENT,
    *,
    also: Sequence[Source] = (),
) -> UnifyResult:
    """Let the files of the guests share blocks with each other and with the pool's objects.

    The files of `also` take part, but are not counted. The pool lends its index too; without one
    what was read is forgotten. Raises NotPermitted where blocks cannot be shared, PoolBusy.
    """
    began = time.monotonic()
    with ExitStack() as stack:
        if pool is not None:
            stack.enter_context(pool.share())
        run = _Run(sources, also, pool, options, progress, stack)
        run.carry_out()
    run.result.seconds = time.monotonic() - began
    return run.result


class _Run:
    def __init__(
        self,
        sources: Sequence[Source],
        also: Sequence[Source],
        pool: Pool | None,
        options: Options,
        progress: Progress,
        stack: ExitStack,
    ) -> None:
        self._sources = [*sources, *also]
        self._counted = len(sources)
        self._pool = pool
        self._options = options
        self._progress = progress
        self._stack = stack
        self._budget = TimeBudget(options.time_budget_s)
        self.result = UnifyResult()

    def carry_out(self) -> None:
        if not self._sources:
            return
        self._check_file_system()
        self._catalog = _Catalog(self._pool)
        self._stack.callback(self._catalog.close)
        trees = [self._tree(source) for source in self._sources]
        objects = self._catalog.load_objects()
        count = self._options.jobs or core_count()

        def start(_number: int, _keeper: socket.socket) -> Hand:
            return Hand(trees, self._pool, objects, dry_run=self._options.dry_run)

        with Crew(count, start) as crew:
            self._walk(crew)
            self.result.skip(UNIQUE, self._catalog.drop_lonely())
            self._catalog.take_known()
            self._read(crew)
            self._share(crew)
        if self._budget.is_spent:
            self.result.count_late()

    def _check_file_system(self) -> None:
        held = self._sources[0].held
        if self._pool is not None:
            check_sharing(self._pool.fd, os.fspath(self._pool.path))
        else:
            check_sharing(held.fd, os.fspath(held.guest.root))

    def _tree(self, source: Source) -> scan.Tree:
        held = source.held
        is_pools = self._pool is not None and held.device == self._pool.device
        skip_ino = os.fstat(self._pool.fd).st_ino if self._pool is not None and is_pools else 0
        return scan.Tree(held.fd, held.device, source.excludes, self._options.min_size, skip_ino)

    # --- walking ---

    def _walk(self, crew: Crew) -> None:
        self._progress.phase("walk")
        volumes = [index.volume_of(source.held.fd) for source in self._sources]
        todo = deque((number, [b""]) for number in range(len(self._sources)))
        jobs = iter(lambda: _next_walk(todo), ())
        for tree, (folders, met, files, skipped, errors, pending, *_) in crew.map(jobs):
            counts = tree < self._counted
            for path, _, _, rows in folders:
                self._catalog.add_folder(tree, volumes[tree], path, rows, counts=counts)
            todo.extend((tree, pending[start::2]) for start in range(2) if pending[start::2])
            if counts:
                self._count_walk(tree, files, len(met) // 8, skipped, errors)

    def _count_walk(
        self,
        tree: int,
        files: int,
        met: int,
        skipped: dict[str, int],
        errors: list[tuple[bytes, str]],
    ) -> None:
        self.result.files_seen += files + met
        self.result.files_already += met
        for reason, times in skipped.items():
            self.result.skip(reason, times)
        for path, reason in errors:
            self._note_error(tree, path, reason)
        self._progress.advance(files + met)

    # --- reading ---

    def _read(self, crew: Crew) -> None:
        self._progress.phase("read", self._catalog.count_unread(), "bytes")
        unread = batches(
            self._catalog.list_unread(),
            count=_FILES_A_JOB,
            size=_BYTES_A_JOB,
            weigh=lambda file: (1, file.size),
        )
        jobs = (
            (("read", [tuple(file) for file in batch]), batch)
            for batch in self._budget.spend_on(unread)
        )
        for files, answers in crew.map(jobs):
            known = []
            for file, (outcome, digest, xattrs, keep) in zip(files, answers, strict=True):
                if outcome == READ:
                    known.append((file, digest, xattrs, keep))
                else:
                    self._catalog.drop(file)
                    self._count(file, outcome)
            self._catalog.add_digests(known, keep=not self._options.dry_run)
            self._progress.advance(sum(file.size for file in files))

    # --- sharing ---

    def _share(self, crew: Crew) -> None:
        self._progress.phase("share", self._catalog.count_known())
        groups = batches(
            self._list_groups(),
            count=_FILES_A_JOB,
            size=_BYTES_A_JOB,
            weigh=lambda group: (len(group[1]), group[1][0].size * len(group[1])),
        )
        jobs = (
            (("share", [(names, [tuple(file) for file in files]) for names, files, _ in job]), job)
            for job in self._budget.spend_on(groups)
        )
        for job, answers in crew.map(jobs):
            for (_, files, is_first), outcomes in zip(job, answers, strict=True):
                self._take_group(files, outcomes, is_first=is_first)

    def _list_groups(self) -> Iterator["_Group"]:
        """All that is equal, a bounded piece at a time."""
        for _, equals in groupby(self._catalog.list_known(), key=attrgetter("group")):
            yield from self._cut(equals)

    def _cut(self, equals: Iterator[File]) -> Iterator["_Group"]:
        """The pieces of a group; each begins with its first file, to share with."""
        first = next(equals)
        names = self._catalog.find_objects(first)
        files = [first]
        is_first = True
        for file in equals:
            files.append(file)
            if len(files) >= _FILES_A_JOB:
                yield names, files, is_first
                files, is_first = [first], False
        if is_first and len(files) == 1 and not names:
            self.result.skip(UNIQUE, first.names)
        elif is_first or len(files) > 1:
            yield names, files, is_first

    def _take_group(
        self, files: Sequence[File], outcomes: Sequence[tuple[str, int]], *, is_first: bool
    ) -> None:
        found = {outcome for outcome, _ in outcomes}
        lead = UNIFIED if UNIFIED in found else ALREADY if ALREADY in found else UNIQUE
        for number, (file, (outcome, freed)) in enumerate(zip(files, outcomes, strict=True)):
            self.result.bytes_reclaimed += freed
            if is_first or number:
                self._count(file, lead if outcome == LEAD else outcome)
        self._progress.advance(len(files) - (not is_first))

    # --- counting ---

    def _count(self, file: File, outcome: str) -> None:
        result = self.result
        if outcome == UNIFIED:
            result.files_unified += file.names
        elif outcome == ALREADY:
            result.files_already += file.names
        elif outcome == UNIQUE or outcome in REASONS:
            result.skip(outcome, file.names)
        elif file.names:
            path = file.path + b"/" + file.name if file.path else file.name
            self._note_error(file.tree, path, outcome)
            result.skip("error", file.names - 1)

    def _note_error(self, tree: int, path: bytes, reason: str) -> None:
        root = os.fspath(self._sources[tree].held.guest.root)
        self.result.errors.append((f"{root}/{os.fsdecode(path)}", reason))


_Group = tuple[list[str], list[File], bool]
"""Objects and files of one content, and whether these files are the first piece of their group."""


def _next_walk(
    todo: deque[tuple[int, list[bytes]]],
) -> tuple[tuple[str, Any], int] | None:
    if not todo:
        return None
    tree, starts = todo.popleft()
    return ("walk", (tree, starts)), tree


class _Catalog:
    """What a run has seen, in a private database on disk; the pool's index is attached to it."""

    def __init__(self, pool: Pool | None) -> None:
        self._pool = pool
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.executescript(_SCHEMA)
        index.load_index(self._database, pool)
        self._folders = self._places = 0

    def close(self) -> None:
        self._database.close()

    def load_objects(self) -> InodeNumbers:
        """Note the pool's objects; returns their inode numbers."""
        numbers = array("Q")

        def rows(pool: Pool) -> Iterator[tuple[bytes, int, str]]:
            for path, ino in pool.list_objects():
                numbers.append(ino)
                try:
                    identity, _ = parse_object(path[3:])
                except ValueError:
                    continue
                yield identity.digest, identity.size, path

        if self._pool is not None:
            self._database.executemany("INSERT INTO objects VALUES (?, ?, ?)", rows(self._pool))
            self._database.execute("CREATE INDEX object_digests ON objects (digest, size)")
        return InodeNumbers(numbers)

    def find_objects(self, file: File) -> list[str]:
        """The names of a few objects with the content of the file."""
        cursor = self._database.execute(
            "SELECT name FROM objects WHERE digest = ? AND size = ? ORDER BY name LIMIT 4",
            (file.digest, file.size),
        )
        return [name for (name,) in cursor]

    def add_folder(
        self, tree: int, volume: int, path: bytes, rows: Sequence[scan.FileRow], *, counts: bool
    ) -> None:
        """Note the files of one folder; an inode that is known already has one more name."""
        self._folders += 1
        self._database.execute("INSERT INTO folders VALUES (?, ?, ?)", (self._folders, tree, path))
        found = []
        for name, ino, size, _, _, _, mtime, ctime, _, _ in rows:
            self._places += 1
            place = (self._places, self._folders, name)
            found.append((volume, ino, *place, size, mtime, ctime, int(counts)))
        self._database.executemany(
            """INSERT INTO inodes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)
            ON CONFLICT DO UPDATE SET names = names + excluded.names""",
            found,
        )

    def drop_lonely(self) -> int:
        """Forget the files whose size no other inode has; returns how many names those have."""
        lonely = """FROM inodes WHERE size NOT IN (
            SELECT size FROM inodes GROUP BY size HAVING count(*) > 1
            UNION SELECT size FROM objects)"""
        names = self._database.execute(f"SELECT ifnull(sum(names), 0) {lonely}").fetchone()[0]
        self._database.execute(f"DELETE {lonely}")
        return int(names)

    def take_known(self) -> None:
        """Take the digests that the index has."""
        try:
            self._database.execute(
                """UPDATE inodes SET digest = known.digest FROM idx.digests AS known
                WHERE known.volume = inodes.volume AND known.ino = inodes.ino
                AND known.size = inodes.size AND known.mtime = inodes.mtime
                AND known.ctime = inodes.ctime"""
            )
        except sqlite3.DatabaseError as error:
            self._database.execute("UPDATE inodes SET digest = NULL")
            index.renew_index(self._database, self._pool, error)

    def count_unread(self) -> int:
        """The bytes to be read."""
        return self._sum("ifnull(sum(size), 0)", "digest IS NULL")

    def count_known(self) -> int:
        """The inodes whose content is known."""
        return self._sum("count(*)", "digest IS NOT NULL")

    def _sum(self, what: str, which: str) -> int:
        query = f"SELECT {what} FROM inodes WHERE {which}"  # noqa: S608 - constants
        return int(self._database.execute(query).fetchone()[0])

    def list_unread(self) -> Iterator[File]:
        """The files to be read, in the order of the walk."""
        return self._list("0", "digest IS NULL")

    def list_known(self) -> Iterator[File]:
        """The files whose content is known, all equal ones together."""
        return self._list(
            "first_value(place) OVER (PARTITION BY digest, size ORDER BY place)",
            "digest IS NOT NULL",
        )

    def _list(self, group: str, which: str) -> Iterator[File]:
        cursor = self._database.cursor().execute(
            f"""SELECT {group} AS first, place, tree, path, name, ino, size, mtime, ctime, names,
                volume, digest
            FROM inodes JOIN folders ON folders.id = folder WHERE {which}
            ORDER BY first, place"""  # noqa: S608 - constants
        )
        return map(File._make, cursor)

    def add_digests(self, found: Sequence[tuple[File, bytes, bytes, bool]], *, keep: bool) -> None:
        """Note what was read, and put into the index what may be kept."""
        self._database.executemany(
            "UPDATE inodes SET digest = ? WHERE volume = ? AND ino = ?",
            [(digest, file.volume, file.ino) for file, digest, _, _ in found],
        )
        rows = [
            (file.volume, file.ino, file.size, file.mtime, file.ctime, digest, xattrs)
            for file, digest, xattrs, may_be_kept in found
            if may_be_kept and keep
        ]
        if rows:
            index.store_digests(self._database, rows)

    def drop(self, file: File) -> None:
        """Forget an inode."""
        self._database.execute(
            "DELETE FROM inodes WHERE volume = ? AND ino = ?", (file.volume, file.ino)
        )
