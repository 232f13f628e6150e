"""A worker's part of a repair: a damaged inode, a good object, the names of a folder at a time.

A damaged object is moved to quarantine in a window. A good one is made in the stage, checked there
against the name that it will have, and frozen as soon as it has that. Names go from the one to the
other in windows on both.
"""

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import count
from typing import Any, Final

from vstore import extents, freezer, inode, syscalls
from vstore.digest import digest_content
from vstore.errors import NoSpace
from vstore.pool import Identity, Pool, digest_xattrs, parse_object
from vstore.quarantine import former_name
from vstore.recovery import is_sound
from vstore.scan import open_below
from vstore.window import Windows

RESTORED: Final = ""
CHANGED: Final = "has become another file meanwhile"

_SPARE: Final = "good"
_ATTEMPTS: Final = 20  # to freeze a busy guest
_PAUSE_S: Final = 0.05


@contextmanager
def opened(fd: int) -> Iterator[int]:
    """Close `fd` at the end of the block."""
    try:
        yield fd
    finally:
        os.close(fd)


class Mender:
    """Carries out the jobs of a repair; a holder of windows for `guarded_worker`."""

    def __init__(self, pool: Pool, windows: Windows, stage_fd: int) -> None:
        self._pool = pool
        self._windows = windows
        self._stage_fd = stage_fd

    def serve(self, job: tuple[Any, ...]) -> Iterator[Any]:
        kind, *what = job
        if kind == "settle":
            yield self._settle(*what)
        elif kind == "rebuild":
            yield self._rebuild(*what)
        else:
            yield self._replace(*what)

    # --- the damaged inode

    def _settle(self, path: str) -> tuple[str, str, bool]:
        """Freeze it again, or put it in quarantine.

        Returns its path now, what was done, and whether it is good.
        """
        try:
            fd = os.open(path, inode.OPEN_TO_READ, dir_fd=self._pool.fd)
        except OSError as error:
            return path, f"cannot be opened: {error.strerror}", False
        name = former_name(path) if path.startswith("quarantine/") else path.partition("/")[2]
        was_frozen = inode.is_immutable(fd)
        with self._windows.guard([os.dup(fd)]) as refused, opened(fd):
            if refused and was_frozen:
                return path, "somebody has it open for writing", False
            is_good = not refused and _is_sound(name, fd)
            with self._windows.thawed(fd) if was_frozen else nullcontext():
                path, outcome = self._move(path, name, is_good=is_good)
            if not refused:
                self._windows.freeze(fd)
        return path, outcome, is_good

    def _move(self, path: str, name: str, *, is_good: bool) -> tuple[str, str]:
        is_object = path.startswith("objects/")
        if is_good and is_object:
            return path, "frozen again"
        if is_good:
            return self._put_back(path, name), "sound, so put back"
        if not is_object:
            return path, "still in quarantine"
        return self._pool.quarantine(name, "it is not what its name says"), "put in quarantine"

    def _put_back(self, path: str, name: str) -> str:
        for free in _numbered(name):
            with suppress(FileExistsError):
                syscalls.renameat2(
                    self._pool.fd,
                    os.fsencode(path),
                    self._pool.objects_fd,
                    os.fsencode(free),
                    flags=syscalls.RENAME_NOREPLACE,
                )
                return f"objects/{free}"
        raise AssertionError("numbers do not end")

    # --- a good object

    def _rebuild(self, path: str, copies: list[tuple[int, bytes, bytes]]) -> str:
        """Make an object as the one at `path` was, from any good copy.

        Returns its name; empty when there is no good copy.
        """
        name = former_name(path)
        identity, _ = parse_object(name.rpartition("/")[2])
        for source_fd in self._open_sources(path, identity, copies):
            with opened(source_fd):
                if self._make_spare(source_fd, path, identity):
                    return self._enter_pool(name)
        return ""

    def _open_sources(
        self, path: str, identity: Identity, copies: list[tuple[int, bytes, bytes]]
    ) -> Iterator[int]:
        """The damaged inode, whose content may be right; objects of the same content; files."""
        with suppress(OSError):
            yield os.open(path, inode.OPEN_TO_READ, dir_fd=self._pool.fd)
        text = identity.digest.hex()
        for entry in self._pool.scan_folder(text[:2]):
            if entry.name.startswith(f"{text}."):
                with suppress(OSError):
                    yield self._pool.open_object(f"{text[:2]}/{entry.name}")
        for root_fd, folder, name in copies:
            with suppress(OSError), opened(open_below(root_fd, folder)) as folder_fd:
                yield os.open(name, inode.OPEN_TO_READ, dir_fd=folder_fd)

    def _make_spare(self, source_fd: int, path: str, identity: Identity) -> bool:
        """Copy a source to the stage if it is a good one. Raises OSError: ENOSPC."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with opened(os.open(_SPARE, flags, 0o600, dir_fd=self._stage_fd)) as fd:
            try:
                is_good = self._fill(fd, source_fd, path, identity)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise NoSpace(f"{self._pool.path}: no room for a good copy") from error
                is_good = False
        if not is_good:
            os.unlink(_SPARE, dir_fd=self._stage_fd)
        return is_good

    def _fill(self, fd: int, source_fd: int, path: str, identity: Identity) -> bool:
        """Copy the content and set the metadata that the name states; False for other content."""
        if os.fstat(source_fd).st_size != identity.size:
            return False
        extents.copy_data(source_fd, fd, size=identity.size)
        if digest_content(fd, os.fstat(fd)) != identity.digest:
            return False
        xattrs = self._find_xattrs(source_fd, path, identity)
        if xattrs is None:
            return False
        os.fchown(fd, identity.uid, identity.gid)
        os.fchmod(fd, identity.mode & 0o7777)
        inode.store_xattrs(fd, xattrs)
        os.fchmod(fd, identity.mode & 0o7777)
        os.utime(fd, ns=(identity.mtime_ns, identity.mtime_ns))
        os.fsync(fd)
        return True

    def _find_xattrs(
        self, source_fd: int, path: str, identity: Identity
    ) -> dict[bytes, bytes] | None:
        if not identity.xattrs:
            return {}
        if digest_xattrs(source_fd) == identity.xattrs:
            return inode.load_xattrs(source_fd)
        with opened(os.open(path, inode.OPEN_TO_READ, dir_fd=self._pool.fd)) as fd:
            return inode.load_xattrs(fd) if digest_xattrs(fd) == identity.xattrs else None

    def _enter_pool(self, name: str) -> str:
        """Give the spare the first free name of its kind in the pool, and freeze it."""
        fd = os.open(_SPARE, inode.OPEN_TO_READ, dir_fd=self._stage_fd)
        with self._windows.guard([fd]):
            for free in _numbered(name):
                with suppress(FileExistsError):
                    syscalls.renameat2(
                        self._stage_fd,
                        os.fsencode(_SPARE),
                        self._pool.objects_fd,
                        os.fsencode(free),
                        flags=syscalls.RENAME_NOREPLACE,
                    )
                    self._windows.freeze(fd)
                    return free
        raise AssertionError("numbers do not end")

    # --- the guests' names

    def _replace(
        self, path: str, good: str, root_fd: int, folder: bytes, names: list[bytes], cgroup: str
    ) -> list[str]:
        """Make the names in a guest's folder links to the good object; returns for each why not."""
        try:
            folder_fd = open_below(root_fd, folder)
        except OSError:
            return [CHANGED] * len(names)
        with opened(folder_fd):
            for _ in range(_ATTEMPTS):
                with self._still(cgroup) as is_still:
                    if is_still:
                        return self._replace_in(folder_fd, path, good, names)
                time.sleep(_PAUSE_S)
        return ["its guest could not be held still for a moment"] * len(names)

    @contextmanager
    def _still(self, cgroup: str) -> Iterator[bool]:
        if not cgroup:
            yield True
            return
        with (
            freezer.opened(cgroup) as fd,
            self._windows.holding({cgroup: fd}),
            freezer.frozen(cgroup, fd) as is_still,
        ):
            yield is_still

    def _replace_in(self, folder_fd: int, path: str, good: str, names: list[bytes]) -> list[str]:
        before = os.fstat(folder_fd)
        bad_fd = os.open(path, inode.OPEN_TO_READ, dir_fd=self._pool.fd)
        good_fd = self._pool.open_object(good)
        is_frozen = inode.is_immutable(bad_fd)
        with self._windows.guard([bad_fd, good_fd]) as refused:
            if good_fd in refused or (bad_fd in refused and is_frozen):
                return ["somebody has it open for writing"] * len(names)
            number = os.fstat(bad_fd).st_ino
            with (
                self._windows.thawed(good_fd),
                self._windows.thawed(bad_fd) if is_frozen else nullcontext(),
            ):
                outcomes = [self._replace_one(folder_fd, name, number, good) for name in names]
        with suppress(OSError):
            os.utime(folder_fd, ns=(before.st_atime_ns, before.st_mtime_ns))
        return outcomes

    def _replace_one(self, folder_fd: int, name: bytes, number: int, good: str) -> str:
        try:
            if os.stat(name, dir_fd=folder_fd, follow_symlinks=False).st_ino != number:
                return CHANGED
            os.link(good, _SPARE, src_dir_fd=self._pool.objects_fd, dst_dir_fd=self._stage_fd)
            try:
                os.rename(_SPARE, name, src_dir_fd=self._stage_fd, dst_dir_fd=folder_fd)
            except OSError:
                os.unlink(_SPARE, dir_fd=self._stage_fd)
                raise
        except FileNotFoundError:
            return CHANGED
        except OSError as error:
            return f"cannot be replaced: {error.strerror}"
        return RESTORED


def _numbered(name: str) -> Iterator[str]:
    """The object's name, then the same with every other number from 0."""
    yield name
    stem = name.rpartition("-")[0]
    yield from (f"{stem}-{number}" for number in count())


def _is_sound(name: str, fd: int) -> bool:
    try:
        return is_sound(name, fd)
    except (OSError, ValueError):
        return False
