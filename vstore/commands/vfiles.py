"""vfiles: list a guest's own files, save what it shares, restore it."""

import json
import logging
import os
import sys
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import click

from vstore import cli
from vstore.audit import find_pool, open_root
from vstore.errors import EXIT_PARTIAL, WrongUsage
from vstore.folders import Listed, Missed, list_own, list_shared
from vstore.guest import Guest
from vstore.hold import Held, check_same_mount, hold_guests
from vstore.manifest import find_names, load_manifest, save_manifest, take_manifest
from vstore.pool import Pool
from vstore.render import ProgressBar, show_name
from vstore.restore import RestoreResult, restore
from vstore.targets import choose_guests, choose_pool

log = logging.getLogger(__name__)

_LINES_AT_ONCE: Final = 500


@click.command("vfiles")
@click.argument("guest_name", metavar="[GUEST]", required=False, shell_complete=cli.complete_guest)
@click.option(
    "--root",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="A tree that is no configured guest, instead of GUEST.",
)
@cli.pool_option
@click.option("--shared", is_flag=True, help="List the files that are shared with the pool.")
@click.option("-0", "--null", is_flag=True, help="End each path with a null byte, for tar --null.")
@click.option(
    "--save",
    "save_to",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write a manifest of folders and shared files.",
)
@click.option(
    "--restore",
    "restore_from",
    metavar="FILE",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Make what a manifest names and the guest lacks.",
)
@click.option("--offline", is_flag=True, help="Promise that nothing writes to --root (--restore).")
@cli.json_option
@cli.verbose_option
@cli.version_option
def command(
    *,
    guest_name: str | None,
    root: Path | None,
    pool_path: Path | None,
    shared: bool,
    null: bool,
    save_to: Path | None,
    restore_from: Path | None,
    offline: bool,
    as_json: bool,
) -> int:
    """List what GUEST has for itself: the entries that no object of the pool backs.

    With --save and --restore that list is all that a backup must hold. Paths
    begin with "./" and are meant for tar, run in the guest's root.
    """
    _check_together(
        {"-0": null, "--json": as_json and not restore_from, "--save": save_to},
        {"--shared": shared, "--save": save_to, "--restore": restore_from},
        {"-0": null, "--restore": restore_from},
    )
    guest = _choose(guest_name, root)
    place = choose_pool([guest], pool_path)
    if restore_from:
        return _restore(guest, place, restore_from, offline=offline, as_json=as_json)
    if save_to:
        return _save(guest, place, save_to)
    return _list(guest, place, _Style(null=null, as_json=as_json), shared=shared)


def _check_together(*groups: dict[str, object]) -> None:
    """Raises WrongUsage where more than one of a group is given."""
    for group in groups:
        given = [option for option, value in group.items() if value]
        if len(given) > 1:
            raise WrongUsage(f"{' and '.join(given)} cannot be used together")


def _choose(name: str | None, root: Path | None) -> Guest:
    if bool(name) == bool(root):
        raise WrongUsage(
            "name one guest" if not name else "both a guest and --root are named",
            hint="vfiles GUEST, or vfiles --root DIR",
        )
    return choose_guests([name] if name else [], [root] if root else [], everyone=False)[0]


# --- listing


@dataclass(frozen=True, slots=True)
class _Style:
    """How a path is written."""

    null: bool
    as_json: bool

    def line(self, item: Listed, names: dict[int, str]) -> bytes:
        path = b"./" + item.path
        if self.as_json:
            record = {"format": 1, "path": os.fsdecode(path), "kind": item.kind}
            if item.ino in names:
                record["object"] = names[item.ino]
            return json.dumps(record).encode("ascii") + b"\n"
        if self.null:
            return path + b"\0"
        if sys.stdout.isatty():
            return os.fsencode(show_name(path)) + b"\n"
        return path + b"\n"


def _list(guest: Guest, place: Path, style: _Style, *, shared: bool) -> int:
    missed = Missed()
    with ExitStack() as stack:
        root_fd = open_root(guest)
        stack.callback(os.close, root_fd)
        pool = find_pool(place)
        objects: Container[int] = ()
        names: dict[int, str] = {}
        skip_ino = 0
        if pool is not None:
            stack.enter_context(pool)
            if os.fstat(root_fd).st_dev == pool.device:
                skip_ino = os.fstat(pool.fd).st_ino
                objects = pool.load_numbers()
                names = find_names(pool, objects) if shared and style.as_json else {}
            else:
                click.echo(f"vfiles: {guest.root} is not where {place} is: none shared", err=True)
        lister: Callable[..., Iterator[Listed]] = list_shared if shared else list_own
        items = lister(root_fd, objects, missed, skip_ino=skip_ino)
        _write(style.line(item, names) for item in items)
    return _tell_missed(guest, missed)


def _write(lines: Iterable[bytes]) -> None:
    rest = iter(lines)
    while some := b"".join(islice(rest, _LINES_AT_ONCE)):
        click.echo(some, nl=False)


def _tell_missed(guest: Guest, missed: Missed) -> int:
    root = os.fsencode(guest.root)
    for path in missed.mounts:
        click.echo(f"vfiles: {show_name(root + b'/' + path)}: on another mount, left out", err=True)
    return _tell_errors(guest, missed.errors)


def _tell_errors(guest: Guest, errors: list[tuple[bytes, str]]) -> int:
    """Name each on stderr; returns the exit code."""
    root = os.fsencode(guest.root)
    for path, reason in errors:
        click.echo(f"vfiles: {show_name(root + b'/' + path)}: {reason}", err=True)
    return EXIT_PARTIAL if errors else 0


# --- saving and restoring


def _save(guest: Guest, place: Path, file: Path) -> int:
    missed = Missed()
    with Pool.load(place) as pool, ExitStack() as stack:
        root_fd = open_root(guest)
        stack.callback(os.close, root_fd)
        _check_mount(guest, root_fd, pool)
        if not pool.load_numbers():
            log.warning(
                "%s has no objects: --restore will refuse; back up all of %s", place, guest.root
            )
        save_manifest(take_manifest(guest.name, root_fd, pool, missed), file)
    return _tell_missed(guest, missed)


def _check_mount(guest: Guest, root_fd: int, pool: Pool) -> None:
    held = Held(guest, root_fd, os.fstat(root_fd).st_dev, "")
    check_same_mount(held, pool.fd, pool=pool.path)


def _restore(guest: Guest, place: Path, file: Path, *, offline: bool, as_json: bool) -> int:
    manifest = load_manifest(file)
    with (
        Pool.load(place) as pool,
        hold_guests([guest], place, offline=offline) as held,
        ProgressBar() as bar,
    ):
        check_same_mount(held[0], pool.fd, pool=place)
        result = restore(manifest, held[0], pool, bar)
    code = _tell_errors(guest, result.errors)
    click.echo(json.dumps(_as_json(result)) if as_json else _as_text(result))
    return code


def _as_json(result: RestoreResult) -> dict[str, Any]:
    return {
        "format": 1,
        "files_linked": result.files_linked,
        "files_copied": result.files_copied,
        "files_present": result.files_present,
        "folders_made": result.folders_made,
        "errors": [[os.fsdecode(b"./" + path), reason] for path, reason in result.errors],
    }


def _as_text(result: RestoreResult) -> str:
    return (
        f"{result.files_linked} files linked, {result.files_copied} copied, "
        f"{result.files_present} there already; {result.folders_made} folders made; "
        f"{len(result.errors)} not restored"
    )


def main() -> None:
    """The console script."""
    cli.run(command)
