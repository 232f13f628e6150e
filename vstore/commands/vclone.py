"""vclone: make a new tree from a unified one, in seconds."""

import json
import os
from pathlib import Path

import click

from vstore import cli
from vstore.clone import CloneResult, choose_source, clone
from vstore.errors import EXIT_PARTIAL
from vstore.guest import list_guests
from vstore.hold import hold_guests
from vstore.hostpath import locate
from vstore.pool import Pool
from vstore.render import ProgressBar, show_name, show_size, show_table
from vstore.targets import choose_pool


@click.command("vclone")
@click.argument("source", metavar="SOURCE", shell_complete=cli.complete_guest)
@click.argument("target", metavar="TARGET", type=click.Path())
@cli.pool_option
@cli.json_option
@click.option("-q", "--quiet", is_flag=True, help="No table and no progress bar.")
@cli.verbose_option
@cli.version_option
def command(*, source: str, target: str, pool_path: Path | None, as_json: bool, quiet: bool) -> int:
    """Make TARGET a clone of SOURCE: links for unified files, copies for the rest.

    SOURCE is a guest that does not run, or the path of a tree at rest, with a slash
    in it. TARGET must not exist, or be an empty folder, on the same file system.
    """
    chosen = choose_source(source)
    place = locate(target, list_guests(include_disabled=True))
    with (
        Pool.load(choose_pool([chosen], pool_path)) as pool,
        hold_guests([chosen], pool.path, offline=True) as (held,),
        ProgressBar() as bar,
    ):
        result = clone(held, place, pool, bar) if not quiet else clone(held, place, pool)
    for path, reason in result.errors:
        click.echo(f"vclone: {show_name(path)}: {reason}", err=True)
    if as_json:
        click.echo(json.dumps(_as_json(result, target)))
    elif not quiet:
        click.echo(_as_table(result, target))
    return EXIT_PARTIAL if result.errors else 0


def _as_json(result: CloneResult, target: str) -> dict[str, object]:
    return {
        "format": 1,
        "target": os.path.abspath(target),  # noqa: PTH100 - a name, not resolved
        "linked": result.linked,
        "copied": result.copied,
        "copied_bytes": result.copied_bytes,
        "folders": result.folders,
        "skipped": dict(sorted(result.skipped.items())),
        "errors": [[show_name(path), reason] for path, reason in result.errors],
        "seconds": round(result.seconds, 3),
    }


def _as_table(result: CloneResult, target: str) -> str:
    rows = [
        ("links to objects", f"{result.linked}"),
        ("copies", f"{result.copied}"),
        ("bytes copied", show_size(result.copied_bytes)),
        ("folders", f"{result.folders}"),
        *((f"skipped: {reason}", f"{count}") for reason, count in sorted(result.skipped.items())),
        *([("errors", f"{len(result.errors)}")] if result.errors else []),
        ("seconds", f"{result.seconds:.1f}"),
    ]
    return show_table(rows, (f"clone {show_name(target)}", ""))


def main() -> None:
    """The console script."""
    cli.run(command)
