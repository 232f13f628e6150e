"""Contents on their way in: each is held against its row's digest before anything is made of it."""

import os
from typing import Final

from blake3 import blake3

from vstore import extents
from vstore.copy import placer
from vstore.copy.area import Area
from vstore.copy.choice import Chooser
from vstore.copy.manifest import Row
from vstore.copy.messages import Hostile, Piece
from vstore.copy.staging import Staging
from vstore.digest import digest_content

_BUFFER: Final = 1 << 20
_HUGE: Final = 64 << 20
_THREADS: Final = min(4, os.cpu_count() or 1)
"""Cores that digest a huge file (bytes): who waits for that has nothing else to do."""


class Incoming:
    """Writes contents to the area."""

    def __init__(self, area: Area, staging: Staging, chooser: Chooser) -> None:
        self._area = area
        self._staging = staging
        self._chooser = chooser
        self._part: tuple[int, int] | None = None  # row, descriptor of what is arriving
        self._follower: Follower | None = None

    def close(self) -> None:
        if self._part is not None:
            os.close(self._part[1])
            self._part = None
        if self._follower is not None:
            self._follower.close()
            self._follower = None

    def keep(self, step: placer.Step, row: Row, content: bytes) -> placer.Step:
        """Keep the content of a row, which was held against its digest: what is to be an object in
        its place in the tree, all other among what arrived. Gives what is to be done now instead of
        `step`. Raises OSError.
        """
        mode = row.mode & 0o777
        if step[0] == placer.NEW:
            _, spot, _, name, meta = step
            if self._staging.put(spot, content, mode, row.mtime_ns):
                return (placer.ENTER, spot, name, meta)
        self._area.keep_content(content, row.digest, mode, row.mtime_ns)
        return step

    def take(self, piece: Piece, path: bytes, row: Row) -> bool | None:
        """Keep a piece; after the last one, whether the file is the row's. Raises OSError."""
        if piece.at + len(piece.data) > row.size:
            raise Hostile(f"more of {row.name!r} than it has")
        if self._part is None:
            self._part = (piece.row, self._begin(piece.row, path, row))
        if self._part[0] != piece.row:
            raise Hostile("pieces of two files at once")
        done = 0
        while done < len(piece.data):
            done += os.pwrite(self._part[1], piece.data[done:], piece.at + done)
        if self._follower is not None:
            self._follower.take(piece.at, piece.data)
        return self._end(row) if piece.last else None

    def drop(self, number: int) -> None:
        """The rest of this row's file will not come."""
        self._chooser.drop_delta(number)
        if self._part is not None and self._part[0] == number:
            self.close()
            self._area.drop_part(number)

    def _begin(self, number: int, path: bytes, row: Row) -> int:
        fd = self._area.open_part(number)
        base_fd = -1
        try:
            if number in self._chooser.deltas:
                base_fd = self._chooser.open_in_base(path, row.name)
            self._follower = Follower(fd, row.size, base_fd)
            if base_fd >= 0:
                extents.copy_data(base_fd, fd, size=os.fstat(base_fd).st_size)
            os.ftruncate(fd, row.size)
        except OSError:
            os.close(fd)
            raise
        return fd

    def _end(self, row: Row) -> bool:
        number, fd = self._part or (-1, -1)
        found = self._follower.end() if self._follower is not None else b""
        is_good = (found or digest_content(fd, os.fstat(fd))) == row.digest
        self.close()
        self._chooser.drop_delta(number)
        if is_good:
            self._area.keep_part(number, row.digest)
        else:
            self._area.drop_part(number)
        return is_good


class Follower:
    """Digests a file while its pieces arrive, so that little is left to be read at the end.

    That goes where they come in their order, and the gaps between them are no holes. What the gaps
    have was copied from the base just now, and is read from there: a copy that shares its blocks
    with the base would come from the disk once more.
    """

    def __init__(self, fd: int, size: int, base_fd: int) -> None:
        self._fd = fd
        self._size = size
        self._base_fd = base_fd
        self._base = os.fstat(base_fd) if base_fd >= 0 else None
        self._done = 0
        threads = _THREADS if size > _HUGE else 1
        self._hasher: blake3 | None = blake3(max_threads=threads)

    def close(self) -> None:
        if self._base_fd >= 0:
            os.close(self._base_fd)
            self._base_fd = -1

    def take(self, at: int, data: bytes) -> None:
        """A piece that is in the file now."""
        if at < self._done or not self._read_to(at):
            self._hasher = None
        elif self._hasher is not None:
            self._hasher.update(data)
            self._done = at + len(data)

    def end(self) -> bytes:
        """BLAKE3 of the whole file; b"" where it has to be read for that."""
        if not self._read_to(self._size) or self._hasher is None:
            return b""
        if self._base is not None and not _is_as_before(self._base_fd, self._base):
            return b""
        return self._hasher.digest()

    def _read_to(self, end: int) -> bool:
        """Digest what is in the file already, up to there; False where that cannot be."""
        if end == self._done:
            return True
        status = self._base or os.fstat(self._fd)
        if self._hasher is None or status.st_blocks * 512 < status.st_size:
            return False
        buffer = memoryview(bytearray(_BUFFER))
        while self._done < end:
            fd, most = self._fd, end
            if self._base is not None and self._done < self._base.st_size:
                fd, most = self._base_fd, min(end, self._base.st_size)
            got = os.preadv(fd, [buffer[: min(_BUFFER, most - self._done)]], self._done)
            if not got:
                return False
            self._hasher.update(buffer[:got])
            self._done += got
        return True


def _is_as_before(fd: int, before: os.stat_result) -> bool:
    now = os.fstat(fd)
    return (now.st_size, now.st_mtime_ns, now.st_ctime_ns) == (
        before.st_size,
        before.st_mtime_ns,
        before.st_ctime_ns,
    )
