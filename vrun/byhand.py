"""chcontext: a context that is made for one command, and ends with the last of its processes.

    chcontext (front)        has the caller's terminal; passes signals on, ends as the command does
    └── keeper               parent of the context's process 1; in the background until that ends
        └── process 1        the stub (stub.py): it reaps, or with `fakeinit` becomes the command
            └── the command

The context has a number, a control group, and namespaces of its own for processes, mounts, names
and ipc. Its files and its network are those of the host. RUNDIR/context-KEEPER is for it what
RUNDIR/NAME is for a guest, with a file `by-hand` in it; whoever joins gets no more than is written
there.
"""

import fcntl
import os
import signal
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

from vrun import (
    bound,
    capabilities,
    ceiling,
    cgroup,
    foreground,
    kernelfs,
    mountcalls,
    mountfd,
    namespaces,
    outside,
    seccomp,
    state,
    stub,
    syscalls,
)
from vrun.cgroup import Group
from vrun.errors import NotPermitted, ToolError
from vrun.hierarchy import find_hierarchies
from vrun.membership import MADE_BY_HAND
from vrun.spec import CgroupSettings
from vstore.guest import RunState, rundir, take_lock
from vstore.record import dataclass, replace

SPACES: Final[Mapping[str, str]] = {
    "mount": "mnt",
    "pid": "pid",
    "uts": "uts",
    "ipc": "ipc",
    "net": "net",
    "time": "time",
}
"""What --spaces names, and the kernel's words; the first two every context has."""
DEFAULT_SPACES: Final = frozenset({"mount", "pid", "uts", "ipc"})
_PREFIX: Final = "context-"
_END_S: Final = 10.0
_SIOCSIFFLAGS: Final = 0x8914  # linux/sockios.h
_UP: Final = 0x1  # linux/if.h
_STARTED, _NOT_EXECUTED, _ENDED = b"S", b"N", b"E"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a context is to be like."""

    argv: tuple[str, ...]
    xid: int | None = None
    """None: the lowest dynamic number that is free."""
    kept: frozenset[str] = frozenset(capabilities.NUMBERS)
    secure: bool = False
    """As a guest: with the system call filter, and what is the kernel's write-protected."""
    hostname: str | None = None
    domainname: str | None = None
    spaces: frozenset[str] = DEFAULT_SPACES
    is_init: bool = False
    """The command is process 1 itself."""


Started = Callable[[int], None]
"""Is called with the number of the context, before the command runs."""


def run(wish: Wish, started: Started, *, background: bool = False) -> int:
    """Run the command in a new context; its exit code. In the background: 0 once it runs.

    Raises ToolError where the number is taken, NotPermitted, CommandNotFound, CannotExecute.
    """
    foreground.find_program(wish.argv[0])
    heard_fd, tell_fd = os.pipe2(os.O_CLOEXEC)
    target: list[int] = []
    waiting: list[int] = []

    def send(number: int) -> None:
        """The command may run for moments before its number is known here."""
        waiting.append(number)
        send_waiting()

    def send_waiting() -> None:
        while target and waiting:
            with suppress(ProcessLookupError):
                os.kill(target[0], waiting.pop(0))

    with ExitStack() as stack, foreground.signals_passed(send):
        pid = os.fork()
        if pid == 0:
            stack.pop_all()
            os.close(heard_fd)
            return _Keeper(wish, started, tell_fd).keep()
        os.close(tell_fd)
        stack.callback(os.close, heard_fd)
        for word, value in _messages(heard_fd):
            if word == _NOT_EXECUTED:
                raise foreground.not_executed(wish.argv[0], value)
            if word == _ENDED:
                return value
            if background:
                return 0
            if value:
                target.append(value)
                send_waiting()
        return foreground.code_of(os.waitpid(pid, 0)[1])


_MESSAGE: Final = struct.Struct("<ci")


def _messages(fd: int) -> Iterator[tuple[bytes, int]]:
    """What the keeper tells, until it ends."""
    while len(data := os.read(fd, _MESSAGE.size)) == _MESSAGE.size:
        yield _MESSAGE.unpack(data)


# --- the keeper


