"""The start of a guest: what is done, in which order, and what undoes it.

Two lists, one for each process. The monitor makes what the guest has outside itself (STEPS), and
the guest's process 1 makes itself what the guest may be (INIT_STEPS), with the filter before the
capabilities: without CAP_SYS_ADMIN a filter could only be loaded under no_new_privs, and su would
not work inside.
"""

from collections.abc import Callable
from functools import partial
from typing import Final

from vrun import birth, firstprocess, outside, protection
from vrun.context import Context
from vrun.errors import ToolError
from vstore.record import dataclass


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the monitor; a failure reads "cannot {name}: reason"."""

    name: str
    do: Callable[[Context], None]
    undo: Callable[[Context], None] | None = None
    """Takes back what the step made, all of it or a part, or nothing."""


INIT_STEPS: Final[tuple[birth.Step, ...]] = (
    ("join its cgroups", birth.join_groups),
    ("enter its network", birth.enter_network),
    ("set its host name", birth.set_names),
    ("make the program that executes its init", birth.make_stub),
    ("mount its root", birth.mount_root),
    ("set its limits", birth.take_limits),
    ("leave the caller's keyring", birth.leave_keyring),
    ("load its system call filter", birth.load_filter),
    ("give up capabilities", birth.drop_capabilities),
    ("say that all is ready", birth.say_ready),
    ("execute its init", birth.execute),
)

_launch: Final = partial(firstprocess.launch, steps=INIT_STEPS)

STEPS: Final[tuple[Step, ...]] = (
    Step("run its scripts initialize", outside.run_initialize),
    Step("open its root", outside.open_root),
    Step("check its file systems", outside.check_file_systems),
    Step("run its scripts prepre-start", outside.run_prepre_start),
    Step("take a context number", outside.take_number, outside.give_number_back),
    Step("make its cgroups", outside.make_groups, outside.remove_groups),
    Step("limit it as a whole", outside.limit_groups),
    Step("add its addresses", outside.add_addresses, outside.remove_addresses),
    Step("limit what it stores", outside.limit_disk),
    Step("mount its file systems", outside.mount_fstab),
    Step("make its tree ready", outside.prepare_tree),
    Step("see what its init is", outside.look_at_init),
    Step("run its scripts pre-start", outside.run_pre_start),
    Step("open its network", outside.open_network),
    Step("protect its shared files", protection.prepare),
    Step("launch its first process", _launch, firstprocess.kill),
    Step("configure its network", outside.configure_network),
    # Meanwhile the guest's first process sets itself up.
    Step("restrict it to its addresses", outside.restrict_network),
    Step("write down that it runs", firstprocess.write_state, firstprocess.forget_state),
    Step("set up its first process", firstprocess.await_ready),
    Step("execute its init", firstprocess.execute_init),
    Step("wait for its init scripts", firstprocess.await_scripts),
    Step("wait until it is up", firstprocess.await_sync),
    Step("run its scripts post-start", outside.run_post_start),
)


def start(context: Context) -> None:
    """Start the guest; when this returns, its init runs and its scripts are done.

    Raises ToolError for a step that failed, Aborted when the start was not wanted any more; then
    all is undone again, save what could not be, of which the audience is warned.
    """
    done: list[Step] = []
    try:
        for step in STEPS:
            done.append(step)
            _do(step, context)
    except BaseException:
        context.loop.refuse_abort()  # who asked for the end may ask again, or go away
        undo(context, done)
        raise
    finally:
        context.end_start()


def undo(context: Context, steps: list[Step]) -> None:
    """Take back what `steps` have made, the last one first; warns of what cannot be."""
    for step in reversed(steps):
        if step.undo:
            try:
                step.undo(context)
            except (OSError, ToolError) as error:
                context.audience.warn(f"cannot undo “{step.name}”: {reason_of(error)}")


def _do(step: Step, context: Context) -> None:
    try:
        step.do(context)
    except OSError as error:
        raise ToolError(
            f"guest {context.spec.name}: cannot {step.name}: {reason_of(error)}"
        ) from error


def reason_of(error: OSError | ToolError) -> str:
    """What a person reads after "cannot ...: "."""
    if isinstance(error, ToolError):
        return error.message
    place = f"{error.filename}: " if isinstance(error.filename, str) else ""
    return f"{place}{error.strerror or error}"
