"""Delete a guest: its tree, its configuration, and what was kept for it elsewhere.

The tree goes first and the configuration last, so that a delete that was interrupted can be done
again. Links out of the configuration (`run`, `cache`) are not followed: what they point at goes
only where it is the guest's own folder in the place where such folders are kept.
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from vrun import fence, unfinished
from vrun.errors import GuestNotFound, WrongUsage
from vrun.removal import Kept, check_removable, remove_folder, remove_tree
from vrun.state import forget_run, load_resources, run_folder
from vstore.errors import PoolBusy
from vstore.guest import (
    Guest,
    confdir,
    hold_lock,
    list_guests,
    load_guest,
    load_state,
    parse_name,
    vdirbase,
)

log = logging.getLogger(__name__)

CACHE_BASE: Final = Path("/var/cache/vservers")
_WAIT_S: Final = 30.0


def load_doomed(name: str) -> Guest:
    """The guest of that name, even one whose tree is gone: its configuration can be deleted still;
    else what a build or a delete of that name left that was killed.

    Raises GuestNotFound where there is no configuration; as `load_guest`.
    """
    try:
        return load_guest(name)
    except GuestNotFound:
        known = parse_name(name.removesuffix("/"))
        folder = confdir() / known
        if (folder / "vdir").is_symlink():
            return Guest(known, folder.parent / (folder / "vdir").readlink(), folder)
        left = unfinished.find_left(confdir(), known)
        if not left:
            raise
        return Guest(known, unfinished.find_own_root(left[0]) or left[0], left[0])


def delete_guest(guest: Guest, *, keep_root: bool = False, pool: Path | None = None) -> Kept:
    """Delete a guest that does not run; returns (path, why) of what could not be deleted.

    `keep_root` leaves the tree where it is; `pool` is the one that its files are shared with, where
    that is not beside it. Takes the guest's lock; RUNDIR/NAME/lock stays, since a lock on a deleted
    file guards nothing. Raises PoolBusy for a guest that runs or that another program works on,
    WrongUsage, before anything is deleted, for a tree that other guests use too, in which something
    is mounted, or which holds what must stay.
    """
    if guest.config is None:
        raise WrongUsage(f"{guest.name}: is no configured guest", hint="vpool rm deletes trees")
    with hold_lock(guest.name, wait_s=_WAIT_S) as is_held:
        _check_idle(guest, is_held=is_held)
        fence.check(guest, "delete")
        if guest.config in unfinished.find_left(confdir(), guest.name):
            if keep_root:
                unfinished.unmark_root(guest.config)
            unfinished.clear_away(confdir(), guest.name)
            return []
        has_root = not keep_root and os.path.lexists(guest.root)
        if has_root:
            check_removable(guest.root)
            _check_alone(guest)
        kept = remove_tree(guest.root, pool=pool) if has_root else []
        if kept:
            return kept
        for folder in _find_kept_elsewhere(guest):
            kept += remove_folder(folder)
        forget_run(guest.name)
        (run_folder(guest.name) / "ended.json").unlink(missing_ok=True)
        return kept + _remove_configuration(guest.name, guest.config)


def _check_idle(guest: Guest, *, is_held: bool) -> None:
    if load_state(guest.name) is not None:
        raise PoolBusy(f"guest {guest.name} runs", hint=f"vserver {guest.name} stop")
    if not is_held:
        raise PoolBusy(
            f"guest {guest.name}: another program starts, stops or works on it",
            hint="run the command again when that is done",
        )
    if load_resources(guest.name) is not None:
        raise PoolBusy(
            f"guest {guest.name}: what its last run left on the host is still there",
            hint=f"vserver {guest.name} stop cleans up",
        )


def _check_alone(guest: Guest) -> None:
    """Refuse a tree that another guest has a part in."""
    root = guest.root.resolve()
    for other in list_guests(include_disabled=True):
        if other.name == guest.name:
            continue
        theirs = other.root.resolve()
        if theirs.is_relative_to(root) or root.is_relative_to(theirs):
            raise WrongUsage(
                f"guest {guest.name}: its root {guest.root} is that of guest {other.name} too, "
                "or one lies in the other",
                hint="delete it without its tree, or give the other guest a root of its own",
            )


def _find_kept_elsewhere(guest: Guest) -> Iterator[Path]:
    """Folders of this guest outside its tree: its cache, and package data of the original."""
    assert guest.config is not None  # noqa: S101 - delete_guest has looked
    caches = _base(confdir() / ".defaults/cachebase", CACHE_BASE)
    packages = _base(confdir() / ".defaults/apps/pkgmgmt/base", vdirbase() / ".pkg")
    if _is_own_link(guest.config / "cache", caches / guest.name):
        yield from _own_folder(caches / guest.name)
    _is_own_link(guest.config / "run", run_folder(guest.name))
    yield from _own_folder(packages / guest.name)


def _base(link: Path, otherwise: Path) -> Path:
    """Where the folder is that `link`, a setting of the host's administrator, points at."""
    return link.resolve() if link.is_symlink() else otherwise


def _is_own_link(link: Path, expected: Path) -> bool:
    """Whether the link of the configuration leads where it does by default; if not, and there is
    something, a warning says that it stays.
    """
    if not link.is_symlink():
        return False
    target = link.parent / link.readlink()
    if target.parent.resolve() / target.name == expected.parent.resolve() / expected.name:
        return True
    if os.path.lexists(target):
        log.warning("%s: points to %s, which is left alone", link, target)
    return False


def _own_folder(path: Path) -> Iterator[Path]:
    if path.is_symlink():
        log.warning("%s: is a symlink, which is left alone", path)
    elif path.is_dir():
        yield path


def _remove_configuration(name: str, config: Path) -> Kept:
    """Delete CONFDIR/NAME, and NAME.conf and NAME.sh of an old-style guest.

    It is renamed first: half a configuration is none.
    """
    unfinished.clear_away(confdir(), name)
    folder, place = config.with_name(name), unfinished.delete_place(confdir(), name)
    if folder.is_symlink():
        log.warning("%s: is a symlink; what it points to is left alone", folder)
        folder.unlink()
    elif folder.is_dir():
        folder.rename(place)
    if config != folder:
        config.unlink()
        config.with_suffix(".sh").unlink(missing_ok=True)
    return remove_folder(place) if place.is_dir() else []
