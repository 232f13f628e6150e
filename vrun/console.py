"""The monitor's side of a guest's console: a log that rotates, and commands that follow it.

    LOGDIR/                 VSERVER_LOGDIR, else /var/log/vservers
    ├── web.console         what the guest wrote last, as it wrote it
    └── web.console.1 ..3   what it wrote before, 1 MiB each

The terminal is a pty of the guest's own devpts, whose other end we have. Nothing that the guest
writes, and nobody who follows it slowly, can hold the monitor up: what cannot be passed on at once
is dropped.
"""

import fcntl
import os
import struct
import termios
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Final

from vrun.control import Connection
from vrun.loop import Loop

LOG_BYTES: Final = 1 << 20
OLD_LOGS: Final = 3
_CHUNK: Final = 1 << 14
_CHUNKS_AT_ONCE: Final = 16  # then others have their turn
_SIZE: Final = (24, 80)


def log_path(name: str) -> Path:
    """Where the console of the guest is kept."""
    folder = Path(os.environ.get("VSERVER_LOGDIR") or "/var/log/vservers").absolute()
    return folder / f"{name}.console"


class Log:
    """The file; losing some of it (a full disk) never stops the guest."""

    def __init__(self, path: Path) -> None:
        """Makes the folder and opens the file; where that cannot be, `trouble` says why."""
        self.path = path
        self.fd = -1
        self.trouble = ""
        try:
            path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
            self._open()
        except OSError as error:
            self.trouble = f"{path}: {error.strerror}"
            self.fd = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            self._size = 0

    def write(self, data: bytes) -> None:
        """Add `data`; begins a new file where it has become too long."""
        if self._size > LOG_BYTES and not self.trouble:
            self._rotate()
        with suppress(OSError):
            self._size += os.write(self.fd, data)

    def close(self) -> None:
        os.close(self.fd)

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self.path, flags, 0o640)
        if self.fd >= 0:  # keep the number: programs of the host have it for their output
            os.dup2(fd, self.fd, inheritable=False)
            os.close(fd)
        else:
            self.fd = fd
        self._size = os.fstat(self.fd).st_size

    def _rotate(self) -> None:
        names = [self.path, *(Path(f"{self.path}.{age}") for age in range(1, OLD_LOGS + 1))]
        with suppress(OSError):
            for younger, older in reversed(list(pairwise(names))):
                with suppress(FileNotFoundError):
                    younger.replace(older)
            self._open()


class Console:
    """The terminal of one run."""

    def __init__(self, master_fd: int, loop: Loop, kept: Log) -> None:
        """Takes over `master_fd`."""
        self._fd = master_fd
        self._loop = loop
        self._log = kept
        self._followers: list[Connection] = []
        self.echo: Connection | None = None
        """A command that waits for the guest's boot is sent what it writes as `out` messages."""
        os.set_blocking(master_fd, False)
        with suppress(OSError):
            fcntl.ioctl(master_fd, termios.TIOCSWINSZ, struct.pack("4H", *_SIZE, 0, 0))
        # vhangup and a moment without any reader inside make the terminal "ready" without an end.
        loop.watch(master_fd, self._read, once_per_change=True)

    def add(self, follower: Connection, *, attach: bool) -> None:
        """From now on `follower` gets what the guest writes; with `attach` it can write, too."""
        if not follower.send("console", fds=[self._fd] if attach else ()):
            follower.close()
            return
        follower.socket.setblocking(False)
        self._followers.append(follower)
        self._loop.watch(follower.socket.fileno(), lambda: self._heard(follower))

    def flush(self) -> None:
        """Take what the guest has written so far."""
        self._read()

    def close(self) -> None:
        """Take what the guest wrote last, and send everybody away."""
        self._read()
        self._loop.unwatch(self._fd)
        os.close(self._fd)
        for follower in list(self._followers):
            self._remove(follower)

    def _heard(self, follower: Connection) -> None:
        if follower.receive() is None:
            self._remove(follower)

    def _remove(self, follower: Connection) -> None:
        self._followers.remove(follower)
        self._loop.unwatch(follower.socket.fileno())
        follower.close()

    def _read(self) -> None:
        with suppress(OSError):  # EAGAIN; EIO: nobody inside has it open at the moment
            for _ in range(_CHUNKS_AT_ONCE):
                self._pass_on(os.read(self._fd, _CHUNK))
            self._loop.look_again(self._fd)

    def _pass_on(self, data: bytes) -> None:
        self._log.write(data)
        if self.echo is not None:
            self.echo.show(data)
        for follower in list(self._followers):
            try:
                follower.socket.send(data)
            except BlockingIOError:
                continue
            except OSError:
                self._remove(follower)
