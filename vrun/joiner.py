"""The process that goes from the host into a guest, one step after the other, and runs a command.

It is our interpreter inside the guest's mount namespace, so it loads nothing there, neither modules
nor libraries, and never shows a traceback: all of that would come from files of the guest.
"""

import errno
import os
import stat
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final, NoReturn

from vrun import capabilities, limits, namespaces, seccomp, stub, syscalls
from vrun.cgroup import Group
from vrun.control import Connection
from vrun.errors import ToolError
from vrun.spec import GuestSpec
from vrun.users import User
from vstore.record import dataclass

EXIT_FAILED: Final = 125
EXIT_CANNOT_EXECUTE: Final = 126
EXIT_NOT_FOUND: Final = 127


@dataclass(frozen=True, slots=True)
class Target:
    """A running guest, held by descriptors so that no number can mean another process."""

    name: str
    init_fd: int
    """A pidfd of its init."""
    root_fd: int
    """The root of its init, O_PATH."""
    spaces: frozenset[str]
    """The namespaces that it does not share with us."""
    group: Group
    init_group: Path
    """The folder of its init's own v2 group: the guest may have made some."""
    limits: GuestSpec
    """Only what limits.apply() looks at counts."""
    oom_score_adj: int
    """Its init's."""
    kept: frozenset[str]
    """The capabilities of its ceiling that its init has not given up."""
    program: bytes
    """The system call filter."""
    notifying: bytes = b""
    """The filter of copy-on-write links; empty where the guest shares no files."""
    monitor: Connection | None = None
    """To the guest's monitor, which has those calls served."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the command was not run."""

    code: int
    """One of EXIT_*."""
    message: str
    """Worded as what the guest has or what cannot be done with it."""


@dataclass(frozen=True, slots=True)
class Joiner:
    """All that the forked process needs; it only ever ends, or becomes the stub."""

    target: Target
    user: User
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    inner: tuple[int, int, int]
    """What becomes descriptors 0, 1 and 2; none of them is one of these."""
    report_fd: int
    """For the stub, see stub.execute()."""

    def become(self, failure_fd: int) -> NoReturn:
        """Take what the guest's processes have, and become the stub that runs the command.

        What goes wrong is written to `failure_fd`, for parse_failure(); end of file is success.
        """
        failure = Failure(EXIT_FAILED, "cannot be joined")
        doing = "make the program that starts it"
        try:
            stub_fd = stub.open_sealed("join")  # while all files are the host's
            doing = "leave the caller's session"
            os.setsid()
            for number, fd in enumerate(self.inner):
                os.dup2(fd, number)
            for step, take in _STEPS:
                doing = step
                take(self)
            path = find_program(self.argv[0], self.environment["PATH"])
            doing = f"execute {path}"
            stub.execute(
                "join",
                path,
                self.argv,
                self.environment,
                name="vserver",
                report_fd=self.report_fd,
                stub_fd=stub_fd,
            )
        except NotExecutable as error:
            failure = Failure(error.code, f"{error}")
        except OSError as error:
            failure = Failure(EXIT_FAILED, f"cannot {doing}: {error.strerror}")
        except (ToolError, ImportError, ValueError, MemoryError) as error:
            failure = Failure(EXIT_FAILED, f"cannot {doing}: {error}")
        finally:
            _end(failure, failure_fd)


def _end(failure: Failure, failure_fd: int) -> NoReturn:
    """Tell why, and never go back into the program that forked us."""
    try:
        os.write(failure_fd, os.fsencode(f"{failure.code}\0{failure.message}"))
    finally:
        os._exit(EXIT_FAILED)


def parse_failure(data: bytes) -> Failure | None:
    """What Joiner.become() has written; None for nothing."""
    if not data:
        return None
    code, _, message = os.fsdecode(data).partition("\0")
    return Failure(int(code), message)


class _NoImports:
    """Finds no module: inside the guest, sys.path leads to files of the guest."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> NoReturn:
        raise ImportError(f"module {name} is not loaded inside a guest")


def _enter_cgroup(joiner: Joiner) -> None:
    """The guest's top group, unless it has handed its controllers on to groups below: then that
    one can hold no process (cgroup-v2.rst, "no internal process constraint").
    """
    try:
        joiner.target.group.join()
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        (joiner.target.init_group / "cgroup.procs").write_text("0")


def _take_limits(joiner: Joiner) -> None:
    """Those of the guest; what the caller may have had set for itself is not handed on."""
    if os.sched_getscheduler(0) != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    syscalls.personality(0)
    limits.apply(joiner.target.limits)
    _lose_protection(joiner.target.oom_score_adj)


def _lose_protection(of_init: int) -> None:
    """Not be spared by the OOM killer where the guest's init would not be."""
    path = Path("/proc/self/oom_score_adj")
    if int(path.read_text()) < of_init:
        path.write_text(str(of_init))


