"""The keeper of a holder of windows: its parent, which has a copy of every lease.

If the holder is killed inside a window its leases live on here, and whoever waits in one goes on
waiting until the keeper has closed the window.
"""

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from vstore.errors import PoolBusy, ToolError

log = logging.getLogger(__name__)

CGROUPS: Final = b"cgroup"
"""The key of a message whose descriptors are `cgroup.freeze` files instead of leases."""

_MESSAGE_SIZE: Final = 64
_FDS_A_MESSAGE: Final = 200  # the kernel passes at most 253
_GONE: Final = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN)


def tell(keeper: socket.socket, message: bytes, fds: Sequence[int]) -> None:
    """The holder's side: `+key` with descriptors, or `-key` when they are given up.

    Raises PoolBusy when nobody is there to keep what is begun; OSError.
    """
    try:
        if not fds:
            keeper.send(message)
        for start in range(0, len(fds), _FDS_A_MESSAGE):
            socket.send_fds(keeper, [message], fds[start : start + _FDS_A_MESSAGE])
    except OSError as error:
        if error.errno not in _GONE:
            raise
        if message.startswith(b"+"):
            raise PoolBusy(
                "the program that guards the leases was killed: no shared file is touched",
                hint="run the command again: it puts right what was left behind",
            ) from error


class Keeper:
    """The parent's copy of every lease and every frozen cgroup that one holder has."""

    def __init__(self) -> None:
        self._socket, self.holder_socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        self._held: dict[bytes, list[int]] = {}

    def fileno(self) -> int:
        """Can be read when there is something to drain."""
        return self._socket.fileno()

    def held_fds(self) -> list[int]:
        """The descriptors of all that is held, and the keeper's own."""
        return [*(fd for group in self._held.values() for fd in group), self.fileno()]

    def drain(self) -> None:
        """Take in what the holder has said; never waits.

        Raises ToolError when this process may not have as many descriptors as that takes.
        """
        with suppress(BlockingIOError, ConnectionResetError):
            while self._receive():
                pass

    def _receive(self) -> bool:
        message, fds, flags, _ = socket.recv_fds(self._socket, _MESSAGE_SIZE, 253)
        word, key = message[:1], message[1:]
        if word == b"-":
            for fd in self._held.pop(key, ()):
                os.close(fd)
        elif word:
            self._held.setdefault(key, []).extend(fds)
        if flags & socket.MSG_CTRUNC:
            raise ToolError(
                "a lease cannot be kept: too many files are open",
                hint="raise the limit of open files: ulimit -n",
            )
        return bool(word)

    def take_over(self, settle: Callable[[list[int]], object]) -> None:
        """The holder is dead: `settle` gets the descriptors of the leases that are still held; then
        all are let go.

        Guests that the holder had frozen run again, whatever `settle` raises.
        """
        with suppress(ToolError):
            self.drain()
        cgroups = self._held.pop(CGROUPS, [])
        for fd in cgroups:
            fcntl.flock(fd, fcntl.LOCK_UN)  # `settle` finds them by their intents and takes it
        try:
            settle([fd for group in self._held.values() for fd in group])
        finally:
            for fd in cgroups:
                with suppress(OSError):
                    fcntl.flock(fd, fcntl.LOCK_EX)  # not in the middle of another program's batch
                    os.write(fd, b"0")
            self._close_held([*cgroups])

    def join(self, other: "Keeper") -> None:
        """Hold what `other` holds too; it holds nothing any more."""
        for key, fds in other._held.items():
            self._held.setdefault(key, []).extend(fds)
        other._held.clear()
        other.close()

    def close(self) -> None:
        """Let everything go; in a forked child this closes copies and changes nothing."""
        self._close_held([])
        self._socket.close()

    def _close_held(self, more: list[int]) -> None:
        for fd in [*more, *(fd for group in self._held.values() for fd in group)]:
            with suppress(OSError):
                os.close(fd)
        self._held.clear()
