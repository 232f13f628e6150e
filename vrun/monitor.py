"""The monitor: one small process for each guest that runs, parent of the guest's first process.

It starts the guest, keeps its console, serves the commands that ask for something, notes how the
guest ended, takes back what it had outside, and starts it again after a reboot. It holds the
guest's lock as long as it lives. When it is killed the guest runs on, and the next command that
needs a monitor forks a new one, which takes over what is on disk.
"""

import fcntl
import gc
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

from vrun import (
    control,
    ending,
    fence,
    inherited,
    launch,
    namespaces,
    protection,
    scripts,
    state,
    stop,
    syscalls,
)
from vrun.audience import Audience
from vrun.cgroup import Group
from vrun.config import load_spec
from vrun.console import Log, log_path
from vrun.context import Context
from vrun.control import Connection, Outcome
from vrun.cow import heir
from vrun.errors import ToolError
from vrun.loop import Aborted, Loop, close_all_but
from vrun.order import Order, Task
from vrun.spec import GuestSpec
from vrun.state import Ended, find_running
from vstore.guest import COPY_ON_WRITE, Guest
from vstore.heldback import signals_held_back
from vstore.record import replace

_QUICK_S: Final = 5.0
"""A guest that reboots sooner than this after its start is held back for a moment."""
_HOLD_BACK_S: Final = 1.0
_STATUS_WAIT_S: Final = 1.0
_LEFT_HINT: Final = "they wait for a device or a file server; look at /proc/PID/stack"


def fork(guest: Guest, task: Task, order: Order, lock_fd: int) -> Connection:
    """Fork the guest's monitor, which gets the lock behind `lock_fd`; what it tells comes here.

    The caller's descriptors 1 and 2 are where programs of the host write during a start or stop.
    """
    near, far = control.pair()
    with signals_held_back():
        pid = os.fork()
        if pid == 0:
            near.close()
            _be_monitor(guest, task, order, lock_fd, far)
    far.close()
    os.close(lock_fd)
    return near


def _be_monitor(
    guest: Guest, task: Task, order: Order, lock_fd: int, first: Connection
) -> NoReturn:
    try:
        host_fd = _settle(lock_fd, first)
        Monitor(guest, order, first, lock_fd=lock_fd, host_fd=host_fd).run(task)
    except ToolError as error:
        first.end(Outcome(1, error.message, error.hint))
    except OSError as error:
        first.end(Outcome(1, f"guest {guest.name}: its monitor cannot work: {error}"))
    except BaseException:  # noqa: BLE001 (the command that waits must hear of a bug of ours)
        first.end(_bug(guest.name))
    finally:
        os._exit(0)


def _bug(name: str) -> Outcome:
    import traceback

    return Outcome(1, f"guest {name}: its monitor failed: {traceback.format_exc()}")


def _settle(lock_fd: int, first: Connection) -> int:
    """Leave the session, the descriptors and the mounts of the command that forked us.

    Gives a descriptor of the host's mount namespace.
    """
    gc.freeze()  # what is there stays: it need not be looked through, nor be copied for that
    gc.enable()
    os.setsid()
    os.chdir("/")
    inherited.leave()
    syscalls.set_name(b"vserver-monitor")
    syscalls.set_child_subreaper()
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(ignored, signal.SIG_IGN)
    first.fds += [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in (1, 2)]
    null_fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for standard_fd in range(3):
        os.dup2(null_fd, standard_fd)
    host_fd = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    close_all_but({0, 1, 2, lock_fd, first.socket.fileno(), host_fd, *first.fds})
    return host_fd


