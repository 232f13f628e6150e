"""Taking names away from frozen files, and giving them new ones: unlink, rename, link.

A name of an object can only go while the object is thawed, so the call itself is made here, with
the caller's rights, inside the window; what the kernel says is the call's result. It is never let
go on afterwards: it would meet what it has done itself. A further name inside the guest would be of
a shared file, so link() gets a private one first.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Final

from vrun.cow import rights
from vrun.cow.breaking import Changed, Held, check_object, open_shared, thaw_alone
from vrun.cow.desk import Answered, Asked, Desk, Found
from vrun.cow.kernel import AT_EMPTY_PATH, AT_FDCWD, AT_REMOVEDIR, AT_SYMLINK_FOLLOW
from vrun.cow.notifications import Begun
from vrun.cow.paths import Place
from vstore import inode, syscalls

_TRIES: Final = 32
_CAP_FOWNER: Final = 1 << 3


def unlinkat(desk: Desk, asked: Asked, directory: int, address: int, flags: int) -> None:
    if flags & AT_REMOVEDIR:
        return
    _check_undone(desk, asked, directory, address)
    for _ in range(_TRIES):
        with desk.located(asked, directory, address, follow=False) as found:
            if found is None or not found.place.name:
                return
            place = found.place
            with suppress(Changed):
                do = partial(os.unlink, place.name, dir_fd=place.folder_fd)
                _carry_out(desk, asked, [found], found.ino, do)


def renameat(
    desk: Desk,
    asked: Asked,
    directory: int,
    address: int,
    new_directory: int,
    new_address: int,
    flags: int = 0,
) -> None:
    old, new = (directory, address), (new_directory, new_address)
    _check_undone(desk, asked, *old)
    for _ in range(_TRIES):
        with _both(desk, asked, old, new) as (frozen, places):
            if not frozen or not all(place.name for place in places):
                return
            source, target = places
            ino = os.fstat(source.fd).st_ino if source.fd >= 0 else 0
            with suppress(Changed):
                _carry_out(desk, asked, frozen, ino, partial(_rename, source, target, flags))


def _check_undone(desk: Desk, asked: Asked, directory: int, address: int) -> None:
    """Raise Answered where a supervisor that was killed had carried the call out: its name leads
    elsewhere. What it leads to now is not to be removed, or renamed back.
    """
    if asked.begun is None or asked.begun.copy_ino:
        return
    place, _ = desk.walk(asked, directory, address, follow=False)
    if place is None:
        return
    try:
        if place.fd < 0 or os.fstat(place.fd).st_ino != asked.begun.ino:
            raise Answered
    finally:
        place.close()


def _rename(source: Place, target: Place, flags: int) -> None:
    syscalls.renameat2(source.folder_fd, source.name, target.folder_fd, target.name, flags=flags)


@contextmanager
def _both(
    desk: Desk, asked: Asked, old: tuple[int, int], new: tuple[int, int]
) -> Iterator[tuple[list[Found], list[Place]]]:
    """The frozen ones of two names, and both places."""
    with ExitStack() as stack:
        places, frozen = [], []
        for path in (old, new):
            place, status = desk.walk(asked, *path, follow=False)
            if place is None:
                yield [], []
                return
            stack.callback(place.close)
            places.append(place)
            ino = desk.frozen_ino(place.fd) if place.fd >= 0 else None
            if ino is not None:
                frozen.append(Found(place, ino, status))
        yield frozen, places


def _carry_out(
    desk: Desk, asked: Asked, frozen: list[Found], ino: int, do: Callable[[], None]
) -> None:
    """Make the call while the frozen files are thawed; `ino` is what its first name leads to.

    Raises Answered, Changed, Gone, Held.
    """
    with desk.telling(), ExitStack() as stack:
        shop = desk.shop
        shop.roots.go_home()
        by_number: dict[int, int] = {}
        for found in frozen:
            desk.wait_for_copy(asked, found.ino)
            if found.ino not in by_number:
                fd = open_shared(shop, found.place.folder_fd, found.place.name, found.ino)
                stack.callback(os.close, fd)
                by_number[found.ino] = fd
        shared = [fd for fd in by_number.values() if os.fstat(fd).st_nlink > 1]
        for fd in shared:
            check_object(shop, fd)
        for fd in by_number.values():
            if fd not in shared:
                stack.enter_context(_thawed_alone(desk, fd))
        asked.listener.check(asked.call.id)
        guarded = [os.dup(fd) for fd in shared]
        with shop.windows.guard(guarded) as refused:
            if refused:
                raise Held
            with ExitStack() as windows:
                for fd in guarded:
                    windows.enter_context(shop.windows.thawed(fd))
                _check_unchanged(frozen)
                asked.listener.page.note_begun(asked.call.id, Begun(ino, 0, b""))
                with shop.own.given_up_for(frozen[0].status.credentials):
                    do()
                asked.listener.page.note_result(asked.call.id, 0, 0)
    raise Answered


def _check_unchanged(frozen: list[Found]) -> None:
    for found in frozen:
        try:
            now = os.stat(found.place.name, dir_fd=found.place.folder_fd, follow_symlinks=False)
        except FileNotFoundError:
            raise Changed from None
        if now.st_ino != found.ino:
            raise Changed


@contextmanager
def _thawed_alone(desk: Desk, fd: int) -> Iterator[None]:
    """A frozen file that nobody else has stays thawed, unless the call fails."""
    thaw_alone(desk.shop, fd)
    try:
        yield
    except BaseException:
        inode.set_immutable(fd)
        raise


def linkat(
    desk: Desk,
    asked: Asked,
    directory: int,
    address: int,
    new_directory: int,
    new_address: int,
    flags: int = 0,
) -> None:
    follow = bool(flags & AT_SYMLINK_FOLLOW)
    if flags & AT_EMPTY_PATH and desk.is_empty(asked.call, address):
        return  # names nothing that could be broken: EPERM for a frozen file
    place, status = desk.walk(asked, new_directory, new_address, follow=False)
    if place is None:
        return
    try:
        if place.fd >= 0 or not place.name:
            return  # EEXIST
        if os.fstatvfs(place.folder_fd).f_flag & os.ST_RDONLY:
            return  # EROFS
        with desk.telling(), desk.shop.own.given_up_for(status.credentials):
            rights.check_access(desk.roots.proc_fd, place.folder_fd, os.W_OK | os.X_OK)
    finally:
        place.close()

    def check(fd: int) -> None:
        _check_protected(desk, status.credentials, fd)

    desk.break_path(asked, directory, address, check, follow=follow)


def link(desk: Desk, asked: Asked, address: int, new_address: int) -> None:
    linkat(desk, asked, AT_FDCWD, address, AT_FDCWD, new_address)


def _check_protected(desk: Desk, credentials: rights.Credentials, fd: int) -> None:
    """What fs.protected_hardlinks asks for; proc_sys_fs(5)."""
    if not desk.roots.protects_hardlinks or credentials.effective & _CAP_FOWNER:
        return
    status = os.fstat(fd)
    if status.st_uid == credentials.fsuid:
        return
    mode = status.st_mode
    if mode & stat.S_ISUID or mode & (stat.S_ISGID | stat.S_IXGRP) == stat.S_ISGID | stat.S_IXGRP:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
    try:
        rights.check_access(desk.roots.proc_fd, fd, os.R_OK | os.W_OK)
    except PermissionError:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM)) from None
