"""Join a running guest: `exec`, `suexec` and `enter`.

All that a guest's processes are held to is taken before the fork that enters its pid namespace:

    the command (vserver)    host's namespaces; copies bytes, passes signals on
    └── joiner (joiner.py)   enters all but the pid namespace, then becomes the stub (stub.py)
        └── the command      the first that the guest sees: born with what the guest has, no more
"""

import errno
import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Final

from vrun import capabilities, ceiling, control, namespaces, seccomp, stub, users
from vrun.cgroup import Group
from vrun.control import Connection
from vrun.errors import ToolError
from vrun.freezer import find_frozen
from vrun.hierarchy import find_hierarchies
from vrun.joiner import (
    EXIT_CANNOT_EXECUTE,
    EXIT_FAILED,
    EXIT_NOT_FOUND,
    Failure,
    Joiner,
    Target,
    parse_failure,
)
from vrun.mountfd import open_inside
from vrun.relay import Relay
from vrun.state import load_resources
from vrun.users import User
from vstore.guest import COPY_ON_WRITE, RunState, load_state, rundir
from vstore.heldback import signals_held_back
from vstore.streams import fill_standard

EXIT_SIGNAL: Final = 128

SHELLS: Final = (("/bin/bash", "-login"), ("/bin/sh", "-l"), ("/bin/csh",))
"""What `enter` runs where no file says otherwise: the first that is there."""

_ROOT_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_USER_PATH: Final = "/usr/local/bin:/usr/bin:/bin"
_PASSED_ON: Final = frozenset(
    {
        *("COLORTERM", "LANG", "LANGUAGE", "NO_COLOR", "TERM", "TZ"),
        *("DEBIAN_FRONTEND", "DEBIAN_PRIORITY", "EDITOR", "LESS", "PAGER", "VISUAL"),
    }
)
_PIDFD_SIGNAL_PROCESS_GROUP: Final = 1 << 2  # linux/pidfd.h; Linux 6.9
_FORWARDED: Final = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


_ENDING: Final = frozenset(_FORWARDED[:4])
_OF_TERMINALS: Final = (signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT)
_PATIENCE_S: Final = 1.0
"""So long a joiner has to take all that it needs when we are to end; it takes some milliseconds."""
_FROZEN_S: Final = 2.0
"""So long a frozen guest is waited for: unifying holds guests still for moments."""


class GuestStopped(ToolError):
    """The guest does not run."""

    exit_code = 1


class JoinFailed(ToolError):
    """The command was not run."""

    exit_code = EXIT_FAILED


class CannotExecute(ToolError):
    """The guest has the command, and it cannot be executed."""

    exit_code = EXIT_CANNOT_EXECUTE


class CommandNotFound(ToolError):
    """The guest does not have the command."""

    exit_code = EXIT_NOT_FOUND


_KINDS: Final = {kind.exit_code: kind for kind in (JoinFailed, CannotExecute, CommandNotFound)}


def execute(name: str, argv: tuple[str, ...]) -> int:
    """Run a command as root in the running guest; its exit code, 128 + n where signal n ended it.

    `argv` is given on as it is; a name without a slash is looked for in the guest's usual folders.
    Descriptors 0, 1 and 2 are connected with those of this process, whose signals are passed on
    meanwhile. Raises GuestStopped, CommandNotFound, CannotExecute and for anything else JoinFailed.
    """
    with _opened(name) as target:
        return _run(target, users.ROOT, argv)


def execute_as(name: str, user: str, argv: tuple[str, ...]) -> int:
    """As `execute`, for a USER or USER:GROUP, names or numbers that the guest itself knows."""
    with _opened(name) as target:
        return _run(target, users.find_user(target.root_fd, user), argv)


def enter(name: str, shell: tuple[str, ...] | None) -> int:
    """As `execute`, for a shell: `shell`, else the first of SHELLS that the guest has."""
    with _opened(name) as target:
        return _run(target, users.ROOT, shell or _find_shell(target))


# --- the guest


