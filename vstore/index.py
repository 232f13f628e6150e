"""The digest cache: which content an inode had, so that no file is read twice.

A digest enters only if a read lease was held unbroken while the file was read and its ctime was at
least `SETTLED_NS` before that began: a store through an old mapping, or a rewrite within one tick
of a coarse file clock, could otherwise change the content under an unchanged key. The file can be
thrown away at any time; one that is corrupt, foreign or of another format is.
"""

import logging
import os
import sqlite3
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from vstore import inode
from vstore.pool import Pool, find_file_system

log = logging.getLogger(__name__)

SETTLED_NS: Final = 2 * 10**9
NAME: Final = "index.sqlite"
_FORMAT: Final = 1
_SCHEMA: Final = """
    CREATE TABLE digests (
        volume INTEGER NOT NULL,  -- of btrfs: the subvolume's f_fsid; else 0
        ino INTEGER NOT NULL,
        size INTEGER NOT NULL,
        mtime INTEGER NOT NULL,   -- ns
        ctime INTEGER NOT NULL,   -- ns
        digest BLOB NOT NULL,     -- BLAKE3 of the content
        xattrs BLOB NOT NULL,     -- BLAKE3 of the sorted xattrs; empty without any
        PRIMARY KEY (volume, ino)
    ) WITHOUT ROWID;
    CREATE TABLE origin (folder INTEGER NOT NULL, born INTEGER NOT NULL);
"""

DigestRow = tuple[int, int, int, int, int, bytes, bytes]
"""The columns of the table `digests`, in order."""


def volume_of(fd: int) -> int:
    """The subvolume that the inode behind `fd` is on, as a signed 64-bit number; 0 outside btrfs.

    The index lies on the file system that it speaks of and knows the pool that it was made for, so
    only subvolumes, each with inode numbers of its own, must be told apart.
    """
    if find_file_system(Path(f"/proc/self/fd/{fd}")) != "btrfs":
        return 0
    return signed(os.fstatvfs(fd).f_fsid & (1 << 64) - 1)


def signed(number: int) -> int:
    """An unsigned 64-bit number as SQLite can hold it."""
    return number - (1 << 64) if number >= 1 << 63 else number


def load_index(database: sqlite3.Connection, pool: Pool | None) -> None:
    """Attach the pool's index to `database` as schema `idx`; one that cannot be used is made anew.

    Without a pool, or where no file can be made, it stands in memory and is gone with the program.
    """
    if pool is not None:
        for _ in range(2):
            try:
                _attach(database, pool.path / NAME)
                _check(database, pool)
                return
            except sqlite3.DatabaseError as error:
                log.warning("%s: cannot be used (%s)", pool.path / NAME, error)
                with suppress(sqlite3.Error):
                    database.execute("DETACH idx")
                if not _is_busy(error):
                    forget_index(pool)
    database.execute("ATTACH ':memory:' AS idx")
    _create(database, (0, 0))


def renew_index(database: sqlite3.Connection, pool: Pool | None, error: sqlite3.Error) -> None:
    """Replace an index that turned out corrupt while it was read by a new, empty one. Where another
    program held it for long it stays, and this one does without.
    """
    is_busy = _is_busy(error)
    what = "is not used" if is_busy else "is made anew"
    log.warning("the pool's index cannot be read (%s) and %s", error, what)
    database.execute("DETACH idx")
    if pool is not None and not is_busy:
        forget_index(pool)
    load_index(database, None if is_busy else pool)


def _is_busy(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def forget_index(pool: Pool) -> None:
    """Remove the pool's index. Nothing but time is lost."""
    for suffix in ("", "-wal", "-shm", "-journal"):
        with suppress(FileNotFoundError):
            os.unlink(NAME + suffix, dir_fd=pool.fd)


def store_digests(database: sqlite3.Connection, rows: Iterable[DigestRow]) -> None:
    """Put digests that meet the rule above into the index.

    A failure costs the next run time, and is logged.
    """
    try:
        database.execute("BEGIN IMMEDIATE")
        try:
            database.executemany(
                "INSERT OR REPLACE INTO idx.digests VALUES (?, ?, ?, ?, ?, ?, ?)", rows
            )
            database.execute("COMMIT")
        except sqlite3.Error:
            with suppress(sqlite3.Error):
                database.execute("ROLLBACK")
            raise
    except sqlite3.Error as error:
        log.warning("digests could not be kept for the next run: %s", error)


def _attach(database: sqlite3.Connection, path: Path) -> None:
    database.execute("ATTACH ? AS idx", (os.fspath(path),))
    # No write-ahead log: its shared memory is a mapped file, deadly on a full disk.
    database.execute("PRAGMA idx.journal_mode = TRUNCATE")
    database.execute("PRAGMA idx.synchronous = NORMAL")


def _check(database: sqlite3.Connection, pool: Pool) -> None:
    version = database.execute("PRAGMA idx.user_version").fetchone()[0]
    born = (os.fstat(pool.objects_fd).st_ino, inode.birth_time_ns(pool.objects_fd))
    if version == 0:
        _create(database, born)
        return
    if version != _FORMAT:
        raise sqlite3.DatabaseError(f"it has format {version}, this version knows {_FORMAT}")
    if database.execute("SELECT folder, born FROM idx.origin").fetchall() != [born]:
        raise sqlite3.DatabaseError("it was made for another pool")


def _create(database: sqlite3.Connection, born: tuple[int, int]) -> None:
    with database:
        database.execute("BEGIN IMMEDIATE")
        if database.execute("PRAGMA idx.user_version").fetchone()[0]:
            return  # another program was quicker
        for statement in _SCHEMA.replace("CREATE TABLE ", "CREATE TABLE idx.").split(";\n"):
            if statement.strip():
                database.execute(statement)
        database.execute("INSERT INTO idx.origin VALUES (?, ?)", born)
        database.execute(f"PRAGMA idx.user_version = {_FORMAT}")
