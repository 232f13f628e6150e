"""dlimits/ of a guest: what it may store, by project quota with its number as the project.

The guest's tree is given to the project before it starts; what it makes later inherits that. A
guest that shares files as immutable inodes cannot have a project: no hard link leads into a folder
of another one. Such a guest is not started, since it would be limited in name only.
"""

import os
from functools import partial

from vrun import child, diskquota
from vrun.context import Context
from vrun.diskquota import Quota
from vrun.errors import ToolError
from vrun.spec import DiskLimit


def limit_tree(context: Context) -> None:
    """Have the guest's limits count; warns of those that cannot be had on this machine.

    Raises ToolError where they cannot go together with what the guest is, OSError.
    """
    for limit in context.spec.disk_limits:
        if limit.space_total is None and limit.inodes_total is None:
            continue
        if reason := _impossible(context, limit):
            context.audience.warn(
                f"{limit.where}: what the guest stores below {limit.directory} is not limited to "
                f"{limit.amounts}: {reason}"
            )
            continue
        if limit.reserved_percent:
            context.audience.warn(
                f"{limit.where}/reserved: project quota has nothing like it: the guest may use all "
                f"of its {limit.amounts}"
            )
        _limit(context, limit)


def _impossible(context: Context, limit: DiskLimit) -> str | None:
    """Why the machine cannot limit it; None where it can."""
    try:
        if limit.directory.stat().st_dev != os.fstat(context.root_fd).st_dev:
            return f"the guest's tree is on another file system than {limit.directory}"
    except OSError as error:
        return f"{limit.directory}: {error.strerror}"
    if not diskquota.is_enforced(context.root_fd):
        return "its file system has no project quota; mount it with prjquota"
    return None


def _limit(context: Context, limit: DiskLimit) -> None:
    project = context.xid
    shared: str | None = child.call(
        context.loop, partial(_give_tree, context.root_fd, project), keep=(context.root_fd,)
    )
    if shared is not None:
        raise ToolError(
            f"guest {context.spec.name}: {limit.where} limits what it stores, and "
            f"{context.spec.root}{shared} is shared with other guests (immutable): a file cannot "
            "be of two projects",
            hint=f"vunify --undo {context.spec.name} gives it files of its own, `touch "
            f"{limit.where}/disabled` gives the limit up; vunify --link reflink shares blocks "
            "under a limit",
        )
    diskquota.store(context.root_fd, project, Quota(limit.space_total, limit.inodes_total))


def _give_tree(root_fd: int, project: int) -> str | None:
    """The first file that cannot be given to the project, None where all were."""
    try:
        diskquota.give_tree(root_fd, project)
    except diskquota.Shared as error:
        return os.fsdecode(error.path)
    return None