class Monitor:
    """What the process is about; `run` is its life."""

    def __init__(
        self, guest: Guest, order: Order, first: Connection, *, lock_fd: int, host_fd: int
    ) -> None:
        """`first` is told how the first task goes. Raises OSError."""
        self._guest = guest
        self._order = order
        self._lock_fd = lock_fd
        self._host_fd = host_fd
        self._loop = Loop()
        self._log = Log(log_path(guest.name))
        self._audience = Audience(self._log)
        if self._log.trouble:
            first.warn(f"guest {guest.name}: its console is not kept: {self._log.trouble}")
        self._starter: Connection | None = first
        self._failure: Outcome | None = None
        """What the starter is told in the end."""
        self._context: Context | None = None
        self._starts = False
        self._is_starting = False
        self._wants_stop = False
        self._is_all_gone = True
        """No process of the guest is left of a start that failed."""
        signal.signal(signal.SIGTERM, self._terminated)
        self._listener = control.listen(guest.name)
        self._loop.watch(self._listener.fileno(), self._accept)
        self._admit(first)

    def run(self, task: Task) -> None:
        """Do the first task, and stay as long as the guest runs."""
        outcome = Outcome(0)
        try:
            self._take_own_mounts()
            if task in ("start", "clean"):
                self._clean()
                self._starts = task == "start"
            else:
                self._adopt(wants_stop=task == "stop")
            while self._starts and not self._wants_stop:
                self._live()
            self._let_others_have_it()
        except ToolError as error:
            outcome = Outcome(1, error.message, error.hint)
        except Exception:  # noqa: BLE001 (a bug of ours: the guest runs on and can be adopted)
            outcome = _bug(self._guest.name)
            self._audience.note(outcome.message)
        finally:
            control.stop_listening(self._guest.name, self._listener)
            fcntl.flock(self._lock_fd, fcntl.LOCK_UN)  # who hears of the end may start it again
            if self._starter and self._failure:
                self._audience.remove(self._starter)
                self._starter.end(self._failure)
            self._audience.end(outcome)

    # --- the commands that talk to us

    def _accept(self) -> None:
        with suppress(BlockingIOError):
            made, _ = self._listener.accept()
            made.setblocking(False)
            connection = Connection(made)
            self._loop.watch(made.fileno(), lambda: self._serve(connection))

    def _serve(self, connection: Connection) -> None:
        """Take the order that came over a new connection."""
        fields = connection.receive()
        self._loop.unwatch(connection.socket.fileno())
        match fields:
            case ["stop"]:
                self._admit(connection)
                self._ask_for_stop("it is being stopped")
            case ["listener"]:
                self._serve_joined(connection)
            case ["console", "follow" | "attach" as mode]:
                self._show_console(connection, attach=mode == "attach")
            case _:
                connection.end(Outcome(1, f"guest {self._guest.name}: cannot be asked for that"))
                connection.close()

    def _serve_joined(self, connection: Connection) -> None:
        """A process joins the guest: its calls wait at a listener of their own."""
        if self._context and self._context.supervision and connection.fds:
            self._context.supervision.add(connection.fds.pop(0))
            connection.end(Outcome(0))
        else:
            connection.end(Outcome(1, f"guest {self._guest.name}: nobody serves its shared files"))
        connection.close()

    def _show_console(self, connection: Connection, *, attach: bool) -> None:
        if self._context and self._context.console:
            self._context.console.add(connection, attach=attach)
        else:
            connection.end(Outcome(1, f"guest {self._guest.name}: has no console at the moment"))
            connection.close()

    def _admit(self, connection: Connection) -> None:
        """From now on the command hears how things go."""
        self._audience.add(connection)
        self._loop.watch(connection.socket.fileno(), lambda: self._hear(connection))

    def _hear(self, connection: Connection) -> None:
        """It says nothing any more, so it is gone."""
        was_starter = connection is self._starter
        self._dismiss(connection)
        if was_starter and self._is_starting:
            self._loop.abort("the command that started it is gone")

    def _dismiss(self, connection: Connection) -> None:
        if connection is self._starter:
            self._starter = None
        self._audience.remove(connection)
        self._loop.unwatch(connection.socket.fileno())
        connection.close()

    def _tell(self, outcome: Outcome) -> None:
        """Give all who wait the last word."""
        for connection in self._audience.end(outcome):
            self._dismiss(connection)

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        self._ask_for_stop("its monitor is told to end")

    def _ask_for_stop(self, reason: str) -> None:
        self._wants_stop = True
        if self._is_starting:
            self._loop.abort(reason)

    # --- the guest

    def _live(self) -> None:
        """One run of the guest, from its start to its end."""
        self._starts = False
        spec = load_spec(self._guest, profile=self._order.profile)
        fence.take(self._guest)
        context = self._new_context(spec)
        self._audience.logfile = context.spec.helper.logfile
        for warning in context.spec.warnings:
            self._audience.warn(warning)
        self._context = context  # a process may join before the start is over
        try:
            self._start(context)
        except (ToolError, Aborted) as error:
            self._context = None
            self._is_all_gone = not context.processes()
            context.close()
            self._failed(error)
            return
        self._order = replace(self._order, rescue=None)  # a reboot starts the guest itself
        if not self._wants_stop:
            self._tell(Outcome(0))
        self._stay(context)

    def _start(self, context: Context) -> None:
        self._is_starting = True
        try:
            launch.start(context)
        finally:
            self._is_starting = False
            self._loop.allow_abort()
        if context.spec.noisy or self._order.is_noisy:
            addresses = " ".join(str(address.ip) for address in context.spec.addresses)
            shown = context.spec.display_name
            self._audience.say(f"{shown}: context {context.xid}, addresses: {addresses or 'none'}")
        self._run_detached(ending.startup_program(context.spec.helper), context)

    def _let_others_have_it(self) -> None:
        """Other hosts may start it: nothing of it runs, and nothing of it is mounted here."""
        if not self._is_all_gone:
            return
        self._take_own_mounts()
        try:
            fence.release(self._guest)
        except OSError as error:
            self._audience.warn(
                f"guest {self._guest.name}: cannot note that it does not run here: {error}"
            )

    def _failed(self, error: ToolError | Aborted) -> None:
        """The start failed, and is undone: say so, and note it for those who ask later."""
        if isinstance(error, ToolError):
            hint = error.hint
            message = error.message
        else:
            hint = None
            message = f"guest {self._guest.name}: its start was given up: {error}"
        self._keep(Ended("failed", None, message))
        self._audience.note(message)
        self._failure = Outcome(1, message, hint)

    def _keep(self, ended: Ended) -> None:
        try:
            state.write_ended(self._guest.name, ended)
        except OSError as error:
            self._audience.warn(f"guest {self._guest.name}: cannot note how it ended: {error}")

    def _stay(self, context: Context) -> None:
        """Watch the guest until it ends or is to be stopped, and take back what it had."""
        began = time.monotonic()
        self._loop.wait(lambda: self._wants_stop or not context.is_alive)
        was_asked = self._wants_stop
        self._renew_spec(context)
        if was_asked:
            stop.ask(context)
        left = stop.end(context)
        ended = self._note_end(context, was_asked=was_asked)
        context.close()
        self._context = None
        self._take_own_mounts()
        if left:
            pids = " ".join(map(str, left))
            raise ToolError(
                f"guest {self._guest.name}: not even SIGKILL has ended its processes {pids}",
                hint=_LEFT_HINT,
            )
        self._decide(ended, context, began)

    def _note_end(self, context: Context, *, was_asked: bool) -> Ended:
        """Reaps the guest's first process too: the host's need not be quick at that."""
        deadline = time.monotonic() + _STATUS_WAIT_S
        if context.is_ours:
            self._loop.wait(lambda: context.init_status() is not None, deadline=deadline)
        is_needed = context.is_ours or not was_asked  # the kernel may take long to tell
        status = context.init_status() if is_needed else None
        ended = ending.describe(status, was_asked=was_asked, is_ours=context.is_ours)
        self._keep(ended)
        self._audience.note(f"guest {self._guest.name}: {ended.text}")
        return ended

    def _decide(self, ended: Ended, context: Context, began: float) -> None:
        """Start it again, or run what the administrator wants run instead."""
        helper = context.spec.helper
        self._run_detached(ending.end_program(ended, helper), context)
        self._starts = ending.wants_restart(ended, helper)
        if self._starts and time.monotonic() - began < _QUICK_S:
            deadline = time.monotonic() + _HOLD_BACK_S
            self._loop.wait(lambda: self._wants_stop, deadline=deadline)

    def _run_detached(self, argv: list[str] | None, context: Context) -> None:
        """Run a program of apps/vshelper; nobody waits for it, since it may start the guest."""
        stdio = self._audience.stdio()
        if argv and self._loop.fork(keep=stdio.fds) == 0:
            scripts.become([*argv, str(context.xid)], Path("/"), stdio)

    # --- what another monitor left

    def _new_context(self, spec: GuestSpec) -> Context:
        return Context(spec, self._order, self._loop, self._audience, self._log, self._host_fd)

    def _adopt(self, *, wants_stop: bool) -> None:
        """Take over a guest whose monitor was killed, and stay with it."""
        name = self._guest.name
        running = find_running(name)
        if running is None:
            raise ToolError(f"guest {name}: has ended just now")
        resources = state.load_resources(name) or state.Resources(running.xid)
        self._order = replace(self._order, profile=resources.profile)
        context = self._new_context(self._load_spec_anyhow(resources.profile))
        context.resources = resources
        made = context.resources.cgroup
        context.group = Group.from_record(made) if made else Group.load(running.cgroup)
        context.group.take_monitor()
        context.take_init(running.init_pid)
        context.root_fd = os.open(f"/proc/{running.init_pid}/root", os.O_PATH | os.O_DIRECTORY)
        context.is_ours = False
        context.protection = running.protection
        if running.protection == COPY_ON_WRITE and not wants_stop:
            protection.take_over(context)
        self._context = context
        self._wants_stop |= wants_stop
        if not wants_stop:
            self._audience.note("its monitor was gone, and a new one has taken over")
            self._tell(Outcome(0))
        self._stay(context)

    def _load_spec_anyhow(self, profile: str | None) -> GuestSpec:
        """Its settings; a guest that runs must be stoppable when they cannot be read any more."""
        try:
            return load_spec(self._guest, profile=profile)
        except ToolError as error:
            self._audience.warn(error.message)
            return GuestSpec(name=self._guest.name, root=self._guest.root)

    def _renew_spec(self, context: Context) -> None:
        """How it is stopped is what its settings say now; what it is stays as it was started."""
        if not context.is_ours:
            return  # they were read a moment ago
        try:
            now = load_spec(self._guest, profile=self._order.profile)
        except ToolError as error:
            self._audience.warn(error.message)
            return
        init = replace(
            context.spec.init,
            kill_signals=now.init.kill_signals,
            cmd_stop=now.init.cmd_stop,
            cmd_stop_sync=now.init.cmd_stop_sync,
            runlevel_stop=now.init.runlevel_stop,
        )
        context.spec = replace(context.spec, init=init, scripts=now.scripts, helper=now.helper)

    def _clean(self) -> None:
        """Take back what a run left whose monitor was killed, and the guest with it."""
        name = self._guest.name
        resources = state.load_resources(name)
        if resources is not None:
            context = self._new_context(self._load_spec_anyhow(resources.profile))
            context.resources = resources
            stop.clean(context)
        state.forget_run(name)
        heir.forget(name)

    def _take_own_mounts(self) -> None:
        """Begin with the host's mounts: what was mounted for a run goes with its namespace."""
        syscalls.setns(self._host_fd, namespaces.FLAGS["mnt"])
        syscalls.unshare(namespaces.FLAGS["mnt"])
        namespaces.receive_only()