def _enter_namespaces(joiner: Joiner) -> None:
    """From here on files are the guest's: nothing is imported, and no core is dumped among them."""
    sys.meta_path[:] = [_NoImports()]
    syscalls.refuse_core_dumps()
    own_fd = os.open("/proc/self/ns", os.O_RDONLY | os.O_DIRECTORY)
    before = _spaces_of(own_fd)
    namespaces.join(joiner.target.init_fd, joiner.target.spaces)
    after = _spaces_of(own_fd)
    os.close(own_fd)
    if any(old == new for old, new in zip(before, after, strict=True)):
        raise OSError(errno.ESTALE, "its init has left them")


def _spaces_of(ns_fd: int) -> tuple[int, ...]:
    """The mount namespace of this process and the pid namespace of its children to come."""
    return tuple(os.stat(name, dir_fd=ns_fd).st_ino for name in ("mnt", "pid_for_children"))


def _enter_root(joiner: Joiner) -> None:
    """The root of the guest's init, which may be another one than its mount namespace's.

    It must be inside of that: getcwd(2) says when a folder cannot be reached.
    """
    os.fchdir(joiner.target.root_fd)
    if not os.getcwdb().startswith(b"/"):  # noqa: PTH109 (bytes)
        raise OSError(errno.EXDEV, "the root of its init is outside of its mount namespace")
    os.chroot(".")
    os.chdir("/")
    os.umask(0o022)


def _take_keyring(joiner: Joiner) -> None:
    with suppress(OSError):  # a kernel without keys
        syscalls.join_session_keyring()


def _load_filter(joiner: Joiner) -> None:
    target = joiner.target
    if target.monitor is not None:
        from vrun.cow import notifyfilter  # whoever forked us has loaded it

        listener_fd = notifyfilter.load(target.notifying)
        target.monitor.send("listener", fds=(listener_fd,))
        os.close(listener_fd)
        if target.monitor.receive() != ["end", "0", "", ""]:
            raise ToolError("its monitor does not serve its shared files")
    seccomp.load(target.program)


def _become_user(joiner: Joiner) -> None:
    user = joiner.user
    identity = capabilities.Identity(user.uid, user.gid, user.groups)
    capabilities.limit(joiner.target.kept, become=identity)


_STEPS: Final[tuple[tuple[str, Callable[[Joiner], None]], ...]] = (
    ("enter its cgroup", _enter_cgroup),
    ("take its limits", _take_limits),  # by way of the host's /proc
    ("enter its namespaces", _enter_namespaces),  # children only: its pid namespace
    ("enter its root", _enter_root),
    ("leave the caller's keyring", _take_keyring),
    ("load its system call filter", _load_filter),  # needs CAP_SYS_ADMIN
    ("take its capabilities and the user", _become_user),
)


class NotExecutable(Exception):
    """The command cannot be run: an exit code and why."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def find_program(command: str, search: str) -> str:
    """The path of a command: itself if it has a slash, else the first in the folders of `search`.

    Called with the root and the rights that the command will have. Raises NotExecutable.
    """
    if "/" in command:
        return _checked(command)
    refused = NotExecutable(EXIT_NOT_FOUND, f"has no command {command}")
    for folder in search.split(":"):
        try:
            return _checked(f"{folder}/{command}")
        except NotExecutable as error:
            if error.code != EXIT_NOT_FOUND:
                refused = error
    raise refused


def _checked(path: str) -> str:
    try:
        status = os.stat(path)  # noqa: PTH116 (text of the guest's, no Path)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not os.access(path, os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (FileNotFoundError, NotADirectoryError):
        raise NotExecutable(EXIT_NOT_FOUND, f"has no {path}") from None
    except OSError as error:
        reason = f"cannot execute {path}: {error.strerror}"
        raise NotExecutable(EXIT_CANNOT_EXECUTE, reason) from None
    return path
