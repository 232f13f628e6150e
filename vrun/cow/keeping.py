"""The monitor's side of a supervisor: fork it, keep what it must not lose, start it again.

The monitor holds the listeners, the page with the call in work, the stage in the pool and a copy of
every lease. When the supervisor is killed a new one gets all of that: first it closes the windows
that were open, then it answers the call that was in work, then it goes on.
"""

import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

from vrun.control import Connection, pair
from vrun.cow import heir
from vrun.cow.duty import ATTACK, LISTENER, SETTLED, WARN, Duty
from vrun.cow.notifications import Page
from vrun.cow.openfiles import monitors_limit
from vrun.cow.supervisor import be_supervisor
from vrun.errors import ToolError
from vrun.loop import Aborted, Loop
from vstore.keeper import Keeper
from vstore.pool import Pool
from vstore.record import dataclass
from vstore.recovery import settle_stage
from vstore.window import LINGER_S

_AGAIN_S: Final = 0.05
"""A supervisor that ends sooner than this after its start is held back for so long."""
_ENDS_WITHIN_S: Final = 10.0
_SETTLES_WITHIN_S: Final = 5.0
_MOST_REMEMBERED: Final = 20


@dataclass(frozen=True, slots=True)
class Attacker:
    """A process of the guest that tried to write to a shared file inside a window."""

    pid: int
    command: str


