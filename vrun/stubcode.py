"""The machine code of the stub (stub.py), and the file that it is."""

import errno
import signal
import struct
import termios
from collections.abc import Mapping
from typing import Final

from vrun.assembler import (
    AddressOf,
    Branch,
    Call,
    Change,
    Environment,
    Instruction,
    Jump,
    Label,
    Load,
    Move,
    Negate,
    Register,
    Scratch,
    Store,
    Word,
    assemble,
)
from vrun.stub import ENDED, NOT_EXECUTED, REPORT, REPORT_FD, STARTED, Kind


def image(kind: Kind, machine: str) -> bytes:
    """The ELF file of the stub; OSError (ENOSYS) for a machine other than x86_64 and aarch64."""
    try:
        number = _ELF_MACHINES[machine]
    except KeyError:
        raise OSError(errno.ENOSYS, f"no stub program for {machine}") from None
    code = assemble(_PROGRAMS[kind], machine)
    return _elf_header(number) + _program_headers(len(code)) + code


# --- the programs: fcntl(2), sched.h, sys/wait.h, linux/prctl.h
_F_SETFD, _FD_CLOEXEC, _WALL, _PR_SET_NAME = 2, 1, 0x40000000, 15
_NAME, _PATH, _ARGV = Word(1), Word(2), AddressOf(3)
_SIGSET_BYTES: Final = 8
_SIGACTION_BYTES: Final = 32


def _report(kind: int, value: Register) -> tuple[Instruction, ...]:
    write = Call("write", (REPORT_FD, Scratch(), REPORT.size))
    return (Store(0, kind), Store(4, value), write)


_IGNORE_BROKEN_PIPES: Final[tuple[Instruction, ...]] = (  # nobody may be left to read the reports
    Store(0, signal.SIG_IGN),
    *(Store(offset, 0) for offset in range(4, _SIGACTION_BYTES, 4)),
    Call("rt_sigaction", (signal.SIGPIPE, Scratch(), 0, _SIGSET_BYTES)),
)

_AWAIT_WORD: Final[tuple[Instruction, ...]] = (
    Call("read", (REPORT_FD, Scratch(), 1)),
    Branch("result", "!=", 0, "go"),
    Call("exit_group", (1,)),  # nobody is left to give it
    Label("go"),
)

_EXEC: Final[tuple[Instruction, ...]] = (
    Call("fcntl", (REPORT_FD, _F_SETFD, _FD_CLOEXEC)),
    Call("execve", (_PATH, _ARGV, Environment())),
    Label("failed"),
    Negate("result"),
    Move("status", "result"),
    *_report(NOT_EXECUTED, "status"),
    Branch("status", "==", errno.ENOENT, "not found"),
    Call("exit_group", (126,)),
    Label("not found"),
    Call("exit_group", (127,)),
)

_WAIT_AND_REPORT: Final[tuple[Instruction, ...]] = (
    Call("prctl", (_PR_SET_NAME, _NAME, 0, 0, 0)),
    Call("clone", (signal.SIGCHLD, 0, 0, 0, 0)),
    Branch("result", "<", 0, "failed"),
    Branch("result", "==", 0, "in the child"),
    Move("child", "result"),
    *_IGNORE_BROKEN_PIPES,
    *_report(STARTED, "child"),
    Label("wait"),
    Call("wait4", (-1, Scratch(), _WALL, 0)),
    Branch("result", "==", -errno.ECHILD, "all gone"),
    Branch("result", "!=", "child", "wait"),
    Move("child", 0),  # its number may come back with an orphan
    Load("status"),
    *_report(ENDED, "status"),
    Call("close", (REPORT_FD,)),
    Jump("wait"),
    Label("all gone"),
    Move("result", "status"),
    Change("result", "and", 0x7F),
    Branch("result", "!=", 0, "killed"),
    Change("status", "shift right", 8),
    Call("exit_group", ("status",)),
    Label("killed"),
    Change("result", "or", 128),
    Call("exit_group", ("result",)),
    Label("in the child"),
)

_LEAVE_SESSION: Final[tuple[Instruction, ...]] = (
    Call("setsid"),
    Call("ioctl", (0, termios.TIOCSCTTY, 0)),
)

_PROGRAMS: Final[Mapping[Kind, tuple[Instruction, ...]]] = {
    "exec": (*_AWAIT_WORD, *_EXEC),
    "wait": (*_AWAIT_WORD, *_WAIT_AND_REPORT, *_EXEC),
    "join": (*_WAIT_AND_REPORT, *_LEAVE_SESSION, *_EXEC),
}


# --- the file: elf(5)
_ELF_MACHINES: Final = {"x86_64": 62, "aarch64": 183}
_LOAD_ADDRESS: Final = 0x400000
_PAGE: Final = 0x10000
"""The largest that either machine uses."""
_ELF_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER: Final = struct.Struct("<IIQQQQQQ")
_HEADERS_BYTES: Final = _ELF_HEADER.size + 2 * _PROGRAM_HEADER.size
_PT_LOAD, _PT_GNU_STACK = 1, 0x6474E551
_PF_X, _PF_W, _PF_R = 1, 2, 4


def _elf_header(machine: int) -> bytes:
    """ET_EXEC, 64 bits, little-endian; the program begins right behind the headers."""
    identity = b"\x7fELF\x02\x01\x01"
    entry = _LOAD_ADDRESS + _HEADERS_BYTES
    sizes = (_ELF_HEADER.size, _PROGRAM_HEADER.size, 2, 0, 0, 0)
    return _ELF_HEADER.pack(identity, 2, machine, 1, entry, _ELF_HEADER.size, 0, 0, *sizes)


def _program_headers(code_bytes: int) -> bytes:
    """All of the file, readable and executable, and a stack that is not executable."""
    size = _HEADERS_BYTES + code_bytes
    place = (0, _LOAD_ADDRESS, _LOAD_ADDRESS, size, size, _PAGE)
    load = _PROGRAM_HEADER.pack(_PT_LOAD, _PF_R | _PF_X, *place)
    return load + _PROGRAM_HEADER.pack(_PT_GNU_STACK, _PF_R | _PF_W, 0, 0, 0, 0, 0, 16)
