"""Puts right what a killed program left in the pool's stage.

A stage folder whose flock can be had belongs to nobody any more. Its intents name the objects that
may be thawed and the guests that may be frozen; its other entries are links and copies that no
guest knows.
"""

import fcntl
import logging
import os
import time
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager, suppress

from vstore import freezer, inode, lease
from vstore.digest import digest_content
from vstore.errors import PoolBusy, ToolError
from vstore.objectlock import ObjectLocks
from vstore.pool import Identity, Pool, digest_xattrs, parse_object
from vstore.record import dataclass, field
from vstore.repel import repel_writers
from vstore.window import CGROUP_INTENT, OBJECTS_INTENT, Windows, parse_intent

log = logging.getLogger(__name__)

_LOCK_WAIT_S = 5.0
_MEND_S = 1.0
_EVERYTHING = range(1 << 64)


def recover(pool: Pool) -> None:
    """Settle every stage folder that its program left behind. The pool's lock is held, shared or
    not.

    Raises OSError where the stage itself cannot be read.
    """
    try:
        stage = os.open("stage", inode.OPEN_FOLDER, dir_fd=pool.fd)
    except FileNotFoundError:
        return
    try:
        for name in os.listdir(stage):  # noqa: PTH208 - a descriptor
            _recover_folder(pool, f"stage/{name}")
    finally:
        os.close(stage)


def settle_stage(pool: Pool, stage_fd: int, leased: Sequence[int] = ()) -> bool:
    """Empty one worker's stage folder: objects that were left thawed are frozen, spares go, guests
    run again. In this order, and no step keeps the next ones from being done.

    `leased` are descriptors of inodes whose leases the dead worker's keeper still holds: nobody
    wrote to them. Returns whether all is settled; if not, the folder's intents stay and say what is
    to be done.
    """
    settling = _Settling(pool, stage_fd)
    settling.freeze_leased(leased)
    with settling.step("the stage cannot be read"):
        settling.read_stage()
        with own_windows(pool) as windows:
            settling.settle_objects(windows)
            settling.remove_spares(windows)
    settling.thaw_guests()
    if settling.is_complete:
        with settling.step("the stage cannot be emptied"):
            for name in settling.intents:
                os.unlink(name, dir_fd=stage_fd)
    return settling.is_complete


def is_sound(name: str, fd: int) -> bool:
    """Whether the inode behind `fd` is what the object name says, by reading all of it.

    Raises OSError, ValueError.
    """
    identity, _ = parse_object(name.split("/")[1])
    return _has_metadata(identity, fd) and _has_content(identity, fd)


@contextmanager
def own_windows(pool: Pool, stage_fd: int | None = None) -> Iterator[Windows]:
    """Windows of this process that nobody keeps: for repairs, where no worker is.

    Without `stage_fd` no intent is made: there is one already.
    """
    windows = Windows(None, pool_fd=pool.fd, stage_fd=stage_fd, linger_s=0.0)
    try:
        yield windows
    finally:
        windows.close()


def _has_metadata(identity: Identity, fd: int) -> bool:
    status = os.fstat(fd)
    found = (status.st_size, status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns)
    return (
        found == (identity.size, identity.mode, identity.uid, identity.gid, identity.mtime_ns)
        and digest_xattrs(fd) == identity.xattrs
    )


def _has_content(identity: Identity, fd: int) -> bool:
    return digest_content(fd, os.fstat(fd)) == identity.digest


@dataclass(slots=True)
class _Settling:
    """The steps by which one stage folder is settled, and how far that got."""

    pool: Pool
    stage_fd: int
    is_complete: bool = True
    intents: list[str] = field(default_factory=list)
    _numbers: set[int] = field(default_factory=set)
    _trusted: set[int] = field(default_factory=set)
    _cgroups: list[str] = field(default_factory=list)
    _spares: list[str] = field(default_factory=list)

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, ToolError) as error:
            self.is_complete = False
            log.warning("%s: %s: %s", self.pool.path, what, error)

    def freeze_leased(self, leased: Sequence[int]) -> None:
        """Freeze the objects among the leased inodes, those first that nobody has locked."""
        if not leased:
            return
        objects: Container[int] = _EVERYTHING  # an undeletable file is better than a changed one
        with self.step("the objects cannot be listed"):
            objects = self.pool.load_numbers()
        with self.step("objects cannot be locked"):
            locks = ObjectLocks(self.pool.fd)
            try:
                locked = [fd for fd in leased if os.fstat(fd).st_ino in objects]
                for wait_s in (0.0, _LOCK_WAIT_S):
                    locked = [fd for fd in locked if not self._freeze(fd, locks, wait_s)]
            finally:
                locks.close()

    def _freeze(self, fd: int, locks: ObjectLocks, wait_s: float) -> bool:
        """Freeze a leased object; False where another program holds its lock, which may have a
        window open.
        """
        number = os.fstat(fd).st_ino
        if not inode.is_immutable(fd) and not locks.try_take(number, wait_s=wait_s) and not wait_s:
            return False
        try:
            inode.set_immutable(fd)
            if not lease.is_unbroken(fd):
                repel_writers(fd)
            self._trusted.add(number)
        except (OSError, ToolError) as error:
            self.is_complete = False
            os.dup(fd)  # keeps the lease as long as this process lives
            log.error("a shared file's window cannot be closed: %s; its lease is kept", error)
        return True

    def read_stage(self) -> None:
        for name in _list_folder(self.stage_fd):
            if name.startswith(CGROUP_INTENT.decode()):
                self._cgroups.append(os.readlink(name, dir_fd=self.stage_fd))
                self.intents.append(name)
            elif name.startswith(OBJECTS_INTENT.decode()):
                text = os.fsencode(os.readlink(name, dir_fd=self.stage_fd))
                self._numbers.update(parse_intent(text))
                self.intents.append(name)
            else:
                self._spares.append(name)

    def settle_objects(self, windows: Windows) -> None:
        if not self._numbers:
            return
        for name, number in self.pool.list_objects():
            if number in self._numbers:
                with self.step(f"object {name} cannot be settled"):
                    _settle_object(self.pool, windows, name, is_trusted=number in self._trusted)

    def remove_spares(self, windows: Windows) -> None:
        for name in self._spares:
            with self.step(f"{name} cannot be removed from the stage"):
                _remove_spare(windows, self.stage_fd, name)

    def thaw_guests(self) -> None:
        for path in self._cgroups:
            freezer.thaw(path)


