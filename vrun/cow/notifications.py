"""The kernel's side of a supervisor: calls of a guest that wait for an answer.

See seccomp_unotify(2), linux/seccomp.h. A notification is 80 bytes, which the kernel writes
straight into a page that is shared with the monitor: when this process is killed, its successor
finds the call that was in work there, since the kernel tells of each call once only.
"""

import errno
import fcntl
import mmap
import os
import struct
import time
from contextlib import suppress
from typing import Any, Final, NamedTuple

RECV: Final = 0xC0502100
SEND: Final = 0xC0182101
ID_VALID: Final = 0x40082102
ADDFD: Final = 0x40182103
SET_FLAGS: Final = 0x40082104

CONTINUE: Final = 1  # SECCOMP_USER_NOTIF_FLAG_CONTINUE
SYNC_WAKE_UP: Final = 1  # SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP, Linux 6.6
_ADDFD_SETFD: Final = 1

SIZE: Final = 80
_NOTIFICATION: Final = struct.Struct("=QIIiIQ6Q")
_RESPONSE: Final = struct.Struct("=QqiI")
_ADDED: Final = struct.Struct("=QIIII")
_ID: Final = struct.Struct("=Q")
_EMPTY: Final = bytes(SIZE)
_PAGE_SIZE: Final = 8192
"""fcntl.ioctl() hands buffers over 1,024 bytes to the kernel as they are, smaller ones by a copy
that a kill may catch half way."""

_go_on: Final = bytearray(_PAGE_SIZE)
"""The answer that lets a call go on; nothing but the call's id changes."""
_RESPONSE.pack_into(_go_on, 0, 0, 0, 0, CONTINUE)

_WHOSE: Final = struct.Struct("=i")
_WHOSE_PLACE: Final = 128
_DUE: Final = struct.Struct("=d")
_DUE_PLACE: Final = 136
_TRIED_PLACE: Final = 144
_RESULT: Final = struct.Struct("=qi")
_RESULT_PLACE: Final = 192
_BEGUN: Final = struct.Struct("=QQH")
_BEGUN_PLACE: Final = 224
_SLOTS_PLACE: Final = 256
_SLOT_SIZE: Final = 96
_SLOTS: Final = 40
_PATH_PLACE: Final = 4096


class Call(NamedTuple):
    """A call of a guest that waits for its answer."""

    id: int
    tid: int
    """The calling thread, as this process numbers it."""
    flags: int
    number: int
    arch: int
    instruction: int
    a0: int
    a1: int
    a2: int
    a3: int
    a4: int
    a5: int

    @property
    def arguments(self) -> tuple[int, ...]:
        return self[6:]


class Gone(Exception):
    """The caller does not wait any more: it was killed, or a signal interrupted it."""


class Begun(NamedTuple):
    """How far a call had got that may have been carried out, in part or by one who was killed."""

    ino: int
    """Of the inode that a name led to then."""
    copy_ino: int
    """Of the private copy for that name; 0 where the name was to get none."""
    path: bytes
    """The name, if it was found by a descriptor: that shows it no more when it has the copy."""


class Left(NamedTuple):
    """A call that was in work when the last supervisor was killed."""

    place: int
    """Of its listener among all."""
    call: Call
    result: tuple[int, int] | None
    """Value and errno, if it was done and perhaps not told yet."""
    begun: Begun | None
    slot: int
    """The slot of the page in which it is kept; 0: none."""
    is_overdue: bool
    """Whether it was being looked at when the supervisor's patience ended."""


