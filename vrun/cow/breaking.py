"""Breaking the link of one name for one call of its guest.

The copy grows without a name in the same folder; it is the twin on which the kernel decides whether
the caller may do what he wants to. Only if he may, it is filled and put in place, in a window on
the object. What a guest's name points at is whole at every moment.

A guest sees its folders through mounts of its own. Links and renames stay within one mount, so the
folder is opened once more through the pool's, where the stage is.
"""

import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from vrun.cow.notifications import Begun
from vrun.cow.objects import Objects
from vrun.cow.paths import Roots
from vrun.cow.rights import Credentials, Own
from vstore import extents, inode, stray, syscalls
from vstore.pool import Pool
from vstore.record import dataclass
from vstore.window import Windows, thaw_private

Check = Callable[[int], None]
"""Tries on a twin, with the caller's rights, whether he may do it; raises what the kernel says."""

_LONG_COPY: Final = 1 << 20
"""Bytes from which on a copy is made by a process of its own."""
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_SWAPS: Final = 16


class Changed(Exception):
    """The name leads to another inode now, or that is not frozen any more: look again."""


class Held(Exception):
    """A lease on the inode is refused: somebody has it open for writing, or tried to and is being
    turned away. Until that is over, and the lease that held him up is gone, none is granted: look
    again a moment later.
    """


@dataclass(slots=True)
class Workshop:
    """What breaking a link takes, made once."""

    pool: Pool
    windows: Windows
    stage_fd: int
    objects: Objects
    roots: Roots
    own: Own


@dataclass(slots=True)
class Target:
    """A frozen inode, and the guest's name for it."""

    folder_fd: int
    """The guest's folder, as the guest sees it."""
    name: bytes
    ino: int
    credentials: Credentials
    text: bytes = b""
    """The path by which the name was found, if that was by a descriptor."""


def reopen(shop: Workshop, fd: int, flags: int) -> int:
    """Open the inode behind the O_PATH descriptor `fd`, which is known to be a regular file."""
    return os.open(f"self/fd/{fd}", flags | os.O_CLOEXEC, dir_fd=shop.roots.proc_fd)


def open_regular(shop: Workshop, folder_fd: int, name: bytes, ino: int, flags: int) -> int:
    """Open the regular file of that inode number. Raises Changed, OSError.

    Looked at before it is opened: a device or a FIFO may have taken its place.
    """
    try:
        path_fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder_fd)
    except FileNotFoundError:
        raise Changed from None
    try:
        status = os.fstat(path_fd)
        if status.st_ino != ino or not stat.S_ISREG(status.st_mode):
            raise Changed
        return reopen(shop, path_fd, flags)
    finally:
        os.close(path_fd)


def open_shared(shop: Workshop, folder_fd: int, name: bytes, ino: int) -> int:
    """A descriptor for reading the frozen file at `name`. Raises Changed, OSError."""
    fd = open_regular(shop, folder_fd, name, ino, os.O_RDONLY | os.O_NOATIME)
    if not inode.is_immutable(fd):
        os.close(fd)
        raise Changed
    return fd


def check_object(shop: Workshop, fd: int) -> None:
    """Raise PermissionError for an immutable file that is no object: somebody wants it so; or that
    is one, and has been tampered with.
    """
    if not shop.objects.is_sound(fd):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


class Break:
    """The link of a name on its way to be broken. To be closed, however it ends."""

    def __init__(self, shop: Workshop, target: Target) -> None:
        """Raises Changed, OSError."""
        self._shop = shop
        self._target = target
        self._fds: list[int] = []
        shop.roots.go_home()
        try:
            if os.fstatvfs(target.folder_fd).f_flag & os.ST_RDONLY:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            self.shared_fd = open_shared(shop, target.folder_fd, target.name, target.ino)
            self._fds.append(self.shared_fd)
            self._status = os.fstat(self.shared_fd)
            self.is_alone = self._status.st_nlink == 1
            if not self.is_alone:
                check_object(shop, self.shared_fd)
            self._folder = syscalls.load_handle(target.folder_fd)
            self._folder_fd = syscalls.open_by_handle(shop.pool.fd, self._folder, _FOLDER)
            self._fds.append(self._folder_fd)
            self.copy_fd = _open_nameless(self._folder_fd)
            self._fds.append(self.copy_fd)
        except BaseException:
            self.close()
            raise

    @property
    def copy_ino(self) -> int:
        """The number of the inode that the name leads to afterwards."""
        return self._status.st_ino if self.is_alone else os.fstat(self.copy_fd).st_ino

    @property
    def begun(self) -> Begun:
        """What a successor must know who is to carry on after `finish` has begun."""
        return Begun(self._target.ino, self.copy_ino, self._target.text)

    def check(self, check: Check) -> None:
        """Let the kernel decide on the twin; raises what it says."""
        check_on_twin(self._shop, self.shared_fd, self.copy_fd, self._target.credentials, check)

    @property
    def takes_long(self) -> bool:
        """Whether there is so much to copy that others should not wait for it; clones it if the
        file system can.
        """
        if self.is_alone or not self._status.st_size:
            return False
        return self._status.st_blocks * 512 > _LONG_COPY and not extents.clone(
            self.shared_fd, self.copy_fd
        )

    def fill(self) -> None:
        """Give the twin the content. May take long, and be done in a forked process."""
        if not self.is_alone:
            fill(self._shop, self.shared_fd, self.copy_fd)

    def finish(self) -> None:
        """Put the copy in the name's place; the folder's times stay as they were.

        Raises Changed, Held, OSError.
        """
        if self.is_alone:
            thaw_alone(self._shop, self.shared_fd)
            return
        shop, target = self._shop, self._target
        spare = stray.name_copy(target.ino, self.copy_fd, self._folder)
        place = f"self/fd/{self.copy_fd}"
        os.link(place, spare, src_dir_fd=shop.roots.proc_fd, dst_dir_fd=shop.stage_fd)
        before = os.fstat(self._folder_fd)
        guarded_fd = os.dup(self.shared_fd)
        try:
            with shop.windows.guard([guarded_fd]) as refused:
                if refused:
                    raise Held
                if not _is_faithful(shop, self.shared_fd, self.copy_fd):
                    raise Changed
                with shop.windows.thawed(guarded_fd):
                    try:
                        _swap(shop.stage_fd, spare, self._folder_fd, target)
                    finally:
                        left, spare = spare, b""
                        _discard(shop, left)
        finally:
            if spare:
                _discard(shop, spare)
        with suppress(OSError):
            os.utime(self._folder_fd, ns=(before.st_atime_ns, before.st_mtime_ns))

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()


