"""What passes between the caller's descriptors 0, 1, 2 and those of a command inside a guest.

The command never gets the caller's own: from /proc/PID/fd a guest's root could open the file behind
one anew with other rights, read what a pipe's writer sends to others, or type into a terminal. It
gets terminals of its guest and new pipes, and all bytes are copied.
"""

import errno
import fcntl
import logging
import os
import select
import stat
import struct
import termios
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Final, Literal

from vrun import syscalls
from vrun.terminal import Caller, Pty, copy_modes, copy_size, open_pty
from vstore.record import dataclass

log = logging.getLogger(__name__)

_CHUNK: Final = 1 << 16
_PIPE_BUF: Final = select.PIPE_BUF
"""So much fits into a pipe that poll(2) calls writable."""
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_LAST_READS: Final = 16
"""A pipe holds 1 MiB at most: who goes on writing after the command has ended is not waited for."""
_LOOK_AGAIN_MS: Final = 200
_WRITABLE: Final = select.POLLOUT | select.POLLHUP | select.POLLERR | select.POLLNVAL
_READABLE: Final = select.POLLIN | select.POLLHUP | select.POLLERR | select.POLLNVAL
_NAMES: Final = ("standard input", "standard output", "standard error")

Kind = Literal["terminal", "pipe"]


def plan(outer: tuple[int, int, int]) -> tuple[Kind, Kind, Kind]:
    """What the command gets for each of the caller's descriptors.

    A terminal for each that is one, unless input is none (then nobody could type) or output goes to
    another program (which may itself want to read the caller's terminal, as less does).
    """
    is_shown = os.isatty(outer[0]) and not _is_pipe(outer[1])

    def kind(fd: int) -> Kind:
        return "terminal" if is_shown and os.isatty(fd) else "pipe"

    return kind(outer[0]), kind(outer[1]), kind(outer[2])


class Wanted:
    """The events to wait for, of all who pass something on."""

    def __init__(self) -> None:
        self._masks: dict[int, int] = {}
        self._timeout_ms: int | None = None

    def add(self, fd: int, mask: int) -> None:
        """Wake up when `fd` is as `mask`, or has ended."""
        self._masks[fd] = self._masks.get(fd, 0) | mask

    def look_again(self) -> None:
        """Wake up soon in any case: there is no event for what is waited for."""
        self._timeout_ms = _LOOK_AGAIN_MS

    def wait(self, at_most_ms: int | None) -> dict[int, int]:
        """The events that have come, by descriptor."""
        poll = select.poll()
        for fd, mask in self._masks.items():
            poll.register(fd, mask)
        times = [time for time in (at_most_ms, self._timeout_ms) if time is not None]
        return dict(poll.poll(min(times, default=None)))


class Relay:
    """The connection of one command.

    Made before the process that gets `inner`; `begin` after it, in the caller.
    """

    def __init__(self, outer: tuple[int, int, int], root_fd: int) -> None:
        """`outer` are the caller's descriptors, `root_fd` is the root of the guest.

        Raises ToolError where the guest cannot have a terminal.
        """
        kinds = plan(outer)
        self.is_terminal = "terminal" in kinds
        self._caller = Caller(outer[0])
        self._pty: Pty | None = open_pty(root_fd) if self.is_terminal else None
        self._feed: Feed | None = None
        self._flows: list[Flow] = []
        self._inner: list[int] = []
        if self._pty:
            self._show(self._pty, outer)
        for number, kind in enumerate(kinds):
            self._inner.append(self._connect(number, kind, outer))

    @property
    def inner(self) -> tuple[int, int, int]:
        """What is to become descriptors 0, 1 and 2 of the command."""
        first, second, third = self._inner
        return first, second, third

    def give_to(self, uid: int, gid: int) -> None:
        """Make the command's user the owner of what it gets, so that it can open /dev/stdout."""
        for fd in set(self._inner):
            os.fchown(fd, uid, -1 if os.isatty(fd) else gid)

    def begin(self) -> None:
        """The command's process has its own copies by now: close ours and take the terminal."""
        self._close_inner()
        if self._pty:
            self._caller.make_raw()

    def resize(self) -> None:
        """The caller's terminal has a new size."""
        if self._pty:
            copy_size(self._caller.fd, self._pty.master_fd)

    def suspend(self) -> None:
        """This process is about to stop: the terminal is as it was."""
        self._caller.restore()

    def resume(self) -> None:
        """This process goes on, perhaps in the foreground now."""
        if self._pty:
            self._caller.make_raw()
            self.resize()

    def wait(self, ended_fd: int, *, at_most_ms: int | None = None) -> bool:
        """Pass on what there is, until `ended_fd` can be read; whether it can."""
        wanted = Wanted()
        wanted.add(ended_fd, select.POLLIN)
        for part in self._parts():
            part.ask(wanted)
        events = wanted.wait(at_most_ms)
        for part in self._parts():
            part.step(events)
        return ended_fd in events

    def finish(self) -> None:
        """The command has ended: pass on its last words, give back what it did not read."""
        for flow in self._flows:
            flow.finish()
        self.close()

    def close(self) -> None:
        """Give everything back; also after a failure, at any point."""
        self._caller.restore()
        if self._feed:
            self._feed.close()
        for flow in self._flows:
            flow.close()
        if self._pty:
            os.close(self._pty.master_fd)
            self._pty = None
        self._close_inner()

    def _show(self, pty: Pty, outer: tuple[int, int, int]) -> None:
        """Connect the guest's terminal with the caller's."""
        copy_modes(outer[0], pty.slave_fd)
        copy_size(outer[0], pty.master_fd)
        shown_fd = next((fd for fd in (outer[1], outer[2]) if os.isatty(fd)), outer[0])
        self._flows.append(Shown(pty.master_fd, shown_fd, "the terminal", owned=False))
        self._flows.append(Typing(self._caller, pty.master_fd))

    def _connect(self, number: int, kind: Kind, outer: tuple[int, int, int]) -> int:
        """The command's end of what goes in the place of `outer[number]`."""
        if kind == "terminal" and self._pty:
            return self._pty.slave_fd
        if number == 2 and not self.is_terminal and _are_same(outer[1], outer[2]):
            return self._inner[1]  # 2>&1 keeps its order
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
        if number == 0:
            self._feed = Feed(outer[0], write_fd)
            return read_fd
        os.set_blocking(read_fd, False)
        self._flows.append(Flow(read_fd, outer[number], _NAMES[number], owned=True))
        return write_fd

    def _parts(self) -> Iterator["Flow | Feed"]:
        yield from self._flows
        if self._feed:
            yield self._feed

    def _close_inner(self) -> None:
        for fd in {*self._inner, *([self._pty.slave_fd] if self._pty else [])}:
            with suppress(OSError):
                os.close(fd)
        self._inner.clear()


