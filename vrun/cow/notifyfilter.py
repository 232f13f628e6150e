"""Which calls of a guest wait for the supervisor: those that would change a frozen file, or a name.

The filter stands beside the default one, is loaded by our own call with a listener, and never sets
no_new_privs. Opens for reading pass, and so do those that make a new file for sure. Calls whose
meaning lies in memory where no filter can read it, and that have an older form, do not exist.

Changing inode flags is refused: on xfs and btrfs a guest's root may change those of an immutable
inode all but the immutable flag itself, and the project id with them.
"""

import errno
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from vrun import libseccomp, syscalls
from vrun.cow.kernel import AT_REMOVEDIR
from vrun.cow.numbers import ARCHITECTURES, TABLES

_LISTENER: Final = syscalls.SECCOMP_FILTER_FLAG_NEW_LISTENER
_KILLABLE: Final = syscalls.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV

_OPENS: Final = {"open": 1, "openat": 2}
"""With the place of their flags."""
_ALWAYS: Final = (
    *("creat", "truncate", "truncate64", "rename", "renameat", "renameat2", "unlink"),
    *("link", "linkat", "chmod", "fchmod", "fchmodat", "fchmodat2"),
    *("chown", "lchown", "fchown", "fchownat", "chown32", "lchown32", "fchown32"),
    *("utime", "utimes", "futimesat", "utimensat", "utimensat_time64"),
    *("setxattr", "lsetxattr", "fsetxattr", "removexattr", "lremovexattr", "fremovexattr"),
)
_GONE: Final = {"openat2": 437, "setxattrat": 463, "removexattrat": 466, "file_setattr": 469}
"""They answer ENOSYS. From 424 on the numbers are the same on every machine."""
_FLAG_CHANGES: Final = (
    *(0x40086602, 0x40046602),  # FS_IOC_SETFLAGS and its 32-bit form, linux/fs.h
    0x401C5820,  # FS_IOC_FSSETXATTR
    *(0x40087602, 0x40047602, 0x40086604, 0x40046604),  # FS_IOC_SETVERSION, and ext4's own
)
_LOW_WORD: Final = 0xFFFFFFFF

_O_TMPFILE: Final = os.O_TMPFILE & ~os.O_DIRECTORY
_NEW_FILE: Final = os.O_CREAT | os.O_EXCL
_EXCEPTIONS: Final = _NEW_FILE | _O_TMPFILE | os.O_PATH

_INSTRUCTION: Final = struct.Struct("=HBBI")  # linux/filter.h
_LOAD_NUMBER: Final = _INSTRUCTION.pack(0x20, 0, 0, 0)
_RETURN_ERRNO: Final = 0x00050000
_RETURN_ALLOW: Final = 0x7FFF0000


def cached_program(folder: Path) -> bytes:
    """The filter for this machine, as struct sock_filter items; kept as a file of `folder`.

    Raises NotPermitted without libseccomp.
    """
    return libseccomp.kept(folder / _cache_name(), compile_program)


def is_cached(folder: Path) -> bool:
    """Whether cached_program() finds it there, and need not load a library to make it."""
    return (folder / _cache_name()).exists()


def load(program: bytes) -> int:
    """Put this process and its children under the filter, for good; the listener's descriptor.

    To be done before capabilities are given up. Raises OSError: EACCES without CAP_SYS_ADMIN.
    """
    try:
        return syscalls.seccomp_load(program, _LISTENER | _KILLABLE)
    except OSError as error:
        if error.errno != errno.EINVAL:  # before Linux 5.19
            raise
        return syscalls.seccomp_load(program, _LISTENER)


def notified_flags() -> Iterator[tuple[int, int]]:
    """The (mask, value) pairs of open(2)'s flags that are notified; they exclude each other.

    Not notified are O_PATH, which opens nothing, O_TMPFILE, and O_CREAT with O_EXCL: these never
    touch a file that is there.
    """
    for new in (0, os.O_CREAT, os.O_EXCL):
        for access in (os.O_WRONLY, os.O_RDWR, os.O_ACCMODE):
            yield os.O_ACCMODE | _EXCEPTIONS, access | new
        yield os.O_ACCMODE | os.O_TRUNC | _EXCEPTIONS, os.O_TRUNC | new


def compile_program() -> bytes:
    """The filter, by libseccomp. Takes some 50 ms: cached_program() is for starts."""
    return _prelude() + _compile()


def _prelude() -> bytes:
    """Lets opens for reading pass before all else, and refuses what libseccomp does not know."""
    refuse = _INSTRUCTION.pack(0x06, 0, 0, _RETURN_ERRNO | errno.ENOSYS)
    code = b""
    for arch in ARCHITECTURES[:1]:
        code += _INSTRUCTION.pack(0x20, 0, 0, 4)  # ld [arch]
        code += _INSTRUCTION.pack(0x15, 0, 5, arch)  # jeq, else over all of this
        code += _LOAD_NUMBER + _INSTRUCTION.pack(0x15, 0, 3, TABLES[arch]["openat"])
        code += _INSTRUCTION.pack(0x20, 0, 0, 32)  # ld [low half of args[2]]
        code += _INSTRUCTION.pack(0x45, 1, 0, os.O_ACCMODE | os.O_TRUNC)  # jset
        code += _INSTRUCTION.pack(0x06, 0, 0, _RETURN_ALLOW)
    code += _LOAD_NUMBER
    for number in _GONE.values():
        code += _INSTRUCTION.pack(0x15, 0, 1, number) + refuse  # jeq, else over the next
    return code


def _compile() -> bytes:
    library, program = libseccomp.begin()
    for call, place in _OPENS.items():
        for mask, value in notified_flags():
            flags = library.Arg(place, library.MASKED_EQ, mask, value)
            program.add_rule(library.NOTIFY, call, flags)
    for call in _ALWAYS:
        program.add_rule(library.NOTIFY, call)
    is_file = library.Arg(2, library.MASKED_EQ, AT_REMOVEDIR, 0)
    program.add_rule(library.NOTIFY, "unlinkat", is_file)
    for request in _FLAG_CHANGES:
        chosen = library.Arg(1, library.MASKED_EQ, _LOW_WORD, request)
        program.add_rule(library.ERRNO(errno.EOPNOTSUPP), "ioctl", chosen)
    return libseccomp.export(program)


def _cache_name() -> str:
    """Changes with the rules, so that a file of another version of this module is never used."""
    rules = repr((list(notified_flags()), _ALWAYS, _FLAG_CHANGES, AT_REMOVEDIR)).encode()
    return f"{os.uname().machine}-cow-{zlib.crc32(rules + _prelude()):08x}"
