"""Turning away whoever waits in a lease to write to a frozen inode: the end of an attack.

It passed the check of the immutable flag while the inode was thawed. A process of a guest is
killed; any other is stopped and continued, so that its call starts anew and meets the flag.
"""

import logging
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from vstore import lease
from vstore.errors import PoolBusy
from vstore.record import dataclass

log = logging.getLogger(__name__)

_TIMEOUT_S: Final = 20.0
_PART_OF_BREAK_TIME: Final = 0.45
_AT_ONCE: Final = 500  # waiters, each of which takes a descriptor
_PAUSE_S: Final = 0.001
_REPORTED: Final = 20  # attacks at once that have a line of the log each


@dataclass(frozen=True, slots=True)
class Attack:
    """Somebody who wanted to write to a shared inode inside a window."""

    pid: int
    command: str
    is_guest: bool


def find_timeout_s() -> float:
    """How long waiters are fought: well below the time after which the kernel lets them in."""
    break_time_s = lease.break_time_s()
    return min(_TIMEOUT_S, break_time_s * _PART_OF_BREAK_TIME) if break_time_s else _TIMEOUT_S


def repel_writers(fd: int) -> list[Attack]:
    """Turn everybody away who waits to write to the frozen inode behind `fd`, whose lease we hold.

    Raises PoolBusy when some cannot be turned away in time: the lease must then not be given up.
    """
    met: dict[int, Attack] = {}
    deadline = time.monotonic() + find_timeout_s()
    while pids := lease.find_waiters(fd):
        if time.monotonic() > deadline:
            raise PoolBusy(
                f"processes {_show_pids(pids)} wait to write to a shared file "
                "and cannot be turned away",
                hint="end them; the next run looks at the file again",
            )
        _turn_away(fd, pids, met, deadline)
    _report(list(met.values()))
    return list(met.values())


def _report(attacks: list[Attack]) -> None:
    for attack in attacks[:_REPORTED]:
        log.warning(
            "attack: process %d (%s) tried to open a shared file for writing inside a window; %s",
            attack.pid,
            attack.command,
            "killed" if attack.is_guest else "turned away",
        )
    if len(attacks) > _REPORTED:
        log.warning("attack: so did %d more processes", len(attacks) - _REPORTED)


def _show_pids(pids: list[int]) -> str:
    return ", ".join(map(str, pids[:5])) + (f" and {len(pids) - 5} more" if len(pids) > 5 else "")


def _turn_away(fd: int, pids: list[int], met: dict[int, Attack], deadline: float) -> None:
    """Signal all, wait until none of them waits in the lease, let those go on that were stopped."""
    handles = _open_handles(pids[:_AT_ONCE])
    try:
        # A pid may have come to mean another process before its handle was opened.
        waiting = handles.keys() & set(lease.find_waiters(fd))
        for pid in waiting:
            attack = _look_at(pid)
            with suppress(ProcessLookupError):
                number = signal.SIGKILL if attack.is_guest else signal.SIGSTOP
                signal.pidfd_send_signal(handles[pid], number)
                met[pid] = attack
        while waiting & set(lease.find_waiters(fd)) and time.monotonic() < deadline:
            time.sleep(_PAUSE_S)
    finally:
        for pid, handle in handles.items():
            if pid in met and not met[pid].is_guest:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(handle, signal.SIGCONT)
            os.close(handle)


def _open_handles(pids: list[int]) -> dict[int, int]:
    handles: dict[int, int] = {}
    for pid in pids:
        with suppress(OSError):  # gone already, or no descriptor is left: it has its turn later
            handles[pid] = os.pidfd_open(pid)
    return handles


def _look_at(pid: int) -> Attack:
    return Attack(pid, _read_proc(pid, "comm"), "/vservers/" in _read_proc(pid, "cgroup"))


def _read_proc(pid: int, name: str) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace").strip()
    return "?"
