"""The supervisor of a guest: a process of its own, outside of the guest, that serves its calls.

It is a child of the guest's monitor, in the host's namespaces and never in a cgroup of a guest. A
call that is not answered waits; a call of a guest without a supervisor fails. Whatever goes wrong
here ends in letting the call go on, and the kernel then refuses to change what is frozen.
"""

import errno
import gc
import logging
import os
import resource
import select
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, NoReturn

from vrun import syscalls
from vrun.control import Connection
from vrun.cow import heir
from vrun.cow.breaking import Break, Changed, Workshop
from vrun.cow.desk import Answered, Asked, Deferred, Desk
from vrun.cow.dispatch import BY_NUMBER
from vrun.cow.notifications import Call, Gone, Listener, Page
from vrun.cow.objects import Objects
from vrun.cow.paths import Roots
from vrun.cow.quick import LOOKS, IsPlain
from vrun.cow.rights import Own
from vrun.errors import ToolError
from vrun.noimports import refuse_imports
from vstore.keeper import Keeper
from vstore.pool import Pool, find_file_system
from vstore.record import dataclass
from vstore.recovery import settle_stage
from vstore.window import Windows

log = logging.getLogger(__name__)

LISTENER: Final = "listener"
"""The monitor's message with one more listener."""
ATTACK: Final = "attack"
WARN: Final = "warn"
SETTLED: Final = "settled"

_OPEN_FILES: Final = 1 << 16
_KEEPS_ORDER: Final = ("ext4", "btrfs")
"""File systems where a rename over another file waits for the data of the file that is renamed."""
_MOST_COPIES: Final = 4
_QUIET_MS: Final = 50.0


@dataclass(slots=True, kw_only=True)
class Duty:
    """What a supervisor gets from the monitor that forks it."""

    pool: Path
    page: Page
    listeners: Sequence[int]
    """In the order in which the guest's processes brought them; -1 for one that has ended."""
    stage_fd: int
    keeper: socket.socket
    """The holder's end of its keeper."""
    control: Connection
    bequest: Keeper | None
    """The keeper of a supervisor that was killed, with the leases that it had."""
    linger_s: float
    heir: socket.socket | None
    """Where a new monitor asks for the listeners when the old one is gone."""

    def fds(self) -> list[int]:
        """What it must keep open."""
        sockets = [self.keeper.fileno(), self.control.socket.fileno()]
        held = self.bequest.held_fds() if self.bequest else []
        heir_fds = [self.heir.fileno()] if self.heir else []
        return [*self.listeners, self.stage_fd, *sockets, *heir_fds, *held]


def be_supervisor(duty: Duty) -> NoReturn:
    """Serve until no process of the guest is left. To be called in a forked process."""
    gc.freeze()  # looking for garbage among what the monitor made would unshare its memory
    try:
        syscalls.set_name(heir.PROCESS_NAME.encode())
        syscalls.refuse_core_dumps()
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)
        os.chdir("/")
        os.umask(0)
        logging.getLogger().handlers[:] = [_Teller(duty.control)]
        Supervisor(duty).serve()
    except (OSError, ToolError) as error:
        duty.control.warn(f"the supervisor cannot work: {error}")
    except Exception as error:  # noqa: BLE001 (a bug of ours must reach a person; no traceback: it
        # would be read from files inside the guest)
        duty.control.warn(f"the supervisor failed: {error!r}")
    finally:
        os._exit(1)


class _Teller(logging.Handler):
    """Passes warnings on to the monitor."""

    def __init__(self, control: Connection) -> None:
        super().__init__(logging.WARNING)
        self._control = control

    def emit(self, record: logging.LogRecord) -> None:
        self._control.send(WARN, record.getMessage())


@dataclass(slots=True)
class _Copying:
    """A process that fills a private copy, and the calls that wait for it."""

    pid: int
    work: Break
    ino: int
    waiting: list[tuple[Asked, int]]
    """With the slot of the page in which each is kept."""


