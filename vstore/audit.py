"""Where the bytes are: what each guest has for itself, what it shares, what the pool saves.

Reads, never writes. Sizes on disk are allocated blocks, so a hole counts nothing, and each inode
counts once however many names it has. Blocks that several inodes share (reflinks) are counted for
each of them: stat(2) does not tell them apart.
"""

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from vstore import inode
from vstore.errors import NotPermitted
from vstore.folders import Folder, Missed, join, walk_folders
from vstore.guest import Guest
from vstore.pool import Pool

_BLOCK: Final = 512  # bytes in st_blocks


class Use(NamedTuple):
    """An object: its names (one of them the pool's), its bytes on disk, and its size."""

    names: int
    bytes: int
    size: int


@dataclass(frozen=True, slots=True)
class Objects:
    """The objects of a pool by inode number, as one pass found them; none without a pool."""

    uses: Mapping[int, Use] = field(default_factory=dict)
    device: int = 0
    folder_ino: int = 0  # the pool's own folder


@dataclass(frozen=True, slots=True)
class PoolFigures:
    """A pool in numbers."""

    objects: int
    bytes: int  # on disk
    saved_bytes: int  # what the guests would need more if each had its own copies
    unused_objects: int
    unused_bytes: int  # what reclaiming frees


@dataclass(frozen=True, slots=True)
class GuestFigures:
    """A guest in numbers. `errors` are (path below its root, why it is not counted)."""

    name: str
    files: int  # names of regular files
    apparent_bytes: int  # sizes of regular files
    own_bytes: int  # on disk; freed if the guest were deleted and the pool reclaimed
    shared_bytes: int  # on disk; used by others too
    own_inodes: int
    shared_inodes: int
    errors: list[tuple[bytes, str]]


def find_pool(path: Path) -> Pool | None:
    """The pool at `path`; None where there is none.

    Raises NotPermitted for one that we may not enter; FormatUnknown and PoolCorrupt as `Pool.load`.
    """
    try:
        (path / "format").stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:
        raise NotPermitted(
            f"{path}: the pool cannot be looked at: {error.strerror}", hint="run as root"
        ) from error
    return Pool.load(path)


def load_objects(pool: Pool) -> Objects:
    """Every object of the pool, by one pass over its folders; what vanishes is left out."""
    uses: dict[int, Use] = {}
    for path, number in pool.list_objects():
        try:
            status = os.stat(path, dir_fd=pool.objects_fd, follow_symlinks=False)
        except FileNotFoundError:
            continue
        uses[number] = Use(status.st_nlink, status.st_blocks * _BLOCK, status.st_size)
    return Objects(uses, pool.device, os.fstat(pool.fd).st_ino)


def measure_pool(objects: Objects) -> PoolFigures:
    """An object with n names in guests saves n - 1 copies; one that no guest uses saves nothing."""
    uses = objects.uses.values()
    unused = [use for use in uses if use.names == 1]
    return PoolFigures(
        objects=len(uses),
        bytes=sum(use.bytes for use in uses),
        saved_bytes=sum((use.names - 2) * use.bytes for use in uses if use.names > 2),
        unused_objects=len(unused),
        unused_bytes=sum(use.bytes for use in unused),
    )


def measure_guest(guest: Guest, objects: Objects) -> GuestFigures:
    """The figures of a guest, by one walk that asks nothing about objects. Raises NotPermitted."""
    fd = open_root(guest)
    try:
        is_shared = os.fstat(fd).st_dev == objects.device
        tally = _Tally(fd, objects.uses if is_shared else {})
        missed = Missed()
        for folder in walk_folders(fd, missed, skip_ino=objects.folder_ino if is_shared else 0):
            tally.add(folder, missed)
    finally:
        os.close(fd)
    return tally.sum_up(guest.name, missed)


def open_root(guest: Guest) -> int:
    """A descriptor of the guest's root. Raises NotPermitted."""
    try:
        return os.open(guest.root, inode.OPEN_FOLDER)
    except PermissionError as error:
        raise NotPermitted(
            f"{guest.root}: the tree of {guest.name} cannot be read: {error.strerror}",
            hint="run as root",
        ) from error


class _Tally:
    """The sums over one guest's tree."""

    def __init__(self, root_fd: int, uses: Mapping[int, Use]) -> None:
        self._device = os.fstat(root_fd).st_dev
        self._uses = uses
        self._met: dict[int, int] = {}  # objects: how many names each has here
        self._linked: dict[int, tuple[int, Use]] = {}  # other inodes with several names
        self._files = 0
        self._apparent = 0
        self._own = 0
        self._own_inodes = 0

    def add(self, folder: Folder, missed: Missed) -> None:
        """Count a folder and what is in it, but for the folders there."""
        self._own += folder.status.st_blocks * _BLOCK
        self._own_inodes += 1
        uses, met = self._uses, self._met
        for entry in folder.entries:
            number = entry.inode()
            if number in uses:
                met[number] = met.get(number, 0) + 1
            elif not entry.is_dir(follow_symlinks=False):
                try:
                    self._add_private(entry.stat(follow_symlinks=False))
                except OSError as error:
                    missed.note(join(folder.path, os.fsencode(entry.name)), error)

    def _add_private(self, status: os.stat_result) -> None:
        if status.st_dev != self._device:
            return  # something of another file system is mounted on the name
        is_file = stat.S_ISREG(status.st_mode)
        self._files += is_file
        size = status.st_size if is_file else 0
        if status.st_nlink > 1:
            count, _ = self._linked.get(status.st_ino, (0, None))
            use = Use(status.st_nlink, status.st_blocks * _BLOCK, size)
            self._linked[status.st_ino] = (count + 1, use)
            return
        self._apparent += size
        self._own += status.st_blocks * _BLOCK
        self._own_inodes += 1

    def sum_up(self, name: str, missed: Missed) -> GuestFigures:
        """The figures: an inode is the guest's own if all its names but the pool's are here."""
        several = list(self._linked.values())
        several += [
            (count, self._uses[number]._replace(names=self._uses[number].names - 1))
            for number, count in self._met.items()
        ]
        own = [use for count, use in several if count >= use.names]
        shared = [use for count, use in several if count < use.names]
        return GuestFigures(
            name=name,
            files=self._files + sum(self._met.values()),
            apparent_bytes=self._apparent + sum(use.size for _, use in several),
            own_bytes=self._own + sum(use.bytes for use in own),
            shared_bytes=sum(use.bytes for use in shared),
            own_inodes=self._own_inodes + len(own),
            shared_inodes=len(shared),
            errors=missed.errors,
        )
