"""The programs for what names no address: making a socket, its options, packets in and out."""

from socket import (
    AF_INET6,
    IPPROTO_ICMP,
    IPPROTO_ICMPV6,
    IPPROTO_IPV6,
    IPPROTO_TCP,
    IPPROTO_UDP,
    IPV6_V6ONLY,
    SOCK_DGRAM,
    SOCK_RAW,
    SOCK_STREAM,
)
from typing import Final

from vrun import bpf
from vrun.bpf import R0, R1, R2, R3, R6, R7, R8, Code, Hook
from vrun.sockcode import (
    ALLOW,
    DENY,
    DUAL,
    IS_V6ONLY,
    SAYS_V6ONLY,
    SOCK_IP4,
    SOCK_IP6,
    Program,
    Rules,
    word,
)

_SOCK_FAMILY: Final = 4  # struct bpf_sock
_SOCK_TYPE: Final = 8
_SOCK_PROTOCOL: Final = 12
_SOCK_PORT: Final = 44
_SKB_PROTOCOL: Final = 16  # struct __sk_buff
_SKB_DATA: Final = 76
_SKB_DATA_END: Final = 80
_SKB_SOCKET: Final = 168
_OPT_SOCKET: Final = 0  # struct bpf_sockopt
_OPT_VALUE: Final = 8
_OPT_VALUE_END: Final = 16
_OPT_LEVEL: Final = 24
_OPT_NAME: Final = 28
_OPT_LENGTH: Final = 32
_NOT_FOR_THE_KERNEL: Final = 0xFFFFFFFF

_ETH_IPV4: Final = word(b"\x08\x00")
_ETH_IPV6: Final = word(b"\x86\xdd")
_IPPROTO_MPTCP: Final = 262
_TRANSPORTS: Final = {
    SOCK_STREAM: (IPPROTO_TCP, _IPPROTO_MPTCP),
    SOCK_DGRAM: (IPPROTO_UDP, IPPROTO_ICMP, IPPROTO_ICMPV6),
}
"""UDP-Lite is none: the kernel runs no hook when such a socket is connected."""


def create(rules: Rules) -> Code:
    """Mark a new socket as the guest's, and refuse transports that the other hooks do not see."""
    program = Program(rules)
    code = program.code
    code.load(R1, R6, _SOCK_TYPE)
    code.load(R2, R6, _SOCK_PROTOCOL)
    code.jump_equal(R1, SOCK_RAW, "known")
    for kind, protocols in _TRANSPORTS.items():
        other = code.new_label()
        code.jump_unequal(R1, kind, other)
        for protocol in protocols:
            code.jump_equal(R2, protocol, "known")
        code.place(other)
    code.jump("unsupported")
    code.place("known")
    program.load_storage(R6, create=True)
    code.jump_equal(R0, 0, ALLOW, wide=True)
    code.store(R0, 0, IS_V6ONLY if rules.v6only else DUAL)
    code.jump(ALLOW)
    return program.finish()


def setsockopt(rules: Rules) -> Code:
    """Keep that IPV6_V6ONLY was set from the kernel, and in mind.

    No other hook can ask for it, and a socket that has it cannot be bound to a mapped address.
    """
    program = Program(rules)
    code = program.code
    _load_v6only_option(program)
    code.load(R1, R8, _SOCK_FAMILY)
    code.jump_unequal(R1, AF_INET6, "pass")
    code.load(R1, R8, _SOCK_PORT)
    code.jump_unequal(R1, 0, "pass")  # bound: an error that the kernel knows
    code.load(R7, R2, 0)
    program.load_storage(R8, create=True)
    code.jump_equal(R0, 0, "pass", wide=True)
    code.jump_equal(R7, 0, "dual")
    code.load(R1, R0, 0)
    code.jump_equal(R1, IS_V6ONLY, "pass")
    code.store(R0, 0, SAYS_V6ONLY)
    code.move(R1, _NOT_FOR_THE_KERNEL)
    code.store(R6, _OPT_LENGTH, R1)
    code.jump(ALLOW)
    code.place("dual")
    code.store(R0, 0, DUAL)
    _pass_option(program)
    return program.finish()


