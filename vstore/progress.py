"""What a long operation tells of its way; who shows it, and how, is no business of its."""

from typing import Final, Protocol


class Progress(Protocol):
    """Is told the way of an operation: one phase after the other, each with a count that grows."""

    def phase(self, name: str, total: int | None = None, unit: str = "files") -> None:
        """Begin a phase; the one before it is over.

        `total` is how much there is to do, None where nobody knows; `unit` is "files" or "bytes".
        """

    def advance(self, count: int = 1) -> None:
        """So many more of the phase's units are done."""

    def note(self, files: int, saved: int) -> None:
        """What a count of bytes does not say: how many files that was, and how many of the bytes
        were there already.
        """


class _Silent:
    """Shows nothing."""

    def phase(self, name: str, total: int | None = None, unit: str = "files") -> None:
        pass

    def advance(self, count: int = 1) -> None:
        pass

    def note(self, files: int, saved: int) -> None:
        pass


SILENT: Final[Progress] = _Silent()
