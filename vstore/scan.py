"""A streaming walk of guests' trees by directory descriptor.

It follows no symlink and crosses no mount point or subvolume: every folder is reached from the
tree's root by openat2(2), which refuses both, so a folder that a guest swaps for a symlink
meanwhile leads nowhere. Names are bytes. Folders may lie deeper than a path can be long. Entries
that vanish are nobody's error.

An inode that is an object already is known by its number from readdir alone and costs no further
call.
"""

import errno
import os
import stat
from array import array
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from typing import Final

from vstore import inode, syscalls
from vstore.exclude import Excludes

_RESOLVE: Final = (
    syscalls.RESOLVE_BENEATH
    | syscalls.RESOLVE_NO_SYMLINKS
    | syscalls.RESOLVE_NO_MAGICLINKS
    | syscalls.RESOLVE_NO_XDEV
)
_STEP: Final = 4000  # bytes of path a call; the kernel takes 4,095
_VANISHED: Final = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ELOOP))
_ROWS_A_PART: Final = 4000
_ENTRIES_A_JOB: Final = 6000

EMPTY: Final = "empty"
SMALL: Final = "small"
EXCLUDED: Final = "excluded"
EXCLUDED_FOLDER: Final = "excluded-folder"
OTHER_MOUNT: Final = "other-mount"
MOUNTED_OVER: Final = "mounted-over"
FAR_TIME: Final = "far-time"
FOLDER_REASONS: Final = frozenset((EXCLUDED_FOLDER, OTHER_MOUNT))
"""Reasons that count folders, not files."""
_FARTHEST_NS: Final = 1 << 63  # the index keeps times in 64 bits: until the year 2262


@dataclass(frozen=True, slots=True)
class Tree:
    """A guest's tree, open for a walk."""

    fd: int
    device: int
    excludes: Excludes
    min_size: int  # bytes; smaller files stay as they are
    skip_ino: int = 0  # a folder that is not entered: the pool's, where it lies inside the tree
    names_shared: bool = False  # whether the names of objects are told too, not their numbers alone


FileRow = tuple[bytes, int, int, int, int, int, int, int, int, int]
"""One regular file as it was when its folder was read: name, inode number, size, mode, uid, gid,
mtime and ctime (ns), link count, blocks (of 512 bytes)."""


FolderRows = tuple[bytes, int, int, list[FileRow]]
"""A folder with its files: path below the root, atime and mtime (ns) before it was read, rows."""


@dataclass(slots=True)
class Part:
    """What one stretch of a walk found.

    `folders` are (path below the root, its files); `shared` the inode numbers of objects that were
    met; `skipped` counts by reason; `errors` are (path, reason); `pending` are folders still to be
    read.
    """

    folders: list[FolderRows] = field(default_factory=list)
    shared: "array[int]" = field(default_factory=lambda: array("Q"))
    files: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    errors: list[tuple[bytes, str]] = field(default_factory=list)
    pending: list[bytes] = field(default_factory=list)
    named: list[tuple[bytes, bytes, int]] = field(default_factory=list)
    rows: int = 0

    def skip(self, reason: str) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + 1

    def as_plain(self) -> tuple[object, ...]:
        """The same as values that go between processes."""
        return (
            self.folders,
            self.shared.tobytes(),
            self.files,
            self.skipped,
            self.errors,
            self.pending,
            self.named,
        )


def open_below(root_fd: int, path: bytes, *, flags: int = inode.OPEN_FOLDER) -> int:
    """Open `path` (relative, of any length) below the folder behind `root_fd`, through real folders
    of its mount only.

    Raises OSError: ELOOP where a symlink stands in the way, EXDEV for a mount point, ENOENT.
    """
    if not path:
        return os.open(".", flags, dir_fd=root_fd)
    if len(path) <= _STEP:
        return syscalls.openat2(root_fd, path, flags=flags, resolve=_RESOLVE)
    return _open_deep(root_fd, path, flags)


def _open_deep(root_fd: int, path: bytes, flags: int) -> int:
    fd = os.dup(root_fd)
    try:
        while len(path) > _STEP:
            cut = path.rindex(b"/", 0, _STEP)
            deeper = syscalls.openat2(
                fd, path[:cut], flags=os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, resolve=_RESOLVE
            )
            os.close(fd)
            fd, path = deeper, path[cut + 1 :]
        return syscalls.openat2(fd, path, flags=flags, resolve=_RESOLVE)
    finally:
        os.close(fd)


def walk(tree: Tree, starts: list[bytes], shared: Container[int]) -> Iterator[Part]:
    """Read the folders `starts` and what is below them, for a bounded while.

    `shared` are the numbers of all objects. Yields parts of bounded size; the last one names in
    `pending` the folders that are still to be read.
    """
    return _Walk(tree, starts, shared).run()