class Supervisor:
    """One process's state."""

    def __init__(self, duty: Duty) -> None:
        """Puts right what a supervisor that was killed has left. Raises OSError, ToolError."""
        self._duty = duty
        self._page = duty.page
        self._control = duty.control
        allow_open_files()
        pool = Pool.load(duty.pool)
        if duty.bequest is not None:
            duty.bequest.take_over(lambda leased: settle_stage(pool, duty.stage_fd, leased))
        duty.control.send(SETTLED)
        windows = Windows(
            duty.keeper, pool_fd=pool.fd, stage_fd=duty.stage_fd, linger_s=duty.linger_s
        )
        kind = find_file_system(duty.pool)
        self._shop = Workshop(
            pool, windows, duty.stage_fd, Objects(pool), Roots(), Own(), kind not in _KEEPS_ORDER
        )
        self._desk = Desk(self._shop, self._copy_elsewhere, self._wait_for)
        self._listeners: dict[int, Listener] = {}
        self._places: list[int] = []
        self._copies: dict[int, _Copying] = {}
        self._is_orphan = False
        self._is_prepared = False
        self._poll = select.poll()
        self._poll.register(duty.control.socket.fileno(), select.POLLIN)
        for fd in duty.listeners:
            self._add(fd)
        gc.freeze()
        refuse_imports()

    def serve(self) -> NoReturn:
        """Serve for good."""
        for place, left, result in self._page.load_all():
            self._redo(place, left, result)
        poll, listeners = self._poll.poll, self._listeners
        wait_ms: float | None = None
        is_calm = False  # nothing has happened that could change how long to wait
        while True:
            if wait_ms is not None or not is_calm:
                wait_ms, is_calm = self._timeout_ms(), True
            events = poll(wait_ms)
            if not (events or self._is_prepared):
                self._prepare()
            for fd, event in events:
                listener = listeners.get(fd)
                if listener is not None and event & select.POLLIN:
                    call = listener.receive()
                    if call is not None and not self._let_pass(listener, call):
                        is_calm = False
                        self._serve(listener, call)
                    continue
                is_calm = False
                if listener is None:
                    self._attend(fd)
                else:
                    self._end(fd)

    def _prepare(self) -> None:
        """Read the names of all objects in a quiet moment: the first break would wait for that."""
        self._is_prepared = True
        self._shop.objects.load()

    # --- calls

    def _let_pass(
        self, listener: Listener, call: Call, *, _looks: dict[tuple[int, int], IsPlain] = LOOKS
    ) -> bool:
        """Let a call go on that concerns nothing frozen; False: it is to be served."""
        try:
            is_plain = _looks.get((call[4], call[3]))  # architecture and number
            if is_plain is not None and not is_plain(self._shop.roots, call):
                return False
        except OSError:
            return False  # the caller is gone, most likely
        listener.go_on(call[0])
        return True

    def _serve(self, listener: Listener, call: Call) -> None:
        serve = BY_NUMBER.get(call.arch, {}).get(call.number)
        if serve is None:
            listener.go_on(call.id)
            return
        asked = Asked(listener=listener, call=call)
        try:
            serve(self._desk, asked)
        except Answered as answer:
            self._page.note_result(call.id, answer.value, answer.error)
            listener.answer(call.id, answer.value, answer.error)
        except (Deferred, Gone):
            pass
        except OSError:
            listener.go_on(call.id)
        except Exception as error:  # noqa: BLE001 (one call must not end the service of all)
            log.warning("a call of process %d cannot be served: %r", call.tid, error)
            listener.go_on(call.id)
        else:
            listener.go_on(call.id)

    def _redo(self, place: int, call: Call, result: tuple[int, int] | None) -> None:
        """Answer a call that was in work when the last supervisor was killed."""
        fd = self._places[place] if place < len(self._places) else -1
        listener = self._listeners.get(fd)
        if listener is None:
            return
        with suppress(Gone):
            listener.check(call.id)
            if result is not None:
                listener.answer(call.id, *result)
            else:
                self._serve(listener, call)

    # --- copies that take long

    def _copy_elsewhere(self, asked: Asked, work: Break, ino: int) -> bool:
        """Have a process of its own fill the copy; False where too many do that already."""
        if len(self._copies) >= _MOST_COPIES:
            return False
        slot = self._page.keep(asked.call, asked.listener.place)
        if not slot:
            return False
        pid = os.fork()
        if pid == 0:
            _fill_and_end(work)
        pidfd = os.pidfd_open(pid)
        self._copies[pidfd] = _Copying(pid, work, ino, [(asked, slot)])
        self._desk.in_work.add(ino)
        self._poll.register(pidfd, select.POLLIN)
        return True

    def _wait_for(self, asked: Asked, ino: int) -> bool:
        """Have the call wait for a copy of that inode; False where that cannot be."""
        for copying in self._copies.values():
            if copying.ino == ino and (slot := self._page.keep(asked.call, asked.listener.place)):
                copying.waiting.append((asked, slot))
                return True
        return False

    def _copied(self, pidfd: int) -> None:
        copying = self._copies.pop(pidfd)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        self._desk.in_work.discard(copying.ino)
        code = os.waitstatus_to_exitcode(os.waitpid(copying.pid, 0)[1])
        error = code if code >= 0 else errno.EIO
        try:
            if not error:
                with self._desk.telling():
                    copying.work.finish()
        except Answered as answer:
            error = answer.error
        except Changed:
            pass
        finally:
            copying.work.close()
        for asked, slot in copying.waiting:
            self._page.forget(slot)
            if error:
                asked.listener.answer(asked.call.id, 0, error)
            else:
                self._serve(asked.listener, asked.call)

    # --- all else

    def _timeout_ms(self) -> float | None:
        if self._shop.windows.attacks:
            self._tell_attacks()
        due_s = self._shop.windows.next_due
        if due_s is None:
            return None if self._is_prepared else _QUIET_MS
        left_s = due_s - time.monotonic()
        if left_s > 0:
            return left_s * 1000
        self._shop.roots.go_home()
        left = self._shop.windows.idle()
        return None if left is None else left * 1000

    def _tell_attacks(self) -> None:
        for attack in self._shop.windows.attacks:
            self._control.send(ATTACK, str(attack.pid), attack.command)
        self._shop.windows.attacks.clear()

    def _add(self, fd: int) -> None:
        self._places.append(fd)
        if fd >= 0:
            self._listeners[fd] = Listener(fd, self._page, len(self._places) - 1)
            self._poll.register(fd, select.POLLIN)

    def _end(self, fd: int) -> None:
        """All processes under that filter have ended."""
        self._poll.unregister(fd)
        self._places[self._places.index(fd)] = -1
        self._listeners.pop(fd).close()
        self._end_if_alone()

    def _attend(self, fd: int) -> None:
        if fd in self._copies:
            self._copied(fd)
            return
        if self._is_orphan and self._duty.heir is not None:
            with suppress(OSError):
                self._hand_over(self._duty.heir.accept()[0])
            return
        fields = self._control.receive()
        if fields is None:
            self._orphaned()
        elif fields == [LISTENER]:
            for listener_fd in self._control.fds:
                self._add(listener_fd)
            self._control.fds.clear()

    def _orphaned(self) -> None:
        """The monitor is gone: without a keeper no window is opened any more, all else goes on."""
        self._poll.unregister(self._control.socket.fileno())
        self._is_orphan = True
        self._end_if_alone()
        if self._duty.heir is not None:
            self._poll.register(self._duty.heir.fileno(), select.POLLIN)

    def _hand_over(self, asked_by: socket.socket) -> None:
        """A new monitor is there: it gets the listeners, and has them served from now on."""
        while self._copies:
            pidfds = select.poll()
            for pidfd in self._copies:
                pidfds.register(pidfd, select.POLLIN)
            self._copied(pidfds.poll()[0][0])
        heir.bequeath(asked_by, list(self._listeners))
        self._shop.roots.go_home()
        self._shop.windows.close()
        os._exit(0)

    def _end_if_alone(self) -> None:
        """Nobody is left to be served, and nobody will bring more."""
        if self._is_orphan and not self._listeners:
            self._shop.roots.go_home()
            self._shop.windows.close()
            os._exit(0)


def _fill_and_end(work: Break) -> NoReturn:
    code = errno.EIO
    try:
        syscalls.set_parent_death_signal(signal.SIGKILL)
        work.fill()
        code = 0
    except OSError as error:
        code = error.errno or errno.EIO
    finally:
        os._exit(code)


def allow_open_files() -> None:
    """Raise the limit of open files: each window takes one for some seconds, here and in the
    monitor.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
