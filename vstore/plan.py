"""Who shares with whom: equal files become slots, one object each with the names to be its links.

Equal files of one tree (twins) never share an inode: the k-th takes the k-th object, which it
shares with the k-th of every other tree. A tree that uses some of the objects already takes the
lowest places that it does not use, so numbers stay the same over runs.
"""

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Final

from vstore.member import Member
from vstore.pool import Identity

NAMES_A_BATCH: Final = 500
OBJECTS_A_BATCH: Final = 150  # each is a descriptor that the keeper holds too

_TREE: Final = attrgetter("tree")
_TURN: Final = attrgetter("turn", "tree")

KnownObject = tuple[bytes, bytes, int, int, int, bool]
"""An object:

digest, digest of the xattrs, mtime (ns), number, inode number, takes no more links.
"""


@dataclass(frozen=True, slots=True)
class Rules:
    """What counts as equal, and what is worth an object."""

    ignore_mtime: bool = False
    link_twins: bool = False
    everything: bool = False  # an object for every file, as vhashify fills its pool


@dataclass(frozen=True, slots=True)
class Slot:
    """One object and the files whose names shall be links to it.

    `ino` is 0 while there is no such object: then one of `members` is adopted as it.
    """

    identity: Identity
    number: int
    ino: int
    members: Sequence[Member]
    goes_on: bool = False  # a further piece of a slot whose first members are on their way already

    @property
    def object_name(self) -> str:
        return self.identity.name(self.number)

    def sources(self) -> list[Member]:
        """The members that may become the object, best first: all names of their inode are here."""
        if self.ino:
            return []
        here = Counter(member.ino for member in self.members)
        able = [
            member
            for member in self.members
            if here[member.ino] >= member.nlink and member.mtime == self.identity.mtime_ns
        ]
        return sorted(able, key=lambda member: -member.nlink)

    def is_worth_it(self, rules: Rules) -> bool:
        """Whether anything is shared by it."""
        if self.ino or self.goes_on or rules.everything:
            return True
        first = self.members[0]
        return first.nlink > 1 or any(member.ino != first.ino for member in self.members)


class _Places:
    """The objects of one identity in their order, existing or to be made, and who uses which."""

    def __init__(
        self,
        identity: Identity,
        found: Sequence[KnownObject],
        used: Container[tuple[int, int]],
        rules: Rules,
    ) -> None:
        self._identity = identity
        self._rules = rules
        self._used = used
        self._next: dict[int, int] = {}
        self._begun: set[int] = set()
        if rules.ignore_mtime:
            self._objects = dict(enumerate(sorted(found, key=lambda item: item[2:4])))
        else:
            self._objects = {item[3]: item for item in found}

    def find_place(self, member: Member) -> int:
        """The lowest place that the member's tree does not use yet."""
        place = self._next.get(member.tree, 0)
        while self._objects and self._is_taken(place, member.tree):
            place += 1
        self._next[member.tree] = place if self._rules.link_twins else place + 1
        return place

    def make_slot(self, place: int, members: Sequence[Member]) -> Slot:
        if place in self._objects:
            _, _, mtime, number, ino, _ = self._objects[place]
            return Slot(self._with_mtime(mtime), number, ino, members, place in self._begun)
        goes_on = place in self._begun
        self._begun.add(place)
        if not self._rules.ignore_mtime:
            return Slot(self._identity, place, 0, members, goes_on)
        mtime = _oldest(members)
        return Slot(self._with_mtime(mtime), self._take_number(mtime, place), 0, members)

    def _is_taken(self, place: int, tree: int) -> bool:
        if place not in self._objects:
            return False
        *_, ino, is_full = self._objects[place]
        return is_full or (not self._rules.link_twins and (tree, ino) in self._used)

    def _take_number(self, mtime: int, place: int) -> int:
        taken = {item[3] for item in self._objects.values() if item[2] == mtime}
        number = 0
        while number in taken:
            number += 1
        self._objects[place] = (b"", b"", mtime, number, 0, False)
        return number

    def _with_mtime(self, mtime: int) -> Identity:
        known = self._identity
        return Identity(
            known.digest, known.size, known.mode, known.uid, known.gid, mtime, known.xattrs
        )


def take_turns(members: Sequence[Member]) -> list[Member]:
    """Equal members with their turns: inodes that are shared already first, in a stable order."""
    if len({member.tree for member in members}) == len(members):
        return sorted(members, key=_TREE)  # no twins: the first turn is everyone's
    turns: Counter[int] = Counter()
    counted = []
    for member in sorted(members, key=lambda item: (item.nlink == 1, item.nlink, item.ino)):
        turn = turns[member.tree]
        turns[member.tree] = turn + 1
        counted.append(member if member.turn == turn else member._replace(turn=turn))
    counted.sort(key=_TURN)
    return counted


def plan_group(
    members: Iterable[Member],
    objects: Sequence[KnownObject],
    used: Container[tuple[int, int]],
    rules: Rules,
) -> Iterator[Slot]:
    """The slots of equal members, which come in the order of their turns.

    `objects` are those of the same identity; `used` says which tree has which: (tree, inode
    number).
    """
    places: _Places | None = None
    waiting: dict[int, list[Member]] = {}
    for turn, rows in groupby(members, key=attrgetter("turn")):
        for member in rows:
            if places is None:
                places = _Places(member.identity, objects, used, rules)
            waiting.setdefault(places.find_place(member), []).append(member)
        assert places is not None  # noqa: S101 - groupby gives no empty group
        # A tree's next place is beyond this turn, so the places up to it are complete.
        for place in sorted(waiting):
            enough = len(waiting[place]) >= NAMES_A_BATCH if rules.link_twins else place <= turn
            if enough:
                yield places.make_slot(place, waiting.pop(place))
    if places is not None:
        for place, rest in sorted(waiting.items()):
            yield places.make_slot(place, rest)


def batch_slots(slots: Iterable[Slot], *, names: int = NAMES_A_BATCH) -> Iterator[list[Slot]]:
    """Gather slots to batches of about `names` names; a larger slot is cut into several."""
    batch: list[Slot] = []
    count = 0
    for slot in slots:
        for piece in _cut(slot, names):
            if batch and (count + len(piece.members) > names or len(batch) >= OBJECTS_A_BATCH):
                yield batch
                batch, count = [], 0
            batch.append(piece)
            count += len(piece.members)
    if batch:
        yield batch


def _cut(slot: Slot, names: int) -> Iterator[Slot]:
    for start in range(0, len(slot.members), names):
        yield Slot(slot.identity, slot.number, slot.ino, slot.members[start : start + names])


def _oldest(members: Sequence[Member]) -> int:
    """The mtime (ns) of the oldest member all names of whose inode are among the members."""
    here = Counter(member.ino for member in members)
    able = [member.mtime for member in members if here[member.ino] >= member.nlink]
    return min(able, default=members[0].mtime)


class Reclaimed:
    """Counts the bytes that replaced names give back: those of an inode with its last name."""

    def __init__(self) -> None:
        self.bytes = 0
        self._replaced: Counter[tuple[int, int]] = Counter()

    def replace(self, member: Member, own_bytes: int) -> None:
        """Note that the member's name is (or would be) a link to an object now.

        `own_bytes` are those that its inode shared with no other.
        """
        if member.nlink > 1:
            key = (member.volume, member.ino)
            self._replaced[key] += 1
            if self._replaced[key] < member.nlink:
                return
        self.bytes += own_bytes
