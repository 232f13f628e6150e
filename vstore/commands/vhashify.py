"""vhashify: the original's way to unify one guest with the pool."""

import logging
import os
from pathlib import Path

import click

from vstore import cli
from vstore.commands.vunify import Output, run
from vstore.errors import WrongUsage
from vstore.guest import Guest, load_guest, tree_guest
from vstore.order import Options
from vstore.plan import Rules
from vstore.targets import choose_pool, open_campaign

log = logging.getLogger(__name__)


@click.command("vhashify")
@click.argument("words", metavar="NAME", nargs=-1, required=True, shell_complete=cli.complete_guest)
@click.option("--manually", is_flag=True, help="Name a tree and a list instead: PATH EXCL.")
@click.option(
    "--destination",
    metavar="HASHDIR",
    type=click.Path(path_type=Path),
    help="A folder of links to pools, one per file system, or a pool.",
)
@click.option("-n", "--dry-run", is_flag=True, help="Say what would be reclaimed; change nothing.")
@click.option("--ignore-mtime", is_flag=True, help="Equal but for mtime is equal; the oldest wins.")
@click.option("--refresh", is_flag=True, help="Has no meaning here.")
@click.option("--insecure", is_flag=True, help="Has no meaning here.")
@click.option("--sledgehammer", is_flag=True, help="Has no meaning here.")
@cli.json_option
@cli.verbose_option
@cli.version_option
def command(
    words: tuple[str, ...],
    manually: bool,
    destination: Path | None,
    dry_run: bool,
    ignore_mtime: bool,
    refresh: bool,
    insecure: bool,
    sledgehammer: bool,
    as_json: bool,
) -> int:
    """Share a guest's files with all that are shared already.

    Every file becomes one of the pool's, so that guests hashified one after
    the other share. vunify does the same for many guests at a time, and
    shares only what two of them have.
    """
    _say_ignored(refresh=refresh, insecure=insecure, sledgehammer=sledgehammer)
    guest, list_path = _choose_tree(words) if manually else (_choose_guest(words), None)
    if manually and destination is None:
        raise WrongUsage(
            "--manually needs a pool", hint="name it, or a folder of pools, with --destination"
        )
    pool_path = _find_pool(destination, guest) if destination else choose_pool([guest], None)
    with open_campaign(
        [guest],
        pool_path,
        offline=manually,
        dry_run=dry_run,
        exclude_from=list_path,
        tolerant=False,
    ) as campaign:
        rules = Rules(ignore_mtime=ignore_mtime, everything=True)
        output = Output(as_json=as_json, is_quiet=False, dry_run=dry_run)
        return run(campaign, Options(rules, dry_run=dry_run), output)


def _say_ignored(*, refresh: bool, insecure: bool, sledgehammer: bool) -> None:
    if refresh:
        log.info("--refresh: what is shared needs no second look; the pool has one method")
    if insecure:
        log.info("--insecure: it had no effect in the original either")
    if sledgehammer:
        log.info("--sledgehammer: files become the pool's own without a copy, and safely, anyway")


def _choose_guest(words: tuple[str, ...]) -> Guest:
    if len(words) != 1:
        raise WrongUsage(
            f"one guest at a time, not {len(words)}", hint="vunify takes many, or --all"
        )
    return load_guest(words[0])


def _choose_tree(words: tuple[str, ...]) -> tuple[Guest, Path]:
    if len(words) != 2:
        raise WrongUsage(
            f"--manually takes a tree and an exclude list, not {len(words)} arguments",
            hint="an empty list argument ('') means no list",
        )
    return tree_guest(Path(words[0])), Path(words[1] or os.devnull)


def _find_pool(destination: Path, guest: Guest) -> Path:
    """The pool itself, or the one in a folder of pools that is on the guest's file system."""
    destination = destination.absolute()
    if os.path.lexists(destination / "format"):
        return destination
    device = guest.root.stat().st_dev
    try:
        inner = [path for path in sorted(destination.iterdir()) if not path.name.startswith(".")]
    except OSError as error:
        raise WrongUsage(
            f"{destination}: no folder of pools: {error.strerror}",
            hint="make it, with a symbolic link to a folder on each file system with guests",
        ) from error
    found = [path for path in inner if path.is_dir() and path.stat().st_dev == device]
    if not found:
        raise WrongUsage(
            f"{destination}: no pool in it is on the file system of {guest.root}",
            hint="put a symbolic link to a folder there into it",
        )
    for path in found[1:]:
        log.warning("%s: a second pool on one file system, not used", path)
    return found[0].resolve()


def main() -> None:
    """Run as a program."""
    cli.run(command)
