"""Break links: give a guest's name a private copy of the shared inode that it points at.

The copy is made without a name in the same folder, complete with owner, mode, times, xattrs, ACLs
and holes, written to disk, and only then renamed over the guest's name, in a window on the shared
inode. The name points at full content at every moment.
"""

import errno
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Final

from vstore import extents, freezer, inode, syscalls
from vstore.pool import Pool
from vstore.scan import open_below
from vstore.window import Windows

BROKEN: Final = "broken"
CHANGED: Final = "changed"
NOT_SHARED: Final = "not-shared"
BUSY: Final = "busy"
NOT_FROZEN: Final = "not-frozen"
_TRIES: Final = 20  # to freeze a busy guest; one that was not frozen then is tried once a folder

_ATTEMPTS: Final = 20
_PAUSE_S: Final = 0.05
_PROC_FDS: Final = "/proc/self/fd"
_LONG_COPY: Final = 64 << 20  # bytes that may take so long that leases would be broken meanwhile


def make_private_copy(source_fd: int, folder_fd: int) -> int:
    """A nameless file in the folder behind `folder_fd`, equal to the one behind `source_fd` in all
    that a guest can see.

    Returns its descriptor; closing it leaves nothing. Its data are shared with the source's where
    the file system can clone. Raises OSError: ENOSPC, EDQUOT, EOPNOTSUPP.
    """
    status = os.fstat(source_fd)
    fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=folder_fd)
    try:
        extents.copy_data(source_fd, fd, size=status.st_size)
        inode.copy_ownership(status, inode.load_xattrs(source_fd), fd)
    except OSError:
        os.close(fd)
        raise
    return fd


def correct_copy(copy_fd: int, source_fd: int) -> None:
    """Give a copy the metadata of its source, which is guarded now, once more if they differ: while
    they were copied an attack on them may have met another program's window. Raises OSError.
    """
    if not inode.is_owned_like(copy_fd, source_fd):
        inode.copy_ownership(os.fstat(source_fd), inode.load_xattrs(source_fd), copy_fd)


@dataclass(slots=True)
class _Copy:
    """A name on its way to a private copy:

    the shared inode's descriptor, and the copy's name in the stage.
    """

    position: int
    name: bytes
    shared_fd: int
    ino: int
    spare: str