class _Keeper:
    """Makes the context, waits for its end, and takes all of it back."""

    def __init__(self, wish: Wish, started: Started, tell_fd: int) -> None:
        self._wish = wish
        self._started = started
        self._tell_fd = tell_fd
        self._name = f"{_PREFIX}{os.getpid()}"
        self._folder = rundir() / self._name
        self._end: tuple[bytes, int] | None = None
        """What the front is to hear of the command's end."""

    def keep(self) -> int:
        """Returns when nothing of the context is left, for the process to end."""
        for number in foreground.PASSED_ON:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, _end_keeper)
        _sweep()
        lock_fd = take_lock(self._name)
        if lock_fd is None:
            raise ToolError(f"{self._folder}: another program holds its lock")
        (self._folder / MADE_BY_HAND).touch()
        try:
            with self._context() as (init_pid, report_fd):
                self._follow(init_pid, report_fd)
        finally:
            _remove_folder(self._folder)
            os.close(lock_fd)
            self._tell_end()  # who runs the next one finds the number free
        return 0

    @contextmanager
    def _context(self) -> Iterator[tuple[int, int]]:
        """Its process 1 as the host numbers it, and where that reports; it waits for the word."""
        with ExitStack() as stack:
            xid = self._take_number(stack)
            group = self._make_group(xid, stack)
            near, far = socket.socketpair()
            stack.callback(near.close)
            with far:
                pid = self._launch(group, far.fileno())
            stack.callback(_end, pid, group)
            self._write_down(xid, group, pid, stack)
            self._started(xid)
            near.send(b"\n")
            yield pid, near.fileno()

    def _take_number(self, stack: ExitStack) -> int:
        def note(xid: int) -> None:
            state.write_resources(self._name, state.Resources(xid))

        stack.callback(state.forget_run, self._name)
        xid = state.reserve_xid(self._name, self._wish.xid, is_taken=outside.has_group, note=note)
        stack.callback(state.release_xid, self._name, xid)
        return xid

    def _make_group(self, xid: int, stack: ExitStack) -> Group:
        """Below our own where that is kept to addresses: its sockets are to be, too."""
        base = bound.own_bound_group()
        settings = CgroupSettings()
        if base is not None:
            settings = replace(settings, base=os.fspath(base.relative_to(find_hierarchies().v2)))
        group = cgroup.create(xid, settings)
        stack.callback(group.remove, timeout_s=_END_S)
        state.write_resources(self._name, state.Resources(xid, cgroup=group.as_record()))
        return group

    def _launch(self, group: Group, report_fd: int) -> int:
        """Fork process 1, and wait until it is the stub. Raises what it failed of."""
        failure_fd, tell_fd = os.pipe2(os.O_CLOEXEC)
        program = _filter(self._wish)
        kinds = (SPACES[name] for name in self._wish.spaces if name != "time")
        pid = _fork(group, namespaces.flags_of(kinds), time="time" in self._wish.spaces)
        if pid == 0:
            os.close(failure_fd)
            _Birth(self._wish, group, program, report_fd).run(tell_fd)
        os.close(tell_fd)
        os.setsid()  # the context stays in that of the caller's terminal
        error = foreground.read_failure(failure_fd)
        os.close(failure_fd)
        if error:
            os.waitpid(pid, 0)
            raise error
        return pid

    def _write_down(self, xid: int, group: Group, pid: int, stack: ExitStack) -> None:
        held = ceiling.Ceiling(capabilities=self._wish.kept)
        stack.callback(ceiling.forget, self._name)
        ceiling.write(self._name, held)
        start = state.start_of(pid)
        state.write_state(self._name, RunState(xid, pid, start, group.path, None, "none"))

    def _follow(self, init_pid: int, report_fd: int) -> None:
        """Tell the front of the command, and stay until the context has ended."""
        data = b""
        while block := os.read(report_fd, 4096):
            data += block
            for report in stub.parse_reports(data):
                self._hear(report, init_pid)
            data = data[len(data) - len(data) % stub.REPORT.size :]
        if self._wish.is_init and self._end is None:
            self._tell(_STARTED, init_pid)
        elif _has_children(init_pid):
            self._tell_end()
        status = os.waitpid(init_pid, 0)[1]
        if self._end is None:
            self._end = _ENDED, foreground.code_of(status)

    def _hear(self, report: stub.Report, init_pid: int) -> None:
        if isinstance(report, stub.NotExecuted):
            self._end = _NOT_EXECUTED, report.errno
        elif isinstance(report, stub.Started):
            self._tell(_STARTED, _first_child(init_pid))
        elif self._end is None:
            self._end = _ENDED, foreground.code_of(report.wait_status)

    def _tell_end(self) -> None:
        if self._end is not None:
            self._tell(*self._end)

    def _tell(self, word: bytes, value: int) -> None:
        """From the first word on it is the front that has to do with the caller."""
        if self._tell_fd < 0:
            return
        _leave_stdio()
        with suppress(BrokenPipeError):
            os.write(self._tell_fd, _MESSAGE.pack(word, value))
        if word != _STARTED:
            os.close(self._tell_fd)
            self._tell_fd = -1


def _leave_stdio() -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nowhere, number)
    os.close(nowhere)


