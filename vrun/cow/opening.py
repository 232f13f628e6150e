"""Opening a file for writing, and cutting one short: open, openat, creat, truncate.

Where O_TRUNC makes the content go anyhow nothing is copied. The name gets an empty file, and the
caller a descriptor of it; the descriptor's number is taken first, so that a caller who may open no
more files loses nothing. Who opens a file by way of a descriptor (/dev/stdout) gets one of the copy
too, since the one that he has goes on showing the shared file.
"""

import os
from typing import Final

from vrun.cow import rights
from vrun.cow.breaking import Break, Changed, Check, open_regular
from vrun.cow.desk import Answered, Asked, Desk, Found
from vrun.cow.kernel import AT_FDCWD

_NOT_FOR_REOPENING: Final = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
_CREAT: Final = os.O_CREAT | os.O_WRONLY | os.O_TRUNC
_TRIES: Final = 32


def openat(desk: Desk, asked: Asked, directory: int, address: int, flags: int) -> None:
    """As the file calls of all modules here: returns where the call is to go on; raises Answered,
    Deferred, Gone, or OSError where it will fail by itself.
    """
    follow = not flags & os.O_NOFOLLOW
    if flags & os.O_DIRECTORY:
        return  # ENOTDIR
    check = _access_check(desk, flags)
    for _ in range(_TRIES):
        with desk.located(asked, directory, address, follow=follow) as found:
            if found is None:
                return
            try:
                if flags & os.O_TRUNC or found.is_by_descriptor:
                    _open_copy(desk, asked, found, flags, check)
                else:
                    desk.break_found(asked, found.target, check)
            except Changed:
                continue
            return


def creat(desk: Desk, asked: Asked, address: int) -> None:
    openat(desk, asked, AT_FDCWD, address, _CREAT)


def truncate(desk: Desk, asked: Asked, address: int, length: int) -> None:
    if length < 0:
        return  # EINVAL
    check = _access_check(desk, os.O_WRONLY)
    desk.break_path(
        *(asked, AT_FDCWD, address, check),
        is_emptied=length == 0,
        act=lambda fd: os.ftruncate(fd, length),
    )


def _access_check(desk: Desk, flags: int) -> Check:
    access = flags & os.O_ACCMODE
    mode = 0
    if access != os.O_WRONLY:
        mode |= os.R_OK
    if access != os.O_RDONLY or flags & os.O_TRUNC:
        mode |= os.W_OK
    return lambda fd: rights.check_access(desk.roots.proc_fd, fd, mode)


def _open_copy(desk: Desk, asked: Asked, found: Found, flags: int, check: Check) -> None:
    """Raises Answered with a descriptor of the private copy; Changed."""
    target, listener, call = found.target, asked.listener, asked.call
    cloexec = bool(flags & os.O_CLOEXEC)
    with desk.telling():
        if found.copy_ino:
            fd = _reopen(desk, found, found.copy_ino, flags)
            raise Answered(_give(asked, fd, cloexec=cloexec))
        desk.wait_for_copy(asked, target.ino)
        work = Break(desk.shop, target)
        try:
            work.check(check)
            if work.is_alone:
                work.finish()
                return
            if not flags & os.O_TRUNC:
                work.fill()
            if asked.number < 0:  # else it was taken before the call had to wait
                asked.number = _reserve(asked, cloexec=cloexec)
            listener.page.note_begun(call.id, work.begun)
            work.finish()
            try:
                fd = _reopen(desk, found, work.copy_ino, flags)
            except Changed:
                fd = _reopen_nameless(desk, found, work, flags)
            _give(asked, fd, at=asked.number, cloexec=cloexec)
        finally:
            work.close()
    raise Answered(asked.number)


def _reserve(asked: Asked, *, cloexec: bool) -> int:
    """A number of the caller's, which shows /dev/null for a moment."""
    return _give(asked, os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), cloexec=cloexec)


def _give(asked: Asked, fd: int, *, at: int = -1, cloexec: bool) -> int:
    """Give the caller what is behind `fd`, which is closed here; the number that it has there."""
    try:
        return asked.listener.add_fd(asked.call.id, fd, at=at, cloexec=cloexec)
    finally:
        os.close(fd)


def _reopen(desk: Desk, found: Found, copy_ino: int, flags: int) -> int:
    """Open the copy as the caller would, by the guest's own mount. Raises Changed, OSError.

    O_TRUNC stays: it sets times and takes file capabilities away as the kernel sees fit.
    """
    place = found.place
    with desk.shop.own.given_up_for(found.status.credentials):
        return open_regular(desk.shop, place.folder_fd, place.name, copy_ino, _reopened(flags))


def _reopen_nameless(desk: Desk, found: Found, work: Break, flags: int) -> int:
    """Where the guest has put something else under the name meanwhile, the file is the one that was
    put there.
    """
    path = f"self/fd/{work.copy_fd}"
    with desk.shop.own.given_up_for(found.status.credentials):
        return os.open(path, _reopened(flags) | os.O_CLOEXEC, dir_fd=desk.roots.proc_fd)


def _reopened(flags: int) -> int:
    return flags & ~_NOT_FOR_REOPENING | os.O_NOCTTY
