"""What `vserver NAME build` is asked for, beside what its method is asked for."""

import os
from dataclasses import dataclass
from pathlib import Path

from vrun.build.distribution import existing, read_lines
from vrun.guestfiles import NewGuest
from vstore.guest import confdir


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """How a guest is built."""

    guest: NewGuest
    """Its configuration; `guest.xid` is the number that was asked for."""
    may_rename: bool = False
    """--force: what has its name already is renamed to NAME.~EPOCH~."""
    may_be_used: bool = False
    """--i-know-its-there: the root may have something in it."""
    keep: bool = False
    """What was made stays when the build fails."""

    @property
    def config(self) -> Path:
        """Where the configuration directory will be."""
        return self.guest.config or confdir() / self.guest.name


def load_default_options() -> list[str]:
    """The words of .defaults/apps/build/options, one a line, which go before those of the command
    line; none where NO_DEFAULT_OPTS is in the environment. Raises ConfigInvalid.
    """
    path = existing(confdir() / ".defaults/apps/build/options")
    if path is None or os.environ.get("NO_DEFAULT_OPTS"):
        return []
    return [line for line in read_lines(path) if line]
