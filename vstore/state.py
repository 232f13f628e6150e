"""What a pool has besides objects: quarantine, programs at work and killed ones, the index."""

import fcntl
import os
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vstore import index, inode
from vstore.pool import Pool
from vstore.quarantine import list_quarantine

_BLOCK: Final = 512  # bytes in st_blocks


@dataclass(frozen=True, slots=True)
class PoolState:
    """Counts and bytes (on disk)."""

    quarantined: int
    quarantined_bytes: int
    programs: int  # that work with the pool now
    leftovers: int  # stage folders of programs that were killed; the next run puts them right
    index_bytes: int
    digests: int | None  # in the index; None where it cannot be read


def look_at(pool: Pool) -> PoolState:
    """The state of the pool now. Changes nothing and waits for nobody."""
    quarantined = [
        os.stat(path, dir_fd=pool.fd, follow_symlinks=False) for path, _ in list_quarantine(pool)
    ]
    programs, leftovers = _count_stages(pool.path / "stage")
    path = pool.path / index.NAME
    size = path.stat().st_size if path.exists() else 0
    return PoolState(
        quarantined=len(quarantined),
        quarantined_bytes=sum(status.st_blocks * _BLOCK for status in quarantined),
        programs=programs,
        leftovers=leftovers,
        index_bytes=size,
        digests=_count_digests(path) if size else 0,
    )


def _count_stages(stage: Path) -> tuple[int, int]:
    """Stage folders whose flock is held, and those that nobody holds any more."""
    held = free = 0
    for folder in stage.iterdir() if stage.exists() else ():
        try:
            fd = os.open(folder, inode.OPEN_FOLDER)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            free += 1
        except BlockingIOError:
            held += 1
        finally:
            os.close(fd)
    return held, free


def _count_digests(path: Path) -> int | None:
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
            return int(database.execute("SELECT count(*) FROM digests").fetchone()[0])
    except sqlite3.Error:
        return None
