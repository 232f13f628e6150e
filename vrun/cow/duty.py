"""What a monitor gives a supervisor that it forks, and what the two tell each other."""

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vrun.control import Connection
from vrun.cow.notifications import Page
from vstore.keeper import Keeper
from vstore.record import dataclass

LISTENER: Final = "listener"
"""The monitor's message with one more listener."""
ATTACK: Final = "attack"
WARN: Final = "warn"
SETTLED: Final = "settled"


@dataclass(slots=True, kw_only=True)
class Duty:
    """What a supervisor gets from the monitor that forks it."""

    pool: Path
    page: Page
    listeners: Sequence[int]
    """In the order in which the guest's processes brought them; -1 for one that has ended."""
    stage_fd: int
    stage_lock_fd: int
    """Its flock says that the stage is in use."""
    keeper: socket.socket
    """The holder's end of its keeper."""
    control: Connection
    bequest: Keeper | None
    """The keeper of a supervisor that was killed, with the leases that it had."""
    linger_s: float
    name: str
    """The guest's; empty where nobody can come after its monitor."""
    heir: socket.socket | None
    """Where a new monitor asks for the listeners when the old one is gone."""
    predecessor: socket.socket | None
    """The supervisor whose place is taken; it waits to hear of that."""

    def fds(self) -> list[int]:
        """What it must keep open."""
        sockets = [self.keeper.fileno(), self.control.socket.fileno()]
        held = self.bequest.held_fds() if self.bequest else []
        sockets += [one.fileno() for one in (self.heir, self.predecessor) if one]
        return [*self.listeners, self.stage_fd, self.stage_lock_fd, *sockets, *held]