class Supervision:
    """Of one guest, as long as it runs."""

    def __init__(
        self,
        pool: Path,
        loop: Loop,
        note: Callable[[str], None],
        *,
        name: str = "",
        linger_s: float = LINGER_S,
    ) -> None:
        """`note` gets what an administrator should read; `name` is the guest's, below whose run
        folder it is written how things are; `linger_s` is how long leases outlive their windows.
        Raises OSError, ToolError.
        """
        self._name = name
        self._heir: socket.socket | None = None
        self._predecessor: socket.socket | None = None
        self._linger_s = linger_s
        self._pool_path = pool
        self._loop = loop
        self._note = note
        self._stack = ExitStack()
        self._pool = self._stack.enter_context(Pool.load(pool))
        self._stage_lock_fd, (self._stage_fd,) = self._stack.enter_context(
            self._pool.locked_stage(1)
        )
        self._page = Page()
        self._listeners: list[int] = []
        self._keeper: Keeper | None = None
        self._bequest: Keeper | None = None
        self._control: Connection | None = None
        self._is_settled = False
        self._has_served = False
        self._is_begun = False
        self._began_s = 0.0
        self.pid = 0
        """Of the supervisor; 0: there is none."""
        self.attackers: list[Attacker] = []
        self.attacks = 0
        """How many there were, of which the last ones are in `attackers`."""

    @property
    def is_serving(self) -> bool:
        """Whether there is a supervisor that has put right what an earlier one left."""
        return self._is_settled and bool(self.pid)

    # --- the guest's processes

    def add(self, listener_fd: int) -> None:
        """Have calls served that wait at that listener, which belongs to this from now on."""
        self._listeners.append(listener_fd)
        if self._control is not None:
            self._control.send(LISTENER, fds=(listener_fd,))

    def adopt(self) -> bool:
        """Take over the listeners of a guest whose monitor is gone, from its supervisor; whether
        there is one.
        """
        self._listeners, self._predecessor = heir.inherit(self._name)
        return bool(self._listeners)

    # --- the supervisor

    def begin(self) -> None:
        """Fork the supervisor, and do not wait: it makes itself ready beside the guest. Raises
        OSError.
        """
        self._is_begun = True
        self._fork()

    def start(self) -> None:
        """Wait until the supervisor serves, forked now if it was not. Raises ToolError, Aborted."""
        monitors_limit.allow()
        if not self._is_begun:
            self.begin()
        self._loop.wait(lambda: self._is_settled or not self.pid)
        if not self.pid:
            raise ToolError("the supervisor of its shared files does not work")

    def _fork(self) -> None:
        if self._name and self._heir is None:
            self._heir = heir.listen(self._name)
            if self._predecessor is None:
                heir.announce(self._name)
        near, far = pair()
        keeper = Keeper()
        duty = Duty(
            pool=self._pool_path,
            page=self._page,
            listeners=list(self._listeners),
            stage_fd=self._stage_fd,
            stage_lock_fd=self._stage_lock_fd,
            keeper=keeper.holder_socket,
            control=far,
            bequest=self._bequest,
            linger_s=self._linger_s,
            name=self._name,
            heir=self._heir,
            predecessor=self._predecessor,
        )
        self._is_settled = False
        self._began_s = time.monotonic()
        self.pid = self._loop.fork(keep=[fd for fd in duty.fds() if fd >= 0])
        if self.pid == 0:
            be_supervisor(duty)
        far.close()
        keeper.holder_socket.close()
        if self._predecessor is not None:
            self._predecessor.close()
            self._predecessor = None
        self._keeper, self._control = keeper, near
        near.socket.setblocking(False)
        self._loop.watch(keeper.fileno(), self._drain)
        self._loop.watch(near.socket.fileno(), self._hear)
        self._report()

    def _drain(self) -> None:
        if self._keeper is not None:
            try:
                self._keeper.drain()
            except ToolError as error:
                self._note(error.message)

    def _hear(self) -> None:
        if self._control is None:
            return
        match self._control.receive():
            case [word] if word == SETTLED:
                self._is_settled = self._has_served = True
                if self._bequest is not None:
                    self._bequest.close()
                    self._bequest = None
            case [word, pid, command] if word == ATTACK:
                self.attacks += 1
                self.attackers = [*self.attackers, Attacker(int(pid), command)][-_MOST_REMEMBERED:]
                self._report()
            case [word, text] if word == WARN:
                self._note(text)
            case None:
                self._ended()
            case _:
                pass

    def _ended(self) -> None:
        """The supervisor is dead: what it held is put right by the next one."""
        self._forget()
        self._is_settled = False
        if not self._has_served:
            return  # it cannot work, and whoever waits for it is told
        self._note("its supervisor was killed; starting another")
        if time.monotonic() - self._began_s < _AGAIN_S:
            time.sleep(_AGAIN_S)
        try:
            self._fork()
        except OSError as error:
            self._note(f"no supervisor can be started: {error}; shared files can only be read")
            self._report()

    def _forget(self) -> None:
        """Take down what belongs to this supervisor; its leases are kept for the next one."""
        if self._control is not None:
            self._loop.unwatch(self._control.socket.fileno())
            self._control.close()
            self._control = None
        if self._keeper is not None:
            self._loop.unwatch(self._keeper.fileno())
            self._drain()
            if self._bequest is None:
                self._bequest = self._keeper
            else:
                self._bequest.join(self._keeper)
            self._keeper = None
        self.pid = 0

    def _report(self) -> None:
        """For `status`, which asks nobody."""
        if self._name:
            attackers = tuple((attacker.pid, attacker.command) for attacker in self.attackers)
            heir.write_report(self._name, heir.Report(self.pid, self.attacks, attackers))

    def close(self) -> None:
        """No process of the guest is left: end the supervisor, and put right what it held."""
        control, self._control = self._control, None
        if control is not None:
            self._loop.unwatch(control.socket.fileno())
            control.close()
        for fd in self._listeners:
            os.close(fd)
        self._listeners.clear()
        self._end_supervisor()
        self._forget()
        try:
            if self._bequest is not None:
                self._bequest.take_over(self._settle)
                self._bequest.close()
        except (OSError, ToolError) as error:
            self._note(f"what its supervisor held is left for the next vunify: {error}")
        if self._heir is not None:
            self._heir.close()
            heir.forget(self._name)
        self._stack.close()
        monitors_limit.restore()

    def _end_supervisor(self) -> None:
        """It ends by itself when its last leases have gone."""
        if not self.pid:
            return
        status = None
        with suppress(Aborted):
            status = self._loop.wait_child(self.pid, deadline=time.monotonic() + _ENDS_WITHIN_S)
        if status is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def _settle(self, leased: list[int]) -> None:
        """Another program's lease may linger on what is to be put right: that is waited for."""
        deadline = time.monotonic() + _SETTLES_WITHIN_S
        is_settled = settle_stage(self._pool, self._stage_fd, leased)
        while not is_settled and time.monotonic() < deadline:
            time.sleep(_AGAIN_S)
            is_settled = settle_stage(self._pool, self._stage_fd)
