"""What the modules below the commands log, shown as all else that goes to stderr."""

import logging

from vrun.commands.plain import show


class Shown(logging.Handler):
    """A handler whose lines begin as those of the command do."""

    def __init__(self, start: str) -> None:
        """`start` is the command's name."""
        super().__init__()
        self._start = start

    def emit(self, record: logging.LogRecord) -> None:
        show(record.getMessage(), start=self._start)
