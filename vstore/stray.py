"""The way back of a guest's file that came into a stage by mistake.

Whoever breaks a link under a running guest exchanges the copy in the stage with what the guest's
name leads to. If that is another file by then it goes back; where he is killed before, whoever
empties the stage gives it back. So a copy's name in the stage says all that this takes:

    swap.<number of the shared inode>.<number of the copy>.<handle of the copy>.<of the folder>

The copy stands at the guest's name meanwhile, wherever in the folder that has been moved to.
"""

import errno
import os
from base64 import urlsafe_b64decode, urlsafe_b64encode
from typing import Final

from vstore import inode, syscalls

_KIND: Final = b"swap"
_TRIES: Final = 16


def name_copy(shared_ino: int, copy_fd: int, folder_handle: bytes) -> bytes:
    """The name in the stage of a copy that is to be exchanged with a name for the inode of that
    number, in the folder of that handle. Raises OSError.
    """
    handles = (syscalls.load_handle(copy_fd), folder_handle)
    numbers = (shared_ino, os.fstat(copy_fd).st_ino)
    return b".".join((_KIND, *(b"%d" % one for one in numbers), *map(urlsafe_b64encode, handles)))


def give_back(pool_fd: int, stage_fd: int, name: bytes) -> None:
    """If a guest's file stands at such a name, exchange it with the copy: what is there afterwards
    can be removed. Other names are left.

    Where the copy has no name any more the guest has removed or replaced what it took for its file;
    that goes too then. Raises OSError where it must stay.
    """
    kind, *fields = name.split(b".")
    if kind != _KIND:
        return
    shared_ino, copy_ino = map(int, fields[:2])
    copy_handle, folder_handle = map(urlsafe_b64decode, fields[2:])
    if _ino(stage_fd, name) in (shared_ino, copy_ino):
        return
    copy_fd = _open_if_there(pool_fd, copy_handle, os.O_PATH)  # keeps its number from being reused
    folder_fd = _open_if_there(pool_fd, folder_handle, inode.OPEN_FOLDER)
    try:
        for _ in range(_TRIES):
            if copy_fd < 0 or not os.fstat(copy_fd).st_nlink:
                return
            found = _find_name(folder_fd, copy_ino)
            syscalls.renameat2(stage_fd, name, folder_fd, found, flags=syscalls.RENAME_EXCHANGE)
            if _ino(stage_fd, name) == copy_ino:
                return
            syscalls.renameat2(stage_fd, name, folder_fd, found, flags=syscalls.RENAME_EXCHANGE)
    finally:
        for fd in (copy_fd, folder_fd):
            if fd >= 0:
                os.close(fd)
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))


def _ino(folder_fd: int, name: bytes) -> int:
    return os.stat(name, dir_fd=folder_fd, follow_symlinks=False).st_ino


def _open_if_there(pool_fd: int, handle: bytes, flags: int) -> int:
    try:
        return syscalls.open_by_handle(pool_fd, handle, flags)
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
        return -1


def _find_name(folder_fd: int, number: int) -> bytes:
    if folder_fd >= 0:
        with os.scandir(folder_fd) as entries:
            for entry in entries:
                if entry.inode() == number:
                    return os.fsencode(entry.name)
    raise OSError(errno.ENOENT, "it is a guest's, and where that is to be is in another folder now")
