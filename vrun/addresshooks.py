"""The programs that run where a socket names an address; chbind.py says what they make of it."""

from socket import INADDR_LOOPBACK
from typing import Final

from vrun import bpf
from vrun.bpf import R0, R1, R2, R3, R4, R5, R6, R7, R8, Code, Hook
from vrun.ownservice import find_service
from vrun.sockcode import (
    ALLOW,
    DENY,
    DUAL,
    IP4,
    IP6,
    IS_V6ONLY,
    MAPPED,
    ONE,
    PORT,
    SAYS_V6ONLY,
    SOCK_IP4,
    SOCK_IP6,
    SOCKET,
    SOURCE_IP4,
    SOURCE_IP6,
    Program,
    Rules,
    Words,
)


def _bind_number(program: Program, store: str) -> None:
    """Judge the address R7 that a socket is to be bound to; `store` if it was changed."""
    code, rules, named = program.code, program.rules, program.code.new_label()
    code.jump_unequal(R7, 0, named)
    if rules.ipv4 or rules.loopback is not None:
        code.move(R7, rules.ipv4[0] if rules.ipv4 else rules.loopback or 0)
        code.jump(store)
    else:
        code.jump("unavailable")
    code.place(named)
    program.map_loopback(store)
    program.jump_if_own(R7, ALLOW)
    code.jump(DENY)


def bind4(rules: Rules) -> Code:
    """bind(2) of an AF_INET socket."""
    program = Program(rules)
    program.load_ipv4(IP4)
    _bind_number(program, "store")
    if program.code.is_used("store"):
        program.code.place("store")
        program.store_ipv4()
        program.code.jump(ALLOW)
    return program.finish()


def bind6(rules: Rules) -> Code:
    """bind(2) of an AF_INET6 socket."""
    program = Program(rules)
    code = program.code
    program.load_words(R6, IP6)
    program.split_words(special="special", mapped="mapped")
    program.jump_if_own_words(ALLOW)
    code.jump(DENY)
    code.place("special")
    _bind_special(program)
    code.place("mapped")
    program.load_v6only(R8)
    code.jump_equal(R8, SAYS_V6ONLY, "invalid")
    _bind_number(program, "store")
    if code.is_used("store"):
        code.place("store")
        program.store_mapped()
        code.jump(ALLOW)
    return program.finish()


def _bind_special(program: Program) -> None:
    """A socket is to be bound to :: (R5 is 0) or ::1."""
    code, rules = program.code, program.rules
    code.move(R7, R5)
    if rules.loopback is None:
        code.jump_unequal(R7, 0, ALLOW)
    program.load_v6only(R8)
    if rules.loopback is not None:
        code.jump_unequal(R7, 0, "loopback")
    if rules.ipv4:
        code.jump_unequal(R8, DUAL, "v6only")
        code.move(R7, rules.ipv4[0])
        code.jump("store")
    code.place("v6only")
    if rules.ipv6:
        _store_words(program, rules.ipv6[0], IP6)
        code.jump(ALLOW)
    elif rules.loopback is None:
        code.jump("unavailable")
    if rules.loopback is not None:
        code.place("loopback")
        code.jump_equal(R8, IS_V6ONLY, "unavailable")
        code.move(R7, rules.loopback6)
        code.jump("store")


def _store_words(program: Program, words: Words, offset: int) -> None:
    """Put an IPv6 address into the context."""
    for index, word in enumerate(words):
        program.code.move(R1, word)
        program.code.store(R6, offset + 4 * index, R1)


def connect4(rules: Rules) -> Code:
    """connect(2) to an IPv4 address, of an AF_INET6 socket too if it says so."""
    program = Program(rules)
    program.load_ipv4(IP4)
    _connect_number(program, mapped=False)
    program.code.place("store")
    program.store_ipv4()
    program.code.jump(ALLOW)
    return program.finish()


def _connect_number(program: Program, *, mapped: bool) -> None:
    """Judge the IPv4 destination R7, give the socket a source, and jump to the label `store`."""
    code, rules = program.code, program.rules
    program.split_destination("inside")
    if rules.ipv4:
        _give_source(program, rules.ipv4[0], mapped=mapped)
    else:
        code.jump("unreachable")
    code.place("inside")
    if rules.loopback is None:
        code.jump("store")
        return
    find_service(program)
    if mapped:
        other = code.new_label()
        code.jump_unequal(R7, rules.loopback6, other)
        _give_source(program, rules.loopback6, mapped=True)
        code.place(other)
    _give_source(program, rules.loopback, mapped=mapped)


