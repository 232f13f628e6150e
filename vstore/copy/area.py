"""The folder in which a copy grows, beside the target that it will become.

    VDIRBASE/
    ├── web/                     the target; not touched before the last rename
    └── web.copy-3f9a12cd/       0700, under a flock while its program lives
        ├── tree/                what becomes the target, or one folder of it
        └── arrived/
            ├── <digest>         a content that has come; who finds it later reads it first
            ├── part-<row>       one that is coming
            └── group-<row>      a name of an inode that more names are to follow of

What a program leaves that was killed or cut off is found by the next copy to the same target:
contents that had arrived are used after they were read again, also those of the old tree's files
that were to become objects, and the rest is removed at the end.
"""

import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vstore import extents, inode, lease
from vstore.copy.messages import SMALL
from vstore.digest import digest_content
from vstore.errors import NoSpace, ToolError
from vstore.folders import Folder, Missed, walk_folders
from vstore.remove import Tree

MARK: Final = ".copy-"
_LONGEST_STEM: Final = 200
_FOLDERS: Final = ("tree", "arrived")
_MODE: Final = 0o700


@dataclass(slots=True)
class Area:
    """An open area. `leftovers` are the areas of copies that ended before their time."""

    parent: Path
    parent_fd: int
    name: bytes
    fd: int
    tree_fd: int
    arrived_fd: int
    leftovers: list["Area"] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return self.parent / os.fsdecode(self.name)

    def as_tree(self) -> Tree:
        """The whole area, to be removed."""
        return Tree(os.fspath(self.path), self.parent_fd, self.name, self.fd)

    def open_part(self, row: int) -> int:
        """A new file for the content of a row. Raises OSError."""
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(f"part-{row}", flags, 0o600, dir_fd=self.arrived_fd)

    def drop_part(self, row: int) -> None:
        with suppress(FileNotFoundError):
            os.unlink(f"part-{row}", dir_fd=self.arrived_fd)

    def keep_part(self, row: int, digest: bytes) -> None:
        """The content of a row has come and is what its digest says."""
        folder = self.arrived_fd
        os.rename(f"part-{row}", digest.hex(), src_dir_fd=folder, dst_dir_fd=folder)

    def keep_content(self, content: bytes, digest: bytes, mode: int, mtime_ns: int) -> None:
        """As `keep_part`, of a content that is at hand; with this mode (rwx alone) and time most
        files have all that they are to have.

        Raises OSError.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(digest.hex(), flags, mode, dir_fd=self.arrived_fd)
        try:
            fill(fd, content, mtime_ns)
        finally:
            os.close(fd)

    def has_arrived(self, digest: bytes) -> bool:
        """Whether the content is here, or was when an earlier copy ended."""
        name = digest.hex()
        with suppress(FileNotFoundError):
            os.stat(name, dir_fd=self.arrived_fd, follow_symlinks=False)
            return True
        return any(self._take_over(old, name, digest) for old in self.leftovers)

    def _take_over(self, old: "Area", name: str, digest: bytes) -> bool:
        try:
            fd = os.open(name, inode.OPEN_TO_READ, dir_fd=old.arrived_fd)
        except OSError:
            return False
        try:
            status = os.fstat(fd)
            if inode.is_immutable(fd) or digest_content(fd, status) != digest:
                return False
            if status.st_nlink > 1:  # it has a name in the old tree, which may be somebody's
                return self._copy_over(fd, digest)
            os.rename(name, name, src_dir_fd=old.arrived_fd, dst_dir_fd=self.arrived_fd)
        finally:
            os.close(fd)
        return True

    def take_over_small(self) -> None:
        """Let the small files of earlier trees that have no other name be contents that arrived."""
        lease.ignore_break_signals()
        for old in self.leftovers:
            with suppress(OSError):
                tree_fd = os.open("tree", inode.OPEN_FOLDER, dir_fd=old.fd)
                try:
                    for folder in walk_folders(tree_fd, Missed()):
                        self._take_over_folder(folder)
                finally:
                    os.close(tree_fd)

    def _take_over_folder(self, folder: Folder) -> None:
        for entry in folder.entries:
            with suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                is_alone = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
                if is_alone and 0 < status.st_size <= SMALL:
                    self._take_over_file(folder.fd, os.fsencode(entry.name))

    def _take_over_file(self, folder_fd: int, name: bytes) -> None:
        fd = os.open(name, inode.OPEN_TO_READ, dir_fd=folder_fd)
        try:
            is_plain = not inode.get_flags(fd) & (inode.FS_IMMUTABLE_FL | inode.CHOSEN_FLAGS)
            is_plain &= inode.project_id(fd) == inode.project_id(self.arrived_fd)
            if is_plain and lease.take(fd):  # others may know the old target
                digest = digest_content(fd, os.fstat(fd))
                if lease.is_unbroken(fd):
                    os.rename(name, digest.hex(), src_dir_fd=folder_fd, dst_dir_fd=self.arrived_fd)
                if not lease.is_unbroken(fd):
                    with suppress(FileNotFoundError):
                        os.unlink(digest.hex(), dir_fd=self.arrived_fd)
        finally:
            os.close(fd)

    def _copy_over(self, source_fd: int, digest: bytes) -> bool:
        fd = self.open_part(0)
        try:
            extents.copy_data(source_fd, fd, size=os.fstat(source_fd).st_size)
            is_good = digest_content(fd, os.fstat(fd)) == digest
        finally:
            os.close(fd)
        if is_good:
            self.keep_part(0, digest)
        return is_good

    def list_arrived(self) -> list[str]:
        """All names of `arrived`: btrfs shows a descriptor what was there when it was opened."""
        fd = os.open(".", inode.OPEN_FOLDER, dir_fd=self.arrived_fd)
        try:
            return os.listdir(fd)  # noqa: PTH208 - by descriptor
        finally:
            os.close(fd)


def fill(fd: int, content: bytes, mtime_ns: int) -> None:
    """Write the new file behind `fd`. Raises OSError."""
    done = 0
    while done < len(content):
        done += os.write(fd, content[done:])
    os.utime(fd, ns=(mtime_ns, mtime_ns))


@contextmanager
def open_area(parent: Path, target: str, *, takes_over: bool = True) -> Iterator[Area]:
    """A new area beside the target. It stays: whoever is done with it removes it.

    `takes_over`: contents that arrived in earlier copies may be used, whoever sent them.

    Raises NoSpace, ToolError.
    """
    stem = target[:_LONGEST_STEM] + MARK
    with ExitStack() as stack:
        try:
            parent_fd = os.open(parent, inode.OPEN_FOLDER)
            stack.callback(os.close, parent_fd)
            leftovers = list(_find_leftovers(parent, parent_fd, stem, stack))
            area = _make(parent, parent_fd, stem, stack)
        except OSError as error:
            kind = NoSpace if error.errno in (errno.ENOSPC, errno.EDQUOT) else ToolError
            raise kind(f"{parent}: cannot make a folder for the copy: {error.strerror}") from error
        area.leftovers = leftovers
        if takes_over:
            area.take_over_small()
        else:
            for old in leftovers:
                old.arrived_fd = -1
        yield area


def _make(parent: Path, parent_fd: int, stem: str, stack: ExitStack) -> Area:
    name = os.fsencode(stem + secrets.token_hex(4))
    os.mkdir(name, _MODE, dir_fd=parent_fd)
    fd = _open(name, parent_fd, stack)
    fcntl.flock(fd, fcntl.LOCK_EX)
    for folder in _FOLDERS:
        os.mkdir(folder, 0o700, dir_fd=fd)
    return Area(
        parent, parent_fd, name, fd, _open(b"tree", fd, stack), _open(b"arrived", fd, stack)
    )


def _find_leftovers(parent: Path, parent_fd: int, stem: str, stack: ExitStack) -> Iterator[Area]:
    """Areas that nobody holds; from now on we do."""
    for entry in sorted(os.listdir(parent_fd)):
        if not re.fullmatch(re.escape(stem) + "[0-9a-f]{8}", entry):
            continue
        name = os.fsencode(entry)
        with suppress(OSError):
            fd = _open(name, parent_fd, stack)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_area(fd):
                continue
            arrived_fd = -1
            with suppress(OSError):
                arrived_fd = _open(b"arrived", fd, stack)
            yield Area(parent, parent_fd, name, fd, -1, arrived_fd)


def _is_area(fd: int) -> bool:
    """Whether a folder of such a name is one that we made: somebody's `web.copy-20260731` is none,
    nor is another guest.
    """
    status = os.fstat(fd)
    is_ours = (status.st_uid, stat.S_IMODE(status.st_mode) & 0o777) == (os.geteuid(), _MODE)
    return is_ours and set(os.listdir(fd)) <= set(_FOLDERS)


def _open(name: bytes, folder_fd: int, stack: ExitStack) -> int:
    fd = os.open(name, inode.OPEN_FOLDER, dir_fd=folder_fd)
    stack.callback(os.close, fd)
    return fd
