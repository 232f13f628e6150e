"""How many places of a terminal's line a text takes; as wcwidth(3) has it."""

import unicodedata
from collections.abc import Iterator
from typing import Final

_NO_PLACE: Final = ("Mn", "Me", "Cf")
_WIDE: Final = "WF"


def widths(text: str) -> Iterator[int]:
    """The places that each character takes: 0, 1 or 2."""
    for char in text:
        if unicodedata.category(char) in _NO_PLACE:
            yield 0
        else:
            yield 2 if unicodedata.east_asian_width(char) in _WIDE else 1


def index_at(text: str, column: int) -> int:
    """How many characters of `text` stand on its first `column` places."""
    if text.isascii():
        return min(column, len(text))
    taken = 0
    for index, width in enumerate(widths(text)):
        if width and taken + width > column:
            return index
        taken += width
    return len(text)


def fit(text: str, columns: int) -> str:
    """`text` on exactly that many places: cut, or filled with blanks."""
    kept = text[: index_at(text, columns)]
    return kept + " " * (columns - sum(widths(kept)))