def _give_source(program: Program, number: int, *, mapped: bool) -> None:
    """Bind the socket to `number` unless it is bound, and jump to `store`.

    A source of 127.0.0.0/8 may be that of an earlier connect (127.0.0.6 in the place of an IPv6
    one); where the guest chose it the socket has a port, and stays as it is.
    """
    code, unbound = program.code, program.code.new_label()
    _load_source(program)
    code.jump_equal(R8, 0, unbound)
    code.move(R1, R8)
    code.shift_right(R1, 24)
    code.jump_unequal(R1, 127, "store")
    code.place(unbound)
    program.bind_source(number, mapped=mapped)
    code.jump_equal(R0, 0, "store")
    code.jump_equal(R8, 0, DENY)
    code.jump("store")


def _load_source(program: Program) -> None:
    """R8 = the IPv4 address that the socket is bound to, 0 for none."""
    program.code.load(R1, R6, SOCKET, 8)
    program.code.load(R8, R1, SOCK_IP4)
    program.code.swap(R8)


def connect6(rules: Rules) -> Code:
    """connect(2) of an AF_INET6 socket."""
    program = Program(rules)
    code = program.code
    program.load_words(R6, IP6)
    program.split_words(special="special", mapped="number")
    _connect_words(program)
    code.place("special")
    if rules.loopback is None:
        code.jump(ALLOW)
    else:
        code.move(R7, rules.loopback6)
    code.place("number")
    _connect_number(program, mapped=True)
    code.place("store")
    program.store_mapped()
    code.jump(ALLOW)
    return program.finish()


def _connect_words(program: Program) -> None:
    """Give the socket an IPv6 source; a mapped one is that of an earlier connect."""
    code, rules = program.code, program.rules
    if not rules.ipv6:
        code.jump("unreachable")
        return
    code.load(R1, R6, SOCKET, 8)
    code.move(R7, R1, wide=True)
    program.load_words(R7, SOCK_IP6)
    code.move(R8, R2)
    for register in (R3, R4, R5):
        code.bit_or(R8, register)
    code.jump_equal(R8, 0, "unbound")
    code.jump_unequal(R4, MAPPED, ALLOW)
    code.place("unbound")
    program.bind_ipv6(rules.ipv6[0])
    code.jump_equal(R0, 0, ALLOW)
    code.jump_equal(R8, 0, DENY)
    code.jump(ALLOW)


def sendmsg4(rules: Rules) -> Code:
    """A datagram to an IPv4 address.

    Also one with control messages on a connected socket, which has no destination here.
    """
    program = Program(rules)
    code = program.code
    program.load_ipv4(IP4)
    code.load(R8, R6, SOURCE_IP4)
    code.swap(R8)
    code.load(R1, R6, PORT)
    code.bit_or(R1, R7)
    code.jump_equal(R1, 0, "connected")
    program.split_destination("inside")
    code.jump_unequal(R8, 0, "check")
    if rules.ipv4:
        code.move(R8, rules.ipv4[0])
        code.jump("source")
    else:
        code.jump("unreachable")
    code.place("inside")
    find_service(program)
    code.load(R8, R6, SOURCE_IP4)
    code.swap(R8)
    code.jump_unequal(R8, 0, "check")
    if rules.loopback is None:
        code.jump("store")
    else:
        code.move(R8, rules.loopback)
        code.jump("source")
    _finish_sendmsg4(program)
    return program.finish()


def _finish_sendmsg4(program: Program) -> None:
    code = program.code
    code.place("connected")
    code.jump_equal(R8, 0, ALLOW)
    code.place("check")
    program.jump_if_own(R8, "store")
    code.jump(DENY)
    if code.is_used("source"):
        code.place("source")
        code.swap(R8)
        code.store(R6, SOURCE_IP4, R8)
    code.place("store")
    program.store_ipv4()
    code.jump(ALLOW)


def sendmsg6(rules: Rules) -> Code:
    """A datagram to an IPv6 address.

    One to ::ffff:a.b.c.d comes to sendmsg4, and ::1 cannot be turned into that here.
    """
    program = Program(rules)
    code = program.code
    program.load_words(R6, IP6)
    code.load(R8, R6, PORT)
    for register in (R2, R3, R4):
        code.bit_or(R8, register)
    code.move(R7, R8)
    code.bit_or(R7, R5)  # 0: without a destination, as in sendmsg4
    code.jump_equal(R7, 0, "source")
    code.move(R1, R2)
    code.bit_or(R1, R3)
    code.bit_or(R1, R4)
    code.jump_unequal(R1, 0, "source")
    if rules.loopback is not None:
        code.jump_equal(R5, 0, "unreachable")
        code.jump_equal(R5, ONE, "unreachable")
    code.place("source")
    program.load_words(R6, SOURCE_IP6)
    program.jump_if_no_words("none")
    program.jump_if_own_words(ALLOW)
    code.jump_equal(R4, MAPPED, "unreachable")
    code.jump(DENY)
    code.place("none")
    code.jump_equal(R7, 0, ALLOW)
    if rules.ipv6:
        _store_words(program, rules.ipv6[0], SOURCE_IP6)
        code.jump(ALLOW)
    else:
        code.jump("unreachable")
    return program.finish()


