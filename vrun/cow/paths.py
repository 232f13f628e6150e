"""Where a path of a call leads, as its caller would see it.

A caller may have a root, a working directory and descriptors of its own, and names in /proc mean
itself. `walk` goes component by component with the caller's rights, and gives the folder and the
name, to do something there. No file is opened: descriptors are O_PATH, so that no FIFO or device is
ever touched.
"""

import errno
import os
import stat
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from vrun.cow import kernel
from vrun.cow.rights import Own, Status
from vstore import syscalls as store_syscalls
from vstore.record import dataclass

_MOST_LINKS: Final = 40  # linux/namei.h, MAXSYMLINKS
_LOOK: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
OWN_NAMES: Final = (b"self", b"thread-self")
"""What every process finds in /proc, leading to itself."""
_STICKY_FOR_ALL: Final = stat.S_ISVTX | stat.S_IWOTH
_SYSCTLS: Final = Path("/proc/sys/fs")


class Roots:
    """The root directory of this process: the host's, or for a moment that of a caller.

    The working directory stays the host's /proc, from where every process can be reached.
    """

    def __init__(self, at_home: Callable[[], None] = lambda: None) -> None:
        """`at_home` is called whenever the looks are over."""
        self._at_home = at_home
        self._host_fd = os.open("/", _FOLDER)
        self.proc_fd = os.open("/proc", _FOLDER)
        self.protects_symlinks = _is_on("protected_symlinks")
        self.protects_hardlinks = _is_on("protected_hardlinks")
        os.fchdir(self.proc_fd)
        self._is_home = True

    def enter(self, tid: int) -> None:
        """Take the root of the thread `tid`. Raises OSError where it is gone."""
        self._is_home = False
        os.chroot(b"%d/root" % tid)

    def go_home(self) -> None:
        """Take the host's root again: before anything that reads files by their path, and before
        anything but a look at what a caller has.
        """
        self._at_home()
        if not self._is_home:
            os.fchdir(self._host_fd)
            os.chroot(".")
            os.fchdir(self.proc_fd)
            self._is_home = True


def _is_on(name: str) -> bool:
    return (_SYSCTLS / name).read_text().strip() != "0"


