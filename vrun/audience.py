"""Who hears of what a monitor does: the commands that wait for it, else the guest's console log."""

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from vrun.console import Log
from vrun.control import Connection, Outcome
from vrun.scripts import Stdio

_STDIO_FDS: Final = 2


class Audience:
    """The commands that wait for the start or stop in work."""

    def __init__(self, log: Log) -> None:
        """`log`: where goes what nobody waits for."""
        self._log = log
        self._null_fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self._listeners: list[Connection] = []
        self.logfile: Path | None = None
        """Where notes go too."""

    @property
    def first(self) -> Connection | None:
        """The command that waits longest."""
        return self._listeners[0] if self._listeners else None

    def add(self, listener: Connection) -> None:
        self._listeners.append(listener)

    def remove(self, listener: Connection) -> None:
        """It is gone, or has been told all."""
        if listener in self._listeners:
            self._listeners.remove(listener)

    def say(self, text: str) -> None:
        """Something that they may want to know."""
        for listener in self._listeners:
            listener.say(text)

    def warn(self, text: str) -> None:
        """Something went wrong, and the work goes on."""
        for listener in self._listeners:
            listener.warn(text)
        self.note(text)

    def note(self, text: str) -> None:
        """Keep a line in the console log, and in `logfile`."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        self._log.write(os.fsencode(f"\r\n[{stamp} vserver: {text}]\r\n"))
        if self.logfile:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
            with suppress(OSError), os.fdopen(os.open(self.logfile, flags, 0o640), "ab") as file:
                file.write(os.fsencode(f"{stamp} {text}\n"))

    def end(self, outcome: Outcome) -> list[Connection]:
        """Give everybody the last word; they are left out from now on, and returned."""
        told, self._listeners = self._listeners, []
        for listener in told:
            listener.end(outcome)
        return told

    def stdio(self) -> Stdio:
        """Where programs of the host write that run now."""
        for listener in self._listeners:
            if len(listener.fds) >= _STDIO_FDS:
                return Stdio(self._null_fd, listener.fds[0], listener.fds[1])
        return Stdio(self._null_fd, self._log.fd, self._log.fd)
