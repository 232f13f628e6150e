"""A worker's part of deleting a tree: names first, many objects a window, then the folders.

Several workers share the folders among them by their inode numbers, so that none waits for another
at a folder. The folders themselves are removed once no worker has a name to take off any more.
"""

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from vstore import inode
from vstore.descent import Barred, Descent, Entered, Left
from vstore.pool import InodeNumbers, Pool
from vstore.window import Windows

NOT_EMPTY: Final = frozenset((errno.ENOTEMPTY, errno.EEXIST))

_OBJECTS_A_BATCH: Final = 150
_NAMES_A_BATCH: Final = 1000

Share = tuple[int, int]
"""Which of how many parts of a tree's folders; `FOLDERS` stands for their own removal."""
FOLDERS: Final[Share] = (0, 0)

Answer = tuple[int, int, list[tuple[bytes, str]]]
"""Names deleted, those of objects among them, errors (path, reason): since the answer before."""


@dataclass(slots=True)
class _Shared:
    """An object and its names in a batch, each (its folder's descriptor, name, path)."""

    fd: int
    names: list[tuple[int, bytes, bytes]] = field(default_factory=list)


class Remover:
    """Deletes what is below a folder; a holder of windows for `guarded_worker`.

    `frozen` are the inode numbers of all objects, and of those in quarantine.
    """

    def __init__(
        self, pool: Pool, windows: Windows, frozen: tuple[InodeNumbers, frozenset[int]]
    ) -> None:
        self._windows = windows
        self._pool_ino = os.fstat(pool.fd).st_ino
        self._objects, self._quarantined = frozen
        self._runs: dict[tuple[int, Share], Iterator[Answer]] = {}
        self._folders: list[int] = []
        self._batch: list[tuple[int, bytes, bytes]] = []
        self._names = 0
        self._shared = 0
        self._errors: list[tuple[bytes, str]] = []

    def serve(self, job: tuple[int, Share]) -> Iterator[Answer | None]:
        """Go on deleting a share of what is below a root's descriptor, for a while; yields None at
        the end.
        """
        if job not in self._runs:
            root_fd, share = job
            is_last = share == FOLDERS
            run = self._remove_folders(root_fd) if is_last else self._take_names_off(*job)
            self._runs[job] = run
        yield next(self._runs[job], None)

    def _take_names_off(self, root_fd: int, share: Share) -> Iterator[Answer]:
        part, parts = share
        descent = Descent(root_fd, barred_ino=self._pool_ino)
        for step in descent.steps():
            if isinstance(step, Entered) and step.status.st_ino % parts == part:
                own_fd = -1
                for entry in step.entries:
                    number = entry.inode()
                    name = os.fsencode(entry.name)
                    if number not in self._objects and number not in self._quarantined:
                        self._unlink(step.fd, name, descent)
                        continue
                    if own_fd < 0:
                        own_fd = self._keep_open(step.fd)
                    self._batch.append((own_fd, name, descent.path(name)))
                    if len(self._batch) >= _OBJECTS_A_BATCH:
                        yield self._flush()
                        own_fd = -1
            elif isinstance(step, Barred) and not part:
                self._note_barred(descent.path(step.name), step.error)
            if self._names >= _NAMES_A_BATCH:
                yield self._flush()
        if not part:
            self._errors += descent.errors
        yield self._flush()

    def _keep_open(self, folder_fd: int) -> int:
        self._folders.append(os.dup(folder_fd))
        return self._folders[-1]

    def _unlink(self, folder_fd: int, name: bytes, descent: Descent) -> None:
        try:
            os.unlink(name, dir_fd=folder_fd)
            self._names += 1
        except FileNotFoundError:
            pass
        except OSError as error:
            self._errors.append((descent.path(name), explain(error)))

    def _note_barred(self, path: bytes, error: OSError) -> None:
        if error.errno == errno.EXDEV:
            self._errors.append((path, "another file system is mounted there, or a subvolume"))
        elif error.errno != errno.ENOENT:
            self._errors.append((path, f"cannot be entered: {error.strerror}"))

    def _flush(self) -> Answer:
        """Take the names of the batch off, in one window for each object."""
        objects = self._open_objects()
        with self._windows.guard([item.fd for item in objects]) as refused:
            for item in objects:
                self._take_off(item, is_refused=item.fd in refused)
        for fd in self._folders:
            os.close(fd)
        answer = self._names, self._shared, self._errors
        self._folders, self._batch, self._errors = [], [], []
        self._names = self._shared = 0
        return answer

    def _open_objects(self) -> list[_Shared]:
        found: dict[int, _Shared] = {}
        for folder_fd, name, path in self._batch:
            try:
                fd = os.open(name, inode.OPEN_TO_READ, dir_fd=folder_fd)
            except FileNotFoundError:
                continue
            except OSError as error:
                self._errors.append((path, f"cannot be opened: {error.strerror}"))
                continue
            number = os.fstat(fd).st_ino
            if number in found:
                os.close(fd)
            else:
                found[number] = _Shared(fd)
            found[number].names.append((folder_fd, name, path))
        return list(found.values())

    def _take_off(self, item: _Shared, *, is_refused: bool) -> None:
        try:
            if not inode.is_immutable(item.fd):
                self._unlink_all(item)
            elif is_refused:
                reason = "somebody has the shared file open for writing"
                self._errors += [(path, reason) for _, _, path in item.names]
            else:
                with self._windows.thawed(item.fd):
                    self._unlink_all(item)
        except OSError as error:
            self._errors += [(path, explain(error)) for _, _, path in item.names]

    def _unlink_all(self, item: _Shared) -> None:
        for folder_fd, name, path in item.names:
            try:
                os.unlink(name, dir_fd=folder_fd)
            except FileNotFoundError:
                continue
            except OSError as error:
                self._errors.append((path, explain(error)))
            else:
                self._names += 1
                self._shared += 1

    def _remove_folders(self, root_fd: int) -> Iterator[Answer]:
        descent = Descent(root_fd, barred_ino=self._pool_ino)
        for step in descent.steps():
            if isinstance(step, Left) and step.fd >= 0:
                try:
                    os.rmdir(step.name, dir_fd=step.fd)
                    self._names += 1
                except OSError as error:
                    if error.errno not in NOT_EMPTY:
                        self._errors.append((descent.path(step.name), explain(error)))
            if self._names >= _NAMES_A_BATCH:
                yield self._flush()
        yield self._flush()


def explain(error: OSError) -> str:
    """Why a name or a folder is left, for a person."""
    if error.errno == errno.EPERM:
        return "is immutable or append-only, or its folder is, and no object: see setattr, lsattr"
    return f"cannot be deleted: {error.strerror}"
