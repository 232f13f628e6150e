"""A batch of a manifest while its receiver works on it, and what came of all of them."""

from dataclasses import dataclass, field
from typing import Final

from vstore.copy.choice import Wish
from vstore.copy.manifest import Row
from vstore.copy.messages import Batch
from vstore.folders import join

_NAMED_AT_MOST: Final = 1000
_SHOWN: Final = 4000  # bytes of a path


@dataclass(slots=True)
class Tally:
    """What came of a run. `errors` are (path, reason), with paths below the guest's root, which is
    noted with that of the tree at `below`.
    """

    below: bytes = b""
    rows: int = 0
    files: int = 0
    files_sent: int = 0
    size: int = 0
    lacking: int = 0
    linked: int = 0
    inodes: int = 0  # that are new
    made: int = 0
    errors: list[tuple[bytes, str]] = field(default_factory=list)
    error_count: int = 0
    left_out: list[tuple[bytes, str]] = field(default_factory=list)

    def take_back(self, size: int) -> None:
        """A file is not made of this row: it may be listed again."""
        self.made -= 1
        self.files -= 1
        self.size -= size

    def note_error(self, path: bytes, reason: str) -> None:
        self.error_count += 1
        if len(self.errors) < _NAMED_AT_MOST:
            self.errors.append((join(self.below, path)[:_SHOWN], reason[:_SHOWN]))

    def note_left_out(self, path: bytes, reason: str) -> None:
        if len(self.left_out) < _NAMED_AT_MOST:
            self.left_out.append((join(self.below, path)[:_SHOWN], reason))


@dataclass(slots=True)
class OpenBatch:
    """A batch that has not been served to its end; keys are places in it."""

    message: Batch
    rows: list[tuple[bytes, Row]]
    shared: frozenset[int]
    groups: frozenset[int]
    wanted: set[int] = field(default_factory=set)
    later: list[int] = field(default_factory=list)
    waiting: frozenset[int] = frozenset()  # of those later: for a content that another row brings
    proven: list[tuple[int, str]] = field(default_factory=list)  # place, the object's name
    pins: list[str] = field(default_factory=list)
    nonce: bytes = b""
    are_proven: bool = False

    @property
    def first(self) -> int:
        return self.message.first

    def wish(self, place: int) -> Wish:
        path, row = self.rows[place]
        is_group = place in self.groups
        spot = (self.first + place, path, row.name)
        return Wish(spot, row, place in self.shared and not is_group, is_group)
