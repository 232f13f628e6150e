"""The calls that change a file or a name, and their numbers on each architecture.

From asm/unistd_64.h, asm/unistd_32.h and asm-generic/unistd.h; tests compare them with those that
libseccomp knows.
"""

import os
from typing import Final

AUDIT_ARCH_X86_64: Final = 0xC000003E  # linux/audit.h
AUDIT_ARCH_I386: Final = 0x40000003
AUDIT_ARCH_AARCH64: Final = 0xC00000B7
AUDIT_ARCH_ARM: Final = 0x40000028

_NEW: Final = {"fchmodat2": 452}
"""The same on every machine."""

_X86_64: Final = {
    **{"open": 2, "openat": 257, "creat": 85, "truncate": 76},
    **{"rename": 82, "renameat": 264, "renameat2": 316, "unlink": 87, "unlinkat": 263},
    **{"link": 86, "linkat": 265, "chmod": 90, "fchmod": 91, "fchmodat": 268},
    **{"chown": 92, "lchown": 94, "fchown": 93, "fchownat": 260},
    **{"utime": 132, "utimes": 235, "futimesat": 261, "utimensat": 280},
    **{"setxattr": 188, "lsetxattr": 189, "fsetxattr": 190},
    **{"removexattr": 197, "lremovexattr": 198, "fremovexattr": 199},
}
_I386: Final = {
    **{"open": 5, "openat": 295, "creat": 8, "truncate": 92, "truncate64": 193},
    **{"rename": 38, "renameat": 302, "renameat2": 353, "unlink": 10, "unlinkat": 301},
    **{"link": 9, "linkat": 303, "chmod": 15, "fchmod": 94, "fchmodat": 306},
    **{"chown": 182, "lchown": 16, "fchown": 95, "fchownat": 298},
    **{"chown32": 212, "lchown32": 198, "fchown32": 207},
    **{"utime": 30, "utimes": 271, "futimesat": 299, "utimensat": 320, "utimensat_time64": 412},
    **{"setxattr": 226, "lsetxattr": 227, "fsetxattr": 228},
    **{"removexattr": 235, "lremovexattr": 236, "fremovexattr": 237},
}
_ARM: Final = _I386 | {
    **{"openat": 322, "renameat": 329, "renameat2": 382, "unlinkat": 328, "linkat": 330},
    **{"fchmodat": 333, "fchownat": 325, "utimes": 269, "futimesat": 326, "utimensat": 348},
}
_AARCH64: Final = {
    **{"openat": 56, "truncate": 45, "renameat": 38, "renameat2": 276, "unlinkat": 35},
    **{"linkat": 37, "fchmod": 52, "fchmodat": 53, "fchown": 55, "fchownat": 54, "utimensat": 88},
    **{"setxattr": 5, "lsetxattr": 6, "fsetxattr": 7},
    **{"removexattr": 14, "lremovexattr": 15, "fremovexattr": 16},
}
_NOT_ON_ARM: Final = ("utime",)

TABLES: Final = {
    AUDIT_ARCH_X86_64: _X86_64 | _NEW,
    AUDIT_ARCH_I386: _I386 | _NEW,
    AUDIT_ARCH_AARCH64: _AARCH64 | _NEW,
    AUDIT_ARCH_ARM: {name: n for name, n in _ARM.items() if name not in _NOT_ON_ARM} | _NEW,
}
"""By the architecture that a notification states, the number of each call."""

ARCHITECTURES: Final[tuple[int, ...]] = {
    "x86_64": (AUDIT_ARCH_X86_64, AUDIT_ARCH_I386),
    "aarch64": (AUDIT_ARCH_AARCH64, AUDIT_ARCH_ARM),
}.get(os.uname().machine, ())
"""What runs on this machine, its own one first."""

NARROW: Final = frozenset({AUDIT_ARCH_I386, AUDIT_ARCH_ARM})
"""Architectures with a `long` of four bytes."""
