"""The end of a guest, asked for by a command or its own: what is done, in which order.

ASKING ends what runs inside, first as the guest itself would, then with signals. What is left is
killed by force. ENDING takes back what the guest has outside. Nothing that fails holds up the rest.
See reference 9.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from vrun import firstprocess, outside, styles
from vrun.cgroup import Group
from vrun.context import Context
from vrun.errors import ToolError
from vrun.launch import reason_of
from vrun.loop import Aborted

_FORCE_WAIT_S: Final = 10.0
_POLL_S: Final = 0.05
_LOOK_S: Final = 0.01
"""How often is looked at what no descriptor tells: signal masks, and who is left."""
_DEAF_S: Final = 0.5
"""An init that does not hear a signal at this age never will; before, it may just begin."""

_Step = tuple[str, Callable[[Context], object]]


def ask(context: Context) -> None:
    """Have the guest end, the gentle ways first; it may run on afterwards. Warns of failures."""
    for name, do in ASKING:
        if context.is_alive:
            _try(name, do, context)


def end(context: Context) -> list[int]:
    """End by force what runs still, and take back what the guest has outside itself.

    Gives the processes that not even that has ended: they wait for a device, or a file server that
    is gone. Warns of failures.
    """
    left: list[int] = []
    _try("end its processes", lambda run: left.extend(_kill_by_force(run)), context)
    for name, do in ENDING:
        _try(name, do, context)
    return left


def clean(context: Context) -> None:
    """Take back what a run left that nobody ended: no scripts are run. Warns of failures."""
    _try("find its cgroups", outside.find_groups, context)
    _try("end its processes", _kill_by_force, context)
    for name, do in CLEANING:
        _try(name, do, context)


# --- asking


def _run_pre_stop(context: Context) -> None:
    context.run_scripts("pre-stop", strict=False)


def _ask_init(context: Context) -> None:
    """Run the guest's stop command, or send its init the signal that stands for it, and wait."""
    deadline = time.monotonic() + context.spec.helper.stop_timeout_s
    program = styles.stop_program(context.spec, context.order.rescue, context.resolve)
    if program is None:
        number = styles.stop_signal(context.spec, context.resolve)
        context.loop.wait(
            lambda: context.init_hears(number) or not context.is_alive or context.age_s() > _DEAF_S,
            every=_LOOK_S,
        )
        if not context.init_hears(number):
            return
        context.signal_init(number)
    else:
        _run_inside(context, program, deadline)
    if not _wait_for_end(context, deadline):
        context.audience.warn(
            f"guest {context.spec.name}: has not stopped within "
            f"{context.spec.helper.stop_timeout_s} s and is killed now"
        )


def _run_stop_sync(context: Context) -> None:
    """apps/init/cmd.stop-sync waits inside for whatever it is to wait for."""
    if context.spec.init.cmd_stop_sync and not context.order.rescue:
        deadline = time.monotonic() + context.spec.helper.stop_timeout_s
        _run_inside(context, styles.Program(context.spec.init.cmd_stop_sync), deadline)


def _run_inside(context: Context, program: styles.Program, deadline: float) -> None:
    status = firstprocess.run_inside(context, program, deadline=deadline)
    if status is None:
        context.audience.warn(f"{program.argv[0]}, which stops it, takes too long")
    elif status and context.is_alive:
        context.audience.warn(f"{program.argv[0]}, which stops it, ended with status {status}")


def _send_kill_signals(context: Context) -> None:
    """The signals of apps/init/killseq, each to the guest's init and then to all of it."""
    sent: int | None = None
    for wait_s, number in context.spec.init.kill_signals:
        if _wait_for_end(context, time.monotonic() + wait_s, sent=sent):
            return
        if number == signal.SIGKILL:
            return  # what follows anyway
        context.signal_init(number)
        context.signal_all(number)
        sent = number


def _wait_for_end(context: Context, deadline: float, *, sent: int | None = None) -> bool:
    """Whether the guest's init ends by then.

    Does not wait for an init that is alone and has not even heard the signal `sent`.
    """

    def is_over() -> bool:
        is_deaf = sent and context.is_alone() and not context.init_hears(sent)
        return not context.is_alive or bool(is_deaf)

    context.loop.wait(is_over, deadline=deadline, every=_LOOK_S if sent else None)
    return not context.is_alive


def _kill_by_force(context: Context) -> list[int]:
    context.signal_init(signal.SIGKILL)  # where there is no cgroup.kill
    if context.group is None:
        return []
    context.group.kill()
    with _watched(context, context.group):
        deadline = time.monotonic() + _FORCE_WAIT_S
        context.loop.wait(lambda: not context.processes(), deadline=deadline, every=_POLL_S)
    return context.processes()


@contextmanager
def _watched(context: Context, group: Group) -> Iterator[None]:
    """Waits look again when the last process of the guest has ended."""
    try:
        fd = group.open_events()
    except OSError:  # the group is gone
        yield
        return
    context.loop.watch_alarms(fd, lambda: None)
    try:
        yield
    finally:
        context.loop.unwatch(fd)
        os.close(fd)


# --- ending


def _run_post_stop(context: Context) -> None:
    context.run_scripts("post-stop", strict=False)


def _run_postpost_stop(context: Context) -> None:
    context.run_scripts("postpost-stop", strict=False)


def _try(name: str, do: Callable[[Context], object], context: Context) -> None:
    try:
        do(context)
    except Aborted:
        raise
    except (OSError, ToolError) as error:
        context.audience.warn(f"guest {context.spec.name}: cannot {name}: {reason_of(error)}")


ASKING: Final[tuple[_Step, ...]] = (
    ("run its scripts pre-stop", _run_pre_stop),
    ("ask it to stop", _ask_init),
    ("wait as its cmd.stop-sync says", _run_stop_sync),
    ("send it signals", _send_kill_signals),
)

CLEANING: Final[tuple[_Step, ...]] = (
    ("forget that it runs", firstprocess.forget_state),
    ("remove its addresses", outside.remove_addresses),
    ("remove its cgroups", outside.remove_groups),
    ("give its number back", outside.give_number_back),
)

ENDING: Final[tuple[_Step, ...]] = (
    CLEANING[0],
    ("run its scripts post-stop", _run_post_stop),
    CLEANING[1],
    ("run its scripts postpost-stop", _run_postpost_stop),
    *CLEANING[2:],
)