@contextmanager
def _opened(name: str) -> Iterator[Target]:
    """The running guest; failures that have no meaning of their own become JoinFailed."""
    fill_standard()
    try:
        with ExitStack() as stack:
            yield _open(name, stack)
    except (GuestStopped, *_KINDS.values()):
        raise
    except ToolError as error:
        raise JoinFailed(f"guest {name}: {error.message}", hint=error.hint) from error
    except OSError as error:
        raise JoinFailed(f"guest {name}: cannot be joined: {error}") from error


def _open(name: str, stack: ExitStack) -> Target:
    state = _running(name)
    try:
        init_fd = os.pidfd_open(state.init_pid)
        stack.callback(os.close, init_fd)
        root_fd = os.open(f"/proc/{state.init_pid}/root", os.O_PATH | os.O_DIRECTORY)
        stack.callback(os.close, root_fd)
        spaces = _foreign_spaces(state.init_pid)
        bounding = _bounding_set(state.init_pid)
        init_group = _group_of(state.init_pid)
        oom_score_adj = int(Path(f"/proc/{state.init_pid}/oom_score_adj").read_text())
    except (FileNotFoundError, ProcessLookupError):
        raise _stopped(name) from None
    _running(name)  # and so all of the above was read of its init, not of a later process
    if not {"mnt", "pid"} <= spaces:
        raise JoinFailed(
            f"guest {name}: process {state.init_pid}, its init as {rundir() / name}/state.json has "
            "it, is in the host's own mount or pid namespace"
        )
    held = ceiling.load(name)
    words = held.umask | seccomp.personality_words(held.personality)
    program = seccomp.cached_program(rundir() / ".filters", held.capabilities, held.ccaps, words)
    notifying, monitor = b"", None
    if state.protection == COPY_ON_WRITE:
        notifying, monitor = _find_supervisor(name, stack)
    return Target(
        name=name,
        init_fd=init_fd,
        root_fd=root_fd,
        spaces=spaces,
        group=_load_group(name, state),
        init_group=init_group,
        limits=held.as_spec(),
        oom_score_adj=oom_score_adj,
        kept=held.capabilities & bounding,
        program=program,
        notifying=notifying,
        monitor=monitor,
    )


def _find_supervisor(name: str, stack: ExitStack) -> tuple[bytes, Connection]:
    """The filter that has the guest's shared files copied on write, and who serves its calls."""
    from vrun.cow import notifyfilter

    monitor = control.connect(name)
    if monitor is None:
        raise JoinFailed(
            f"guest {name}: its monitor is gone, which has its shared files copied on write",
            hint=f"vserver {name} start",
        )
    stack.callback(monitor.close)
    return notifyfilter.cached_program(rundir() / ".filters"), monitor


def _wait_thawed(target: Target) -> None:
    """Raises JoinFailed: a process that joins a frozen guest could not even say so."""
    deadline = time.monotonic() + _FROZEN_S
    while frozen := find_frozen(target.group.homes):
        if time.monotonic() > deadline:
            raise JoinFailed(
                f"guest {target.name}: is frozen: {frozen}",
                hint=f"echo {'0' if frozen.name == 'cgroup.freeze' else 'THAWED'} > {frozen}; "
                f"vserver {target.name} stop ends it frozen, too",
            )
        time.sleep(_FROZEN_S / 40)


def _load_group(name: str, state: RunState) -> Group:
    made = load_resources(name)
    return Group.from_record(made.cgroup) if made and made.cgroup else Group.load(state.cgroup)


def _group_of(pid: int) -> Path:
    """The folder of the v2 group that the process is in."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return find_hierarchies().v2 / line.removeprefix("0::/")
    raise ProcessLookupError


def _running(name: str) -> RunState:
    state = load_state(name)
    if state is None:
        raise _stopped(name)
    return state


def _stopped(name: str) -> GuestStopped:
    return GuestStopped(f"guest {name} does not run", hint=f"vserver {name} start")


def _foreign_spaces(pid: int) -> frozenset[str]:
    """The kinds of namespaces in which process `pid` and we differ."""
    own = namespaces.identities(os.getpid())
    return frozenset(
        kind for kind, number in namespaces.identities(pid).items() if own.get(kind) != number
    )


def _bounding_set(pid: int) -> frozenset[str]:
    """What the guest's init can ever have, as the kernel says: it may have given up more."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("CapBnd:"):
            bits = int(line.split()[1], 16)
            return frozenset(
                known for known, number in capabilities.NUMBERS.items() if bits >> number & 1
            )
    raise ProcessLookupError


