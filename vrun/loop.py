"""The one place where a monitor waits: for descriptors, for children, for a moment.

A monitor has one thread. While a step of a start or a stop waits, the console and the commands that
talk to the monitor are served all the same, because every wait is `Loop.wait`.
"""

import errno
import os
import select
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import FrameType

Callback = Callable[[], None]


class Aborted(Exception):
    """Somebody wants what is being done to end: the words are for a person."""


class Loop:
    """Calls back when descriptors can be read, and reaps children.

    `abort` makes the wait in work, or the next one, raise Aborted.
    """

    def __init__(self) -> None:
        """Takes over SIGCHLD of this process."""
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callback] = {}
        self._statuses: dict[int, int] = {}
        self._abort: str | None = None
        self._can_abort = True
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _note)
        self.watch(self._wake_read, self._woken)

    def _leave_in_child(self, keep: Iterable[int]) -> None:
        """In a forked child: close what is the monitor's, give signals their usual meaning again.

        A copy of its lock or of its ends of sockets would outlive the monitor.
        """
        signal.set_wakeup_fd(-1)
        close_all_but({0, 1, 2, *keep})
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)

    def fork(self, *, keep: Iterable[int] = ()) -> int:
        """As os.fork(); the child has the descriptors 0, 1, 2 and those of `keep` alone."""
        return self.forked(os.fork(), keep)

    def forked(self, pid: int, keep: Iterable[int]) -> int:
        """What `fork` does when this process was forked in another way, with that result."""
        if pid == 0:
            self._leave_in_child(keep)
        self._statuses.pop(pid, None)
        return pid

    def watch(self, fd: int, callback: Callback, *, once_per_change: bool = False) -> None:
        """Call back whenever `fd` can be read or has ended.

        `once_per_change`: only when something new has come since the last call, as with EPOLLET: a
        terminal that nobody has open would else be ready all the time.
        """
        self._callbacks[fd] = callback
        events = select.EPOLLIN | (select.EPOLLET if once_per_change else 0)
        self._epoll.register(fd, events)

    def watch_alarms(self, fd: int, callback: Callback) -> None:
        """Call back whenever a file of the kernel says that it has changed: EPOLLPRI, poll(2)."""
        self._callbacks[fd] = callback
        self._epoll.register(fd, select.EPOLLPRI | select.EPOLLET)

    def look_again(self, fd: int) -> None:
        """Call back once more if there is still something to read: for `once_per_change`."""
        self._epoll.modify(fd, select.EPOLLIN | select.EPOLLET)

    def unwatch(self, fd: int) -> None:
        """Forget `fd`, before it is closed; one that is not watched does no harm."""
        if self._callbacks.pop(fd, None) is not None:
            with suppress(OSError):
                self._epoll.unregister(fd)

    def abort(self, reason: str) -> None:
        """Make the wait in work end with Aborted, unless that was refused."""
        if self._can_abort:
            self._abort = reason

    def refuse_abort(self) -> None:
        """What is done now must come to its end."""
        self._can_abort = False
        self._abort = None

    def allow_abort(self) -> None:
        """What was to be ended, or must not be, is over."""
        self._can_abort = True
        self._abort = None

    def wait(
        self,
        until: Callable[[], bool],
        *,
        deadline: float | None = None,
        every: float | None = None,
    ) -> bool:
        """Serve until `until` is true, or the monotonic clock shows `deadline`; whether it is.

        It is asked after each event, and where `every` is given after so many seconds too. Raises
        Aborted, and whatever a callback raises.
        """
        while not until():
            if self._abort is not None:
                reason, self._abort = self._abort, None
                raise Aborted(reason)
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return False
            self._serve(left if every is None else min(every, every if left is None else left))
        return True

    def wait_child(self, pid: int, *, deadline: float | None = None) -> int | None:
        """The wait status of child `pid` once it has ended; None when the deadline came first."""
        self.wait(lambda: pid in self._statuses, deadline=deadline)
        return self._statuses.pop(pid, None)

    def status_of(self, pid: int) -> int | None:
        """The wait status of a child that has ended; None as long as it has not."""
        self._reap()
        return self._statuses.get(pid)

    def pause(self, seconds: float) -> None:
        """Serve for so long. Raises Aborted."""
        self.wait(lambda: False, deadline=time.monotonic() + seconds)

    def _serve(self, timeout_s: float | None) -> None:
        for fd, _ in self._epoll.poll(timeout_s):
            if callback := self._callbacks.get(fd):  # an earlier one may have closed it
                callback()

    def _woken(self) -> None:
        with suppress(BlockingIOError):
            while os.read(self._wake_read, 512):
                pass
        self._reap()

    def _reap(self) -> None:
        """Collect every child that has ended; orphans of guests among them."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except OSError as error:
                if error.errno == errno.ECHILD:
                    return
                raise
            if pid == 0:
                return
            self._statuses[pid] = status


def close_all_but(kept: set[int]) -> None:
    """Close every descriptor of this process that is not in `kept`."""
    low = 0
    for fd in sorted(kept):
        if low < fd:  # os.closerange(0, 0) of Python 3.11 closes all
            os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))


def _note(number: int, frame: FrameType | None) -> None:
    """SIGCHLD needs a handler, or nothing is written to the wake-up descriptor."""
