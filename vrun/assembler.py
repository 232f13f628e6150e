"""A small assembler: one program text, machine code for x86_64 and aarch64.

Instructions are named tuples, which are made faster than dataclasses: every start imports them.
Just enough for a program that makes system calls, keeps a few numbers and branches. Numbers are 32
bits wide, addresses are only passed on. The first instruction finds the stack as the kernel leaves
it for a new program: word 0 is argc, word 1 argv[0], and so on (System V ABI, "process stack").
Sources: Intel SDM volume 2; Arm ARM C6.2; numbers in asm/unistd_64.h and asm-generic/unistd.h.
"""

import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Final, Literal, NamedTuple

Register = Literal["result", "child", "status"]
"""`result` is what the last call gave, and lost by the next; the others are kept over calls."""
Relation = Literal["==", "!=", "<"]
Operation = Literal["and", "or", "shift right"]


class Word(NamedTuple):
    """A word of the initial stack."""

    number: int


class AddressOf(NamedTuple):
    """The address of a word of the initial stack."""

    number: int


class Environment(NamedTuple):
    """The address of the environment: the word after argv and its end."""


class Scratch(NamedTuple):
    """The address of 64 bytes that the program may use."""


Operand = int | Register | Word | AddressOf | Environment | Scratch


class Call(NamedTuple):
    """Make a system call; `result` becomes what it gave, -errno where it failed."""

    name: str
    operands: tuple[Operand, ...] = ()


class Move(NamedTuple):
    target: Register
    source: int | Register


class Load(NamedTuple):
    """Read the number at the start of the scratch bytes."""

    target: Register


class Store(NamedTuple):
    """Write a number into the scratch bytes, `offset` bytes from their start."""

    offset: int
    source: int | Register


class Change(NamedTuple):
    """Apply an operation with a constant."""

    register: Register
    operation: Operation
    constant: int


class Negate(NamedTuple):
    register: Register


class Branch(NamedTuple):
    """Go on at `label` if the register stands in that relation to `other`."""

    register: Register
    relation: Relation
    other: int | Register
    label: str


class Jump(NamedTuple):
    label: str


class Label(NamedTuple):
    name: str


Instruction = Call | Move | Load | Store | Change | Negate | Branch | Jump | Label
_Encoder = Callable[[Instruction, Callable[[str], int]], bytes]
"""Gives an instruction's code; the function gives a label's distance from the instruction's end."""

_SCRATCH_BYTES: Final = 64
"""They lie just below the initial stack: no signal handler ever runs there."""


def assemble(program: Iterable[Instruction], machine: str) -> bytes:
    """The machine code of `program`; KeyError for a machine that is not known."""
    start, encode = _MACHINES[machine]
    instructions = tuple(program)
    places: dict[str, int] = {}
    code = b""
    for _ in range(2):  # lengths do not depend on distances, so the second round knows all labels
        code = _encode_all(instructions, start, encode, places)
    return code


def _encode_all(
    instructions: Iterable[Instruction], start: bytes, encode: _Encoder, places: dict[str, int]
) -> bytes:
    code = start
    for instruction in instructions:
        if isinstance(instruction, Label):
            places[instruction.name] = len(code)
            continue
        length = len(encode(instruction, lambda _: 0))
        end = len(code) + length
        code += encode(instruction, lambda label, end=end: places.get(label, end) - end)  # type: ignore[misc] # the default is the value at this moment
    return code


# --- x86_64: arguments in rdi rsi rdx r10 r8 r9, number and result in rax; rcx and r11 are lost
_X86_CALLS: Final = {
    "clone": 56,
    "close": 3,
    "execve": 59,
    "exit_group": 231,
    "fcntl": 72,
    "ioctl": 16,
    "prctl": 157,
    "rt_sigaction": 13,
    "setsid": 112,
    "wait4": 61,
    "read": 0,
    "write": 1,
}
_RAX, _RBX, _RBP, _R12 = 0, 3, 5, 12
_X86_ARGUMENTS: Final = (7, 6, 2, 10, 8, 9)
_X86_REGISTERS: Final[Mapping[Register, int]] = {"result": _RAX, "child": _RBX, "status": _R12}
_X86_START: Final = bytes.fromhex("48 89 e5")  # mov rbp, rsp
_X86_GROUP: Final[Mapping[Operation, int]] = {"and": 4, "or": 1}  # of opcode 81
_X86_JUMPS: Final[Mapping[Relation, int]] = {"==": 0x84, "!=": 0x85, "<": 0x8C}


