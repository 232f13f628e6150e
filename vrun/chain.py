"""How a guest's first process tells its monitor how far it is, until it executes the guest's init.

A pair of sockets, its far end closed when the guest's init is executed. Messages, fields apart by
NUL bytes:

    console                    with it a descriptor of the console's other side
    listener                   with it where calls wait that shared files are in the way of
    ready                      all is set up; the stub (stub.py) is all that is left to do
    warn TEXT
    failed STEP REASON HINT    the last message; STEP is empty where REASON says it all
"""

import os
from collections.abc import Callable
from typing import Final, NoReturn

from vrun.control import Connection, pair
from vrun.errors import ToolError
from vrun.loop import Loop
from vstore.record import dataclass

GO: Final = "go"


class Chain:
    """The monitor's end."""

    def __init__(self, name: str, loop: Loop, warn: Callable[[str], None]) -> None:
        """`name` is the guest's, for messages; `warn` gets what went wrong without an end."""
        self._name = name
        self._warn = warn
        self._loop = loop
        self._near, self.far = pair()
        self._near.socket.setblocking(False)
        self._inbox: dict[str, list[str]] = {}
        self._is_open = True
        self.fds: list[int] = self._near.fds
        """Descriptors that came with messages, oldest first; whoever takes one closes it."""
        loop.watch(self._near.socket.fileno(), self._read)

    def close_far(self) -> None:
        """After the fork: the guest's first process has its own copy."""
        self.far.close()

    def expect(self, word: str) -> list[str]:
        """Wait for the message `word`; the rest of its fields.

        Raises ToolError for what failed over there, or when it died; Aborted.
        """
        self._loop.wait(lambda: word in self._inbox or not self._is_open)
        if word not in self._inbox:
            raise ToolError(f"guest {self._name}: its start was killed before it was through")
        return self._inbox.pop(word)

    def go_on(self) -> None:
        """Let the process that waits go on."""
        self._near.send(GO)

    def close(self) -> None:
        """Nobody waits any more; what came with messages and nobody took is closed."""
        self._end()
        self.far.close()
        self._near.close()

    def _end(self) -> None:
        if self._is_open:
            self._is_open = False
            self._loop.unwatch(self._near.socket.fileno())

    def _read(self) -> None:
        fields = self._near.receive()
        match fields:
            case None:
                self._end()
            case ["warn", text]:
                self._warn(text)
            case ["failed", step, reason, hint]:
                self._end()
                raise ToolError(_failure(self._name, step, reason), hint=hint or None)
            case [word, *rest]:
                self._inbox[word] = rest


def _failure(name: str, step: str, reason: str) -> str:
    return f"guest {name}: cannot {step}: {reason}" if step else f"guest {name}: {reason}"


@dataclass(slots=True)
class FarEnd:
    """What the guest's first process says."""

    connection: Connection
    step: str = ""
    """What is being done, for `failed`."""

    def say(self, *fields: str, fds: tuple[int, ...] = ()) -> None:
        """Send a message; end this process if the monitor is gone."""
        if not self.connection.send(*fields, fds=fds):
            os._exit(1)

    def wait(self) -> None:
        """Wait for the monitor's word; end this process if it is gone, and with it the guest."""
        if self.connection.receive() != [GO]:
            os._exit(1)

    def fail(self, error: OSError | ToolError) -> NoReturn:
        """Tell what failed, and end this process."""
        if isinstance(error, ToolError):
            self.connection.send("failed", self.step, error.message, error.hint or "")
        else:
            place = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str) else ""
            reason = f"{place}{error.strerror or error}"
            self.connection.send("failed", self.step, reason, "")
        os._exit(1)
