"""What an entry is to be like: owner, mode, attributes and time.

Folders get theirs at the end, once nothing is made in them any more.
"""

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from typing import BinaryIO, Final

import msgspec

from vstore import inode
from vstore.copy.staging import Meta
from vstore.pool import find_metadata, load_metadata

_PLENTY: Final = 1 << 20  # bytes: what is refused for lack of room then is too large


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


def dress(fd: int, meta: Meta) -> None:
    """Give the inode behind `fd` all that the row says, in the order that keeps it."""
    mode, uid, gid, mtime_ns, xattrs = meta
    status = os.fstat(fd)
    is_foreign = (status.st_uid, status.st_gid) != (uid, gid)
    if is_foreign:
        os.fchown(fd, uid, gid)  # drops setuid bits and file capabilities, so first
    if is_foreign or stat.S_IMODE(status.st_mode) != stat.S_IMODE(mode):
        os.fchmod(fd, stat.S_IMODE(mode))
    try:
        inode.store_xattrs(fd, dict(xattrs))
    except OSError as error:
        room = os.fstatvfs(fd)
        if error.errno != errno.ENOSPC or room.f_bavail * room.f_frsize < _PLENTY:
            raise
        reason = "it has more attributes than the file system keeps"
        raise OSError(errno.E2BIG, reason) from error
    if xattrs and stat.S_IMODE(os.fstat(fd).st_mode) != stat.S_IMODE(mode):  # an ACL's mask
        os.fchmod(fd, stat.S_IMODE(mode))
    os.utime(fd, ns=(mtime_ns, mtime_ns))


def dress_object(fd: int, name: str, meta: Meta) -> None:
    """See that the file has all that the object's name says: mostly it has since it arrived. Its
    content was read then.
    """
    if load_metadata(fd) == find_metadata(name):
        return
    dress(fd, meta)
    if load_metadata(fd) != find_metadata(name):
        raise OSError(errno.EINVAL, "the file system does not keep its metadata")
