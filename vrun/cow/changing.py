"""Changing a file's inode: chmod, chown, utimes, extended attributes and ACLs; by its name or
through a descriptor.

A descriptor goes on showing the shared inode after its name has got a private copy. So the caller's
descriptor is replaced by one of the copy, open in the same way and at the same place.
"""

import os
import struct
import time
from typing import Final

from vrun.cow import kernel, rights
from vrun.cow.breaking import Changed, Check, Target, copy_nameless, open_regular, reopen
from vrun.cow.desk import Asked, Desk
from vrun.cow.kernel import AT_EMPTY_PATH, AT_FDCWD
from vrun.cow.kernel import AT_SYMLINK_NOFOLLOW as NOFOLLOW
from vrun.cow.notifications import Gone
from vrun.cow.numbers import NARROW
from vrun.cow.paths import Place
from vstore import inode

_TRIES: Final = 32
_UTIME_NOW: Final = (1 << 30) - 1  # linux/stat.h
_UTIME_OMIT: Final = (1 << 30) - 2
_SPECIAL: Final = (_UTIME_NOW, _UTIME_OMIT)
_TIMES_64: Final = struct.Struct("=qI4xqI4x")
"""Of two times of a 32-bit program, nanoseconds are what the lower halves say."""
_XATTR_SIZE_MAX: Final = 65536
_REOPENED: Final = ~(os.O_CREAT | os.O_EXCL | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC)
_AS_IT_IS: Final = 0xFFFFFFFF


# --- what is tried on the twin


def _chmod(mode: int) -> Check:
    return lambda fd: os.fchmod(fd, mode & 0o7777)


def _chown(uid: int, gid: int) -> Check:
    def check(fd: int) -> None:
        os.chown(fd, *(-1 if number == _AS_IT_IS else number for number in (uid, gid)))

    return check


def _touch(desk: Desk, *, is_now: bool) -> Check:
    """Setting times to now is for everybody who may write, to anything else for the owner."""

    def check(fd: int) -> None:
        if not is_now:
            os.utime(fd, ns=(1, 1))
            return
        try:
            os.utime(fd)
        except PermissionError:
            rights.check_access(desk.roots.proc_fd, fd, os.W_OK)

    return check


def _set_times(access_s: int, access_ns: int, change_s: int, change_ns: int) -> Check:
    def act(fd: int) -> None:
        status = os.fstat(fd)
        wanted = []
        for (seconds, ns), old in zip(
            ((access_s, access_ns), (change_s, change_ns)),
            (status.st_atime_ns, status.st_mtime_ns),
            strict=True,
        ):
            special = {_UTIME_NOW: time.time_ns(), _UTIME_OMIT: old}
            wanted.append(special.get(ns, seconds * 10**9 + ns))
        os.utime(fd, ns=(wanted[0], wanted[1]))

    return act


def _wide(number: int) -> int:
    """The 16-bit ids of old calls: 0xffff leaves an id as it is."""
    return _AS_IT_IS if number & 0xFFFF == 0xFFFF else number & 0xFFFF


# --- the calls


def fchmodat(desk: Desk, asked: Asked, directory: int, address: int, mode: int, flags: int) -> None:
    _change(desk, asked, directory, address, flags, _chmod(mode))


def fchmod(desk: Desk, asked: Asked, fd: int, mode: int) -> None:
    _change_open(desk, asked, fd, _chmod(mode))


def fchownat(
    desk: Desk, asked: Asked, directory: int, address: int, uid: int, gid: int, flags: int
) -> None:
    _change(desk, asked, directory, address, flags, _chown(uid, gid))


def fchown(desk: Desk, asked: Asked, fd: int, uid: int, gid: int) -> None:
    _change_open(desk, asked, fd, _chown(uid, gid))


def fchownat16(desk: Desk, asked: Asked, address: int, uid: int, gid: int, flags: int) -> None:
    fchownat(desk, asked, AT_FDCWD, address, _wide(uid), _wide(gid), flags)


def fchown16(desk: Desk, asked: Asked, fd: int, uid: int, gid: int) -> None:
    fchown(desk, asked, fd, _wide(uid), _wide(gid))


