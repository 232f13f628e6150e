"""Which guests use what of the host's network: addresses and devices that guests may share.

    RUNDIR/.addresses/      0700
    ├── lock                flock: one start or stop at a time changes the host's network
    └── claims.json         what -> the guests that use it, and whether we made it

A claim is written before the thing is made, so a killed start leaves nothing that no claim tells
of. What was there before the first guest claimed it is never removed.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

from vrun.errors import ConfigInvalid, FormatUnknown, NotPermitted
from vstore.guest import rundir
from vstore.record import dataclass, field

_FORMAT: Final = 1
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")

Kind = Literal["address", "device"]


@dataclass(frozen=True, slots=True)
class Thing:
    """Something of the host's network."""

    kind: Kind
    device: str
    address: str = ""
    """With its prefix length, `10.0.0.5/24`; nothing for a device."""
    peer: str = ""
    """The other end of a point-to-point address."""

    def as_key(self) -> str:
        return f"{self.kind} {self.device} {self.address} {self.peer}".rstrip()

    @staticmethod
    def from_key(key: str) -> "Thing":
        kind, device, *rest = key.split(" ")
        return Thing("address" if kind == "address" else "device", device, *rest)


@dataclass(slots=True)
class Claim:
    """The guests that use a thing, and whether it goes with the last of them."""

    made: bool
    guests: list[str] = field(default_factory=list)


class Claims:
    """All claims of this host; from locked() only."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._claims = _load(path)

    def is_claimed(self, thing: Thing) -> bool:
        """Whether some guest uses it."""
        return thing.as_key() in self._claims

    def add(self, thing: Thing, guest: str, *, exists: bool) -> None:
        """Note that the guest uses it; `exists`: it is there already. Written at once."""
        claim = self._claims.setdefault(thing.as_key(), Claim(made=not exists))
        if guest not in claim.guests:
            claim.guests.append(guest)
        self._save()

    def used_by(self, guest: str) -> list[Thing]:
        """What the guest uses, the last claimed first."""
        used = [Thing.from_key(key) for key, claim in self._claims.items() if guest in claim.guests]
        return used[::-1]

    def must_go(self, thing: Thing, guest: str) -> bool:
        """Whether it is to be removed when the guest does not use it any more."""
        claim = self._claims[thing.as_key()]
        return claim.made and claim.guests == [guest]

    def drop(self, thing: Thing, guest: str) -> None:
        """The guest does not use it any more. Written at once."""
        claim = self._claims[thing.as_key()]
        claim.guests.remove(guest)
        if not claim.guests:
            del self._claims[thing.as_key()]
        self._save()

    def _save(self) -> None:
        values = {
            "format": _FORMAT,
            "boot": _boot_id(),
            "claims": {
                key: {"made": claim.made, "guests": claim.guests}
                for key, claim in self._claims.items()
            },
        }
        spare = self._path.with_suffix(".new")
        spare.write_text(json.dumps(values) + "\n")
        spare.replace(self._path)


@contextmanager
def locked() -> Iterator[Claims]:
    """Hold the lock of the host's network, with the claims as they stand.

    Raises NotPermitted where RUNDIR cannot be written, ConfigInvalid, FormatUnknown.
    """
    folder = rundir() / ".addresses"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise NotPermitted(
            f"{folder}: cannot keep who uses which address: {error.strerror}",
            hint="run as root, or name another folder with VSERVER_RUNDIR",
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield Claims(folder / "claims.json")
    finally:
        os.close(fd)


def _load(path: Path) -> dict[str, Claim]:
    try:
        values: dict[str, Any] = json.loads(path.read_bytes())
        if values["format"] != _FORMAT:
            raise FormatUnknown(
                f"{path}: has format {values['format']!r}, this version knows {_FORMAT}",
                hint="use the version that started the guests",
            )
        if values["boot"] != _boot_id():
            return {}
        return {
            key: Claim(bool(claim["made"]), [str(guest) for guest in claim["guests"]])
            for key, claim in values["claims"].items()
        }
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigInvalid(f"{path}: is not what it should be: {error}") from error


def _boot_id() -> str:
    return _BOOT_ID.read_text().strip()
