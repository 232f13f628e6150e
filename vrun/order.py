"""What a command asks of a guest's monitor."""

from typing import Literal

from vstore.record import dataclass

Task = Literal["start", "adopt", "stop", "clean"]
"""What a new monitor does first: start the guest; take over a guest whose monitor was killed; that,
and stop it; take back what is left of one that is gone."""


@dataclass(frozen=True, slots=True)
class Rescue:
    """What `start --rescue` asks for."""

    argv: tuple[str, ...] = ()
    is_init: bool = False
    """It is process 1, as the init of the style plain (--rescue-init)."""


@dataclass(frozen=True, slots=True)
class Order:
    """What was asked for beside the guest's own settings."""

    rescue: Rescue | None = None
    sync: bool = False
    """Run cmd.start-sync as if apps/init/sync were there."""
    is_noisy: bool = False
    """Show the context's number and the addresses."""
    debug_rc: bool = False
    """Trace the rc scripts of the style sysv."""
    profile: str | None = None
    """PROFILE for an old-style configuration."""