def utime(desk: Desk, asked: Asked, address: int, times: int) -> None:
    wanted = None
    if times:
        found = _read_longs(asked, times, 2)
        if found is None:
            return  # EFAULT
        wanted = (found[0], 0, found[1], 0)
    _change_times(desk, asked, AT_FDCWD, address, wanted)


def futimesat(desk: Desk, asked: Asked, directory: int, address: int, times: int) -> None:
    """Also utimes(2), which has no descriptor."""
    wanted = None
    if times:
        found = _read_longs(asked, times, 4)
        if found is None or not all(0 <= microseconds < 10**6 for microseconds in found[1::2]):
            return  # EFAULT, EINVAL
        access_s, access_us, change_s, change_us = found
        wanted = (access_s, access_us * 1000, change_s, change_us * 1000)
    _change_times(desk, asked, directory, address, wanted)


def utimensat(
    desk: Desk, asked: Asked, directory: int, address: int, times: int, flags: int
) -> None:
    wanted = None
    if times:
        found = _read_longs(asked, times, 4)
        if found is None or not all(ns in _SPECIAL or 0 <= ns < 10**9 for ns in found[1::2]):
            return  # EFAULT, EINVAL
        access_s, access_ns, change_s, change_ns = found
        if access_ns == change_ns == _UTIME_OMIT:
            return  # does nothing, whatever it is asked for
        wanted = (access_s, access_ns, change_s, change_ns)
    _change_times(desk, asked, directory, address, wanted, flags)


def _read_longs(asked: Asked, address: int, count: int) -> tuple[int, ...] | None:
    """So many numbers of the caller's memory; None where they are not all there."""
    layout = struct.Struct(f"={count}{'i' if asked.call.arch in NARROW else 'q'}")
    if asked.is_time64:
        layout = _TIMES_64
    data = kernel.read_bytes(asked.call.tid, address, layout.size)
    return None if data is None else layout.unpack(data)


def _change_times(
    desk: Desk,
    asked: Asked,
    directory: int,
    address: int,
    wanted: tuple[int, int, int, int] | None,
    flags: int = 0,
) -> None:
    """`wanted`: as _set_times() takes them; None is now."""
    act = _set_times(*wanted) if wanted else None
    is_now = not wanted or wanted[1] == wanted[3] == _UTIME_NOW
    check = _touch(desk, is_now=is_now)
    if address:
        _change(desk, asked, directory, address, flags, check, act)
    else:
        _change_open(desk, asked, directory, check)


def setxattr(
    desk: Desk, asked: Asked, address: int, what: tuple[int, int, int, int], flags: int
) -> None:
    """`what`: the addresses of name and value, the value's size, and XATTR_ flags."""
    check = _set_xattr(asked, *what)
    if check:
        _change(desk, asked, AT_FDCWD, address, flags, check)


def fsetxattr(desk: Desk, asked: Asked, fd: int, what: tuple[int, int, int, int]) -> None:
    check = _set_xattr(asked, *what)
    if check:
        _change_open(desk, asked, fd, check)


def removexattr(desk: Desk, asked: Asked, address: int, name: int, flags: int) -> None:
    check = _remove_xattr(asked, name)
    if check:
        _change(desk, asked, AT_FDCWD, address, flags, check)


def fremovexattr(desk: Desk, asked: Asked, fd: int, name: int) -> None:
    check = _remove_xattr(asked, name)
    if check:
        _change_open(desk, asked, fd, check)


def _set_xattr(asked: Asked, name: int, value: int, size: int, flags: int) -> Check | None:
    """None for arguments that the kernel refuses."""
    text = kernel.read_text(asked.call.tid, name)
    if not text or size > _XATTR_SIZE_MAX or flags not in (0, os.XATTR_CREATE, os.XATTR_REPLACE):
        return None
    data = kernel.read_bytes(asked.call.tid, value, size)
    if data is None:
        return None
    return lambda fd: os.setxattr(fd, text, data, flags)


