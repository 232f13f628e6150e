"""How the small commands of vrun are run: each is one click command that returns its exit code."""

import gc
import logging
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, NoReturn, TypeVar

import click

from vrun.commands import plain
from vrun.commands.logged import Shown
from vrun.errors import NotPermitted
from vstore.cli import complete_guest
from vstore.streams import fill_standard

EXIT_FAILED: Final = 1
"""What was asked for could not be done, or not all of it; or the command line is wrong."""
WIDTH: Final = {"max_content_width": 80}
"""Settings of each command: its help fits a terminal of 80 columns."""
WITH_COMMAND: Final = {**WIDTH, "allow_interspersed_args": False}
"""Settings of one whose arguments end with a command and the options of that."""


_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])


def guest_option(function: _Decorated) -> _Decorated:
    """`-c X`: the command gets `xid`, what stands there."""
    return click.option(
        "-c",
        "--xid",
        metavar="X",
        required=True,
        shell_complete=complete_guest,
        help="The guest: its name or number.",
    )(function)


def run(command: click.Command, *, usage: int = EXIT_FAILED, with_rest: bool = False) -> NoReturn:
    """Run the command with the arguments of this process, and end with its code; `usage` is that of
    a wrong command line.

    `with_rest`: what stands behind `--` is no argument of its own, but its object, a tuple.
    """
    name = command.name or ""
    words = sys.argv[1:]
    place = words.index("--") if with_rest and "--" in words else len(words)
    rest = tuple(words[place + 1 :])

    def work() -> int:
        try:
            result = command.main(words[:place], name, standalone_mode=False, obj=rest)
        except click.UsageError as error:
            error.show()
            return usage
        except click.Abort:
            raise KeyboardInterrupt from None
        return int(result or 0)

    run_plain(name, work)


def run_plain(name: str, work: Callable[[], int]) -> NoReturn:
    """As run(), for what needs no click."""
    gc.disable()  # as for vserver
    fill_standard()
    logging.basicConfig(handlers=[Shown(name)])
    code = plain.run(work, name=name)
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    os._exit(code)  # taking the interpreter apart takes 5 ms


def find_program(name: str, package: str) -> str:
    """The path of a program of the host. Raises NotPermitted, naming Debian's package."""
    path = shutil.which(name)
    if path is None:
        raise NotPermitted(f"there is no program {name}", hint=f"apt-get install {package}")
    return path
