"""vunify: unify guests, or give them private copies back."""

import json
import logging
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from vstore import cli, reflink
from vstore.errors import EXIT_PARTIAL, NoSpace
from vstore.hold import Held
from vstore.order import DEFAULT_MIN_SIZE, Options, UnifyResult
from vstore.plan import Rules
from vstore.pool import Pool
from vstore.progress import SILENT, Progress
from vstore.render import ProgressBar, show_name, show_size, show_table
from vstore.targets import Campaign, choose_guests, choose_pool, open_campaign, open_shared
from vstore.undo import UndoResult, list_shared_names, undo
from vstore.unify import unify

log = logging.getLogger(__name__)

HARDLINK, REFLINK, AUTO = "hardlink", "reflink", "auto"


@click.command("vunify")
@cli.guest_arguments
@click.option("--all", "everyone", is_flag=True, help="Every configured guest.")
@cli.roots_option
@cli.pool_option
@click.option("-n", "--dry-run", is_flag=True, help="Say what would be reclaimed; change nothing.")
@click.option("--offline", is_flag=True, help="Promise that nothing writes to the --root trees.")
@click.option(
    "--exclude-from",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Leave alone what this list says, instead of the guests' own lists.",
)
@click.option(
    "--min-size",
    metavar="N",
    default=DEFAULT_MIN_SIZE,
    show_default=True,
    type=click.IntRange(min=1),
    help="Leave smaller files alone (bytes).",
)
@click.option("--ignore-mtime", is_flag=True, help="Equal but for mtime is equal; the oldest wins.")
@click.option("--link-twins", is_flag=True, help="Share equal files within one guest too.")
@click.option(
    "--link",
    "method",
    default=HARDLINK,
    show_default=True,
    type=click.Choice([HARDLINK, REFLINK, AUTO]),
    help="Share inodes, or blocks (btrfs, xfs), or what can be had.",
)
@click.option("--undo", "is_undo", is_flag=True, help="Give private copies of everything back.")
@click.option(
    "--jobs",
    metavar="N",
    type=click.IntRange(min=1),
    help="Worker processes; all cores if not given.",
)
@click.option(
    "--time-budget",
    metavar="S",
    type=click.FloatRange(min=0),
    help="Begin nothing new after S seconds; the next run goes on.",
)
@cli.json_option
@click.option("-q", "--quiet", is_flag=True, help="No table and no progress bar.")
@cli.verbose_option
@cli.version_option
def command(
    guests: tuple[str, ...],
    everyone: bool,
    roots: tuple[Path, ...],
    pool_path: Path | None,
    dry_run: bool,
    offline: bool,
    exclude_from: Path | None,
    min_size: int,
    ignore_mtime: bool,
    link_twins: bool,
    method: str,
    is_undo: bool,
    jobs: int | None,
    time_budget: float | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Make every file that the guests share one protected inode.

    Files are equal when content, mode, owner, mtime and extended attributes
    are. Guests that run are worked on too, in short pauses.
    """
    chosen = choose_guests(guests, roots, everyone=everyone)
    place = choose_pool(chosen, pool_path)
    output = Output(as_json=as_json, is_quiet=quiet, dry_run=dry_run)
    if is_undo:
        with open_shared(chosen, place, offline=offline or dry_run, tolerant=everyone) as opened:
            return _undo(*opened, output)
    options = Options(
        Rules(ignore_mtime=ignore_mtime, link_twins=link_twins),
        min_size=min_size,
        jobs=jobs,
        time_budget_s=time_budget,
        dry_run=dry_run,
    )
    with open_campaign(
        chosen,
        place,
        offline=offline or method == REFLINK,  # the kernel compares: no promise is needed
        dry_run=dry_run,
        exclude_from=exclude_from,
        tolerant=everyone,
        with_blocks=method != HARDLINK,
    ) as campaign:
        return run(campaign, options, output, method=method)


@dataclass(frozen=True, slots=True)
class Output:
    """How a person or a program wants to be told."""

    as_json: bool
    is_quiet: bool
    dry_run: bool

    def progress(self) -> AbstractContextManager[Progress]:
        """Where the way of the work is shown."""
        return nullcontext(SILENT) if self.is_quiet else ProgressBar()


def run(campaign: Campaign, options: Options, output: Output, *, method: str = HARDLINK) -> int:
    """Unify the guests of a campaign and print what was done; returns the exit code."""
    result = UnifyResult()
    ways: list[tuple[str, str]] = []
    with output.progress() as bar:
        if method == REFLINK:
            targets = [*campaign.targets, *(target for target, _ in campaign.apart)]
            _share_blocks(campaign, targets, (), options, result, bar)
        else:
            if campaign.targets or not campaign.apart:
                result = unify(campaign.targets, campaign.pool, options, bar)
            if campaign.apart:
                apart = [target for target, _ in campaign.apart]
                _share_blocks(campaign, apart, campaign.targets, options, result, bar)
        if method == AUTO:
            ways = _say_ways(campaign)
    return show(result, campaign, output, ways)


def _share_blocks(
    campaign: Campaign,
    targets: Sequence[reflink.Source],
    also: Sequence[reflink.Source],
    options: Options,
    result: UnifyResult,
    progress: Progress,
) -> None:
    """Let the targets share blocks, and add what was done to the result."""
    budget = options.time_budget_s
    done = reflink.reflink(
        targets,
        campaign.pool,
        replace(
            options, time_budget_s=None if budget is None else max(0.0, budget - result.seconds)
        ),
        progress,
        also=also,
    )
    result.add(done)


def _say_ways(campaign: Campaign) -> list[tuple[str, str]]:
    """Which guests share inodes and which blocks; why, in the log."""
    for target, why in campaign.apart:
        log.info("%s: shares blocks, not inodes: %s", target.held.guest.name, why)
    ways = {
        "sharing inodes": [target.held.guest.name for target in campaign.targets],
        "sharing blocks": [target.held.guest.name for target, _ in campaign.apart],
    }
    return [(way, " ".join(map(show_name, names))) for way, names in ways.items() if names]


def show(
    result: UnifyResult, campaign: Campaign, output: Output, ways: Sequence[tuple[str, str]] = ()
) -> int:
    """Print what a run did; returns the exit code."""
    errors = [*campaign.refused, *result.errors]
    _show_errors(errors)
    if output.as_json:
        click.echo(json.dumps(_as_json(result, campaign, errors)))
    elif not output.is_quiet:
        table = _as_table(result, campaign, len(errors), dry_run=output.dry_run)
        click.echo("\n".join([table, *(f"{way}: {names}" for way, names in ways)]))
    return EXIT_PARTIAL if errors else 0


def _show_errors(errors: Iterable[tuple[str, str]]) -> None:
    program = click.get_current_context().info_name
    for path, reason in errors:
        click.echo(f"{program}: {show_name(path)}: {reason}", err=True)


def _as_json(
    result: UnifyResult, campaign: Campaign, errors: list[tuple[str, str]]
) -> dict[str, Any]:
    return {
        "format": 1,
        "files_seen": result.files_seen,
        "files_unified": result.files_unified,
        "files_already": result.files_already,
        "bytes_reclaimed": result.bytes_reclaimed,
        "objects_new": result.objects_new,
        "skipped": dict(sorted(result.skipped.items())),
        "errors": [[show_name(path), reason] for path, reason in errors],
        "seconds": round(result.seconds, 3),
        "pool": os.fspath(campaign.pool_path),
    }


def _as_table(result: UnifyResult, campaign: Campaign, errors: int, *, dry_run: bool) -> str:
    rows = [
        ("files seen", f"{result.files_seen}"),
        ("would be unified" if dry_run else "unified now", f"{result.files_unified}"),
        ("already unified", f"{result.files_already}"),
        *((f"skipped: {reason}", f"{count}") for reason, count in sorted(result.skipped.items())),
        *([("errors", f"{errors}")] if errors else []),
        ("objects to be made" if dry_run else "new objects", f"{result.objects_new}"),
        ("would be reclaimed" if dry_run else "reclaimed", show_size(result.bytes_reclaimed)),
        ("seconds", f"{result.seconds:.1f}"),
    ]
    return show_table(rows, (f"pool {show_name(os.fspath(campaign.pool_path))}", ""))


# --- undo


def _undo(pool: Pool, held: list[Held], refused: list[tuple[str, str]], output: Output) -> int:
    """Give the guests private copies back, or say what that would need; returns the exit code."""
    began = time.monotonic()
    with output.progress() as bar:
        result = _measure_undo(held, pool) if output.dry_run else undo(held, pool, bar)
    errors = [*refused, *result.errors]
    _show_errors(errors)
    if output.as_json:
        click.echo(json.dumps(_undo_as_json(result, errors, pool, time.monotonic() - began)))
    elif not output.is_quiet:
        click.echo(_undo_as_table(result, len(errors), pool, dry_run=output.dry_run))
    if output.dry_run and (short := result.bytes_copied - _free_bytes(pool)) > 0:
        raise NoSpace(
            f"{pool.path}: the file system has {short} bytes too few for private copies",
            hint="free some space, or undo fewer guests",
        )
    return EXIT_PARTIAL if errors else 0


def _measure_undo(held: Iterable[Held], pool: Pool) -> UndoResult:
    result = UndoResult()
    with pool.share():
        objects = pool.load_numbers()
        for guest in held:
            for _, rows in list_shared_names(guest.fd, objects):
                result.files_broken += len(rows)
                result.bytes_copied += sum(row[9] * 512 for row in rows)
    return result


def _free_bytes(pool: Pool) -> int:
    room = os.statvfs(pool.fd)
    return room.f_bavail * room.f_frsize


def _undo_as_json(
    result: UndoResult, errors: list[tuple[str, str]], pool: Pool, seconds: float
) -> dict[str, Any]:
    return {
        "format": 1,
        "files_broken": result.files_broken,
        "bytes_copied": result.bytes_copied,
        "errors": [[show_name(path), reason] for path, reason in errors],
        "seconds": round(seconds, 3),
        "pool": os.fspath(pool.path),
    }


def _undo_as_table(result: UndoResult, errors: int, pool: Pool, *, dry_run: bool) -> str:
    copies, size = ("files to be copied", "needed") if dry_run else ("private copies", "copied")
    rows = [
        (copies, f"{result.files_broken}"),
        (size, show_size(result.bytes_copied)),
        *([("free", show_size(_free_bytes(pool)))] if dry_run else []),
        *([("errors", f"{errors}")] if errors else []),
    ]
    return show_table(rows, (f"pool {show_name(os.fspath(pool.path))}", ""))


def main() -> None:
    """Run as a program."""
    cli.run(command)