def _find_shell(target: Target) -> tuple[str, ...]:
    for shell in SHELLS:
        with suppress(OSError):
            os.close(open_inside(target.root_fd, shell[0]))
            return shell
    known = ", ".join(shell[0] for shell in SHELLS)
    raise CommandNotFound(
        f"guest {target.name}: has none of {known}", hint="name one in the guest's file `shell`"
    )


# --- the command, seen from outside


class _Command:
    """A command in the guest, and the stub that is its parent."""

    def __init__(self, pid: int, report_fd: int) -> None:
        self.pid = pid
        """Of the joiner, then of the stub: a child of this process."""
        self.ended_fd = os.pidfd_open(pid)
        self._report_fd = report_fd
        os.set_blocking(report_fd, False)
        self._reports = b""
        self._command_fd = -1
        self._waiting: list[int] = []

    @property
    def groups(self) -> list[Path]:
        """The groups that it is in by now."""
        with suppress(OSError):
            return [_group_of(self.pid)]
        return []

    @property
    def is_awaited(self) -> bool:
        """Whether the command is not known yet: signals that come meanwhile wait for it."""
        return self._command_fd < 0

    def send(self, number: int) -> None:
        """Send a signal to the command and its process group, as a terminal does."""
        self._waiting.append(number)
        self.send_waiting()

    def send_waiting(self) -> None:
        """Send what has come before the command was there."""
        if self._command_fd < 0:
            self._command_fd = self._find()
        if self._command_fd >= 0:
            numbers, self._waiting = self._waiting, []
            for number in numbers:
                with suppress(ProcessLookupError):
                    _send(self._command_fd, number)

    def wait_until_run(self, failure_fd: int) -> Failure | None:
        """Why the joiner did not become the stub; None as soon as it has.

        One that hangs (in a file system of the guest's) is killed when we are to end, and one that
        was frozen with its guest in any case.
        """
        data = b""
        last = time.monotonic() + _PATIENCE_S
        thawed = time.monotonic()
        while True:
            if select.select([failure_fd], [], [], _PATIENCE_S / 10)[0]:
                block = os.read(failure_fd, 4096)
                if not block:
                    return parse_failure(data)
                data += block
                continue
            frozen = find_frozen(self.groups)
            thawed = thawed if frozen else time.monotonic()
            if frozen and time.monotonic() > thawed + _FROZEN_S:
                os.kill(self.pid, signal.SIGKILL)
                data = os.fsencode(f"{EXIT_FAILED}\0is frozen: {frozen}")
            elif _ENDING.intersection(self._waiting) and time.monotonic() > last:
                os.kill(self.pid, signal.SIGKILL)
                data = b"%d\0cannot be joined: interrupted" % EXIT_FAILED

    def wait(self) -> int:
        """Its exit code, once the stub has ended; raises what the stub says of execve(2)."""
        _, status = os.waitpid(self.pid, 0)
        self._read_reports()
        for report in stub.parse_reports(self._reports):
            if isinstance(report, stub.NotExecuted):
                raise OSError(report.errno, os.strerror(report.errno))
        code = os.waitstatus_to_exitcode(status)
        return code if code >= 0 else EXIT_SIGNAL - code

    def close(self) -> None:
        for fd in (self.ended_fd, self._command_fd):
            if fd >= 0:
                os.close(fd)

    def _find(self) -> int:
        """A descriptor of the command; -1 where it is not there yet.

        A guest may have written the report: only a child of the stub is the command.
        """
        self._read_reports()
        for report in stub.parse_reports(self._reports):
            if isinstance(report, stub.Started):
                with suppress(OSError, ValueError):
                    fd = os.pidfd_open(report.pid)
                    if _parent_of(report.pid) == self.pid:
                        return fd
                    os.close(fd)
        return -1

    def _read_reports(self) -> None:
        with suppress(BlockingIOError):
            self._reports += os.read(self._report_fd, 4096)


