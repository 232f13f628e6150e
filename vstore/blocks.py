"""Blocks that files share: what a worker of `vstore.reflink` does, and the trial before it.

A file is opened, found to be the one that was seen, and only then read or shared. The kernel
compares what it shares, so a digest that is out of date costs time and nothing else.
"""

import errno
import os
import stat
import time
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Final, NamedTuple

from vstore import extents, inode, lease, scan
from vstore.digest import digest_content
from vstore.errors import NotPermitted
from vstore.index import SETTLED_NS
from vstore.pool import InodeNumbers, Pool, digest_xattrs

UNIFIED: Final = "unified"
ALREADY: Final = "already"
READ: Final = "read"
LEAD: Final = "lead"  # the file whose blocks the others of its group take
INLINE: Final = "inline"  # its data stand in the inode, where nothing can share them
CHANGED: Final = "changed"  # not what it was when it was seen
FLAGS: Final = "flags"  # somebody chose how it is stored
IMMUTABLE: Final = "immutable"
REASONS: Final = frozenset((INLINE, CHANGED, FLAGS, IMMUTABLE))

_LARGEST_INLINE: Final = 64 << 10  # bytes; a block of btrfs is at most this large
_SET_LIMIT: Final = 200_000  # a frozenset is quicker to ask and takes ten times the memory
_GONE: Final = frozenset((errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.EXDEV))
_NOT_TOGETHER: Final = frozenset((errno.EINVAL, errno.EPERM, errno.ETXTBSY, errno.EOPNOTSUPP))


class File(NamedTuple):
    """An inode by one of its names; `names` is how many of them count in the result."""

    group: int
    place: int
    tree: int
    path: bytes  # its folder, below the tree's root
    name: bytes
    ino: int
    size: int
    mtime: int
    ctime: int
    names: int
    volume: int
    digest: bytes | None


def check_sharing(folder_fd: int, place: str) -> None:
    """Share real data between nameless files of the folder, read them back and compare.

    `place` is how to call it. Raises NotPermitted where blocks cannot be shared, or where what is
    read back is not what was written; OSError for a full disk.
    """
    try:
        fault = _try_sharing(folder_fd)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        fault = f"{error.strerror}"
    if fault:
        raise NotPermitted(
            f"{place}: files cannot share blocks here: {fault}",
            hint="btrfs and xfs (made with reflink=1) can; elsewhere use --link hardlink",
        )


def _try_sharing(folder_fd: int) -> str:
    data = os.urandom(100_000) + bytes(100_000) + os.urandom(50_001)
    with ExitStack() as stack:

        def make(content: bytes) -> int:
            fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=folder_fd)
            stack.callback(os.close, fd)
            for start in (0, 200_000):
                os.pwrite(fd, content[start : start + 100_000], start)
            return fd

        def holds(fd: int, content: bytes) -> bool:
            return os.pread(fd, len(data) + 1, 0) == content

        first, second, clone = make(data), make(data), make(b"")
        other_data = data[:-1] + bytes((data[-1] ^ 1,))
        other = make(other_data)
        if not extents.clone(first, clone):
            return "the file system has no clones"
        if not holds(clone, data):
            return "a clone does not read as what was cloned"
        if extents.dedupe(first, second, size=len(data)) != len(data) or not holds(second, data):
            return "equal files do not come to share blocks"
        end = last_block_end(first, len(data))
        if any(unshared(extents.load_extents(first), extents.load_extents(second), end=end)):
            return "the file system does not say which blocks are shared"
        if extents.dedupe(first, other, size=len(data)) == len(data) or not holds(
            other, other_data
        ):
            return "files that differ are taken for equal"
        os.pwrite(second, b"new", 0)
        os.pwrite(clone, b"new", 200_000)
        return "" if holds(first, data) else "a write to one file changes another"


