"""A build: the steps that every method shares, in their order, each undone when a later one fails.

The configuration is made under a name of its own and takes its place last: until then there is no
guest, and a build that was killed leaves a tree and a hidden folder that the next one replaces.
"""

import errno
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from vrun import unfinished
from vrun.build import completion, program
from vrun.build.distribution import Distribution, first_line
from vrun.build.inside import GuestTree
from vrun.build.method import Method, Place
from vrun.build.options import BuildOptions
from vrun.config import load_spec
from vrun.errors import ConfigInvalid, NoSpace, ToolError, WrongUsage
from vrun.guestfiles import write_guest
from vrun.removal import Kept, find_pool, remove_folder, remove_tree
from vrun.state import find_by_xid
from vrun.unfinished import NOT_CONTENT
from vrun.xids import allocate_xid, check_xid, hold_numbers
from vstore import syscalls
from vstore.errors import PoolBusy
from vstore.guest import Guest, confdir, hold_lock, list_guests, load_state, parse_name
from vstore.progress import SILENT, Progress
from vstore.render import show_name

log = logging.getLogger(__name__)

_NO_ROOM: Final = frozenset((errno.ENOSPC, errno.EDQUOT))
_SHOWN: Final = 5  # of what is left


@dataclass(frozen=True, slots=True)
class Built:
    """A guest that was built; `notices` are for the person who asked."""

    name: str
    root: Path
    config: Path
    xid: int | None  # None: a dynamic one at each start
    style: str | None  # None: the default one
    notices: tuple[str, ...]
    seconds: float


@dataclass(slots=True)
class _Build:
    """A build on its way."""

    options: BuildOptions
    method: Method
    place: Place
    undo: ExitStack
    xid: int | None = None
    style: str | None = None
    notices: tuple[str, ...] = ()


def build(options: BuildOptions, method: Method, progress: Progress = SILENT) -> Built:
    """Build a guest.

    When that fails nothing of it is left, unless `options.keep`, and what was renamed has its name
    again. Raises WrongUsage before anything is changed for what cannot be; PoolBusy for a guest of
    that name that runs or that another program works on; ToolError for a step that failed.
    """
    began = time.monotonic()
    name = parse_name(options.guest.name)
    place = Place(
        name=name,
        root=options.guest.root,
        config=unfinished.build_place(options.config.parent, name),
        distribution=Distribution(method.distribution),
        progress=progress,
    )
    with hold_lock(name) as is_held:
        if load_state(name) is not None:
            raise PoolBusy(f"guest {name} runs", hint=f"vserver {name} stop")
        if not is_held:
            raise PoolBusy(f"guest {name}: another program starts, stops or builds it")
        with ExitStack() as undo:
            run = _Build(options, method, place, undo)
            try:
                _carry_out(run)
            except BaseException:
                if options.keep:
                    undo.pop_all()
                    _keep(run)
                raise
            undo.pop_all()
    return Built(
        name=name,
        root=place.root,
        config=options.config,
        xid=run.xid,
        style=run.style,
        notices=run.notices,
        seconds=time.monotonic() - began,
    )


def _carry_out(run: _Build) -> None:
    for what, step in STEPS:
        log.info("%s: %s", run.place.name, what)
        try:
            step(run)
        except OSError as error:
            kind = NoSpace if error.errno in _NO_ROOM else ToolError
            shown = f"{os.fsdecode(error.filename)}: " if _has_path(error) else ""
            raise kind(f"guest {run.place.name}: cannot {what}: {shown}{error.strerror}") from error


def _has_path(error: OSError) -> bool:
    return isinstance(error.filename, str | bytes)


# --- the steps


def _sweep(run: _Build) -> None:
    """Remove what a build of this name left that was killed; nobody else builds it now."""
    unfinished.clear_away(run.options.config.parent, run.place.name)


def _look_around(run: _Build) -> None:
    """Refuse what cannot be, before anything is changed."""
    options, root = run.options, run.place.root
    for taken in (options.config, _old_style(options)):
        if taken and os.path.lexists(taken) and not options.may_rename:
            raise WrongUsage(f"{taken}: is there already", hint="--force renames what is there")
    if _is_used(root) and not options.may_rename:
        if not options.may_be_used:
            raise WrongUsage(
                f"{root}: is there already, and not empty",
                hint="--force renames what is there; --i-know-its-there builds over it",
            )
        if not stat.S_ISDIR(root.lstat().st_mode):
            raise WrongUsage(f"{root}: is no folder", hint="--force renames what is there")
        run.place = replace(run.place, is_used=True)
    _look_for_other_guests(run)
    if run.place.distribution.is_missing and not run.method.knows_distributions:
        name = run.place.distribution.name
        raise WrongUsage(
            f"-d {name}: there are no settings of that name",
            hint=f"they would be in {confdir()}/.distributions/{name}",
        )
    run.method.check(run.place)


