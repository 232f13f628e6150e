"""What the receiving process puts into the tree that grows by itself: its folders, and the files
that are to be objects, where they are to stand. Its worker makes all other entries.
"""

import errno
import os
from typing import Final

from vstore import inode
from vstore.copy.area import Area, fill
from vstore.errors import NoSpace, kind_of
from vstore.folders import LastFolder, join

Spot = tuple[int, bytes, bytes]
"""A row's number, its folder's path and its name."""
Meta = tuple[int, int, int, int, list[tuple[bytes, bytes]]]
"""Mode, uid, gid, mtime (ns) and xattrs."""

_NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Staging:
    """Makes entries in the tree of `area`, by folder and single name. It replaces nothing."""

    def __init__(self, area: Area) -> None:
        self._area = area
        self._folder = LastFolder(area.tree_fd)
        # a default one would reach all that is made below; folders get their own at the end
        inode.remove_acls(area.tree_fd)

    def close(self) -> None:
        self._folder.close()

    def make_folder(self, path: bytes) -> None:
        """Make a folder that only we can enter, or be content with the root. Raises OSError."""
        if path:
            above, _, name = path.rpartition(b"/")
            os.mkdir(name, 0o700, dir_fd=self._folder.open(above))

    def put(self, spot: Spot, content: bytes, mode: int, mtime_ns: int) -> bool:
        """Make a file with this content, mode (rwx alone) and time; False where that cannot be,
        say because something stands there. Raises OSError where there is no room.
        """
        try:
            fd = os.open(spot[2], _NEW_FILE, mode, dir_fd=self._folder.open(spot[1]))
        except OSError as error:
            if kind_of(error) is NoSpace:
                raise
            return False
        try:
            fill(fd, content, mtime_ns)
        finally:
            os.close(fd)
        return True


def explain(area: Area, spot: Spot, error: OSError) -> str:
    """Why the entry at `spot` cannot be made. Raises NoSpace, which ends the copy."""
    if kind_of(error) is NoSpace:
        raise NoSpace(
            f"{area.path}: no room for {os.fsdecode(join(spot[1], spot[2]))}: {error.strerror}",
            hint="free some space and run the command again: what arrived is kept",
        ) from error
    is_twice = error.errno == errno.EEXIST
    reason = "the manifest has it twice" if is_twice else error.strerror or f"{error}"
    return f"cannot be made: {reason}"
