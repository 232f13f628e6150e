"""What the programs of a guest's sockets have in common: its rules, and steps on addresses.

Offsets are those of linux/bpf.h: struct bpf_sock_addr, bpf_sock.
"""

import errno
import sys
from socket import AF_INET, AF_INET6, INADDR_LOOPBACK
from typing import Final

from vrun import bpf
from vrun.bpf import R0, R1, R2, R3, R4, R5, R6, R7, R10, Code, Register
from vstore.record import dataclass

Words = tuple[int, int, int, int]
"""An IPv6 address as four numbers of the host's byte order, read from memory in network order."""

FAMILY: Final = 28  # struct bpf_sock_addr
IP4: Final = 4
IP6: Final = 8
PORT: Final = 24
SOURCE_IP4: Final = 40
SOURCE_IP6: Final = 44
SOCKET: Final = 64
SOCK_IP4: Final = 24  # struct bpf_sock
SOCK_IP6: Final = 28

_NAME: Final = -32  # on the stack: a struct sockaddr_in or sockaddr_in6
_WINDOW: Final = 0xFFFFFE80  # 127.0.0.0 to 127.0.0.127, 127.0.1.0 to 127.0.1.127
_LOOPBACK_NET: Final = 0x7F000000
_STORAGE_CREATE: Final = 1

DUAL: Final = 0
SAYS_V6ONLY: Final = 1
"""The guest has set IPV6_V6ONLY, and the kernel was not told."""
IS_V6ONLY: Final = 2
"""The kernel has set it by itself; such a socket cannot be bound to a mapped address."""

ALLOW: Final = "allow"
DENY: Final = "deny"
REFUSALS: Final = {
    "unavailable": errno.EADDRNOTAVAIL,
    "unreachable": errno.ENETUNREACH,
    "refused": errno.ECONNREFUSED,
    "unsupported": errno.EPROTONOSUPPORT,
    "invalid": errno.EINVAL,
}


def word(octets: bytes) -> int:
    """Bytes of memory as the number that is read from there."""
    return int.from_bytes(octets, sys.byteorder)


MAPPED: Final = word(b"\0\0\xff\xff")  # the third word of ::ffff:a.b.c.d
ONE: Final = word(b"\0\0\0\1")  # the last word of ::1


@dataclass(frozen=True, slots=True)
class Rules:
    """What a guest's sockets may use. IPv4 addresses are numbers, 10.0.0.1 is 0x0a000001."""

    ipv4: tuple[int, ...]
    """Its addresses; the first is what 0.0.0.0 means, and the source where none was chosen."""
    ipv6: tuple[Words, ...]
    loopback: int | None
    """What 127.0.0.1 means; None: the host's own loopback network, unchanged."""
    v6only: bool = False
    """Whether IPV6_V6ONLY is set on a new socket (net.ipv6.bindv6only)."""
    sockets_fd: int = -1
    """Of bpf.make_socket_storage(): an entry for each socket of the guest, DUAL, SAYS_V6ONLY or
    IS_V6ONLY."""

    @property
    def loopback6(self) -> int:
        """The IPv4 address of the guest's block that ::1 means, mapped."""
        return (self.loopback or 0) ^ 1 ^ 0xFE


