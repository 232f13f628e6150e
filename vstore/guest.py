"""Guests: where they are found, and what is known of one while it runs.

A guest is a name and a root tree. Names come from the configuration directory:

    CONFDIR/
    ├── .defaults/vdirbase   symlink to the folder of the guests' roots
    ├── web/                 a guest: `vdir` is a symlink to its root
    │   ├── vdir
    │   ├── disabled         left out of everything that is done to all guests
    │   ├── legacy           the guest is described by CONFDIR/web.conf all the same
    │   └── apps/vunify/     exclude, refserver.*, pkgmgmt-ignore, pkgmgmt-force
    └── mail.conf            an old-style guest: its root is VDIRBASE/mail

A tree that is no configured guest has the path for its name.
"""

import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NewType

from vstore.errors import ConfigInvalid, FormatUnknown, GuestNotFound, NotPermitted, WrongUsage
from vstore.record import dataclass

GuestName = NewType("GuestName", str)
"""Only `parse_name` makes one."""

STATE_FORMAT: Final = 1
LEFTOVER: Final = re.compile(r"(\.rpmsave|\.rpmnew|\.rpmorig|\.cfsaved.*|~)\Z")
"""How the names end that editors and package managers leave in a configuration directory."""

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LOCK_POLL_S: Final = 0.02


def parse_name(text: str) -> GuestName:
    """The guest name that `text` is: 1 to 64 of `A-Z a-z 0-9 . _ -`, a letter or digit first.

    Raises WrongUsage for anything else, and for the names of leftovers (`web.rpmsave`).
    """
    if not _NAME.fullmatch(text) or LEFTOVER.search(text):
        raise WrongUsage(
            f"{text!r} cannot be a guest's name",
            hint="a name has 1 to 64 of A-Z a-z 0-9 . _ - and begins with a letter or a digit; "
            "a tree that is no configured guest is named with --root",
        )
    return GuestName(text)


def confdir() -> Path:
    """The configuration directory: VSERVER_CONFDIR, else /etc/vservers."""
    return Path(os.environ.get("VSERVER_CONFDIR") or "/etc/vservers").absolute()


def vdirbase() -> Path:
    """The folder of guests' roots.

    VSERVER_VDIRBASE, else where CONFDIR/.defaults/vdirbase points, else /var/lib/vservers.
    """
    chosen = os.environ.get("VSERVER_VDIRBASE")
    if chosen:
        return Path(chosen).absolute()
    link = confdir() / ".defaults" / "vdirbase"
    if os.path.lexists(link):
        return _resolve(link)
    return Path("/var/lib/vservers")


def rundir() -> Path:
    """The folder of the guests' run state: VSERVER_RUNDIR, else /run/vservers."""
    return Path(os.environ.get("VSERVER_RUNDIR") or "/run/vservers").absolute()


@dataclass(frozen=True, slots=True)
class Guest:
    """One installed system: a name and a root tree."""

    name: str
    """The guest's name, or the path that named a tree."""
    root: Path
    """Absolute, without symlinks; a directory when it was looked up."""
    config: Path | None
    """CONFDIR/NAME, or CONFDIR/NAME.conf of an old-style guest; None for a tree."""

    @property
    def is_configured(self) -> bool:
        """Whether the guest is known by a name, so that it can have a lock and a run state."""
        return self.config is not None

    def app_dir(self, app: str) -> Path | None:
        """The folder of the guest's settings for `app` ("vunify"), there or not; None for a tree.

        An old-style guest keeps it in CONFDIR/NAME too.
        """
        if self.config is None:
            return None
        is_old_style = self.config.name == f"{self.name}.conf"
        folder = self.config.with_name(self.name) if is_old_style else self.config
        return folder / "apps" / app


def find_guest(name: GuestName) -> Guest | None:
    """The configured guest of that name; None where there is none, or its root is missing."""
    with suppress(GuestNotFound):
        return load_guest(name)
    return None


