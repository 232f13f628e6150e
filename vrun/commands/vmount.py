"""vmount: mount something in guests that run."""

import os
from pathlib import Path
from typing import Final

import click

from vrun import admission, latemount, names
from vrun.commands import entry
from vrun.commands.plain import say, show, show_failure
from vrun.commands.vservers import EXIT_ALL, EXIT_SOME
from vrun.errors import ToolError
from vrun.spec import Mount
from vstore.cli import complete_guest, version_option
from vstore.guest import Guest
from vstore.render import show_text

PROGRAM: Final = "vmount"


@click.command(PROGRAM, context_settings={"max_content_width": 80})
@click.option("-s", "--source", metavar="SOURCE", help="What to mount: a device, a host's folder.")
@click.option("--target", metavar="DIR", help="Where in the guest.")
@click.option("-t", "--type", "fstype", metavar="TYPE", help="The file system.")
@click.option("-o", "--options", "words", metavar="WORD,...", default="", help="As in an fstab.")
@click.option("--bind", is_flag=True, help="SOURCE is a folder or file of the host.")
@click.option("-u", "--unmount", is_flag=True, help="Unmount what is on the target.")
@version_option
@click.argument("guests", metavar="NAME...", nargs=-1, required=True, shell_complete=complete_guest)
def command(
    *,
    guests: tuple[str, ...],
    source: str | None,
    target: str | None,
    fstype: str | None,
    words: str,
    bind: bool,
    unmount: bool,
) -> int:
    """Mount something in guests that run: without --target, what their fstab
    names and is not mounted.
    """
    if (source or fstype or words or bind or unmount) and not target:
        raise click.UsageError("where? --target says it")
    if target and not unmount and not source:
        raise click.UsageError("what? --source says it")
    line = None
    if target and not unmount:
        line = _line(source or "", target, fstype, words, bind=bind)
    latemount.take_own_mounts()
    failed = 0
    for word in guests:
        try:
            guest = names.find(word)
            admission.check_enter(guest)
            if line is None and target is None:
                failed += not _mount_missing(guest)
            elif line is None:
                latemount.unmount(guest, target or "")
            else:
                latemount.mount(guest, line)
        except ToolError as error:
            show_failure(error.message, error.hint, start=PROGRAM)
            failed += 1
    if not failed:
        return 0
    return EXIT_ALL if failed == len(guests) else EXIT_SOME


def _line(source: str, target: str, fstype: str | None, words: str, *, bind: bool) -> Mount:
    options = tuple(filter(None, words.split(",")))
    is_folder = source.startswith("/") and Path(source).is_dir()
    if bind or (fstype is None and is_folder):
        options = ("bind", *options)
        source = os.path.abspath(source)  # noqa: PTH100 - not resolved
    return Mount(source, target, fstype or "auto", options, 0, False, "the command line")


def _mount_missing(guest: Guest) -> bool:
    """Mount what the guest's fstab names and it does not have; whether all of it is there."""
    late, others = latemount.missing_lines(guest)
    is_good = True
    for line in late:
        try:
            latemount.mount(guest, line)
        except ToolError as error:
            show_failure(error.message, error.hint, start=PROGRAM)
            is_good = False
        else:
            say(show_text(f"{guest.name}: {line.source} on {line.target}"))
    for line in others:
        show(f"{line.where}: {line.target} is mounted at a start only", start=PROGRAM)
    return is_good


def main() -> None:
    """The console script."""
    entry.run(command)
