"""What keeps a guest's shared files from being changed, and how the guest may write all the same.

Shared files are immutable. A guest that has some gets copy-on-write links (vrun.cow): a filter that
notifies, and a supervisor beside its monitor. One that cannot have them does not start.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from vrun.context import Context
from vrun.cow.heir import NONE, OPEN
from vrun.errors import ToolError
from vstore.guest import COPY_ON_WRITE, rundir, vdirbase

LISTENER: Final = "listener"
"""What the first process, and one that joins, says when it hands its listener over."""

_ELSEWHERE: Final = "start it on the host, or give it files of its own: vunify --undo"
_POOL: Final = ".pool"
_FILTERS: Final = ".filters"


def find_pool() -> Path | None:
    """The pool that guests share their files with, if there is one with anything in it."""
    pool = vdirbase() / _POOL
    with suppress(OSError):
        for folder in os.scandir(pool / "objects"):
            with os.scandir(folder.path) as names:
                if next(names, None) is not None:
                    return pool
    return None


def choose(context: Context) -> str:
    """Which protection the guest is to have. Raises OSError."""
    if "LINUX_IMMUTABLE" in context.spec.capabilities:
        return OPEN
    pool = find_pool()
    if pool is None or pool.stat().st_dev != os.fstat(context.root_fd).st_dev:
        return NONE
    return COPY_ON_WRITE


def prepare(context: Context) -> None:
    """Make ready what serves the guest's calls; before any process of it is there.

    Raises OSError, ToolError: then the guest is not started.
    """
    context.protection = choose(context)
    if context.protection == COPY_ON_WRITE:
        _check_leases(context)
        from vrun.cow.keeping import Supervision  # a guest that shares nothing pays nothing

        context.supervision = Supervision(
            vdirbase() / _POOL, context.loop, context.audience.note, name=context.spec.name
        )
        context.supervision.begin()


def _check_leases(context: Context) -> None:
    from vstore import lease

    if not lease.are_all_seen():
        raise ToolError(
            f"guest {context.spec.name}: it shares files, and cannot be kept from writing to them "
            "here: this is not the host's namespace of processes, and /proc/locks does not show "
            "who waits for a killed program's leases",
            hint=_ELSEWHERE,
        )


def program(context: Context) -> bytes:
    """The filter that the guest's first process is to load; empty where it needs none.

    The library that makes one must not stay in the monitor.
    """
    if context.supervision is None:
        return b""
    from vrun.cow import notifyfilter

    folder = rundir() / _FILTERS
    if not notifyfilter.is_cached(folder):
        from vrun import child

        child.call(context.loop, lambda: len(notifyfilter.cached_program(folder)))
    return notifyfilter.cached_program(folder)


def begin(context: Context) -> None:
    """Have the guest's first process served, which has loaded the filter. Raises ToolError."""
    if context.supervision is not None:
        chain = context.running_chain()
        chain.expect(LISTENER)
        context.supervision.add(chain.fds.pop(0))
        context.supervision.start()


def take_over(context: Context) -> None:
    """Go on serving a guest whose monitor was killed: its supervisor hands the listeners over.

    Raises OSError, ToolError: its supervisor is gone too, and the guest cannot be helped.
    """
    from vrun.cow.keeping import Supervision

    supervision = Supervision(
        vdirbase() / _POOL, context.loop, context.audience.note, name=context.spec.name
    )
    context.supervision = supervision
    if not supervision.adopt():
        raise ToolError(
            f"guest {context.spec.name}: its supervisor is gone, and its shared files can only be "
            "read",
            hint=f"vserver {context.spec.name} restart",
        )
    supervision.start()