def load_guest(name: str) -> Guest:
    """The configured guest of that name; one slash at its end, as shells complete it, does no harm.

    Raises WrongUsage for what cannot be a name, GuestNotFound with the paths that were looked at,
    ConfigInvalid for a root that no guest can have.
    """
    known = parse_name(name.removesuffix("/"))
    folder, old_style = confdir() / known, confdir() / f"{known}.conf"
    if _is_new_style(folder):
        return _load_directory(known, folder)
    if old_style.is_file():
        root = vdirbase() / known
        return Guest(known, _checked_root(known, root, f"its root {root}"), old_style)
    raise GuestNotFound(
        f"there is no guest {known}: {_missing(folder)}, and {old_style} does not exist",
        hint=f"guests are looked for in {confdir()}; VSERVER_CONFDIR names another folder",
    )


def list_guests(*, include_disabled: bool = False) -> list[Guest]:
    """All configured guests whose root is there, sorted by name.

    Left out: leftovers of editors and package managers, directories without a `vdir`, disabled
    guests unless asked for, and, with a warning, guests whose root is missing or whose name is
    none.
    """
    try:
        entries = [entry.name for entry in confdir().iterdir()]
    except FileNotFoundError:
        return []
    found = (_listed_guest(name) for name in sorted(_names_among(entries)))
    return [guest for guest in found if guest and (include_disabled or not _is_disabled(guest))]


def tree_guest(path: Path) -> Guest:
    """The tree at `path`, which is no configured guest.

    Raises GuestNotFound unless it is a directory and no symlink.
    """
    if path.is_symlink():
        raise GuestNotFound(
            f"{path}: is a symlink, so it could point elsewhere in a moment",
            hint=f"name the directory itself: {_resolve(path)}",
        )
    if not path.is_dir():
        raise GuestNotFound(f"{path}: is no directory")
    return Guest(os.fspath(path), _resolve(path), None)


def refservers(guest: Guest) -> list[Guest]:
    """The guests that `apps/vunify/refserver.*` of `guest` point at, in order of the links' names.

    Each link leads to a configuration directory. Raises ConfigInvalid for one that does not.
    """
    folder = guest.app_dir("vunify")
    if folder is None or not folder.is_dir():
        return []
    links = sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.name.startswith("refserver.") and not LEFTOVER.search(entry.name)
    )
    return [_load_refserver(folder / name) for name in links]


def _is_new_style(folder: Path) -> bool:
    return os.path.lexists(folder / "vdir") and not (folder / "legacy").exists()


def _load_directory(name: str, folder: Path) -> Guest:
    link = folder / "vdir"
    shown = f"{link}, which points to {_resolve(link)}" if link.is_symlink() else f"{link}"
    return Guest(name, _checked_root(name, link, shown), folder)


def _checked_root(name: str, path: Path, shown: str) -> Path:
    root = _resolve(path)
    if not root.is_dir():
        reason = "is no directory" if root.exists() else "does not exist"
        raise GuestNotFound(f"guest {name} has no root: {shown}, {reason}")
    if root == Path("/"):
        raise ConfigInvalid(f"guest {name}: {shown}, is the host's own root")
    return root


def _missing(folder: Path) -> str:
    """Why the configuration directory `folder` makes no guest."""
    if folder.is_symlink() and not folder.exists():
        return f"{folder} is a symlink to {_resolve(folder)}, which does not exist"
    if (folder / "legacy").exists():
        return f"{folder} is marked legacy"
    return f"{folder / 'vdir'} does not exist"


def _names_among(entries: list[str]) -> set[str]:
    """The guests that the entries of a configuration directory could stand for."""
    kept = {entry for entry in entries if not entry.startswith(".") and not LEFTOVER.search(entry)}
    directories = {entry for entry in kept if os.path.lexists(confdir() / entry / "vdir")}
    old_style = {
        entry.removesuffix(".conf")
        for entry in kept
        if entry.endswith(".conf") and (confdir() / entry).is_file()
    }
    return directories | old_style


def _listed_guest(name: str) -> Guest | None:
    try:
        return load_guest(name)
    except (GuestNotFound, ConfigInvalid, WrongUsage) as error:
        import logging  # 4 ms that only this warning needs

        logging.getLogger(__name__).warning("%s; it is left out", error.message)
        return None


def _is_disabled(guest: Guest) -> bool:
    return (confdir() / guest.name / "disabled").exists()


