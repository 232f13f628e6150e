"""What a pool has, to be asked for by inode number or by digest: for one run, in bounded memory.

The names of all objects are read once. Others may add and reclaim objects meanwhile: whoever uses
an answer looks whether it is still so.
"""

from collections.abc import Iterator
from contextlib import suppress
from typing import Final

from vstore.copy.table import Table
from vstore.index import signed
from vstore.pool import Identity, Pool, parse_object

_ALIKE: Final = 4
"""So many objects of one content, which differ in owner, mode or time, are told of: any will do."""
_THERE, _OURS = 1, 2


class Inodes:
    """The objects of a pool by inode number."""

    def __init__(self, pool: Pool | None) -> None:
        self._names: Table[int, str] = Table()
        self._is_empty = True
        for path, ino in pool.list_objects() if pool is not None else ():
            self._names.put(signed(ino), path[3:])
            self._is_empty = False

    def close(self) -> None:
        self._names.close()

    def find(self, ino: int) -> Identity | None:
        """What the object with this inode number is; None where none has it."""
        name = None if self._is_empty else self._names.get(signed(ino))
        with suppress(ValueError):
            return None if name is None else parse_object(name)[0]
        return None


class Shelf:
    """The objects of a pool as they were when it was read, and those that were added by `add`; what
    of contents has been asked for.
    """

    def __init__(self, pool: Pool | None) -> None:
        self._names: Table[str, int] = Table()
        self._same: Table[bytes, str] = Table()
        self._asked: Table[bytes, int] = Table()
        self._uses: Table[str, int] = Table()
        for path, _ in pool.list_objects() if pool is not None else ():
            with suppress(ValueError):
                self._note(path[3:], _THERE)

    def close(self) -> None:
        for table in (self._names, self._same, self._asked, self._uses):
            table.close()

    def _note(self, name: str, state: int) -> None:
        digest = bytes.fromhex(name[:64])
        self._names.put(name, state)
        known = self._same.get(digest)
        if known is None:
            self._same.put(digest, name)
        elif known.count(" ") + 1 < _ALIKE and name not in known.split(" "):
            self._same.put(digest, f"{known} {name}")

    def add(self, name: str) -> None:
        """An object of this name (without its folder) is there now, or will be."""
        self._note(name, _OURS)

    def drop(self, name: str) -> None:
        """The object of this name is gone."""
        digest = bytes.fromhex(name[:64])
        self._names.drop(name)
        left = [other for other in (self._same.get(digest) or "").split(" ") if other != name]
        if left and left[0]:
            self._same.put(digest, " ".join(left))
        else:
            self._same.drop(digest)

    def knows(self, name: str) -> bool:
        """Whether there is an object of this name."""
        return self._names.get(name) is not None

    def is_ours(self, name: str) -> bool:
        """Whether `add` told of it."""
        return self._names.get(name) == _OURS

    def has_content(self, digest: bytes) -> bool:
        """Whether there is an object of this content."""
        return self._same.get(digest) is not None

    def list_same(self, digest: bytes, first: str) -> Iterator[str]:
        """The names of objects of this content, that of the name `first` before the others."""
        known = self._same.get(digest)
        if known is None:
            return
        if self.knows(first):
            yield first
        yield from (name for name in known.split(" ") if name != first)

    def take_name(self, identity: Identity) -> str:
        """The name of the object for the next file of this identity: its number is how many there
        were before in this run.
        """
        first = identity.name(0)[3:]
        times = self._uses.get(first) or 0
        self._uses.put(first, times + 1)
        return identity.name(times)[3:] if times else first

    def ask(self, digest: bytes) -> bool:
        """Whether this content is asked for now for the first time; it is noted as asked for."""
        if self._asked.get(digest) is not None:
            return False
        self._asked.put(digest, 1)
        return True

    def was_asked(self, digest: bytes) -> bool:
        return self._asked.get(digest) is not None

    def forget(self, digest: bytes) -> None:
        """This content will not come after all."""
        self._asked.drop(digest)
