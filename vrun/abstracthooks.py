"""The programs that keep a guest's sockets from abstract names of others.

Abstract unix names (unix(7)) belong to a network namespace, and a guest on the host's network is in
the host's: whoever listens there could be talked into handing out a descriptor. Where a socket of
the guest's connects or sends to such a name, the program looks the name up as the kernel is about
to, and goes on only if the socket that has it was made in the guest's cgroup. To all others the
answer is that of a name nobody has. Linux 6.7, with the kernel's description of its types.

A name may pass from one socket to another between our look and the kernel's: a guest can only win
by that if a process of the host takes, in that very moment, a name that the guest had.
"""

import errno
import os
from typing import Final

from vrun import bpf
from vrun.bpf import R1, R2, R3, R6, R7, R8, R9, R10, Code, Hook, Register
from vrun.kerneltypes import Places, TypesUnknown
from vstore.record import dataclass

MEMBERS: Final = (
    *("bpf_sock_addr_kern.sk", "bpf_sock_addr_kern.uaddr", "bpf_sock_addr_kern.uaddrlen"),
    *("sock_common.skc_net", "sock_common.skc_node", "sock.sk_cgrp_data.cgroup"),
    *("net.unx.table.buckets", "unix_sock.addr", "unix_address.len", "unix_address.name"),
    *("cgroup.kn", "cgroup.level", "cgroup.ancestors", "kernfs_node.id"),
)
"""What the programs must know of the kernel's structures."""

HOOKS: Final = (
    Hook("vs_unix_connect", bpf.CGROUP_SOCK_ADDR, 49),
    Hook("vs_unix_sendmsg", bpf.CGROUP_SOCK_ADDR, 50),
)

_TYPE: Final = 32  # struct bpf_sock_addr
_FAMILY_BYTES: Final = 2  # struct sockaddr_un
_LONGEST: Final = 110
_LENGTH_BYTES: Final = 8
"""In front of the name in an image; the kernel has the length in front of it too."""
_IMAGE_BYTES: Final = _LENGTH_BYTES + 112
_NUMBER: Final = -8  # on the stack
_OURS: Final = _NUMBER - _IMAGE_BYTES
_OTHERS: Final = _OURS - _IMAGE_BYTES
_NAME: Final = _OURS + _LENGTH_BYTES
_MOST_SOCKETS: Final = 32
"""So many sockets of one bucket are looked at; with more the name counts as a stranger's."""
_MOST_LEVELS: Final = 32
_ROOT_NUMBER: Final = 1
"""The inode of the hierarchy's own root; that of a container is another one."""
_HALF: Final = 256  # UNIX_HASH_MOD + 1: abstract names have the upper half of the buckets


@dataclass(frozen=True, slots=True)
class Ancestor:
    """The cgroup of a guest."""

    number: int
    """Its folder's inode."""
    level: int | None
    """How many groups are above it; None is found out for each socket, which takes longer."""


def find_ancestor(cgroup_fd: int) -> Ancestor:
    """The group whose folder is behind the descriptor; in a container its level is not known."""
    found = os.fstat(cgroup_fd)
    number, level = found.st_ino, 0
    above = ".."
    while found.st_ino != _ROOT_NUMBER and level < _MOST_LEVELS:
        parent = os.stat(above, dir_fd=cgroup_fd)
        if parent.st_dev != found.st_dev:
            return Ancestor(number, None)
        found, level, above = parent, level + 1, f"{above}/.."
    return Ancestor(number, level)


def guard(places: Places, group: Ancestor) -> Code:
    """The program for the cgroup of a guest.

    R6 is the context, then the socket that is looked at; R7 where we are in the bucket, R8 the
    length of the address, R9 counts.
    """
    code = Code()
    code.move(R6, R1, wide=True)
    _load_name(code, places)
    _find_bucket(code, places)
    code.move(R9, 0, wide=True)
    code.place("next")
    code.jump_equal(R7, 0, "refused", wide=True)
    code.add(R9, 1)
    code.move(R1, _MOST_SOCKETS)
    code.jump_above(R9, R1, "refused")
    code.move(R6, R7, wide=True)
    code.add(R6, -places["sock_common.skc_node"])
    _read_number(code, R7, R7, 0)
    _compare(code, places, "next")
    _check_group(code, places, group)
    code.place("refused")
    code.move(R1, -errno.ECONNREFUSED, wide=True)
    code.call(bpf.SET_RETVAL)
    code.leave(0)
    code.place("allow")
    code.leave(1)
    return code


def _read(code: Code, target: int, size: Register | int, base: Register, offset: int) -> None:
    """Read the kernel's memory to the stack; zeros where there is none. Keeps R6 to R9."""
    code.move(R3, base, wide=True)
    if offset:
        code.add(R3, offset)
    code.move(R1, R10, wide=True)
    code.add(R1, target)
    code.move(R2, size, wide=True)
    code.call(bpf.PROBE_READ_KERNEL)


def _read_number(
    code: Code, target: Register, base: Register, offset: int, *, size: int = 8
) -> None:
    """target = a number or an address at base + offset."""
    _read(code, _NUMBER, size, base, offset)
    code.load(target, R10, _NUMBER, size)