def _look_for_other_guests(run: _Build) -> None:
    root, name, xid = run.place.root.resolve(), run.place.name, run.options.guest.xid
    config = run.options.config.resolve()
    for guest in list_guests(include_disabled=True):
        for path in (root, config):
            if guest.name != name and path.is_relative_to(guest.root):
                raise WrongUsage(f"{path}: lies in the root of guest {guest.name}")
    if config.is_relative_to(root) or root.is_relative_to(config):
        raise WrongUsage(
            f"{config}: it and the root {root} lie in each other",
            hint="programs of the configuration are run on the host: no guest may write there",
        )
    for folder, what in ((confdir().resolve(), "the guests' configuration"), *_pools(root)):
        if root.is_relative_to(folder):
            raise WrongUsage(f"{root}: lies in {what}, {folder}")
    if xid is None:
        return
    check_xid(xid, name=name)
    owner = find_by_xid(xid)
    if owner is not None:
        raise WrongUsage(f"context {xid}: guest {owner} runs with it")


def _pools(root: Path) -> Iterator[tuple[Path, str]]:
    """The pool that holds the root, if one does."""
    for folder in root.parents:
        if (folder / "format").is_file() and (folder / "objects").is_dir():
            yield folder, "a pool"


def _put_away(run: _Build) -> None:
    """Rename what has the guest's names."""
    if not run.options.may_rename:
        return
    old_style, root = _old_style(run.options), run.place.root
    epoch = int(time.time())
    for path in (run.options.config, old_style, root if _is_used(root) else None):
        if path and os.path.lexists(path):
            aside = path.with_name(f"{path.name}.~{epoch}~")
            if os.path.lexists(aside):
                raise WrongUsage(f"{aside}: is there already", hint="try again in a second")
            path.rename(aside)
            log.warning("%s: renamed to %s", path, aside)
            run.undo.callback(_rename_back, aside, path)


def _write_configuration(run: _Build) -> None:
    guest = run.options.guest
    run.xid = guest.xid if guest.xid is not None else allocate_xid()
    run.style = guest.init_style
    _make_folders(run, run.options.config.parent, 0o755)
    run.undo.callback(_forget, run.place)
    run.notices = write_guest(replace(guest, xid=run.xid, config=run.place.config))
    _check_configuration(run)


def _check_configuration(run: _Build) -> None:
    """Refuse options that only together cannot be meant: a start would say so, and too late."""
    try:
        load_spec(Guest(run.place.name, run.place.root, run.place.config))
    except ConfigInvalid as error:
        place, later = os.fspath(run.place.config), os.fspath(run.options.config)
        raise WrongUsage(error.message.replace(place, later), hint=error.hint) from error


def _make_root(run: _Build) -> None:
    root = run.place.root
    if not root.parent.exists():
        _make_folders(run, root.parent, 0o700)
    elif root.parent.stat().st_mode & stat.S_IXOTH:
        log.warning(
            "%s: every user of the host can enter it, and run what a guest's root has made setuid; "
            "chmod 700 keeps them out",
            root.parent,
        )
    if run.place.is_used:
        return
    if root.is_dir():
        unfinished.mark_root(run.place.config, "content")
        run.undo.callback(_remove, root, unfinished.empty)
        return
    unfinished.mark_root(run.place.config, "folder")
    run.undo.callback(_remove, root)
    if not run.method.makes_root:
        root.mkdir()
        root.chmod(0o755)  # whatever our umask is: a guest's users pass through it


def _run_before(run: _Build) -> None:
    _run_script(run.place, "initpre")


def _fill(run: _Build) -> None:
    run.method.fill(run.place)


def _complete(run: _Build) -> None:
    guest, root = run.options.guest, run.place.root
    with GuestTree(root, find_pool(root)) as tree:
        completion.complete(tree, run.place.distribution)
        completion.make_own(
            tree,
            guest.hostname or guest.name,
            address=guest.addresses()[0] if guest.interfaces else "127.0.0.1",
            is_fresh=run.method.is_fresh,
        )
        _choose_style(run, tree)


