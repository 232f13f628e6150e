"""vserver-stat: what each context uses, in the columns of the original."""

import json
import sys
import time
from collections.abc import Iterator
from typing import Final

import click

from vrun import figures
from vrun.commands import entry
from vrun.commands.plain import say
from vrun.figures import HEADER, Row, show_row
from vrun.membership import find_contexts
from vrun.procs import list_processes
from vstore.cli import version_option
from vstore.guest import confdir

_EVERY_S: Final = 2.0
_LEAST_S, _MOST_S = 0.1, 86_400.0
_CLEAR: Final = "\x1b[H\x1b[2J\x1b[3J"
"""The cursor to the top, all gone, what has scrolled away too; console_codes(4)."""


@click.command("vserver-stat", context_settings=entry.WIDTH)
@click.option("-O", "--sort", metavar="WORD", expose_value=False, help="Taken, and ignored.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.option(
    "--watch",
    metavar="[SECONDS]",
    type=click.FloatRange(_LEAST_S, _MOST_S),
    is_flag=False,
    flag_value=_EVERY_S,
    help="Again and again, every 2 seconds by default; ^C ends it.",
)
@version_option
def command(*, as_json: bool, watch: float | None) -> int:
    """Show what each context uses: processes, memory, cpu time, age.

    Context 0 is the host.
    """
    if watch is None:
        _show(as_json=as_json)
        return 0
    try:
        while True:
            if sys.stdout.isatty():
                print(end=_CLEAR)  # noqa: T201
            _show(as_json=as_json)
            time.sleep(watch)
            if not (as_json or sys.stdout.isatty()):
                say("")
    except KeyboardInterrupt:
        return 0


def _show(*, as_json: bool) -> None:
    rows = _rows()
    if as_json:
        say("\n".join(json.dumps(figures.as_json(row)) for row in rows))
    else:
        say("\n".join([HEADER, *_lines(rows)]))


def _rows() -> list[Row]:
    contexts = find_contexts()
    return figures.sum_up(list_processes(contexts), contexts)


def _lines(rows: list[Row]) -> Iterator[str]:
    for row in rows:
        is_legacy = row.xid > 1 and row.name != "" and _is_legacy(row.name)
        yield show_row(row, is_legacy=is_legacy)


def _is_legacy(name: str) -> bool:
    """Whether the guest is described by a NAME.conf."""
    folder = confdir() / name
    is_new = (folder / "vdir").is_symlink() and not (folder / "legacy").exists()
    return not is_new and (confdir() / f"{name}.conf").is_file()


def main() -> None:
    """The console script."""
    entry.run(command)
