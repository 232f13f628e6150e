"""Paths that a host administrator names: which guest they lead into, and a safe way there.

A path may pass through a guest's tree, where any folder can be a symlink that the guest's root made
a moment ago. Up to the guest's root the host's own links count as always; below it they mean what
they mean to the guest, so that none leads out.
"""

import errno
import os
import stat
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vstore import syscalls
from vstore.errors import ToolError, WrongUsage
from vstore.guest import Guest

_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_IN_GUEST: Final = (
    syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS | syscalls.RESOLVE_NO_XDEV
)
_LINKS_AT_MOST: Final = 40  # as the kernel, see path_resolution(7)


@dataclass(frozen=True, slots=True)
class HostPath:
    """Where a path leads: the last component, `name`, in the folder `parent`.

    `parent` is below the root of `guest`, where links are the guest's own; without a guest it is
    absolute and has none.
    """

    given: str
    guest: Guest | None
    parent: bytes
    name: bytes  # never followed


def locate(given: str, guests: Sequence[Guest]) -> HostPath:
    """Find out where `given` leads. Raises WrongUsage for a path without a last component."""
    roots = {os.fsencode(guest.root): guest for guest in guests}
    todo = _components(os.fsencode(Path.cwd() / given))
    real = b""
    links = 0
    while len(todo) > 1:
        here = _step(real, todo.popleft())
        if here in roots:
            return _in_guest(given, roots[here], todo)
        try:
            target = os.readlink(here or b"/")  # noqa: PTH115 - bytes
        except OSError:  # no link; what is missing is noticed when it is opened
            real = here
            continue
        links += 1
        if links > _LINKS_AT_MOST:
            raise ToolError(f"{given}: {os.strerror(errno.ELOOP)}")
        real = b"" if target.startswith(b"/") else real
        todo.extendleft(reversed(_components(target)))
    return HostPath(given, None, real or b"/", _last(given, todo))


def open_parent(parent: bytes, root_fd: int) -> int:
    """The folder `parent` of a HostPath; `root_fd` is the root of its guest, -1 without one.

    Raises OSError: EXDEV for a mount point inside the guest.
    """
    if root_fd < 0:
        return os.open(parent, _FOLDER)
    return syscalls.openat2(root_fd, parent or b".", flags=_FOLDER, resolve=_IN_GUEST)


def describe_kind(mode: int) -> str:
    """What an inode of this mode is, for those who want a regular file or a folder."""
    kinds = {
        stat.S_IFLNK: "a symlink, which is not followed",
        stat.S_IFDIR: "a folder",
        stat.S_IFREG: "a file",
    }
    return kinds.get(stat.S_IFMT(mode), "a device, a FIFO or a socket")


def _components(path: bytes) -> deque[bytes]:
    return deque(part for part in path.split(b"/") if part not in (b"", b"."))


def _step(real: bytes, part: bytes) -> bytes:
    return real.rpartition(b"/")[0] if part == b".." else real + b"/" + part


def _in_guest(given: str, guest: Guest, todo: deque[bytes]) -> HostPath:
    *parents, name = todo
    if name == b"..":
        raise WrongUsage(f"{given}: has no last component")
    return HostPath(given, guest, b"/".join(parents), name)


def _last(given: str, todo: deque[bytes]) -> bytes:
    if not todo or todo[0] == b"..":
        raise WrongUsage(f"{given}: has no last component", hint="name the file or folder itself")
    return todo[0]