def _has_children(pid: int) -> bool:
    """Whether process 1 has something to wait for: what the command has left running."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return any(b") Z " not in Path(f"/proc/{one}/stat").read_bytes() for one in children)
    except OSError:
        return False


def _end_keeper(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(foreground.EXIT_SIGNAL + number)


def _first_child(pid: int) -> int:
    """The command, as the host numbers it; 0 where it has ended."""
    with suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
    return 0


def _filter(wish: Wish) -> bytes:
    return seccomp.cached_program(rundir() / ".filters", wish.kept) if wish.secure else b""


def _fork(group: Group, flags: int, *, time: bool) -> int:
    if not time:
        return group.fork(flags)
    own_fd = namespaces.begin_uptime()
    pid = -1
    try:
        pid = group.fork(flags)
    finally:
        if pid:
            namespaces.end_uptime(own_fd)
    return pid


def _end(pid: int, group: Group) -> None:
    """Whatever is left of the context ends with its process 1."""
    group.kill()
    with suppress(ChildProcessError):
        os.waitpid(pid, 0)


def _remove_folder(folder: Path) -> None:
    """Its name is used once: nobody waits for a lock in it."""
    with suppress(FileNotFoundError):
        for entry in (*folder.iterdir(),):
            entry.unlink()
        folder.rmdir()


def _sweep() -> None:
    """Take back what a keeper that was killed has left; its process 1 was killed with it."""
    for mark in rundir().glob(f"{_PREFIX}*/{MADE_BY_HAND}"):
        name = mark.parent.name
        lock_fd = take_lock(name)
        if lock_fd is None:
            continue
        try:
            made = state.load_resources(name)
            if made is not None:
                if made.cgroup and state.has_xid(name, made.xid):
                    group = Group.from_record(made.cgroup)
                    group.kill()
                    group.remove()
                state.release_xid(name, made.xid)
            _remove_folder(mark.parent)
        finally:
            os.close(lock_fd)


# --- process 1 of the context, until it is the stub


@dataclass(frozen=True, slots=True)
class _Birth:
    wish: Wish
    group: Group
    program: bytes
    """The system call filter; empty for none."""
    report_fd: int

    def run(self, tell_fd: int) -> NoReturn:
        doing = "begin"
        code = foreground.EXIT_FAILED
        try:
            for name, do in _STEPS:
                doing = name
                do(self)
        except ToolError as error:
            foreground.tell_failure(tell_fd, error)
            code = error.exit_code
        except OSError as error:
            kind = NotPermitted if isinstance(error, PermissionError) else ToolError
            text = f"cannot {doing}: {error.strerror or error}"
            foreground.tell_failure(tell_fd, kind(text))
        except Exception as error:  # noqa: BLE001 (a bug of ours must reach a person too)
            foreground.tell_failure(tell_fd, ToolError(f"cannot {doing}: {error!r}"))
        finally:
            os._exit(code)


def _begin(birth: _Birth) -> None:
    syscalls.set_parent_death_signal(signal.SIGKILL)
    birth.group.join_v1()


def _set_names(birth: _Birth) -> None:
    if birth.wish.hostname is not None:
        syscalls.sethostname(os.fsencode(birth.wish.hostname))
    if birth.wish.domainname is not None:
        syscalls.setdomainname(os.fsencode(birth.wish.domainname))


def _mount(birth: _Birth) -> None:
    """/proc shows the context's own processes; for a secure one as to a guest, and /sys, with the
    control groups, cannot be written to.
    """
    namespaces.receive_only()
    root_fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    if not birth.wish.secure:
        mountfd.attach(mountfd.make("proc", attributes=mountfd.QUIET), root_fd, "/proc")
        return
    blank = kernelfs.Blank()
    mountfd.attach(blank.mount_fd, root_fd, "/proc")  # below what comes
    kernelfs.mount_proc(root_fd, blank, kernelfs.ProcOptions(sets_hostname=True))
    sys_fd = os.open("/sys", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    mountcalls.mount_setattr(sys_fd, attr_set=mountcalls.MOUNT_ATTR_RDONLY, recursive=True)


def _bring_up_loopback(birth: _Birth) -> None:
    if "net" in birth.wish.spaces:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
            fcntl.ioctl(asker, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _UP))


def _leave_keyring(birth: _Birth) -> None:
    if birth.wish.secure:
        with suppress(OSError):  # a kernel without keys
            syscalls.join_session_keyring()


def _load_filter(birth: _Birth) -> None:
    if birth.program:
        seccomp.load(birth.program)


def _give_up(birth: _Birth) -> None:
    if birth.wish.secure or birth.wish.kept != frozenset(capabilities.NUMBERS):
        capabilities.limit(birth.wish.kept)


def _execute(birth: _Birth) -> None:
    path = os.path.abspath(foreground.find_program(birth.wish.argv[0]))  # noqa: PTH100 (text)
    stub.execute(
        "exec" if birth.wish.is_init else "wait",
        path,
        birth.wish.argv,
        os.environ,
        name="chcontext",
        report_fd=birth.report_fd,
    )


_STEPS: Final[tuple[tuple[str, Callable[[_Birth], None]], ...]] = (
    ("join its control groups", _begin),
    ("set its names", _set_names),
    ("mount its /proc", _mount),
    ("bring up its loopback", _bring_up_loopback),
    ("leave the caller's keyring", _leave_keyring),
    ("load its system call filter", _load_filter),  # needs CAP_SYS_ADMIN
    ("give up capabilities", _give_up),
    ("execute the command", _execute),
)
