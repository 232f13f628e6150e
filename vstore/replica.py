"""A worker's part of cloning: the entries of one tree, made again in another.

Source and target are gone through in step. A folder gets its metadata when it is left. Links that
are made later put its times back.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from vstore import entries, inode
from vstore.counterpart import Counterpart
from vstore.descent import Barred, Descent, Entered
from vstore.errors import NoSpace
from vstore.exclude import Excludes
from vstore.pool import InodeNumbers, Pool
from vstore.window import Windows

_OBJECTS_A_BATCH: Final = 150
_ENTRIES_AN_ANSWER: Final = 500
_PROC_FDS: Final = "/proc/self/fd"
_NO_ROOM: Final = frozenset((errno.ENOSPC, errno.EDQUOT))

SOCKET: Final = "socket"
OTHER_MOUNT: Final = "other-mount"
EXCLUDED: Final = "excluded"

Answer = tuple[dict[str, int], dict[str, int], list[tuple[bytes, str]]]
"""Counts, what was skipped by reason, errors (path, reason): since the answer before."""


@dataclass(slots=True)
class _Shared:
    """An object and the names of a batch that become links to it: (folder, name, path)."""

    fd: int
    names: list[tuple[int, bytes, bytes]] = field(default_factory=list)


class Replicator:
    """Makes a tree again; a holder of windows for `guarded_worker`. `objects` become links; what
    `excludes` excludes is left out, a folder with all in it.
    """

    def __init__(
        self,
        pool: Pool,
        windows: Windows,
        stage_fd: int,
        objects: InodeNumbers,
        excludes: Excludes | None = None,
    ) -> None:
        os.umask(0)
        self._excludes = excludes
        self._windows = windows
        self._stage_fd = stage_fd
        self._pool_ino = os.fstat(pool.fd).st_ino
        self._objects = objects
        self._proc_fd = os.open(_PROC_FDS, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._run: Iterator[Answer] | None = None
        self._batch: dict[int, _Shared] = {}
        self._folders: list[int] = []
        self._forget()

    def serve(self, job: tuple[int, int]) -> Iterator[Answer | None]:
        """Go on with the clone of one folder into another, for a while; yields None at its end."""
        if self._run is None:
            self._run = self._replicate(*job)
        yield next(self._run, None)

    def _forget(self) -> None:
        self._counts = {"linked": 0, "copied": 0, "copied_bytes": 0, "folders": 0}
        self._skipped: dict[str, int] = {}
        self._errors: list[tuple[bytes, str]] = []
        self._entries = 0

    def _answer(self) -> Answer:
        answer = self._counts, self._skipped, self._errors
        self._forget()
        return answer

    # --- the walk

    def _replicate(self, source_fd: int, target_fd: int) -> Iterator[Answer]:
        self._target = Counterpart(os.dup(target_fd))
        try:
            descent = Descent(source_fd, barred_ino=self._pool_ino)
            for step in descent.steps():
                if isinstance(step, Entered):
                    yield from self._enter(step, descent)
                elif isinstance(step, Barred):
                    self._note_barred(step, descent.path(step.name))
                else:
                    self._target.leave(step)
            self._link_batch()
        finally:
            self._target.close()
        self._errors += descent.errors
        self._drop_groups()
        yield self._answer()

    def _enter(self, step: Entered, descent: Descent) -> Iterator[Answer]:
        target = self._target
        if target.is_left_out or (step.name and self._is_excluded(descent.path())):
            target.leave_out()
            return
        target.enter(step)
        self._counts["folders"] += 1
        own_fd = -1  # this folder of the target, for the batch
        for entry in step.entries:
            path = descent.path(os.fsencode(entry.name))
            if self._is_excluded(path):
                continue
            if entry.inode() in self._objects:
                if own_fd < 0:
                    own_fd = os.dup(self._target.fd)
                    self._folders.append(own_fd)
                self._gather(step.fd, own_fd, path)
            else:
                self._make(step.fd, entry, path)
            self._entries += 1
            if len(self._batch) >= _OBJECTS_A_BATCH or self._entries >= _ENTRIES_AN_ANSWER:
                self._link_batch()
                own_fd = -1
                yield self._answer()

    def _is_excluded(self, path: bytes) -> bool:
        if not self._excludes or not self._excludes.is_excluded(b"/" + path):
            return False
        self._skip(EXCLUDED)
        return True

    def _note_barred(self, step: Barred, path: bytes) -> None:
        if self._target.is_left_out or self._is_excluded(path):
            return
        if step.error.errno != errno.EXDEV:
            self._note_error(path, step.error)
            return
        self._skip(OTHER_MOUNT)
        status = os.stat(step.name, dir_fd=step.fd, follow_symlinks=False)
        os.mkdir(step.name, stat.S_IMODE(status.st_mode), dir_fd=self._target.fd)
        os.chown(
            step.name, status.st_uid, status.st_gid, dir_fd=self._target.fd, follow_symlinks=False
        )

    def _skip(self, reason: str) -> None:
        self._skipped[reason] = self._skipped.get(reason, 0) + 1

    def _note_error(self, path: bytes, error: OSError) -> None:
        if error.errno in _NO_ROOM:
            raise NoSpace(f"{os.fsdecode(path)}: no room for its copy: {error.strerror}")
        if error.errno != errno.ENOENT:
            self._errors.append((path, f"cannot be copied: {error.strerror}"))

    # --- links to objects

    def _gather(self, folder_fd: int, target_fd: int, path: bytes) -> None:
        """Note a name of an object for the next window."""
        name = path.rpartition(b"/")[2]
        try:
            fd = os.open(name, inode.OPEN_TO_READ, dir_fd=folder_fd)
        except OSError as error:
            self._note_error(path, error)
            return
        number = os.fstat(fd).st_ino
        if number in self._batch:
            os.close(fd)
        else:
            self._batch[number] = _Shared(fd)
        self._batch[number].names.append((target_fd, name, path))

    def _link_batch(self) -> None:
        """Make the links of the batch, in one window for each object."""
        before = {fd: os.fstat(fd) for fd in self._folders}
        shared = list(self._batch.values())
        with self._windows.guard([item.fd for item in shared]) as refused:
            for item in shared:
                if item.fd in refused or not inode.is_immutable(item.fd):
                    self._copy_names(item, item.names)
                else:
                    self._link_names(item)
        for fd, status in before.items():
            os.utime(fd, ns=(status.st_atime_ns, status.st_mtime_ns))
            os.close(fd)
        self._batch, self._folders = {}, []

    def _link_names(self, item: _Shared) -> None:
        """Link them; where no more links can be had (EMLINK, EXDEV) they become copies."""
        done = 0
        with self._windows.thawed(item.fd), suppress(OSError):
            for target_fd, name, _ in item.names:
                os.link(str(item.fd), name, src_dir_fd=self._proc_fd, dst_dir_fd=target_fd)
                done += 1
        self._counts["linked"] += done
        self._copy_names(item, item.names[done:])

    def _copy_names(self, item: _Shared, names: list[tuple[int, bytes, bytes]]) -> None:
        for target_fd, name, path in names:
            try:
                self._copy_data(item.fd, target_fd, name)
            except OSError as error:
                self._note_error(path, error)

    # --- copies of all else

    def _make(self, folder_fd: int, entry: "os.DirEntry[str]", path: bytes) -> None:
        """Make an entry that is no object and no folder again."""
        name = os.fsencode(entry.name)
        try:
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISSOCK(status.st_mode):
                self._skip(SOCKET)
            elif status.st_nlink == 1:
                self._make_new(folder_fd, name, status)
            elif not self._link_to_group(name, status):
                self._make_new(folder_fd, name, status)
                self._begin_group(name, status)
        except OSError as error:
            self._note_error(path, error)

    def _link_to_group(self, name: bytes, status: os.stat_result) -> bool:
        """Make the name one of those of an inode that was copied already; False for a new one."""
        group, target_fd = f"group-{status.st_ino}", self._target.fd
        try:
            os.link(
                group, name, src_dir_fd=self._stage_fd, dst_dir_fd=target_fd, follow_symlinks=False
            )
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno != errno.EMLINK:
                raise
            os.rename(group, name, src_dir_fd=self._stage_fd, dst_dir_fd=target_fd)
        self._counts["copied"] += 1
        return True

    def _begin_group(self, name: bytes, status: os.stat_result) -> None:
        group, target_fd = f"group-{status.st_ino}", self._target.fd
        os.link(name, group, src_dir_fd=target_fd, dst_dir_fd=self._stage_fd, follow_symlinks=False)

    def _drop_groups(self) -> None:
        # btrfs lists what was in a folder when it was opened, and the stage was empty then.
        fd = os.open(".", inode.OPEN_FOLDER, dir_fd=self._stage_fd)
        try:
            for name in os.listdir(fd):  # noqa: PTH208 - by descriptor
                if name.startswith("group-"):
                    os.unlink(name, dir_fd=fd)
        finally:
            os.close(fd)

    def _make_new(self, folder_fd: int, name: bytes, status: os.stat_result) -> None:
        if stat.S_ISREG(status.st_mode):
            fd = os.open(name, inode.OPEN_TO_READ, dir_fd=folder_fd)
            try:
                self._copy_data(fd, self._target.fd, name)
            finally:
                os.close(fd)
            return
        entries.copy_other(folder_fd, self._target.fd, name, status)
        self._counts["copied"] += 1

    def _copy_data(self, source_fd: int, target_fd: int, name: bytes) -> None:
        """Make a private copy of the file behind `source_fd`, all of it or none."""
        size = entries.copy_file(source_fd, target_fd, name)
        self._counts["copied"] += 1
        self._counts["copied_bytes"] += size