class Breaker:
    """Breaks the links of names in one folder after the other. Needs windows of this process."""

    def __init__(self, pool: Pool, windows: Windows, stage_fd: int) -> None:
        self._pool = pool
        self._windows = windows
        self._stage_fd = stage_fd
        self._restless: set[str] = set()  # cgroups of guests that could not be held still
        self._proc_fd = os.open(_PROC_FDS, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def break_below(
        self, root_fd: int, path: bytes, names: Sequence[tuple[bytes, int]], cgroup: str = ""
    ) -> list[str]:
        """As `break_names` for the folder `path` below `root_fd`; the guest that runs in `cgroup`
        is held still.
        """
        try:
            folder_fd = open_below(root_fd, path)
        except OSError:
            return [CHANGED] * len(names)
        try:
            return self.break_names(folder_fd, names, cgroup)
        finally:
            os.close(folder_fd)

    def break_names(
        self, folder_fd: int, names: Sequence[tuple[bytes, int]], cgroup: str = ""
    ) -> list[str]:
        """Give each (name, number of the shared inode) in the folder behind `folder_fd` a private
        copy.

        Returns for each BROKEN, why it was left alone, or an error's text. The folder's times stay
        as they were. A guest that cannot be held still at once, since the machine is busy, is tried
        again for some seconds: nobody comes later to do it.
        """
        for _ in range(_ATTEMPTS):
            outcomes = self._try_to_break(folder_fd, names, cgroup)
            if NOT_FROZEN not in outcomes:
                break
            time.sleep(_PAUSE_S)
        return outcomes

    def _try_to_break(
        self, folder_fd: int, names: Sequence[tuple[bytes, int]], cgroup: str
    ) -> list[str]:
        outcomes = [CHANGED] * len(names)
        with ExitStack() as stack:
            copies = []
            for position, (name, ino) in enumerate(names):
                try:
                    copies.append(self._copy(folder_fd, position, name, ino, stack))
                except OSError as error:
                    outcomes[position] = _explain(error)
            if copies:
                syscalls.syncfs(self._pool.fd)
                self._replace_all(folder_fd, copies, cgroup, outcomes)
        return outcomes

    def _copy(
        self, folder_fd: int, position: int, name: bytes, ino: int, stack: ExitStack
    ) -> _Copy:
        shared_fd = os.open(name, inode.OPEN_TO_READ, dir_fd=folder_fd)
        stack.callback(_close_quietly, shared_fd)
        if os.fstat(shared_fd).st_ino != ino:
            raise OSError(errno.ESTALE, "the name points at another file now")
        if not inode.is_immutable(shared_fd):
            raise OSError(errno.EINVAL, "the file is not shared")
        if os.fstat(shared_fd).st_size > _LONG_COPY:
            self._windows.let_all_go()
        fd = make_private_copy(shared_fd, folder_fd)
        spare = f"copy-{position}"
        try:
            os.link(str(fd), spare, src_dir_fd=self._proc_fd, dst_dir_fd=self._stage_fd)
        finally:
            os.close(fd)
        stack.callback(_unlink_quietly, spare, self._stage_fd)
        return _Copy(position, name, shared_fd, ino, spare)

    def _replace_all(
        self, folder_fd: int, copies: Sequence[_Copy], cgroup: str, outcomes: list[str]
    ) -> None:
        before = os.fstat(folder_fd)
        self._windows.make_room()
        tries = 1 if cgroup in self._restless else _TRIES
        with _still(cgroup, self._windows, tries) as is_still:
            if not is_still:
                self._restless.add(cgroup)
            guarded = {copy.ino: os.dup(copy.shared_fd) for copy in copies}
            with self._windows.guard(list(guarded.values())) as refused:
                for copy in copies:
                    fd = guarded[copy.ino]
                    if not is_still:
                        outcomes[copy.position] = NOT_FROZEN
                    elif fd in refused:
                        outcomes[copy.position] = BUSY
                    else:
                        outcomes[copy.position] = self._replace(folder_fd, copy, fd)
            with suppress(OSError):
                os.utime(folder_fd, ns=(before.st_atime_ns, before.st_mtime_ns))

    def _replace(self, folder_fd: int, copy: _Copy, fd: int) -> str:
        try:
            if not inode.is_immutable(fd):
                return CHANGED  # thawed since it was copied: what was written then would be lost
            self._correct(copy, fd)
            with self._windows.thawed(fd):
                now = os.stat(copy.name, dir_fd=folder_fd, follow_symlinks=False)
                if now.st_ino != copy.ino:
                    return CHANGED
                os.rename(copy.spare, copy.name, src_dir_fd=self._stage_fd, dst_dir_fd=folder_fd)
        except OSError as error:
            return _explain(error)
        return BROKEN

    def _correct(self, copy: _Copy, fd: int) -> None:
        copy_fd = os.open(copy.spare, inode.OPEN_TO_READ, dir_fd=self._stage_fd)
        try:
            correct_copy(copy_fd, fd)
        finally:
            os.close(copy_fd)


@contextmanager
def _still(cgroup: str, windows: Windows, tries: int) -> Iterator[bool]:
    """Hold the guest in `cgroup` still; yields whether it is. No cgroup: it does not run."""
    if not cgroup:
        yield True
        return
    with ExitStack() as stack:
        try:
            fd = stack.enter_context(freezer.opened(cgroup))
        except OSError:
            yield False  # the guest has just stopped
            return
        stack.enter_context(windows.holding({cgroup: fd}))
        yield freezer.hold(cgroup, fd, stack, tries=tries)


def _explain(error: OSError) -> str:
    if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ESTALE):
        return CHANGED
    if error.errno == errno.EINVAL:
        return NOT_SHARED
    return f"cannot be copied: {error.strerror}"


def _close_quietly(fd: int) -> None:
    with suppress(OSError):
        os.close(fd)


def _unlink_quietly(name: str, folder_fd: int) -> None:
    with suppress(OSError):
        os.unlink(name, dir_fd=folder_fd)
