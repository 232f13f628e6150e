"""The ceiling of capabilities that a guest may ever have, and giving up all above it.

See capabilities(7). The ceiling is the bounding set: whatever a guest executes, setuid or with file
capabilities, gets no more. User id 0 keeps its meaning, and no_new_privs is never set, so that su,
sudo and ping work inside.
"""

import errno
import os
from collections.abc import Iterable, Mapping
from typing import Final

from vrun import syscalls
from vrun.wordlist import CAPABILITIES
from vstore.record import dataclass

NUMBERS: Final[Mapping[str, int]] = {
    name.upper(): number for name, number in CAPABILITIES.bits.items()
}
"""By name without CAP_, as linux/capability.h numbers them."""

_HIGHEST: Final = 63


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a process becomes; the guest's own /etc/passwd says which numbers."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


def mask(names: Iterable[str]) -> int:
    """The bits of the capabilities; KeyError for a name that is none."""
    bits = 0
    for name in names:
        bits |= 1 << NUMBERS[name]
    return bits


def missing(names: Iterable[str]) -> frozenset[str]:
    """Those of `names` that this process cannot hand on, because it lacks them itself."""
    _, permitted, _ = syscalls.capget()
    return frozenset(
        name for name in names if not permitted >> NUMBERS[name] & 1 or not _is_bounded(name)
    )


def limit(kept: Iterable[str], *, become: Identity | None = None) -> None:
    """Give up every capability but `kept`, for good and for all that this process will execute.

    Bounding, permitted, effective, inheritable and ambient sets and the securebits: what is newer
    than our list goes too, and nothing is inheritable. `become` takes the user in between: the
    right to do so may be among those that go. Namespaces must be entered and filters loaded before.
    Those of `kept` that this process lacks it does not get: ask missing(). Raises OSError: EPERM
    without CAP_SETPCAP.
    """
    wanted = mask(kept)
    syscalls.clear_ambient()
    syscalls.set_securebits(0)
    _drop_bounding(~wanted)
    if become is not None:
        _become(become)
    _, permitted, _ = syscalls.capget()
    left = permitted & wanted
    syscalls.capset(effective=left, permitted=left, inheritable=0)


def _become(identity: Identity) -> None:
    os.setgroups(identity.groups)
    os.setresgid(identity.gid, identity.gid, identity.gid)
    os.setresuid(identity.uid, identity.uid, identity.uid)


def _drop_bounding(unwanted: int) -> None:
    for number in range(_HIGHEST + 1):
        try:
            if syscalls.bounding_read(number) and unwanted >> number & 1:
                syscalls.bounding_drop(number)
        except OSError as error:
            if error.errno == errno.EINVAL:  # past the last one that this kernel knows
                return
            raise


def _is_bounded(name: str) -> bool:
    try:
        return syscalls.bounding_read(NUMBERS[name])
    except OSError:
        return False