class Page:
    """The call in work, in memory that outlives this process.

    bytes 0-79     the notification, as the kernel wrote it; all 0: there is none
    bytes 128-131  the place of its listener among all
    bytes 136-143  until when it may be looked at, by the monotonic clock; 0: as long as it takes
    bytes 144-151  the id of a call whose look was given up once
    bytes 192-211  a call's id and its result, once it is done and as long as it is not told
    bytes 224-249  a call's id, two inode numbers, a path's length: it is just being carried out
    bytes 256-     slots of 96 bytes: calls that wait for something, as in bytes 0-131 (place last)
    bytes 4096-    that path

    An id is written after what belongs to it: a kill may come between any two of them.
    """

    def __init__(self) -> None:
        """Shared with every process that is forked from this one."""
        self.memory = mmap.mmap(-1, _PAGE_SIZE)

    def note_result(self, call_id: int, value: int, error: int) -> None:
        """The call has been carried out."""
        _RESULT.pack_into(self.memory, _RESULT_PLACE + _ID.size, value, error)
        _ID.pack_into(self.memory, _RESULT_PLACE, call_id)

    def note_begun(self, call_id: int, begun: Begun) -> None:
        """What carries the call out comes next: the name will lead to another inode afterwards, to
        the copy if there is one, or to nothing.
        """
        ino, copy_ino, path = begun
        size = len(path)
        _ID.pack_into(self.memory, _BEGUN_PLACE, 0)
        self.memory[_PATH_PLACE : _PATH_PLACE + size] = path
        _BEGUN.pack_into(self.memory, _BEGUN_PLACE + _ID.size, ino, copy_ino, size)
        _ID.pack_into(self.memory, _BEGUN_PLACE, call_id)

    def note_due(self, due_s: float) -> None:
        """Until when the call in work may be looked at; 0: as long as it takes."""
        _DUE.pack_into(self.memory, _DUE_PLACE, due_s)

    def try_again(self, call_id: int) -> bool:
        """Note that the look at a call was given up; whether that was the first time."""
        (tried_id,) = _ID.unpack_from(self.memory, _TRIED_PLACE)
        _ID.pack_into(self.memory, _TRIED_PLACE, call_id)
        return bool(tried_id != call_id)

    def load_all(self) -> list[Left]:
        """The calls that were in work, first those that may have been carried out. Slots are theirs
        until they are forgotten.
        """
        (place,) = _WHOSE.unpack_from(self.memory, _WHOSE_PLACE)
        found = [self._load_left(0, place, 0)]
        for slot in range(1, _SLOTS + 1):
            at = _place_of(slot)
            (place,) = _WHOSE.unpack_from(self.memory, at + SIZE)
            found.append(self._load_left(at, place, slot))
        waiting = [left for left in found if left.call.id]
        return sorted(waiting, key=lambda left: left.result is None and left.begun is None)

    def _load_left(self, at: int, place: int, slot: int) -> Left:
        call = self._load(at)
        (done_id,) = _ID.unpack_from(self.memory, _RESULT_PLACE)
        (begun_id,) = _ID.unpack_from(self.memory, _BEGUN_PLACE)
        (due_s,) = _DUE.unpack_from(self.memory, _DUE_PLACE)
        result = _RESULT.unpack_from(self.memory, _RESULT_PLACE + _ID.size)
        ino, copy_ino, size = _BEGUN.unpack_from(self.memory, _BEGUN_PLACE + _ID.size)
        path = self.memory[_PATH_PLACE : _PATH_PLACE + size]
        return Left(
            place,
            call,
            (result[0], result[1]) if done_id == call.id else None,
            Begun(ino, copy_ino, path) if begun_id == call.id else None,
            slot,
            not slot and 0 < due_s <= time.monotonic(),
        )

    def _load(self, at: int) -> Call:
        return Call._make(_NOTIFICATION.unpack_from(self.memory, at))

    def keep(self, call: Call, place: int) -> int:
        """Keep a call until it is forgotten; the slot that it has got, 0 where none is free."""
        for slot in range(1, _SLOTS + 1):
            at = _place_of(slot)
            if not self._load(at).id:
                data = _NOTIFICATION.pack(*call)
                _WHOSE.pack_into(self.memory, at + SIZE, place)
                self.memory[at + _ID.size : at + SIZE] = data[_ID.size :]
                self.memory[at : at + _ID.size] = data[: _ID.size]
                return slot
        return 0

    def forget(self, slot: int) -> None:
        """The call of that slot has its answer, or is kept in another one; 0 is none."""
        if slot:
            at = _place_of(slot)
            self.memory[at : at + SIZE] = _EMPTY


def _place_of(slot: int) -> int:
    return _SLOTS_PLACE + (slot - 1) * _SLOT_SIZE


class Listener:
    """Where the calls under one filter wait. `fd` is what seccomp(2) gave."""

    def __init__(self, fd: int, page: Page, place: int = 0) -> None:
        """`place`: its number among all of the guest."""
        self.fd = fd
        self.place = place
        self.page = page
        self._memory = page.memory
        with suppress(OSError):  # an older kernel: 40 µs more for each call
            fcntl.ioctl(fd, SET_FLAGS, SYNC_WAKE_UP)

    @property
    def is_open(self) -> bool:
        """Whether a process under its filter may be left."""
        return self.fd >= 0

    def receive(
        self,
        *,
        _ioctl: Any = fcntl.ioctl,
        _make: Any = Call._make,
        _unpack: Any = _NOTIFICATION.unpack_from,
        _note: Any = _WHOSE.pack_into,
    ) -> Call | None:
        """The next call; None where it has gone meanwhile. Only after poll(2) said that one is
        there. It stays in the page until the next one.
        """
        memory = self._memory
        memory[:SIZE] = _EMPTY
        _note(memory, _WHOSE_PLACE, self.place)
        try:
            _ioctl(self.fd, RECV, memory)
        except OSError as error:
            memory[:SIZE] = _EMPTY
            if error.errno in (errno.ENOENT, errno.EINTR):
                return None
            raise
        call: Call = _make(_unpack(memory))
        return call

    def go_on(
        self, call_id: int, *, _ioctl: Any = fcntl.ioctl, _id_into: Any = _ID.pack_into
    ) -> None:
        """Let the kernel carry the call out; no harm where nobody waits any more."""
        try:
            _id_into(_go_on, 0, call_id)
            _ioctl(self.fd, SEND, _go_on)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise

    def answer(self, call_id: int, value: int, error: int) -> None:
        """The call's result: `value`, or the errno `error` where that is not 0."""
        try:
            fcntl.ioctl(self.fd, SEND, _RESPONSE.pack(call_id, value, -error, 0))
        except OSError as failure:
            if failure.errno != errno.ENOENT:
                raise

    def check(self, call_id: int) -> None:
        """Raise Gone unless the caller still waits: only then its thread id means itself."""
        try:
            fcntl.ioctl(self.fd, ID_VALID, _ID.pack(call_id))
        except OSError as error:
            raise Gone from error

    def add_fd(self, call_id: int, fd: int, *, at: int = -1, cloexec: bool) -> int:
        """Give the caller a copy of `fd`, at the number `at` in place of what is there, or at the
        first free one; the number.

        Raises OSError: EMFILE, EBADF; Gone.
        """
        flags, number = (_ADDFD_SETFD, at) if at >= 0 else (0, 0)
        how = bytearray(_ADDED.pack(call_id, flags, fd, number, os.O_CLOEXEC if cloexec else 0))
        try:
            added: int = fcntl.ioctl(self.fd, ADDFD, how)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINPROGRESS, errno.ESRCH):
                raise Gone from error
            raise
        return added

    def close(self) -> None:
        os.close(self.fd)
        self.fd = -1
