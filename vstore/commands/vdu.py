"""vdu: how much disk the guests use, each for itself and together."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from vstore import cli
from vstore.audit import (
    GuestFigures,
    Objects,
    PoolFigures,
    find_pool,
    load_objects,
    measure_guest,
    measure_pool,
)
from vstore.errors import EXIT_PARTIAL, ToolError, WrongUsage
from vstore.guest import Guest, list_guests
from vstore.pool import Pool
from vstore.render import show_name, show_size, show_table
from vstore.targets import choose_guests, choose_pool


@click.command("vdu")
@cli.guest_arguments
@click.option("--all", "everyone", is_flag=True, help="Every configured guest; so is naming none.")
@cli.roots_option
@cli.pool_option
@click.option("--inodes", is_flag=True, help="Show how many inodes, too.")
@click.option("--bytes", "exact", is_flag=True, help="Show sizes in bytes, not rounded.")
@cli.json_option
@cli.verbose_option
@cli.version_option
def command(
    *,
    guests: tuple[str, ...],
    everyone: bool,
    roots: tuple[Path, ...],
    pool_path: Path | None,
    inodes: bool,
    exact: bool,
    as_json: bool,
) -> int:
    """Show what each GUEST uses of the disk, and what the pool saves.

    apparent: the sizes of its files. own: on disk for this guest alone, freed if it were deleted
    and the pool reclaimed. shared: on disk, used by others too. Without a GUEST, all of them.
    """
    chosen = _choose(guests, roots, everyone=everyone)
    place = choose_pool(chosen, pool_path)
    pool = Pool.load(place) if pool_path else find_pool(place)
    objects = Objects()
    if pool is not None:
        with pool:
            objects = load_objects(pool)
    measured, errors = _measure(chosen, objects)
    figures = measure_pool(objects) if pool is not None else None
    for name, reason in errors:
        click.echo(f"vdu: {show_name(name)}: {reason}", err=True)
    if as_json:
        click.echo(json.dumps(_as_json(measured, figures, inodes=inodes)))
    else:
        click.echo(_as_tables(measured, figures, place, inodes=inodes, exact=exact))
    return EXIT_PARTIAL if errors else 0


def _choose(names: Sequence[str], roots: Sequence[Path], *, everyone: bool) -> list[Guest]:
    """As `choose_guests`; none named means all, and all are the disabled ones too."""
    if everyone and names:
        raise WrongUsage("both --all and guests are named", hint="name the guests, or use --all")
    named = choose_guests(names, roots, everyone=False) if names or roots else []
    if everyone or not named:
        named += list_guests(include_disabled=True)
    if not named:
        raise WrongUsage("no guest is configured", hint="name trees with --root DIR")
    return named


def _measure(
    guests: Sequence[Guest], objects: Objects
) -> tuple[list[GuestFigures], list[tuple[str, str]]]:
    """The figures of all guests that can be looked at, and the errors (guest or path, reason)."""
    measured, errors = [], []
    for guest in guests:
        try:
            found = measure_guest(guest, objects)
        except (ToolError, OSError) as error:
            if len(guests) == 1:
                raise
            reason = error.message if isinstance(error, ToolError) else str(error.strerror)
            errors.append((guest.name, reason))
            continue
        measured.append(found)
        root = os.fspath(guest.root)
        errors += [(f"{root}/{os.fsdecode(path)}", reason) for path, reason in found.errors]
    return measured, errors


def _as_json(
    guests: Sequence[GuestFigures], pool: PoolFigures | None, *, inodes: bool
) -> dict[str, Any]:
    return {
        "format": 1,
        "guests": [
            {
                "name": guest.name,
                "apparent_bytes": guest.apparent_bytes,
                "own_bytes": guest.own_bytes,
                "shared_bytes": guest.shared_bytes,
                "files": guest.files,
            }
            | (
                {"own_inodes": guest.own_inodes, "shared_inodes": guest.shared_inodes}
                if inodes
                else {}
            )
            for guest in guests
        ],
        "pool": None
        if pool is None
        else {"objects": pool.objects, "bytes": pool.bytes, "saved_bytes": pool.saved_bytes},
    }


def _as_tables(
    guests: Sequence[GuestFigures],
    pool: PoolFigures | None,
    place: Path,
    *,
    inodes: bool,
    exact: bool,
) -> str:
    size: Callable[[int], str] = str if exact else show_size
    headers = ["guest", "files", "apparent", "own", "shared"]
    headers += ["own inodes", "shared inodes"] if inodes else []
    rows = [
        [
            show_name(guest.name),
            f"{guest.files}",
            size(guest.apparent_bytes),
            size(guest.own_bytes),
            size(guest.shared_bytes),
            *([f"{guest.own_inodes}", f"{guest.shared_inodes}"] if inodes else []),
        ]
        for guest in guests
    ]
    table = show_table(rows, headers)
    return table if pool is None else f"{table}\n\n{_pool_table(pool, place, size)}"


def _pool_table(pool: PoolFigures, place: Path, size: Callable[[int], str]) -> str:
    headers = ["pool", "objects", "on disk", "saved", "unused"]
    row = [
        show_name(os.fspath(place)),
        f"{pool.objects}",
        size(pool.bytes),
        size(pool.saved_bytes),
        size(pool.unused_bytes),
    ]
    return show_table([row], headers)


def main() -> None:
    """The console script."""
    cli.run(command)
