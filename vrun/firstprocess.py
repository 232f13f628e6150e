"""The monitor's side of a guest's first process: fork it, hear of it, let it go on.

What it does itself is in birth.py.
"""

import errno
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NoReturn

from vrun import (
    birth,
    ceiling,
    lxcfs,
    mounts,
    namespaces,
    outside,
    protection,
    seccomp,
    state,
    styles,
    syscalls,
)
from vrun.cgroup import Group
from vrun.chain import Chain, FarEnd
from vrun.console import Console
from vrun.context import Context
from vrun.errors import ToolError
from vrun.reports import Reports
from vrun.scripts import Stdio
from vstore.guest import RunState, rundir, vdirbase

_NEW_S: Final = 0.03
"""Processor time that an init has used which is not new any more, though it never came to rest."""
_WATCHED_S: Final = 5.0
"""So long at most an init is watched that gets no processor time."""
_LOOK_S: Final = 0.001
_SETTLED_LOOKS: Final = 2

_KILL_WAIT_S: Final = 10.0


def launch(context: Context, steps: tuple[birth.Step, ...]) -> None:
    """Fork the guest's first process, which does `steps`."""
    chain = Chain(context.spec.name, context.loop, context.audience.warn)
    context.chain = chain
    near, far = socket.socketpair()
    context.reports_fd, report_fd = near.detach(), far.detach()
    try:
        plan = _plan_birth(context, FarEnd(chain.far), report_fd)
        kept = {chain.far.socket.fileno(), report_fd, context.network_fd} - {-1}
        with _in_root(context):
            pid = context.loop.forked(_fork(context, plan.group), kept)
            if pid == 0:
                birth.run(steps, plan)
        context.take_init(pid)
    finally:
        os.close(report_fd)
        chain.close_far()


@contextmanager
def _in_root(context: Context) -> Iterator[None]:
    os.fchdir(context.root_fd)
    try:
        yield
    finally:
        os.chdir("/")


def _fork(context: Context, group: Group) -> int:
    """Fork into the guest's cgroup and namespaces; that of cgroups is taken in there.

    The working directory is the one thing that the kernel carries over into a new mount namespace:
    no descriptor of the root is good for mounts there, and its path may lead elsewhere by now.
    """
    kinds = {"mnt", "pid", "uts", "ipc"} | ({"net"} if context.spec.network == "own" else set())
    flags = namespaces.flags_of(kinds)
    if "virt_uptime" not in context.spec.flags or not namespaces.has_time():
        return group.fork(flags)
    own_fd = namespaces.begin_uptime()
    try:
        pid = group.fork(flags)
    except BaseException:
        namespaces.end_uptime(own_fd)
        raise
    if pid:
        namespaces.end_uptime(own_fd)
    return pid


def _plan_birth(context: Context, far: FarEnd, report_fd: int) -> birth.Birth:
    spec, rescue = context.spec, context.order.rescue
    options = _root_options(context)
    for text in mounts.warnings(options):
        context.audience.warn(f"guest {spec.name}: {text}")
    return birth.Birth(
        spec=spec,
        group=outside.group_of(context),
        program=styles.start_program(
            spec, rescue, context.resolve, is_traced=context.order.debug_rc
        ),
        kind="exec" if styles.is_pid_one(spec, rescue) else "wait",
        root=options,
        filter=_load_filter(context),
        notifying=protection.program(context),
        far=far,
        report_fd=report_fd,
        network_fd=context.network_fd,
    )


def _load_filter(context: Context) -> bytes:
    """The guest's system call filter; the library that makes one must not stay in the monitor."""
    spec, folder = context.spec, rundir() / ".filters"
    umask = spec.umask | seccomp.personality_words(spec.personality)
    words = (spec.capabilities, spec.ccaps, umask)
    if not seccomp.is_cached(folder, *words):
        from vrun import child

        child.call(context.loop, lambda: len(seccomp.cached_program(folder, *words)))
    return seccomp.cached_program(folder, *words)


def _root_options(context: Context) -> mounts.RootOptions:
    spec = context.spec
    is_systemd = styles.is_systemd(spec, context.resolve)
    owns_network = spec.network in ("own", "named")
    return mounts.RootOptions(
        root=Path(),  # the working directory, see _fork()
        nodev="MKNOD" not in spec.capabilities,
        owns_network=owns_network,
        sets_hostname="set_utsname" in spec.ccaps,
        cgroup="rw" if is_systemd else "ro",
        run_tmpfs=is_systemd,
        tun=owns_network and "tun_create" in spec.ncaps,
        console=True,
        figures=lxcfs.find_files(spec.flags),
        devices=spec.devices,
        sysctls=spec.sysctls,
        mounts=spec.mounts,
    )


def kill(context: Context) -> None:
    """Kill the guest's first process, and reap it."""
    context.signal_init(signal.SIGKILL)
    context.loop.wait(lambda: not context.is_alive, deadline=time.monotonic() + _KILL_WAIT_S)
    context.init_status()


def await_ready(context: Context) -> None:
    """Wait until the guest's first process has done all but to execute its init."""
    chain = context.running_chain()
    chain.expect("console")
    context.console = Console(chain.fds.pop(0), context.loop, context.log)
    protection.begin(context)
    chain.expect("ready")


