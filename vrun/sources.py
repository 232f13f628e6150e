"""What a path of the host leads to that an administrator wrote down: the source of a mount.

It may pass through the tree of a guest that runs, where any folder can be a symlink that this
guest's root made a moment ago. Up to a guest's root the host's own links count; below it a link
means what it means to that guest, so that none leads out of it.
"""

import errno
import os
import stat
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Final

from vstore.guest import confdir, vdirbase
from vstore.record import dataclass
from vstore.syscalls import RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS, openat2

_LINKS_AT_MOST: Final = 40  # as the kernel, see path_resolution(7)
_TRIES: Final = 1000
_PATH: Final = os.O_PATH | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Source:
    """What was found; whoever opened it closes it."""

    fd: int
    """O_PATH; of the inode itself, so no link can be put in its place any more."""
    is_in_guest: bool
    """It lies below a guest's root, which can put something else in its place."""

    @property
    def kind(self) -> int:
        """S_IFDIR and so on."""
        return stat.S_IFMT(os.fstat(self.fd).st_mode)


def open_source(path: str) -> Source:
    """Open what the host's `path` leads to; a relative one begins at "/". Raises OSError."""
    roots = _roots()
    todo = deque(_components(path))
    links = 0
    folder_fd = os.open("/", _PATH | os.O_DIRECTORY)
    try:
        while todo:
            name = todo.popleft()
            found_fd = os.open(name, _PATH | os.O_NOFOLLOW, dir_fd=folder_fd)
            found = os.fstat(found_fd)
            if stat.S_ISLNK(found.st_mode):
                links += 1
                folder_fd = _follow(folder_fd, found_fd, name, todo, links)
                continue
            os.close(folder_fd)
            folder_fd = found_fd
            if todo and (found.st_dev, found.st_ino) in roots:
                return Source(_open_in_guest(folder_fd, "/".join(todo)), is_in_guest=True)
        return Source(os.dup(folder_fd), is_in_guest=False)
    finally:
        os.close(folder_fd)


def _follow(folder_fd: int, link_fd: int, name: str, todo: deque[str], links: int) -> int:
    """Put what a link of the host's says in front of what is to do; the folder to go on from.

    A magic link of /proc says nothing of use, and is followed by the kernel. Closes what it was
    given, unless it is to go on from there.
    """
    try:
        target = os.readlink("", dir_fd=link_fd)
    finally:
        os.close(link_fd)
    if links > _LINKS_AT_MOST:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), name)
    if _is_magic(folder_fd, name):
        new_fd = os.open(name, _PATH, dir_fd=folder_fd)
    elif target.startswith("/"):
        todo.extendleft(reversed(_components(target)))
        new_fd = os.open("/", _PATH | os.O_DIRECTORY)
    else:
        todo.extendleft(reversed(_components(target)))
        return folder_fd
    os.close(folder_fd)
    return new_fd


def _is_magic(folder_fd: int, name: str) -> bool:
    try:
        os.close(openat2(folder_fd, os.fsencode(name), flags=_PATH, resolve=RESOLVE_NO_MAGICLINKS))
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


def _open_in_guest(root_fd: int, path: str) -> int:
    """While folders are renamed the kernel may not know whether `..` left the root: EAGAIN."""
    resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS
    for _ in range(_TRIES):
        with suppress(BlockingIOError):
            return openat2(root_fd, os.fsencode(path), flags=_PATH, resolve=resolve)
    raise OSError(errno.EAGAIN, "its folders are being renamed all the time", path)


def _components(path: str) -> list[str]:
    return [name for name in path.split("/") if name not in ("", ".")]


def _roots() -> frozenset[tuple[int, int]]:
    """The roots of all guests, configured or not, by device and inode: they have several names."""
    found = set()
    for place in (*_entries(vdirbase()), *(entry / "vdir" for entry in _entries(confdir()))):
        with suppress(OSError):
            status = place.stat()
            if stat.S_ISDIR(status.st_mode):
                found.add((status.st_dev, status.st_ino))
    return frozenset(found)


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []
