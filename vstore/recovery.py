"""Puts right what a killed program left in the pool's stage.

A stage folder whose flock can be had belongs to nobody any more. Its intents name the objects that
may be thawed and the guests that may be frozen; its other entries are links and copies that no
guest knows, or what `stray` gives back to one.
"""

import fcntl
import logging
import os
import time
from collections.abc import Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from vstore import freezer, inode, lease, stray
from vstore.digest import digest_content
from vstore.errors import PoolBusy, ToolError
from vstore.hold import find_linger_s
from vstore.look import Look
from vstore.objectlock import ObjectLocks
from vstore.pool import Identity, Pool, digest_xattrs, parse_object
from vstore.record import dataclass, field
from vstore.repel import repel_writers
from vstore.window import CGROUP_INTENT, OBJECTS_INTENT, Windows, parse_intent

log = logging.getLogger(__name__)

_LOCK_WAIT_S = 5.0
_LEASE_WAIT_S = 1.0
_LEASE_PAUSE_S = 0.01
_EVERYTHING = range(1 << 64)


def recover(pool: Pool, windows: Windows) -> bool:
    """Settle every stage folder that its program left behind; whether all of them are. The pool's
    lock is held, shared or not.

    `windows` make notes of their own: those that are found go before the leases do. Raises OSError
    where the stage itself cannot be read.
    """
    is_complete = True
    with leftovers(pool) as found:
        for left in found:
            for _ in left.settle(windows):
                pass
            is_complete &= left.remove()
    return is_complete


def settle_stage(
    pool: Pool, stage_fd: int, leased: Sequence[int] = (), windows: Windows | None = None
) -> bool:
    """Empty one worker's stage folder: objects that were left thawed are frozen, spares go, guests
    run again. In this order, and no step keeps the next ones from being done.

    `leased` are descriptors of inodes whose leases the dead worker's keeper still holds: nobody
    wrote to them. `windows` are the caller's, where somebody keeps them. Returns whether all is
    settled; if not, the folder's intents stay and say what is to be done.
    """
    settling = _Settling(pool, stage_fd)
    settling.freeze_leased(leased)
    with settling.step("the stage cannot be read"), _opened(pool, windows, settling) as opened:
        for _ in settling.carry_out(opened):
            pass
    return settling.remove_notes()


def close_windows(pool: Pool, leased: Sequence[int]) -> None:
    """Freeze the objects among the inodes whose leases the keeper of a dead worker still holds. The
    notes of that are somebody else's, and stay.
    """
    settling = _Settling(pool, -1)
    settling.freeze_leased(leased)
    with settling.step("leases cannot be kept"), _opened(pool, None, settling) as opened:
        settling.let_linger(opened)


def is_sound(name: str, fd: int) -> bool:
    """Whether the inode behind `fd` is what the object name says, by reading all of it.

    Raises OSError, ValueError.
    """
    identity, _ = parse_object(name.split("/")[1])
    return _has_metadata(identity, fd) and _has_content(identity, fd)


def is_put_right(windows: Windows, name: str, fd: int, *, is_trusted: bool = False) -> bool:
    """Whether the guarded inode behind `fd` is what the object name says, after all that can be put
    right was, and is frozen. `is_trusted`: its content need not be read.

    Raises OSError, ValueError, PoolBusy.
    """
    identity, _ = parse_object(name.split("/")[1])
    windows.freeze(fd)
    return _is_mended(windows, identity, fd) and (is_trusted or _has_content(identity, fd))


