"""How an inode looks: all of it that a process could change without opening it for writing."""

import os
from typing import NamedTuple

from vstore import inode


class Look(NamedTuple):
    """Mode, owner, mtime, extended attributes, flags (the immutable one always) and project."""

    mode: int
    owner: tuple[int, int]
    mtime_ns: int
    xattrs: dict[bytes, bytes]
    flags: int
    project: int

    @classmethod
    def at(cls, fd: int) -> "Look":
        """How the inode behind `fd` looks now. Raises OSError."""
        status = os.fstat(fd)
        return cls(
            status.st_mode,
            (status.st_uid, status.st_gid),
            status.st_mtime_ns,
            inode.load_xattrs(fd),
            inode.get_flags(fd) | inode.FS_IMMUTABLE_FL,
            inode.project_id(fd),
        )

    def put_back(self, fd: int, now: "Look") -> None:
        """Make the thawed inode behind `fd`, which looks like `now`, look like this and freeze it.

        Only what differs is touched, so that this takes no longer than it must. Raises OSError.
        """
        if now.owner != self.owner:
            os.fchown(fd, *self.owner)  # drops setuid bits and file capabilities, so first
        if now.xattrs != self.xattrs or now.owner != self.owner:
            inode.store_xattrs(fd, self.xattrs)
        if now.project != self.project:
            inode.put_project_id(fd, self.project)
        if now.mtime_ns != self.mtime_ns:
            os.utime(fd, ns=(os.fstat(fd).st_atime_ns, self.mtime_ns))
        if now != self:
            os.fchmod(fd, self.mode & 0o7777)
        inode.put_flags(fd, self.flags)
