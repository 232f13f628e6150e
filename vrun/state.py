"""What is known of each guest's run, on disk, so that any command finds it whoever was killed.

    RUNDIR/
    ├── .xids/           0700
    │   ├── lock         flock, while a number is given out
    │   └── 1001         symlink to NAME: the guest that has the number
    └── web/             0700
        ├── lock         flock; its monitor holds it as long as the guest lives
        ├── resources.json   what must be undone; written before any of it is made
        ├── state.json   the running guest (vstore.guest.RunState)
        ├── supervisor.sock  the monitor listens here (control.py)
        └── ended.json   how the last run ended

Files are replaced by rename, so a reader finds the old one or the new one. None is synced: what
they tell of is gone after a power loss, and the boot id in resources.json says so.
"""

import fcntl
import os
import select
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from vrun.errors import ConfigInvalid, FormatUnknown, NotPermitted, ToolError
from vstore.guest import STATE_FORMAT, RunState, load_state, parse_name, rundir, take_lock
from vstore.record import dataclass, field

FIRST_DYNAMIC: Final = 49152
LAST_DYNAMIC: Final = 65534

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_STATE: Final = "state.json"
_RESOURCES: Final = "resources.json"
_ENDED: Final = "ended.json"


@dataclass(frozen=True, slots=True)
class Resources:
    """What a start makes outside the guest's own namespaces; each undo finds what it needs here.

    Something that stands here may not have been made yet, or be gone already.
    """

    xid: int
    cgroup: Mapping[str, Any] = field(default_factory=dict)
    network: Mapping[str, Any] = field(default_factory=dict)
    profile: str | None = None
    """What PROFILE was when the configuration was read."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run ended: the content of ended.json."""

    how: str
    """exited, killed, halted, restarted, stopped, failed or unknown."""
    status: int | None
    """Exit status of the guest's init, or the signal that killed it."""
    text: str
    """For a person."""
    at: float = 0.0
    """Seconds since 1970."""


def run_folder(name: str) -> Path:
    """RUNDIR/NAME; raises WrongUsage for what cannot be a name."""
    return rundir() / parse_name(name)


@contextmanager
def short_path(name: str, entry: str) -> Iterator[str]:
    """RUNDIR/NAME/ENTRY by way of /proc: an address of a socket holds only 108 bytes.

    Raises OSError where the folder is missing.
    """
    fd = os.open(run_folder(name), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{entry}"
    finally:
        os.close(fd)


def write_state(name: str, state: RunState) -> None:
    """Say that the guest runs. Raises OSError."""
    values = {
        "format": STATE_FORMAT,
        "xid": state.xid,
        "init_pid": state.init_pid,
        "init_start": state.init_start,
        "cgroup": os.fspath(state.cgroup),
        "pool": os.fspath(state.pool) if state.pool else None,
        "protection": state.protection,
    }
    _replace(run_folder(name) / _STATE, values)


def start_of(pid: int) -> int:
    """When the process began, in clock ticks since boot: field 22 of /proc/PID/stat, proc(5).

    Raises OSError where there is none.
    """
    after_name = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2]
    return int(after_name.split()[19])


def find_running(name: str) -> RunState | None:
    """As `load_state`, but of a guest whose init has ended and that nobody has reaped: None."""
    running = load_state(name)
    if running is None:
        return None
    try:
        init_fd = os.pidfd_open(running.init_pid)
    except ProcessLookupError:
        return None
    try:
        ended = select.poll()
        ended.register(init_fd, select.POLLIN)  # once all of its threads have ended
        return None if ended.poll(0) else running
    finally:
        os.close(init_fd)


def write_resources(name: str, resources: Resources) -> None:
    """Keep what must be undone; before it is made. Raises OSError."""
    values = {
        "format": STATE_FORMAT,
        "boot": _boot_id(),
        "xid": resources.xid,
        "cgroup": dict(resources.cgroup),
        "network": dict(resources.network),
        "profile": resources.profile,
    }
    _replace(run_folder(name) / _RESOURCES, values)


