"""Write into a guest's tree from the host, whatever its links say.

Folders are reached by openat2(2) with RESOLVE_IN_ROOT, so a link means what it means to the guest
and none leads out. A file is made beside its place and renamed over it: a symlink or a shared file
of that name is replaced, never written through.
"""

import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from vrun.errors import ToolError
from vstore import inode, syscalls
from vstore.hostpath import HostPath
from vstore.pool import Pool
from vstore.private import break_paths

_RESOLVE: Final = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_LOOK: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_NOWHERE: Final = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ELOOP))
_MOST_BYTES: Final = 1 << 20


class GuestTree:
    """The tree of a guest that does not run. Paths are relative to its root: `etc/hostname`."""

    def __init__(self, root: Path, pool: Path | None = None) -> None:
        """`pool` is the one with which the tree shares files, if it does. Raises OSError."""
        self.root = root
        self._pool = pool
        self.fd = os.open(root, inode.OPEN_FOLDER)

    def close(self) -> None:
        os.close(self.fd)

    def __enter__(self) -> "GuestTree":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def load(self, path: str) -> bytes | None:
        """The content of a regular file; None where there is none, or none of a sensible size."""
        try:
            # Not to read yet: a FIFO would hold us up, and O_NONBLOCK gives up where a `..` of a
            # link has to be tried again since somebody on the machine renames something.
            fd = syscalls.openat2(self.fd, os.fsencode(path), flags=os.O_PATH, resolve=_RESOLVE)
        except OSError as error:
            if error.errno in _NOWHERE:
                return None
            raise
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_BYTES:
                return None
            return Path(f"/proc/self/fd/{fd}").read_bytes()
        finally:
            os.close(fd)

    def has(self, path: str) -> bool:
        """Whether there is anything of that name, a link that leads nowhere included."""
        try:
            with self._parent(path, make=False) as (folder_fd, name):
                os.stat(name, dir_fd=folder_fd, follow_symlinks=False)
        except OSError:
            return False
        return True

    def leads_to_file(self, path: str) -> bool:
        """Whether there is a regular file at the path, by whatever links."""
        status = self._look(path)
        return status is not None and stat.S_ISREG(status.st_mode)

    def is_blank(self, path: str) -> bool:
        """Whether there is nothing at the path, by whatever links, or an empty file."""
        status = self._look(path)
        return status is None or (stat.S_ISREG(status.st_mode) and status.st_size == 0)

    def _look(self, path: str) -> os.stat_result | None:
        try:
            fd = syscalls.openat2(self.fd, os.fsencode(path), flags=os.O_PATH, resolve=_RESOLVE)
        except OSError as error:
            if error.errno in _NOWHERE:
                return None
            raise
        try:
            return os.fstat(fd)
        finally:
            os.close(fd)

    def list(self, path: str) -> list[str]:
        """The names in a folder; none where there is no such folder."""
        try:
            fd = syscalls.openat2(self.fd, os.fsencode(path), flags=_FOLDER, resolve=_RESOLVE)
        except OSError:
            return []
        try:
            return sorted(os.listdir(fd))  # noqa: PTH208 - by descriptor
        finally:
            os.close(fd)

    def make_folder(self, path: str, mode: int = 0o755) -> None:
        """Make a folder, and those above it, where they are missing; one that is there stays.

        Raises ToolError where something else has the name.
        """
        with self._open_folder(path, make=True, mode=mode):
            pass

    def put(
        self, path: str, content: bytes, *, mode: int = 0o644, owner: tuple[int, int] = (0, 0)
    ) -> None:
        """Make the file `path` these bytes; what had the name is replaced, unless it is a folder.

        Folders above it are made where they are missing. Raises OSError, ToolError.
        """

        def make(folder_fd: int, spare: str) -> None:
            fd = os.open(spare, _NEW_FILE, 0o600, dir_fd=folder_fd)
            with os.fdopen(fd, "wb") as file:
                file.write(content)
                os.fchown(fd, *owner)
                os.fchmod(fd, mode)

        self._place(path, make)

    def put_link(self, path: str, target: str) -> None:
        """Make the symlink `path`; as `put`."""
        self._place(path, lambda folder_fd, spare: os.symlink(target, spare, dir_fd=folder_fd))

    def put_node(self, path: str, kind: int, mode: int, device: int) -> None:
        """Make the device `path`; `kind` is stat.S_IFCHR or S_IFBLK. As `put`."""

        def make(folder_fd: int, spare: str) -> None:
            os.mknod(spare, kind | 0o600, device, dir_fd=folder_fd)
            fd = os.open(spare, _LOOK, dir_fd=folder_fd)
            try:
                os.chmod(f"/proc/self/fd/{fd}", mode)  # noqa: PTH101 - what we have just made
            finally:
                os.close(fd)

        self._place(path, make)

    def remove(self, path: str) -> None:
        """Take the name `path` off, which is no folder; what is missing is no error."""
        with (
            suppress(FileNotFoundError),
            self._parent(path, make=False) as (folder_fd, name),
        ):
            self._make_private(folder_fd, name)
            os.unlink(name, dir_fd=folder_fd)

    # --- how

    def _place(self, path: str, make: Callable[[int, str], None]) -> None:
        with self._parent(path, make=True) as (folder_fd, name):
            spare = f".vrun-{secrets.token_hex(8)}"
            try:
                make(folder_fd, spare)
                self._make_private(folder_fd, name)
                os.rename(spare, name, src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
            except IsADirectoryError as error:
                raise ToolError(
                    f"{self.root}/{path}: is a folder in the place of a file",
                    hint="every guest gets this file; take the folder away",
                ) from error
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(spare, dir_fd=folder_fd)

    def _make_private(self, folder_fd: int, name: str) -> None:
        """Give the name of a shared file a copy of its own, so that it can be replaced."""
        if self._pool is None:
            return
        try:
            fd = os.open(name, _LOOK, dir_fd=folder_fd)
        except FileNotFoundError:
            return
        try:
            if not inode.is_immutable_by_statx(fd):
                return
        finally:
            os.close(fd)
        parent = os.readlink(f"/proc/self/fd/{folder_fd}")  # noqa: PTH115 - text
        place = HostPath(f"{parent}/{name}", None, os.fsencode(parent), os.fsencode(name))
        with Pool.load(self._pool) as pool:
            for answer in break_paths([place], [], pool):
                if answer.error:
                    raise ToolError(f"{answer.path}: cannot be replaced: {answer.error}")

    @contextmanager
    def _parent(self, path: str, *, make: bool) -> Iterator[tuple[int, str]]:
        folder, _, name = path.rpartition("/")
        with self._open_folder(folder, make=make) as fd:
            yield fd, name

    @contextmanager
    def _open_folder(self, path: str, *, make: bool, mode: int = 0o755) -> Iterator[int]:
        try:
            fd = self._reach(path, mode) if make else self._open(path)
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP, errno.EEXIST):
                raise
            raise ToolError(f"{self.root}/{path}: is no folder: {error.strerror}") from error
        try:
            yield fd
        finally:
            os.close(fd)

    def _open(self, path: str) -> int:
        return syscalls.openat2(self.fd, os.fsencode(path) or b".", flags=_FOLDER, resolve=_RESOLVE)

    def _reach(self, path: str, mode: int) -> int:
        """Open a folder, making what is missing one component after the other."""
        with suppress(FileNotFoundError):
            return self._open(path)
        above, _, name = path.rpartition("/")
        above_fd = self._reach(above, 0o755)
        try:
            os.mkdir(name, 0o700, dir_fd=above_fd)
            fd = os.open(name, inode.OPEN_FOLDER, dir_fd=above_fd)
        finally:
            os.close(above_fd)
        os.fchmod(fd, mode)
        return fd
