"""reducecap: a command with fewer capabilities, or which ones a process has."""

import click

from vrun import foreground, reduction
from vrun.commands import entry
from vrun.commands.plain import say
from vrun.errors import ToolError
from vrun.foreground import EXIT_CANNOT_EXECUTE, EXIT_NOT_FOUND
from vstore.cli import version_option

__all__ = ["EXIT_CANNOT_EXECUTE", "EXIT_NOT_FOUND"]


@click.command("reducecap", context_settings=entry.WITH_COMMAND)
@click.option("--show", is_flag=True, help="Show the capabilities of a process.")
@click.option("--pid", type=click.IntRange(min=1), help="With --show: of that one.")
@click.option("--secure", is_flag=True, help="Keep only what a guest has by default.")
@click.option("--cap", "words", metavar="[!]C", multiple=True, help="Keep C too; !C takes it away.")
@version_option
@click.argument("argv", metavar="[COMMAND]...", nargs=-1, type=click.UNPROCESSED)
def command(
    *, show: bool, pid: int | None, secure: bool, words: tuple[str, ...], argv: tuple[str, ...]
) -> int:
    """Run COMMAND, which can never have more capabilities than those that are kept.

    Without --secure all are kept but those that --cap '!C' takes away.
    """
    if pid is not None and not show:
        raise click.UsageError("--pid is an option of --show")
    if show:
        if argv or secure or words:
            raise click.UsageError("--show runs no command, and takes nothing away")
        say("\n".join(_shown(pid)))
        return 0
    if not argv:
        raise click.UsageError("which command?")
    kept = reduction.choose(words, secure=secure)
    foreground.find_program(argv[0])
    reduction.reduce(kept)
    foreground.execute(argv)


def _shown(pid: int | None) -> list[str]:
    try:
        return reduction.show(pid)
    except (FileNotFoundError, ProcessLookupError):
        raise ToolError(f"there is no process {pid}") from None


def main() -> None:
    """The console script."""
    entry.run(command)