def _send(pidfd: int, number: int) -> None:
    try:
        signal.pidfd_send_signal(pidfd, number, None, _PIDFD_SIGNAL_PROCESS_GROUP)
    except OSError as error:  # an older kernel, or not yet a group of its own
        if error.errno not in (errno.EINVAL, errno.ESRCH):
            raise
        signal.pidfd_send_signal(pidfd, number)


def _parent_of(pid: int) -> int:
    text = Path(f"/proc/{pid}/stat").read_bytes()
    return int(text.rpartition(b")")[2].split()[1])


@contextmanager
def _signals_passed(command: _Command, relay: Relay) -> Iterator[None]:
    """Pass the signals of this process on; one that is ignored (nohup) stays so."""

    def forward(number: int, frame: FrameType | None) -> None:
        command.send(number)

    def resize(number: int, frame: FrameType | None) -> None:
        relay.resize()

    def stop(number: int, frame: FrameType | None) -> None:
        # SIGTSTP has no effect on a group whose session has no other group to wait for it
        command.send(signal.SIGSTOP)
        relay.suspend()
        os.kill(os.getpid(), signal.SIGSTOP)

    def resume(number: int, frame: FrameType | None) -> None:
        relay.resume()
        command.send(signal.SIGCONT)

    wanted = dict.fromkeys(_FORWARDED, forward)
    wanted |= dict(zip(_OF_TERMINALS, (resize, stop, resume), strict=True))
    before = {
        number: signal.signal(number, handler)
        for number, handler in wanted.items()
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old or signal.SIG_DFL)


def _run(target: Target, user: User, argv: tuple[str, ...]) -> int:
    _wait_thawed(target)
    with ExitStack() as stack:
        relay = Relay((0, 1, 2), target.root_fd)
        stack.callback(relay.close)
        relay.give_to(user.uid, user.gid)
        failure_fd, tell_failure_fd = os.pipe2(os.O_CLOEXEC)
        report_fd, tell_report_fd = os.pipe2(os.O_CLOEXEC)
        stack.callback(os.close, failure_fd)
        stack.callback(os.close, report_fd)
        joiner = Joiner(target, user, argv, _environment(user), relay.inner, tell_report_fd)
        with signals_held_back():
            pid = os.fork()
            if pid == 0:
                joiner.become(tell_failure_fd)
            os.close(tell_failure_fd)
            os.close(tell_report_fd)
            command = _Command(pid, report_fd)
            stack.callback(command.close)
            stack.enter_context(_signals_passed(command, relay))
        if failure := command.wait_until_run(failure_fd):
            os.waitpid(pid, 0)
            raise _KINDS[failure.code](f"guest {target.name}: {failure.message}")
        return _attend(target, command, relay, argv[0])


def _attend(target: Target, command: _Command, relay: Relay, shown: str) -> int:
    """Stay connected with the command until it ends; its exit code."""
    relay.begin()
    while not relay.wait(command.ended_fd, at_most_ms=10 if command.is_awaited else None):
        command.send_waiting()
    relay.finish()
    try:
        return command.wait()
    except OSError as error:
        kind = CommandNotFound if error.errno == errno.ENOENT else CannotExecute
        raise kind(f"guest {target.name}: cannot execute {shown}: {error.strerror}") from error


def _environment(user: User) -> dict[str, str]:
    """What the command gets: the guest's root can read it, so only what tells nothing of the host.

    VSERVER_PASS_ENV names more, blanks between them.
    """
    wanted = _PASSED_ON | set(os.environ.get("VSERVER_PASS_ENV", "").split())
    passed = {
        name: value
        for name, value in os.environ.items()
        if name in wanted or name.startswith("LC_")
    }
    return passed | {
        "HOME": user.home,
        "LOGNAME": user.name,
        "PATH": _ROOT_PATH if user.uid == 0 else _USER_PATH,
        "SHELL": user.shell,
        "USER": user.name,
    }
