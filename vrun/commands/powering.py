"""What vhalt and vreboot have in common: for guests by name, or for the one that it is called in.

The original's spoke to a daemon of the host through /dev/reboot. Here reboot(2) of a guest reaches
its monitor, and guests have programs of their own for that.
"""

import os
import shutil
from pathlib import Path
from typing import Final

import click

from vrun import names, syscalls
from vrun.commands.plain import show_failure
from vrun.commands.vservers import EXIT_ALL, EXIT_SOME, BulkWord, carry_out
from vrun.errors import NotPermitted, ToolError, WrongUsage
from vrun.roster import Wanted
from vrun.state import find_running
from vstore.cli import complete_guest, version_option

_FIRST_PID_NAMESPACE: Final = 0xEFFFFFFC  # PROC_PID_INIT_INO of linux/proc_ns.h
_PATH: Final = "/sbin:/usr/sbin:/bin:/usr/bin"


def power_command(
    program: str, *, word: BulkWord, inside: tuple[str, ...], number: int
) -> click.Command:
    """The click command `program`.

    `word`: what `vservers` does to guests by name; inside of one, the first of the programs
    `inside` is run, or reboot(2) called with `number`.
    """

    @click.command(program, context_settings={"max_content_width": 80})
    @click.option("-f", "--force", is_flag=True, help="Inside: at once, without its init.")
    @version_option
    @click.argument("guests", metavar="[NAME]...", nargs=-1, shell_complete=complete_guest)
    def command(*, guests: tuple[str, ...], force: bool) -> int:
        if not guests:
            return _end_this_one(program, inside, number, force=force)
        if force:
            raise click.UsageError("--force is for the inside of a guest")
        return _end_by_name(program, word, guests)

    verb = program.removeprefix("v")
    command.help = f"{verb.capitalize()} guests that run; inside of one, without a name, that one."
    return command


def _end_by_name(program: str, word: BulkWord, words: tuple[str, ...]) -> int:
    """Have the guests stopped as they want it; those that do not run are named as failed."""
    running = []
    for name in words:
        try:
            guest = names.find(name)
            if find_running(guest.name) is None:
                raise ToolError(f"guest {guest.name}: does not run")
            running.append(guest.name)
        except ToolError as error:
            show_failure(error.message, error.hint, start=program)
    if not running:
        return EXIT_ALL
    code = carry_out(word, Wanted(tuple(running)))
    is_all_known = len(running) == len(words)
    return code if code or is_all_known else EXIT_SOME


def _end_this_one(program: str, inside: tuple[str, ...], number: int, *, force: bool) -> int:
    """Does not return where it goes well."""
    if Path("/proc/self/ns/pid").stat().st_ino == _FIRST_PID_NAMESPACE:
        raise WrongUsage(
            "this is the host, and no guest is named",
            hint=f"{program} NAME; without a name it is for the inside of a guest",
        )
    if not force:
        found = next(filter(None, (shutil.which(name, path=_PATH) for name in inside)), None)
        if found is None:
            raise ToolError(
                f"there is none of {', '.join(inside)} that would ask the guest's init",
                hint=f"{program} --force ends the guest at once",
            )
        os.execv(found, [found])  # noqa: S606
    os.sync()
    try:
        syscalls.reboot(number)
    except OSError as error:
        raise NotPermitted(f"cannot call reboot(2): {error.strerror}") from error
    return 0