@contextmanager
def _opened(pool: Pool, windows: Windows | None, settling: "_Settling") -> Iterator[Windows]:
    """These windows, or else some of this process that nobody keeps, and that make no intents:
    there is one already, which stays if they have doubts.
    """
    if windows is not None:
        yield windows
        return
    windows = Windows(None, pool_fd=pool.fd, stage_fd=None, linger_s=find_linger_s)
    try:
        yield windows
    finally:
        windows.close()
        settling.is_complete &= not windows.has_doubts


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
    _trusted: dict[int, int] = field(default_factory=dict)  # inode number -> descriptor
    _cgroups: list[str] = field(default_factory=list)
    _spares: list[str] = field(default_factory=list)

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, ToolError) as error:
            self.is_complete = False
            log.warning("%s: %s: %s", self.pool.path, what, error)

    def carry_out(self, windows: Windows) -> Iterator[None]:
        """All of it but the last: the notes stay. Gives the caller a turn after every object."""
        with self.step("the stage cannot be read"):
            self.read_stage(windows)
            yield from self.settle_objects(windows)
            self.remove_spares(windows)
            self.let_linger(windows)
        self.thaw_guests()

    def remove_notes(self) -> bool:
        """The last step, if all others could be taken; whether that is so."""
        if self.is_complete:
            with self.step("the stage cannot be emptied"):
                for name in self.intents:
                    os.unlink(name, dir_fd=self.stage_fd)
        return self.is_complete

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
            self._trusted[number] = fd
        except (OSError, ToolError) as error:
            self.is_complete = False
            os.dup(fd)  # keeps the lease as long as this process lives
            log.error("a shared file's window cannot be closed: %s; its lease is kept", error)
        return True

    def read_stage(self, windows: Windows) -> None:
        for name in _list_folder(self.stage_fd):
            if windows.is_live(os.fsencode(name)):
                continue
            if name.startswith(CGROUP_INTENT.decode()):
                self._cgroups.append(os.readlink(name, dir_fd=self.stage_fd))
                self.intents.append(name)
            elif name.startswith(OBJECTS_INTENT.decode()):
                text = os.fsencode(os.readlink(name, dir_fd=self.stage_fd))
                self._numbers.update(parse_intent(text))
                self.intents.append(name)
            else:
                self._spares.append(name)

    def settle_objects(self, windows: Windows) -> Iterator[None]:
        if not self._numbers:
            return
        for name, number in self.pool.list_objects():
            if number in self._numbers:
                with self.step(f"object {name} cannot be settled"):
                    _settle_object(self.pool, windows, name, is_trusted=number in self._trusted)
                yield

    def remove_spares(self, windows: Windows) -> None:
        for name in self._spares:
            with self.step(f"{name} cannot be removed from the stage"):
                stray.give_back(self.pool.fd, self.stage_fd, os.fsencode(name))
                _remove_spare(windows, self.stage_fd, name, self._trusted)

    def let_linger(self, windows: Windows) -> None:
        """Somebody may be late for a lease that its holder has left behind."""
        with self.step("leases cannot be kept"):
            held = [fd for fd in self._trusted.values() if lease.is_held(fd)]
            windows.linger([os.dup(fd) for fd in held])

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
    deadline = time.monotonic() + _LEASE_WAIT_S
    while not _is_settled(pool, windows, name, is_trusted, deadline):
        time.sleep(_LEASE_PAUSE_S)


def _is_settled(pool: Pool, windows: Windows, name: str, is_trusted: bool, deadline: float) -> bool:
    """False: somebody has it open for writing, and may only be on his way out: who waited in a
    lease and was turned away is counted as a writer until he has had his turn.
    """
    fd = pool.open_object(name)
    with windows.guard([fd]) as refused:
        if is_trusted or not refused:
            if is_put_right(windows, name, fd, is_trusted=is_trusted):
                return True
            reason = "its content or metadata are not what its name says"
        else:
            windows.freeze(fd)
            if lease.is_being_broken(fd):
                raise PoolBusy("another program has just had a window on it")
            if time.monotonic() < deadline:
                return False
            reason = "somebody has it open for writing"
        with windows.thawed(fd):
            pool.quarantine(name, reason)
    return True


