"""Copy a tree, or a part of one, into another: what rsync -aHAXSx would do, on one machine.

Both trees are gone through by descriptor: no symlink is followed, no mount point crossed. Data are
shared with the source where the file system can clone; holes, hard links, extended attributes, ACLs
and times are kept. Sockets are left out: the programs that listen make them anew.
"""

import errno
import os
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from vrun.errors import NoSpace, ToolError
from vrun.unfinished import SPARE
from vstore import entries, inode
from vstore.counterpart import Counterpart
from vstore.descent import Barred, Descent, Entered
from vstore.progress import SILENT, Progress
from vstore.scan import open_below

Choice = Callable[[bytes, os.stat_result], bool]
"""Whether the entry at this path below the source's root is copied; of a folder, with all in it."""

_NO_ROOM: Final = frozenset((errno.ENOSPC, errno.EDQUOT))


class Copier:
    """Copies into the folder behind `target_fd`, as often as it is asked to. Entries that are there
    already are an error unless they `may_replace`; a folder takes in what is copied.

    A folder in the target holds a name for each inode with several until `close`.
    """

    def __init__(
        self, target_fd: int, *, may_replace: bool = False, progress: Progress = SILENT
    ) -> None:
        self._top_fd = target_fd
        self._may_replace = may_replace
        self._progress = progress
        self._spare = f"{SPARE}{secrets.token_hex(8)}"
        os.mkdir(self._spare, 0o700, dir_fd=target_fd)
        self._spare_fd = os.open(self._spare, inode.OPEN_FOLDER, dir_fd=target_fd)
        self.files = 0
        self.size = 0
        self.errors: list[tuple[bytes, str]] = []

    def close(self) -> None:
        """Take away what was only needed on the way."""
        before = os.fstat(self._top_fd)
        with os.scandir(self._spare_fd) as entries:
            for entry in entries:
                os.unlink(entry.name, dir_fd=self._spare_fd)
        os.close(self._spare_fd)
        os.rmdir(self._spare, dir_fd=self._top_fd)
        os.utime(self._top_fd, ns=(before.st_atime_ns, before.st_mtime_ns))

    def __enter__(self) -> "Copier":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def copy_tree(
        self, source_fd: int, *, below: bytes = b"", choose: Choice | None = None, barred: int = 0
    ) -> None:
        """Copy the folder behind `source_fd` to `below` in the target, where it has its metadata
        afterwards; folders above it must be there.

        `barred` is the inode number of a folder that is not entered: the target's own, for example.
        Mount points become empty folders. What cannot be read is noted in `errors`. Raises NoSpace.
        """
        target = Counterpart(self._enter_top(below))
        try:
            descent = Descent(source_fd, barred_ino=barred)
            for step in descent.steps():
                if isinstance(step, Entered):
                    self._visit(target, step, descent, below, choose)
                elif isinstance(step, Barred):
                    self._note_barred(target, step, _join(below, descent.path(step.name)))
                else:
                    target.leave(step)
            self.errors += [(_join(below, path), reason) for path, reason in descent.errors]
        finally:
            target.close()

    def copy_entry(self, source_fd: int, target_fd: int, name: bytes, path: bytes) -> None:
        """Copy one entry that is no folder from one folder to another. `path` is for messages."""
        try:
            status = os.stat(name, dir_fd=source_fd, follow_symlinks=False)
            self._make(source_fd, target_fd, name, status)
        except OSError as error:
            self._note(path, error)

    def check(self) -> None:
        """Raise ToolError if anything could not be copied."""
        if not self.errors:
            return
        path, reason = self.errors[0]
        count = len(self.errors)
        rest = f", and {count - 1} more" if count > 1 else ""
        raise ToolError(f"{os.fsdecode(path)}: {reason}{rest}")

    # --- the walk

    def _enter_top(self, below: bytes) -> int:
        if not below:
            return os.dup(self._top_fd)
        above, _, name = below.rpartition(b"/")
        above_fd = open_below(self._top_fd, above)
        try:
            with suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=above_fd)
            return os.open(name, inode.OPEN_FOLDER, dir_fd=above_fd)
        finally:
            os.close(above_fd)

    def _visit(
        self,
        target: Counterpart,
        step: Entered,
        descent: Descent,
        below: bytes,
        choose: Choice | None,
    ) -> None:
        here = _join(below, descent.path())
        if target.is_left_out or (step.name and choose and not choose(here, step.status)):
            target.leave_out()
            return
        target.enter(step, may_exist=True)
        for entry in step.entries:
            path = _join(here, os.fsencode(entry.name))
            try:
                status = entry.stat(follow_symlinks=False)
                if choose is None or choose(path, status):
                    self._make(step.fd, target.fd, os.fsencode(entry.name), status)
            except OSError as error:
                self._note(path, error)

    def _note_barred(self, target: Counterpart, step: Barred, path: bytes) -> None:
        if target.is_left_out:
            return
        if step.error.errno != errno.EXDEV:
            self._note(path, step.error)
            return
        status = os.stat(step.name, dir_fd=step.fd, follow_symlinks=False)
        with suppress(FileExistsError):
            os.mkdir(step.name, dir_fd=target.fd)
            place = entries.place_of(target.fd, step.name)
            os.chmod(place, stat.S_IMODE(status.st_mode))  # noqa: PTH101 - we have just made it
            os.chown(place, status.st_uid, status.st_gid)

    def _note(self, path: bytes, error: OSError) -> None:
        if error.errno in _NO_ROOM:
            raise NoSpace(f"{os.fsdecode(path)}: no room for its copy: {error.strerror}")
        if error.errno != errno.ENOENT:  # what vanishes meanwhile is nobody's error
            self.errors.append((path, f"cannot be copied: {error.strerror}"))

    # --- entries

    def _make(self, source_fd: int, target_fd: int, name: bytes, status: os.stat_result) -> None:
        if stat.S_ISSOCK(status.st_mode):
            return
        if self._may_replace:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=target_fd)
        group = f"{status.st_dev}-{status.st_ino}"
        if status.st_nlink > 1 and self._link(group, target_fd, name):
            return
        if stat.S_ISREG(status.st_mode):
            self._copy_file(source_fd, target_fd, name)
        else:
            entries.copy_other(source_fd, target_fd, name, status)
        if status.st_nlink > 1:
            os.link(
                name,
                group,
                src_dir_fd=target_fd,
                dst_dir_fd=self._spare_fd,
                follow_symlinks=False,
            )
        self.files += 1
        self._progress.advance(1)

    def _link(self, group: str, target_fd: int, name: bytes) -> bool:
        """Make the name one of those of an inode that was copied; False for a new inode."""
        try:
            os.link(
                group, name, src_dir_fd=self._spare_fd, dst_dir_fd=target_fd, follow_symlinks=False
            )
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno != errno.EMLINK:
                raise
            os.unlink(group, dir_fd=self._spare_fd)
            return False
        return True

    def _copy_file(self, source_fd: int, target_fd: int, name: bytes) -> None:
        """Make a copy of a regular file, all of it or none."""
        old_fd = os.open(name, inode.OPEN_TO_READ, dir_fd=source_fd)
        try:
            self.size += entries.copy_file(old_fd, target_fd, name)
        finally:
            os.close(old_fd)


def _join(folder: bytes, name: bytes) -> bytes:
    return folder + b"/" + name if folder and name else folder or name