class Flow:
    """Bytes from one descriptor to another, as fast as the slower side allows."""

    def __init__(self, source_fd: int, target_fd: int, name: str, *, owned: bool) -> None:
        """`name` is the target's, for messages; an `owned` source is closed at the end."""
        self._source_fd = source_fd
        self._target_fd = target_fd
        self._name = name
        self._owned = owned
        self._pending = memoryview(b"")
        self._most = _CHUNK if stat.S_ISREG(os.fstat(target_fd).st_mode) else _PIPE_BUF
        self._is_open = True

    @property
    def is_open(self) -> bool:
        """Whether its source can have more."""
        return self._is_open

    def ask(self, wanted: Wanted) -> None:
        """Name the event to wait for."""
        if self._is_open and self._pending:
            wanted.add(self._target_fd, select.POLLOUT)
        elif self._is_open:
            wanted.add(self._source_fd, select.POLLIN)

    def step(self, events: Mapping[int, int]) -> None:
        """Do what an event allows."""
        if self._is_open and self._pending:
            if event := events.get(self._target_fd, 0) & _WRITABLE:
                self._write(event)
        elif self._is_open and events.get(self._source_fd, 0) & _READABLE:
            self._read()

    def finish(self) -> None:
        """Pass on what the source holds now, and wait until it is written."""
        for _ in range(_LAST_READS):
            self._write_all()
            if not self._read():
                return
        self._write_all()

    def close(self) -> None:
        """Closes an owned source: who goes on writing gets SIGPIPE."""
        if self._is_open:
            self._is_open = False
            self._pending = memoryview(b"")
            if self._owned:
                os.close(self._source_fd)

    def _write_all(self) -> None:
        while self._pending:
            wanted = Wanted()
            wanted.add(self._target_fd, select.POLLOUT)
            self._write(wanted.wait(None)[self._target_fd])

    def _read(self) -> bool:
        """Whether there was something."""
        if not self._is_open:
            return False
        try:
            data = os.read(self._source_fd, _CHUNK)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.EIO:  # a terminal that has been hung up
                log.warning("cannot read for %s: %s", self._name, error.strerror)
            data = b""
        if not data:
            self._end()
        self._pending = memoryview(self._take(data))
        return bool(data)

    def _end(self) -> None:
        """The source has nothing more."""
        self.close()

    def _take(self, data: bytes) -> bytes:
        """What of the data is to be passed on."""
        return data

    def _write(self, event: int) -> None:
        try:
            written = os.write(self._target_fd, self._pending[: self._most])
        except BlockingIOError:
            # A terminal that nobody has open, and whose buffer is full, is never writable again
            written = 0 if event & select.POLLOUT else len(self._pending)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                log.warning("cannot write to %s: %s", self._name, error.strerror)
            self.close()
            return
        self._pending = self._pending[written:]


