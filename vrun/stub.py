"""The program between our interpreter and the guest's: a static ELF of a few hundred bytes.

It runs from a sealed memfd, so that no file of the host is ever the /proc/PID/exe of a process that
a guest can see, nor of one that executes a guest's file (a guest's /sbin/init may be a symlink to
/proc/self/exe). Three kinds:

exec    executes the command in its own place: the guest's init.
wait    forks, executes the command in the child, reaps until no child is left, and ends with the
        first child's status (128 + n for signal n): process 1 of the style sysv.
join    as wait but for the word, and the child is in a session of its own, whose terminal is
        descriptor 0 if that is one: what `exec` and `enter` run in the host's pid namespace. The
        stub's own session has no number inside, and a guest could send signals to it as its process
        group.

exec and wait wait for a byte on REPORT_FD before they do anything, if that is a socket: by then our
interpreter is gone, which takes as long as all else that is left to do. End of file ends them.
"""

import errno
import fcntl
import os
import signal
import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal, NoReturn

from vrun import cachefile, syscalls
from vstore.guest import rundir
from vstore.record import dataclass

Kind = Literal["exec", "wait", "join"]

REPORT_FD: Final = 3
"""The descriptor on which the stub reports, if it is open. The command never gets it."""

STARTED, NOT_EXECUTED, ENDED = 1, 2, 3
REPORT: Final = struct.Struct("<ii")
"""Kind and value, as the stub writes them."""


@dataclass(frozen=True, slots=True)
class Started:
    """The child runs; not from exec. The number is that of the stub's own pid namespace."""

    pid: int


@dataclass(frozen=True, slots=True)
class NotExecuted:
    """execve(2) refused, or fork(2). The stub ends with 127 for ENOENT, else 126."""

    errno: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The first child ended; not from exec. Others may still run."""

    wait_status: int
    """For os.waitstatus_to_exitcode()."""


Report = Started | NotExecuted | Ended
_REPORTS: Final[Mapping[int, Callable[[int], Report]]] = {
    STARTED: Started,
    NOT_EXECUTED: NotExecuted,
    ENDED: Ended,
}


def parse_reports(data: bytes) -> list[Report]:
    """What was read from the other end of REPORT_FD; 8 bytes each, an incomplete one is left out.

    End of file without a NotExecuted: the command is executed (exec), or the first child has ended
    (wait, join). A guest may reach the descriptor of its process 1: nothing here is to be trusted,
    and what no stub writes is left out.
    """
    whole = data[: len(data) - len(data) % REPORT.size]
    return [_REPORTS[kind](value) for kind, value in REPORT.iter_unpack(whole) if kind in _REPORTS]


def execute(
    kind: Kind,
    path: str | bytes,
    argv: Sequence[str | bytes],
    environment: Mapping[str, str],
    *,
    name: str = "init",
    report_fd: int | None = None,
    stub_fd: int | None = None,
) -> NoReturn:
    """Become the stub that executes `path` (no search in PATH) with `argv` and `environment`.

    `name` is argv[0] of the stub itself, as ps shows it. Signals get their default actions and an
    empty mask; descriptors above 2 are closed, save `report_fd`, which becomes REPORT_FD. `stub_fd`
    is what open_sealed() gave. Raises OSError where there is no stub for this machine (ENOSYS) or
    no program can run from memory.
    """
    reset_signals()
    syscalls.close_range_on_exec(REPORT_FD)
    if stub_fd == REPORT_FD:
        stub_fd = os.dup(stub_fd)
    if report_fd is not None:
        os.dup2(report_fd, REPORT_FD)
        os.set_inheritable(REPORT_FD, True)
    program_fd = open_sealed(kind) if stub_fd is None else stub_fd
    os.execve(program_fd, [name, path, *argv], environment)  # noqa: S606 # the point of this module


def image(kind: Kind, machine: str) -> bytes:
    """The ELF file of the stub; OSError (ENOSYS) for a machine other than x86_64 and aarch64."""
    from vrun import stubcode  # 3 ms that a process with a stub made by another need not pay

    return stubcode.image(kind, machine)


def _kept_image(kind: Kind) -> bytes:
    """image() for this machine, kept in RUNDIR/.filters by the state of the modules that make it.

    That takes 2 ms, as long as all of a guest's mounts.
    """
    machine = os.uname().machine
    try:
        states = [os.stat(Path(__file__).with_name(name)) for name in _MAKERS]  # noqa: PTH116
    except OSError:
        return image(kind, machine)
    state = "-".join(f"{found.st_mtime_ns:x}.{found.st_size:x}" for found in states)
    path = rundir() / ".filters" / f"stub-{kind}-{machine}-{state}"
    try:
        return path.read_bytes()
    except OSError:
        made = image(kind, machine)
    cachefile.keep(path, made)
    return made


def reset_signals() -> None:
    """Default actions (an interpreter ignores SIGPIPE, nohup SIGHUP), nothing blocked."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


_MAKERS: Final = ("stub.py", "stubcode.py", "assembler.py")
_MFD_EXEC: Final = 0x10  # linux/memfd.h; Linux 6.3
_F_SEAL_EXEC: Final = 0x20  # linux/fcntl.h; Linux 6.3
_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def open_sealed(kind: Kind) -> int:
    """The stub as a file that nobody can change any more; close-on-exec. Raises OSError."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        fd = os.memfd_create("init", flags | _MFD_EXEC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fd = os.memfd_create("init", flags)
    os.write(fd, _kept_image(kind))
    with suppress(OSError):  # unknown to older kernels
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _F_SEAL_EXEC)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return fd
