"""Puts right what a killed program left in the pool's stage.

A stage folder whose flock can be had belongs to nobody any more. Its intents name the objects that
may be thawed and the guests that may be frozen; its other entries are links and copies that no
guest knows.
"""

import fcntl
import logging
import os
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager, suppress

from vstore import inode, lease
from vstore.digest import digest_content
from vstore.pool import Pool, digest_xattrs, parse_object
from vstore.window import (
    CGROUP_INTENT,
    OBJECTS_INTENT,
    Keeper,
    Windows,
    parse_intent,
    repel_writers,
)

log = logging.getLogger(__name__)


def recover(pool: Pool) -> None:
    """Settle every stage folder that its program left behind. The pool's lock is held, shared or
    not.

    Raises OSError where the stage itself cannot be read.
    """
    try:
        stage = os.open("stage", inode.OPEN_FOLDER, dir_fd=pool.fd)
    except FileNotFoundError:
        return
    try:
        for name in os.listdir(stage):  # noqa: PTH208 - a descriptor
            _recover_folder(pool, f"stage/{name}")
    finally:
        os.close(stage)


def settle_stage(pool: Pool, stage_fd: int, leased: Sequence[int] = ()) -> None:
    """Empty one worker's stage folder: guests run again, spares go, objects that were left thawed
    are frozen.

    `leased` are descriptors of inodes whose leases the dead worker's keeper still holds: nobody
    wrote to them.
    """
    numbers: list[int] = []
    others: list[str] = []
    for name in os.listdir(stage_fd):
        if name.startswith(CGROUP_INTENT.decode()):
            _thaw_cgroup(os.readlink(name, dir_fd=stage_fd))
        elif name.startswith(OBJECTS_INTENT.decode()):
            numbers += parse_intent(os.fsencode(os.readlink(name, dir_fd=stage_fd)))
        else:
            others.append(name)
    for name in others:
        _remove_spare(pool, stage_fd, name)
    _freeze_leased(pool, leased)
    if numbers:
        _freeze_left_thawed(pool, set(numbers))
    for name in os.listdir(stage_fd):
        os.unlink(name, dir_fd=stage_fd)


def freeze_object(pool: Pool, name: str, fd: int) -> bool:
    """Freeze the object at `name`, found thawed, if nobody can have changed it; else it goes to
    quarantine.

    Returns whether it is frozen. Raises OSError.
    """
    if not lease.take(fd):
        pool.quarantine(name, "it is not immutable and somebody has it open for writing")
        return False
    try:
        if not is_sound(name, fd):
            pool.quarantine(
                name, "it was not immutable, and its content or metadata are not what its name says"
            )
            return False
        inode.set_immutable(fd)
        if not lease.is_unbroken(fd):
            repel_writers(fd)
        return True
    finally:
        lease.release(fd)


def is_sound(name: str, fd: int) -> bool:
    """Whether the inode behind `fd` is what the object name says, by reading all of it.

    Raises OSError, ValueError.
    """
    identity, _ = parse_object(name.split("/")[1])
    status = os.fstat(fd)
    return (
        (status.st_size, status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns)
        == (identity.size, identity.mode, identity.uid, identity.gid, identity.mtime_ns)
        and digest_xattrs(fd) == identity.xattrs
        and digest_content(fd, status) == identity.digest
    )


@contextmanager
def own_windows(pool: Pool, stage_fd: int, *, linger_s: float = 0.0) -> Iterator[Windows]:
    """Windows of this process without a keeper besides: for repairs, where no worker is."""
    keeper = Keeper()
    windows = Windows(keeper.holder_socket, pool_fd=pool.fd, stage_fd=stage_fd, linger_s=linger_s)
    try:
        yield windows
    finally:
        windows.close()
        keeper.drain()
        keeper.close()
        keeper.holder_socket.close()


def _recover_folder(pool: Pool, name: str) -> None:
    try:
        top = os.open(name, inode.OPEN_FOLDER, dir_fd=pool.fd)
    except OSError:
        return  # its program has just removed it
    try:
        fcntl.flock(top, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for part in os.listdir(top):  # noqa: PTH208 - a descriptor
            stage_fd = os.open(part, inode.OPEN_FOLDER, dir_fd=top)
            try:
                settle_stage(pool, stage_fd)
            finally:
                os.close(stage_fd)
            os.rmdir(part, dir_fd=top)
        os.rmdir(name, dir_fd=pool.fd)
        log.info("%s/%s: left by a program that was killed; put right", pool.path, name)
    except BlockingIOError:
        pass  # its program lives
    except OSError as error:
        log.warning("%s/%s: cannot be put right: %s", pool.path, name, error.strerror)
    finally:
        os.close(top)


def _thaw_cgroup(path: str) -> None:
    with suppress(OSError):
        fd = os.open(os.path.join(path, "cgroup.freeze"), os.O_WRONLY)  # noqa: PTH118 - text from a symlink
        try:
            os.write(fd, b"0")
        finally:
            os.close(fd)


def _remove_spare(pool: Pool, stage_fd: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=stage_fd)
    except PermissionError:  # a link to an object that is frozen again
        fd = os.open(name, inode.OPEN_TO_READ, dir_fd=stage_fd)
        with own_windows(pool, stage_fd) as windows, windows.guard([fd]) as refused:
            if not refused:
                with windows.thawed(fd):
                    os.unlink(name, dir_fd=stage_fd)


def _freeze_leased(pool: Pool, leased: Sequence[int]) -> None:
    numbers: Container[int] = pool.load_numbers() if leased else ()
    for fd in leased:
        if os.fstat(fd).st_ino in numbers:
            inode.set_immutable(fd)
            if not lease.is_unbroken(fd):
                repel_writers(fd)


def _freeze_left_thawed(pool: Pool, numbers: set[int]) -> None:
    for name, ino in pool.list_objects():
        if ino not in numbers:
            continue
        fd = pool.open_object(name)
        try:
            if not inode.is_immutable(fd):
                freeze_object(pool, name, fd)
        finally:
            os.close(fd)
