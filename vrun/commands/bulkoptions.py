"""The options of `vservers`, and its help."""

import logging
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, Final, TypeVar

import click

from vrun.commands.logged import Shown
from vrun.commands.vservers import COMMANDS, EXIT_ALL, PROGRAM, carry_out, find_command
from vrun.roster import Wanted
from vstore.cli import complete_guest, version_option

MORE: Final = {"unify": "vrun.commands.unifying", "install-unit": "vrun.commands.units"}
"""Words with options of their own; the modules whose `command` they are."""

_MOST_JOBS: Final = 1000


def main(words: Sequence[str]) -> int:
    """Carry out the command line behind `vservers`; the exit code. Raises ToolError, OSError."""
    logging.basicConfig(handlers=[Shown(PROGRAM)])
    module = MORE.get(words[0]) if words else None
    try:
        if module is None:
            result = command.main(list(words), PROGRAM, standalone_mode=False)
        else:
            more: click.Command = import_module(module).command
            result = more.main(list(words[1:]), f"{PROGRAM} {words[0]}", standalone_mode=False)
    except click.UsageError as error:
        error.show()
        return EXIT_ALL
    except click.Abort:
        raise KeyboardInterrupt from None
    return int(result or 0)


_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])


def bulk_options(function: _Decorated) -> _Decorated:
    """The options that say which guests are meant: `everyone`, `marks` and so on, for `wanted`."""
    options = (
        click.option("--all", "everyone", is_flag=True, help="All that are not disabled."),
        click.option(
            "--mark", "marks", metavar="M", multiple=True, help="Whose apps/init/mark is M."
        ),
        click.option("--running", is_flag=True, help="Those that run."),
        click.option("--stopped", is_flag=True, help="Those that do not."),
        click.option("--disabled", is_flag=True, help="Disabled ones too."),
    )
    for option in reversed(options):
        function = option(function)
    return function


def jobs_option(function: _Decorated) -> _Decorated:
    """`-j N`: the command gets `jobs`, None where it is not given."""
    return click.option(
        "-j",
        "--jobs",
        type=click.IntRange(1, _MOST_JOBS),
        metavar="N",
        help="So many at a time; by default 2 for each cpu, at least 6.",
    )(function)


def wanted(guests: tuple[str, ...], given: Mapping[str, Any]) -> Wanted:
    """What the arguments and the values of bulk_options say."""
    if given["running"] and given["stopped"]:
        raise click.UsageError("--running and --stopped exclude each other")
    return Wanted(
        guests,
        everyone=given["everyone"],
        marks=given["marks"],
        is_running=given["running"] if given["running"] or given["stopped"] else None,
        with_disabled=given["disabled"],
    )


@click.command(PROGRAM, context_settings={"max_content_width": 80})
@bulk_options
@jobs_option
@click.option("--json", "as_json", is_flag=True, help="status: one JSON object a line.")
@version_option
@click.argument("word", metavar="COMMAND", type=click.Choice(list(COMMANDS)))
@click.argument("guests", metavar="[NAME]...", nargs=-1, shell_complete=complete_guest)
def command(
    *, word: str, guests: tuple[str, ...], jobs: int | None, as_json: bool, **given: Any
) -> int:
    """Start, stop and look at many guests at once.

    COMMAND is start, stop, restart or status. Guests that others depend on are
    started before them. One guest's trouble stops no others but those. Also, with
    options of their own: unify, install-unit.
    """
    known = find_command(word)
    if known is None:
        raise click.UsageError(f"{word!r} is no command")
    if as_json and word != "status":
        raise click.UsageError("--json is an option of status")
    return carry_out(known, wanted(guests, given), jobs=jobs or 0, as_json=as_json)
