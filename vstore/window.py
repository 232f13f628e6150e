"""Thaw windows: the only moments in which a shared inode is not immutable, and the only code that
clears the flag.

A window on an object goes: lock the object against other windows; note the intent; take a read
lease and hand a copy of its descriptor to the keeper; thaw, do the one thing, freeze; ask whether
anybody wanted to write meanwhile. Whoever opened the object for writing inside the window passed
the check for the flag and now waits for our lease: `vstore.repel` turns him away. Nobody ever gets
a descriptor that can write to shared bytes.

The holder opens windows. The keeper, its parent, holds every lease too: if the holder is killed the
lease lives on, the keeper freezes, turns the waiters away and lets go.
"""

import errno
import fcntl
import logging
import os
import resource
import socket
import stat
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

from vstore import freezer, inode, lease
from vstore.errors import NoSpace, NotPermitted, PoolBusy, ToolError
from vstore.keeper import CGROUPS, tell
from vstore.keeper import Keeper as Keeper
from vstore.look import Look
from vstore.objectlock import ObjectLocks
from vstore.repel import Attack, repel_writers

log = logging.getLogger(__name__)

LINGER_S: Final = 2.0
"""How long a lease outlives its window where a guest runs."""

OBJECTS_INTENT: Final = b"intent-"
"""A symlink of this kind in a stage folder names, in its text, the inode numbers of objects that
may be thawed.
"""
CGROUP_INTENT: Final = b"cgroup-"
"""A symlink of this kind leads to a cgroup that may be frozen."""

_FLAGS: Final = struct.Struct("=II")
_NAMES_AN_INTENT: Final = 40  # a symlink's text has at most 1,024 bytes on xfs
_LINGER_LIMIT: Final = 4096
_PUT_RIGHT_S: Final = 1.0
_SHORT_BREAK_TIME_S: Final = 10


def _clear_immutable(fd: int) -> None:
    fcntl.ioctl(
        fd, inode.FS_IOC_SETFLAGS, _FLAGS.pack(inode.get_flags(fd) & ~inode.FS_IMMUTABLE_FL, 0)
    )


def thaw_private(fd: int) -> None:
    """Clear the immutable flag of an inode that has one name only and so is shared with nobody.

    Raises NotPermitted when it has more; OSError as `inode.put_flags`.
    """
    status = os.fstat(fd)
    if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
        raise NotPermitted(
            "the file has several names, which may belong to other guests",
            hint="give one guest a private copy with: vpool break PATH",
        )
    _clear_immutable(fd)


