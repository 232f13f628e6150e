"""lsxid: whose files are."""

import os

import click

from vrun.commands import entry
from vrun.commands.plain import say, show
from vrun.membership import find_contexts
from vrun.owners import FAILED, WIDTH, Owners
from vstore.attributes import Reach
from vstore.attributes import show as show_all
from vstore.cli import version_option
from vstore.render import show_name


@click.command("lsxid", context_settings=entry.WIDTH)
@click.option("-R", "recursive", is_flag=True, help="All that is below directories.")
@click.option("-a", "hidden", is_flag=True, help="Names that begin with a dot too.")
@click.option("-d", "itself", is_flag=True, help="A directory itself, not what is in it.")
@click.option("-n", "numeric", is_flag=True, help="The number of the guest's context.")
@click.option("-x", "one_filesystem", is_flag=True, help="Stay on the file system of each FILE.")
@version_option
@click.argument("files", metavar="[FILE]...", nargs=-1)
def command(
    *,
    files: tuple[str, ...],
    recursive: bool,
    hidden: bool,
    itself: bool,
    numeric: bool,
    one_filesystem: bool,
) -> int:
    """Show which guest each FILE belongs to, or what is in it if it is a directory.

    A file belongs to the guest in whose root it lies; MAIN is the host. Without a FILE, the current
    directory.
    """
    reach = Reach(
        contents=not itself, recursive=recursive, hidden=hidden, one_filesystem=one_filesystem
    )
    owners = Owners(find_contexts())
    failed = 0
    for start in files or (os.curdir,):
        for shown in show_all(os.fsencode(start), reach):
            if shown.error is not None:
                failed += 1
                show(shown.error.message, start="lsxid")
                owner = FAILED
            else:
                owner = owners.find(shown.path).show(numeric=numeric)
            say(f"{owner:<{WIDTH - 1}} {show_name(shown.path)}")
    return entry.EXIT_FAILED if failed else 0


def main() -> None:
    """The console script."""
    entry.run(command)
