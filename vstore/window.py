"""Thaw windows: the only moments in which a shared inode is not immutable, and the only code that
clears the flag.

A window on an object goes: lock the object against other windows; note the intent; take a read
lease and hand a copy of its descriptor to the keeper; thaw, do the one thing, freeze; ask whether
anybody wanted to write meanwhile. Whoever opened the object for writing inside the window passed
the check for the flag and now waits for our lease: a process of a guest is killed and reported, any
other is turned away (stopped and continued, so that its call starts anew and meets the flag).
Nobody ever gets a descriptor that can write to shared bytes.

The holder opens windows. The keeper, its parent, holds every lease too: if the holder is killed the
lease lives on, the keeper freezes, turns the waiters away and lets go.
"""

import errno
import fcntl
import logging
import os
import secrets
import signal
import socket
import stat
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vstore import inode, lease
from vstore.errors import NotPermitted, PoolBusy

log = logging.getLogger(__name__)

OBJECTS_INTENT: Final = b"intent-"
"""A symlink of this kind in a stage folder names, in its text, the inode numbers of objects that
may be thawed.
"""
CGROUP_INTENT: Final = b"cgroup-"
"""A symlink of this kind leads to a cgroup that may be frozen."""

_FLAGS: Final = struct.Struct("=II")
_FLOCK: Final = struct.Struct("@hhqqi4x")  # struct flock of fcntl(2)
_FDS_A_MESSAGE: Final = 200  # the kernel passes at most 253
_NAMES_AN_INTENT: Final = 40  # a symlink's text has at most 1,024 bytes on xfs
_LINGER_LIMIT: Final = 512
_REPEL_TIMEOUT_S: Final = 20.0  # well below the 45 s after which the kernel breaks a lease by force


@dataclass(frozen=True, slots=True)
class Attack:
    """Somebody who wanted to write to a shared inode inside a window."""

    pid: int
    command: str
    is_guest: bool


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


# --- whoever waits in our lease
# ---------------------------------------------------------------------------


def repel_writers(fd: int) -> list[Attack]:
    """Turn everybody away who waits to write to the frozen inode behind `fd`, whose lease we hold.

    Raises PoolBusy when a waiter cannot be turned away in time: the inode must then not be trusted.
    """
    met: dict[int, Attack] = {}
    deadline = time.monotonic() + _REPEL_TIMEOUT_S
    while pids := lease.find_waiters(fd):
        for pid in pids:
            attack = _turn_away(pid, fd)
            if attack is not None:
                met[pid] = attack
        if time.monotonic() > deadline:
            raise PoolBusy(
                f"processes {pids} wait to write to a shared file and cannot be turned away"
            )
    for attack in met.values():
        log.warning(
            "attack: process %d (%s) tried to open a shared file for writing inside a window; %s",
            attack.pid,
            attack.command,
            "killed" if attack.is_guest else "turned away",
        )
    return list(met.values())


def _turn_away(pid: int, fd: int) -> Attack | None:
    try:
        process = os.pidfd_open(pid)
    except OSError:
        return None  # gone already
    try:
        attack = Attack(pid, _read_proc(pid, "comm"), "/vservers/" in _read_proc(pid, "cgroup"))
        if attack.is_guest:
            signal.pidfd_send_signal(process, signal.SIGKILL)
        else:
            signal.pidfd_send_signal(process, signal.SIGSTOP)
        _wait_until_gone(pid, fd)
        if not attack.is_guest:
            signal.pidfd_send_signal(process, signal.SIGCONT)
    except ProcessLookupError:
        return None
    finally:
        os.close(process)
    return attack


def _wait_until_gone(pid: int, fd: int) -> None:
    for _ in range(200):
        if pid not in lease.find_waiters(fd):
            return
        time.sleep(0.001)


def _read_proc(pid: int, name: str) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace").strip()
    return "?"


# --- what a window must not change
# ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Look:
    """All of an inode that a process could change without opening it for writing."""

    status: tuple[int, int, int, int]  # mode, uid, gid, mtime_ns
    xattrs: dict[bytes, bytes]
    flags: int
    project: int

    @classmethod
    def at(cls, fd: int) -> "_Look":
        status = os.fstat(fd)
        return cls(
            (status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns),
            inode.load_xattrs(fd),
            inode.get_flags(fd) | inode.FS_IMMUTABLE_FL,
            inode.project_id(fd),
        )

    def put_back(self, fd: int) -> None:
        mode, uid, gid, mtime_ns = self.status
        os.fchown(fd, uid, gid)
        os.fchmod(fd, mode & 0o7777)
        inode.store_xattrs(fd, self.xattrs)
        os.fchmod(fd, mode & 0o7777)
        os.utime(fd, ns=(os.fstat(fd).st_atime_ns, mtime_ns))
        inode.put_flags(fd, self.flags)