class Windows:
    """Opens windows for one process.

    `keeper` is the holder's end of a Keeper's socket, None where nobody keeps; `pool_fd` the pool's
    folder; `stage_fd` the folder for intents, None where they are there already. `linger_s` is how
    long a lease outlives its window, for a task that was preempted between the check of the flag
    and the lease: 0 where no process of a guest can reach the objects because no guest runs. A
    function is asked anew for each batch.
    """

    def __init__(
        self,
        keeper: socket.socket | None,
        *,
        pool_fd: int,
        stage_fd: int | None,
        linger_s: float | Callable[[], float],
    ) -> None:
        lease.ignore_break_signals()
        self._keeper = keeper
        self._locks = ObjectLocks(pool_fd)
        self._stage_fd = stage_fd
        self._ask_linger_s = linger_s if callable(linger_s) else lambda: linger_s
        self._longest_linger_s = _find_longest_linger()
        self._linger_s = 0.0
        self._most_lingering = find_linger_limit()
        self._lingering: deque[tuple[float, bytes, list[int], list[bytes]]] = deque()
        self._lingering_fds = 0
        self._unsettled: set[int] = set()  # thawed, or frozen while somebody still waits
        self._kept: set[int] = set()  # of them those whose batch is over
        self._is_doubtful = False
        self.has_doubts = False
        """Whether intents were left for recovery; who has them settled says False."""
        self._is_holding = False
        self._live: set[bytes] = set()  # intents of leases that linger
        self._over: list[bytes] = []  # intents that are removed when guests run again
        self._count = 0
        self._token = os.urandom(4).hex().encode()
        self.attacks: list[Attack] = []

    @contextmanager
    def guard(self, fds: Sequence[int]) -> Iterator[set[int]]:
        """Lock and lease the inodes behind `fds` (each once), and note that they may be thawed.

        Yields the descriptors whose lease was refused: these inodes are open for writing and must
        be left alone. Afterwards the leases are given up, at once or after lingering, the intent
        with them, and the descriptors closed. Where an inode could not be frozen again, or somebody
        who waits to write to it not be turned away, its lease is kept and the intent stays for
        recovery. Raises PoolBusy, NoSpace, OSError.
        """
        self.make_room()
        self._linger_s = self._find_linger_s()
        self._is_doubtful = False
        numbers = sorted([os.fstat(fd).st_ino for fd in fds])
        key = self._next_key()
        kept: set[int] = set()
        try:
            self._locks.take(numbers)
            refused = {fd for fd in fds if not lease.take(fd)}
            leased = [fd for fd in fds if fd not in refused]
            intents = self._note_intents(key, numbers)
            try:
                self._tell(b"+" + key, leased)
                yield refused
            finally:
                kept = self._let_go(key, leased, intents)
        finally:
            self._locks.drop()
            closing = [fd for fd in fds if fd not in kept]
            self._unsettled.difference_update(closing)
            for fd in closing:
                os.close(fd)

    @contextmanager
    def thawed(self, fd: int, *, look: Look | None = None) -> Iterator[None]:
        """The window itself: inside, the guarded inode behind `fd` is not immutable.

        However the block ends the inode is frozen again, whoever waits to write is turned away, and
        mode, owner, times, xattrs, flags and project id are as before, or like `look`. Raises
        OSError; PoolBusy as `repel_writers`, or when somebody keeps on changing them.
        """
        wanted = look or (Look.at(fd) if self._linger_s else None)
        self._unsettled.add(fd)
        try:
            _clear_immutable(fd)
            yield
        finally:
            self.freeze(fd)
            if wanted is not None and (now := Look.at(fd)) != wanted:
                if look is None:
                    log.warning(
                        "attack: a shared file's metadata were changed inside a window; put back"
                    )
                self._put_right(fd, now, wanted)

    def freeze(self, fd: int) -> None:
        """Freeze the guarded inode behind `fd` and turn away whoever waits to write to it."""
        self._unsettled.add(fd)
        inode.set_immutable(fd)
        if not lease.is_unbroken(fd):
            self.attacks += repel_writers(fd)
        self._unsettled.discard(fd)

    def _put_right(self, fd: int, now: Look, wanted: Look) -> None:
        """Undo what somebody did in a window; he may do it again in the ones that this takes.

        Nobody does it later: the kernel looks at the flag and changes metadata under one lock of
        the inode, which freezing takes too (`vfs_fileattr_set` and `notify_change`).
        """
        deadline = time.monotonic() + _PUT_RIGHT_S
        while now != wanted:
            if time.monotonic() > deadline:
                self._is_doubtful = True
                raise PoolBusy(
                    f"inode {os.fstat(fd).st_ino}: somebody keeps on changing a shared file's "
                    "metadata",
                    hint="end that process; the next run puts the file right",
                )
            self._unsettled.add(fd)
            try:
                _clear_immutable(fd)
                wanted.put_back(fd, now)
            except OSError as error:
                log.debug("metadata cannot be put right: %s", error)
            finally:
                self.freeze(fd)
            now = Look.at(fd)

    def linger(self, fds: Sequence[int]) -> None:
        """Keep leases that another holder had, now dead, for as long as our own outlive their
        windows. The descriptors belong to this from now on. Raises PoolBusy, OSError.
        """
        key = self._next_key()
        self._linger_s = self._find_linger_s()
        intents: list[bytes] = []
        try:
            intents = self._note_intents(key, sorted([os.fstat(fd).st_ino for fd in fds]))
            self._tell(b"+" + key, fds)
        finally:
            kept = self._let_go(key, list(fds), intents)
            for fd in fds:
                if fd not in kept:
                    os.close(fd)

    @contextmanager
    def holding(self, cgroups: Mapping[str, int]) -> Iterator[None]:
        """Note that these cgroups (path -> open `cgroup.freeze`) may be frozen:

        if we die inside, they run again. Those that the administrator has frozen are left out.
        No file is deleted meanwhile: on xfs that may wait until many that were before it are gone.
        Raises PoolBusy, NoSpace, OSError.
        """
        ours = {path: fd for path, fd in cgroups.items() if not freezer.is_frozen(fd)}
        intents = self._symlink(
            {b"%s%d" % (CGROUP_INTENT, at): os.fsencode(path) for at, path in enumerate(ours)}
        )
        self._is_holding = True
        try:
            if ours:
                self._tell(b"+" + CGROUPS, list(ours.values()))
            yield
        finally:
            self._is_holding = False
            if ours:
                self._tell(b"-" + CGROUPS, ())
            self._unlink([*intents, *self._over])
            self._over.clear()

    # --- leases that outlive their windows

    def make_room(self) -> None:
        """Let leases go whose time is over; wait for some where too many linger.

        Called before a guest is held still, so that `guard` need not wait then.
        """
        self._expire(time.monotonic())
        while self._lingering_fds > self._most_lingering:
            self._wait_and_expire()

    def idle(self) -> float | None:
        """Let leases go whose time is over; returns in how many seconds the next ones are due, None
        where none linger.
        """
        self._expire(time.monotonic())
        return max(0.0, self._lingering[0][0] - time.monotonic()) if self._lingering else None

    @property
    def next_due(self) -> float | None:
        """When the next leases are to be let go (monotonic clock); None where none linger."""
        return self._lingering[0][0] if self._lingering else None

    def let_all_go(self) -> None:
        """Let the lingering leases go, each in its time: before this process is busy for long."""
        while self._lingering:
            self._wait_and_expire()

    def close(self) -> None:
        """Let the lingering leases go, each in its time. No window can be opened after that."""
        self.let_all_go()
        for fd in sorted(self._kept):
            if self._settle(fd):
                self._give_up(fd)
                os.close(fd)
                self._kept.discard(fd)
        self._locks.close()

    def _next_key(self) -> bytes:
        self._count += 1
        return b"%d" % self._count

    def _find_linger_s(self) -> float:
        return min(self._ask_linger_s(), self._longest_linger_s)

    def _wait_and_expire(self) -> None:
        time.sleep(max(0.0, self._lingering[0][0] - time.monotonic()))
        self._expire(time.monotonic())

    def _expire(self, now: float) -> None:
        while self._lingering and self._lingering[0][0] <= now:
            _, key, fds, intents = self._lingering.popleft()
            self._lingering_fds -= len(fds)
            self._is_doubtful = False
            kept = self._release(key, fds)
            for fd in fds:
                if fd not in kept:
                    os.close(fd)
            self._live.difference_update(intents)
            self._end_intents(intents)

    def _let_go(self, key: bytes, fds: list[int], intents: list[bytes]) -> set[int]:
        """End a batch; returns the descriptors that must stay open."""
        linger_s = self._linger_s or self._find_linger_s()  # a guest may have been started
        if not linger_s:
            kept = self._release(key, fds)
            self._end_intents(intents)
            return kept
        for fd in self._unsettled.intersection(fds):
            self._is_doubtful |= not self._settle(fd)
        if self._is_doubtful:
            self._end_intents(intents)
            intents = []
        self._live.update(intents)
        self._lingering.append((time.monotonic() + linger_s, key, fds, intents))
        self._lingering_fds += len(fds)
        return set(fds)

    def _release(self, key: bytes, fds: list[int]) -> set[int]:
        """Give leases up, save those that must not be; returns their descriptors."""
        kept = set()
        for fd in fds:
            if self._settle(fd):
                self._give_up(fd)
            else:
                kept.add(fd)
        if kept:
            self._kept |= kept
            self._is_doubtful = True
        else:
            self._tell(b"-" + key, ())
        return kept

    def _give_up(self, fd: int) -> None:
        """Release a lease; one that the kernel has broken by force leaves its intent behind, so
        that the next run looks at the object.
        """
        try:
            lease.release(fd)
        except BlockingIOError:
            self._is_doubtful = True
            log.error(
                "inode %d: the kernel broke the lease of a shared file by force, somebody may be "
                "writing to it; vpool verify --repair looks whether it changed",
                os.fstat(fd).st_ino,
            )

    def _settle(self, fd: int) -> bool:
        """Whether the lease on the inode behind `fd` can be given up, after a last look."""
        try:
            if fd in self._unsettled:
                self.freeze(fd)
            elif not lease.is_unbroken(fd) and inode.is_immutable(fd):
                self.attacks += repel_writers(fd)
        except (OSError, ToolError) as error:
            log.error("a shared file's window cannot be closed: %s; its lease is kept", error)
            self._unsettled.add(fd)
            return False
        return True

    # --- notes for those who come after us

    def is_live(self, intent: bytes) -> bool:
        """Whether that is one of ours, of a window that is over and in which nothing is amiss."""
        return intent in self._live

    def _end_intents(self, names: list[bytes]) -> None:
        """The leases of a batch are given up; what is doubtful is left to recovery."""
        if self._is_doubtful:
            self.has_doubts = True
        elif self._is_holding:
            self._over += names
        else:
            try:
                self._unlink(names)
            except OSError as error:  # a full btrfs, say; recovery removes it
                self.has_doubts = True
                log.warning("a note of a window cannot be removed: %s", error)

    def _note_intents(self, key: bytes, numbers: Sequence[int]) -> list[bytes]:
        return self._symlink(
            {
                b"%s%s-%s-%d" % (OBJECTS_INTENT, self._token, key, start): b",".join(
                    [b"%d" % number for number in numbers[start : start + _NAMES_AN_INTENT]]
                )
                for start in range(0, len(numbers), _NAMES_AN_INTENT)
            }
        )

    def _symlink(self, texts: Mapping[bytes, bytes]) -> list[bytes]:
        """Make symlinks in the stage, all or none; returns their names."""
        made: list[bytes] = []
        if self._stage_fd is None:
            return made
        try:
            for name, text in texts.items():
                os.symlink(text, name, dir_fd=self._stage_fd)
                made.append(name)
        except OSError as error:
            self._unlink(made)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise NoSpace(
                "the pool's stage: no room to note which files are worked on",
                hint="free some space, e.g. with: vpool reclaim",
            ) from error
        return made

    def _unlink(self, names: Sequence[bytes]) -> None:
        for name in names:
            os.unlink(name, dir_fd=self._stage_fd)

    def _tell(self, message: bytes, fds: Sequence[int]) -> None:
        if self._keeper is not None:
            tell(self._keeper, message, fds)


def find_linger_limit() -> int:
    """How many leases may linger: this process and its keeper have a descriptor for each."""
    return min(_LINGER_LIMIT, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8)


def _find_longest_linger() -> float:
    """Lingering has to end well before the kernel breaks a lease by force."""
    break_time_s = lease.break_time_s()
    if 0 < break_time_s < _SHORT_BREAK_TIME_S:
        log.warning(
            "/proc/sys/fs/lease-break-time is %d seconds: too short to be sure of turning away "
            "whoever wants to write to shared files; 45 is usual",
            break_time_s,
        )
    return break_time_s / 4 if break_time_s else LINGER_S


def parse_intent(text: bytes) -> list[int]:
    """The inode numbers that an intent names; those that cannot be read are left out."""
    return [int(word) for word in text.split(b",") if word.isdigit()]
