"""One program for each of many guests, several at a time; what they write comes line by line.

    main ─┬─ worker for web     enters the guest, or becomes a program of the host
          └─ worker for db      stdin is empty; stdout and stderr are pipes to us

Each worker is a process of its own, so that a guest that hangs holds up nobody else.
"""

import os
import selectors
import signal
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from typing import Final, NoReturn

from vrun import syscalls
from vstore.heldback import signals_held_back
from vstore.record import dataclass

_MOST_BYTES: Final = 1 << 16
"""A line that goes on longer is shown in parts."""
EXIT_FAILED: Final = 125
EXIT_SIGNAL: Final = 128

Show = Callable[[str, int, bytes], None]
"""Gets the guest's name, 1 or 2, and a line without its end."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a guest's program ended."""

    name: str
    code: int
    """Its exit status; 128 + n where signal n ended it."""


class _Stream:
    """One of the two that a worker writes."""

    def __init__(self, name: str, number: int, fd: int) -> None:
        self.name = name
        self.number = number
        self.fd = fd
        self._left = b""

    def read(self, show: Show) -> bool:
        """Show the lines that have come; False at the end."""
        data = os.read(self.fd, _MOST_BYTES)
        *lines, self._left = (self._left + data).split(b"\n")
        for line in lines:
            show(self.name, self.number, line)
        if self._left and (not data or len(self._left) >= _MOST_BYTES):
            show(self.name, self.number, self._left)
            self._left = b""
        return bool(data)


class Chorus:
    """Those that work at the moment."""

    def __init__(self, jobs: int, show: Show, show_busy: Callable[[Collection[str]], None]) -> None:
        """`jobs`: so many at a time; `show_busy` gets the names of those that work."""
        self._jobs = jobs
        self._show = show
        self._show_busy = show_busy
        self._selector = selectors.DefaultSelector()
        self._pids: dict[str, int] = {}
        self._open: dict[str, int] = {}

    def perform(self, names: Sequence[str], act: Callable[[str], int]) -> Iterator[Ended]:
        """Have `act` done for each guest, in a process of its own; it gives the exit status.

        However this ends, no worker is left.
        """
        waiting = deque(names)
        try:
            while waiting or self._pids:
                while waiting and len(self._pids) < self._jobs:
                    self._begin(waiting.popleft(), act)
                self._show_busy(self._pids)
                yield from self._hear()
        finally:
            self._end()

    def _begin(self, name: str, act: Callable[[str], int]) -> None:
        pipes = [os.pipe(), os.pipe()]
        with signals_held_back() as let_come:
            pid = os.fork()
            if pid == 0:
                _be_worker(name, act, [far for _, far in pipes], let_come)
            self._pids[name] = pid
        self._open[name] = len(pipes)
        for number, (near, far) in enumerate(pipes, start=1):
            os.close(far)
            self._selector.register(near, selectors.EVENT_READ, _Stream(name, number, near))

    def _hear(self) -> Iterator[Ended]:
        for key, _ in self._selector.select():
            stream: _Stream = key.data
            if stream.read(self._show):
                continue
            self._selector.unregister(stream.fd)
            os.close(stream.fd)
            self._open[stream.name] -= 1
            if not self._open[stream.name]:
                yield Ended(stream.name, self._reap(stream.name))

    def _reap(self, name: str) -> int:
        code = os.waitstatus_to_exitcode(os.waitpid(self._pids[name], 0)[1])
        del self._pids[name]
        return code if code >= 0 else EXIT_SIGNAL - code

    def _end(self) -> None:
        for pid in self._pids.values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        for name in list(self._pids):
            self._reap(name)
        for key in list(self._selector.get_map().values()):
            os.close(key.data.fd)
        self._selector.close()


def _be_worker(
    name: str, act: Callable[[str], int], fds: Sequence[int], let_come: Callable[[], None]
) -> NoReturn:
    code = EXIT_FAILED
    try:
        let_come()
        syscalls.set_parent_death_signal(signal.SIGTERM)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, fd in enumerate(fds, start=1):
            os.dup2(fd, number)
        os.closerange(3, max(fds) + 1)
        code = act(name)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else EXIT_FAILED
    except BaseException:  # noqa: BLE001 (a bug of ours must reach a person)
        import traceback

        with suppress(OSError):
            os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)