def _remove_xattr(asked: Asked, name: int) -> Check | None:
    text = kernel.read_text(asked.call.tid, name)
    return (lambda fd: os.removexattr(fd, text)) if text else None


# --- by name


def _change(
    desk: Desk,
    asked: Asked,
    directory: int,
    address: int,
    flags: int,
    check: Check,
    act: Check | None = None,
) -> None:
    if flags & AT_EMPTY_PATH and desk.is_empty(asked.call, address):
        _change_open(desk, asked, directory, check)
        return
    follow = not flags & NOFOLLOW
    desk.break_path(asked, directory, address, check, follow=follow, act=act or check)


# --- through a descriptor


def _is_plain_fd(asked: Asked, fd: int) -> bool:
    try:
        found = kernel.look(AT_FDCWD, b"%d/fd/%d" % (asked.call.tid, fd))
    except OSError:
        return True  # EBADF
    return not found[0] & kernel.IMMUTABLE


def _change_open(desk: Desk, asked: Asked, fd: int, check: Check) -> None:
    if _is_plain_fd(asked, fd):
        return
    tid = asked.call.tid
    status = desk.load_status(asked)
    for _ in range(_TRIES):
        try:
            path_fd = os.open(f"{tid}/fd/{fd}", os.O_PATH | os.O_CLOEXEC, dir_fd=desk.roots.proc_fd)
            flags, position = _load_description(desk, tid, fd)
        except OSError as error:
            raise Gone from error
        place = Place(path_fd)
        try:
            asked.listener.check(asked.call.id)
            ino = desk.frozen_ino(path_fd)
            if ino is None:
                return
            new_fd = _break_open(desk, asked, place, ino, status, check, flags)
        except Changed:
            continue
        finally:
            place.close()
        with desk.telling():
            try:
                if not flags & os.O_PATH:
                    os.lseek(new_fd, position, os.SEEK_SET)
                cloexec = bool(flags & os.O_CLOEXEC)
                asked.listener.add_fd(asked.call.id, new_fd, at=fd, cloexec=cloexec)
            finally:
                os.close(new_fd)
        return


def _load_description(desk: Desk, tid: int, fd: int) -> tuple[int, int]:
    """How a descriptor of the caller is open: its flags, and where it stands."""
    info_fd = os.open(f"{tid}/fdinfo/{fd}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=desk.roots.proc_fd)
    try:
        lines = os.read(info_fd, 4096).split(b"\n")
    finally:
        os.close(info_fd)
    fields = dict(line.split(b":\t", 1) for line in lines if b":\t" in line)
    return int(fields[b"flags"], 8), int(fields[b"pos"])


def _break_open(
    desk: Desk,
    asked: Asked,
    place: Place,
    ino: int,
    status: rights.Status,
    check: Check,
    flags: int,
) -> int:
    """Break the name that the descriptor shows; a descriptor of the copy, open in the same way.

    A file that has no name any more gets a copy that has none either.
    """
    wanted = flags & _REOPENED
    desk.roots.enter(asked.call.tid)
    asked.listener.check(asked.call.id)
    found_ino = desk.find_name(place, ino, asked.begun)
    if not found_ino:
        desk.roots.go_home()
        with desk.telling():
            return _copy_of_deleted(desk, place.fd, status, check, wanted)
    if found_ino == ino:
        target = Target(place.folder_fd, place.name, ino, status.credentials, place.text)
        found_ino = desk.break_found(asked, target, check, at_once=True)
    return open_regular(desk.shop, place.folder_fd, place.name, found_ino, wanted)


def _copy_of_deleted(
    desk: Desk, path_fd: int, status: rights.Status, check: Check, wanted: int
) -> int:
    shared_fd = reopen(desk.shop, path_fd, os.O_RDONLY | os.O_NOATIME)
    try:
        if not inode.is_immutable(shared_fd):
            raise Changed
        copy_fd = copy_nameless(desk.shop, shared_fd, status.credentials, check)
    finally:
        os.close(shared_fd)
    try:
        return reopen(desk.shop, copy_fd, wanted)
    finally:
        os.close(copy_fd)
