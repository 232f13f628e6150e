"""Where the content of a row's file comes from: what this side has need not be sent.

It may be an object of the pool, a content that arrived when an earlier copy was cut off, or the
target's version of the same file; of a large file that differs the blocks that are equal.
"""

import errno
import os
import secrets
import stat
from contextlib import suppress
from typing import Final, NamedTuple

from vstore import inode
from vstore.copy import blocks, placer
from vstore.copy.area import Area
from vstore.copy.listing import Listing
from vstore.copy.manifest import Row, can_be_object, digest_of_xattrs
from vstore.copy.messages import Base, Dialogue
from vstore.copy.proof import prove
from vstore.copy.shelf import Shelf
from vstore.copy.staging import Meta, Spot
from vstore.pool import Pool
from vstore.scan import open_below

_MIN_SIZE: Final = 16  # bytes of an object, as vunify
_BASE_STEP: Final = 1 << 20  # bytes of blocks' digests a message
_OFFERED_AT_MOST: Final = 32 << 20
"""Bytes of blocks' digests on their way to the sender: what both sides' buffers hold, so that
neither waits for the other to take something.
"""
_SHARE: Final = 8  # a file's part of what is left of that
_COARSEST: Final = 4 << 20  # bytes of a block that is larger than a file's finest


class Wish(NamedTuple):
    """A file to be made: its place, its row, whether it may be an object, whether more names of
    its inode follow.
    """

    spot: Spot
    row: Row
    may_share: bool
    is_group: bool

    @property
    def meta(self) -> Meta:
        return meta_of(self.row)


