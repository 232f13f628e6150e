"""Unify many guests while nobody waits for it: with what others leave of processors and disks.

What is done, and how safely, is vstore's; see vunify(8). Guests that run stay up.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vrun import syscalls
from vstore.guest import Guest
from vstore.order import Options, UnifyResult
from vstore.progress import SILENT, Progress
from vstore.record import dataclass, field
from vstore.targets import choose_pool, open_campaign
from vstore.unify import unify

_LOWEST_NICE: Final = 19
_IOPRIO_CLASS_IDLE: Final = 3  # linux/ioprio.h


@dataclass(slots=True)
class Night:
    """What was done in all pools."""

    guests: int
    result: UnifyResult = field(default_factory=UnifyResult)
    refused: list[tuple[str, str]] = field(default_factory=list)
    """Guests that were left alone, each with the reason."""


def step_back() -> None:
    """Take the lowest priorities of processor and disk, for this process and all that it forks.

    Class idle is heeded by the schedulers bfq and mq-deadline; see ioprio_set(2). Raises OSError.
    """
    os.setpriority(os.PRIO_PROCESS, 0, _LOWEST_NICE)
    wanted = _IOPRIO_CLASS_IDLE << syscalls.IOPRIO_CLASS_SHIFT
    syscalls.ioprio_set(syscalls.IOPRIO_WHO_PROCESS, 0, wanted)


def unify_guests(
    guests: Sequence[Guest],
    *,
    budget_s: float | None = None,
    jobs: int | None = None,
    progress: Progress = SILENT,
) -> Night:
    """Unify the guests with each other and with what their pools hold.

    Begins nothing new after `budget_s` seconds. Raises PoolBusy, NoSpace and what opening a pool
    raises; what concerns one guest or one file is in the answer.
    """
    night = Night(len(guests))
    for pool, members in _by_pool(guests).items():
        left = None if budget_s is None else max(0.0, budget_s - night.result.seconds)
        options = Options(jobs=jobs, time_budget_s=left)
        with open_campaign(
            members, pool, offline=False, dry_run=False, exclude_from=None, tolerant=True
        ) as campaign:
            night.refused += campaign.refused
            night.result.add(unify(campaign.targets, campaign.pool, options, progress))
    return night


def _by_pool(guests: Sequence[Guest]) -> dict[Path, list[Guest]]:
    """The guests of each pool; one that runs is in the pool that it was started with."""
    found: dict[Path, list[Guest]] = {}
    for guest in guests:
        found.setdefault(choose_pool([guest], None), []).append(guest)
    return found
