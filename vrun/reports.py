"""The word that lets a guest's first program go, and what the stub tells of it: see stub.py."""

import os
from contextlib import suppress

from vrun import stub
from vrun.loop import Loop


class Reports:
    """Reads the stub's reports as they come. A guest may forge them; they only decide messages."""

    def __init__(self, fd: int, loop: Loop) -> None:
        """Takes over `fd`, a connected socket."""
        self._fd = fd
        self._loop = loop
        self._data = b""
        self.is_open = True
        loop.watch(fd, self._read)

    def let_go(self) -> None:
        """Have the stub execute the program; nothing where it has died."""
        with suppress(OSError):
            os.write(self._fd, b"\n")

    def wait_for_program(self) -> int:
        """Wait until the program is executed; 0, or the errno of execve(2). Raises Aborted."""
        self._loop.wait(lambda: bool(self._data) or not self.is_open)
        for report in self._parsed():
            if isinstance(report, stub.NotExecuted):
                return report.errno
        return 0

    def wait_for_end(self) -> int | None:
        """Wait until the stub's first child has ended; its wait status, None if nobody told.

        Raises Aborted.
        """
        self._loop.wait(lambda: not self.is_open or self._ended() is not None)
        return self._ended()

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            self._loop.unwatch(self._fd)
            os.close(self._fd)

    def _parsed(self) -> list[stub.Report]:
        return stub.parse_reports(self._data)

    def _ended(self) -> int | None:
        for report in self._parsed():
            if isinstance(report, stub.Ended):
                return report.wait_status
        return None

    def _read(self) -> None:
        data = os.read(self._fd, 512)
        self._data += data
        if not data or len(self._data) > 1024:  # a guest that plays with it
            self.close()