@dataclass(slots=True)
class Place:
    """Where a path ends: a file, and the folder and the name by which it was reached.

    The descriptors are O_PATH and belong to this; `folder_fd` is -1 where the path led through a
    descriptor of a process, and `fd` is -1 where nothing has that name. `text` is the path that the
    kernel gave for a descriptor, if the name was found by that.
    """

    fd: int
    folder_fd: int = -1
    name: bytes = b""
    text: bytes = b""

    def close(self) -> None:
        for fd in (self.fd, self.folder_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self.folder_fd = -1


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose path it is."""

    roots: Roots
    own: Own
    status: Status
    tid: int


@dataclass(slots=True)
class _Walk:
    caller: Caller
    here_fd: int
    parts: deque[bytes]
    links: int = 0
    is_own: bool = False
    """The way led through the caller's own folder of /proc."""


def walk(caller: Caller, directory: int, path: bytes, *, follow: bool) -> Place:
    """Walk a path inside its caller's root and with his rights, as the kernel would; it counts from
    his descriptor `directory` or his working directory.

    `follow`: where the last component is a symlink, what that leads to. A path that ends in a slash
    or in `..` names a folder: its place has no name. Raises OSError, as the call itself would.
    """
    if not path:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    caller.roots.enter(caller.tid)
    start = _base_of(caller.tid, directory, path)
    here_fd = os.open(start, _FOLDER, dir_fd=caller.roots.proc_fd)
    state = _Walk(caller, here_fd, deque(path.split(b"/")))
    try:
        with caller.own.given_up_for(caller.status.credentials):
            return _walk(state, follow=follow)
    finally:
        if state.here_fd >= 0:
            os.close(state.here_fd)


def walk_back(path: bytes) -> Place:
    """Walk a path that the kernel gave for a descriptor, inside the root that was entered last.

    It has no symlinks, unless somebody has put one there since: none is followed. Raises OSError.
    """
    here_fd = os.open(b"/", _FOLDER)
    try:
        *folders, name = path.strip(b"/").split(b"/")
        for folder in folders:
            next_fd = os.open(folder, _FOLDER | os.O_NOFOLLOW, dir_fd=here_fd)
            os.close(here_fd)
            here_fd = next_fd
        place = Place(os.open(name, _LOOK, dir_fd=here_fd), here_fd, name, path)
        here_fd = -1
        return place
    finally:
        if here_fd >= 0:
            os.close(here_fd)


def _base_of(tid: int, directory: int, path: bytes) -> str:
    if path.startswith(b"/"):
        return f"{tid}/root"
    return f"{tid}/cwd" if directory == kernel.AT_FDCWD else f"{tid}/fd/{directory}"


def _walk(state: _Walk, *, follow: bool) -> Place:
    while state.parts:
        part = state.parts.popleft()
        if part in (b"", b"."):
            continue
        if part == b"..":
            state.is_own = False
            _step(state, os.open(b"..", _FOLDER, dir_fd=state.here_fd))
            continue
        if place := _take(state, part, follow=follow):
            return place
    fd, state.here_fd = state.here_fd, -1
    return Place(fd)


def _take(state: _Walk, part: bytes, *, follow: bool) -> Place | None:
    """Go one component on; a Place where the path ends with it."""
    is_last = not state.parts
    try:
        fd = os.open(_own_number(state, part), _LOOK, dir_fd=state.here_fd)
    except FileNotFoundError:
        if not is_last:
            raise
        return _end(state, -1, part)
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISLNK(mode) and (not is_last or follow):
            return _follow(state, fd, part, is_last=is_last)
        kept, fd = fd, -1
        if is_last:
            return _end(state, kept, part)
        _step(state, kept)
    finally:
        if fd >= 0:
            os.close(fd)
    if not stat.S_ISDIR(mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    return None


def _end(state: _Walk, fd: int, name: bytes) -> Place:
    folder_fd, state.here_fd = state.here_fd, -1
    return Place(fd, folder_fd, name)


def _step(state: _Walk, fd: int) -> None:
    os.close(state.here_fd)
    state.here_fd = fd


def _follow(state: _Walk, fd: int, name: bytes, *, is_last: bool) -> Place | None:
    """Go on from the symlink `name` in the folder where we are; a Place where the path ends with
    it.
    """
    state.links += 1
    if state.links > _MOST_LINKS:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    if kernel.is_procfs(fd) and _is_magic(state.here_fd, name):
        opened = _open_magic(state, name)
        if is_last:
            return Place(opened)
        _step(state, opened)
        state.is_own = False
        return None
    _check_protected(state, fd)
    text = os.readlink(b"", dir_fd=fd)
    if text.startswith(b"/"):
        _step(state, os.open(b"/", _FOLDER))
        state.is_own = False
    state.parts.extendleft(reversed(text.split(b"/")))
    return None


def _is_magic(folder_fd: int, name: bytes) -> bool:
    """Whether a symlink of /proc leads to what a process has, and not to its text."""
    try:
        fd = store_syscalls.openat2(
            folder_fd, name, flags=os.O_PATH, resolve=store_syscalls.RESOLVE_NO_MAGICLINKS
        )
    except OSError as error:
        return error.errno == errno.ELOOP
    os.close(fd)
    return False


def _open_magic(state: _Walk, name: bytes) -> int:
    """A process may always use what it has itself; of others the kernel asks for ptrace rights."""
    if not state.is_own:
        return os.open(name, os.O_PATH | os.O_CLOEXEC, dir_fd=state.here_fd)
    with state.caller.own.resumed(state.caller.status.credentials):
        return os.open(name, os.O_PATH | os.O_CLOEXEC, dir_fd=state.here_fd)


def _check_protected(state: _Walk, fd: int) -> None:
    """Symlinks in a sticky folder for all are only followed where owners agree: proc_sys_fs(5)."""
    if not state.caller.roots.protects_symlinks:
        return
    folder, link = os.fstat(state.here_fd), os.fstat(fd)
    if folder.st_mode & _STICKY_FOR_ALL == _STICKY_FOR_ALL and link.st_uid not in (
        state.caller.status.credentials.fsuid,
        folder.st_uid,
    ):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _own_number(state: _Walk, part: bytes) -> bytes:
    """`self` and `thread-self` of /proc are the caller, not this process."""
    if state.is_own or not (part.isdigit() or part in OWN_NAMES):
        return part
    if not kernel.is_procfs(state.here_fd):
        return part
    for tgid, tid in zip(
        reversed(state.caller.status.tgids), reversed(state.caller.status.tids), strict=True
    ):
        if _is_caller(state, tgid):
            own = b"%d" % tgid
            state.is_own = part in (own, *OWN_NAMES)
            return {b"self": own, b"thread-self": b"%d/task/%d" % (tgid, tid)}.get(part, part)
    return part


def _is_caller(state: _Walk, number: int) -> bool:
    """Whether that number is the caller's process in the /proc where we are."""
    with suppress(OSError):
        return _begin_of(state.here_fd, b"%d/stat" % number) == _begin_of(
            state.caller.roots.proc_fd, b"%d/stat" % state.caller.status.tgids[0]
        )
    return False


def _begin_of(folder_fd: int, path: bytes) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=folder_fd)
    try:
        return os.read(fd, 4096).rpartition(b")")[2].split()[19]
    finally:
        os.close(fd)
