"""What vapt-get and vrpm have in common: a package program in many guests, then unifying.

Equal packages make equal files, but each guest has unpacked its own: they are shared again at once.
"""

import time
from collections.abc import Callable
from typing import Any, Final

import click

from vrun.commands.bulkoptions import bulk_options, jobs_option, wanted
from vrun.commands.unifying import unify
from vrun.commands.vserver_all import Task, code_of, perform
from vrun.commands.vservers import EXIT_SOME
from vstore.cli import complete_guest, version_option
from vstore.window import LINGER_S

Arguments = tuple[str, ...]

_SETTLED_S: Final = LINGER_S + 0.1
"""What has changed a moment ago is left alone: it may be changed again."""


def package_command(
    program: str, *, argv: Callable[[Arguments], Arguments], changes: Callable[[Arguments], bool]
) -> click.Command:
    """The click command `program`; `argv`: what is run inside, `changes`: whether files change."""

    @click.command(
        program,
        context_settings={"max_content_width": 80},
        epilog="The arguments stand behind `--`.",
    )
    @bulk_options
    @jobs_option
    @click.option("--no-unify", is_flag=True, help="Do not unify the guests afterwards.")
    @version_option
    @click.argument(
        "guests", metavar="[NAME]... -- ARGUMENTS", nargs=-1, shell_complete=complete_guest
    )
    @click.pass_obj
    def command(
        given_argv: Arguments,
        /,
        *,
        guests: tuple[str, ...],
        jobs: int | None,
        no_unify: bool,
        **given: Any,
    ) -> int:
        if not given_argv:
            raise click.UsageError("which arguments? they stand behind --")
        task = Task(program, wanted(guests, given), argv(given_argv), jobs or 0)
        ended = perform(task)
        done = [one.name for one in ended if not one.code]
        code = code_of(ended)
        if done and changes(given_argv) and not no_unify:
            time.sleep(_SETTLED_S)
            code = code or min(unify(done, program=program), EXIT_SOME)
        return code

    command.help = f"Run {program.removeprefix('v')} in many guests at once, then unify them."
    return command