class Program:
    """A program being written; the guest's rules are constants in it.

    R6 is the context throughout, R7 the IPv4 address that is judged, as a number.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.code = Code()
        self.code.move(R6, R1, wide=True)

    def finish(self) -> Code:
        """Write the endings that were jumped to."""
        code = self.code
        for label, number in REFUSALS.items():
            if code.is_used(label):
                code.place(label)
                code.move(R1, -number, wide=True)
                code.call(bpf.SET_RETVAL)
                code.leave(0)
        for label, result in ((DENY, 0), (ALLOW, 1)):
            if code.is_used(label):
                code.place(label)
                code.leave(result)
        return code

    # --- IPv4 addresses in R7

    def load_ipv4(self, offset: int) -> None:
        """R7 = an IPv4 address of the context."""
        self.code.load(R7, R6, offset)
        self.code.swap(R7)

    def store_ipv4(self, offset: int = IP4) -> None:
        """Put R7 into the context; R7 is lost."""
        self.code.swap(R7)
        self.code.store(R6, offset, R7)

    def store_mapped(self) -> None:
        """Put ::ffff:R7 in the place of the IPv6 address."""
        self.store_ipv4(IP6 + 12)
        for offset, word in ((0, 0), (4, 0), (8, MAPPED)):
            self.code.move(R1, word)
            self.code.store(R6, IP6 + offset, R1)

    def map_loopback(self, mapped: str) -> None:
        """Turn 127.0.0.n and 127.0.1.n into the guest's own and jump to `mapped`; else go on."""
        if self.rules.loopback is None:
            return
        code, other = self.code, self.code.new_label()
        code.move(R1, R7)
        code.bit_and(R1, _WINDOW)
        code.jump_unequal(R1, _LOOPBACK_NET, other)
        code.move(R1, R7)
        code.shift_right(R1, 1)
        code.bit_and(R1, 0x80)
        code.bit_and(R7, 0x7F)
        code.bit_or(R7, R1)
        code.bit_xor(R7, self.rules.loopback ^ 1)  # so that n = 1 becomes just that address
        code.jump(mapped)
        code.place(other)

    def unmap_loopback(self, other: str) -> None:
        """Turn an address of the guest's block into what the guest calls it; else to `other`."""
        if self.rules.loopback is None:
            self.code.jump(other)
            return
        code = self.code
        code.bit_xor(R7, self.rules.loopback ^ 1)
        code.move(R1, R7)
        code.bit_and(R1, 0xFFFFFF00)
        code.jump_unequal(R1, 0, other)
        code.move(R1, R7)
        code.bit_and(R1, 0x80)
        code.shift_left(R1, 1)
        code.bit_and(R7, 0x7F)
        code.bit_or(R7, R1)
        code.bit_or(R7, _LOOPBACK_NET)

    def jump_if_loopback(self, address: Register, yes: str) -> None:
        """Jump if the number in `address` is of the guest's block; R1 is lost."""
        block, mask = self.rules.loopback, 0xFFFFFF00
        if block is None:
            block, mask = _LOOPBACK_NET, 0xFF000000
        self.code.move(R1, address)
        self.code.bit_and(R1, mask)
        self.code.jump_equal(R1, block & mask, yes)

    def jump_if_own(self, address: Register, yes: str) -> None:
        """Jump if the number in `address` is the guest's."""
        self.jump_if_loopback(address, yes)
        for number in self.rules.ipv4:
            self.code.jump_equal(address, number, yes)

    def split_destination(self, inside: str) -> None:
        """Jump to `inside` with a destination on the guest's loopback; go on if it is another."""
        code, named = self.code, self.code.new_label()
        code.jump_unequal(R7, 0, named)
        code.move(R7, INADDR_LOOPBACK)
        code.place(named)
        self.map_loopback(inside)
        self.jump_if_loopback(R7, inside)
        code.move(R1, R7)
        code.shift_right(R1, 24)
        code.jump_equal(R1, _LOOPBACK_NET >> 24, DENY)

    # --- IPv6 addresses in R2 to R5

    def load_words(self, base: Register, offset: int) -> None:
        """R2 to R5 = an IPv6 address at base + offset."""
        for index, register in enumerate((R2, R3, R4, R5)):
            self.code.load(register, base, offset + 4 * index)

    def jump_if_no_words(self, yes: str) -> None:
        """Jump if the address is :: ; R1 is lost."""
        self.code.move(R1, R2)
        for register in (R3, R4, R5):
            self.code.bit_or(R1, register)
        self.code.jump_equal(R1, 0, yes)

    def jump_if_own_words(self, yes: str) -> None:
        """Jump if the address is the guest's."""
        code = self.code
        own = self.rules.ipv6
        if self.rules.loopback is None:
            own = (*own, (0, 0, 0, ONE))
        for words in own:
            other = code.new_label()
            for register, word in zip((R2, R3, R4, R5), words, strict=True):
                code.jump_unequal(register, word, other)
            code.jump(yes)
            code.place(other)

    def split_words(self, *, special: str, mapped: str) -> None:
        """Jump to `mapped` with R7 for ::ffff:R7, to `special` for :: and ::1 (R5 tells)."""
        code, other, low = self.code, self.code.new_label(), self.code.new_label()
        code.move(R1, R2)
        code.bit_or(R1, R3)
        code.jump_unequal(R1, 0, other)
        code.jump_equal(R4, 0, low)
        code.jump_unequal(R4, MAPPED, other)
        code.move(R7, R5)
        code.swap(R7)
        code.jump(mapped)
        code.place(low)
        code.jump_equal(R5, 0, special)
        code.jump_equal(R5, ONE, special)
        code.place(other)

    # --- sockets

    def load_storage(self, socket: Register, *, create: bool = False) -> None:
        """R0 = the guest's entry of the socket, or nothing if it has none."""
        self.code.move(R2, socket, wide=True)
        self.code.map_fd(R1, self.rules.sockets_fd)
        self.code.move(R3, 0, wide=True)
        self.code.move(R4, _STORAGE_CREATE if create else 0, wide=True)
        self.code.call(bpf.SK_STORAGE_GET)

    def load_v6only(self, target: Register) -> None:
        """target = what the socket's entry says; DUAL without one."""
        code, unknown = self.code, self.code.new_label()
        code.move(target, DUAL)
        code.load(R2, R6, SOCKET, 8)
        self.load_storage(R2)
        code.jump_equal(R0, 0, unknown, wide=True)
        code.load(target, R0, 0)
        code.place(unknown)

    def bind_ipv4(self, number: int) -> None:
        """Bind an AF_INET socket to `number` and no port yet; R0 is 0 if that went well."""
        code = self.code
        code.store(R10, _NAME, AF_INET, 2)
        code.store(R10, _NAME + 2, 0, 2)
        code.store(R10, _NAME + 4, word(number.to_bytes(4)))
        code.store(R10, _NAME + 8, 0, 8)
        self._bind(16)

    def bind_ipv6(self, words: Words) -> None:
        """Bind an AF_INET6 socket to `words` and no port yet; R0 is 0 if that went well."""
        code = self.code
        code.store(R10, _NAME, AF_INET6, 2)
        code.store(R10, _NAME + 2, 0, 2)
        code.store(R10, _NAME + 4, 0)
        for index, word in enumerate(words):
            code.store(R10, _NAME + 8 + 4 * index, word)
        code.store(R10, _NAME + 24, 0)
        self._bind(28)

    def _bind(self, length: int) -> None:
        self.code.move(R1, R6, wide=True)
        self.code.move(R2, R10, wide=True)
        self.code.add(R2, _NAME)
        self.code.move(R3, length)
        self.code.call(bpf.BIND)

    def bind_source(self, number: int, *, mapped: bool) -> None:
        """Give the socket the source `number`; `mapped`: it is known to be of AF_INET6."""
        words = (0, 0, MAPPED, word(number.to_bytes(4)))
        if mapped:
            self.bind_ipv6(words)
            return
        code, version6, done = self.code, self.code.new_label(), self.code.new_label()
        code.load(R1, R6, FAMILY)
        code.jump_equal(R1, AF_INET6, version6)
        self.bind_ipv4(number)
        code.jump(done)
        code.place(version6)
        self.bind_ipv6(words)
        code.place(done)
