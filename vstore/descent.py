"""A walk down and up a tree by descriptor, for those who build or take away folders on the way.

It holds two descriptors and a name a level, so a tree may be deeper than a path can be long. A
folder is entered from the one above it, on the same mount and device, never through a symlink. The
way up is `..`, and the folder met there must be the one that was left: a tree that is moved about
meanwhile ends the walk.
"""

import errno
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from vstore import inode
from vstore.errors import ToolError
from vstore.scan import open_below


@dataclass(frozen=True, slots=True)
class Entered:
    """The walk is in a folder now.

    `fd` is good until the walk goes on. `entries` are all but the folders, once, and may be removed
    as they come; what is not taken is passed over.
    """

    fd: int
    name: bytes  # b"" for the root
    status: os.stat_result
    entries: Iterator[os.DirEntry[str]]


@dataclass(frozen=True, slots=True)
class Left:
    """The walk is done with the folder `name` and all below it, and is above it again, at `fd`."""

    fd: int  # -1 when the root has been left
    name: bytes


@dataclass(frozen=True, slots=True)
class Barred:
    """The folder `name` of the one behind `fd` is not entered."""

    fd: int
    name: bytes
    error: OSError  # EXDEV for a mount point or a subvolume


@dataclass(slots=True)
class _Level:
    name: bytes
    key: tuple[int, int]  # device and inode number
    folders: list[bytes] = field(default_factory=list)  # still to be entered


class Descent:
    """One walk. `errors` are (path, why it could not be read to its end)."""

    def __init__(self, root_fd: int, *, barred_ino: int = 0) -> None:
        self._root_fd = root_fd
        self._barred_ino = barred_ino
        self._device = os.fstat(root_fd).st_dev
        self._levels: list[_Level] = []
        self._fd = -1
        self.errors: list[tuple[bytes, str]] = []

    def path(self, name: bytes = b"") -> bytes:
        """The path below the root of `name` in the folder where the walk is."""
        parts = [level.name for level in self._levels[1:]]
        return b"/".join([*parts, name] if name else parts)

    def steps(self) -> Iterator[Entered | Left | Barred]:
        """Walk. Raises ToolError when a folder on the way has been moved."""
        self._fd = os.open(".", inode.OPEN_FOLDER, dir_fd=self._root_fd)
        try:
            yield from self._visit(b"")
            while self._levels:
                folders = self._levels[-1].folders
                if folders:
                    yield from self._go_down(folders.pop())
                else:
                    yield self._go_up()
        finally:
            os.close(self._fd)

    def _visit(self, name: bytes) -> Iterator[Entered]:
        status = os.fstat(self._fd)
        level = _Level(name, (status.st_dev, status.st_ino))
        self._levels.append(level)
        entries = self._list_entries(level)
        yield Entered(self._fd, name, status, entries)
        deque(entries, maxlen=0)

    def _list_entries(self, level: _Level) -> Iterator[os.DirEntry[str]]:
        try:
            with os.scandir(self._fd) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        level.folders.append(os.fsencode(entry.name))
                    else:
                        yield entry
        except OSError as error:
            self.errors.append((self.path(), f"cannot be read: {error.strerror}"))

    def _go_down(self, name: bytes) -> Iterator[Entered | Barred]:
        try:
            fd = self._open(name)
        except OSError as error:
            yield Barred(self._fd, name, error)
            return
        os.close(self._fd)
        self._fd = fd
        yield from self._visit(name)

    def _open(self, name: bytes) -> int:
        fd = open_below(self._fd, name)
        status = os.fstat(fd)
        if status.st_dev == self._device and status.st_ino != self._barred_ino:
            return fd
        os.close(fd)
        raise OSError(errno.EXDEV, "it is another file system, or the pool")

    def _go_up(self) -> Left:
        left = self._levels.pop()
        if not self._levels:
            return Left(-1, b"")
        fd = os.open("..", inode.OPEN_FOLDER, dir_fd=self._fd)
        os.close(self._fd)
        self._fd = fd
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) != self._levels[-1].key:
            raise ToolError(
                f"{os.fsdecode(self.path(left.name))}: was moved while we worked on it",
                hint="see that nothing works on the tree, and run the command again",
            )
        return Left(fd, left.name)
