"""How results look to a person: names, sizes, tables, the progress bar.

File names come from guests, and a guest's owner is a stranger: whatever a terminal could take for a
command is escaped here before it is shown.
"""

import os
import sys
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Final, Never, Self

if TYPE_CHECKING:
    from tqdm import tqdm

_SHORT_ESCAPES: Final = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
_UNITS: Final = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def show_name(name: bytes | str) -> str:
    """A file name or path as one line of harmless text.

    Control characters, line separators, text direction marks and bytes that are no UTF-8 appear as
    escapes (`\\n`, `\\x1b`, `\\xff`, `\\u202e`), a backslash as two: different names never look the
    same.
    """
    text = name if isinstance(name, str) else os.fsdecode(name)
    if text.isprintable() and "\\" not in text:
        return text
    return show_text(text.replace("\\", "\\\\"))


def show_text(text: str) -> str:
    """As `show_name`, for a whole message: a backslash stays, so no name is escaped twice."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escape(char) for char in text)


def _escape(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # surrogateescape: one byte that is no UTF-8
        code -= 0xDC00
    if code <= 0xFF:
        return _SHORT_ESCAPES.get(char, f"\\x{code:02x}")
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def show_size(size: int) -> str:
    """A number of bytes in the unit that leaves one to four digits: `0 B`, `512 B`, `3.4 GiB`."""
    if abs(size) < 1024:
        return f"{size} B"
    scaled = size / 1024
    unit = 0
    while abs(scaled) >= 1023.95 and unit + 1 < len(_UNITS):  # 1024.0 belongs to the next unit
        scaled /= 1024
        unit += 1
    return f"{scaled:.1f} {_UNITS[unit]}"


def show_table(rows: Iterable[Sequence[str]], headers: Sequence[str]) -> str:
    """The rows below their headers, in columns, those of numbers and sizes to the right.

    No newline at the end.
    """
    cells = [tuple(row) for row in rows]
    columns = [[row[index] for row in cells] for index in range(len(headers))]
    widths = [
        max(len(cell) for cell in (header, *column))
        for header, column in zip(headers, columns, strict=True)
    ]
    to_right = [bool(column) and all(map(_is_number, column)) for column in columns]
    return "\n".join(_line(row, widths, to_right) for row in (headers, *cells))


def _line(row: Sequence[str], widths: Sequence[int], to_right: Sequence[bool]) -> str:
    padded = (
        cell.rjust(width) if right else cell.ljust(width)
        for cell, width, right in zip(row, widths, to_right, strict=True)
    )
    return "  ".join(padded).rstrip()


def _is_number(cell: str) -> bool:
    return cell == "-" or cell.removeprefix("-")[:1].isdigit()


class ProgressBar:
    """A bar on stderr, a new one for each phase; nothing at all where stderr is no terminal.

    A context manager: at its end the bar is closed, so that what follows begins on a line of its
    own.
    """

    def __init__(self) -> None:
        self._enabled = sys.stderr.isatty()
        self._bar: tqdm[Never] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def phase(self, name: str, total: int | None = None, unit: str = "files") -> None:
        """Close the bar of the phase before and begin one that counts `unit` up to `total`."""
        self.close()
        if self._enabled:
            self._bar = _new_bar(name, total, unit)

    def advance(self, count: int = 1) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(count)

    def note(self, files: int, saved: int) -> None:
        """Show at the bar's end how many files that was, and how many bytes were there already."""
        if self._bar is not None:
            text = f"{files} files, {show_size(saved)} saved"
            self._bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        """Leave the bar as it is on its line; harmless when there is none."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _new_bar(name: str, total: int | None, unit: str) -> "tqdm[Never]":
    from tqdm import tqdm  # 40 ms: only where a bar is shown

    in_bytes = unit == "bytes"
    return tqdm(
        desc=name,
        total=total,
        unit="B" if in_bytes else f" {unit}",
        unit_scale=in_bytes,
        unit_divisor=1024 if in_bytes else 1000,
        file=sys.stderr,
        disable=None,
        dynamic_ncols=True,
    )