def load_resources(name: str) -> Resources | None:
    """What the last start of the guest made and nobody undid; None where that is nothing.

    What was made before the machine booted is gone. Raises ConfigInvalid, FormatUnknown.
    """
    path = run_folder(name) / _RESOURCES
    values = _load(path)
    if values is None or values.get("boot") != _boot_id():
        return None
    try:
        return Resources(
            xid=int(values["xid"]),
            cgroup=dict(values["cgroup"]),
            network=dict(values["network"]),
            profile=values.get("profile"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigInvalid(f"{path}: key missing or of the wrong kind: {error}") from error


def forget_run(name: str) -> None:
    """All is undone: the guest does not run, and nothing of it is left. Raises OSError."""
    for entry in (_STATE, _RESOURCES):  # the record of what to undo goes last
        (run_folder(name) / entry).unlink(missing_ok=True)


def forget_state(name: str) -> None:
    """The guest does not run any more; what it leaves is still to be undone. Raises OSError."""
    (run_folder(name) / _STATE).unlink(missing_ok=True)


def write_ended(name: str, ended: Ended) -> None:
    """Keep how the run ended. Raises OSError."""
    values = {
        "format": STATE_FORMAT,
        "how": ended.how,
        "status": ended.status,
        "text": ended.text,
        "at": ended.at or time.time(),
    }
    _replace(run_folder(name) / _ENDED, values)


def load_ended(name: str) -> Ended | None:
    """How the last run ended; None where that is not known."""
    with suppress(ToolError, KeyError, TypeError, ValueError):
        values = _load(run_folder(name) / _ENDED)
        if values:
            status = values["status"]
            return Ended(
                str(values["how"]),
                None if status is None else int(status),
                str(values["text"]),
                float(values["at"]),
            )
    return None


def is_held(name: str) -> bool:
    """Whether another program starts, runs, stops or deletes the guest."""
    fd = take_lock(name)
    if fd is None:
        return True
    os.close(fd)
    return False


# --- numbers


def reserve_xid(
    name: str,
    wanted: int | None,
    *,
    is_taken: Callable[[int], bool],
    note: Callable[[int], None],
) -> int:
    """Give the guest the number `wanted`, else the lowest free dynamic one; its lock is held.

    `is_taken` says of a dynamic number whether somebody else uses it for whom RUNDIR is another
    folder; `note` gets the number right before the guest has it, to keep what must be undone.
    Raises ToolError where another guest that runs has the number, or none is free.
    """
    with _xids() as folder:
        owners = {int(entry): owner for entry, owner in _owners(folder)}
        if wanted is not None:
            _check_free(wanted, owners.get(wanted), name)
            return _take_xid(folder, wanted, name, note)
        for xid in range(FIRST_DYNAMIC, LAST_DYNAMIC + 1):
            if xid in owners and _is_used_by_other(owners[xid], name):
                continue
            if not is_taken(xid):
                return _take_xid(folder, xid, name, note)
    raise ToolError(
        f"guest {name}: all context numbers from {FIRST_DYNAMIC} to {LAST_DYNAMIC} are taken",
        hint="give guests numbers of their own in the file context",
    )


def release_xid(name: str, xid: int) -> None:
    """Let others have the number, if the guest has it."""
    with _xids() as folder, suppress(OSError):
        link = folder / str(xid)
        if os.fspath(link.readlink()) == name:
            link.unlink()


def has_xid(name: str, xid: int) -> bool:
    """Whether the number is the guest's still, and no other has taken it since."""
    with suppress(OSError):
        return os.fspath((rundir() / ".xids" / str(xid)).readlink()) == name
    return False


def find_by_xid(xid: int) -> str | None:
    """The name of the running guest that has the number; None where there is none."""
    with suppress(OSError):
        name = os.fspath((rundir() / ".xids" / str(xid)).readlink())
        state = find_running(name)
        if state is not None and state.xid == xid:
            return name
    return None


@contextmanager
def _xids() -> Iterator[Path]:
    folder = rundir() / ".xids"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise NotPermitted(
            f"{folder}: cannot keep the context numbers: {error.strerror}",
            hint="run as root, or name another folder with VSERVER_RUNDIR",
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(fd)


def _owners(folder: Path) -> Iterator[tuple[str, str]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.isdecimal():
                yield entry.name, os.readlink(entry.path)  # noqa: PTH115 (text, no Path)


def _check_free(xid: int, owner: str | None, name: str) -> None:
    if owner is not None and _is_used_by_other(owner, name):
        raise ToolError(
            f"guest {name}: its context number {xid} is that of guest {owner}, which runs",
            hint="each guest needs a number of its own in its file context",
        )


def _is_used_by_other(owner: str, name: str) -> bool:
    return owner != name and (is_held(owner) or find_running(owner) is not None)


def _take_xid(folder: Path, xid: int, name: str, note: Callable[[int], None]) -> int:
    note(xid)
    link = folder / str(xid)
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    return xid


# --- files


def _boot_id() -> str:
    return _BOOT_ID.read_text().strip()


def _replace(path: Path, values: dict[str, Any]) -> None:
    import json  # 1 ms that a command to a monitor which is there need not pay

    spare = path.with_suffix(".new")
    with open(spare, "w", opener=_private) as file:
        json.dump(values, file)
        file.write("\n")
    spare.replace(path)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _load(path: Path) -> dict[str, Any] | None:
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    import json

    try:
        values: dict[str, Any] = dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise ConfigInvalid(f"{path}: is no JSON object: {error}") from error
    if values.get("format") != STATE_FORMAT:
        raise FormatUnknown(
            f"{path}: has format {values.get('format')!r}, this version knows {STATE_FORMAT}",
            hint="use the version that started the guest",
        )
    return values
