"""From a call's number to what serves it, with its arguments in one order for all architectures."""

from collections.abc import Callable
from typing import Final

from vrun.cow import changing, naming, opening
from vrun.cow.desk import Asked, Desk
from vrun.cow.kernel import AT_FDCWD
from vrun.cow.kernel import AT_SYMLINK_NOFOLLOW as NOFOLLOW
from vrun.cow.numbers import ARCHITECTURES, AUDIT_ARCH_ARM, TABLES

Serve = Callable[[Desk, Asked], None]


def _int(value: int) -> int:
    """The low half of an argument, as a signed number: descriptors, AT_FDCWD."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value & 0x80000000 else value


def _low(value: int) -> int:
    return value & 0xFFFFFFFF


def _long(low: int, high: int) -> int:
    """A signed number of 64 bits, of two halves."""
    value = _low(high) << 32 | _low(low)
    return value - (1 << 64) if value & 1 << 63 else value


def _utimensat_time64(desk: Desk, asked: Asked) -> None:
    asked.is_time64 = True
    c = asked.call
    changing.utimensat(desk, asked, _int(c.a0), c.a1, c.a2, _low(c.a3))


def _xattr(asked: Asked) -> tuple[int, int, int, int]:
    c = asked.call
    return c.a1, c.a2, c.a3, _low(c.a4)


def _old_rename(desk: Desk, asked: Asked) -> None:
    c = asked.call
    naming.renameat(desk, asked, AT_FDCWD, c.a0, AT_FDCWD, c.a1)


def _renameat(desk: Desk, asked: Asked) -> None:
    c = asked.call
    naming.renameat(desk, asked, _int(c.a0), c.a1, _int(c.a2), c.a3)


def _renameat2(desk: Desk, asked: Asked) -> None:
    c = asked.call
    naming.renameat(desk, asked, _int(c.a0), c.a1, _int(c.a2), c.a3, _low(c.a4))


def _linkat(desk: Desk, asked: Asked) -> None:
    c = asked.call
    naming.linkat(desk, asked, _int(c.a0), c.a1, _int(c.a2), c.a3, _low(c.a4))


def _truncate64(desk: Desk, asked: Asked) -> None:
    """Its length comes in two halves: on ARM in registers of which the first is an even one."""
    c = asked.call
    length = _long(c.a2, c.a3) if c.arch == AUDIT_ARCH_ARM else _long(c.a1, c.a2)
    opening.truncate(desk, asked, c.a0, length)


SERVED: Final[dict[str, Serve]] = {
    "open": lambda d, a: opening.openat(d, a, AT_FDCWD, a.call.a0, _low(a.call.a1)),
    "openat": lambda d, a: opening.openat(d, a, _int(a.call.a0), a.call.a1, _low(a.call.a2)),
    "creat": lambda d, a: opening.creat(d, a, a.call.a0),
    "truncate": lambda d, a: opening.truncate(d, a, a.call.a0, _long(a.call.a1, a.call.a1 >> 32)),
    "truncate64": _truncate64,
    "unlink": lambda d, a: naming.unlinkat(d, a, AT_FDCWD, a.call.a0, 0),
    "unlinkat": lambda d, a: naming.unlinkat(d, a, _int(a.call.a0), a.call.a1, _low(a.call.a2)),
    "rename": _old_rename,
    "renameat": _renameat,
    "renameat2": _renameat2,
    "link": lambda d, a: naming.link(d, a, a.call.a0, a.call.a1),
    "linkat": _linkat,
    "chmod": lambda d, a: changing.fchmodat(d, a, AT_FDCWD, a.call.a0, a.call.a1, 0),
    "fchmod": lambda d, a: changing.fchmod(d, a, _int(a.call.a0), a.call.a1),
    "fchmodat": lambda d, a: changing.fchmodat(d, a, _int(a.call.a0), a.call.a1, a.call.a2, 0),
    "fchmodat2": lambda d, a: changing.fchmodat(
        d, a, _int(a.call.a0), a.call.a1, a.call.a2, _low(a.call.a3)
    ),
    "chown": lambda d, a: changing.fchownat(
        d, a, AT_FDCWD, a.call.a0, _low(a.call.a1), _low(a.call.a2), 0
    ),
    "lchown": lambda d, a: changing.fchownat(
        d, a, AT_FDCWD, a.call.a0, _low(a.call.a1), _low(a.call.a2), NOFOLLOW
    ),
    "fchown": lambda d, a: changing.fchown(d, a, _int(a.call.a0), _low(a.call.a1), _low(a.call.a2)),
    "fchownat": lambda d, a: changing.fchownat(
        *(d, a, _int(a.call.a0), a.call.a1),
        *(_low(a.call.a2), _low(a.call.a3), _low(a.call.a4)),
    ),
    "utime": lambda d, a: changing.utime(d, a, a.call.a0, a.call.a1),
    "utimes": lambda d, a: changing.futimesat(d, a, AT_FDCWD, a.call.a0, a.call.a1),
    "futimesat": lambda d, a: changing.futimesat(d, a, _int(a.call.a0), a.call.a1, a.call.a2),
    "utimensat": lambda d, a: changing.utimensat(
        d, a, _int(a.call.a0), a.call.a1, a.call.a2, _low(a.call.a3)
    ),
    "utimensat_time64": _utimensat_time64,
    "setxattr": lambda d, a: changing.setxattr(d, a, a.call.a0, _xattr(a), 0),
    "lsetxattr": lambda d, a: changing.setxattr(d, a, a.call.a0, _xattr(a), NOFOLLOW),
    "fsetxattr": lambda d, a: changing.fsetxattr(d, a, _int(a.call.a0), _xattr(a)),
    "removexattr": lambda d, a: changing.removexattr(d, a, a.call.a0, a.call.a1, 0),
    "lremovexattr": lambda d, a: changing.removexattr(d, a, a.call.a0, a.call.a1, NOFOLLOW),
    "fremovexattr": lambda d, a: changing.fremovexattr(d, a, _int(a.call.a0), a.call.a1),
}

_OLD: Final[dict[str, Serve]] = {
    "truncate": lambda d, a: opening.truncate(d, a, a.call.a0, _int(a.call.a1)),
    "chown": lambda d, a: changing.fchownat16(d, a, a.call.a0, a.call.a1, a.call.a2, 0),
    "lchown": lambda d, a: changing.fchownat16(d, a, a.call.a0, a.call.a1, a.call.a2, NOFOLLOW),
    "fchown": lambda d, a: changing.fchown16(d, a, _int(a.call.a0), a.call.a1, a.call.a2),
    "chown32": SERVED["chown"],
    "lchown32": SERVED["lchown"],
    "fchown32": SERVED["fchown"],
}
"""Where `long` has four bytes: ids of 16 bits in calls whose names are without the 32."""


def _serves(table: dict[str, int]) -> dict[int, Serve]:
    names = SERVED | _OLD if "chown32" in table else SERVED
    return {number: names[name] for name, number in table.items()}


BY_NUMBER: Final = {arch: _serves(TABLES[arch]) for arch in ARCHITECTURES}
