"""Reading guests' files under a lease: the proof that what was read is what is there.

While the lease is held unbroken nobody writes; whatever else changes shows in the ctime, which is
compared when the file is opened for linking.
"""

import errno
import os
import time
from collections.abc import Callable, Container, Sequence
from typing import Any, Final

from blake3 import blake3

from vstore import inode, lease
from vstore.digest import SMALL, digest_content
from vstore.index import SETTLED_NS
from vstore.pool import digest_xattrs
from vstore.scan import Tree, open_below

# Why a file is left alone.
BUSY: Final = "busy"  # open for writing, mapped writable, or leased otherwise
CHANGED: Final = "changed"  # not what it was when its folder was read
RECENT: Final = "recent"  # changed a moment ago, in a guest that runs
FLAGS: Final = "flags"  # has inode flags of its own
PROJECT: Final = "project"  # belongs to a project with a quota of its own
IMMUTABLE: Final = "immutable"
NOT_FROZEN: Final = "not-frozen"  # its guest could not be held still for a moment
REASONS: Final = frozenset((BUSY, CHANGED, RECENT, FLAGS, PROJECT, IMMUTABLE, NOT_FROZEN))
"""Any other outcome that is no success is an error's text."""

READ: Final = "read"
_CONTENTS_KEPT: Final = 4


class LeftAlone(Exception):
    """A file takes no part; `outcome` is one of REASONS or an error's text."""

    def __init__(self, outcome: str) -> None:
        super().__init__(outcome)
        self.outcome = outcome


def key_of(status: os.stat_result) -> tuple[int, int, int, int]:
    """What a digest is keyed by besides the volume: inode number, size, mtime, ctime (ns)."""
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def open_for_look(folder_fd: int, name: bytes) -> int:
    """Open a guest's file for reading. Raises LeftAlone."""
    if folder_fd < 0:
        raise LeftAlone(CHANGED)
    try:
        return os.open(name, inode.OPEN_TO_READ, dir_fd=folder_fd)
    except OSError as error:
        raise LeftAlone(_why_not_opened(error)) from error


def lease_unchanged(fd: int, key: tuple[int, int, int, int]) -> os.stat_result:
    """Take a lease on the file behind `fd`, which must still have `key`. Raises LeftAlone."""
    try:
        is_leased = lease.take(fd)
    except OSError as error:
        if os.fstat(fd).st_ino != key[0]:
            raise LeftAlone(CHANGED) from error  # perhaps no file at all, which has no leases
        raise
    status = os.fstat(fd)
    if not is_leased and status.st_ino == key[0]:
        raise LeftAlone(BUSY)
    if (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns) != key:
        raise LeftAlone(CHANGED)
    return status


def read_content(
    fd: int,
    status: os.stat_result,
    original: Container[int],
    tick: Callable[[], object] | None = None,
) -> tuple[bytes, bytes]:
    """The digests of content and xattrs of the leased file behind `fd`.

    `original`: inodes of the original's pools, which may be immutable. `tick` is called every some
    MiB. Raises LeftAlone, OSError.
    """
    check_flags(fd, status, original)

    def is_wanted() -> bool:
        if tick is not None:
            tick()
        return lease.is_unbroken(fd)

    digest = digest_content(fd, status, wanted=is_wanted)
    return digest, _finish(fd)


class Recognizer:
    """Reads files of one size, and tells contents that it has met from new ones by comparing.

    That is quicker than a digest of each; large files it digests all the same.
    """

    def __init__(self) -> None:
        self._met: list[tuple[bytes, bytes]] = []

    def read(
        self,
        fd: int,
        status: os.stat_result,
        original: Container[int],
        tick: Callable[[], object] | None = None,
    ) -> tuple[bytes, bytes]:
        """As `read_content`."""
        if status.st_size >= SMALL:
            return read_content(fd, status, original, tick)
        check_flags(fd, status, original)
        content = os.pread(fd, status.st_size, 0)
        for known, digest in self._met:
            if content == known:
                return digest, _finish(fd)
        digest = blake3(content).digest()
        if len(self._met) < _CONTENTS_KEPT:
            self._met.append((content, digest))
        return digest, _finish(fd)


def _finish(fd: int) -> bytes:
    """The digest of the xattrs; nobody wrote meanwhile. Raises LeftAlone."""
    xattrs = digest_xattrs(fd)
    if not lease.is_unbroken(fd):
        raise LeftAlone(BUSY)
    return xattrs


def check_flags(fd: int, status: os.stat_result, original: Container[int]) -> None:
    """Leave a file alone that somebody gave inode flags to. Raises LeftAlone."""
    flags = inode.get_flags(fd)
    if flags & inode.FS_IMMUTABLE_FL and status.st_ino not in original:
        raise LeftAlone(IMMUTABLE)
    if flags & inode.CHOSEN_FLAGS:
        raise LeftAlone(FLAGS)


def is_fresh(ctime: int, began_ns: int) -> bool:
    """Whether a file with this ctime could change again within the tick in which it was read."""
    return began_ns - ctime < SETTLED_NS


def _why_not_opened(error: OSError) -> str:
    if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
        return CHANGED
    if error.errno == errno.EAGAIN:
        return BUSY  # somebody holds a write lease
    return f"cannot be opened: {error.strerror}"


class Reader:
    """Reads files for their digests alone."""

    def __init__(self, trees: Sequence[Tree], original: Container[int]) -> None:
        self._trees = trees
        self._original = original
        self.tick: Callable[[], object] | None = None
        """Called now and then while files are read."""

    def read(self, files: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """For each (tree, folder path, name, key) its (outcome, digest, xattrs digest, fresh)."""
        answers = []
        began = time.time_ns()
        folder: tuple[int, bytes] | None = None
        folder_fd = -1
        try:
            for tree, path, name, key in files:
                if self.tick is not None:
                    self.tick()
                if folder != (tree, path):
                    if folder_fd >= 0:
                        os.close(folder_fd)
                    folder, folder_fd = (tree, path), self._open_folder(tree, path)
                answers.append(self._read_one(folder_fd, name, key, began))
        finally:
            if folder_fd >= 0:
                os.close(folder_fd)
        return answers

    def _open_folder(self, tree: int, path: bytes) -> int:
        try:
            return open_below(self._trees[tree].fd, path)
        except OSError:
            return -1

    def _read_one(
        self, folder_fd: int, name: bytes, key: tuple[int, int, int, int], began: int
    ) -> tuple[Any, ...]:
        try:
            fd = open_for_look(folder_fd, name)
            try:
                status = lease_unchanged(fd, key)
                content = read_content(fd, status, self._original, self.tick)
                return (READ, *content, is_fresh(key[3], began))
            finally:
                os.close(fd)
        except LeftAlone as reason:
            return reason.outcome, b"", b"", False
        except OSError as error:
            return f"cannot be read: {error.strerror}", b"", b"", False