def _run_after(run: _Build) -> None:
    run.method.finish(run.place)
    _run_script(run.place, "initpost")
    with GuestTree(run.place.root) as tree:
        _choose_style(run, tree)
        style = run.style or "sysv"
        missing = completion.find_missing_init(tree, style)
    if missing and not _has_own_command(run.place):
        text = f"{run.place.root}: has no {missing}, which the init style {style} runs"
        run.notices += (f"{text}; it has to come before the guest can start",)


def _choose_style(run: _Build, tree: GuestTree) -> None:
    """Write down the style that fits the tree, unless one was given or written by a program."""
    path = run.place.config / "apps/init/style"
    if path.exists():
        run.style = first_line(path)
    elif (style := completion.find_style(tree)) is not None:
        run.style = style
        path.write_text(f"{style}\n")


def _has_own_command(place: Place) -> bool:
    return (place.config / "apps/init/cmd.start").exists()


def _commit(run: _Build) -> None:
    """The guest is there from now on."""
    if not run.method.makes_root:  # else it is on disk but for what we added, which is little
        fd = os.open(run.place.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            syscalls.syncfs(fd)
        finally:
            os.close(fd)
    with hold_numbers():
        if run.xid is not None:
            check_xid(run.xid, name=run.place.name)
        _put_in_place(run)


STEPS: Final[tuple[tuple[str, Callable[[_Build], None]], ...]] = (
    ("clear away what a killed build left", _sweep),
    ("see what it needs", _look_around),
    ("rename what has its name", _put_away),
    ("write its configuration", _write_configuration),
    ("make its root", _make_root),
    ("run initpre", _run_before),
    ("fill its root", _fill),
    ("make its root its own", _complete),
    ("run what comes after", _run_after),
    ("put its configuration in its place", _commit),
)


# --- what they share


def _old_style(options: BuildOptions) -> Path | None:
    """The old-style configuration of a guest of this name, if there is one."""
    path = confdir() / f"{options.guest.name}.conf"
    return path if options.guest.config is None and os.path.lexists(path) else None


def _is_used(root: Path) -> bool:
    """Whether there is something in the way of a new root; an empty folder is not."""
    try:
        with os.scandir(root) as entries:
            return root.is_symlink() or any(entry.name not in NOT_CONTENT for entry in entries)
    except FileNotFoundError:
        return root.is_symlink()
    except NotADirectoryError:
        return True


def _make_folders(run: _Build, path: Path, mode: int) -> None:
    """Make a folder and those above it, as far as they are missing."""
    missing = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    for folder in reversed(missing):
        folder.mkdir(mode=mode)
        run.undo.callback(_remove_empty, folder)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # another guest is in it by now
        folder.rmdir()


def _put_in_place(run: _Build) -> None:
    run.place.config.rename(run.options.config)
    unfinished.unmark_root(run.options.config)  # not before: a build that is killed has its mark


def _run_script(place: Place, key: str) -> None:
    """Run a program of the distribution. Its second argument was a file of variables to source."""
    script = place.distribution.find(key)
    if script is None:
        return
    command = [os.fspath(script), os.fspath(place.config), os.devnull]
    done = program.run(command, environment=place.environment())
    if done.returncode:
        raise ToolError(f"{script}: ended with {done.returncode}")


def _keep(run: _Build) -> None:
    """Leave what was made by a build that failed, as a guest that nothing starts by itself."""
    if run.place.config.is_dir():
        (run.place.config / "disabled").touch()
        _put_in_place(run)
        log.warning("%s: kept, and disabled", run.options.config)
    if run.place.root.exists():
        log.warning("%s: kept as it is", run.place.root)


def _rename_back(aside: Path, path: Path) -> None:
    if os.path.lexists(path):
        log.warning("%s: stays, since there is a %s", aside, path)
        return
    aside.rename(path)


def _remove(path: Path, remove: Callable[[Path], Kept] = remove_tree) -> None:
    """Remove what a failed build made."""
    if not os.path.lexists(path):
        return
    try:
        kept = remove(path)
    except (ToolError, OSError) as error:
        log.warning("%s: is left of the build: %s", path, error)
        return
    for name, reason in kept[:_SHOWN]:
        log.warning("%s: is left of the build: %s", show_name(name), reason)


def _forget(place: Place) -> None:
    """Remove the configuration of a failed build, unless its root is still there."""
    if unfinished.find_own_root(place.config):
        log.warning("%s: is left of the build: vserver %s delete", place.root, place.name)
    else:
        _remove(place.config, remove_folder)
