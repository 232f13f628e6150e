"""vpool: look at a pool, check it, free what nobody uses, take files or trees out of it."""

import json
import os
from pathlib import Path
from typing import Any

import click

from vstore import audit, cli
from vstore.errors import EXIT_PARTIAL, PoolCorrupt
from vstore.guest import Guest, list_guests, tree_guest
from vstore.hold import default_pool, hold_guests
from vstore.hostpath import HostPath, locate
from vstore.index import forget_index
from vstore.pool import Pool
from vstore.private import break_paths
from vstore.reclaim import ReclaimResult, plan_reclaim, reclaim
from vstore.remove import open_trees, remove
from vstore.render import ProgressBar, show_name, show_size, show_table
from vstore.repair import repair
from vstore.state import PoolState, look_at
from vstore.targets import choose_pool
from vstore.verify import Fault, VerifyResult, verify

_NAMES_SHOWN = 10


@click.group("vpool")
@cli.verbose_option
@cli.version_option
def command() -> None:
    """Look after a pool: the files that guests share, each stored once."""


# --- status


@command.command("status")
@cli.pool_option
@cli.json_option
@cli.verbose_option
def status(*, pool_path: Path | None, as_json: bool) -> None:
    """Show what is in the pool.

    Links are the names that guests have for its objects. An object that no guest
    uses is freed by vpool reclaim; damaged ones are in quarantine.
    """
    with _open_pool(pool_path) as pool:
        objects = audit.load_objects(pool)
        figures = audit.measure_pool(objects)
        links = sum(use.names - 1 for use in objects.uses.values())
        state = look_at(pool)
        if as_json:
            click.echo(json.dumps(_state_as_json(pool, figures, links, state)))
        else:
            click.echo(_state_as_table(pool, figures, links, state))


def _state_as_json(
    pool: Pool, figures: audit.PoolFigures, links: int, state: PoolState
) -> dict[str, Any]:
    return {
        "format": 1,
        "pool": os.fspath(pool.path),
        "objects": figures.objects,
        "bytes": figures.bytes,
        "links": links,
        "saved_bytes": figures.saved_bytes,
        "unused_objects": figures.unused_objects,
        "unused_bytes": figures.unused_bytes,
        "quarantined": state.quarantined,
        "quarantined_bytes": state.quarantined_bytes,
        "programs": state.programs,
        "leftovers": state.leftovers,
        "index_bytes": state.index_bytes,
        "index_digests": state.digests,
    }


def _state_as_table(pool: Pool, figures: audit.PoolFigures, links: int, state: PoolState) -> str:
    digests = "cannot be read" if state.digests is None else f"{state.digests} digests"
    index = f"{show_size(state.index_bytes)}, {digests}" if state.index_bytes else "none"
    rows = [
        ("objects", f"{figures.objects}", show_size(figures.bytes)),
        ("links", f"{links}", ""),
        ("saved", "", show_size(figures.saved_bytes)),
        ("unused objects", f"{figures.unused_objects}", show_size(figures.unused_bytes)),
        ("in quarantine", f"{state.quarantined}", show_size(state.quarantined_bytes)),
        ("programs at work", f"{state.programs}", ""),
        ("left by killed programs", f"{state.leftovers}", ""),
    ]
    table = show_table(rows, (f"pool {show_name(os.fspath(pool.path))}", "count", "size"))
    return f"{table}\nindex: {index}"


# --- verify


