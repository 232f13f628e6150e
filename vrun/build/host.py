"""build -m host: a guest made from the packages of the running host, as the first tools did it.

Taken are programs, libraries and data of packages, their settings, and dpkg's record of them. Left
behind is what makes the machine itself: its users and their files, logs, queues, databases, keys,
passwords, its name and its network. Accounts of the system stay, without passwords.
"""

import logging
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from vrun.build.inside import GuestTree
from vrun.build.method import Method, Place
from vrun.build.replica import Choice, Copier
from vrun.build.selection import Packages, read_file
from vrun.errors import ToolError, WrongUsage
from vstore import inode, syscalls
from vstore.scan import open_below

log = logging.getLogger(__name__)

_PROGRAM_FOLDERS: Final = (b"bin", b"sbin", b"lib", b"lib32", b"lib64", b"libx32", b"usr")
_EMPTY: Final = (
    *(f"usr/local/{name}" for name in ("bin", "etc", "games", "include", "lib", "sbin", "share")),
    "usr/src",
    "usr/lib/modules",
    "usr/lib/firmware",
)
"""Folders of which only the content is the host's own affair."""
_FIRST_USER: Final = 1000
_LAST_USER: Final = 65533  # 65534 is nobody
_ANYWHERE: Final = (
    syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Host(Method):
    name: ClassVar[str] = "host"

    source: Path = Path("/")
    """The host's root; another one, a snapshot of it for example, has to be mounted."""

    def check(self, place: Place) -> None:
        if place.is_used:
            raise WrongUsage(f"{place.root}: is not empty", hint="--force renames what is there")
        root_fd = self._open()
        try:
            Packages.load(self.source, root_fd)
        finally:
            os.close(root_fd)

    def fill(self, place: Place) -> None:
        place.progress.phase("copy")
        source_fd = self._open()
        root_fd = os.open(place.root, inode.OPEN_FOLDER)
        try:
            packages = Packages.load(self.source, source_fd)
            with Copier(root_fd, progress=place.progress) as copier:
                _Transfer(source_fd, root_fd, packages, copier).run()
            copier.check()
        finally:
            os.close(root_fd)
            os.close(source_fd)
        with GuestTree(place.root) as tree:
            self._write_accounts(tree)
            for path in _EMPTY:
                tree.make_folder(path)
            tree.make_folder("root", 0o700)
            tree.put("etc/machine-id", b"", mode=0o444)

    def _write_accounts(self, tree: GuestTree) -> None:
        root_fd = self._open()
        try:
            _write_accounts(root_fd, tree)
        finally:
            os.close(root_fd)

    def _open(self) -> int:
        try:
            return os.open(self.source, inode.OPEN_FOLDER)
        except OSError as error:
            raise WrongUsage(f"{self.source}: cannot be read: {error.strerror}") from error


@dataclass(frozen=True, slots=True)
class _Transfer:
    """The copying, part by part: each of /usr, /etc, /var may be a file system of its own."""

    source_fd: int
    root_fd: int
    packages: Packages
    copier: Copier

    def run(self) -> None:
        for name in _PROGRAM_FOLDERS:
            self._copy(name, self.packages.is_program)
        self._copy(b"etc", self.packages.is_setting)
        for path in self.packages.state_skeleton():
            self._copy_alone(path)
        for path in self.packages.registers():
            self._copy(path, self.packages.is_register)

    def _copy(self, path: bytes, choose: Choice) -> None:
        """Copy a folder with what is chosen of it, or the symlink that stands there instead."""
        for parent_fd, target_fd, name in self._open_parents(path):
            with suppress(FileNotFoundError):
                status = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
                if not stat.S_ISDIR(status.st_mode):
                    self.copier.copy_entry(parent_fd, target_fd, name, path)
                    continue
                fd = os.open(name, inode.OPEN_FOLDER, dir_fd=parent_fd)
                try:
                    self.copier.copy_tree(fd, below=path, choose=choose)
                finally:
                    os.close(fd)

    def _copy_alone(self, path: bytes) -> None:
        """Copy a folder without what is in it, or a file that a package put there."""
        for parent_fd, target_fd, name in self._open_parents(path):
            with suppress(FileNotFoundError):
                status = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    _make_folder(parent_fd, target_fd, name)
                elif _is_absent(target_fd, name) and status.st_mode & 0o004:
                    self.copier.copy_entry(parent_fd, target_fd, name, path)

    def _open_parents(self, path: bytes) -> Iterator[tuple[int, int, bytes]]:
        """The folder of `path` in both trees, once; nothing where a link leads there or it is not
        copied.
        """
        above, _, name = path.rpartition(b"/")
        fds = []
        try:
            with suppress(OSError):
                fds.append(_open_part(self.source_fd, above))
                fds.append(open_below(self.root_fd, above))
            if len(fds) > 1:
                yield fds[0], fds[1], name
        finally:
            for fd in fds:
                os.close(fd)


def _open_part(root_fd: int, path: bytes) -> int:
    """A folder of the host, on whatever mount, with no symlink on the way."""
    return syscalls.openat2(
        root_fd, path or b".", flags=os.O_RDONLY | os.O_DIRECTORY, resolve=_ANYWHERE
    )


def _is_absent(folder_fd: int, name: bytes) -> bool:
    try:
        os.stat(name, dir_fd=folder_fd, follow_symlinks=False)
    except FileNotFoundError:
        return True
    return False


def _make_folder(source_fd: int, target_fd: int, name: bytes) -> None:
    """Make a folder with the metadata of the one in the source; one that is there stays."""
    if not _is_absent(target_fd, name):
        return
    fd = os.open(name, inode.OPEN_FOLDER, dir_fd=source_fd)
    try:
        os.mkdir(name, 0o700, dir_fd=target_fd)
        new_fd = os.open(name, inode.OPEN_FOLDER, dir_fd=target_fd)
        try:
            inode.copy_ownership(os.fstat(fd), inode.load_xattrs(fd), new_fd)
        finally:
            os.close(new_fd)
    finally:
        os.close(fd)


# --- accounts


def _write_accounts(source_fd: int, tree: GuestTree) -> None:
    """The accounts and groups of the system, none of which has a password; see passwd(5)."""
    users = list(_kept_rows(source_fd, b"etc/passwd", fields=7))
    groups = list(_kept_rows(source_fd, b"etc/group", fields=4))
    names = {user[0] for user in users}
    for group in groups:
        group[3] = ",".join(member for member in group[3].split(",") if member in names)
    owner = next((int(group[2]) for group in groups if group[0] == "shadow"), 0)
    tables = {
        "etc/passwd": [[user[0], "x", *user[2:]] for user in users],
        "etc/group": [[group[0], "x", *group[2:]] for group in groups],
        "etc/shadow": [[user[0], "*", "", "0", "99999", "7", "", "", ""] for user in users],
        "etc/gshadow": [[group[0], "*", "", group[3]] for group in groups],
    }
    for path, rows in tables.items():
        text = "".join(":".join(row) + "\n" for row in rows)
        is_secret = path.endswith("shadow")
        tree.put(
            path,
            os.fsencode(text),
            mode=0o640 if is_secret else 0o644,
            owner=(0, owner if is_secret else 0),
        )


def _kept_rows(source_fd: int, path: bytes, *, fields: int) -> Iterator[list[str]]:
    """The rows of passwd(5) or group(5) whose number, the third field, is one of the system's."""
    text = read_file(source_fd, path)
    if text is None:
        raise ToolError(f"/{os.fsdecode(path)} of the source: is missing")
    for line in os.fsdecode(text).splitlines():
        row = line.split(":")
        if len(row) == fields and row[2].isdecimal():
            number = int(row[2])
            if number < _FIRST_USER or number > _LAST_USER:
                yield row
