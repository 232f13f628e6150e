"""Connecting to a guest's own loopback: to which of its addresses that leads.

A server that says 0.0.0.0 is bound to the guest's first address, and its clients may say 127.0.0.1.
"""

from socket import IPPROTO_TCP, IPPROTO_UDP
from typing import Final

from vrun import bpf
from vrun.bpf import R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, R10
from vrun.sockcode import PORT, SOCK_IP4, Program, word

_PROTOCOL: Final = 36  # struct bpf_sock_addr
_TUPLE: Final = -48  # on the stack: struct bpf_sock_tuple
_CURRENT_NETNS: Final = -1


def find_service(program: Program) -> None:
    """Choose between R7 and the guest's first address: where a socket of its own is bound.

    To a port where only the host or another guest listens on 0.0.0.0, the answer is that of a
    port where nobody does.
    """
    if program.rules.loopback is None:
        return
    code, settled, tcp = program.code, program.code.new_label(), program.code.new_label()
    code.move(R8, 0)
    code.load(R1, R6, _PROTOCOL)
    code.jump_equal(R1, IPPROTO_TCP, tcp)
    code.jump_unequal(R1, IPPROTO_UDP, settled)
    _search(program, bpf.SK_LOOKUP_UDP, settled)
    code.place(tcp)
    _search(program, bpf.SK_LOOKUP_TCP, settled)
    code.place(settled)


def _search(program: Program, function: int, settled: str) -> None:
    _look_up(program, function, None, settled)
    if program.rules.ipv4:
        _look_up(program, function, program.rules.ipv4[0], settled)
    program.code.jump_equal(R8, 0, settled)
    program.code.jump("refused")


def _look_up(program: Program, function: int, number: int | None, settled: str) -> None:
    """R8 = 1 for a stranger's socket at `number` (None: R7); one of the guest's settles it."""
    code = program.code
    ours, absent = code.new_label(), code.new_label()
    _write_tuple(program, number)
    code.move(R1, R6, wide=True)
    code.move(R2, R10, wide=True)
    code.add(R2, _TUPLE)
    code.move(R3, 12)
    code.move(R4, _CURRENT_NETNS, wide=True)
    code.move(R5, 0, wide=True)
    code.call(function)
    code.jump_equal(R0, 0, absent, wide=True)
    code.move(R9, R0, wide=True)
    code.load(R1, R9, SOCK_IP4)
    code.jump_unequal(R1, 0, ours)  # bound to just this address
    program.load_storage(R9)
    code.jump_unequal(R0, 0, ours, wide=True)
    _release(program)
    code.move(R8, 1)
    code.jump(absent)
    code.place(ours)
    _release(program)
    if number is not None:
        code.move(R7, number)
    code.jump(settled)
    code.place(absent)


def _write_tuple(program: Program, number: int | None) -> None:
    code = program.code
    code.store(R10, _TUPLE, 0)
    if number is None:
        code.move(R1, R7)
        code.swap(R1)
        code.store(R10, _TUPLE + 4, R1)
    else:
        code.store(R10, _TUPLE + 4, word(number.to_bytes(4)))
    code.store(R10, _TUPLE + 8, 0, 2)
    code.load(R1, R6, PORT)
    code.store(R10, _TUPLE + 10, R1, 2)


def _release(program: Program) -> None:
    program.code.move(R1, R9, wide=True)
    program.code.call(bpf.SK_RELEASE)