def _clear(code: Code) -> None:
    for offset in range(_OTHERS, _NUMBER, 8):
        code.store(R10, offset, 0, 8)


def _load_name(code: Code, places: Places) -> None:
    """R8 = the length of the address, which lies on the stack; paths are let pass.

    The kernel has the address in its own memory, and its R1 is not what the verifier shows of it.
    """
    _read_number(code, R8, R6, places["bpf_sock_addr_kern.uaddrlen"], size=4)
    code.move(R1, _FAMILY_BYTES)
    code.jump_above(R8, R1, "named")
    code.jump("allow")  # the kernel's own refusal
    code.place("named")
    code.move(R1, _LONGEST)
    code.jump_above(R8, R1, "allow")
    _clear(code)
    _read_number(code, R7, R6, places["bpf_sock_addr_kern.uaddr"])
    _read(code, _NAME, R8, R7, 0)
    code.load(R1, R10, _NAME + _FAMILY_BYTES, 1)
    code.jump_unequal(R1, 0, "allow")
    code.store(R10, _NAME - _gap(places), R8, 4)


def _gap(places: Places) -> int:
    """The bytes from the length of a socket's address to its name; the length has four."""
    gap = places["unix_address.name"] - places["unix_address.len"]
    if not 4 <= gap <= _LENGTH_BYTES:
        raise TypesUnknown("this kernel has the members of unix_address in another order")
    return gap


def _find_bucket(code: Code, places: Places) -> None:
    """R7 = the first node of the bucket that the name is in; unix_abstract_hash() of the kernel."""
    code.move(R9, 0)
    for offset in range(_NAME, _NUMBER, 2):
        code.load(R1, R10, offset, 2)
        code.add(R9, R1)
    for _ in range(2):  # csum_fold()
        code.move(R1, R9)
        code.bit_and(R9, 0xFFFF)
        code.shift_right(R1, 16)
        code.add(R9, R1)
    code.bit_xor(R9, 0xFFFF)
    code.move(R1, R9)
    code.shift_right(R1, 8)
    code.bit_xor(R9, R1)
    code.load(R1, R6, _TYPE)
    code.bit_xor(R9, R1)
    code.bit_and(R9, _HALF - 1)
    code.add(R9, _HALF)
    code.shift_left(R9, 3)
    _read_number(code, R7, R6, places["bpf_sock_addr_kern.sk"])
    _read_number(code, R7, R7, places["sock_common.skc_net"])
    _read_number(code, R7, R7, places["net.unx.table.buckets"])
    code.add(R7, R9)
    _read_number(code, R7, R7, 0)


def _compare(code: Code, places: Places, other: str) -> None:
    """Go on if the socket R6 has the name, else to `other`."""
    _read_number(code, R3, R6, places["unix_sock.addr"])
    _read_image(code, places)
    code.move(R3, 0, wide=True)
    for offset in range(0, _IMAGE_BYTES, 8):
        code.load(R1, R10, _OURS + offset, 8)
        code.load(R2, R10, _OTHERS + offset, 8)
        code.bit_xor(R1, R2, wide=True)
        code.bit_or(R3, R1, wide=True)  # one branch: the verifier follows each of them
    code.jump_unequal(R3, 0, other, wide=True)


def _read_image(code: Code, places: Places) -> None:
    """Read length and name of the address R3, as many bytes as ours has; the rest stays 0."""
    gap = _gap(places)
    code.add(R3, places["unix_address.len"])
    code.move(R1, R10, wide=True)
    code.add(R1, _OTHERS + _LENGTH_BYTES - gap)
    code.move(R2, R8, wide=True)
    code.add(R2, gap)
    code.call(bpf.PROBE_READ_KERNEL)


def _check_group(code: Code, places: Places, group: Ancestor) -> None:
    """To `allow` if the socket R6 was made in the group or below it; else go on."""
    _read_number(code, R7, R6, places["sock.sk_cgrp_data.cgroup"])
    code.jump_equal(R7, 0, "refused", wide=True)
    _read_number(code, R8, R7, places["cgroup.level"], size=4)
    code.add(R7, places["cgroup.ancestors"])
    if group.level is not None:
        code.move(R1, group.level)
        code.jump_above(R1, R8, "refused")
        code.add(R7, 8 * group.level)
        _compare_id(code, places, group.number)
        return
    code.move(R9, 0, wide=True)
    code.place("level")
    code.jump_above(R9, R8, "refused")
    code.move(R1, _MOST_LEVELS)
    code.jump_above(R9, R1, "refused")
    _compare_id(code, places, group.number)
    code.add(R7, 8)
    code.add(R9, 1)
    code.jump("level")


def _compare_id(code: Code, places: Places, number: int) -> None:
    """To `allow` if the group that R7 points to a pointer to has the number; else go on."""
    different = code.new_label()
    _read_number(code, R6, R7, 0)
    _read_number(code, R6, R6, places["cgroup.kn"])
    _read_number(code, R6, R6, places["kernfs_node.id"])
    code.load(R1, R10, _NUMBER)
    code.jump_unequal(R1, number & 0xFFFFFFFF, different)
    code.load(R1, R10, _NUMBER + 4)
    code.jump_equal(R1, number >> 32, "allow")
    code.place(different)