class Chooser:
    """Finds contents. `base_fd`: the target's version of the tree, -1 for none; `base` lists it.

    Without an area nothing is made: it is only found out what is here. The pool's lock is held
    while objects are looked for, and their numbers are added to `pinned`. A target that has a
    project shares nothing: it could not be given to the project again before the guest starts.
    """

    def __init__(
        self,
        dialogue: Dialogue,
        pool: Pool | None,
        area: Area | None,
        base_fd: int,
        base: Listing | None,
    ) -> None:
        self._dialogue = dialogue
        self._area = area
        self._base_fd = base_fd
        self._base = base
        self._objects_fd = -1 if pool is None else pool.objects_fd
        self._shelf = Shelf(pool)
        self.deltas: dict[int, bytes] = {}  # row -> folder of the version that it is made from
        self._offered: dict[int, int] = {}  # row -> bytes of blocks' digests
        self._offered_bytes = 0
        self._device = -1 if area is None else os.fstat(area.tree_fd).st_dev
        self._is_limited = area is not None and _is_of_another_project(base_fd, area.tree_fd)

    def close(self) -> None:
        self._shelf.close()

    def ask(self, digest: bytes) -> bool:
        """Whether this content is to be asked for now: it has not been yet."""
        return self._shelf.ask(digest)

    def forget(self, digest: bytes) -> None:
        """A content that was asked for will not come."""
        self._shelf.forget(digest)

    def has_arrived(self, row: Row) -> bool:
        """Whether the content has come already, in this run or in one that was cut off."""
        if self._area is None:
            return False
        may_be = bool(self._area.leftovers) or self._shelf.was_asked(row.digest)
        return may_be and self._area.has_arrived(row.digest)

    def is_ours(self, name: str) -> bool:
        """Whether this run makes the object: its content came, or was proven, before."""
        return self._shelf.is_ours(name)

    def is_proven(self, name: str, nonce: bytes, proof: bytes) -> bool:
        """Whether who gave this proof has the content of that object. Raises OSError."""
        fd = os.open(f"{name[:2]}/{name}", inode.OPEN_TO_READ, dir_fd=self._objects_fd)
        try:
            return secrets.compare_digest(prove(fd, nonce), proof)
        finally:
            os.close(fd)

    def find_object(self, row: Row, pinned: list[int]) -> str:
        """An object of this content that is there now, at best the very one; "" for none."""
        if not self._shelf.has_content(row.digest):
            return ""
        for name in self._shelf.list_same(row.digest, row.identity().name(0)[3:]):
            if self._is_there(name, pinned):
                return name
        return ""

    def _is_there(self, name: str, pinned: list[int]) -> bool:
        """Whether the object is there, and stays; one of ours the worker makes, or has."""
        try:
            found = os.stat(f"{name[:2]}/{name}", dir_fd=self._objects_fd, follow_symlinks=False)
        except FileNotFoundError:
            if self._shelf.is_ours(name):
                return True
            self._shelf.drop(name)
            return False
        pinned.append(found.st_ino)
        return True

    def step(self, wish: Wish, origin: placer.Origin, pinned: list[int]) -> placer.Step:
        """How the file is made of a content that is here."""
        spot, row = wish.spot, wish.row
        may_share = wish.may_share and not self._is_limited
        if not may_share or self._area is None or not can_be_object(row, min_size=_MIN_SIZE):
            return (placer.OWN, spot, origin, wish.meta, wish.is_group)
        name = self._shelf.take_name(row.identity())
        if self._shelf.knows(name) and self._is_there(name, pinned):
            return (placer.LINK, spot, name)
        self._shelf.add(name)
        return (placer.NEW, spot, origin, name, wish.meta)

    def open_in_base(self, path: bytes, name: bytes) -> int:
        """The target's version of a file. Raises OSError."""
        if self._base_fd < 0:
            raise FileNotFoundError(errno.ENOENT, "there is no version of it")
        folder_fd = open_below(self._base_fd, path)
        try:
            return os.open(name, inode.OPEN_TO_READ, dir_fd=folder_fd)
        finally:
            os.close(folder_fd)

    def find_in_base(self, wish: Wish, pinned: list[int]) -> placer.Step | None:
        """How the file is made of the target's version of it, where that has the same content."""
        (_, path, name), row = wish.spot, wish.row
        if self._base is None:
            return None
        with suppress(OSError):
            fd = self.open_in_base(path, name)
            try:
                status = os.fstat(fd)
                is_equal = (
                    stat.S_ISREG(status.st_mode)
                    and status.st_size == row.size
                    and self._base.digest_of(fd) == row.digest
                )
                is_private = not wish.may_share and not wish.is_group
                is_private &= status.st_nlink == 1 and status.st_dev == self._device
                if is_equal and is_private and _looks_as(fd, status, row):
                    return (placer.RELINK, wish.spot, status.st_ino)
            finally:
                os.close(fd)
            if is_equal:
                return self.step(wish, ("base", (path, name)), pinned)
        return None

    def offer_blocks(self, spot: Spot) -> None:
        """Say which blocks the target's version of a large file has."""
        most = (_OFFERED_AT_MOST - self._offered_bytes) // _SHARE
        with suppress(OSError):
            fd = self.open_in_base(spot[1], spot[2])
            try:
                status = os.fstat(fd)
                if not stat.S_ISREG(status.st_mode) or status.st_size <= blocks.LARGE:
                    return
                finest = blocks.choose_block(status.st_size)
                block = max(finest, blocks.choose_block(status.st_size, max(most, 8)))
                if block > max(finest, _COARSEST):
                    return
                digests = b""
                if self._base is not None and block == finest:
                    digests = self._base.known_blocks(fd)
                digests = digests or blocks.digest_blocks(fd, status.st_size, block)
            finally:
                os.close(fd)
            for start in range(0, len(digests), _BASE_STEP):
                some = digests[start : start + _BASE_STEP]
                self._dialogue.send(Base(spot[0], block, some, status.st_size))
            self.deltas[spot[0]] = spot[1]
            self._offered[spot[0]] = len(digests)
            self._offered_bytes += len(digests)

    def drop_delta(self, row: int) -> None:
        """The content of a row has come, or will not."""
        self.deltas.pop(row, None)
        self._offered_bytes -= self._offered.pop(row, 0)


def _is_of_another_project(base_fd: int, beside_fd: int) -> bool:
    """Whether the target has a project of its own, with a quota: no object can be a file of it."""
    return base_fd >= 0 and inode.project_id(base_fd) != inode.project_id(beside_fd)


def meta_of(row: Row) -> Meta:
    """What an entry is to be like."""
    return (row.mode, row.uid, row.gid, row.mtime_ns, row.xattrs)


def _looks_as(fd: int, status: os.stat_result, row: Row) -> bool:
    found = (status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns)
    if found != (row.mode, row.uid, row.gid, row.mtime_ns) or inode.is_fixed(fd):
        return False
    return digest_of_xattrs(inode.load_xattrs(fd).items()) == digest_of_xattrs(row.xattrs)