@command.command("verify")
@cli.pool_option
@click.option("--repair", "wants_repair", is_flag=True, help="Put right what can be put right.")
@cli.roots_option
@cli.json_option
@cli.verbose_option
def verify_command(
    *, pool_path: Path | None, wants_repair: bool, roots: tuple[Path, ...], as_json: bool
) -> int:
    """Read every object and compare it with its name.

    Content, owner, mode, time and extended attributes must be right and the object
    immutable. Each that is wrong is shown with the files of guests that use it.

    With --repair it is frozen again or, when damaged, put in quarantine, and the
    guests get good content from another copy, where there is one.
    """
    with _open_pool(pool_path) as pool, ProgressBar() as bar:
        guests = _on_file_system(pool, [*_all_guests(), *map(tree_guest, roots)])
        result = verify(pool, guests, bar)
        if wants_repair and result.faults:
            _repair(pool, result, guests, bar)
        bar.close()
        click.echo(json.dumps(_verify_as_json(pool, result)) if as_json else _as_text(result))
    return 0 if result.is_good else PoolCorrupt.exit_code


def _repair(pool: Pool, result: VerifyResult, guests: list[Guest], bar: ProgressBar) -> None:
    used = {file.guest for fault in result.faults for file in fault.names}
    concerned = [guest for guest in guests if guest.name in used]
    refused: list[tuple[str, str]] = []
    with hold_guests(concerned, pool.path, offline=True, on_refusal=refused) as held:
        repair(pool, result.faults, guests, held, bar)
    for _, reason in refused:
        click.echo(f"vpool: {reason}", err=True)


def _verify_as_json(pool: Pool, result: VerifyResult) -> dict[str, Any]:
    return {
        "format": 1,
        "pool": os.fspath(pool.path),
        "objects": result.objects,
        "bytes": result.bytes,
        "faults": [_fault_as_json(fault) for fault in result.faults],
    }


def _fault_as_json(fault: Fault) -> dict[str, Any]:
    return {
        "object": fault.path,
        "reason": fault.reason,
        "outcome": fault.outcome,
        "repaired": fault.is_repaired,
        "links": fault.links,
        "files": [{"guest": file.guest, "path": show_name(file.path)} for file in fault.names],
        "left": [
            {"guest": file.guest, "path": show_name(file.path), "reason": reason}
            for file, reason in fault.left
        ],
    }


def _as_text(result: VerifyResult) -> str:
    lines = [line for fault in result.faults for line in _fault_lines(fault)]
    wrong = sum(not fault.is_repaired for fault in result.faults)
    mended = len(result.faults) - wrong
    found = f"{result.objects} objects, {show_size(result.bytes)}"
    verdict = f"{wrong} wrong" if wrong else "all good"
    return "\n".join([*lines, f"{found}: {verdict}" + (f", {mended} repaired" if mended else "")])


def _fault_lines(fault: Fault) -> list[str]:
    lines = [f"{fault.path}: {fault.reason}"]
    lines += [f"  used by {_show_file(file)}" for file in fault.names[:_NAMES_SHOWN]]
    if len(fault.names) > _NAMES_SHOWN:
        lines.append(f"  and by {len(fault.names) - _NAMES_SHOWN} more")
    if fault.links > len(fault.names):
        lines.append(f"  and by {fault.links - len(fault.names)} names that were not found")
    lines += [f"  left: {_show_file(file)}: {reason}" for file, reason in fault.left]
    return lines + ([f"  {fault.outcome}"] if fault.outcome else [])


def _show_file(file: Any) -> str:
    return f"{show_name(file.guest)}: /{show_name(file.path)}"


# --- reclaim


@command.command("reclaim")
@cli.pool_option
@click.option("-n", "--dry-run", is_flag=True, help="Say what would be freed; free nothing.")
@cli.json_option
@cli.verbose_option
def reclaim_command(*, pool_path: Path | None, dry_run: bool, as_json: bool) -> int:
    """Free the objects that no guest uses any more.

    Waits until nobody else works with the pool. What a running program has pinned
    stays.
    """
    with _open_pool(pool_path) as pool, ProgressBar() as bar:
        result = plan_reclaim(pool) if dry_run else reclaim(pool, bar)
        bar.close()
        for path, reason in result.errors:
            click.echo(f"vpool: {path}: {reason}", err=True)
        if as_json:
            click.echo(json.dumps(_reclaim_as_json(pool, result, dry_run=dry_run)))
        else:
            click.echo(_reclaim_as_text(result, dry_run=dry_run))
    return EXIT_PARTIAL if result.errors else 0


