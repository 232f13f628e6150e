"""The supervisor of a guest: a process of its own, outside of the guest, that serves its calls.

It is a child of the guest's monitor, in the host's namespaces and never in a cgroup of a guest. A
call that is not answered waits; a call of a guest without a supervisor fails. Whatever goes wrong
here ends in letting the call go on, and the kernel then refuses to change what is frozen.
"""

import errno
import gc
import logging
import math
import os
import select
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, NoReturn

from vrun import syscalls
from vrun.control import Connection
from vrun.cow import heir
from vrun.cow.breaking import Break, Changed, Held, Workshop
from vrun.cow.desk import Answered, Asked, Deferred, Desk
from vrun.cow.dispatch import BY_NUMBER
from vrun.cow.duty import ATTACK, LISTENER, SETTLED, WARN, Duty
from vrun.cow.notifications import Call, Gone, Left, Listener
from vrun.cow.objects import Objects
from vrun.cow.openfiles import allow_open_files
from vrun.cow.paths import Roots
from vrun.cow.patience import LONGEST_S, Patience
from vrun.cow.quick import LOOKS, IsPlain
from vrun.cow.rights import Own
from vrun.errors import ToolError
from vrun.noimports import refuse_imports
from vstore.pool import Pool
from vstore.record import dataclass
from vstore.recovery import recover, settle_stage
from vstore.window import Windows

log = logging.getLogger(__name__)

_SILENT: Final = (
    "a call of process %d leads to a file system that does not answer: after %d s it goes on "
    "unseen; look for a server or a FUSE program that hangs"
)
_MOST_COPIES: Final = 4
_QUIET_MS: Final = 50.0
_IDLE_MS: Final = 1000.0
_LOOK_AGAIN_S: Final = 0.02
_SETTLE_AGAIN_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 600.0
_HELD_S: Final = 10.0
"""How long a call waits at most: leases linger for seconds after somebody has attacked a file. One
that is open for writing all the time is not to be had: EBUSY.
"""


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


@dataclass(slots=True)
class _Waiting:
    """A call that waits for a lease of somebody else to go."""

    asked: Asked
    slot: int
    """Of the page, in which it is kept."""
    due_s: float
    """When to look again."""


