"""Private copies for a host administrator: files by path, in guests or in plain trees.

The names in a guest are worked on while its lock is held, or its cgroup frozen.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Any, Final

from vstore import syscalls
from vstore.breaklink import BROKEN, BUSY, CHANGED, NOT_FROZEN, NOT_SHARED, Breaker
from vstore.hold import Held
from vstore.hostpath import HostPath, describe_kind, open_parent
from vstore.pool import InodeNumbers, Pool
from vstore.quarantine import load_quarantined
from vstore.undo import guarded_worker

_NAMES_A_JOB: Final = 100
_LOOK: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC

_REASONS: Final = {
    BUSY: "somebody has the shared file open for writing",
    CHANGED: "has become another file meanwhile",
    NOT_FROZEN: "its guest could not be held still for a moment",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a path: `is_broken`, or private as it was; `error` says why it is neither."""

    path: str
    is_broken: bool
    error: str = ""


def break_paths(places: Sequence[HostPath], held: Sequence[Held], pool: Pool) -> Iterator[Answer]:
    """Give each name a private copy of the object that it points at; yields one answer for each.

    `held` are the guests that the places lie in. Raises PoolBusy.
    """
    by_name = {item.guest.name: item for item in held}
    with pool.share():
        objects = pool.load_numbers()
        with guarded_worker(
            pool,
            lambda pool, windows, stage: _Holder(Breaker(pool, windows, stage), pool, objects),
        ) as crew:
            for some, outcomes in crew.map(_jobs(places, by_name)):
                for place, (is_broken, error) in zip(some, outcomes, strict=True):
                    yield Answer(place.given, is_broken, error)


def _jobs(
    places: Sequence[HostPath], held: dict[str, Held]
) -> Iterator[tuple[tuple[Any, ...], list[HostPath]]]:
    for _, group in groupby(places, attrgetter("guest", "parent")):
        same = list(group)
        guest = held[same[0].guest.name] if same[0].guest else None
        for start in range(0, len(same), _NAMES_A_JOB):
            some = same[start : start + _NAMES_A_JOB]
            root_fd, cgroup = (guest.fd, guest.cgroup) if guest else (-1, "")
            yield (root_fd, some[0].parent, [place.name for place in some], cgroup), some


class _Holder:
    """The worker's side: breaks the names of one folder."""

    def __init__(self, breaker: Breaker, pool: Pool, objects: InodeNumbers) -> None:
        self._breaker = breaker
        self._device = pool.device
        self._objects = objects
        self._quarantined = load_quarantined(pool)

    def serve(self, job: tuple[int, bytes, list[bytes], str]) -> Iterator[list[tuple[bool, str]]]:
        root_fd, parent, names, cgroup = job
        try:
            folder_fd = open_parent(parent, root_fd)
        except OSError as error:
            yield [(False, f"its folder cannot be opened: {error.strerror}")] * len(names)
            return
        try:
            yield self._break(folder_fd, names, cgroup)
        finally:
            os.close(folder_fd)

    def _break(self, folder_fd: int, names: list[bytes], cgroup: str) -> list[tuple[bool, str]]:
        answers: dict[bytes, tuple[bool, str]] = {}
        shared: list[tuple[bytes, int]] = []
        for name in dict.fromkeys(names):
            try:
                number, reason = self._look(folder_fd, name)
            except OSError as error:
                number, reason = 0, error.strerror or "cannot be looked at"
            if number:
                shared.append((name, number))
            else:
                answers[name] = (False, reason)
        for (name, _), outcome in zip(
            shared, self._breaker.break_names(folder_fd, shared, cgroup), strict=True
        ):
            is_good = outcome in (BROKEN, NOT_SHARED)
            answers[name] = (outcome == BROKEN, "" if is_good else _REASONS.get(outcome, outcome))
        return [answers[name] for name in names]

    def _look(self, folder_fd: int, name: bytes) -> tuple[int, str]:
        """The inode number of a shared file; else 0 and what is wrong with the name, if it is."""
        fd = os.open(name, _LOOK, dir_fd=folder_fd)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                return 0, f"is {describe_kind(status.st_mode)}"
            if status.st_dev == self._device and status.st_ino in self._objects:
                return status.st_ino, ""
            is_frozen = syscalls.statx(fd, 0).attributes & syscalls.STATX_ATTR_IMMUTABLE
        finally:
            os.close(fd)
        if status.st_ino in self._quarantined and status.st_dev == self._device:
            return 0, "is damaged and in quarantine: see vpool verify --repair"
        if not is_frozen:
            return 0, ""
        return 0, "is immutable, but no object of this pool: see setattr, or name another pool"
