"""Check every object against its name: content, metadata, extended attributes and the flag.

All cores read. An object found thawed is looked at again under its lock, since another program may
have a window on it. What is wrong is named, with the files of guests that use it.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from vstore import inode
from vstore.digest import digest_content
from vstore.folders import Folder, Missed, join, walk_folders
from vstore.guardedrecovery import recover_guarded
from vstore.guest import Guest
from vstore.pool import Pool, digest_xattrs, parse_object
from vstore.progress import SILENT, Progress
from vstore.quarantine import list_quarantine
from vstore.undo import guarded_worker
from vstore.window import Windows
from vstore.workers import Crew, core_count

_FILES_A_JOB: Final = 300
_BYTES_A_JOB: Final = 32 << 20

THAWED: Final = "it is not immutable"
QUARANTINED: Final = "it is in quarantine, and still in use"


@dataclass(frozen=True, slots=True)
class GuestFile:
    """A name in a guest: the guest's name, and the path below its root."""

    guest: str
    path: bytes


@dataclass(slots=True)
class Fault:
    """An object that is not as it should be, and what became of it."""

    path: str  # below the pool
    ino: int
    reason: str
    is_sound: bool = False  # content and metadata are right, only the flag is missing
    links: int = 0  # names besides the pool's own
    names: list[GuestFile] = field(default_factory=list)  # those that were found
    outcome: str = ""  # what repair did
    is_repaired: bool = False
    left: list[tuple[GuestFile, str]] = field(default_factory=list)  # not restored, and why


@dataclass(slots=True)
class VerifyResult:
    """How many objects were read, their bytes, and what is wrong."""

    objects: int = 0
    bytes: int = 0
    faults: list[Fault] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """Whether nothing is wrong any more."""
        return all(fault.is_repaired for fault in self.faults)


def verify(pool: Pool, guests: Sequence[Guest], progress: Progress = SILENT) -> VerifyResult:
    """Check all objects; look for the names of those that are wrong in `guests`.

    What a killed program left is put right first. Changes nothing else. Raises PoolBusy.
    """
    result = VerifyResult()
    with pool.share():
        recover_guarded(pool)
        progress.phase(
            "verify", sum(_stated_size(name) for name, _ in pool.list_objects()), "bytes"
        )
        with Crew(core_count(), lambda number, keeper: _Reader(pool)) as crew:
            for _, (count, size, faults) in crew.map(_jobs(pool)):
                result.objects += count
                result.bytes += size
                result.faults += [Fault(*values) for values in faults]
                progress.advance(size)
        result.faults = _without_open_windows(pool, result.faults)
        result.faults += _find_quarantined(pool)
        name_users(result.faults, pool, guests)
    return result


def find_fault(name: str, fd: int) -> str:
    """What of the inode behind `fd` is not as the object's `name` says; empty when it is sound.

    Reads all of it. Raises OSError, ValueError for what is no object's name.
    """
    identity, _ = parse_object(name.rpartition("/")[2])
    status = os.fstat(fd)
    differs = {
        "size": status.st_size != identity.size,
        "mode": status.st_mode != identity.mode,
        "owner": (status.st_uid, status.st_gid) != (identity.uid, identity.gid),
        "modification time": status.st_mtime_ns != identity.mtime_ns,
        "extended attributes": digest_xattrs(fd) != identity.xattrs,
        "content": digest_content(fd, status) != identity.digest,
    }
    wrong = [word for word, is_other in differs.items() if is_other]
    return f"not as its name says: {', '.join(wrong)}" if wrong else ""


def name_users(faults: Sequence[Fault], pool: Pool, guests: Sequence[Guest]) -> None:
    """Note in each fault the names that guests have for it."""
    wanted = {fault.ino: fault for fault in faults}
    for fault in faults:
        fault.names.clear()
    if any(fault.links for fault in faults):
        for guest, folder in walk_guests(guests, pool):
            for entry in folder.entries:
                if entry.inode() in wanted:
                    path = join(folder.path, os.fsencode(entry.name))
                    wanted[entry.inode()].names.append(GuestFile(guest.name, path))


