"""Work on the shared names of guests, folder by folder, by one worker that its parent guards: undo,
break, remove.

`vunify --undo` and `vpool break` give names private copies back; `vpool rm` and the reclaiming of
objects take names away. A worker holds the windows, this process keeps its leases.
"""

import os
import socket
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from vstore import scan
from vstore.breaklink import BROKEN, Breaker
from vstore.errors import NoSpace
from vstore.exclude import NOTHING
from vstore.guardedrecovery import recover_guarded
from vstore.hold import Held, find_linger_s
from vstore.pool import InodeNumbers, Pool
from vstore.progress import SILENT, Progress
from vstore.quarantine import load_quarantined
from vstore.recovery import settle_stage
from vstore.window import Windows
from vstore.workers import Crew, Worker

_NAMES_A_JOB: Final = 100
_IN_QUARANTINE: Final = (
    "stays shared: the pool found its content changed; vpool verify --repair looks for a good copy"
)


class Holder(Protocol):
    """What serves jobs with windows of its own."""

    def serve(self, job: Any) -> Iterable[Any]: ...


Equip = Callable[[Pool, Windows, int], Holder]
"""Makes a holder from the pool, its windows and its stage folder's descriptor; called in the
worker.
"""


@contextmanager
def guarded_worker(pool: Pool, equip: Equip, *, count: int = 1) -> Iterator[Crew]:
    """One worker, or `count` of them, that may open windows, kept by this process; what a killed
    program left is put right first.

    The pool's lock must be held.
    """
    recover_guarded(pool)
    with pool.stage(count) as stages:

        def start(number: int, keeper: socket.socket) -> "_Hand":
            stage_fd = stages[number]
            windows = Windows(keeper, pool_fd=pool.fd, stage_fd=stage_fd, linger_s=find_linger_s)
            return _Hand(equip(pool, windows, stage_fd), windows)

        def bury(worker: Worker) -> None:
            stage_fd = stages[worker.number]
            worker.keeper.take_over(lambda leased: settle_stage(pool, stage_fd, leased))

        with Crew(count, start, bury=bury) as crew:
            yield crew


class _Hand:
    def __init__(self, holder: Holder, windows: Windows) -> None:
        self._holder = holder
        self._windows = windows

    def serve(self, job: Any) -> Iterable[Any]:
        return self._holder.serve(job)

    def idle(self) -> float | None:
        return self._windows.idle()

    def finish(self) -> None:
        self._windows.close()


def list_files(root_fd: int) -> Iterator[tuple[bytes, list[scan.FileRow]]]:
    """Every folder below the root behind `root_fd` with its regular files, shared or not, one
    folder after the other.

    Folders that cannot be read are left out.
    """
    tree = scan.Tree(root_fd, os.fstat(root_fd).st_dev, NOTHING, min_size=0, skip_ino=0)
    pending = [b""]
    while pending:
        starts, pending = pending, []
        for part in scan.walk(tree, starts, frozenset()):
            yield from ((path, rows) for path, _, _, rows in part.folders)
            pending += part.pending


def list_shared_names(
    root_fd: int, objects: Container[int]
) -> Iterator[tuple[bytes, list[scan.FileRow]]]:
    """As `list_files`, the names of objects alone."""
    for path, rows in list_files(root_fd):
        shared = [row for row in rows if row[1] in objects]
        if shared:
            yield path, shared


@dataclass(slots=True)
class UndoResult:
    """What became of the shared names:

    how many have private copies now, and the errors (path, reason).
    """

    files_broken: int = 0
    bytes_copied: int = 0
    errors: list[tuple[str, str]] = field(default_factory=list)


class _BreakHolder:
    def __init__(self, breaker: Breaker) -> None:
        self._breaker = breaker

    def serve(self, job: tuple[int, bytes, list[tuple[bytes, int]], str]) -> Iterable[list[str]]:
        yield self._breaker.break_below(*job)


def undo(guests: Sequence[Held], pool: Pool, progress: Progress = SILENT) -> UndoResult:
    """Give the guests private copies of everything that is shared with the pool.

    Names that lead to an inode in quarantine stay as they are and count as errors. Raises NoSpace
    before anything is done when the file system has no room for all of them; PoolBusy.
    """
    result = UndoResult()
    with pool.share():
        objects = pool.load_numbers()
        names = _check_space(guests, pool, objects)
        progress.phase("copy", names)
        with guarded_worker(
            pool, lambda pool, windows, stage: _BreakHolder(Breaker(pool, windows, stage))
        ) as crew:
            for (guest, path, rows), outcomes in crew.map(_undo_jobs(guests, objects)):
                _count(result, guest, path, rows, outcomes)
                progress.advance(len(rows))
        _note_quarantined(result, guests, load_quarantined(pool))
    return result


def _undo_jobs(guests: Sequence[Held], objects: InodeNumbers) -> Iterator[tuple[Any, Any]]:
    for guest in guests:
        for path, rows in list_shared_names(guest.fd, objects):
            for start in range(0, len(rows), _NAMES_A_JOB):
                some = rows[start : start + _NAMES_A_JOB]
                yield (
                    (guest.fd, path, [(row[0], row[1]) for row in some], guest.cgroup),
                    (guest, path, some),
                )


def _count(
    result: UndoResult, guest: Held, path: bytes, rows: Sequence[scan.FileRow], outcomes: list[str]
) -> None:
    for row, outcome in zip(rows, outcomes, strict=True):
        if outcome == BROKEN:
            result.files_broken += 1
            result.bytes_copied += row[9] * 512
        else:
            full = os.path.join(os.fsencode(guest.guest.root), path, row[0])  # noqa: PTH118 - bytes
            result.errors.append((os.fsdecode(full), outcome))


def _note_quarantined(
    result: UndoResult, guests: Sequence[Held], quarantined: frozenset[int]
) -> None:
    """A copy of what cannot be trusted would look like good content from then on."""
    for guest in guests if quarantined else ():
        for path, rows in list_shared_names(guest.fd, quarantined):
            _count(result, guest, path, rows, [_IN_QUARANTINE] * len(rows))


def _check_space(guests: Sequence[Held], pool: Pool, objects: InodeNumbers) -> int:
    """How many names are shared. Raises NoSpace when their copies do not fit."""
    names = needed = 0
    for guest in guests:
        for _, rows in list_shared_names(guest.fd, objects):
            names += len(rows)
            needed += sum(row[9] * 512 for row in rows)
    room = os.statvfs(pool.fd)
    free = room.f_bavail * room.f_frsize
    if needed > free:
        raise NoSpace(
            f"{pool.path}: private copies of {names} files need {needed} bytes, {free} are free",
            hint="free some space, or undo fewer guests",
        )
    return names
