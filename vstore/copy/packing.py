"""Rows of a manifest on their way into batches: numbered, packed and digested."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import msgspec
from blake3 import blake3

from vstore.copy.known import Key
from vstore.copy.manifest import Part, Row, cut, is_below, pack_parts, pack_rows
from vstore.copy.messages import ROWS_A_BATCH
from vstore.copy.outline import Outline

_BODY_LIMIT: Final = 2 << 20  # bytes of a batch, about


@dataclass(slots=True)
class Listed:
    """A batch: its rows, and what only this side knows of them."""

    number: int
    first: int
    parts: list[Part] = field(default_factory=list)
    shared: list[int] = field(default_factory=list)  # places in the batch
    groups: list[int] = field(default_factory=list)  # the same, of first names of inodes
    keys: list[Key | None] = field(default_factory=list)
    packed: bytes = b""
    weight: int = 0

    @property
    def count(self) -> int:
        return len(self.keys)

    def rows(self) -> Iterator[tuple[bytes, Row]]:
        """Each row with its folder's path."""
        for path, rows in self.parts:
            for row in rows:
                yield path, row


class Packer:
    """Makes batches of rows, which come with paths below the guest's root.

    `below` is the folder that the manifest is of: paths travel relative to it. An `outline` is
    told of all rows.
    """

    def __init__(self, below: bytes = b"", outline: Outline | None = None) -> None:
        self.digest = blake3()
        self.rows = 0
        self.batches = 0
        self._below = below
        self.outline = outline
        self._batch = Listed(0, 0)

    @property
    def next_row(self) -> int:
        """The number of the row that is added next."""
        return self._batch.first + self._batch.count

    def add(
        self, folder: bytes, row: Row, key: Key | None, *, is_shared: bool, is_group: bool = False
    ) -> Iterator[Listed]:
        """Take a row; the batch comes when it is full."""
        batch = self._batch
        if not batch.parts or batch.parts[-1][0] != folder:
            batch.parts.append((folder, []))
            batch.weight += len(cut(folder, self._below))
        batch.parts[-1][1].append(row)
        if is_shared:
            batch.shared.append(batch.count)
        if is_group:
            batch.groups.append(batch.count)
        batch.keys.append(key)
        batch.weight += 150 + len(row.text) + sum(len(a) + len(b) for a, b in row.xattrs)
        if batch.count >= ROWS_A_BATCH or batch.weight > _BODY_LIMIT:
            yield from self.end()

    def end(self) -> Iterator[Listed]:
        """The batch that is not full; none where nothing is in it."""
        batch = self._batch
        if not batch.keys:
            return
        packed = [(path, pack_rows(rows)) for path, rows in batch.parts]
        if self.outline is not None:
            for (path, rows), (_, body) in zip(batch.parts, packed, strict=True):
                self.outline.add(path, rows, body)
        batch.packed = pack_parts([(cut(path, self._below), body) for path, body in packed])
        self.digest.update(batch.packed)
        self.rows += batch.count
        self.batches = batch.number + 1
        self._batch = Listed(self.batches, self.rows)
        yield batch


class Spool:
    """Batches on disk, in their order. A context manager."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._lengths: list[int] = []

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def put(self, batch: Listed) -> None:
        plain = (
            batch.number,
            batch.first,
            batch.shared,
            batch.groups,
            batch.keys,
            msgspec.Raw(batch.packed),
        )
        packed = msgspec.msgpack.encode(plain)
        self._file.write(packed)
        self._lengths.append(len(packed))

    def take(self) -> Iterator[Listed]:
        """All of them."""
        self._file.seek(0)
        for length in self._lengths:
            packed = self._file.read(length)
            kind = tuple[int, int, list[int], list[int], list[Key | None], msgspec.Raw]
            number, first, shared, groups, keys, raw = msgspec.msgpack.decode(packed, type=kind)
            parts = msgspec.msgpack.decode(raw, type=list[Part])
            yield Listed(number, first, parts, shared, groups, keys, bytes(raw))

    def take_below(self, folder: bytes, packer: Packer) -> Iterator[Listed]:
        """Those rows that are of the tree at `folder`, in batches of their own."""
        for batch in self.take():
            shared, groups = frozenset(batch.shared), frozenset(batch.groups)
            for place, ((path, row), key) in enumerate(zip(batch.rows(), batch.keys, strict=True)):
                if is_below(path, folder):
                    yield from packer.add(
                        path, row, key, is_shared=place in shared, is_group=place in groups
                    )
        yield from packer.end()
