"""Take a tree away, shared files and all.

Where the tree's file system has the pool, `vstore.remove` does it, in thaw windows. Where there is
no pool nothing is shared, and names are simply taken off. Both go by descriptor, follow no symlink
and cross no mount point; before the first name goes, it is certain that the tree holds nothing that
must stay.
"""

import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

from vrun.errors import WrongUsage
from vstore import inode
from vstore.descent import Barred, Descent, Entered
from vstore.guest import confdir, rundir, vdirbase
from vstore.hostpath import describe_kind, locate
from vstore.pool import POOL_NAME, Pool
from vstore.remove import open_trees, remove
from vstore.remover import NOT_EMPTY

Kept = list[tuple[str, str]]
"""What could not be removed: (path, why)."""


def remove_tree(path: Path, *, pool: Path | None = None) -> Kept:
    """Delete the folder `path` and all below it; `pool` is the one that it shares files with.

    Without it the pool of the guests' roots, or one beside the tree, is taken, if there is one on
    that file system. What cannot be deleted is left, with the folders that lead to it. Raises
    WrongUsage, before anything is deleted, for what is no tree of its own: a symlink, a mount
    point, something that holds one, or a folder that the tools need.
    """
    check_removable(path)
    with ExitStack() as stack:
        place = pool or find_pool(path)
        if place is None:
            return _remove_plain(path)
        found = stack.enter_context(Pool.load(place))
        (tree,) = stack.enter_context(open_trees([locate(os.fspath(path), [])], [], found))
        return remove([tree], found).errors


def remove_folder(path: Path) -> Kept:
    """As `remove_tree`, for a folder in which nothing can be shared: a configuration, a cache."""
    check_removable(path)
    return _remove_plain(path)


def check_removable(path: Path) -> None:
    """See that `path` is a folder that may go. Raises WrongUsage, OSError."""
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise WrongUsage(f"{path}: is {describe_kind(status.st_mode)}, no tree")
    needed = {
        "the host's root": Path("/"),
        "the folder of the guests' roots": vdirbase(),
        "the guests' configuration": confdir(),
        "the guests' run state": rundir(),
    }
    for what, other in needed.items():
        if _holds(status, other):
            raise WrongUsage(f"{path}: is or holds {what}, {other}, which is never deleted")
    mounted = find_mount_below(path)
    if mounted:
        raise WrongUsage(
            f"{path}: something is mounted at {mounted}", hint=f"unmount it first: umount {mounted}"
        )


def find_pool(path: Path) -> Path | None:
    """The pool on the file system of `path`: that of the guests' roots, or one beside `path`."""
    for folder in (vdirbase(), path.parent):
        pool = folder / POOL_NAME
        if not os.path.lexists(pool / "format"):
            continue
        if (pool / "objects").stat().st_dev == path.lstat().st_dev:
            return pool
    return None


def find_mount_below(path: Path) -> str:
    """A mount point at or below `path` in this mount namespace; "" where there is none."""
    real = path.resolve()
    return next((point for point in _list_mounts() if Path(point).is_relative_to(real)), "")


def _list_mounts() -> Iterator[str]:
    """Every mount point that we see; see proc_pid_mountinfo(5)."""
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        yield re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line.split(" ")[4])


def _holds(top: os.stat_result, other: Path) -> bool:
    """Whether `other` is the folder `top` or lies in it; folders are compared by inode, so that a
    bind mount is no disguise.
    """
    real = other.resolve()
    for folder in (real, *real.parents):
        with suppress(FileNotFoundError, NotADirectoryError):
            if os.path.samestat(folder.stat(), top):
                return True
    return False


def _remove_plain(path: Path) -> Kept:
    parent_fd = os.open(path.parent, inode.OPEN_FOLDER & ~os.O_NOFOLLOW)
    try:
        fd = os.open(path.name, inode.OPEN_FOLDER, dir_fd=parent_fd)
        try:
            errors = list(_empty(fd))
            now = os.stat(path.name, dir_fd=parent_fd, follow_symlinks=False)
            if not os.path.samestat(now, os.fstat(fd)):
                errors.append((b"", "another file has taken its place"))
        finally:
            os.close(fd)
        if not errors and (error := _try(os.rmdir, path.name, parent_fd)):
            errors.append((b"", _reason(error)))
    finally:
        os.close(parent_fd)
    top = os.fspath(path)
    return [(f"{top}/{os.fsdecode(below)}" if below else top, reason) for below, reason in errors]


def _empty(fd: int) -> Iterator[tuple[bytes, str]]:
    """Take away all that is in the folder behind `fd`; yields what stays."""
    descent = Descent(fd)
    for step in descent.steps():
        if isinstance(step, Entered):
            for entry in step.entries:
                if error := _try(os.unlink, entry.name, step.fd):
                    yield descent.path(os.fsencode(entry.name)), _reason(error)
        elif isinstance(step, Barred):
            yield descent.path(step.name), _reason(step.error)
        elif step.fd >= 0:
            error = _try(os.rmdir, step.name, step.fd)
            if error and error.errno not in NOT_EMPTY:  # what is in it was yielded
                yield descent.path(step.name), _reason(error)
    yield from descent.errors


def _try(call: Callable[..., None], name: str | bytes, folder_fd: int) -> OSError | None:
    """Take one name off; what is gone already is no error."""
    try:
        call(name, dir_fd=folder_fd)
    except FileNotFoundError:
        return None
    except OSError as error:
        return error
    return None


def _reason(error: OSError) -> str:
    return error.strerror or "cannot be removed"
