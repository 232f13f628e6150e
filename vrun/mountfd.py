"""Mounts by descriptor: made nowhere, then put on an inode that was reached inside a guest's root.

No path below a guest's root is ever given to mount(2): its folders can be symlinks, and be swapped
while we look. openat2(2) with RESOLVE_IN_ROOT finds the target as the guest itself would see it,
and move_mount(2) mounts on what was found.
"""

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

from vrun import mountcalls
from vrun.errors import ToolError
from vstore.syscalls import RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, openat2

QUIET: Final = (
    mountcalls.MOUNT_ATTR_NOSUID | mountcalls.MOUNT_ATTR_NODEV | mountcalls.MOUNT_ATTR_NOEXEC
)
"""What a mount has that is for data of the kernel only."""

_TRIES: Final = 1000
"""While folders are renamed the kernel may be unable to tell whether `..` left the root."""


@contextmanager
def doing(what: str, target: str) -> Iterator[None]:
    """Have failures of the block say what was to be mounted where: raises ToolError for OSError."""
    try:
        yield
    except OSError as error:
        raise ToolError(
            f"cannot mount {what} on {target} of the guest: {error.strerror or error}",
            hint=hint(error, target),
        ) from error


def open_inside(root_fd: int, path: str, flags: int = os.O_PATH, *, follow: bool = True) -> int:
    """Open `path` as seen from inside the tree at `root_fd`; close-on-exec.

    Absolute symlinks and `..` stay inside. Without `follow` any symlink is ELOOP. Raises OSError.
    """
    resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS | (0 if follow else RESOLVE_NO_SYMLINKS)
    for _ in range(_TRIES):
        with suppress(BlockingIOError):
            return openat2(root_fd, os.fsencode(path), flags=flags, resolve=resolve)
    raise OSError(errno.EAGAIN, "its folders are being renamed all the time", path)


def make(
    fstype: str, *, options: Iterable[str] = (), source: str | None = None, attributes: int = 0
) -> int:
    """A new mount of a file system, mounted nowhere; gone with its descriptor if it stays so.

    `options` are words of the file system (`size=4m`), `attributes` MOUNT_ATTR_ flags; where there
    is no `source` mount tables show `fstype`. Raises OSError with what the file system said.
    """
    fs_fd = mountcalls.fsopen(os.fsencode(fstype))
    try:
        mountcalls.fsconfig_string(fs_fd, b"source", os.fsencode(source or fstype))
        for option in options:
            _configure(fs_fd, option)
        mountcalls.fsconfig_create(fs_fd)
        return mountcalls.fsmount(fs_fd, attributes)
    except OSError as error:
        said = _complaints(fs_fd)
        raise OSError(
            error.errno, f"{error.strerror}: {said}" if said else error.strerror
        ) from None
    finally:
        os.close(fs_fd)


def copy(directory_fd: int, path: str = "", *, recursive: bool = False) -> int:
    """A second mount of what is at `path` below `directory_fd`, mounted nowhere.

    An empty path is `directory_fd` itself, which must be mounted in this namespace. Symlinks in
    `path` are followed: it is not one of a guest. Raises OSError.
    """
    flags = mountcalls.OPEN_TREE_CLONE | (mountcalls.AT_RECURSIVE if recursive else 0)
    return mountcalls.open_tree(directory_fd, os.fsencode(path), flags | mountcalls.AT_EMPTY_PATH)


def attach(mount_fd: int, root_fd: int, target: str, *, follow: bool = True) -> None:
    """Mount on `target`, a path inside the tree at `root_fd`; "/" is that folder itself.

    Raises OSError: ELOOP for a symlink without `follow`, ESTALE where the target was moved away
    meanwhile (it is still inside the guest, wherever that is).
    """
    target_fd = open_inside(root_fd, target, follow=follow)
    try:
        mountcalls.move_mount(mount_fd, target_fd)
    finally:
        os.close(target_fd)
    if target != "/" and not _is_at(mount_fd, root_fd, target):
        raise OSError(errno.ESTALE, "it was moved away in that moment", target)


def make_folder(root_fd: int, path: str, mode: int = 0o755) -> None:
    """Make the folder `path`, one name below the root, unless something has that name."""
    with suppress(FileExistsError):
        os.mkdir(path.strip("/"), mode, dir_fd=root_fd)


def _is_at(mount_fd: int, root_fd: int, target: str) -> bool:
    try:
        found_fd = open_inside(root_fd, target)
    except OSError:
        return False
    try:
        return os.path.sameopenfile(mount_fd, found_fd)
    finally:
        os.close(found_fd)


def _configure(fs_fd: int, option: str) -> None:
    key, equals, value = option.partition("=")
    if equals:
        mountcalls.fsconfig_string(fs_fd, os.fsencode(key), os.fsencode(value))
    else:
        mountcalls.fsconfig_flag(fs_fd, os.fsencode(key))


def _complaints(fs_fd: int) -> str:
    """The messages of a file system that is being described; each begins with a letter, a blank."""
    said = []
    with suppress(OSError):  # ENODATA after the last one
        while line := os.read(fs_fd, 1024):
            said.append(os.fsdecode(line[2:]).strip())
    return "; ".join(said)


def hint(error: OSError, target: str) -> str | None:
    hints = {
        errno.ENOENT: f"make the folder {target} in the guest's tree",
        errno.ELOOP: f"{target} must be a folder of the guest's tree, not a symlink",
        errno.ENOTDIR: f"{target} must be a folder of the guest's tree",
        errno.ENODEV: "the kernel does not know this file system",
    }
    return hints.get(error.errno or 0)
