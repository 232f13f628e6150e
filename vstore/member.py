"""A file that takes part in a run: what the walk saw of it, and its content once that is known."""

from typing import NamedTuple

from vstore.pool import Identity


class Member(NamedTuple):
    """One name of a guest. Times in ns, `blocks` of 512 bytes, `folder` a row of the catalog.

    `group` is the same for all files that may be equal, and grows with the place of the first of
    them in the walk; `turn` counts the equal files of one tree. `nlink` counts the names in guests.
    `digest` is None until the content is known; `fresh`: the file changed so shortly before it was
    read that it may have changed again within the same tick of its clock.
    """

    group: int
    turn: int
    tree: int
    row: int
    folder: int
    name: bytes
    ino: int
    size: int
    mode: int
    uid: int
    gid: int
    mtime: int
    ctime: int
    nlink: int
    blocks: int
    volume: int
    digest: bytes | None
    xattrs: bytes | None
    fresh: int

    @property
    def key(self) -> tuple[int, int, int, int]:
        """What the file must still have when it is opened: inode number, size, mtime, ctime."""
        return self.ino, self.size, self.mtime, self.ctime

    @property
    def identity(self) -> Identity:
        """The identity of a file whose content is known."""
        return Identity(
            self.digest or b"",
            self.size,
            self.mode,
            self.uid,
            self.gid,
            self.mtime,
            self.xattrs or b"",
        )