# --- the keeper's side
# ------------------------------------------------------------------------------------


class Keeper:
    """The parent's copy of every lease and every frozen cgroup that one holder has."""

    def __init__(self) -> None:
        self._socket, self.holder_socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        self._held: dict[bytes, list[int]] = {}

    def drain(self) -> None:
        """Take in what the holder has said; never waits."""
        with suppress(BlockingIOError, ConnectionResetError):
            while self._receive():
                pass

    def _receive(self) -> bool:
        message, fds, _, _ = socket.recv_fds(self._socket, 64, 253)
        word, key = message[:1], message[1:]
        if word == b"-":
            for fd in self._held.pop(key, ()):
                os.close(fd)
        elif word:
            self._held.setdefault(key, []).extend(fds)
        return bool(word)

    def take_over(self, settle: Callable[[list[int]], None]) -> None:
        """The holder is dead: `settle` gets the descriptors of the leases that are still held; then
        all are let go.

        Guests that the holder had frozen run again.
        """
        self.drain()
        fds = [
            fd for key, group in self._held.items() if not key.startswith(b"cgroup") for fd in group
        ]
        try:
            settle(fds)
        finally:
            for key, group in self._held.items():
                for fd in group:
                    if key.startswith(b"cgroup"):
                        with suppress(OSError):
                            os.write(fd, b"0")
                    os.close(fd)
            self._held.clear()

    def close(self) -> None:
        """Let everything go; in a forked child this closes copies and changes nothing."""
        for fd in [fd for group in self._held.values() for fd in group]:
            os.close(fd)
        self._held.clear()
        self._socket.close()


# --- the holder's side
# ------------------------------------------------------------------------------------


