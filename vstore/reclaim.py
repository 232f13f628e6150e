"""Free what no guest uses any more: objects whose only name is the pool's own.

The pool is held alone. An object is counted again inside its window before its name is taken off;
what a running program has pinned stays.
"""

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final

from vstore import extents, index, inode
from vstore.pool import Pool
from vstore.progress import SILENT, Progress
from vstore.quarantine import list_quarantine
from vstore.undo import guarded_worker
from vstore.window import Windows, parse_intent

PIN: Final = "pin-"
"""A symlink of this kind in a running program's stage folder names, in its text, the inode numbers
of objects that must stay.
"""

_OBJECTS_A_JOB: Final = 100
_BLOCK: Final = 512  # bytes in st_blocks

_IN_USE: Final = "in use"
_BUSY: Final = "busy"
_FREED: Final = "freed"


@dataclass(frozen=True, slots=True)
class Unused:
    """An object, or an inode in quarantine, that no guest uses."""

    path: str  # below the pool
    ino: int
    bytes: int  # on disk, that no other inode shares


@dataclass(slots=True)
class ReclaimResult:
    """What was freed, or with `plan_reclaim` would be; `errors` are (path, reason)."""

    objects: int = 0
    quarantined: int = 0
    bytes: int = 0
    pinned: int = 0
    errors: list[tuple[str, str]] = field(default_factory=list)

    def add(self, path: str, size: int) -> None:
        if path.startswith("objects/"):
            self.objects += 1
        else:
            self.quarantined += 1
        self.bytes += size


def plan_reclaim(pool: Pool) -> ReclaimResult:
    """What `reclaim` would free now. Changes nothing."""
    pins = load_pins(pool)
    result = ReclaimResult()
    for unused in find_unused(pool):
        if unused.ino in pins:
            result.pinned += 1
        else:
            result.add(unused.path, unused.bytes)
    return result


def reclaim(pool: Pool, progress: Progress = SILENT) -> ReclaimResult:
    """Remove what no guest uses and nobody has pinned. Raises PoolBusy.

    An inode that a process still has open keeps its blocks until that ends.
    """
    result = ReclaimResult()
    gone: list[int] = []
    progress.phase("reclaim")
    with pool.exclude():
        with guarded_worker(pool, lambda pool, windows, _: _Reclaimer(pool, windows)) as crew:
            pins = load_pins(pool)
            for jobs, outcomes in crew.map(_batch(_without(find_unused(pool), pins, result))):
                for unused, outcome in zip(jobs, outcomes, strict=True):
                    _count(result, gone, unused, outcome)
                progress.advance(len(jobs))
        _forget_digests(pool, gone)
    return result


def find_unused(pool: Pool) -> Iterator[Unused]:
    """Every object with one name, then every quarantined inode with one."""
    for name, _ in pool.list_objects():
        yield from _look(pool, f"objects/{name}")
    for path, _ in list_quarantine(pool):
        yield from _look(pool, path)


def _look(pool: Pool, path: str) -> Iterator[Unused]:
    with suppress(FileNotFoundError):
        status = os.stat(path, dir_fd=pool.fd, follow_symlinks=False)
        if status.st_nlink == 1:
            yield Unused(path, status.st_ino, _own_bytes(pool, path, status))


def _own_bytes(pool: Pool, path: str, status: os.stat_result) -> int:
    """The bytes on disk that go with the inode; blocks that another one shares (reflinks) stay."""
    size = status.st_blocks * _BLOCK
    with suppress(OSError):
        fd = os.open(path, inode.OPEN_TO_READ, dir_fd=pool.fd)
        try:
            shared = [
                extent.length
                for extent in extents.load_extents(fd)
                if extent.flags & extents.FIEMAP_EXTENT_SHARED
            ]
        finally:
            os.close(fd)
        size = max(0, size - sum(shared))
    return size


def load_pins(pool: Pool) -> frozenset[int]:
    """The inode numbers that running programs have pinned."""
    pins: set[int] = set()
    for folder, _, names in os.walk(pool.path / "stage"):
        for name in names:
            if name.startswith(PIN):
                with suppress(OSError):
                    pins.update(parse_intent(os.fsencode(Path(folder, name).readlink())))
    return frozenset(pins)


def _without(
    found: Iterator[Unused], pins: frozenset[int], result: ReclaimResult
) -> Iterator[Unused]:
    for unused in found:
        if unused.ino in pins:
            result.pinned += 1
        else:
            yield unused


def _batch(found: Iterator[Unused]) -> Iterator[tuple[list[str], list[Unused]]]:
    while some := list(islice(found, _OBJECTS_A_JOB)):
        yield [unused.path for unused in some], some


def _count(result: ReclaimResult, gone: list[int], unused: Unused, outcome: str) -> None:
    if outcome == _FREED:
        result.add(unused.path, unused.bytes)
        gone.append(unused.ino)
    elif outcome != _IN_USE:
        result.errors.append((unused.path, outcome))


def _forget_digests(pool: Pool, numbers: Sequence[int]) -> None:
    """Take inodes that are gone out of the index; without one there is nothing to do."""
    if not numbers or not (pool.path / index.NAME).exists():
        return
    with closing(sqlite3.connect("", isolation_level=None)) as database:
        index.load_index(database, pool)
        volume = index.volume_of(pool.objects_fd)
        with suppress(sqlite3.Error):
            database.execute("BEGIN")
            database.executemany(
                "DELETE FROM idx.digests WHERE volume = ? AND ino = ?",
                ((volume, index.signed(number)) for number in numbers),
            )
            database.execute("COMMIT")


class _Reclaimer:
    """The worker's side: removes inodes that have one name."""

    def __init__(self, pool: Pool, windows: Windows) -> None:
        self._pool = pool
        self._windows = windows

    def serve(self, paths: list[str]) -> Iterator[Any]:
        """Remove each path below the pool; yields what became of each."""
        opened: dict[str, int] = {}
        for path in paths:
            with suppress(FileNotFoundError):
                opened[path] = os.open(path, inode.OPEN_TO_READ, dir_fd=self._pool.fd)
        with self._windows.guard(list(opened.values())) as refused:
            outcomes = {
                path: self._remove(path, fd, is_refused=fd in refused)
                for path, fd in opened.items()
            }
        yield [outcomes.get(path, _IN_USE) for path in paths]

    def _remove(self, path: str, fd: int, *, is_refused: bool) -> str:
        try:
            if not inode.is_immutable(fd):
                return self._unlink(path, fd)
            if is_refused:
                return "somebody has it open for writing"
            with self._windows.thawed(fd):
                return self._unlink(path, fd)
        except OSError as error:
            return f"cannot be removed: {error.strerror}"

    def _unlink(self, path: str, fd: int) -> str:
        if os.fstat(fd).st_nlink != 1:
            return _IN_USE
        os.unlink(path, dir_fd=self._pool.fd)
        return _FREED