class Shown(Flow):
    """What the guest writes on a terminal of its own.

    Open nowhere inside for a moment (a login takes it over), it ends only for whoever reads then.
    """

    _is_idle = False

    def ask(self, wanted: Wanted) -> None:
        """Name the event to wait for; such a terminal is "ready" all the time."""
        if self._is_idle and self.is_open:
            wanted.look_again()
        else:
            super().ask(wanted)

    def step(self, events: Mapping[int, int]) -> None:
        """Do what an event allows."""
        if self._is_idle:
            self._is_idle = False
            self._read()
        else:
            super().step(events)

    def _end(self) -> None:
        self._is_idle = True


class Typing(Flow):
    """What is typed on the caller's terminal, for the guest's; never read from the background."""

    def __init__(self, caller: Caller, master_fd: int) -> None:
        super().__init__(caller.fd, master_fd, "the guest's terminal", owned=False)
        self._caller = caller

    def ask(self, wanted: Wanted) -> None:
        """Name the event to wait for."""
        if self._is_open and not self._pending and not self._caller.is_ours:
            wanted.look_again()
        else:
            super().ask(wanted)

    def finish(self) -> None:
        """What is typed from now on is not for the guest."""


@dataclass(frozen=True, slots=True)
class _Source:
    """What the caller's standard input is."""

    is_seekable: bool
    is_pipe: bool
    is_terminal: bool


class Feed:
    """Input for a command: handed over a page at a time, the next once that is read.

    What the command leaves unread stays for whoever reads the caller's input next (the loop of a
    shell script, say), as if the command had read it itself; where input is a file or a pipe.
    """

    def __init__(self, source_fd: int, pipe_fd: int) -> None:
        """`pipe_fd`, the writing end, is closed at the end."""
        self._source_fd = source_fd
        self._pipe_fd = pipe_fd
        status = os.fstat(source_fd)
        self._source = _Source(
            stat.S_ISREG(status.st_mode), stat.S_ISFIFO(status.st_mode), os.isatty(source_fd)
        )
        self._caller = Caller(source_fd)
        self._unread = 0
        """How many bytes were handed over when the pipe was last empty."""
        self._is_open = True
        fcntl.fcntl(pipe_fd, fcntl.F_SETPIPE_SZ, _PAGE)  # writable means empty
        os.set_blocking(pipe_fd, False)

    def ask(self, wanted: Wanted) -> None:
        """Name the event to wait for."""
        if not self._is_open:
            return
        if self._unread:
            wanted.add(self._pipe_fd, select.POLLOUT)
        elif self._source.is_terminal and not (self._caller.is_ours and self._caller.takes_lines):
            wanted.look_again()
        else:
            wanted.add(self._source_fd, select.POLLIN)

    def step(self, events: Mapping[int, int]) -> None:
        """Do what an event allows."""
        if not self._is_open:
            return
        if events.get(self._pipe_fd, 0) & (select.POLLERR | select.POLLHUP):
            self.close()
        elif self._unread and self._pipe_fd in events:
            self._forget(self._unread)
            self._unread = 0
        elif not self._unread and events.get(self._source_fd, 0) & _READABLE:
            self._hand_over()

    def close(self) -> None:
        """Input ends here; what is not read goes back."""
        if not self._is_open:
            return
        self._is_open = False
        with suppress(OSError):
            self._forget(self._unread - min(self._unread, _readable_bytes(self._pipe_fd)))
        os.close(self._pipe_fd)

    def _hand_over(self) -> None:
        try:
            self._unread = self._copy()
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                log.warning("cannot read standard input: %s", error.strerror)
        if not self._unread:
            self.close()

    def _copy(self) -> int:
        """Hand over up to a page; 0 at the end of input. A file or a pipe still has it then."""
        if self._source.is_pipe:
            return syscalls.tee(self._source_fd, self._pipe_fd, _PAGE)
        if self._source.is_seekable:
            place = os.lseek(self._source_fd, 0, os.SEEK_CUR)
            return os.write(self._pipe_fd, os.pread(self._source_fd, _PAGE, place))
        return os.write(self._pipe_fd, os.read(self._source_fd, _PAGE))

    def _forget(self, count: int) -> None:
        """The command has read `count` bytes: take them out of the caller's input."""
        if self._source.is_seekable:
            os.lseek(self._source_fd, count, os.SEEK_CUR)
        while self._source.is_pipe and count > 0 and _readable_bytes(self._source_fd):
            count -= len(os.read(self._source_fd, count))


def _readable_bytes(fd: int) -> int:
    count: int = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0]
    return count


def _is_pipe(fd: int) -> bool:
    mode = os.fstat(fd).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _are_same(one_fd: int, other_fd: int) -> bool:
    one, other = os.fstat(one_fd), os.fstat(other_fd)
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)
