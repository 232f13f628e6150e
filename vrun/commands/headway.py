"""How far a command for many guests is: one line on the terminal, gone before any other."""

import os
import sys
from collections.abc import Collection
from typing import Final

_ERASE: Final = "\r\x1b[K"
_COLUMNS: Final = 80
"""Where the terminal does not tell."""


class Headway:
    """`3 of 30 done; at work: web4, web5, web6` on stderr, where that is a terminal."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._is_shown = total > 1 and sys.stderr is not None and sys.stderr.isatty()
        self._line = ""

    def count(self) -> None:
        """One more is done."""
        self._done += 1

    def show(self, names: Collection[str]) -> None:
        """These are being worked on."""
        line = f"{self._done} of {self._total} done"
        if names:
            line += f"; at work: {', '.join(names)}"
        self._write(line[: _columns() - 1] if names else "")

    def clear(self) -> None:
        """Leave the terminal's line to another text."""
        self._write("")

    def _write(self, line: str) -> None:
        if self._is_shown and line != self._line:
            sys.stderr.write(f"{_ERASE}{line}")
            sys.stderr.flush()
            self._line = line


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or _COLUMNS
    except OSError:
        return _COLUMNS
