"""Every folder of a guest's tree with all that is in it: for figures, lists and manifests.

As `vstore.scan` it works by descriptor, follows no symlink and crosses no mount point or subvolume;
unlike it, it gives entries of every kind, in order of their names, to one process.
"""

import errno
import os
import stat
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Final

from vstore.scan import open_below

_VANISHED: Final = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ELOOP))


@dataclass(frozen=True, slots=True)
class Folder:
    """One folder of a tree; descriptor and entries can be asked until the walk goes on."""

    path: bytes  # below the root, which is b""
    fd: int
    status: os.stat_result
    entries: list[os.DirEntry[str]]  # sorted by name


@dataclass(slots=True)
class Missed:
    """What a walk did not look into: what cannot be read (path, reason), and other file systems."""

    errors: list[tuple[bytes, str]] = field(default_factory=list)
    mounts: list[bytes] = field(default_factory=list)

    def note(self, path: bytes, error: OSError) -> None:
        if error.errno == errno.EXDEV:
            self.mounts.append(path)
        elif error.errno not in _VANISHED:
            self.errors.append((path, f"cannot be read: {error.strerror}"))


class LastFolder:
    """The folder below `root_fd` that was asked for last, which stays open: what comes next is
    mostly in the same one.
    """

    def __init__(self, root_fd: int) -> None:
        self._root_fd = root_fd
        self._path = b""
        self._fd = -1

    def open(self, path: bytes) -> int:
        """Its descriptor, until another one is asked for. Raises OSError as `open_below`."""
        if self._fd < 0 or self._path != path:
            self.close()
            self._fd = open_below(self._root_fd, path)
            self._path = path
        return self._fd

    def close(self) -> None:
        """The next one is opened anew."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


def join(folder: bytes, name: bytes) -> bytes:
    """The path of `name` in `folder`, which may be the root (b"")."""
    return folder + b"/" + name if folder else name


def walk_folders(root_fd: int, missed: Missed, *, skip_ino: int = 0) -> Iterator[Folder]:
    """The folder behind `root_fd` and every one below it, each before those in it.

    `skip_ino` is the number of a folder that is left out: the pool's, where it lies inside the
    tree. What cannot be read is noted in `missed`; what vanishes meanwhile is nobody's error.
    """
    device = os.fstat(root_fd).st_dev
    pending = [b""]
    while pending:
        path = pending.pop()
        try:
            fd = open_below(root_fd, path)
        except OSError as error:
            missed.note(path, error)
            continue
        try:
            folder = _look(path, fd, missed)
            if folder is None or folder.status.st_ino == skip_ino:
                continue
            if folder.status.st_dev != device:
                missed.mounts.append(path)
                continue
            yield folder
            pending += [
                join(path, os.fsencode(entry.name))
                for entry in reversed(folder.entries)
                if entry.is_dir(follow_symlinks=False)
            ]
        finally:
            os.close(fd)


def _look(path: bytes, fd: int, missed: Missed) -> Folder | None:
    try:
        with os.scandir(fd) as entries:
            # xfs gives a name twice that is made anew meanwhile
            by_name = {entry.name: entry for entry in entries}
        return Folder(path, fd, os.fstat(fd), sorted(by_name.values(), key=attrgetter("name")))
    except OSError as error:
        missed.note(path, error)
        return None


# --- what is a guest's own, and what is shared


@dataclass(frozen=True, slots=True)
class Listed:
    """One entry of a guest: its path below the root, its kind, and its inode number."""

    path: bytes
    kind: str  # file, symlink, fifo, device; folder for one in which nothing is
    ino: int


def list_own(
    root_fd: int, objects: Container[int], missed: Missed, *, skip_ino: int = 0
) -> Iterator[Listed]:
    """The entries of the tree behind `root_fd` that no object backs, folder by folder.

    A folder is listed if it is empty: any other comes with what is in it. Sockets are not listed:
    the programs that listen make them anew.
    """
    for folder in walk_folders(root_fd, missed, skip_ino=skip_ino):
        if not folder.entries and folder.path:
            yield Listed(folder.path, "folder", folder.status.st_ino)
        for entry in folder.entries:
            if entry.inode() not in objects and (kind := _kind_of(entry, folder, missed)):
                yield Listed(join(folder.path, os.fsencode(entry.name)), kind, entry.inode())


def list_shared(
    root_fd: int, objects: Container[int], missed: Missed, *, skip_ino: int = 0
) -> Iterator[Listed]:
    """The names in the tree behind `root_fd` that are objects, folder by folder."""
    for folder in walk_folders(root_fd, missed, skip_ino=skip_ino):
        yield from find_shared(folder, objects)


def find_shared(folder: Folder, objects: Container[int]) -> Iterator[Listed]:
    """The names in one folder that are objects."""
    for entry in folder.entries:
        if entry.inode() in objects:
            yield Listed(join(folder.path, os.fsencode(entry.name)), "file", entry.inode())


def _kind_of(entry: "os.DirEntry[str]", folder: Folder, missed: Missed) -> str:
    """What kind of entry to list it is; empty for a folder or a socket, and for what vanished."""
    if entry.is_file(follow_symlinks=False):
        return "file"
    if entry.is_symlink():
        return "symlink"
    if entry.is_dir(follow_symlinks=False):
        return ""
    try:
        mode = entry.stat(follow_symlinks=False).st_mode
    except OSError as error:
        missed.note(join(folder.path, os.fsencode(entry.name)), error)
        return ""
    if stat.S_ISFIFO(mode):
        return "fifo"
    return "" if stat.S_ISSOCK(mode) else "device"
