"""Which host has a guest whose tree and configuration are on storage that several hosts share.

    CONFDIR/web/apps/fence/     there: the guest may only run on the host that the file names
    └── holder                  one JSON object; made by link(2), so of two hosts one gets it

A host that finds another's name there does not start the guest. Its own, from before it booted, or
of a run whose monitor was killed, it replaces: it has the guest's lock, so it does not run it. No
file is ever replaced by rename: one is moved aside, looked at once more, and only then removed.
"""

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from vrun.errors import ConfigInvalid, FormatUnknown, NotPermitted, ToolError
from vstore.guest import Guest, rundir
from vstore.record import dataclass

FORMAT: Final = 1
_HOLDER: Final = "holder"
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_MACHINE_IDS: Final = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))
_TRIES: Final = 20


@dataclass(frozen=True, slots=True)
class Holder:
    """A host that runs the guest."""

    host: str
    machine: str
    """Its machine-id(5); without one its name."""
    boot: str
    """Of the kernel that it runs."""
    rundir: str
    """Where it keeps what it knows of guests that run."""
    since: str
    """When the guest was started, for a person."""

    def is_other(self, mine: "Holder") -> bool:
        """Whether the guest may run there now, as far as this host can tell.

        Machines that were copied can have one machine-id, so the name counts too.
        """
        if (self.machine, self.host) != (mine.machine, mine.host):
            return True
        return self.boot == mine.boot and self.rundir != mine.rundir


def find_holder(guest: Guest) -> Holder | None:
    """Another host that has the guest; None where there is none, or the guest has no fence.

    Raises ConfigInvalid, FormatUnknown for a file that cannot be read as one.
    """
    place = _place(guest)
    found = _load(place) if place else None
    return found[1] if found and found[1].is_other(_this_host()) else None


def check(guest: Guest, what: str) -> None:
    """Raises ToolError where another host has the guest; `what` is not done then."""
    if (holder := find_holder(guest)) is not None:
        raise _refusal(guest, holder, what)


def take(guest: Guest) -> None:
    """Note that this host runs the guest, if it has a fence; the caller has the guest's lock.

    Raises ToolError where another host has it, NotPermitted where the folder cannot be written.
    """
    place = _place(guest)
    if place is None:
        return
    mine = _this_host()
    try:
        for _ in range(_TRIES):
            if _link_new(place, mine):
                return
            found = _load(place)
            if found is None:
                continue
            data, holder = found
            if holder.is_other(mine):
                raise _refusal(guest, holder, "start")
            if holder.boot == mine.boot:
                return
            _remove(place, data)
    except OSError as error:
        raise NotPermitted(
            f"guest {guest.name}: cannot note in {place} that this host runs it: {error.strerror}",
            hint="is the shared storage there, and may this host write to it?",
        ) from error
    raise ToolError(f"guest {guest.name}: {place} changes all the time", hint="look who does that")


def release(guest: Guest) -> None:
    """The guest does not run any more: let others have it. Nothing, if it is not this host's.

    Raises OSError.
    """
    place = _place(guest)
    if place is None:
        return
    mine = _this_host()
    with suppress(ToolError):  # what cannot be read is not ours to remove
        found = _load(place)
        if found and not found[1].is_other(mine):
            _remove(place, found[0])


# --- the file


def _place(guest: Guest) -> Path | None:
    folder = guest.app_dir("fence")
    return folder / _HOLDER if folder is not None and folder.is_dir() else None


def _this_host() -> Holder:
    host = os.uname().nodename
    return Holder(
        host=host,
        machine=_machine_id() or host,
        boot=_BOOT_ID.read_text().strip(),
        rundir=os.fspath(rundir()),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
    )


def _machine_id() -> str:
    for path in _MACHINE_IDS:
        with suppress(OSError):
            return path.read_text().strip()
    return ""


def _link_new(place: Path, holder: Holder) -> bool:
    """Make the file, whole and on disk; False where one is there."""
    import json  # most guests have no fence

    values = {
        "format": FORMAT,
        "host": holder.host,
        "machine": holder.machine,
        "boot": holder.boot,
        "rundir": holder.rundir,
        "since": holder.since,
    }
    spare = place.with_name(f".{_HOLDER}.{os.urandom(8).hex()}")
    try:
        with spare.open("x") as file:
            json.dump(values, file)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(spare, place)
        except FileExistsError:
            return False
    finally:
        spare.unlink(missing_ok=True)
    _sync(place.parent)
    return True


def _remove(place: Path, seen: bytes) -> None:
    """Remove the file, if its content is what was seen when nobody else can find it any more."""
    aside = place.with_name(f".{_HOLDER}.{os.urandom(8).hex()}")
    try:
        place.rename(aside)
    except FileNotFoundError:
        return
    if aside.read_bytes() != seen:
        with suppress(FileExistsError):
            os.link(aside, place)
    aside.unlink()
    _sync(place.parent)


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _load(place: Path) -> tuple[bytes, Holder] | None:
    try:
        data = place.read_bytes()
    except FileNotFoundError:
        return None
    import json

    try:
        values: dict[str, Any] = dict(json.loads(data))
        if values.get("format") != FORMAT:
            raise FormatUnknown(
                f"{place}: has format {values.get('format')!r}, this version knows {FORMAT}",
                hint="use the version that wrote it",
            )
        fields = ("host", "machine", "boot", "rundir", "since")
        return data, Holder(*(str(values[field]) for field in fields))
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigInvalid(
            f"{place}: does not say which host has the guest: {error}",
            hint="if the guest runs nowhere, remove it",
        ) from error


def _refusal(guest: Guest, holder: Holder, what: str) -> ToolError:
    return ToolError(
        f"guest {guest.name}: cannot {what} it here: host {holder.host} has it since "
        f"{holder.since}, says {_place(guest)}",
        hint=f"stop it on {holder.host}; if that host is off, and stays off until it has been "
        "looked at, remove the file",
    )
