"""Programs for the kernel's BPF machine without a compiler: an assembler, loading and attaching.

As much of the instruction set as cgroup programs need (kernel documentation, bpf/standardization/
instruction-set.rst; include/uapi/linux/bpf.h). Arithmetic and comparisons are of 32 bits unless
`wide`; registers and offsets are those of the kernel.
"""

import os
import struct
from enum import IntEnum
from typing import Final

from vrun import bpfcalls
from vstore.record import dataclass

CGROUP_SKB: Final = 8  # enum bpf_prog_type
CGROUP_SOCK: Final = 9
CGROUP_SOCK_ADDR: Final = 18
CGROUP_SOCKOPT: Final = 25

BIND: Final = 64  # enum bpf_func_id
SK_LOOKUP_TCP: Final = 84
SK_LOOKUP_UDP: Final = 85
SK_RELEASE: Final = 86
SK_STORAGE_GET: Final = 107
PROBE_READ_KERNEL: Final = 113
SET_RETVAL: Final = 187

_INSTRUCTION: Final = struct.Struct("=BBhi")
_PSEUDO_MAP_FD: Final = 1
_LD_IMM64: Final = 0x18
_SIZES: Final = {1: 0x10, 2: 0x08, 4: 0x00, 8: 0x18}
_LDX: Final = 0x61
_ST: Final = 0x62
_STX: Final = 0x63
_ALU: Final = 0x04
_ALU64: Final = 0x07
_JMP: Final = 0x05
_JMP32: Final = 0x06
_REGISTER: Final = 0x08  # the second operand is a register
_TO_BIG_ENDIAN: Final = 0xDC
_CALL: Final = 0x85
_EXIT: Final = 0x95
_SK_STORAGE: Final = 24  # enum bpf_map_type
_NO_PREALLOC: Final = 1
# The type of its keys and values, which such a map must have (bpf/btf.rst): type 1, a 32-bit int.
_NAMES: Final = b"\0u32\0"
_INTEGER: Final = struct.pack("=4I", 1, 1 << 24, 4, 32)
_INTEGER_TYPE: Final = (
    struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(_INTEGER), len(_INTEGER), len(_NAMES))
    + _INTEGER
    + _NAMES
)


class Register(IntEnum):
    """R0 results, R1 to R5 arguments (a call loses them), R6 to R9 kept, R10 end of the stack."""

    R0 = 0
    R1 = 1
    R2 = 2
    R3 = 3
    R4 = 4
    R5 = 5
    R6 = 6
    R7 = 7
    R8 = 8
    R9 = 9
    R10 = 10


R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, R10 = Register


@dataclass(frozen=True, slots=True)
class Hook:
    """A place in the kernel where a cgroup's programs run."""

    name: str
    prog_type: int
    attach_type: int
    """Of enum bpf_attach_type."""


