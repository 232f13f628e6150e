"""Whose a file is: the guest in whose root it lies.

The original asks the file's tag. A stock kernel has none that a hard link between guests could
bear, and a shared inode is nobody's: the place is what tells.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from vrun.membership import HOST, Contexts
from vrun.xids import configured_xids
from vstore.guest import Guest, list_guests
from vstore.record import dataclass

WIDTH: Final = 20
FAILED: Final = "!!ERR!!"
_HOST_NAME: Final = "MAIN"


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose a file is; the host's where `guest` is None."""

    guest: str | None
    xid: int | None
    """The number of its context: that which it has now, else that which is its own; None where it
    has none until it starts."""

    def show(self, *, numeric: bool) -> str:
        """The name, or the number where that is wanted."""
        if not numeric:
            return self.guest or _HOST_NAME
        return "-" if self.xid is None else str(self.xid)


class Owners:
    """The guests' roots, to look files up in."""

    def __init__(self, contexts: Contexts) -> None:
        """Reads the configuration of all guests, the disabled ones too."""
        running = {one.name: one.xid for one in contexts.by_xid.values() if one.is_guest}
        self._numbers: Mapping[str, int] = dict(configured_xids()) | running
        guests = list_guests(include_disabled=True)
        self._roots: Mapping[Path, Guest] = {guest.root: guest for guest in guests}
        self._folders: dict[bytes, Owner] = {}

    def find(self, path: bytes) -> Owner:
        """Whose the file is; symlinks on the way are followed, at its end not."""
        folder, name = os.path.split(path)
        if name in (b"", b".", b".."):
            return self._of_folder(path)
        whole = os.path.join(os.path.realpath(folder or b"."), name)  # noqa: PTH118 (bytes)
        guest = self._roots.get(Path(os.fsdecode(whole)))
        return self._as_owner(guest) if guest else self._of_folder(folder or b".")

    def _of_folder(self, folder: bytes) -> Owner:
        owner = self._folders.get(folder)
        if owner is None:
            real = Path(os.fsdecode(os.path.realpath(folder)))
            found = (self._roots.get(one) for one in (real, *real.parents))
            owner = self._as_owner(next((guest for guest in found if guest), None))
            self._folders[folder] = owner
        return owner

    def _as_owner(self, guest: Guest | None) -> Owner:
        if guest is None:
            return Owner(None, HOST)
        return Owner(guest.name, self._numbers.get(guest.name))