def getsockopt(rules: Rules) -> Code:
    """Answer for IPV6_V6ONLY what was set."""
    program = Program(rules)
    code = program.code
    _load_v6only_option(program)
    code.move(R7, R2, wide=True)
    program.load_storage(R8)
    code.jump_equal(R0, 0, "pass", wide=True)
    code.load(R1, R0, 0)
    code.jump_unequal(R1, SAYS_V6ONLY, "pass")
    code.store(R7, 0, 1)
    code.jump(ALLOW)
    _pass_option(program)
    return program.finish()


def _load_v6only_option(program: Program) -> None:
    """R2 = where the value of IPV6_V6ONLY is, R8 = the socket; `pass` for any other option."""
    code = program.code
    code.load(R1, R6, _OPT_LEVEL)
    code.jump_unequal(R1, IPPROTO_IPV6, "pass")
    code.load(R1, R6, _OPT_NAME)
    code.jump_unequal(R1, IPV6_V6ONLY, "pass")
    code.load(R2, R6, _OPT_VALUE, 8)
    code.load(R3, R6, _OPT_VALUE_END, 8)
    code.move(R1, R2, wide=True)
    code.add(R1, 4)
    code.jump_above(R1, R3, "pass")
    code.load(R8, R6, _OPT_SOCKET, 8)


def _pass_option(program: Program) -> None:
    """Let the caller's own bytes stand."""
    code = program.code
    code.place("pass")
    code.move(R1, 0)
    code.store(R6, _OPT_LENGTH, R1)
    code.jump(ALLOW)


def egress(rules: Rules) -> Code:
    """Refuse what leaves from a socket that got at another's address past the other hooks.

    Looks at the socket, not at the packet: that may have been through the host's NAT already.
    """
    program = Program(rules)
    code = program.code
    code.load(R7, R6, _SKB_SOCKET, 8)
    code.jump_equal(R7, 0, ALLOW, wide=True)
    code.load(R1, R6, _SKB_PROTOCOL)
    code.jump_equal(R1, _ETH_IPV4, "ipv4")
    program.load_words(R7, SOCK_IP6)
    program.jump_if_no_words(ALLOW)
    program.jump_if_own_words(ALLOW)
    code.jump(DENY)
    code.place("ipv4")
    code.load(R8, R7, SOCK_IP4)
    code.jump_equal(R8, 0, ALLOW)
    code.swap(R8)
    program.jump_if_own(R8, ALLOW)
    code.jump(DENY)
    return program.finish()


def ingress(rules: Rules) -> Code:
    """Keep from the guest what is for another's address: listen(2) binds to 0.0.0.0 unseen.

    Answers to a ping are let in: its socket has no hook that could have given it a source.
    """
    program = Program(rules)
    code = program.code
    code.load(R7, R6, _SKB_DATA)
    code.load(R8, R6, _SKB_DATA_END)
    code.load(R1, R6, _SKB_PROTOCOL)
    code.jump_equal(R1, _ETH_IPV4, "ipv4")
    code.jump_unequal(R1, _ETH_IPV6, DENY)
    _check_header(program, length=40, protocol=6, echo=IPPROTO_ICMPV6)
    program.load_words(R7, 24)
    program.jump_if_own_words(ALLOW)
    code.jump(DENY)
    code.place("ipv4")
    _check_header(program, length=20, protocol=9, echo=IPPROTO_ICMP)
    code.load(R8, R7, 16)
    code.swap(R8)
    program.jump_if_own(R8, ALLOW)
    code.jump(DENY)
    return program.finish()


def _check_header(program: Program, *, length: int, protocol: int, echo: int) -> None:
    """The header from R7 to R8 is whole, and of another protocol than `echo`."""
    code = program.code
    code.move(R1, R7, wide=True)
    code.add(R1, length)
    code.jump_above(R1, R8, DENY)
    code.load(R1, R7, protocol, 1)
    code.jump_equal(R1, echo, ALLOW)


HOOKS: Final = (
    (Hook("vs_create", bpf.CGROUP_SOCK, 2), create),
    (Hook("vs_getsockopt", bpf.CGROUP_SOCKOPT, 21), getsockopt),
    (Hook("vs_setsockopt", bpf.CGROUP_SOCKOPT, 22), setsockopt),
    (Hook("vs_ingress", bpf.CGROUP_SKB, 0), ingress),
    (Hook("vs_egress", bpf.CGROUP_SKB, 1), egress),
)
"""Each with the function that writes its program."""