def _list_folder(fd: int) -> list[str]:
    """What is in the folder behind `fd` now: btrfs shows a descriptor what was there when it was
    opened.
    """
    fresh_fd = os.open(".", inode.OPEN_FOLDER, dir_fd=fd)
    try:
        return os.listdir(fresh_fd)  # noqa: PTH208 - a descriptor
    finally:
        os.close(fresh_fd)


def _settle_object(pool: Pool, windows: Windows, name: str, *, is_trusted: bool) -> None:
    """Freeze the object at `name` if nobody can have changed it; else it goes to quarantine.

    `is_trusted`: its lease was never given up, so its content need not be read.
    """
    identity, _ = parse_object(name.split("/")[1])
    fd = pool.open_object(name)
    with windows.guard([fd]) as refused:
        windows.freeze(fd)
        if is_trusted or not refused:
            if _is_mended(windows, identity, fd) and (is_trusted or _has_content(identity, fd)):
                return
            reason = "its content or metadata are not what its name says"
        elif lease.is_being_broken(fd):
            raise PoolBusy("another program has just had a window on it")
        else:
            reason = "somebody has it open for writing"
        with windows.thawed(fd):
            pool.quarantine(name, reason)


def _is_mended(windows: Windows, identity: Identity, fd: int) -> bool:
    """Whether the frozen object has the metadata that its name states, put back if need be: again
    and again for a while, since whoever changed them may do so in these windows too.
    """
    deadline = time.monotonic() + _MEND_S
    while not (_is_plain(fd) and _has_metadata(identity, fd)):
        if time.monotonic() > deadline or not _can_mend(identity, fd):
            return _has_metadata(identity, fd)
        with suppress(OSError), windows.thawed(fd):
            _mend(identity, fd)
    return True


def _is_plain(fd: int) -> bool:
    return not inode.get_flags(fd) & inode.CHOSEN_FLAGS and not inode.project_id(fd)


def _can_mend(identity: Identity, fd: int) -> bool:
    """A name states a digest of the extended attributes, from which no lost one comes back."""
    return not identity.xattrs or digest_xattrs(fd) == identity.xattrs


def _mend(identity: Identity, fd: int) -> None:
    """Put the thawed inode's metadata right, and freeze it before anybody can come in between."""
    xattrs = inode.load_xattrs(fd) if identity.xattrs else {}
    os.fchown(fd, identity.uid, identity.gid)  # drops setuid bits and file capabilities, so first
    inode.store_xattrs(fd, xattrs)
    os.fchmod(fd, identity.mode & 0o7777)
    if inode.project_id(fd):
        inode.put_project_id(fd, 0)
    os.utime(fd, ns=(os.fstat(fd).st_atime_ns, identity.mtime_ns))
    inode.put_flags(fd, (inode.get_flags(fd) | inode.FS_IMMUTABLE_FL) & ~inode.CHOSEN_FLAGS)


def _remove_spare(windows: Windows, stage_fd: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=stage_fd)
    except PermissionError as error:  # a link to an object that is frozen again
        fd = os.open(name, inode.OPEN_TO_READ, dir_fd=stage_fd)
        with windows.guard([fd]) as refused:
            if refused:
                raise PoolBusy("somebody has the shared file open for writing") from error
            with windows.thawed(fd):
                os.unlink(name, dir_fd=stage_fd)


def _recover_folder(pool: Pool, name: str) -> None:
    try:
        top = os.open(name, inode.OPEN_FOLDER, dir_fd=pool.fd)
    except OSError:
        return  # its program has just removed it
    try:
        fcntl.flock(top, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _empty_folder(pool, top):
            os.rmdir(name, dir_fd=pool.fd)
            log.info("%s/%s: left by a program that was killed; put right", pool.path, name)
    except (BlockingIOError, FileNotFoundError):
        pass  # its program lives, or has just removed it
    except OSError as error:
        log.warning("%s/%s: cannot be put right: %s", pool.path, name, error.strerror)
    finally:
        os.close(top)


def _empty_folder(pool: Pool, top: int) -> bool:
    is_complete = True
    for part in _list_folder(top):
        stage_fd = os.open(part, inode.OPEN_FOLDER, dir_fd=top)
        try:
            is_settled = settle_stage(pool, stage_fd)
        finally:
            os.close(stage_fd)
        if is_settled:
            os.rmdir(part, dir_fd=top)
        is_complete &= is_settled
    return is_complete