def _open_nameless(folder_fd: int) -> int:
    return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=folder_fd)


def check_on_twin(
    shop: Workshop, shared_fd: int, twin_fd: int, credentials: Credentials, check: Check
) -> None:
    """Give the empty file behind `twin_fd` the metadata of the shared one, let the caller try on
    it, and put them right again. Raises what the kernel says to the attempt.
    """
    status, xattrs = os.fstat(shared_fd), inode.load_xattrs(shared_fd)
    inode.copy_ownership(status, xattrs, twin_fd)
    with shop.own.given_up_for(credentials):
        check(twin_fd)
    inode.copy_ownership(status, xattrs, twin_fd)


def fill(shop: Workshop, shared_fd: int, copy_fd: int) -> None:
    """Give the twin the content, and what the metadata lose by that. Raises OSError."""
    status = os.fstat(shared_fd)
    if not status.st_size:
        return
    if not extents.clone(shared_fd, copy_fd):
        extents.copy_data(shared_fd, copy_fd, size=status.st_size)
        extents.order_data(copy_fd)
    inode.copy_ownership(status, inode.load_xattrs(shared_fd), copy_fd)


def _is_faithful(shop: Workshop, shared_fd: int, copy_fd: int) -> bool:
    """Whether the copy has the metadata of the object, which nobody else has a window on now: an
    attack on it may have met another program's one while they were copied.

    An inode without any name is no object any more, and has no name that could say how it looks.
    """
    is_object = not os.fstat(shared_fd).st_nlink or shop.objects.is_sound(shared_fd)
    return is_object and inode.is_owned_like(copy_fd, shared_fd)


def _swap(stage_fd: int, spare: bytes, folder_fd: int, target: Target) -> None:
    """Exchange the copy at `spare` with what the name leads to, if that is the object.

    The guest may put another file there at any moment. By exchanging nothing of its own is lost: it
    is put back, by `stray` where we are killed or the name is gone. Raises Changed.
    """
    exchange = syscalls.RENAME_EXCHANGE
    copy_ino = os.stat(spare, dir_fd=stage_fd, follow_symlinks=False).st_ino
    try:
        found = os.stat(target.name, dir_fd=folder_fd, follow_symlinks=False)
        if found.st_ino != target.ino:
            raise Changed
        syscalls.renameat2(stage_fd, spare, folder_fd, target.name, flags=exchange)
        for _ in range(_SWAPS):
            ino = os.stat(spare, dir_fd=stage_fd, follow_symlinks=False).st_ino
            if ino == target.ino:
                return
            if ino == copy_ino:
                raise Changed
            syscalls.renameat2(stage_fd, spare, folder_fd, target.name, flags=exchange)
    except FileNotFoundError:
        raise Changed from None
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))


def _discard(shop: Workshop, spare: bytes) -> None:
    """Remove what is left at `spare`, but for a file of the guest. Raises OSError."""
    try:
        stray.give_back(shop.pool.fd, shop.stage_fd, spare)
    except OSError:
        shop.windows.has_doubts = True
        raise
    os.unlink(spare, dir_fd=shop.stage_fd)


def thaw_alone(shop: Workshop, fd: int) -> None:
    """A frozen inode that nobody else has needs no copy. Raises PermissionError if it is one of the
    pool's.
    """
    if os.fstat(fd).st_ino in shop.objects:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
    thaw_private(fd)


def copy_nameless(shop: Workshop, shared_fd: int, credentials: Credentials, check: Check) -> int:
    """A private copy of a file that has no name in the guest any more; its descriptor, for reading
    and writing.

    Raises what the kernel says to the caller's attempt; Changed, Held, OSError.
    """
    if os.fstat(shared_fd).st_nlink:
        check_object(shop, shared_fd)
    fd = _open_nameless(shop.stage_fd)
    try:
        check_on_twin(shop, shared_fd, fd, credentials, check)
        fill(shop, shared_fd, fd)
        with shop.windows.guard([os.dup(shared_fd)]) as refused:
            if refused:
                raise Held
            if not _is_faithful(shop, shared_fd, fd):
                raise Changed
    except BaseException:
        os.close(fd)
        raise
    return fd
