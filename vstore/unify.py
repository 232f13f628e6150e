"""Unify guests: every file that they share becomes one immutable inode of the pool.

One run: walk the trees; find the files that can have an equal; make everything that is on them
durable; then read, plan, adopt and link batch by batch. Guests that run, and groups of equal files
too large for one batch, are read first and linked afterwards.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final

from vstore.exclude import Excludes
from vstore.hold import Held
from vstore.plan import Rules
from vstore.pool import Pool
from vstore.progress import SILENT, Progress
from vstore.recovery import recover
from vstore.run import Run

DEFAULT_MIN_SIZE: Final = 16


@dataclass(frozen=True, slots=True)
class Options:
    """What to unify and how."""

    rules: Rules = field(default_factory=Rules)
    min_size: int = DEFAULT_MIN_SIZE  # bytes
    jobs: int | None = None  # None: every core
    time_budget_s: float | None = None
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class Target:
    """A guest to unify, and what is left alone in it.

    `references`: the targets (refservers) with which alone it shares, at equal paths.
    """

    held: Held
    excludes: Excludes
    references: tuple[int, ...] = ()


@dataclass(slots=True)
class UnifyResult:
    """What a run found and did.

    Every regular file seen is unified, already unified, skipped or an error.
    """

    files_seen: int = 0
    files_unified: int = 0
    files_already: int = 0
    bytes_reclaimed: int = 0
    objects_new: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    errors: list[tuple[str, str]] = field(default_factory=list)
    attacks: int = 0
    seconds: float = 0.0

    def skip(self, reason: str, count: int = 1) -> None:
        if count:
            self.skipped[reason] = self.skipped.get(reason, 0) + count


def unify(
    targets: Sequence[Target], pool: Pool | None, options: Options, progress: Progress = SILENT
) -> UnifyResult:
    """Unify the targets with each other and with the pool, which is shared meanwhile.

    Without a pool (a dry run where none is yet) only what the targets share among themselves is
    counted. Raises PoolBusy, NoSpace; what concerns one file is in the result.
    """
    began = time.monotonic()
    result = UnifyResult()
    with ExitStack() as stack:
        if pool is not None:
            stack.enter_context(pool.share())
            if not options.dry_run:
                recover(pool)
        Run(targets, pool, options, progress, result, stack).carry_out()
    result.seconds = time.monotonic() - began
    return result
