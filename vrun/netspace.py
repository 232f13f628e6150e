"""Network namespaces that a guest does not make for itself: named ones, and another guest's.

A named one is a file of /run/netns with the namespace mounted on it, as ip-netns(8) has them, so
the host's administrator reaches it with `ip netns exec`. Mounts for it are the host's, not those of
the calling monitor.
"""

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, TypeVar

from vrun import mountcalls, syscalls
from vrun.errors import ToolError
from vrun.state import find_running

_T = TypeVar("_T")
_AT_FDCWD: Final = -100  # linux/fcntl.h
FOLDER: Final = Path("/run/netns")


def open_of_guest(name: str) -> int:
    """A descriptor of the network namespace of the running guest `name`. Raises ToolError."""
    running = find_running(name)
    if running is None:
        raise ToolError(
            f"the guest {name}, whose network is to be shared, does not run",
            hint=f"vserver {name} start; apps/init/depends has it started before",
        )
    return os.open(f"/proc/{running.init_pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def open_named(name: str, host_fd: int) -> int:
    """A descriptor of the named network namespace; `host_fd` is of the host's mount namespace.

    Raises ToolError where there is none.
    """

    def look() -> int:
        return os.open(FOLDER / name, os.O_RDONLY | os.O_CLOEXEC)

    try:
        return _among_mounts_of_host(host_fd, look)
    except FileNotFoundError as error:
        raise ToolError(
            f"there is no network namespace {name}", hint=f"make it with: ip netns add {name}"
        ) from error


def check_free(name: str, host_fd: int) -> None:
    """Raise ToolError where there is a network namespace of that name."""
    if _among_mounts_of_host(host_fd, lambda: os.path.lexists(FOLDER / name)):
        raise ToolError(
            f"there is a network namespace {name} already",
            hint="make the file netns/shared for one that is the host's",
        )


def make(name: str, host_fd: int) -> None:
    """Make a new network namespace of that name; the caller is in it afterwards. Raises OSError."""
    syscalls.setns(host_fd, syscalls.CLONE_NEWNS)
    FOLDER.mkdir(mode=0o755, parents=True, exist_ok=True)
    with _locked_folder() as folder_fd:
        _share(folder_fd)
    flags = os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    file_fd = os.open(FOLDER / name, flags, 0o444)
    syscalls.unshare(syscalls.CLONE_NEWNET)
    tree_fd = mountcalls.open_tree(_AT_FDCWD, b"/proc/self/ns/net", mountcalls.OPEN_TREE_CLONE)
    mountcalls.move_mount(tree_fd, file_fd)
    os.close(tree_fd)
    os.close(file_fd)


@contextmanager
def _locked_folder() -> Iterator[int]:
    """A descriptor of the folder, with the lock that ip(8) takes too before it mounts it."""
    folder_fd = os.open(FOLDER, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder_fd, fcntl.LOCK_EX)
        yield folder_fd
    finally:
        os.close(folder_fd)


def _share(folder_fd: int) -> None:
    """Make the folder a mount that is shared, so that what is mounted in it and taken off it is so
    in all mount namespaces.

    ip(8) does it when it first makes a namespace. Done by it after ours was mounted, ours would be
    mounted twice, and its name could not be removed.
    """
    path = os.fsencode(FOLDER)
    try:
        mountcalls.set_propagation(path, mountcalls.MS_SHARED | mountcalls.MS_REC)
    except OSError as error:
        if error.errno != errno.EINVAL:  # it is no mount yet
            raise
        flags = mountcalls.OPEN_TREE_CLONE | mountcalls.AT_RECURSIVE
        tree_fd = mountcalls.open_tree(_AT_FDCWD, path, flags)
        mountcalls.move_mount(tree_fd, folder_fd)
        os.close(tree_fd)
        mountcalls.set_propagation(path, mountcalls.MS_SHARED | mountcalls.MS_REC)


def remove(name: str, host_fd: int) -> None:
    """Remove a named network namespace; it lives on as long as processes are in it."""

    def take_off() -> None:
        with suppress(OSError):
            mountcalls.umount2(os.fsencode(FOLDER / name), mountcalls.MNT_DETACH)
        (FOLDER / name).unlink(missing_ok=True)

    _among_mounts_of_host(host_fd, take_off)


def _among_mounts_of_host(host_fd: int, work: Callable[[], _T]) -> _T:
    own_fd = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        syscalls.setns(host_fd, syscalls.CLONE_NEWNS)
        return work()
    finally:
        syscalls.setns(own_fd, syscalls.CLONE_NEWNS)
        os.close(own_fd)
