"""Contents on their way in: each is held against its row's digest before anything is made of it."""

import os

from blake3 import blake3

from vstore import extents
from vstore.copy import blocks
from vstore.copy.area import Area
from vstore.copy.choice import Chooser
from vstore.copy.manifest import Row
from vstore.copy.messages import Hostile, Piece
from vstore.digest import digest_content


class Incoming:
    """Writes contents to the area."""

    def __init__(self, area: Area, chooser: Chooser) -> None:
        self._area = area
        self._chooser = chooser
        self._part: tuple[int, int] | None = None  # row, descriptor of what is arriving

    def close(self) -> None:
        if self._part is not None:
            os.close(self._part[1])
            self._part = None

    def keep(self, row: Row, content: bytes) -> bool:
        """Keep a whole content; False where it is not the row's. Raises OSError."""
        if len(content) != row.size or blake3(content).digest() != row.digest:
            return False
        self._area.keep_content(content, row.digest, row.mode & 0o777)
        return True

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
        return self._end(row) if piece.last else None

    def drop(self, number: int) -> None:
        """The rest of this row's file will not come."""
        self._chooser.deltas.pop(number, None)
        if self._part is not None and self._part[0] == number:
            self.close()
            self._area.drop_part(number)

    def _begin(self, number: int, path: bytes, row: Row) -> int:
        fd = self._area.open_part(number)
        try:
            if number in self._chooser.deltas:
                base_fd = self._chooser.open_in_base(path, row.name)
                try:
                    extents.copy_data(base_fd, fd, size=os.fstat(base_fd).st_size)
                finally:
                    os.close(base_fd)
            os.ftruncate(fd, row.size)
        except OSError:
            os.close(fd)
            raise
        return fd

    def _end(self, row: Row) -> bool:
        number, fd = self._part or (-1, -1)
        is_good = _digest(fd) == row.digest
        self.close()
        self._chooser.deltas.pop(number, None)
        if is_good:
            self._area.keep_part(number, row.digest)
        else:
            self._area.drop_part(number)
        return is_good


def _digest(fd: int) -> bytes:
    """BLAKE3 of the file behind `fd`; of a large one without holes by all cores."""
    status = os.fstat(fd)
    if status.st_blocks * 512 >= status.st_size > blocks.LARGE:
        hasher = blake3(max_threads=blake3.AUTO)
        return hasher.update_mmap(f"/proc/self/fd/{fd}").digest()
    return digest_content(fd, status)
