"""Start and stop guests, as commands see it: by way of the guest's monitor, whoever was killed.

A guest's lock is held by its monitor. Where the lock can be had there is no monitor: the guest is
stopped, or its monitor was killed and it runs on, or the two were killed and something is left.
"""

import os
import time
from collections.abc import Callable
from typing import Final

from vrun import control, fence, state
from vrun.control import Connection, Outcome
from vrun.errors import ToolError
from vrun.order import Order, Task
from vrun.state import find_running
from vstore.guest import Guest, RunState, take_lock
from vstore.record import dataclass

LOCK_WAIT_S: Final = 300.0
"""How long a command waits for another that starts, stops or works on the guest."""

_POLL_S: Final = 0.01


@dataclass(frozen=True, slots=True)
class Hearer:
    """What is done with what a monitor tells."""

    say: Callable[[str], None]
    warn: Callable[[str], None]
    out: Callable[[bytes], None]
    """Gets what the guest's console shows while its init scripts run."""


def start(guest: Guest, order: Order, hearer: Hearer) -> None:
    """Start the guest; returns when its init runs, warns where it runs already.

    Raises ToolError for what failed, with all of it undone.
    """
    connection = begin_start(guest, order, hearer)
    if connection is not None:
        finish(guest, connection, hearer)


def begin_start(guest: Guest, order: Order, hearer: Hearer) -> Connection | None:
    """As `start`, without waiting: `finish` does. None where nothing is to be done."""
    lock_fd, running = _take_lock_or_find(guest.name)
    if lock_fd is None:
        hearer.warn(f"guest {guest.name}: runs already")
        return None
    if running:
        hearer.warn(f"guest {guest.name}: runs already; its monitor was gone and is replaced")
        return _fork_monitor(guest, "adopt", order, lock_fd)
    return _fork_monitor(guest, "start", order, lock_fd)


def stop(guest: Guest, order: Order, hearer: Hearer) -> None:
    """Stop the guest; returns when it is gone. Warns where it does not run.

    Raises ToolError where processes of it cannot be ended.
    """
    while True:
        connection = control.connect(guest.name)
        if connection is not None:
            connection.send("stop", fds=(1, 2))
            if finish(guest, connection, hearer, is_stop=True):
                return
            continue  # the monitor was killed meanwhile
        lock_fd, running = _take_lock_or_find(guest.name, wants_lock=True)
        if lock_fd is not None:
            _stop_without_monitor(guest, order, hearer, lock_fd, running)
            return


def _stop_without_monitor(
    guest: Guest, order: Order, hearer: Hearer, lock_fd: int, running: RunState | None
) -> None:
    if running:
        connection = _fork_monitor(guest, "stop", order, lock_fd)
        finish(guest, connection, hearer)
        return
    hearer.warn(f"guest {guest.name}: does not run")
    clean(guest, hearer, lock_fd)


def clean(guest: Guest, hearer: Hearer, lock_fd: int) -> None:
    """Take back what a run left that was killed together with its monitor; ends with the lock."""
    if has_leftovers(guest.name):
        finish(guest, _fork_monitor(guest, "clean", Order(), lock_fd), hearer)
        return
    try:
        fence.release(guest)
    finally:
        os.close(lock_fd)


def has_leftovers(name: str) -> bool:
    """Whether something is to be undone, where the guest does not run and the lock is ours."""
    return state.load_resources(name) is not None


def tidy(guest: Guest, hearer: Hearer) -> None:
    """`clean`, where the guest does not run and nobody works on it; else nothing."""
    if has_leftovers(guest.name) and (lock_fd := take_lock(guest.name)) is not None:
        if find_running(guest.name) is None:
            clean(guest, hearer, lock_fd)
        else:
            os.close(lock_fd)


def _fork_monitor(guest: Guest, task: Task, order: Order, lock_fd: int) -> Connection:
    from vrun import monitor  # 15 ms that a command to a monitor which is there need not pay

    return monitor.fork(guest, task, order, lock_fd)


def finish(guest: Guest, connection: Connection, hearer: Hearer, *, is_stop: bool = False) -> bool:
    """Hear what the guest's monitor tells, to its last word; raises ToolError if that is a failure.

    Without a last word the monitor was killed: False if `is_stop`, else a ToolError too.
    """
    try:
        outcome = control.hear(connection, say=hearer.say, warn=hearer.warn, out=hearer.out)
    finally:
        connection.close()
    if outcome is None and is_stop:
        return False
    (outcome or _killed(guest)).check()
    return True


def _killed(guest: Guest) -> Outcome:
    return Outcome(
        1,
        f"guest {guest.name}: its monitor was killed",
        f"vserver {guest.name} status says what is left; start and stop both find it",
    )


def _take_lock_or_find(
    name: str, *, wants_lock: bool = False
) -> tuple[int | None, RunState | None]:
    """The guest's lock if it can be had, and its state if it runs.

    Waits while another command has the lock and the guest does not run; with `wants_lock` also
    while it does, but only until its monitor can be asked.
    """
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        lock_fd = take_lock(name)
        running = find_running(name)
        if lock_fd is not None or (running and not wants_lock):
            return lock_fd, running
        if wants_lock and control.is_listening(name):
            return None, running
        if time.monotonic() > deadline:
            raise ToolError(
                f"guest {name}: another program starts, stops or works on it",
                hint="run the command again when that is done",
            )
        time.sleep(_POLL_S)
