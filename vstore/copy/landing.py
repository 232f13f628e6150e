"""Where a copy comes to stand: the place of the whole tree, or of one folder's in the target; and
the last steps, the one rename and what is cleaned up after it.
"""

import os
import stat
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vstore import inode, syscalls
from vstore.copy.area import Area
from vstore.copy.messages import as_text
from vstore.copy.outline import NOTHING, Extent
from vstore.errors import ToolError
from vstore.guest import Guest
from vstore.pool import Pool, find_mount_id
from vstore.remove import refuse_mounts, remove
from vstore.scan import open_below

_NAMED: Final = 5
_SHOWN: Final = 4000
_FIXED: Final = inode.FS_IMMUTABLE_FL | inode.FS_APPEND_FL


@dataclass(slots=True)
class Place:
    """Where the copy will stand, and what stands there now."""

    name: str
    parent: Path
    leaf: str
    guest: Guest | None  # configured already
    base_fd: int  # of the tree that is there; -1 for none

    @property
    def path(self) -> Path:
        return self.parent / self.leaf


@dataclass(frozen=True, slots=True)
class Landing:
    """What is made anew: the tree of the folder `below` of the target, or all of it (b"").

    `base_fd` is what stands there now, -1 for nothing; `parent_fd` the folder that it is in, -1 for
    the target's own; `outside` is how much of the target stays.
    """

    place: Place
    base_fd: int
    below: bytes = b""
    parent_fd: int = -1
    outside: Extent = NOTHING

    @property
    def path(self) -> Path:
        return self.place.path / os.fsdecode(self.below)

    def refuse_mounts(self) -> None:
        """A mount would go with the old tree. Raises WrongUsage."""
        if self.base_fd >= 0:
            refuse_mounts(os.fspath(self.path), self.base_fd)

    def put(self, area: Area) -> None:
        """Let the area's tree stand there; what stood there is in the area then.

        Raises ToolError: the target is as it was.
        """
        place = self.place
        if place.base_fd >= 0:
            _check_still(area.parent_fd, os.fsencode(place.leaf), place.base_fd, place.path)
        parent_fd, leaf = area.parent_fd, os.fsencode(place.leaf)
        if self.below:
            parent_fd, leaf = self.parent_fd, self.below.rpartition(b"/")[2]
            _check_still(parent_fd, leaf, self.base_fd, self.path)
        flags = syscalls.RENAME_EXCHANGE if self.base_fd >= 0 else syscalls.RENAME_NOREPLACE
        tree, parent = os.fstat(area.tree_fd), os.fstat(parent_fd)
        try:
            syscalls.renameat2(area.fd, b"tree", parent_fd, leaf, flags=flags)
        except OSError as error:
            raise ToolError(
                f"{self.path}: the copy cannot be put in place: {error.strerror}",
                hint=f"it is complete in {area.path}; run the command again",
            ) from error
        # xfs takes the new way up for a change of the folder itself
        os.utime(area.tree_fd, ns=(tree.st_atime_ns, tree.st_mtime_ns))
        if self.below:
            os.utime(parent_fd, ns=(parent.st_atime_ns, parent.st_mtime_ns))
        os.fsync(parent_fd)


def _check_still(parent_fd: int, name: bytes, fd: int, path: Path) -> None:
    """Raises ToolError where another inode has the name."""
    with suppress(FileNotFoundError):
        now = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
        if os.path.samestat(now, os.fstat(fd)):
            return
    raise ToolError(
        f"{path}: has been replaced by somebody else meanwhile", hint="run the command again"
    )


def land_below(place: Place, folder: bytes, stack: ExitStack) -> Landing:
    """Where the tree at `folder`, or the smallest around it, can be exchanged by itself.

    Not for a mount point, nor in a folder that is immutable or of another subvolume or project than
    where the copy grows: there the file system refuses it. Nor where the path is so long that the
    kernel does not tell it, and mounts below it cannot be found. `stack` closes what is opened.
    """
    while folder:
        above = folder.rpartition(b"/")[0]
        with suppress(OSError), ExitStack() as opened:
            fds = [open_below(place.base_fd, path) for path in (folder, above)]
            for fd in fds:
                opened.callback(os.close, fd)
            if _is_exchangeable(place, *fds):
                stack.push(opened.pop_all())
                return Landing(place, fds[0], folder, fds[1])
        folder = above
    return Landing(place, place.base_fd)


def _is_exchangeable(place: Place, fd: int, parent_fd: int) -> bool:
    """Raises OSError where that cannot be known."""
    beside_fd = os.open(place.parent, inode.OPEN_FOLDER)
    try:
        fds = (fd, parent_fd, beside_fd)
        volumes = {(find_mount_id(some), os.fstat(some).st_dev) for some in fds}
        projects = {inode.project_id(some) for some in fds}
        Path(f"/proc/self/fd/{fd}").readlink()
    finally:
        os.close(beside_fd)
    return (
        len(volumes) == len(projects) == 1
        and not (inode.get_flags(fd) | inode.get_flags(parent_fd)) & _FIXED
    )


def drop_if_empty(area: Area) -> None:
    """Remove an area in which nothing has come to be."""
    with suppress(OSError):
        for name in area.list_arrived():
            if len(name) != 64:
                os.unlink(name, dir_fd=area.arrived_fd)
        os.rmdir("arrived", dir_fd=area.fd)
        with suppress(OSError):
            os.rmdir("tree", dir_fd=area.fd)
            os.rmdir(area.name, dir_fd=area.parent_fd)
            return
        os.mkdir("arrived", 0o700, dir_fd=area.fd)


def clean_up(area: Area, pool: Pool) -> list[str]:
    """Remove what a copy leaves: names of contents, the old tree, areas of earlier copies; gives
    what could not be, and why.
    """
    try:
        for name in area.list_arrived():
            os.unlink(name, dir_fd=area.arrived_fd)
        os.rmdir("arrived", dir_fd=area.fd)
        trees = [old.as_tree() for old in area.leftovers]
        if _has_tree(area):
            trees.append(area.as_tree())
        else:
            os.rmdir(area.name, dir_fd=area.parent_fd)
        left = remove(trees, pool).errors if trees else []
    except (OSError, ToolError) as error:
        left = [(os.fspath(area.path), f"{error}")]
    then = f"delete it with: vpool rm {area.path}"
    return [
        as_text(f"{path}: the old version is left: {reason}; {then}")[:_SHOWN]
        for path, reason in left[:_NAMED]
    ]


def _has_tree(area: Area) -> bool:
    with suppress(FileNotFoundError):
        return stat.S_ISDIR(os.stat("tree", dir_fd=area.fd, follow_symlinks=False).st_mode)
    return False
