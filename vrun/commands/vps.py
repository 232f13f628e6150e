"""vps: the host's ps, with the context of each process."""

import os
import subprocess
import sys
from typing import Final

import click

from vrun import pscolumn
from vrun.commands import entry
from vrun.commands.plain import say, show_failure
from vrun.membership import find_contexts
from vstore.cli import version_option
from vstore.render import show_text

EXIT_NO_PID: Final = 254
"""The first line of ps has no column PID."""
_LEAST_COLUMNS: Final = 20


@click.command("vps", context_settings=entry.WIDTH)
@version_option
def command() -> int:
    """Run ps with the same options and show the context behind each pid.

    All options but these two, and these too behind another, are those of ps(1).
    """
    return _run_ps(())


def _run_ps(words: tuple[str, ...]) -> int:
    """As `ps` with these words; its exit code, 128 + n where signal n ended it."""
    ps = subprocess.Popen(  # noqa: S603 (the caller is who runs it)
        [entry.find_program("ps", "procps"), *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=_environment(),
    )
    assert ps.stdout is not None  # noqa: S101 (for the type checker)
    text = os.fsdecode(ps.stdout.read())
    # Only now is ps waited for: until then it has a context of its own too.
    shown = pscolumn.add_column(text, find_contexts()) if text else ""
    code = ps.wait()
    if code:
        sys.stdout.write(text)
        return code if code > 0 else 128 - code
    if shown is None:
        show_failure(
            "ps has shown no column PID in its first line",
            "vps needs it: see that the options name it, and that headers are not turned off",
            start="vps",
        )
        return EXIT_NO_PID
    if shown:
        say("\n".join(show_text(line) for line in shown.removesuffix("\n").split("\n")))
    return 0


def _environment() -> dict[str, str]:
    """On a terminal ps leaves room for the column."""
    if not sys.stdout.isatty():
        return dict(os.environ)
    columns = os.get_terminal_size(sys.stdout.fileno()).columns - pscolumn.WIDTH
    return os.environ | {"COLUMNS": str(max(_LEAST_COLUMNS, columns))}


def main() -> None:
    """The console script."""
    words = sys.argv[1:]
    if words[:1] not in (["--help"], ["--version"]):
        entry.run_plain("vps", lambda: _run_ps(tuple(words)))
    entry.run(command)
