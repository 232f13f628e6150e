"""How a command and a guest's monitor talk: over RUNDIR/NAME/supervisor.sock.

A connection is a sequence of messages (SOCK_SEQPACKET), each some fields apart by NUL bytes. The
command sends one order, and with it the descriptors that the monitor is to show output on; the
monitor answers with any number of `say`, `warn` and `out` messages and one `end`:

    -> stop                        descriptors 1 and 2 of the command
    <- warn  scripts/pre-stop ended with status 1
    <- out   what the guest's console shows meanwhile, byte for byte
    <- end   0

`start` is the first order of a monitor, over a pair of sockets that it inherits. The orders
`console follow` and `console attach` are answered with `console` (for `attach` with a descriptor of
the terminal's other side, to write and to set its size) or `end`; messages from then on are what
the guest prints. Only root can reach the socket, by its folder's mode.
"""

import os
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from vrun.errors import ToolError
from vrun.state import run_folder, short_path
from vstore.record import dataclass

_MOST_BYTES: Final = 1 << 16
_MOST_FDS: Final = 3
_SEND_TIMEOUT: Final = struct.pack("ll", 2, 0)
_SOCKET: Final = "supervisor.sock"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The last word of a monitor: an exit code, and for a failure what to tell."""

    code: int
    message: str = ""
    hint: str | None = None

    def check(self) -> None:
        """Raise ToolError if it is a failure."""
        if self.code:
            raise ToolError(self.message, hint=self.hint)


class Connection:
    """One end of the talk."""

    __slots__ = ("fds", "socket")

    def __init__(self, connected: socket.socket, fds: Sequence[int] = ()) -> None:
        """`fds`: descriptors that came with the order, closed with the connection."""
        self.socket = connected
        self.fds = list(fds)
        # A command that was stopped (^Z) must not hold a monitor up.
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _SEND_TIMEOUT)

    def send(self, *fields: str, fds: Sequence[int] = ()) -> bool:
        """Send one message; False when the other side is gone."""
        data = os.fsencode("\0".join(fields))[:_MOST_BYTES]
        try:
            if fds:
                socket.send_fds(self.socket, [data], list(fds))
            else:
                self.socket.send(data)
        except OSError:
            return False
        return True

    def receive(self) -> list[str] | None:
        """The fields of the next message, its descriptors in `fds`; None when there is no more."""
        try:
            data, fds, _, _ = socket.recv_fds(
                self.socket, _MOST_BYTES, _MOST_FDS, socket.MSG_CMSG_CLOEXEC
            )
        except OSError:
            return None
        self.fds += fds
        return os.fsdecode(data).split("\0") if data else None

    def show(self, data: bytes) -> None:
        """What the guest writes on its console; dropped where it is not taken at once."""
        with suppress(OSError):
            self.socket.send(b"out\0" + data, socket.MSG_DONTWAIT)

    def say(self, text: str) -> None:
        """Something that the person who gave the order may want to know."""
        self.send("say", text)

    def warn(self, text: str) -> None:
        """Something that went wrong and did not stop the work."""
        self.send("warn", text)

    def end(self, outcome: Outcome) -> None:
        """The last message."""
        self.send("end", str(outcome.code), outcome.message, outcome.hint or "")

    def close(self) -> None:
        """Close it and the descriptors that came with it."""
        for fd in self.fds:
            with suppress(OSError):
                os.close(fd)
        self.fds.clear()
        self.socket.close()


def pair() -> tuple[Connection, Connection]:
    """Two connected ends."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Connection(one), Connection(other)


def listen(name: str) -> socket.socket:
    """The socket on which the guest's monitor gets its orders; the caller has the guest's lock.

    Raises OSError.
    """
    (run_folder(name) / _SOCKET).unlink(missing_ok=True)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    with short_path(name, _SOCKET) as path:
        made.bind(path)
    made.listen(16)
    return made


def stop_listening(name: str, listener: socket.socket) -> None:
    """The monitor is about to end."""
    with suppress(OSError):
        (run_folder(name) / _SOCKET).unlink()
    listener.close()


def connect(name: str) -> Connection | None:
    """A connection to the guest's monitor; None where there is none."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with short_path(name, _SOCKET) as path:
            made.connect(path)
    except OSError:
        made.close()
        return None
    return Connection(made)


def is_listening(name: str) -> bool:
    """Whether the guest has a monitor that takes orders."""
    connection = connect(name)
    if connection is None:
        return False
    connection.close()
    return True


def hear(
    connection: Connection,
    *,
    say: Callable[[str], None],
    warn: Callable[[str], None],
    out: Callable[[bytes], None],
) -> Outcome | None:
    """Pass on what the monitor tells; its last word, None if it died without one.

    Returns when the monitor closes the connection: where it ends too, that is when it has ended.
    """
    outcome: Outcome | None = None
    while (fields := connection.receive()) is not None:
        match fields:
            case ["say", text]:
                say(text)
            case ["warn", text]:
                warn(text)
            case ["out", *data]:
                out(os.fsencode("\0".join(data)))
            case ["end", code, message, hint]:
                outcome = Outcome(int(code), message, hint or None)
    return outcome
