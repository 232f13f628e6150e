"""What a run has done so far: counts, and what the next step or the next run must know of it."""

import os
from array import array
from collections.abc import Iterable, Sequence
from typing import Final

from vstore import apply, reading
from vstore.catalog import Catalog, ToRead
from vstore.index import DigestRow
from vstore.member import Member
from vstore.order import Target, UnifyResult
from vstore.plan import Reclaimed
from vstore.pool import InodeNumbers

_ROWS_AT_ONCE: Final = 20_000


class Tally:
    """Counts into a result.

    `used` are the objects of each tree by inode number, `full` the names of objects that take no
    more links.
    """

    def __init__(self, targets: Sequence[Target], catalog: Catalog, result: UnifyResult) -> None:
        self.result = result
        self.used = [array("Q") for _ in targets]
        self.full: set[str] = set()
        self.reclaimed = Reclaimed()
        self._targets = targets
        self._catalog = catalog
        self._leftover: list[DigestRow] = []

    def load_used(self) -> list[InodeNumbers]:
        """The objects that each tree uses now."""
        return [InodeNumbers(numbers) for numbers in self.used]

    def take_answers(self, members: Iterable[Member], answers: list[apply.Answer]) -> list[int]:
        again = []
        adopted = set()
        result = self.result
        for member, (row, outcome, ino, own_bytes) in zip(members, answers, strict=True):
            if outcome == apply.UNIFIED:
                result.files_unified += 1
                self.used[member.tree].append(ino)
                self.reclaimed.replace(member, own_bytes)
            elif outcome == apply.ADOPTED:
                result.files_unified += 1
                self.used[member.tree].append(ino)
                adopted.add(ino)
            elif outcome in (apply.FULL, apply.RETRY):
                again.append(row)
            elif outcome == apply.ALREADY:
                result.files_already += 1
            elif outcome == apply.UNIQUE or outcome in reading.REASONS:
                result.skip(outcome)
            else:
                path = self._catalog.load_folder(member.folder)[0]
                self.note_error(member.tree, join(path, member.name), outcome)
        result.objects_new += len(adopted)
        return again

    def keep_leftover(self, left: Iterable[Member]) -> None:
        """Remember what was read and is no link, so that no later run reads it again."""
        for member in left:
            if not member.fresh and member.digest is not None and member.xattrs is not None:
                key = (member.volume, member.ino, member.size, member.mtime, member.ctime)
                self._leftover.append((*key, member.digest, member.xattrs))
        if len(self._leftover) >= _ROWS_AT_ONCE:
            self.store_leftover()

    def keep_read(self, found: Iterable[tuple[ToRead, bytes, bytes, bool]]) -> None:
        """Remember what was read to be linked later: (file, digest, xattrs digest, fresh)."""
        for file, digest, xattrs, fresh in found:
            if not fresh:
                key = (file.volume, file.ino, file.size, file.mtime, file.ctime)
                self._leftover.append((*key, digest, xattrs))
        if len(self._leftover) >= _ROWS_AT_ONCE:
            self.store_leftover()

    def store_leftover(self) -> None:
        """Write what is remembered to the index."""
        self._catalog.keep_digests(self._leftover)
        self._leftover.clear()

    def note_error(self, tree: int, path: bytes, reason: str) -> None:
        root = os.fspath(self._targets[tree].held.guest.root)
        self.result.errors.append((f"{root}/{os.fsdecode(path)}", reason))


def join(folder: bytes, name: bytes) -> bytes:
    """The path of a name in a folder, both below a tree's root."""
    return folder + b"/" + name if folder else name
