"""The quick look at a call: whether anything that it concerns is frozen.

Almost all calls concern files that are not. They are let go on after as few system calls as can be,
with nothing made that would have to be taken down again. Whoever is not let go on here is looked at
once more, slowly: to say no for nothing costs time alone. To let go on what is frozen does no harm
either, since the kernel refuses to change it; the caller would notice, though.

Nothing is kept from one call to the next: callers change their root, their folder and their
descriptors at any moment.
"""

import errno
import os
import stat
from collections.abc import Callable
from typing import Final

from vrun.cow import kernel
from vrun.cow.kernel import AT_SYMLINK_FOLLOW, IMMUTABLE, glance, read_text, seen
from vrun.cow.kernel import AT_SYMLINK_NOFOLLOW as NOFOLLOW
from vrun.cow.notifications import Call
from vrun.cow.numbers import ARCHITECTURES, TABLES
from vrun.cow.paths import OWN_NAMES, Roots

IsPlain = Callable[[Roots, Call], bool]
"""Whether the call may go on. Raises OSError where the caller is gone."""

_SLASH: Final = ord("/")
_LOW: Final = 0xFFFFFFFF
_CWD: Final = kernel.AT_FDCWD & _LOW
_KIND: Final = 0o170000
_LINK: Final = stat.S_IFLNK
_FILE: Final = stat.S_IFREG
_NOT_OURS: Final = frozenset({errno.ENOENT, errno.EACCES, errno.EPERM})
"""What our look says, and the caller's own need not."""
_A0, _A1, _A2, _A3, _A4 = range(Call._fields.index("a0"), Call._fields.index("a5"))


# --- through a descriptor


def _is_plain_fd(_: Roots, call: Call) -> bool:
    error = glance(b"%d/fd/%d" % (call[1], call[_A0] & _LOW), 0)
    return bool(error) or not seen()[0] & IMMUTABLE


# --- by name


def _path_of(tid: int, directory: int, text: bytes) -> bytes:
    """Where that path of the caller is to be looked at, once we have his root."""
    if text[0] == _SLASH:
        return text
    directory &= _LOW
    if directory == _CWD:
        return b"%d/cwd/%s" % (tid, text)
    return b"%d/fd/%d/%s" % (tid, directory, text)


def _leads_to_plain(tid: int, directory: int, text: bytes, *, follow: bool) -> bool:
    """Whether a path leads to nothing that is frozen, or to nothing at all; within the caller's
    root.
    """
    path = _path_of(tid, directory, text)
    error = glance(path, NOFOLLOW)
    if error:
        return error not in _NOT_OURS or (
            error == errno.ENOENT and _is_surely_absent(tid, directory, text)
        )
    attributes, mode = seen()
    if follow and mode & _KIND == _LINK:
        error = glance(path, 0)
        if error:
            return error not in _NOT_OURS
        attributes, mode = seen()
    return not (attributes & IMMUTABLE and mode & _KIND == _FILE)


def _is_surely_absent(tid: int, directory: int, text: bytes) -> bool:
    """Whether a name that was not found is none for its caller either: its folder is there.

    Names in /proc are nothing to us that are something to the caller.
    """
    if b"/proc" in text:
        return False
    folder, _, name = text.rstrip(b"/").rpartition(b"/")
    if name in OWN_NAMES:
        return False
    return not folder or not glance(_path_of(tid, directory, folder), 0)


def _by_path(
    address: int, *, directory: int = 0, follows: tuple[int, int, int] = (0, 0, 0)
) -> IsPlain:
    """For a path at that place among a call's fields; one that counts from the working directory
    has no place of a `directory`. A symlink at its end is followed where the field, masked, has
    that value.
    """
    flags, mask, value = follows

    def is_plain(roots: Roots, call: Call) -> bool:
        tid = call[1]
        text = read_text(tid, call[address])
        if not text:
            return False
        roots.enter(tid)
        return _leads_to_plain(
            *(tid, call[directory] if directory else _CWD, text),
            follow=call[flags] & mask == value,
        )

    return is_plain


def _by_two(old: int, new: int, *, has_folders: bool) -> IsPlain:
    """For two paths, each behind the descriptor that it counts from where there is one."""

    def is_plain(roots: Roots, call: Call) -> bool:
        tid = call[1]
        old_text, new_text = read_text(tid, call[old]), read_text(tid, call[new])
        if not old_text or not new_text:
            return False
        roots.enter(tid)
        folders = (call[old - 1], call[new - 1]) if has_folders else (_CWD, _CWD)
        return _leads_to_plain(tid, folders[0], old_text, follow=False) and _leads_to_plain(
            tid, folders[1], new_text, follow=False
        )

    return is_plain


def _times(by_path: IsPlain) -> IsPlain:
    """utimensat(2) without a path is meant for the descriptor itself."""

    def is_plain(roots: Roots, call: Call) -> bool:
        return by_path(roots, call) if call[_A1] else _is_plain_fd(roots, call)

    return is_plain


_NEVER: Final = (0, 0, 1)
_O_NOFOLLOW: Final = os.O_NOFOLLOW
_ONE: Final = _by_path(_A0)
_ONE_NOFOLLOW: Final = _by_path(_A0, follows=_NEVER)
_AT: Final = _by_path(_A1, directory=_A0)
_UTIMENSAT: Final = _times(_by_path(_A1, directory=_A0, follows=(_A3, NOFOLLOW, 0)))

_LOOKS: Final[dict[str, IsPlain]] = {
    "open": _by_path(_A0, follows=(_A1, _O_NOFOLLOW, 0)),
    "openat": _by_path(_A1, directory=_A0, follows=(_A2, _O_NOFOLLOW, 0)),
    **dict.fromkeys(("creat", "truncate", "truncate64", "chmod", "chown", "chown32"), _ONE),
    **dict.fromkeys(("utime", "utimes", "setxattr", "removexattr"), _ONE),
    **dict.fromkeys(("unlink", "link", "lchown", "lchown32"), _ONE_NOFOLLOW),
    **dict.fromkeys(("lsetxattr", "lremovexattr"), _ONE_NOFOLLOW),
    "unlinkat": _by_path(_A1, directory=_A0, follows=_NEVER),
    "linkat": _by_path(_A1, directory=_A0, follows=(_A4, AT_SYMLINK_FOLLOW, AT_SYMLINK_FOLLOW)),
    "fchmodat": _AT,
    "fchmodat2": _by_path(_A1, directory=_A0, follows=(_A3, NOFOLLOW, 0)),
    "fchownat": _by_path(_A1, directory=_A0, follows=(_A4, NOFOLLOW, 0)),
    "futimesat": _times(_AT),
    **dict.fromkeys(("utimensat", "utimensat_time64"), _UTIMENSAT),
    **dict.fromkeys(("fchmod", "fchown", "fchown32", "fsetxattr", "fremovexattr"), _is_plain_fd),
    "rename": _by_two(_A0, _A1, has_folders=False),
    **dict.fromkeys(("renameat", "renameat2"), _by_two(_A1, _A3, has_folders=True)),
}

LOOKS: Final = {
    (arch, number): _LOOKS[name] for arch in ARCHITECTURES for name, number in TABLES[arch].items()
}
"""By architecture and number of the call."""
