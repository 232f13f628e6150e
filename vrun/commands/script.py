"""How a console script with one click command runs: its failures and its end are as `vserver`'s."""

import logging
import sys
from typing import NoReturn

import click

from vrun.commands import plain
from vrun.commands.logged import Shown
from vrun.commands.vservers import EXIT_ALL


def run(command: click.Command, *, with_rest: bool = False) -> NoReturn:
    """Run the command with the arguments of this process, and end with its code.

    `with_rest`: what stands behind `--` is no argument of its own, but its object.
    """
    name = command.name or "vserver"
    plain.fill_standard()
    logging.basicConfig(handlers=[Shown(name)])
    sys.exit(plain.run(lambda: _parse(command, name, with_rest=with_rest), name=name))


def _parse(command: click.Command, name: str, *, with_rest: bool) -> int:
    words = sys.argv[1:]
    place = words.index("--") if with_rest and "--" in words else len(words)
    rest = tuple(words[place + 1 :])
    try:
        result = command.main(words[:place], name, standalone_mode=False, obj=rest)
    except click.UsageError as error:
        error.show()
        return EXIT_ALL
    except click.Abort:
        raise KeyboardInterrupt from None
    return int(result or 0)
