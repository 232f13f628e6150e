"""How a guest's run ended, and what is to be done about it; see reference 11."""

import os
import signal
from typing import Final

from vrun.spec import Helper
from vrun.state import Ended

_RESTARTED: Final = -signal.SIGHUP
_HALTED: Final = -signal.SIGINT
_EVENTS: Final = {"restarted": "restart", "halted": "halt"}


def describe(status: int | None, *, was_asked: bool, is_ours: bool = True) -> Ended:
    """What the wait status of a guest's first process means; None is an unknown one.

    Of a process that is not ours the kernel does not tell a reboot from SIGKILL.

    The kernel lets process 1 of a pid namespace in which reboot(2) was called end as if a signal
    had killed it: SIGHUP for a restart, SIGINT for halt and power off. See reboot(2).
    """
    code = None if status is None else os.waitstatus_to_exitcode(status)
    if was_asked:
        return Ended("stopped", code, "was stopped")
    if code is None or (code == -signal.SIGKILL and not is_ours):
        text = "has ended, was rebooted or halted, and its first monitor was not there to know"
        return Ended("unknown", None, text)
    if code == _RESTARTED:
        return Ended("restarted", None, "was rebooted from inside")
    if code == _HALTED:
        return Ended("halted", None, "was halted from inside")
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return Ended("killed", -code, f"its init was killed by {name}")
    return Ended("exited", code, f"its init ended with status {code}")


def wants_restart(ended: Ended, helper: Helper) -> bool:
    """Whether the guest is to be started again."""
    return (
        ended.how == "restarted"
        and not helper.disabled
        and helper.action == "restart"
        and end_program(ended, helper) is None
    )


def end_program(ended: Ended, helper: Helper) -> list[str] | None:
    """The administrator's program that is run in the place of our own answer, and the event."""
    if helper.disabled or ended.how in ("stopped", "failed"):
        return None
    event = _EVENTS.get(ended.how, "shutdown")
    program = dict(helper.programs).get(event, helper.method)
    return [os.fspath(program), event] if program else None


def startup_program(helper: Helper) -> list[str] | None:
    """The administrator's program for the event of a start."""
    program = None if helper.disabled else dict(helper.programs).get("startup")
    return [os.fspath(program), "startup"] if program else None
