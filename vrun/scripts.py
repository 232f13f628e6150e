"""The host's own programs for the phases of a start and a stop: scripts/ of reference 3.9.

Order of the phases: initialize, prepre-start, pre-start, post-start, pre-stop, post-stop,
postpost-stop. Of each, `scripts/PHASE` comes first, then `scripts/PHASE.d/*` by name. What is
executable is run, what is only readable is sourced by a shell of its own, so it cannot break us.
Once a script of the guest was run, those of all guests are left out for that phase, unless a
sourced one sets DONT_SKIP_DEFAULTS. All run in the monitor's mount namespace: what they mount, the
guest may see, and the host does not.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal, NoReturn

from vrun import syscalls
from vrun.errors import ConfigInvalid
from vrun.loop import Aborted, Loop
from vrun.spec import GuestSpec
from vstore.guest import LEFTOVER
from vstore.record import dataclass

Phase = Literal[
    "initialize",
    "prepre-start",
    "pre-start",
    "post-start",
    "pre-stop",
    "post-stop",
    "postpost-stop",
]

_IN_CONFIG: Final = frozenset({"initialize", "prepre-start"})
_OF_HOOK: Final = frozenset({"pre-start", "post-start", "pre-stop", "post-stop"})
_SHELLS: Final = ("/bin/bash", "/bin/sh")
_SOURCE: Final = (
    "script=$1; shift; trap '[ -z \"$DONT_SKIP_DEFAULTS\" ] || echo run >&3' EXIT; "
    'vrun_source() { . "$script"; }; vrun_source "$@"'
)
_KILLED: Final = 9
_DYING_S: Final = 2.0
"""So long is waited for what was killed: longer only what waits for a device."""
_LOOK_S: Final = 0.005


@dataclass(frozen=True, slots=True)
class Failed:
    """A script that did not end with status 0."""

    path: Path
    status: int
    """As a shell gives it: 128 + n for signal n."""

    def __str__(self) -> str:
        if self.status > 128:
            return f"{self.path} was killed by signal {self.status - 128}"
        return f"{self.path} ended with status {self.status}"


@dataclass(frozen=True, slots=True)
class Stdio:
    """Where programs of the host read and write that run for a guest."""

    stdin_fd: int
    stdout_fd: int
    stderr_fd: int

    @property
    def fds(self) -> tuple[int, int, int]:
        return (self.stdin_fd, self.stdout_fd, self.stderr_fd)


def run_phase(
    phase: Phase, spec: GuestSpec, loop: Loop, stdio: Stdio, *, xid: int | None = None
) -> Iterator[Failed]:
    """Run the scripts of the phase one after the other, and yield each that fails.

    Who stops asking ends the phase there. Raises ConfigInvalid for a folder that cannot be listed,
    Aborted with the script killed.
    """
    wants_fallback = True
    for path in _list(spec.scripts.folder, phase):
        failed, asked = _run(path, phase, spec, loop, stdio, xid)
        wants_fallback = asked
        if failed:
            yield failed
    hook = spec.scripts.hook
    if hook and phase in _OF_HOOK and os.access(hook, os.X_OK):
        failed, wants_fallback = _run(hook, phase, spec, loop, stdio, xid)
        if failed:
            yield failed
    for path in _list(spec.scripts.fallback, phase) if wants_fallback else ():
        failed, _ = _run(path, phase, spec, loop, stdio, xid)
        if failed:
            yield failed


def _list(folder: Path | None, phase: str) -> list[Path]:
    if folder is None:
        return []
    found = [folder / phase] if (folder / phase).is_file() else []
    several = folder / f"{phase}.d"
    try:
        names = sorted(os.listdir(several))  # noqa: PTH208 (names alone)
    except FileNotFoundError:
        return found
    except OSError as error:
        raise ConfigInvalid(f"{several}: cannot be listed: {error.strerror}") from error
    kept = [name for name in names if not name.startswith(".") and not LEFTOVER.search(name)]
    return found + [several / name for name in kept if (several / name).is_file()]


def _run(
    path: Path, phase: Phase, spec: GuestSpec, loop: Loop, stdio: Stdio, xid: int | None
) -> tuple[Failed | None, bool]:
    """Whether it failed, and whether it asked for the scripts of all guests too."""
    is_sourced = not os.access(path, os.X_OK)
    argv = _sourcing(path) if is_sourced else [os.fspath(path)]
    folder = spec.config if phase in _IN_CONFIG and spec.config else spec.root
    if folder.is_file():  # of an old-style guest
        folder = folder.parent
    asked_read, asked_write = os.pipe2(os.O_CLOEXEC)
    try:
        pid = loop.fork(keep=(*stdio.fds, asked_write))
        if pid == 0:
            environment = _environment(spec, xid)
            _exec([*argv, phase, spec.name], folder, environment, stdio, asked_write)
        os.close(asked_write)
        status = wait(loop, pid)
        asked = is_sourced and _can_be_read(asked_read)
    finally:
        os.close(asked_read)
    return (Failed(path, status) if status else None), asked


def _sourcing(path: Path) -> list[str]:
    shell = next(filter(os.path.exists, _SHELLS), _SHELLS[-1])
    return [shell, "-c", _SOURCE, shell, os.fspath(path)]


def _environment(spec: GuestSpec, xid: int | None) -> dict[str, str]:
    given = {
        "VSERVER_NAME": spec.name,
        "VSERVER_DIR": os.fspath(spec.config or ""),
        "VDIR": os.fspath(spec.root),
    }
    return {**os.environ, **given, **({"S_CONTEXT": str(xid)} if xid else {})}


def _exec(
    argv: list[str], folder: Path, environment: dict[str, str], stdio: Stdio, asked_fd: int
) -> NoReturn:
    """In the child: become the script, which is killed when the monitor is."""
    syscalls.set_parent_death_signal(_KILLED)
    become(argv, folder, stdio, environment=environment, more_fd=asked_fd)


def become(
    argv: list[str],
    folder: Path,
    stdio: Stdio,
    *,
    environment: dict[str, str] | None = None,
    more_fd: int | None = None,
) -> NoReturn:
    """In a child: become a program of the host; 126 or 127 where that cannot be.

    `more_fd` is its descriptor 3.
    """
    status = 126
    try:
        os.setsid()
        high = [_above(fd) for fd in (*stdio.fds, *([] if more_fd is None else [more_fd]))]
        for number, fd in enumerate(high):
            os.dup2(fd, number)
        os.chdir(folder)
        os.execve(argv[0], argv, os.environ if environment is None else environment)  # noqa: S606
    except FileNotFoundError:
        status = 127
    finally:
        os._exit(status)


def _above(fd: int) -> int:
    """A copy of the descriptor that none of 0 to 3 is, closed at exec."""
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)


def wait(loop: Loop, pid: int) -> int:
    """The exit status of a child that has called become(), 128 + n for signal n.

    Raises Aborted, with the program killed.
    """
    try:
        status = loop.wait_child(pid)
    except BaseException:
        _end(loop, pid)
        raise
    code = os.waitstatus_to_exitcode(status or 0)
    return 128 - code if code < 0 else code


def _end(loop: Loop, pid: int) -> None:
    """Kill the script, and all that it has started and that has not left its session."""
    # It is the first of a session of its own, or will be in a moment.
    for kill in (os.killpg, os.kill, os.killpg):
        with suppress(ProcessLookupError):
            kill(pid, _KILLED)
    deadline = time.monotonic() + _DYING_S
    with suppress(Aborted):
        loop.wait_child(pid, deadline=deadline)
        loop.wait(lambda: _is_empty(pid), deadline=deadline, every=_LOOK_S)


def _is_empty(group: int) -> bool:
    """Whether no process is in the group any more, not even a dead one."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def _can_be_read(fd: int) -> bool:
    """Whether something was written, while a child of the script may still hold the other end."""
    os.set_blocking(fd, False)
    try:
        return bool(os.read(fd, 16))
    except BlockingIOError:
        return False
