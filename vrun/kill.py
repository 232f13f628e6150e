"""Signals to processes of a context, and never to a process of another one.

A number can mean another process from one moment to the next: each process is held by a descriptor
(pidfd_open(2)) before its context is looked at, and the signal is sent to the descriptor.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from vrun.cgroup import Group
from vrun.errors import ToolError, WrongUsage
from vrun.membership import HOST, Contexts, Member

ALL, ALL_BUT_INIT, INIT = 0, -1, 1
"""What these numbers mean for a context, as with the original's system call."""
_ROUNDS: Final = 100
"""So often processes that appeared meanwhile are looked for."""


def parse_signal(text: str) -> int:
    """A number, or a name with or without SIG, in any case. Raises WrongUsage."""
    if text.isdecimal() and (text == "0" or int(text) in signal.valid_signals()):
        return int(text)
    name = text.upper().removeprefix("SIG")
    for prefix in ("SIG", "SIGRT"):
        found = getattr(signal, f"{prefix}{name}", None)
        if isinstance(found, signal.Signals):
            return int(found)
    raise WrongUsage(f"{text!r} is no signal", hint="kill -l lists them")


def send(contexts: Contexts, member: Member | None, pid: int, number: int) -> None:
    """Send a signal to a process: of `member`, which must be its context, or of any where that is
    None. With a context ALL, ALL_BUT_INIT and INIT mean what they say.

    Raises ToolError where there is no such process, or it is in another context.
    """
    if member is not None and pid in (ALL, ALL_BUT_INIT):
        _send_all(contexts, member, number, spare_init=pid == ALL_BUT_INIT)
        return
    if member is not None and pid == INIT:
        pid = _init_of(member)
    if pid <= 0:
        raise WrongUsage(f"{pid}: means processes of a context, and none is named", hint="--xid X")
    try:
        with _held(pid) as fd:
            _check_context(contexts, member, pid)
            signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        raise ToolError(f"there is no process {pid}") from None


def _init_of(member: Member) -> int:
    if not member.init_pid:
        raise ToolError(f"context {member.xid}: has no process 1 just now")
    return member.init_pid


def _check_context(contexts: Contexts, member: Member | None, pid: int) -> None:
    xid = contexts.xid_of(pid)
    if xid is None:
        raise ProcessLookupError
    if member is not None and xid != member.xid:
        where = "on the host" if xid == HOST else f"in context {xid}"
        raise ToolError(f"process {pid} is {where}, not in context {member.xid}")


@contextmanager
def _held(pid: int) -> Iterator[int]:
    try:
        fd = os.pidfd_open(pid)
    except OSError as error:
        raise ProcessLookupError(error.errno, error.strerror) from error
    try:
        yield fd
    finally:
        os.close(fd)


def _send_all(contexts: Contexts, member: Member, number: int, *, spare_init: bool) -> None:
    """To each process of it, those that it forks meanwhile too; SIGKILL by the kernel at once.

    Raises ToolError where there is none.
    """
    group = Group(member.group)
    if number == signal.SIGKILL and not spare_init:
        if not group.is_populated():
            raise ToolError(f"context {member.xid}: has no process")
        group.kill()
        return
    sent = set[int]()
    for _ in range(_ROUNDS):
        new = set(group.pids()) - sent
        if spare_init:
            new.discard(member.init_pid)
        if not new:
            break
        for pid in new:
            _send_to_member(contexts, member, pid, number)
        sent |= new
    if not sent:
        raise ToolError(f"context {member.xid}: has no such process")


def _send_to_member(contexts: Contexts, member: Member, pid: int, number: int) -> None:
    """Unless the number has come to mean a process elsewhere."""
    with suppress(ProcessLookupError), _held(pid) as fd:
        if contexts.xid_of(pid) == member.xid:
            signal.pidfd_send_signal(fd, number)