def _x86(opcode: int, register: int, other: int, *, wide: bool = False) -> bytes:
    """REX prefix, opcode and ModRM for two registers; `register` may be the opcode's extension."""
    rex = 0x40 | wide << 3 | register >> 3 << 2 | other >> 3
    return bytes((rex, opcode, 0xC0 | (register & 7) << 3 | other & 7))


def _x86_frame(opcode: int, register: int, offset: int, *, wide: bool) -> bytes:
    """REX prefix, opcode, ModRM and displacement for a register and [rbp + offset]."""
    rex = 0x40 | wide << 3 | register >> 3 << 2
    return struct.pack("<BBBi", rex, opcode, 0x80 | (register & 7) << 3 | _RBP, offset)


def _x86_constant(register: int, value: int) -> bytes:
    """Mov r32, imm32: clears the upper half."""
    rex = 0x40 | register >> 3
    return struct.pack("<BBI", rex, 0xB8 | register & 7, value & 0xFFFFFFFF)


def _x86_operand(register: int, operand: Operand) -> bytes:
    match operand:
        case int():
            return _x86_constant(register, operand)
        case str():
            return _x86(0x8B, register, _X86_REGISTERS[operand])
        case Word(index):
            return _x86_frame(0x8B, register, 8 * index, wide=True)
        case AddressOf(index):
            return _x86_frame(0x8D, register, 8 * index, wide=True)
        case Scratch():
            return _x86_frame(0x8D, register, -_SCRATCH_BYTES, wide=True)
        case Environment():  # mov reg, [rbp]; lea reg, [rbp + reg * 8 + 16]
            rex = 0x48 | register >> 3 << 2 | register >> 3 << 1
            modrm, sib = 0x44 | (register & 7) << 3, 0xC0 | (register & 7) << 3 | _RBP
            count = _x86_frame(0x8B, register, 0, wide=True)
            return count + bytes((rex, 0x8D, modrm, sib, 16))


def _encode_x86(instruction: Instruction, distance: Callable[[str], int]) -> bytes:
    match instruction:
        case Call(name, operands):
            loads = zip(_X86_ARGUMENTS, operands, strict=False)
            code = b"".join(_x86_operand(register, operand) for register, operand in loads)
            return code + _x86_constant(_RAX, _X86_CALLS[name]) + b"\x0f\x05"  # syscall
        case Move(target, source):
            return _x86_operand(_X86_REGISTERS[target], source)
        case Load(target):
            return _x86_frame(0x8B, _X86_REGISTERS[target], -_SCRATCH_BYTES, wide=False)
        case Store(offset, int(value)):
            return struct.pack("<BBiI", 0xC7, 0x80 | _RBP, offset - _SCRATCH_BYTES, value)
        case Store(offset, str(source)):
            register = _X86_REGISTERS[source]
            return _x86_frame(0x89, register, offset - _SCRATCH_BYTES, wide=False)
        case Change() | Negate():
            return _encode_x86_arithmetic(instruction)
        case Branch(register_name, relation, other, label):
            compare = _x86_compare(_X86_REGISTERS[register_name], other)
            return compare + struct.pack("<BBi", 0x0F, _X86_JUMPS[relation], distance(label))
        case Jump(label):
            return struct.pack("<Bi", 0xE9, distance(label))
    raise TypeError(instruction)


def _x86_compare(register: int, other: int | Register) -> bytes:
    if isinstance(other, str):
        return _x86(0x3B, register, _X86_REGISTERS[other])
    return _x86(0x81, 7, register) + struct.pack("<i", other)


def _encode_x86_arithmetic(instruction: Change | Negate) -> bytes:
    register = _X86_REGISTERS[instruction.register]
    match instruction:
        case Negate():
            return _x86(0xF7, 3, register)
        case Change(_, "shift right", constant):
            return _x86(0xC1, 5, register) + bytes((constant,))
        case Change(_, operation, constant):
            return _x86(0x81, _X86_GROUP[operation], register) + struct.pack("<I", constant)