class Code:
    """A program that is being written; jumps name labels, before or after they are placed.

    An operand is a register if it is a `Register`, else an immediate of 32 bits. The verifier
    refuses what cannot be reached: `is_used` says whether a label is worth placing.
    """

    def __init__(self) -> None:
        self._instructions: list[tuple[int, int, int | str, int]] = []
        self._labels: dict[str, int] = {}
        self._used: set[str] = set()
        self._made = 0

    def new_label(self) -> str:
        """A label that nobody else has."""
        self._made += 1
        return f".{self._made}"

    def place(self, label: str) -> None:
        """Let `label` mean the instruction that comes next."""
        if label in self._labels:
            raise ValueError(f"label {label} is placed twice")
        self._labels[label] = len(self._instructions)

    def is_used(self, label: str) -> bool:
        """Whether something jumps to `label` so far."""
        return label in self._used

    def load(self, target: Register, base: Register, offset: int, size: int = 4) -> None:
        """target = the `size` bytes at base + offset."""
        self._add(_LDX | _SIZES[size], target, base, offset)

    def store(self, base: Register, offset: int, value: Register | int, size: int = 4) -> None:
        """Put `size` bytes of `value` at base + offset; a context takes registers only."""
        if isinstance(value, Register):
            self._add(_STX | _SIZES[size], base, value, offset)
        else:
            self._add(_ST | _SIZES[size], base, 0, offset, value)

    def move(self, target: Register, value: Register | int, *, wide: bool = False) -> None:
        """target = value; pointers and negative arguments need `wide`."""
        self._compute(0xB0, target, value, wide)

    def add(self, target: Register, value: Register | int) -> None:
        """target += value, of 64 bits."""
        self._compute(0x00, target, value, True)

    def bit_and(self, target: Register, value: Register | int) -> None:
        self._compute(0x50, target, value, False)

    def bit_or(self, target: Register, value: Register | int, *, wide: bool = False) -> None:
        self._compute(0x40, target, value, wide)

    def bit_xor(self, target: Register, value: Register | int, *, wide: bool = False) -> None:
        self._compute(0xA0, target, value, wide)

    def shift_left(self, target: Register, bits: int) -> None:
        self._compute(0x60, target, bits, False)

    def shift_right(self, target: Register, bits: int) -> None:
        self._compute(0x70, target, bits, False)

    def swap(self, target: Register) -> None:
        """Turn 32 bits in network order into a number, or back."""
        self._add(_TO_BIG_ENDIAN, target, 0, 0, 32)

    def jump(self, label: str) -> None:
        self._add(_JMP, 0, 0, label)
        self._used.add(label)

    def jump_equal(
        self, left: Register, right: Register | int, label: str, *, wide: bool = False
    ) -> None:
        self._compare(0x10, left, right, label, wide)

    def jump_unequal(
        self, left: Register, right: Register | int, label: str, *, wide: bool = False
    ) -> None:
        self._compare(0x50, left, right, label, wide)

    def jump_above(self, left: Register, right: Register, label: str) -> None:
        """Jump if left > right as unsigned numbers or pointers of 64 bits."""
        self._compare(0x20, left, right, label, True)

    def map_fd(self, target: Register, fd: int) -> None:
        """target = the map behind the descriptor, which the program then holds itself."""
        self._add(_LD_IMM64, target, _PSEUDO_MAP_FD, 0, fd)
        self._add(0, 0, 0, 0)

    def call(self, function: int) -> None:
        """R0 = function(R1, ...), one of enum bpf_func_id."""
        self._add(_CALL, 0, 0, 0, function)

    def leave(self, result: int) -> None:
        """End the program with `result`."""
        self.move(R0, result)
        self._add(_EXIT, 0, 0, 0)

    def assemble(self) -> bytes:
        """The program as struct bpf_insn items. Raises KeyError for a label that is nowhere."""
        packed = []
        for index, (code, registers, offset, immediate) in enumerate(self._instructions):
            if isinstance(offset, str):
                offset = self._labels[offset] - index - 1
            packed.append(_INSTRUCTION.pack(code, registers, offset, immediate))
        return b"".join(packed)

    def _compute(self, code: int, target: int, value: Register | int, wide: bool) -> None:
        self._operate(code | (_ALU64 if wide else _ALU), target, value, 0)

    def _compare(self, code: int, left: int, right: Register | int, label: str, wide: bool) -> None:
        self._operate(code | (_JMP if wide else _JMP32), left, right, label)
        self._used.add(label)

    def _operate(self, code: int, target: int, value: Register | int, offset: int | str) -> None:
        if isinstance(value, Register):
            self._add(code | _REGISTER, target, value, offset)
        else:
            self._add(code, target, 0, offset, value)

    def _add(
        self, code: int, target: int, source: int, offset: int | str, immediate: int = 0
    ) -> None:
        if immediate >= 1 << 31:  # a number without a sign, as the kernel's header reads it
            immediate -= 1 << 32
        self._instructions.append((code, source << 4 | target, offset, immediate))


def load_program(code: Code, hook: Hook) -> int:
    """Load the program for `hook`; a descriptor of it, close-on-exec.

    Raises OSError: EPERM without CAP_BPF and CAP_NET_ADMIN, EINVAL or EACCES where this kernel
    cannot run it; the verifier's words follow the reason.
    """
    return bpfcalls.prog_load(
        code.assemble(),
        prog_type=hook.prog_type,
        attach_type=hook.attach_type,
        name=hook.name.encode()[:15],
    )


def attach(cgroup_fd: int, hook: Hook, program_fd: int) -> None:
    """Let a loaded program run for the sockets of a cgroup and all below it, until it is removed.

    It runs beside those that others have attached or will attach. Raises OSError.
    """
    bpfcalls.prog_attach(cgroup_fd, program_fd, attach_type=hook.attach_type)


def make_socket_storage(name: str) -> int:
    """A map that keeps 32 bits with each socket that has an entry; a descriptor, close-on-exec.

    BPF_MAP_TYPE_SK_STORAGE: an entry goes with its socket, the map with the last program or
    descriptor. Raises OSError.
    """
    types_fd = bpfcalls.btf_load(_INTEGER_TYPE)
    try:
        return bpfcalls.map_create(
            map_type=_SK_STORAGE,
            key_size=4,
            value_size=4,
            flags=_NO_PREALLOC,
            name=name.encode()[:15],
            types_fd=types_fd,
            type_id=1,
        )
    finally:
        os.close(types_fd)
