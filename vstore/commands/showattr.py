"""showattr: show the attributes of files."""

import os

import click

from vstore import cli
from vstore.attributes import Reach, Shown, show
from vstore.errors import ToolError
from vstore.render import show_name, show_text


@click.command("showattr")
@click.argument("files", metavar="[FILE]...", nargs=-1)
@click.option("-R", "recursive", is_flag=True, help="Show all that is below directories.")
@click.option("-a", "hidden", is_flag=True, help="Show names that begin with a dot too.")
@click.option("-d", "itself", is_flag=True, help="Show a directory itself, not what is in it.")
@click.option("-x", "one_filesystem", is_flag=True, help="Stay on the file system of each FILE.")
@cli.json_option
@cli.verbose_option
@cli.version_option
def command(
    *,
    files: tuple[str, ...],
    recursive: bool,
    hidden: bool,
    itself: bool,
    one_filesystem: bool,
    as_json: bool,
) -> int:
    """Show the attributes of each FILE, or of what is in it if it is a directory.

    Nine letters, one an attribute: a admin, w watch, h hide, m write, b barrier, u iunlink,
    i immutable, c copy-on-write, x xid. A capital is set, a small letter is not, and "-" is
    what there is not: a stock kernel has i alone. Without a FILE, the current directory.
    """
    reach = Reach(
        contents=not itself, recursive=recursive, hidden=hidden, one_filesystem=one_filesystem
    )
    done = failed = 0
    last_error: ToolError | None = None
    for start in files or (os.curdir,):
        for shown in show(os.fsencode(start), reach):
            click.echo(_json_line(shown) if as_json else _line(shown))
            if shown.error is None:
                done += 1
            else:
                failed += 1
                last_error = shown.error
                click.echo(show_text(f"showattr: {shown.error.message}"), err=True)
    return cli.exit_code(done=done, failed=failed, error=last_error)


def _line(shown: Shown) -> str:
    return f"{shown.letters:<10}{show_name(shown.path)}"


def _json_line(shown: Shown) -> str:
    import json  # 3 ms

    record = {
        "format": 1,
        "path": os.fsdecode(shown.path),
        "letters": shown.letters,
        "immutable": shown.is_immutable,
    }
    return json.dumps(record if shown.error is None else record | {"error": shown.error.message})


def main() -> None:
    """The console script."""
    cli.run(command)