class Supervisor:
    """One process's state."""

    def __init__(self, duty: Duty) -> None:
        """Puts right what a supervisor that was killed has left, and any other program that used
        the pool: a shared file that is not frozen looks like the guest's own. Raises OSError,
        ToolError.
        """
        self._duty = duty
        self._page = duty.page
        self._control = duty.control
        allow_open_files()
        pool = Pool.load(duty.pool)
        windows = Windows(
            duty.keeper, pool_fd=pool.fd, stage_fd=duty.stage_fd, linger_s=duty.linger_s
        )
        self._settle_again_s = 0.0
        self._settle_pause_s = _SETTLE_AGAIN_S
        if duty.bequest is not None:
            duty.bequest.take_over(lambda leased: self._settle(pool, windows, leased))
        else:
            self._settle(pool, windows)
        self._patience = Patience(duty.page)
        roots = Roots(self._patience.end)
        self._shop = Workshop(pool, windows, duty.stage_fd, Objects(pool), roots, Own())
        self._desk = Desk(self._shop, self._copy_elsewhere, self._wait_for)
        self._listeners: dict[int, Listener] = {}
        self._places: list[int] = []
        self._copies: dict[int, _Copying] = {}
        self._waiting: list[_Waiting] = []
        self._is_leaving = False
        self._is_orphan = False
        self._is_prepared = False
        self._poll = select.poll()
        self._poll.register(duty.control.socket.fileno(), select.POLLIN)
        for fd in duty.listeners:
            self._add(fd)
        gc.freeze()
        refuse_imports()
        if duty.predecessor is not None:
            heir.take_place(duty.predecessor)
            heir.announce(duty.name)
        duty.control.send(SETTLED)

    def _settle(self, pool: Pool, windows: Windows, leased: Sequence[int] = ()) -> None:
        """Put right what is left in the stage; what another program's window keeps from that has
        its turn later.
        """
        self._settle_later()
        windows.has_doubts = False
        is_settled = settle_stage(pool, self._duty.stage_fd, leased, windows)
        if recover(pool, windows) and is_settled and not windows.has_doubts:
            self._settle_again_s, self._settle_pause_s = 0.0, _SETTLE_AGAIN_S

    def _settle_later(self) -> None:
        self._settle_again_s = time.monotonic() + self._settle_pause_s
        self._settle_pause_s = min(2 * self._settle_pause_s, _LONGEST_PAUSE_S)

    def serve(self) -> NoReturn:
        """Serve for good."""
        for left in self._page.load_all():
            self._redo(left)
        poll, listeners, patience = self._poll.poll, self._listeners, self._patience
        clock = time.monotonic
        wait_ms: float | None = None
        is_calm = False  # nothing has happened that could change how long to wait
        while True:
            if wait_ms is not None or not is_calm:
                wait_ms, is_calm = self._timeout_ms(), True
            events = poll(_IDLE_MS if wait_ms is None and patience.renew_s else wait_ms)
            if not events:
                self._rest()
            for fd, event in events:
                listener = listeners.get(fd)
                if listener is not None and event & select.POLLIN:
                    if clock() >= patience.renew_s:
                        self._begin_to_look()
                    call = listener.receive()
                    if call is not None and not self._let_pass(listener, call):
                        is_calm = False
                        self._serve(Asked(listener=listener, call=call))
                    continue
                is_calm = False
                self._shop.roots.go_home()
                if listener is None:
                    self._attend(fd)
                else:
                    self._end(fd)

    def _rest(self) -> None:
        """Nobody has called for a while."""
        self._shop.roots.go_home()
        if not self._is_prepared:
            self._prepare()

    def _prepare(self) -> None:
        """Read the names of all objects in a quiet moment: the first break would wait for that."""
        self._is_prepared = True
        if self._duty.predecessor is not None:  # it has ended, and its stage is left
            with suppress(OSError):
                self._settle(self._shop.pool, self._shop.windows)
        self._shop.objects.load()

    # --- calls

    def _begin_to_look(self) -> None:
        """Without a monitor nobody would come after this process: it may wait then."""
        if not self._is_orphan:
            self._patience.begin()

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

    def _serve(self, asked: Asked) -> None:
        listener, call = asked.listener, asked.call
        serve = BY_NUMBER.get(call.arch, {}).get(call.number)
        if serve is None:
            listener.go_on(call.id)
            return
        if not self._patience.renew_s:
            self._begin_to_look()
        try:
            serve(self._desk, asked)
        except Answered as answer:
            self._answer(asked, answer.value, answer.error)
        except (Deferred, Gone):
            pass
        except Held:
            self._hold(asked)
        except OSError:
            listener.go_on(call.id)
        except Exception as error:  # noqa: BLE001 (one call must not end the service of all)
            log.warning("a call of process %d cannot be served: %r", call.tid, error)
            listener.go_on(call.id)
        else:
            listener.go_on(call.id)

    def _answer(self, asked: Asked, value: int, error: int) -> None:
        self._page.note_result(asked.call.id, value, error)
        asked.listener.answer(asked.call.id, value, error)

    def _redo(self, left: Left) -> None:
        """Answer a call that was in work when the last supervisor was killed."""
        fd = self._places[left.place] if left.place < len(self._places) else -1
        listener = self._listeners.get(fd)
        if listener is not None:
            with suppress(Gone):
                listener.check(left.call.id)
                if left.result is not None:
                    listener.answer(left.call.id, *left.result)
                elif left.is_overdue and not self._page.try_again(left.call.id):
                    listener.go_on(left.call.id)
                    log.warning(_SILENT, left.call.tid, 2 * LONGEST_S)
                else:
                    self._serve(Asked(listener=listener, call=left.call, begun=left.begun))
        self._page.forget(left.slot)

    # --- calls that wait for a lease to go

    def _hold(self, asked: Asked) -> None:
        """Serve the call again a moment later, unless it has waited too long."""
        now = time.monotonic()
        if not asked.held_until_s:
            asked.held_until_s = now + _HELD_S
        slot = 0
        if now < asked.held_until_s and not self._is_leaving:
            slot = self._page.keep(asked.call, asked.listener.place)
        if slot:
            self._waiting.append(_Waiting(asked, slot, now + _LOOK_AGAIN_S))
        else:
            self._answer(asked, 0, errno.EBUSY)

    def _look_again(self, now: float) -> None:
        """Serve those calls whose turn it is."""
        due = [waiting for waiting in self._waiting if waiting.due_s <= now]
        self._waiting = [waiting for waiting in self._waiting if waiting.due_s > now]
        for waiting in due:
            if waiting.asked.listener.is_open:
                self._serve(waiting.asked)
            self._page.forget(waiting.slot)

    # --- copies that take long

    def _copy_elsewhere(self, asked: Asked, work: Break, ino: int) -> bool:
        """Have a process of its own fill the copy; False where too many do that already."""
        if len(self._copies) >= _MOST_COPIES:
            return False
        slot = self._page.keep(asked.call, asked.listener.place)
        if not slot:
            return False
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            _fill_and_end(work, parent)
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
        begun = None
        try:
            if not error:
                with self._desk.telling():
                    begun = copying.work.begun
                    copying.work.finish()
        except Answered as answer:
            error = answer.error
        except (Changed, Held):
            begun = None
        finally:
            copying.work.close()
        copying.waiting[0][0].begun = begun  # whose copy it is
        for asked, slot in copying.waiting:
            if asked.listener.is_open:
                if error:
                    self._answer(asked, 0, error)
                else:
                    self._serve(asked)
            self._page.forget(slot)

    # --- all else

    def _timeout_ms(self) -> float | None:
        if self._shop.windows.attacks:
            self._tell_attacks()
        windows = self._shop.windows
        due_s = windows.next_due
        is_settled = not (self._settle_again_s or windows.has_doubts)
        if due_s is None and not self._waiting and is_settled:
            return None if self._is_prepared else _QUIET_MS
        now = time.monotonic()
        if due_s is not None and due_s <= now:
            self._shop.roots.go_home()
            windows.idle()
        if self._waiting:
            self._look_again(now)
        if self._settle_again_s and self._settle_again_s <= now:
            self._shop.roots.go_home()
            with suppress(OSError):
                self._settle(self._shop.pool, windows)
        elif windows.has_doubts and not self._settle_again_s:
            self._settle_later()
        due = [waiting.due_s for waiting in self._waiting]
        if windows.next_due is not None:
            due.append(windows.next_due)
        if self._settle_again_s:
            due.append(self._settle_again_s)
        return max(0.0, min(due) - time.monotonic()) * 1000 if due else None

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
        self._is_leaving = True
        while self._copies:
            pidfds = select.poll()
            for pidfd in self._copies:
                pidfds.register(pidfd, select.POLLIN)
            self._copied(pidfds.poll()[0][0])
        self._look_again(math.inf)
        self._shop.roots.go_home()
        self._shop.windows.let_all_go()
        try:
            is_taken = heir.bequeath(asked_by, list(self._listeners))
        except OSError:
            is_taken = False
        if is_taken:
            self._shop.windows.close()
            os._exit(0)
        asked_by.close()  # they have died over it: all goes on as before
        self._is_leaving = False

    def _end_if_alone(self) -> None:
        """Nobody is left to be served, and nobody will bring more."""
        if self._is_orphan and not self._listeners:
            self._shop.roots.go_home()
            self._shop.windows.close()
            os._exit(0)


def _fill_and_end(work: Break, parent: int) -> NoReturn:
    code = errno.EIO
    try:
        syscalls.set_parent_death_signal(signal.SIGKILL)
        if os.getppid() == parent:  # else nobody waits, but for our end: we have copies of all fds
            work.fill()
            code = 0
    except OSError as error:
        code = error.errno or errno.EIO
    finally:
        os._exit(code)
