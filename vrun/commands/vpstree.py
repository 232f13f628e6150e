"""vpstree: the tree of processes, of all or of one context."""

import os
import sys
from typing import NoReturn

import click

from vrun.commands import entry
from vrun.errors import ToolError, WrongUsage
from vrun.membership import find_contexts
from vstore.cli import complete_guest, version_option


@click.command("vpstree", context_settings={**entry.WIDTH, "ignore_unknown_options": True})
@click.option(
    "--xid",
    metavar="X",
    shell_complete=complete_guest,
    help="Only the guest of that name or number.",
)
@version_option
@click.argument("words", metavar="[OPTION]...", nargs=-1, type=click.UNPROCESSED)
def command(*, xid: str | None, words: tuple[str, ...]) -> NoReturn:
    """Run pstree with the same options, and with all processes of all contexts.

    The options are those of pstree(1).
    """
    program = entry.find_program("pstree", "psmisc")
    chosen = (*words, str(_init_of(xid))) if xid is not None else words
    sys.stdout.flush()
    os.execv(program, ["pstree", *chosen])  # noqa: S606 (its arguments are the caller's)


def _init_of(word: str) -> int:
    member = find_contexts().find(word)
    if member is None:
        raise WrongUsage(f"{word}: no context has that name or number", hint="see vserver-stat")
    if not member.init_pid:
        raise ToolError(f"{word}: starts or stops just now")
    return member.init_pid


def main() -> None:
    """The console script."""
    entry.run(command)
