"""The options of `vservers`, and its help."""

import logging
from collections.abc import Sequence
from typing import Final

import click

from vrun.commands.logged import Shown
from vrun.commands.vservers import COMMANDS, EXIT_ALL, PROGRAM, carry_out
from vstore.cli import version_option

_MOST_JOBS: Final = 1000


def main(words: Sequence[str]) -> int:
    """Carry out the command line behind `vservers`; the exit code. Raises ToolError, OSError."""
    logging.basicConfig(handlers=[Shown(PROGRAM)])
    try:
        result = command.main(list(words), PROGRAM, standalone_mode=False)
    except click.UsageError as error:
        error.show()
        return EXIT_ALL
    except click.Abort:
        raise KeyboardInterrupt from None
    return int(result or 0)


@click.command(PROGRAM, context_settings={"max_content_width": 80})
@click.option("--all", "everyone", is_flag=True, help="All that are not disabled.")
@click.option(
    "-j",
    "--jobs",
    type=click.IntRange(1, _MOST_JOBS),
    metavar="N",
    help="So many at a time; by default 2 for each cpu, at least 6.",
)
@click.option("--json", "as_json", is_flag=True, help="status: one JSON object a line.")
@version_option
@click.argument("word", metavar="COMMAND", type=click.Choice(list(COMMANDS)))
@click.argument("guests", metavar="[NAME]...", nargs=-1)
def command(
    *, word: str, guests: tuple[str, ...], everyone: bool, jobs: int | None, as_json: bool
) -> int:
    """Start, stop and look at many guests at once.

    COMMAND is start, stop, restart or status. One guest's trouble never stops the others.
    """
    if as_json and word != "status":
        raise click.UsageError("--json is an option of status")
    return carry_out(word, guests, everyone=everyone, jobs=jobs or 0, as_json=as_json)