# --- aarch64: arguments in x0 to x5, number in x8, result in x0; no other register is lost
_ARM_CALLS: Final = {
    "clone": 220,
    "close": 57,
    "execve": 221,
    "exit_group": 94,
    "fcntl": 25,
    "ioctl": 29,
    "prctl": 167,
    "rt_sigaction": 134,
    "setsid": 157,
    "wait4": 260,
    "read": 63,
    "write": 64,
}
_X8, _X9, _X29, _ZERO = 8, 9, 29, 31
_ARM_REGISTERS: Final[Mapping[Register, int]] = {"result": 0, "child": 19, "status": 20}
_ARM_START: Final = struct.pack("<I", 0x910003FD)  # mov x29, sp
_ARM_OPERATIONS: Final[Mapping[Operation, int]] = {
    "and": 0x0A000000,
    "or": 0x2A000000,
    "shift right": 0x1AC02400,  # lsrv
}
_ARM_CONDITIONS: Final[Mapping[Relation, int]] = {"==": 0, "!=": 1, "<": 11}


def _arm(opcode: int, target: int, first: int = 0, second: int = 0) -> bytes:
    """An instruction of three registers: target, first and second operand."""
    return struct.pack("<I", opcode | second << 16 | first << 5 | target)


def _arm_constant(register: int, value: int) -> bytes:
    """movz w, low half; movk w, high half, lsl 16: clears the upper half of x."""
    low, high = value & 0xFFFF, value >> 16 & 0xFFFF
    return _arm(0x52800000 | low << 5, register) + _arm(0x72A00000 | high << 5, register)


def _arm_frame(register: int, offset: int) -> bytes:
    """The address of [x29 + offset]: add or sub x, x29, #offset."""
    opcode = 0x91000000 if offset >= 0 else 0xD1000000
    return _arm(opcode | abs(offset) << 10, register, _X29)


def _arm_operand(register: int, operand: Operand) -> bytes:
    match operand:
        case int():
            return _arm_constant(register, operand)
        case str():  # orr w, wzr, w
            return _arm(0x2A000000, register, _ZERO, _ARM_REGISTERS[operand])
        case Word(index):  # ldr x, [x29, #8 * index]
            return _arm(0xF9400000 | index << 10, register, _X29)
        case AddressOf(index):
            return _arm_frame(register, 8 * index)
        case Scratch():
            return _arm_frame(register, -_SCRATCH_BYTES)
        case Environment():  # add x, x29, x, lsl 3; add x, x, #16
            ends = _arm(0x8B000C00, register, _X29, register)
            return _arm_operand(register, Word(0)) + ends + _arm(0x91004000, register, register)


def _encode_arm(instruction: Instruction, distance: Callable[[str], int]) -> bytes:
    match instruction:
        case Call(name, operands):
            code = b"".join(_arm_operand(*pair) for pair in enumerate(operands))
            return code + _arm_constant(_X8, _ARM_CALLS[name]) + struct.pack("<I", 0xD4000001)
        case Move(target, source):
            return _arm_operand(_ARM_REGISTERS[target], source)
        case Load(target):  # ldur w, [x29, #-64]
            offset = -_SCRATCH_BYTES & 0x1FF
            return _arm(0xB8400000 | offset << 12, _ARM_REGISTERS[target], _X29)
        case Store(offset, source):  # stur w9, [x29, #offset - 64]
            place = (offset - _SCRATCH_BYTES) & 0x1FF
            return _arm_operand(_X9, source) + _arm(0xB8000000 | place << 12, _X9, _X29)
        case Negate(register_name):  # sub w, wzr, w
            register = _ARM_REGISTERS[register_name]
            return _arm(0x4B000000, register, _ZERO, register)
        case Change(register_name, operation, constant):
            register = _ARM_REGISTERS[register_name]
            return _arm_constant(_X9, constant) + _arm(
                _ARM_OPERATIONS[operation], register, register, _X9
            )
        case Branch(register_name, relation, other, label):  # cmp w, w9; b.cond
            register = _ARM_REGISTERS[register_name]
            compare = _arm_operand(_X9, other) + _arm(0x6B000000, _ZERO, register, _X9)
            # distances count from the branch itself, which is the last instruction here
            words = (distance(label) + 4) // 4 & 0x7FFFF
            return compare + struct.pack("<I", 0x54000000 | words << 5 | _ARM_CONDITIONS[relation])
        case Jump(label):
            return struct.pack("<I", 0x14000000 | (distance(label) + 4) // 4 & 0x3FFFFFF)
    raise TypeError(instruction)


_MACHINES: Final[Mapping[str, tuple[bytes, _Encoder]]] = {
    "x86_64": (_X86_START, _encode_x86),
    "aarch64": (_ARM_START, _encode_arm),
}
