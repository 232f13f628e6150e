"""Where a walk of a tree is in the tree that is made like it.

A folder is made when the walk enters it, open to root alone, and gets the metadata of its original
when it is left: what is made inside would change its times.
"""

import os
from contextlib import suppress

from vstore import inode
from vstore.descent import Entered, Left


class Counterpart:
    """The folder `fd` of the target for the one where a walk is, from its root on.

    The descriptor belongs to this, and is another one after each step of the walk.
    """

    def __init__(self, root_fd: int) -> None:
        """`root_fd` belongs to this from now on: the folder for the root of the walk."""
        self.fd = root_fd
        self._originals: list[tuple[os.stat_result, dict[bytes, bytes]]] = []
        self._left_out = 0

    def close(self) -> None:
        os.close(self.fd)

    @property
    def is_left_out(self) -> bool:
        """Whether the walk is in a folder that is not made again."""
        return self._left_out > 0

    def leave_out(self) -> None:
        """The folder that the walk enters is not made again, nor any below it."""
        self._left_out += 1

    def enter(self, step: Entered, *, may_exist: bool = False) -> None:
        """Make the folder that the walk enters. Raises OSError: EEXIST unless it `may_exist`."""
        if step.name:
            with suppress(*[FileExistsError] if may_exist else []):
                os.mkdir(step.name, 0o700, dir_fd=self.fd)
            self._go(step.name)
        inode.remove_acls(self.fd)  # a default one above would reach all that is made in here
        self._originals.append((step.status, inode.load_xattrs(step.fd)))

    def leave(self, step: Left) -> None:
        """Give the folder that the walk leaves its metadata, and go to the one above it."""
        if self._left_out:
            self._left_out -= 1
            return
        inode.copy_ownership(*self._originals.pop(), self.fd)
        if step.fd >= 0:
            self._go(b"..")

    def _go(self, name: bytes) -> None:
        fd = os.open(name, inode.OPEN_FOLDER, dir_fd=self.fd)
        os.close(self.fd)
        self.fd = fd
