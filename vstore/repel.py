"""Turning away whoever waits in a lease to write to a frozen inode: the end of an attack.

It passed the check of the immutable flag while the inode was thawed. A process of a guest is
killed; any other is stopped and continued, so that its call starts anew and meets the flag.
"""

import logging
import os
import signal
import time
from contextlib import suppress
from itertools import pairwise
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
_ALL_FDS: Final = 1 << 20
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
    """Kill those of guests, have the others begin anew, wait until none of them waits."""
    handles = _open_handles(pids[:_AT_ONCE])
    try:
        # A pid may have come to mean another process before its handle was opened.
        waiting = handles.keys() & set(lease.find_waiters(fd))
        attacks = {pid: _look_at(pid) for pid in waiting}
        for pid, attack in attacks.items():
            if attack.is_guest and _send(handles[pid], signal.SIGKILL):
                met[pid] = attack
        others = {pid: handles[pid] for pid, attack in attacks.items() if not attack.is_guest}
        if others:
            _restart_elsewhere(fd, others, deadline)
            met.update({pid: attacks[pid] for pid in others})
        _wait_for(fd, waiting - others.keys(), deadline)  # those may have come again
    finally:
        for handle in handles.values():
            os.close(handle)


def _restart_elsewhere(fd: int, handles: dict[int, int], deadline: float) -> None:
    """Stop processes until they do not wait any more, by a process of its own, which has nothing
    but them and the lease: they go on though this one is killed meanwhile.
    """
    child = os.fork()
    if child:
        with suppress(ChildProcessError):
            os.waitpid(child, 0)
        return
    try:
        kept = sorted([fd, *handles.values()])
        for low, high in pairwise([-1, *kept, _ALL_FDS]):
            os.closerange(low + 1, high)
        for handle in handles.values():
            _send(handle, signal.SIGSTOP)
        _wait_for(fd, set(handles), deadline)
    finally:
        for handle in handles.values():
            _send(handle, signal.SIGCONT)
        os._exit(0)


def _send(handle: int, number: int) -> bool:
    try:
        signal.pidfd_send_signal(handle, number)
    except ProcessLookupError:
        return False
    return True


def _wait_for(fd: int, pids: set[int], deadline: float) -> None:
    while pids & set(lease.find_waiters(fd)) and time.monotonic() < deadline:
        time.sleep(_PAUSE_S)


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