def _reclaim_as_json(pool: Pool, result: ReclaimResult, *, dry_run: bool) -> dict[str, Any]:
    return {
        "format": 1,
        "pool": os.fspath(pool.path),
        "dry_run": dry_run,
        "objects": result.objects,
        "quarantined": result.quarantined,
        "bytes": result.bytes,
        "pinned": result.pinned,
        "errors": [list(error) for error in result.errors],
    }


def _reclaim_as_text(result: ReclaimResult, *, dry_run: bool) -> str:
    verb = "would be freed" if dry_run else "freed"
    text = f"{result.objects} objects {verb}: {show_size(result.bytes)} ({result.bytes} bytes)"
    if result.quarantined:
        text += f", {result.quarantined} out of quarantine among them"
    return text + (f"; {result.pinned} are pinned" if result.pinned else "")


# --- break


@command.command("break")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
@cli.pool_option
@cli.verbose_option
def break_command(*, paths: tuple[str, ...], pool_path: Path | None) -> int:
    """Give each PATH a private copy that can be written.

    Other guests keep the shared file. A symlink at the end of PATH is not followed.
    A file that is private already stays as it is.
    """
    guests = _all_guests()
    places = [locate(path, guests) for path in paths]
    concerned = _guests_of(places)
    done = failed = 0
    with (
        Pool.load(choose_pool(concerned, pool_path)) as pool,
        hold_guests(concerned, pool.path, offline=True) as held,
    ):
        for answer in break_paths(places, held, pool):
            name = show_name(answer.path)
            if answer.error:
                failed += 1
                click.echo(f"vpool: {name}: {answer.error}", err=True)
            else:
                done += 1
                click.echo(f"{name}: {'broken' if answer.is_broken else 'private already'}")
    return cli.exit_code(done=done, failed=failed)


# --- rm


@command.command("rm")
@click.argument("folders", metavar="DIR...", nargs=-1, required=True)
@cli.pool_option
@cli.verbose_option
def remove_command(*, folders: tuple[str, ...], pool_path: Path | None) -> int:
    """Delete each DIR with all that is in it.

    rm cannot delete files that are shared. Other guests keep theirs. The root of a
    guest that runs is refused, and so is all that the tools need themselves.
    """
    guests = _all_guests()
    places = [locate(folder, guests) for folder in folders]
    with (
        _open_pool(pool_path) as pool,
        open_trees(places, guests, pool) as trees,
        ProgressBar() as bar,
    ):
        result = remove(trees, pool, bar)
    for path, reason in result.errors:
        click.echo(f"vpool: {show_name(path)}: {reason}", err=True)
    return cli.exit_code(done=result.names, failed=len(result.errors))


# --- forget-index


@command.command("forget-index")
@cli.pool_option
@cli.verbose_option
def forget_index_command(*, pool_path: Path | None) -> None:
    """Throw the index of digests away.

    Nothing is lost: the next vunify reads all files again and makes a new one.
    """
    with _open_pool(pool_path) as pool, pool.exclude():
        forget_index(pool)


# --- what they share


def _open_pool(given: Path | None) -> Pool:
    return Pool.load(given.absolute() if given else default_pool())


def _all_guests() -> list[Guest]:
    return list_guests(include_disabled=True)


def _on_file_system(pool: Pool, guests: list[Guest]) -> list[Guest]:
    return [guest for guest in guests if guest.root.stat().st_dev == pool.device]


def _guests_of(places: list[HostPath]) -> list[Guest]:
    found = {place.guest.name: place.guest for place in places if place.guest is not None}
    return list(found.values())


def main() -> None:
    """The console script."""
    cli.run(command)
