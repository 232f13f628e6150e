"""Unify guests: every file that they share becomes one immutable inode of the pool.

One run: walk the trees; find the files that can have an equal; make everything that is on them
durable; then read, plan, adopt and link batch by batch. Guests that run, and groups of equal files
too large for one batch, are read first and linked afterwards.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack

from vstore.guardedrecovery import recover_guarded
from vstore.order import Options, Target, UnifyResult
from vstore.pool import Pool
from vstore.progress import SILENT, Progress
from vstore.run import Run


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
                recover_guarded(pool)
        Run(targets, pool, options, progress, result, stack).carry_out()
    result.seconds = time.monotonic() - began
    return result