def write_state(context: Context) -> None:
    """Say that the guest runs, before anything of it does: then nothing runs that nobody knows."""
    spec = context.spec
    ceiling.write(spec.name, ceiling.of(spec))
    pool = vdirbase() / ".pool"
    running = RunState(
        xid=context.xid,
        init_pid=context.init_pid,
        init_start=state.start_of(context.init_pid),
        cgroup=outside.group_of(context).path,
        pool=pool if pool.is_dir() else None,
        protection=context.protection,
    )
    state.write_state(spec.name, running)


def forget_state(context: Context) -> None:
    state.forget_state(context.spec.name)
    ceiling.forget(context.spec.name)


def execute_init(context: Context) -> None:
    """Let the guest's init be executed, and see that it does not end at once."""
    reports = Reports(context.reports_fd, context.loop)
    context.reports_fd, context.reports = -1, reports
    if _waits_for_scripts(context) and context.console:
        context.console.echo = context.audience.first
    reports.let_go()
    number = reports.wait_for_program()
    context.running_chain().close()
    context.chain = None
    if number:
        raise _cannot_execute(context, number)
    if styles.is_pid_one(context.spec, context.order.rescue):
        _watch_init(context)
        _check_end(context, context.init_status())


def _watch_init(context: Context) -> None:
    """Wait until the guest's init has ended, or waits for something, or is not new any more.

    Its age is what it has worked: on a busy machine one that fails at once may take long for that.
    """
    looks = 0
    begun_s = context.init_worked_s()

    def is_settled() -> bool:
        nonlocal looks
        looks = looks + 1 if context.init_waits() else 0
        is_old = context.init_worked_s() - begun_s > _NEW_S
        return not context.is_alive or looks > _SETTLED_LOOKS or is_old

    deadline = time.monotonic() + _WATCHED_S
    context.loop.wait(is_settled, deadline=deadline, every=_LOOK_S)


def await_scripts(context: Context) -> None:
    """Wait until rc scripts are done; what they print goes to the command that waits."""
    if context.reports is None or not _waits_for_scripts(context):
        return
    try:
        _check_end(context, context.reports.wait_for_end())
    finally:
        if context.console:
            context.console.flush()
            context.console.echo = None


def _waits_for_scripts(context: Context) -> bool:
    """Whether what starts the guest is to end before its start is done."""
    rescue = context.order.rescue
    return not styles.is_pid_one(context.spec, rescue) and (rescue is None or bool(rescue.argv))


def await_sync(context: Context) -> None:
    """Run apps/init/cmd.start-sync inside, which waits until the guest is up."""
    init = context.spec.init
    if init.cmd_start_sync and (init.sync or context.order.sync) and not context.order.rescue:
        status = run_inside(context, styles.Program(init.cmd_start_sync))
        if status:
            raise ToolError(
                f"guest {context.spec.name}: {init.cmd_start_sync[0]}, its cmd.start-sync, "
                f"ended with status {status}"
            )


def run_inside(
    context: Context, program: styles.Program, *, deadline: float | None = None
) -> int | None:
    """Run a program in the guest as `exec` does; its exit status, None when it takes too long."""
    stdio = context.audience.stdio()
    settings = [f"{key}={value}" for key, value in program.environment]
    argv = ("env", *settings, *program.argv) if settings else program.argv
    pid = context.loop.fork(keep=stdio.fds)
    if pid == 0:
        _exec_inside(context.spec.name, argv, stdio)
    try:
        status = context.loop.wait_child(pid, deadline=deadline)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    if status is None:
        os.kill(pid, signal.SIGKILL)
        return None
    return os.waitstatus_to_exitcode(status)


def _exec_inside(name: str, argv: tuple[str, ...], stdio: Stdio) -> NoReturn:
    """In a child of the monitor; `enter` is only imported there."""
    status = 125
    try:
        syscalls.set_parent_death_signal(signal.SIGTERM)
        for number, fd in enumerate(stdio.fds):
            os.dup2(fd, number)
        from vrun import enter

        status = enter.execute(name, argv)
    except ToolError as error:
        os.write(2, os.fsencode(f"vserver: {error.message}\n"))
        status = error.exit_code
    finally:
        os._exit(status)


def _cannot_execute(context: Context, number: int) -> ToolError:
    argv = styles.start_program(context.spec, context.order.rescue, context.resolve).argv
    return ToolError(
        f"guest {context.spec.name}: cannot execute its init {argv[0]}: {os.strerror(number)}",
        hint="apps/init/style and apps/init/cmd.start say what starts the guest"
        if number == errno.ENOENT
        else None,
    )


def _check_end(context: Context, status: int | None) -> None:
    """Complain of what starts the guest if it has ended already, and not well."""
    code = os.waitstatus_to_exitcode(status) if status is not None else 0
    if not code:
        return
    how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
    is_init = styles.is_pid_one(context.spec, context.order.rescue)
    what = "its init" if is_init else "what starts it"
    raise ToolError(
        f"guest {context.spec.name}: {what} {how}",
        hint=f"what it wrote stands in {context.log.path}",
    )