def _load_refserver(link: Path) -> Guest:
    folder = _resolve(link)
    if not os.path.lexists(folder / "vdir"):
        raise ConfigInvalid(
            f"{link}: leads to {folder}, which is no guest's configuration directory",
            hint=f"point it to a directory of {confdir()}",
        )
    return _load_directory(folder.name, folder)


def _resolve(path: Path) -> Path:
    """`path` without symlinks, whether it exists or not; a loop of symlinks stays as it is."""
    return Path(os.path.realpath(path))


COPY_ON_WRITE: Final = "copy-on-write"
"""Shared files are immutable, and a supervisor gives the guest copies of what it writes to."""


@dataclass(frozen=True, slots=True)
class RunState:
    """A running guest, as its RUNDIR/NAME/state.json tells."""

    xid: int
    init_pid: int
    """As the host numbers processes."""
    init_start: int
    """When that process began: field 22 of /proc/PID/stat, in clock ticks since boot."""
    cgroup: Path
    """The directory of its v2 cgroup."""
    pool: Path | None
    protection: str
    """What keeps shared inodes from its root: COPY_ON_WRITE, or another word of vrun's."""


def load_state(name: str) -> RunState | None:
    """What is known of the guest while it runs; None where it does not or its init is gone.

    Raises ConfigInvalid for a state that cannot be read, FormatUnknown for a newer one, WrongUsage
    for a bad name.
    """
    path = rundir() / parse_name(name) / "state.json"
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    state = _parse_state(text, path)
    return state if _start_of(state.init_pid) == state.init_start else None


def _parse_state(text: bytes, path: Path) -> RunState:
    import json  # 3 ms that only the question for a running guest needs

    try:
        values: dict[str, Any] = dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise ConfigInvalid(f"{path}: is no JSON object: {error}") from error
    if values.get("format") != STATE_FORMAT:
        raise FormatUnknown(
            f"{path}: has format {values.get('format')!r}, this version knows {STATE_FORMAT}",
            hint="use the version that started the guest",
        )
    try:
        return RunState(
            xid=int(values["xid"]),
            init_pid=int(values["init_pid"]),
            init_start=int(values["init_start"]),
            cgroup=Path(values["cgroup"]),
            pool=Path(values["pool"]) if values["pool"] else None,
            protection=str(values["protection"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigInvalid(f"{path}: key missing or of the wrong kind: {error}") from error


def _start_of(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat; None where no such process is.

    A zombie counts as there: its first thread may be gone while others of the same process run on.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    after_name = text[
        text.rindex(b")") + 2 :
    ]  # the name in parentheses may hold blanks and parentheses
    return int(after_name.split()[19])


@contextmanager
def hold_lock(name: str, *, wait_s: float = 0) -> Iterator[bool]:
    """Hold the guest's exclusive lock; yields whether it could be had within `wait_s` seconds.

    Who holds it keeps the guest from being started, stopped or deleted. Makes RUNDIR/NAME (0700)
    and its file `lock` (0600), which stay: a lock on a removed file guards nothing. Raises
    NotPermitted where they cannot be made, WrongUsage for a bad name.
    """
    fd = _open_lock(rundir() / parse_name(name))
    try:
        yield _lock_within(fd, wait_s)
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)  # a forked child may have a copy of the descriptor
        os.close(fd)


def take_lock(name: str) -> int | None:
    """A descriptor with the guest's exclusive lock, close-on-exec; None where another has it.

    The lock lasts until the descriptor and all copies of it are closed. Makes and raises what
    `hold_lock` does.
    """
    fd = _open_lock(rundir() / parse_name(name))
    if _lock_within(fd, 0):
        return fd
    os.close(fd)
    return None


def _open_lock(folder: Path) -> int:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(
            folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
        )
    except FileExistsError as error:
        raise ConfigInvalid(
            f"{folder}: is a file where the guest's run folder belongs",
            hint="it is the run state of the original tools; remove it once they are gone",
        ) from error
    except OSError as error:
        raise NotPermitted(
            f"{folder}/lock: cannot make the guest's lock: {error.strerror}",
            hint="run as root, or name another folder with VSERVER_RUNDIR",
        ) from error


def _lock_within(fd: int, wait_s: float) -> bool:
    deadline = time.monotonic() + wait_s
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(_LOCK_POLL_S)
