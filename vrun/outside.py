"""What a guest has outside itself, each piece made by one step of launch.py and undone by another.

All of it runs in the guest's monitor. What is undone is found in `Context.resources`, which is on
disk before anything is made, so that it can be undone by the next command when the monitor is
killed. Every undo may find nothing to do.
"""

import os
import signal
import stat
from functools import partial
from pathlib import Path
from typing import Any, Final

from vrun import (
    cgroup,
    mounts,
    prepare,
    scripts,
    state,
    styles,
    syscalls,
    systemd,
)
from vrun.cgroup import Group
from vrun.context import Context
from vrun.errors import ToolError
from vrun.grouplimits import controllers_of, limit_group
from vrun.hierarchy import find_hierarchies
from vstore.record import replace

_FSCK_GOOD: Final = (0, 1)  # fsck(8): no errors, or all corrected


# --- scripts


def run_initialize(context: Context) -> None:
    context.run_scripts("initialize", strict=True)


def run_prepre_start(context: Context) -> None:
    context.run_scripts("prepre-start", strict=True)


def run_pre_start(context: Context) -> None:
    context.run_scripts("pre-start", strict=True)


def run_post_start(context: Context) -> None:
    context.run_scripts("post-start", strict=True)


# --- its tree


def open_root(context: Context) -> None:
    """Hold the guest's root by a descriptor; it must still be the directory that it was."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    context.root_fd = os.open(context.spec.root, flags)


def check_file_systems(context: Context) -> None:
    """fsck(8) of the block devices of its fstab whose sixth column is not 0."""
    for mount in context.spec.mounts:
        if mount.fsck_pass and _is_block_device(mount.source):
            status = _run(context, ["/sbin/fsck", "-a", mount.source])
            if status not in _FSCK_GOOD:
                raise ToolError(
                    f"guest {context.spec.name}: {mount.where}: fsck of {mount.source} "
                    f"ended with status {status}"
                )


def _is_block_device(source: str) -> bool:
    try:
        return stat.S_ISBLK(Path(source).stat().st_mode)
    except OSError:
        return False


def _run(context: Context, argv: list[str]) -> int:
    """Run a program of the host; its exit status."""
    stdio = context.audience.stdio()
    pid = context.loop.fork(keep=stdio.fds)
    if pid == 0:
        syscalls.set_parent_death_signal(signal.SIGKILL)
        scripts.become(argv, context.spec.root, stdio)
    return scripts.wait(context.loop, pid)


def limit_disk(context: Context) -> None:
    """Its dlimits/, before anything is mounted in its tree."""
    if context.spec.disk_limits:
        from vrun import disklimits  # few guests have any

        disklimits.limit_tree(context)


def mount_fstab(context: Context) -> None:
    """Mount its fstab in the monitor's mount namespace; the guest's own gets a copy of it."""
    lines = context.spec.mounts
    roots = [line for line in lines if line.target == "/"]
    if roots:
        mounts.mount_fstab(context.spec.root, roots)
        os.close(context.root_fd)
        open_root(context)
    here = [line for line in lines if not line.remote and line not in roots]
    run_tmpfs = styles.is_systemd(context.spec, context.resolve)
    if here:
        mounts.mount_fstab(context.spec.root, here, run_tmpfs=run_tmpfs)
    if remote := [line for line in lines if line.remote and line not in roots]:
        restrict_network(context)
        from vrun import child

        group, root = group_of(context), context.spec.root

        def mount_restricted() -> None:
            group.join()
            mounts.mount_fstab(root, remote, run_tmpfs=run_tmpfs)

        child.call(context.loop, mount_restricted)


def look_at_init(context: Context) -> None:
    """systemd gives its services less than it has: SETPCAP takes away, and gives nothing more."""
    if styles.is_systemd(context.spec, context.resolve):
        kept = context.spec.capabilities | {"SETPCAP"}
        context.spec = replace(context.spec, capabilities=kept)


def prepare_tree(context: Context) -> None:
    spec = context.spec
    prepare.write_mtab(spec, context.root_fd)
    if spec.init.cmd_prepare and not context.order.rescue:
        status = _run(context, list(spec.init.cmd_prepare))
        if status:
            raise ToolError(
                f"guest {spec.name}: {spec.init.cmd_prepare[0]}, its apps/init/cmd.prepare, "
                f"ended with status {status}"
            )
    else:
        prepare.prepare(spec, context.root_fd)


# --- number and cgroups


def take_number(context: Context) -> None:
    def keep(xid: int) -> None:
        context.resources = state.Resources(xid, profile=context.order.profile)
        state.write_resources(context.spec.name, context.resources)  # its cgroup is found by it

    state.reserve_xid(context.spec.name, context.spec.xid, is_taken=_has_group, note=keep)


def _has_group(xid: int) -> bool:
    """Whether there is a cgroup of that number where they usually are."""
    v2 = find_hierarchies().v2
    scope = v2 / systemd.SLICE / systemd.scope_name(xid)
    return scope.exists() or (v2 / cgroup.BASE / str(xid)).exists()


def give_number_back(context: Context) -> None:
    """The last undo, also of the record of what is to be undone, unless something is left."""
    if context.group is not None:
        return
    if context.xid:
        state.release_xid(context.spec.name, context.xid)
    state.forget_run(context.spec.name)


def make_groups(context: Context) -> None:
    spec = context.spec
    context.group = cgroup.create(
        context.xid, spec.cgroup, cpuset=spec.cpuset, controllers=controllers_of(spec)
    )
    context.resources = replace(context.resources, cgroup=context.group.as_record())
    state.write_resources(spec.name, context.resources)


def find_groups(context: Context) -> None:
    """The groups of a run that another monitor began, unless another guest has the number now."""
    record = context.resources.cgroup
    if not state.has_xid(context.spec.name, context.xid):
        return
    if record:
        context.group = Group.from_record(record)
    else:  # it was killed while it made them
        spec = context.spec
        context.group = cgroup.create(context.xid, spec.cgroup, cpuset=spec.cpuset)


def limit_groups(context: Context) -> None:
    for text in limit_group(group_of(context), context.spec):
        context.audience.warn(f"guest {context.spec.name}: {text}")


def remove_groups(context: Context) -> None:
    """Kill what is left in them, and remove them."""
    if context.group is not None:
        context.group.kill()
        context.group.remove()
        context.group = None


def group_of(context: Context) -> Group:
    if context.group is None:
        raise ToolError(f"guest {context.spec.name}: has no cgroup")
    return context.group


# --- network


def add_addresses(context: Context) -> None:
    """Give the host's devices the guest's addresses, unless the guest has a network of its own."""
    spec = context.spec
    if spec.addresses and not spec.has_own_network:
        from vrun import child

        work = partial(_network_call, "bring_up", spec.name, spec.addresses)
        for text in child.call(context.loop, work):
            context.audience.warn(f"guest {spec.name}: {text}")


def remove_addresses(context: Context) -> None:
    """Take back addresses and devices, and a named network namespace that was made for it."""
    from vrun import child, claims, netspace

    name = context.resources.network.get("netns")
    if name:
        netspace.remove(name, context.host_fd)
    with claims.locked() as known:
        is_something_left = bool(known.used_by(context.spec.name))
    if is_something_left:
        child.call(context.loop, partial(_network_call, "take_down", context.spec.name))


def _network_call(function: str, *arguments: object) -> Any:
    """In a child: what it imports of pyroute2 is not to be kept for years."""
    from vrun import network

    return getattr(network, function)(*arguments)


def restrict_network(context: Context) -> None:
    """Keep its sockets to its addresses, where it shares the host's network."""
    spec = context.spec
    if spec.network == "bound" and not context.is_restricted:
        from vrun import chbind  # the guest's first process is at work meanwhile

        context.is_restricted = True
        for text in chbind.restrict(group_of(context).path, spec, context.xid):
            context.audience.warn(f"guest {spec.name}: {text}")