class _Walk:
    def __init__(self, tree: Tree, starts: list[bytes], shared: Container[int]) -> None:
        self._tree = tree
        self._shared = shared
        self._pending = [(path, tree.excludes.below(b"/" + path)) for path in reversed(starts)]
        self._part = Part()
        self._seen = 0

    def run(self) -> Iterator[Part]:
        while self._pending and self._seen < _ENTRIES_A_JOB:
            path, excludes = self._pending.pop()
            yield from self._read_folder(path, excludes)
        self._part.pending = [path for path, _ in reversed(self._pending)]
        yield self._part

    def _read_folder(self, path: bytes, excludes: Excludes) -> Iterator[Part]:
        try:
            fd = open_below(self._tree.fd, path)
        except OSError as error:
            self._note_unreadable(path, error)
            return
        try:
            status = os.fstat(fd)
            if status.st_dev != self._tree.device:
                self._part.skip(OTHER_MOUNT)
                return
            if status.st_ino == self._tree.skip_ino:
                return
            yield from self._read_entries(fd, status, path, excludes)
        except OSError as error:
            self._part.errors.append((path, f"cannot be read: {error.strerror}"))
        finally:
            os.close(fd)

    def _read_entries(
        self, fd: int, status: os.stat_result, path: bytes, excludes: Excludes
    ) -> Iterator[Part]:
        times = (status.st_atime_ns, status.st_mtime_ns)
        shared = self._shared
        met = self._part.shared
        rows: list[FileRow] = []
        with os.scandir(fd) as entries:
            for entry in entries:
                self._seen += 1
                if (number := entry.inode()) in shared and not entry.is_dir(follow_symlinks=False):
                    met.append(number)
                    if self._tree.names_shared:
                        self._part.named.append((path, os.fsencode(entry.name), number))
                elif entry.is_dir(follow_symlinks=False):
                    self._note_folder(path, os.fsencode(entry.name), excludes)
                elif entry.is_file(follow_symlinks=False):
                    self._note_file(entry, path, excludes, rows)
                if len(rows) + len(met) >= _ROWS_A_PART:
                    yield self._take_part((path, *times, rows))
                    rows = []
                    met = self._part.shared
        if rows:
            self._part.folders.append((path, *times, rows))
            self._part.rows += len(rows)
        if self._part.rows >= _ROWS_A_PART:
            yield self._take_part((path, *times, []))

    def _take_part(self, found: FolderRows) -> Part:
        full, self._part = self._part, Part()
        if found[3]:
            full.folders.append(found)
        return full

    def _note_folder(self, path: bytes, name: bytes, excludes: Excludes) -> None:
        below = path + b"/" + name if path else name
        if not excludes:
            self._pending.append((below, excludes))
        elif excludes.is_excluded(b"/" + below):
            self._part.skip(EXCLUDED_FOLDER)
        else:
            self._pending.append((below, excludes.below(b"/" + below)))

    def _note_file(
        self, entry: "os.DirEntry[str]", path: bytes, excludes: Excludes, rows: list[FileRow]
    ) -> None:
        name = os.fsencode(entry.name)
        part = self._part
        part.files += 1
        if excludes and excludes.is_excluded(b"/" + path + b"/" + name if path else b"/" + name):
            part.skip(EXCLUDED)
            return
        try:
            status = entry.stat(follow_symlinks=False)
        except OSError as error:
            part.files -= 1
            self._note_unreadable(path + b"/" + name, error)
            return
        if status.st_dev != self._tree.device or status.st_ino != entry.inode():
            part.skip(MOUNTED_OVER)
        elif status.st_size == 0:
            part.skip(EMPTY)
        elif status.st_size < self._tree.min_size:
            part.skip(SMALL)
        elif not -_FARTHEST_NS <= status.st_mtime_ns < _FARTHEST_NS:
            part.skip(FAR_TIME)
        elif stat.S_ISREG(status.st_mode):
            rows.append(
                (
                    name,
                    status.st_ino,
                    status.st_size,
                    status.st_mode,
                    status.st_uid,
                    status.st_gid,
                    status.st_mtime_ns,
                    status.st_ctime_ns,
                    status.st_nlink,
                    status.st_blocks,
                )
            )

    def _note_unreadable(self, path: bytes, error: OSError) -> None:
        if error.errno == errno.EXDEV:
            self._part.skip(OTHER_MOUNT)
        elif error.errno not in _VANISHED:
            self._part.errors.append((path, f"cannot be read: {error.strerror}"))
