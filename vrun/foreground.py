"""A command that takes the place of ours: on the same terminal, with its signals and exit code."""

import errno
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import Final, NoReturn

from vrun.errors import ToolError
from vstore.heldback import signals_held_back

EXIT_FAILED: Final = 125
"""We could not make what the command was to run in."""
EXIT_CANNOT_EXECUTE: Final = 126
EXIT_NOT_FOUND: Final = 127
EXIT_SIGNAL: Final = 128

_OF_TERMINAL: Final = (signal.SIGINT, signal.SIGQUIT)
PASSED_ON: Final = (
    *_OF_TERMINAL,
    signal.SIGHUP,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
_BY_INTERPRETER: Final = (signal.SIGPIPE, signal.SIGXFSZ)
"""What our interpreter ignores, and no command expects to."""


class CannotExecute(ToolError):
    """There is such a command, and it cannot be executed."""

    exit_code = EXIT_CANNOT_EXECUTE


class CommandNotFound(ToolError):
    exit_code = EXIT_NOT_FOUND


def not_executed(command: str, number: int) -> ToolError:
    """What execve(2) has said, as an error."""
    kind = CommandNotFound if number == errno.ENOENT else CannotExecute
    return kind(f"cannot execute {command}: {os.strerror(number)}")


def ignore() -> None:
    """What nobody waits for."""


def find_program(command: str) -> str:
    """The path of a command: itself if it has a slash, else the first in PATH.

    Raises CommandNotFound.
    """
    path = command if "/" in command else shutil.which(command)
    if not path:
        raise CommandNotFound(f"there is no command {command}")
    return path


def execute(argv: Sequence[str]) -> NoReturn:
    """Become the command. Raises CommandNotFound, CannotExecute."""
    for number in _BY_INTERPRETER:
        signal.signal(number, signal.SIG_DFL)
    path = find_program(argv[0])
    try:
        os.execv(path, list(argv))  # noqa: S606 (the caller's command)
    except OSError as error:
        raise not_executed(argv[0], error.errno or 0) from None


def run(
    fork: Callable[[], int],
    become: Callable[[], NoReturn],
    started: Callable[[], None] = ignore,
) -> int:
    """Fork a child that becomes the command, and wait for it; its exit code.

    `fork` is as os.fork(); `started` is called as soon as the command runs. Raises the ToolError
    that `become` raises in the child, and others of its errors as such.
    """
    failure_fd, tell_fd = os.pipe2(os.O_CLOEXEC)
    with ExitStack() as stack:
        stack.callback(os.close, failure_fd)
        try:
            pid = start(fork, lambda: _become(become, tell_fd), stack)
        finally:
            os.close(tell_fd)
        failure = read_failure(failure_fd)
        if failure is None:
            started()
        _, status = os.waitpid(pid, 0)
    if failure is not None:
        raise failure
    return code_of(status)


def start(fork: Callable[[], int], child: Callable[[], NoReturn], stack: ExitStack) -> int:
    """Fork a child that does `child`; its pid. It gets our signals while `stack` is open."""
    with signals_held_back() as let_come:
        pid = fork()
        if pid == 0:
            let_come()
            child()
        stack.enter_context(signals_passed(lambda number: os.kill(pid, number)))
    return pid


def _become(become: Callable[[], NoReturn], tell_fd: int) -> NoReturn:
    """In the child, which never goes back into the program that forked it."""
    code = EXIT_FAILED
    try:
        become()
    except ToolError as error:
        tell_failure(tell_fd, error)
    except SystemExit as ended:  # by a signal, before the command was there
        code = ended.code if isinstance(ended.code, int) else EXIT_FAILED
    except Exception as error:  # noqa: BLE001 (a bug of ours must reach a person too)
        tell_failure(tell_fd, ToolError(f"{error}" or repr(error)))
    finally:
        os._exit(code)


def tell_failure(fd: int, error: ToolError) -> None:
    """Write what read_failure() reads."""
    os.write(fd, os.fsencode(f"{error.exit_code}\0{error.message}\0{error.hint or ''}"))


def read_failure(fd: int) -> ToolError | None:
    """What tell_failure() has written to the other end; None where that was closed without."""
    data = b""
    while block := os.read(fd, 4096):
        data += block
    if not data:
        return None
    code, message, hint = os.fsdecode(data).split("\0", 2)
    kinds = {kind.exit_code: kind for kind in (CommandNotFound, CannotExecute)}
    return kinds.get(int(code), ToolError)(message, hint=hint or None)


@contextmanager
def signals_passed(send: Callable[[int], None]) -> Iterator[None]:
    """Pass the signals of this process on; one that is ignored (nohup) stays so.

    What a terminal sends to all of its foreground the command has got by itself.
    """

    def forward(number: int, frame: FrameType | None) -> None:
        if number not in _OF_TERMINAL or not _is_foreground():
            with suppress(ProcessLookupError):
                send(number)

    wanted = [number for number in PASSED_ON if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, forward) for number in wanted}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old or signal.SIG_DFL)


def _is_foreground() -> bool:
    try:
        fd = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(fd)


def code_of(wait_status: int) -> int:
    """The exit code, 128 + n where signal n ended it."""
    code = os.waitstatus_to_exitcode(wait_status)
    return code if code >= 0 else EXIT_SIGNAL - code


def in_background(work: Callable[[Callable[[], None]], int]) -> int:
    """Do `work` in a process that outlives this one, in a session of its own; returns 0 as soon as
    `work` has called what it is given, else the code of `work`.
    """
    started_fd, tell_fd = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        os.close(started_fd)
        os.setsid()
        return work(lambda: _tell_once(tell_fd))
    os.close(tell_fd)
    is_started = os.read(started_fd, 1) != b""
    os.close(started_fd)
    return 0 if is_started else code_of(os.waitpid(pid, 0)[1])


def _tell_once(fd: int) -> None:
    os.write(fd, b"+")
    os.close(fd)