def walk_guests(guests: Sequence[Guest], pool: Pool) -> Iterator[tuple[Guest, Folder]]:
    """Every folder of those guests that are on the pool's file system."""
    pool_ino = os.fstat(pool.fd).st_ino
    for guest in guests:
        fd = os.open(guest.root, inode.OPEN_FOLDER)
        try:
            if os.fstat(fd).st_dev == pool.device:
                for folder in walk_folders(fd, Missed(), skip_ino=pool_ino):
                    yield guest, folder
        finally:
            os.close(fd)


def _stated_size(name: str) -> int:
    """The size that an object's name states, in bytes; 0 for a name that is none."""
    parts = name.split(".", 2)
    return int(parts[1]) if len(parts) == 3 and parts[1].isdecimal() else 0


def _jobs(pool: Pool) -> Iterator[tuple[list[tuple[str, int]], None]]:
    batch: list[tuple[str, int]] = []
    size = 0
    for name, number in pool.list_objects():
        batch.append((name, number))
        size += _stated_size(name)
        if len(batch) >= _FILES_A_JOB or size >= _BYTES_A_JOB:
            yield batch, None
            batch, size = [], 0
    if batch:
        yield batch, None


def _find_quarantined(pool: Pool) -> Iterator[Fault]:
    """Inodes in quarantine that guests still have names of."""
    for path, number in list_quarantine(pool):
        links = os.stat(path, dir_fd=pool.fd, follow_symlinks=False).st_nlink - 1
        if links:
            yield Fault(path, number, QUARANTINED, links=links)


def _without_open_windows(pool: Pool, faults: list[Fault]) -> list[Fault]:
    """The faults less those that another program's window was."""
    thawed = [fault for fault in faults if fault.is_sound]
    if not thawed:
        return faults
    with guarded_worker(pool, lambda pool, windows, _: _SecondLook(pool, windows)) as crew:
        answers = crew.map((fault.path, fault) for fault in thawed)
        frozen = {fault.path for fault, is_frozen in answers if is_frozen}
    return [fault for fault in faults if fault.path not in frozen]


class _SecondLook:
    """A worker that asks once more whether an object is frozen, when nobody has a window on it."""

    def __init__(self, pool: Pool, windows: Windows) -> None:
        self._pool = pool
        self._windows = windows

    def serve(self, path: str) -> Iterator[bool]:
        fd = os.open(path, inode.OPEN_TO_READ, dir_fd=self._pool.fd)
        with self._windows.guard([fd]):
            is_frozen = inode.is_immutable(fd)
        yield is_frozen


class _Reader:
    """A worker that reads objects."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def serve(
        self, objects: list[tuple[str, int]]
    ) -> Iterator[tuple[int, int, list[tuple[Any, ...]]]]:
        """Read these objects; yields (objects, bytes, the values of Faults)."""
        found = (self._read(name, number) for name, number in objects)
        faults = [fault for fault in found if fault is not None]
        yield len(objects), sum(_stated_size(name) for name, _ in objects), faults

    def finish(self) -> None:
        """Nothing is left to do."""

    def _read(self, name: str, number: int) -> tuple[Any, ...] | None:
        path = f"objects/{name}"
        try:
            fd = os.open(path, inode.OPEN_TO_READ, dir_fd=self._pool.fd)
        except FileNotFoundError:
            return None
        except OSError as error:
            return path, number, f"it cannot be opened: {error.strerror}"
        try:
            reason = _reason(name, fd)
            is_sound = not reason
            if is_sound and inode.is_immutable(fd):
                return None
            return path, number, reason or THAWED, is_sound, os.fstat(fd).st_nlink - 1
        finally:
            os.close(fd)


def _reason(name: str, fd: int) -> str:
    try:
        return find_fault(name, fd)
    except ValueError:
        return "its name is no object's"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
