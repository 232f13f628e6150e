"""Folders that were made and get their looks at the end, once nothing is made in them any more."""

import tempfile
from collections.abc import Iterator
from typing import BinaryIO

import msgspec

from vstore.copy.placer import Meta


class Undressed:
    """Paths of folders with what they are to be like, on disk."""

    def __init__(self) -> None:
        self._file: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115
        self._count = 0

    def close(self) -> None:
        self._file.close()

    def put(self, path: bytes, meta: Meta) -> None:
        packed = msgspec.msgpack.encode((path, meta))
        self._file.write(len(packed).to_bytes(4, "big") + packed)
        self._count += 1

    def take(self) -> Iterator[tuple[bytes, Meta]]:
        """All of them, in their order: none is touched by what is made in another's."""
        self._file.seek(0)
        for _ in range(self._count):
            length = int.from_bytes(self._file.read(4), "big")
            path, meta = msgspec.msgpack.decode(self._file.read(length))
            mode, uid, gid, mtime_ns, xattrs = meta
            yield path, (mode, uid, gid, mtime_ns, [(bytes(a), bytes(b)) for a, b in xattrs])
