"""The cgroup v2 freezer:

a running guest held still for some milliseconds. See cgroups(7), cgroup-v2.rst.
"""

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

TIMEOUT_S: Final = 0.03
TRIES: Final = 5
BREATH_S: Final = 0.05
"""How long a guest runs before it is tried again."""
_ORDINARY: Final = (os.SCHED_OTHER, os.SCHED_BATCH, os.SCHED_IDLE)


@contextmanager
def opened(cgroup: str) -> Iterator[int]:
    """The cgroup's `cgroup.freeze`, open for writing, and for one holder at a time, so that none
    ends another's freeze.

    Who opens several takes them in the order of their paths. Raises OSError.
    """
    fd = os.open(Path(cgroup, "cgroup.freeze"), os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)  # a copy of the descriptor would keep the lock
        os.close(fd)


def is_frozen(fd: int) -> bool:
    """Whether the cgroup of the `cgroup.freeze` behind `fd` is told to be frozen.

    Where `opened` gave the descriptor that can only be the administrator's wish. False where the
    cgroup is gone.
    """
    try:
        return os.pread(fd, 8, 0).strip() == b"1"
    except OSError:
        return False


@contextmanager
def frozen(cgroup: str, fd: int) -> Iterator[bool]:
    """Hold every process of `cgroup` still; `fd` is its open `cgroup.freeze`, from `opened`.

    Yields False when they did not all stop within TIMEOUT_S, or the cgroup is gone. A cgroup that
    was frozen before stays so.
    """
    was_frozen = is_frozen(fd)
    with _before_others():
        try:
            yield _freeze(cgroup, fd)
        finally:
            if not was_frozen:
                with suppress(OSError):  # gone
                    os.write(fd, b"0")


def hold(cgroup: str, fd: int, stack: ExitStack, *, tries: int = TRIES) -> bool:
    """Hold the processes of `cgroup` still until the stack unwinds; `fd` as for `frozen`.

    Between two tries they run for a while. Returns whether they stand still.
    """
    for turn in range(tries):
        if turn:
            time.sleep(BREATH_S)
        attempt = ExitStack()
        with suppress(OSError):
            if attempt.enter_context(frozen(cgroup, fd)):
                stack.push(attempt)
                return True
        with suppress(OSError):
            attempt.close()
    return False


@contextmanager
def _before_others() -> Iterator[None]:
    """Nothing that wants this thread's core meanwhile makes a guest stand still for longer, however
    nice the command was told to be. See sched(7).
    """
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        if policy in _ORDINARY:
            urgent = os.SCHED_RR | os.SCHED_RESET_ON_FORK
            os.sched_setscheduler(0, urgent, os.sched_param(1))
    except OSError as error:
        log.debug("no better priority while a guest stands still: %s", error)
    try:
        yield
    finally:
        if policy in _ORDINARY:
            with suppress(OSError):
                os.sched_setscheduler(0, policy, parameters)


def thaw(cgroup: str) -> None:
    """Let a guest go on that a killed program left frozen, when no other program works on it."""
    with suppress(OSError), opened(cgroup) as fd:
        os.write(fd, b"0")


def _freeze(cgroup: str, fd: int) -> bool:
    try:
        os.write(fd, b"1")
        return _wait(Path(cgroup, "cgroup.events"))
    except OSError:
        return False


def _wait(events: Path) -> bool:
    deadline = time.monotonic() + TIMEOUT_S
    while "frozen 1" not in events.read_text().splitlines():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.0002)
    return True