def unshared(
    lead: Sequence[extents.Extent], target: Sequence[extents.Extent], *, end: int
) -> Iterator[extents.Extent]:
    """The stretches of the file `target` before `end` whose blocks are not those that `lead` has at
    the same offsets.

    What lies behind the end, as blocks that xfs sets aside for a file that grows, is left out.
    """
    others = iter(lead)
    other = next(others, None)
    for extent in target:
        start, stop = extent.logical, min(extent.logical + extent.length, end)
        shift = extent.physical - extent.logical
        while other is not None and start < stop:
            other_end = other.logical + other.length
            if other_end <= start:
                other = next(others, None)
            elif other.logical >= stop:
                break
            else:
                if other.physical - other.logical == shift:
                    if other.logical > start:
                        yield _piece(extent, start, other.logical)
                else:
                    yield _piece(extent, start, min(stop, other_end))
                start = min(stop, other_end)
        if start < stop:
            yield _piece(extent, start, stop)


def last_block_end(fd: int, size: int) -> int:
    """Where the last block of a file of that size on the file system of `fd` ends (bytes)."""
    block = os.fstatvfs(fd).f_bsize
    return -(-size // block) * block


def _piece(extent: extents.Extent, start: int, end: int) -> extents.Extent:
    shift = extent.physical - extent.logical
    return extents.Extent(start, start + shift, end - start, extent.flags)


class _LeftAlone(Exception):
    """The file is not shared, for a reason that is counted."""


class _Lead(NamedTuple):
    fd: int
    found: list[extents.Extent]


Answer = tuple[str, int]
"""What became of a file, and the bytes that nobody uses any more."""


class Hand:
    """One worker: walks, reads and shares."""

    def __init__(
        self, trees: Sequence[scan.Tree], pool: Pool | None, objects: InodeNumbers, *, dry_run: bool
    ) -> None:
        lease.ignore_break_signals()
        self._trees = trees
        self._pool = pool
        self._objects = objects.quick_set(_SET_LIMIT)
        self._dry_run = dry_run

    def serve(self, job: tuple[str, Any]) -> Iterator[Any]:
        """Carry out one job of a kind; yields plain answers."""
        kind, what = job
        if kind == "walk":
            tree, starts = what
            for part in scan.walk(self._trees[tree], starts, self._objects_in(tree)):
                yield part.as_plain()
        elif kind == "read":
            yield [self._read(File(*fields)) for fields in what]
        else:
            yield [self._share(names, map(File._make, files)) for names, files in what]

    def finish(self) -> None:
        """Nothing is kept from job to job."""

    def _objects_in(self, tree: int) -> Container[int]:
        """The objects that the tree may have links to: none on another subvolume, where the same
        numbers are other inodes.
        """
        if self._pool is not None and self._trees[tree].device == self._pool.device:
            return self._objects
        return frozenset()

    @contextmanager
    def _opened(self, file: File) -> Iterator[int]:
        """A descriptor of the file for reading. Raises _LeftAlone, OSError."""
        try:
            folder_fd = scan.open_below(self._trees[file.tree].fd, file.path)
            try:
                fd = os.open(file.name, inode.OPEN_TO_READ, dir_fd=folder_fd)
            finally:
                os.close(folder_fd)
        except OSError as error:
            if error.errno in _GONE:
                raise _LeftAlone(CHANGED) from error
            raise
        try:
            _check_key(file, fd)
            flags = inode.get_flags(fd)
            if flags & inode.FS_IMMUTABLE_FL:
                raise _LeftAlone(IMMUTABLE)
            if flags & inode.CHOSEN_FLAGS:
                raise _LeftAlone(FLAGS)
            yield fd
        finally:
            os.close(fd)

    # --- reading ---

    def _read(self, file: File) -> tuple[str, bytes, bytes, bool]:
        """The outcome, the digests of content and xattrs, and whether the index may keep them."""
        try:
            with self._opened(file) as fd:
                if file.size <= _LARGEST_INLINE and extents.is_inline(extents.load_extents(fd)):
                    return (INLINE, b"", b"", False)
                return _read_leased(file, fd)
        except _LeftAlone as reason:
            return (str(reason), b"", b"", False)
        except OSError as error:
            return (f"cannot be read: {error.strerror}", b"", b"", False)

    # --- sharing ---

    def _share(self, objects: Sequence[str], files: Iterable[File]) -> list[Answer]:
        """Let files of one content share the blocks of an object, else of the first of them."""
        with ExitStack() as stack:
            lead = self._find_lead(objects, stack)
            held: Counter[int] = Counter()
            answers: list[Answer] = []
            for file in files:
                try:
                    with self._opened(file) as fd:
                        found = extents.load_extents(fd)
                        if extents.is_inline(found):
                            answers.append((INLINE, 0))
                        elif lead is None:
                            lead = _keep_open(fd, found, stack)
                            answers.append((LEAD, 0))
                        else:
                            answers.append(self._share_one(lead, fd, found, file.size, held))
                except _LeftAlone as reason:
                    answers.append((str(reason), 0))
                except OSError as error:
                    answers.append((f"its blocks cannot be shared: {error.strerror}", 0))
            return answers

    def _find_lead(self, objects: Sequence[str], stack: ExitStack) -> _Lead | None:
        for name in objects if self._pool is not None else ():
            assert self._pool is not None  # noqa: S101 - objects are a pool's
            with suppress(OSError):
                fd = self._pool.open_object(name)
                stack.callback(os.close, fd)
                found = extents.load_extents(fd)
                if not extents.is_inline(found):
                    return _Lead(fd, found)
        return None

    def _share_one(
        self, lead: _Lead, fd: int, found: list[extents.Extent], size: int, held: Counter[int]
    ) -> Answer:
        end = last_block_end(fd, size)
        pieces = list(unshared(lead.found, found, end=end))
        if not pieces:
            return (ALREADY, 0)
        if self._dry_run:
            return (UNIFIED, _freed_when_all_are_shared(pieces, held))
        try:
            done = extents.dedupe(lead.fd, fd, size=size)
        except OSError as error:
            if error.errno in _NOT_TOGETHER:
                raise _LeftAlone(FLAGS) from error
            raise
        if done < size:
            return (CHANGED, _freed(pieces, done))
        return (UNIFIED, _freed(pieces, end))


def _check_key(file: File, fd: int) -> None:
    status = os.fstat(fd)
    found = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if not stat.S_ISREG(status.st_mode) or found != file[5:9]:
        raise _LeftAlone(CHANGED)


def _read_leased(file: File, fd: int) -> tuple[str, bytes, bytes, bool]:
    """Read a file whether or not somebody writes to it; whoever wants to while we have a lease gets
    it.

    What may be kept is what nobody could have changed meanwhile.
    """
    is_leased = False
    with suppress(OSError):
        is_leased = lease.take(fd)

    def give_way() -> bool:
        if is_leased and not lease.is_unbroken(fd):
            with suppress(BlockingIOError):  # given up before, or broken by force
                lease.release(fd)
        return True

    began = time.time_ns()
    status = os.fstat(fd)
    digest = digest_content(fd, status, wanted=give_way)
    xattrs = digest_xattrs(fd)
    keep = is_leased and lease.is_unbroken(fd) and began - status.st_ctime_ns >= SETTLED_NS
    _check_key(file, fd)
    return (READ, digest, xattrs, keep and not inode.project_id(fd))


def _keep_open(fd: int, found: list[extents.Extent], stack: ExitStack) -> _Lead:
    kept = os.dup(fd)
    stack.callback(os.close, kept)
    return _Lead(kept, found)


def _freed(pieces: Iterable[extents.Extent], end: int) -> int:
    """The bytes before `end` that nobody else used."""
    return sum(
        max(0, min(piece.logical + piece.length, end) - piece.logical)
        for piece in pieces
        if not piece.flags & extents.FIEMAP_EXTENT_SHARED
    )


def _freed_when_all_are_shared(pieces: list[extents.Extent], held: Counter[int]) -> int:
    """As `_freed` would say in the end, nothing being shared now: blocks that several files have
    together are free once all of these have let go.

    `held` counts, by place, who has such blocks, from file to file.
    """
    free = 0
    for piece in pieces:
        if piece.flags & extents.FIEMAP_EXTENT_SHARED:
            held[piece.physical] += 1
        if not piece.flags & extents.FIEMAP_EXTENT_SHARED or held[piece.physical] == 2:
            free += piece.length
    return free
