"""The guests of a run, held so that nothing starts, stops or deletes them meanwhile.

A guest whose lock can be had is stopped and stays so. One that runs is worked on in frozen batches.
A plain tree has neither lock nor supervisor: it needs the promise that nothing writes there.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Final

from vstore import inode
from vstore.errors import NotPermitted, PoolBusy, ToolError, WrongUsage
from vstore.guest import COPY_ON_WRITE, Guest, RunState, hold_lock, load_state, rundir, vdirbase
from vstore.pool import POOL_NAME, find_mount_id
from vstore.record import dataclass
from vstore.window import LINGER_S

log = logging.getLogger(__name__)

_WAIT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Held:
    """A guest that this program may work on."""

    guest: Guest
    fd: int  # its root
    device: int
    cgroup: str  # of a running guest; empty for one that does not run
    is_served: bool = True  # shared files are copied on write, if it runs

    @property
    def is_running(self) -> bool:
        return bool(self.cgroup)


def default_pool() -> Path:
    """VDIRBASE/.pool."""
    return vdirbase() / POOL_NAME


def check_trees(guests: Sequence[Guest]) -> None:
    """Refuse trees that overlap: their files would be counted twice. Raises WrongUsage."""
    roots = sorted((os.path.realpath(guest.root), guest.name) for guest in guests)
    for (upper, first), (lower, second) in pairwise(roots):
        if lower == upper or lower.startswith(upper.rstrip("/") + "/"):
            raise WrongUsage(
                f"the tree of {second} ({lower}) is that of {first} ({upper}), or lies inside it",
                hint="name only one of them",
            )


@contextmanager
def hold_guests(
    guests: Sequence[Guest],
    pool: Path,
    *,
    offline: bool,
    on_refusal: list[tuple[str, str]] | None = None,
) -> Iterator[list[Held]]:
    """Hold each guest while the block runs; `offline` is the promise that nothing writes to plain
    trees.

    A guest that cannot be held is noted in `on_refusal` (its name, why) if that is given, else
    raises: NotPermitted for a plain tree without the promise; PoolBusy for a guest that another
    program holds.
    """
    check_trees(guests)
    with ExitStack() as stack:
        held: dict[int, Held] = {}
        # All programs lock in one order, so that no two wait for each other.
        for place in sorted(range(len(guests)), key=lambda place: guests[place].name):
            try:
                held[place] = _hold(guests[place], pool, offline, stack)
            except ToolError as error:
                if on_refusal is None:
                    raise
                on_refusal.append((guests[place].name, error.message))
        yield [held[place] for place in sorted(held)]


def _hold(guest: Guest, pool: Path, offline: bool, stack: ExitStack) -> Held:
    state = None
    if guest.is_configured:
        state = _lock_or_find_state(guest, pool, stack)
    elif not offline:
        raise NotPermitted(
            f"{guest.root}: a plain tree has nothing that breaks links on write, nor a lock",
            hint="add --offline if nothing writes there; its shared files can then be changed "
            "by `vpool break`, `vpool rm` or under vrun only",
        )
    fd = os.open(guest.root, inode.OPEN_FOLDER)
    stack.callback(os.close, fd)
    device = os.fstat(fd).st_dev
    if state is None:
        return Held(guest, fd, device, "")
    is_served = state.protection == COPY_ON_WRITE
    return Held(guest, fd, device, os.fspath(state.cgroup), is_served)


def check_served(held: Held) -> None:
    """Refuse to share inodes with a guest that runs and could not write to them.

    Raises NotPermitted.
    """
    if not held.is_served:
        raise NotPermitted(
            f"guest {held.guest.name}: runs without copy-on-write links, since it shared no files "
            "when it was started: it could not write to shared ones",
            hint=f"stop it for the first time; vserver {held.guest.name} status says when it has "
            "them",
        )


def _lock_or_find_state(guest: Guest, pool: Path, stack: ExitStack) -> RunState | None:
    state = load_state(guest.name)
    if state is None and stack.enter_context(hold_lock(guest.name, wait_s=_WAIT_S)):
        state = load_state(guest.name)  # alive although its monitor, which had the lock, is gone
        if state is None:
            return None
    state = state or load_state(guest.name)
    if state is None:
        raise PoolBusy(
            f"guest {guest.name}: another program starts, stops or works on it",
            hint="run the command again when that is done",
        )
    if state.pool is not None and os.path.realpath(state.pool) != os.path.realpath(pool):
        raise WrongUsage(
            f"guest {guest.name} runs with the pool {state.pool}, not {pool}",
            hint=f"use --pool {state.pool}, or stop the guest first",
        )
    return state


def check_same_mount(held: Held, pool_fd: int, *, pool: Path) -> None:
    """Refuse a guest that cannot share inodes with the pool.

    Raises WrongUsage for another mount, NotPermitted for another subvolume of the same one.
    """
    if find_mount_id(held.fd) != find_mount_id(pool_fd):
        raise WrongUsage(
            f"{held.guest.name}: {held.guest.root} is on another mount than the pool {pool}",
            hint="inodes are shared within one file system: name a pool there with --pool DIR",
        )
    if held.device != os.fstat(pool_fd).st_dev:
        raise NotPermitted(
            f"{held.guest.name}: {held.guest.root} is a subvolume of its own, "
            "which cannot share inodes",
            hint="share its blocks instead: --link reflink",
        )


def find_linger_s() -> float:
    """How long a lease outlives its window at present, as `Windows` asks for each batch."""
    return LINGER_S if any_guest_runs() else 0.0


def any_guest_runs() -> bool:
    """Whether a guest with a run state is alive on this host, so that its processes could reach
    shared inodes.
    """
    try:
        with os.scandir(rundir()) as entries:
            names = [entry.name for entry in entries if os.path.lexists(f"{entry.path}/state.json")]
    except OSError:
        return False
    for name in names:
        try:
            if load_state(name) is not None:
                return True
        except ToolError as error:
            log.info("%s: %s", name, error.message)
            return True  # a state that cannot be read may be a running guest's
    return False