def _is_mended(windows: Windows, identity: Identity, fd: int) -> bool:
    """Whether the frozen inode has the metadata that its name states, put right if need be."""
    now = Look.at(fd)
    if digest_xattrs(fd) == identity.xattrs:
        xattrs = now.xattrs
    elif not identity.xattrs:
        xattrs = {}
    else:
        return False  # the name states their digest, from which no lost one comes back
    flags = now.flags & ~inode.CHOSEN_FLAGS
    owner = identity.uid, identity.gid
    wanted = Look(identity.mode, owner, identity.mtime_ns, xattrs, flags, project=0)
    if now != wanted:
        try:
            with windows.thawed(fd, look=wanted):
                pass
        except (OSError, PoolBusy) as error:
            log.debug("inode %d: %s", os.fstat(fd).st_ino, error)
            return False
    return os.fstat(fd).st_size == identity.size


def _remove_spare(windows: Windows, stage_fd: int, name: str, trusted: Container[int]) -> None:
    try:
        os.unlink(name, dir_fd=stage_fd)
    except PermissionError as error:  # a link to an object that is frozen again
        fd = os.open(name, inode.OPEN_TO_READ, dir_fd=stage_fd)
        with windows.guard([fd]) as refused:
            if refused and os.fstat(fd).st_ino not in trusted:
                raise PoolBusy("somebody has the shared file open for writing") from error
            with windows.thawed(fd, look=Look.at(fd)):
                os.unlink(name, dir_fd=stage_fd)


class Leftover:
    """A stage folder that its program has left behind, locked."""

    def __init__(self, pool: Pool, name: str, fd: int) -> None:
        self._pool = pool
        self._name = name
        self._fd = fd
        self._parts: list[tuple[str, _Settling]] = []
        self._is_readable = True

    def settle(self, windows: Windows) -> Iterator[None]:
        """Settle all that is in it, but leave the notes of that. Gives the caller a turn after
        every object.
        """
        try:
            for part in _list_folder(self._fd):
                fd = os.open(part, inode.OPEN_FOLDER, dir_fd=self._fd)
                self._parts.append((part, _Settling(self._pool, fd)))
        except OSError as error:
            self._complain(error)
        for _, settling in self._parts:
            yield from settling.carry_out(windows)

    def remove(self) -> bool:
        """Remove the notes of what is settled, and the folder when it is empty; whether it is."""
        is_complete = self._is_readable
        try:
            for part, settling in self._parts:
                if settling.remove_notes():
                    os.rmdir(part, dir_fd=self._fd)
                is_complete &= settling.is_complete
            if is_complete:
                os.rmdir(self._name, dir_fd=self._pool.fd)
                log.info("%s/%s: left by a killed program; put right", self._pool.path, self._name)
        except OSError as error:
            self._complain(error)
        return is_complete and self._is_readable

    def close(self) -> None:
        for fd in (*(settling.stage_fd for _, settling in self._parts), self._fd):
            os.close(fd)

    def _complain(self, error: OSError) -> None:
        self._is_readable = False
        path = f"{self._pool.path}/{self._name}"
        log.warning("%s: cannot be put right: %s", path, error.strerror)


@contextmanager
def leftovers(pool: Pool) -> Iterator[list[Leftover]]:
    """The stage folders whose programs are dead. Raises OSError where the stage itself cannot be
    read.
    """
    with ExitStack() as stack:
        try:
            fd = os.open("stage", inode.OPEN_FOLDER, dir_fd=pool.fd)
        except FileNotFoundError:
            yield []
            return
        stack.callback(os.close, fd)
        found = []
        for name in os.listdir(fd):  # noqa: PTH208 - a descriptor
            left = _lock_left(pool, f"stage/{name}")
            if left is not None:
                stack.callback(left.close)
                found.append(left)
        yield found


def _lock_left(pool: Pool, name: str) -> Leftover | None:
    """None: its program lives, or has just removed it."""
    try:
        fd = os.open(name, inode.OPEN_FOLDER, dir_fd=pool.fd)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.stat(name, dir_fd=pool.fd, follow_symlinks=False)
    except OSError:
        os.close(fd)
        return None
    return Leftover(pool, name, fd)
