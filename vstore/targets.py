"""From guests to the targets of a run:

which pool, which guests can be held, what is left alone in each.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from vstore import exclude
from vstore.errors import NotPermitted, ToolError, WrongUsage
from vstore.guest import Guest, list_guests, load_guest, load_state, refservers, tree_guest
from vstore.hold import Held, check_same_mount, check_served, default_pool, hold_guests
from vstore.order import Target
from vstore.pool import Pool

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Campaign:
    """A pool and the targets that are held for it; `refused` are (guest, why) of those that could
    not be.

    `apart` (with why) can share blocks with the others, but no inodes.
    """

    pool: Pool | None
    pool_path: Path
    targets: list[Target]
    refused: list[tuple[str, str]] = field(default_factory=list)
    apart: list[tuple[Target, str]] = field(default_factory=list)


def choose_guests(names: Sequence[str], roots: Sequence[Path], *, everyone: bool) -> list[Guest]:
    """The guests that a command line names. Raises WrongUsage when it names none, GuestNotFound."""
    if everyone and names:
        raise WrongUsage("both --all and guests are named", hint="name the guests, or use --all")
    guests = list_guests() if everyone else [load_guest(name) for name in dict.fromkeys(names)]
    guests += [tree_guest(root) for root in roots]
    if not guests:
        raise WrongUsage(
            "no guest is configured" if everyone else "no guest is named",
            hint="name guests, or trees with --root DIR; --all means every configured guest",
        )
    return guests


def choose_pool(guests: Sequence[Guest], given: Path | None) -> Path:
    """The pool that is named, else the one of a running guest, else VDIRBASE/.pool."""
    if given is not None:
        return given.absolute()
    for guest in guests:
        state = load_state(guest.name) if guest.is_configured else None
        if state is not None and state.pool is not None:
            return state.pool
    return default_pool()


@contextmanager
def open_campaign(
    guests: Sequence[Guest],
    pool_path: Path,
    *,
    offline: bool,
    dry_run: bool,
    exclude_from: Path | None,
    tolerant: bool,
    with_blocks: bool = False,
) -> Iterator[Campaign]:
    """Hold the guests, and their refservers, and open the pool; it is made if need be, but not for
    a dry run.

    `tolerant`: guests that cannot take part are noted, not raised. `with_blocks`: those that could
    only share blocks are set apart; where no file can be frozen that is all, and there is no pool.
    Raises as `hold_guests`,
    `Pool.create`, `exclude.load_for`, `check_same_mount`.
    """
    refused: list[tuple[str, str]] = []
    references = {guest.name: refservers(guest) for guest in guests}
    everyone = {guest.name: guest for guest in guests}
    for found in references.values():
        everyone.update({guest.name: guest for guest in found if guest.name not in everyone})
    with ExitStack() as stack:
        held = stack.enter_context(
            hold_guests(
                list(everyone.values()),
                pool_path,
                offline=offline or dry_run,
                on_refusal=refused if tolerant else None,
            )
        )
        pool, obstacle = _open_pool(pool_path, dry_run=dry_run, with_blocks=with_blocks)
        if pool is not None:
            stack.enter_context(pool)
        apart: list[tuple[Held, str]] = []
        held = list(
            _on_mount(
                held,
                pool_path,
                pool,
                refused=refused if tolerant else None,
                apart=apart if with_blocks else None,
                is_linking=True,
            )
        )
        if obstacle:
            held, apart = [], [(item, obstacle) for item in held] + apart
        targets = _make_targets(held, references, exclude_from)
        others = _make_targets([item for item, _ in apart], {}, exclude_from)
        reasons = [why for _, why in apart]
        yield Campaign(pool, pool_path, targets, refused, list(zip(others, reasons, strict=True)))


def _make_targets(
    held: Sequence[Held], references: Mapping[str, Sequence[Guest]], exclude_from: Path | None
) -> list[Target]:
    places = {item.guest.name: number for number, item in enumerate(held)}
    return [
        Target(
            item,
            exclude.load_for(item.guest, exclude_from),
            tuple(
                places[other.name]
                for other in references.get(item.guest.name, ())
                if other.name in places
            ),
        )
        for item in held
    ]


@contextmanager
def open_shared(
    guests: Sequence[Guest], pool_path: Path, *, offline: bool, tolerant: bool
) -> Iterator[tuple[Pool, list[Held], list[tuple[str, str]]]]:
    """Hold the guests and open the pool that they share files with, which must be there.

    Gives the guests on its file system, and (guest, why) of those that could not be held. Raises as
    `hold_guests`, `Pool.load`, `check_same_mount`.
    """
    refused: list[tuple[str, str]] = []
    noted = refused if tolerant else None
    with (
        Pool.load(pool_path) as pool,
        hold_guests(guests, pool_path, offline=offline, on_refusal=noted) as held,
    ):
        yield pool, list(_on_mount(held, pool_path, pool, refused=noted, apart=None)), refused


def _open_pool(path: Path, *, dry_run: bool, with_blocks: bool) -> tuple[Pool | None, str]:
    """The pool, if there is one, and why there can be none."""
    if dry_run:
        return (Pool.load(path) if os.path.lexists(path / "format") else None), ""
    try:
        return Pool.create(path), ""
    except NotPermitted as error:
        if not with_blocks:
            raise
        return None, error.message


def _on_mount(
    held: Sequence[Held],
    path: Path,
    pool: Pool | None,
    *,
    refused: list[tuple[str, str]] | None,
    apart: list[tuple[Held, str]] | None,
    is_linking: bool = False,
) -> Iterator[Held]:
    """The guests that are on the pool's mount; where there is no pool yet, on that of its
    folder-to-be. If `is_linking` they must be able to write to shared files.

    The others are noted in `apart` where only inodes cannot be shared, else in `refused`, or
    raised where there is no such list.
    """
    fd = pool.fd if pool is not None else _open_ancestor(path)
    try:
        for item in held:
            try:
                check_same_mount(item, fd, pool=path)
                if is_linking:
                    check_served(item)
            except ToolError as error:
                if apart is not None and isinstance(error, NotPermitted):
                    apart.append((item, error.message))
                elif refused is not None:
                    refused.append((item.guest.name, error.message))
                else:
                    raise
            else:
                yield item
    finally:
        if pool is None:
            os.close(fd)


def _open_ancestor(path: Path) -> int:
    while not path.is_dir():
        path = path.parent
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