def name4(rules: Rules) -> Code:
    """For getsockname4: an address of the guest's loopback as the guest says it."""
    program = Program(rules)
    program.load_ipv4(IP4)
    program.unmap_loopback(ALLOW)
    program.store_ipv4()
    program.code.jump(ALLOW)
    return program.finish()


def name6(rules: Rules) -> Code:
    """The same for an AF_INET6 socket."""
    program = Program(rules)
    _load_mapped(program)
    program.unmap_loopback(ALLOW)
    _finish_name6(program)
    return program.finish()


def peer4(rules: Rules) -> Code:
    """For getpeername4, accept and recvmsg4: also turns back what find_service() chose."""
    program = Program(rules)
    program.load_ipv4(IP4)
    _name_peer(program)
    program.code.place("store")
    program.store_ipv4()
    program.code.jump(ALLOW)
    return program.finish()


def peer6(rules: Rules) -> Code:
    """The same for an AF_INET6 socket."""
    program = Program(rules)
    _load_mapped(program)
    _name_peer(program)
    program.code.place("store")
    _finish_name6(program)
    return program.finish()


def _load_mapped(program: Program) -> None:
    """R7 = a.b.c.d of ::ffff:a.b.c.d; any other address is left as it is."""
    program.load_words(R6, IP6)
    program.code.bit_or(R2, R3)
    program.code.jump_unequal(R2, 0, ALLOW)
    program.code.jump_unequal(R4, MAPPED, ALLOW)
    program.code.move(R7, R5)
    program.code.swap(R7)
    program.code.jump_equal(R7, program.rules.loopback6, "loopback6")


def _finish_name6(program: Program) -> None:
    """Put R7 into a mapped address, or ::1 into the place of what stands for it."""
    program.store_ipv4(IP6 + 12)
    program.code.jump(ALLOW)
    program.code.place("loopback6")
    _store_words(program, (0, 0, 0, ONE), IP6)
    program.code.jump(ALLOW)


def _name_peer(program: Program) -> None:
    """R7 as the guest says it; a socket on its loopback whose peer is its first address said so."""
    code, rules = program.code, program.rules
    if rules.loopback is None or not rules.ipv4:
        program.unmap_loopback(ALLOW)
        return
    code.jump_equal(R7, rules.ipv4[0], "first")
    program.unmap_loopback(ALLOW)
    code.jump("store")
    code.place("first")
    _load_source(program)
    other = code.new_label()
    program.jump_if_loopback(R8, other)
    code.jump(ALLOW)
    code.place(other)
    code.move(R7, INADDR_LOOPBACK)


HOOKS: Final = (
    (Hook("vs_bind4", bpf.CGROUP_SOCK_ADDR, 8), bind4),
    (Hook("vs_bind6", bpf.CGROUP_SOCK_ADDR, 9), bind6),
    (Hook("vs_connect4", bpf.CGROUP_SOCK_ADDR, 10), connect4),
    (Hook("vs_connect6", bpf.CGROUP_SOCK_ADDR, 11), connect6),
    (Hook("vs_sendmsg4", bpf.CGROUP_SOCK_ADDR, 14), sendmsg4),
    (Hook("vs_sendmsg6", bpf.CGROUP_SOCK_ADDR, 15), sendmsg6),
)
"""What a guest names, with the function that writes the program."""

NAME_HOOKS: Final = (
    (Hook("vs_recvmsg4", bpf.CGROUP_SOCK_ADDR, 19), peer4),
    (Hook("vs_recvmsg6", bpf.CGROUP_SOCK_ADDR, 20), peer6),
    (Hook("vs_peername4", bpf.CGROUP_SOCK_ADDR, 29), peer4),
    (Hook("vs_peername6", bpf.CGROUP_SOCK_ADDR, 30), peer6),
    (Hook("vs_sockname4", bpf.CGROUP_SOCK_ADDR, 31), name4),
    (Hook("vs_sockname6", bpf.CGROUP_SOCK_ADDR, 32), name6),
)
"""What a guest is told; only for one with a loopback of its own."""