class Windows:
    """Opens windows for one process.

    `keeper` is the holder's end of a Keeper's socket; `locks_fd` a file of the pool whose byte
    ranges are the locks of objects by inode number; `stage_fd` the folder for intents. `linger_s`
    is how long a lease outlives its window, for a task that was preempted between the check of the
    flag and the lease; 0 where no process of a guest can reach the objects because no guest runs.
    """

    def __init__(
        self, keeper: socket.socket, *, pool_fd: int, stage_fd: int, linger_s: float
    ) -> None:
        lease.ignore_break_signals()
        self._keeper = keeper
        # Locks belong to the open file description, so every process opens the file for itself.
        self._locks_fd = os.open(
            "windows", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=pool_fd
        )
        self._stage_fd = stage_fd
        self._linger_s = linger_s
        self._lingering: deque[tuple[float, bytes, list[int]]] = deque()
        self._count = 0
        self._token = secrets.token_hex(4).encode()
        self.attacks: list[Attack] = []

    @contextmanager
    def guard(self, fds: Sequence[int]) -> Iterator[set[int]]:
        """Lock and lease the inodes behind `fds` (each once), and note that they may be thawed.

        Yields the descriptors whose lease was refused: these inodes are open for writing and must
        be left alone. Afterwards the leases are given up, at once or after lingering, and the
        descriptors closed.
        """
        self._expire(time.monotonic())
        numbers = {os.fstat(fd).st_ino: fd for fd in fds}
        key = b"%d" % self._count
        self._count += 1
        self._lock(sorted(numbers))
        try:
            refused = {fd for fd in fds if not lease.take(fd)}
            intents = self._note_intents(key, sorted(numbers))
            self._tell(b"+" + key, [fd for fd in fds if fd not in refused])
            try:
                yield refused
            finally:
                self._let_go(key, [fd for fd in fds if fd not in refused])
                for name in intents:
                    os.unlink(name, dir_fd=self._stage_fd)
        finally:
            self._unlock()
            for fd in fds if not self._linger_s else refused:
                os.close(fd)

    @contextmanager
    def thawed(self, fd: int) -> Iterator[None]:
        """The window itself: inside, the guarded inode behind `fd` is not immutable.

        However the block ends the inode is frozen again, whoever waits to write is turned away, and
        mode, owner, times, xattrs, flags and project id are as before. Raises OSError; PoolBusy as
        `repel_writers`.
        """
        before = _Look.at(fd) if self._linger_s else None
        _clear_immutable(fd)
        try:
            yield
        finally:
            self.freeze(fd)
            while before is not None and _Look.at(fd) != before:
                log.warning(
                    "attack: a shared file's metadata were changed inside a window; put back"
                )
                _clear_immutable(fd)
                with suppress(OSError):
                    before.put_back(fd)
                self.freeze(fd)

    def freeze(self, fd: int) -> None:
        """Freeze the guarded inode behind `fd` and turn away whoever waits to write to it."""
        inode.set_immutable(fd)
        if not lease.is_unbroken(fd):
            self.attacks += repel_writers(fd)

    @contextmanager
    def holding(self, cgroups: Mapping[str, int]) -> Iterator[None]:
        """Note that these cgroups (path -> open `cgroup.freeze`) may be frozen:

        if we die inside, they run again.
        """
        if not cgroups:
            yield
            return
        intents = [b"%s%d" % (CGROUP_INTENT, number) for number in range(len(cgroups))]
        for name, path in zip(intents, cgroups, strict=True):
            os.symlink(os.fsencode(path), name, dir_fd=self._stage_fd)
        self._tell(b"+cgroup", list(cgroups.values()))
        try:
            yield
        finally:
            self._tell(b"-cgroup", ())
            for name in intents:
                os.unlink(name, dir_fd=self._stage_fd)

    def close(self) -> None:
        """Let the lingering leases go, each in its time."""
        while self._lingering:
            time.sleep(max(0.0, self._lingering[0][0] - time.monotonic()))
            self._expire(time.monotonic())

    def _let_go(self, key: bytes, fds: list[int]) -> None:
        if self._linger_s:
            self._lingering.append((time.monotonic() + self._linger_s, key, fds))
            return
        for fd in fds:
            lease.release(fd)
        self._tell(b"-" + key, ())

    def make_room(self) -> None:
        """Let leases go whose time is over; wait for some where too many linger."""
        self._expire(time.monotonic())

    def _expire(self, now: float) -> None:
        while self._lingering and self._lingering[0][0] <= now:
            _, key, fds = self._lingering.popleft()
            for fd in fds:
                if not lease.is_unbroken(fd) and inode.is_immutable(fd):
                    self.attacks += repel_writers(fd)
                lease.release(fd)
                os.close(fd)
            self._tell(b"-" + key, ())
        if sum(len(fds) for _, _, fds in self._lingering) > _LINGER_LIMIT:
            time.sleep(max(0.0, self._lingering[0][0] - now))
            self._expire(time.monotonic())

    def _note_intents(self, key: bytes, numbers: Sequence[int]) -> list[bytes]:
        names = []
        for start in range(0, len(numbers), _NAMES_AN_INTENT):
            name = b"%s%s-%s-%d" % (OBJECTS_INTENT, self._token, key, start)
            text = b",".join(b"%d" % number for number in numbers[start : start + _NAMES_AN_INTENT])
            os.symlink(text, name, dir_fd=self._stage_fd)
            names.append(name)
        return names

    def _tell(self, message: bytes, fds: Sequence[int]) -> None:
        try:
            if not fds:
                self._keeper.send(message)
            for start in range(0, len(fds), _FDS_A_MESSAGE):
                socket.send_fds(self._keeper, [message], fds[start : start + _FDS_A_MESSAGE])
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN):
                raise
            if message.startswith(b"+"):
                raise PoolBusy(
                    "the program that guards the leases was killed: no shared file is touched",
                    hint="run the command again: it puts right what was left behind",
                ) from error

    def _lock(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._set_lock(fcntl.F_WRLCK, number, 1)

    def _unlock(self) -> None:
        self._set_lock(fcntl.F_UNLCK, 0, 0)

    def _set_lock(self, kind: int, start: int, length: int) -> None:
        fcntl.fcntl(
            self._locks_fd, fcntl.F_OFD_SETLKW, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0)
        )


def parse_intent(text: bytes) -> list[int]:
    """The inode numbers that an intent names; those that cannot be read are left out."""
    return [int(word) for word in text.split(b",") if word.isdigit()]