def open_network(context: Context) -> None:
    """Find or make the network namespace that the guest is to enter, if it is not a new one."""
    spec = context.spec
    if spec.network not in ("join", "named"):
        return
    from vrun import child, netspace

    if spec.network == "join":
        context.network_fd = netspace.open_of_guest(spec.join_net or "")
    else:
        name = spec.netns_name or ""
        if not spec.netns_keep:
            netspace.check_free(name, context.host_fd)
            made = {**context.resources.network, "netns": name}
            context.resources = replace(context.resources, network=made)
            state.write_resources(spec.name, context.resources)
            child.call(
                context.loop, partial(netspace.make, name, context.host_fd), keep=(context.host_fd,)
            )
        context.network_fd = netspace.open_named(name, context.host_fd)


def configure_network(context: Context) -> None:
    """Put devices, addresses and routes into the guest's own network namespace."""
    spec = context.spec
    if spec.network == "own":
        context.network_fd = os.open(f"/proc/{context.init_pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        _configure(context)
        context.running_chain().go_on()
    elif spec.network == "named" and not spec.netns_keep:
        _configure(context)


def _configure(context: Context) -> None:
    from vrun import child

    spec = context.spec
    arguments = (spec.name, context.xid, spec.links, spec.addresses, context.network_fd)
    work = partial(_network_call, "configure_own", *arguments)
    child.call(context.loop, work, keep=(context.network_fd,))
