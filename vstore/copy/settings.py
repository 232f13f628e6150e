"""A guest's configuration on its way: CONFDIR/NAME, or NAME.conf of an old-style guest.

A setting's path is `conf` for NAME.conf, `sh` for NAME.sh, and `d/...` for what is in the folder
NAME. What only this machine can know (`vdir`, `run`, `cache`) stays behind and is made anew there.
"""

import os
import re
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from vstore.copy.identity import change_old_style, change_settings
from vstore.copy.messages import Hostile, Identity, Setting, as_text
from vstore.copy.policy import Policy, policy_path
from vstore.errors import ConfigInvalid, NotPermitted, ToolError
from vstore.guest import Guest, confdir

_LEFT_BEHIND: Final = frozenset({"vdir", "run", "cache"})
_LARGEST: Final = 1 << 20
_ALL: Final = 3 << 20  # bytes of all settings together: they travel in one message
_MOST: Final = 5000
_NAME: Final = re.compile(r"[^/\0\n]{1,255}")
_SCRIPTS: Final = ("sh", "d/scripts")
_ASSIGNMENT: Final = re.compile(
    rb"[ \t]*((export[ \t]+)?[A-Za-z_]\w*=(\"[^\"$`\\]*\"|'[^']*'|[\w@%+=:,./-]*)[ \t]*;?[ \t]*)?"
    rb"(#.*)?"
)
"""A line of NAME.conf that does no more than to set a variable."""


def is_old_style(guest: Guest) -> bool:
    return guest.config is not None and guest.config.name == f"{guest.name}.conf"


def collect_settings(guest: Guest) -> list[Setting]:
    """All that the configuration consists of.

    Raises ConfigInvalid for what is too large to be one, or cannot be read.
    """
    if guest.config is None:
        return []
    found: list[Setting] = []
    try:
        if is_old_style(guest):
            found.append(_read("conf", guest.config))
            with suppress(FileNotFoundError):
                found.append(_read("sh", guest.config.with_suffix(".sh")))
        folder = guest.config.with_name(guest.name)
        if folder.is_dir():
            found += _collect_below(folder)
    except OSError as error:
        raise ConfigInvalid(f"{guest.config}: cannot be read: {error.strerror}") from error
    if len(found) > _MOST:
        raise ConfigInvalid(f"{guest.config}: has more than {_MOST} files")
    total = sum(len(item.path) + len(item.content) for item in found)
    if total > _ALL:
        raise ConfigInvalid(
            f"{guest.config}: has {total} bytes, more than the {_ALL} that can be sent",
            hint="move what is no configuration elsewhere",
        )
    return found


def _collect_below(folder: Path) -> Iterator[Setting]:
    yield Setting("d/", "d", stat.S_IMODE(folder.stat().st_mode))
    for top, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted([*folders, *names]):
            path = Path(top, name)
            relative = os.fspath(path.relative_to(folder))
            if relative in _LEFT_BEHIND:
                continue
            _check_text(path)
            if path.is_symlink():
                yield Setting(f"d/{relative}", "l", 0o777, os.fsencode(path.readlink()))
            elif path.is_dir():
                yield Setting(f"d/{relative}", "d", stat.S_IMODE(path.stat().st_mode))
            elif path.is_file():
                yield _read(f"d/{relative}", path)


def _check_text(path: Path) -> None:
    if as_text(path.name) != path.name:
        raise ConfigInvalid(
            f"{path}: its name is no UTF-8, which no setting's is", hint="remove or rename it"
        )


def _read(name: str, path: Path) -> Setting:
    status = path.stat()
    if status.st_size > _LARGEST:
        raise ConfigInvalid(f"{path}: has {status.st_size} bytes, too many for a setting")
    return Setting(name, "f", stat.S_IMODE(status.st_mode), path.read_bytes())


# --- on the other side


def check_settings(settings: Sequence[Setting], policy: Policy) -> tuple[list[Setting], list[str]]:
    """The settings that may be made here, and what is left out and why.

    Raises Hostile for paths that lead out of the guest's configuration, NotPermitted for an
    old-style guest's that is more than assignments.
    """
    kept: list[Setting] = []
    left: list[str] = []
    seen: set[str] = set()
    for item in settings:
        _check_path(item)
        if item.path in seen:
            raise Hostile(f"the setting {item.path!r} twice")
        seen.add(item.path)
        target = os.fsdecode(item.content) if item.kind == "l" else ""
        if item.path == "conf" and not policy.scripts:
            _check_assignments(item.content)
        if not policy.scripts and item.path.startswith(_SCRIPTS):
            if item.kind == "f":
                left.append(f"{_show(item)}: a script that runs as root: the policy can allow it")
        elif target.startswith("/") or ".." in target.split("/"):
            left.append(f"{_show(item)}: a symlink out of the configuration, to {target!r}")
        else:
            kept.append(item)
    return kept, left


def _check_assignments(content: bytes) -> None:
    """A shell reads it when the guest is started, as the host's root."""
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not _ASSIGNMENT.fullmatch(line):
            raise NotPermitted(
                f"the guest's .conf runs shell code as root: line {number}: "
                f"{os.fsdecode(line[:80])}",
                hint="make it plain assignments, or allow it where the copy comes to stand, with "
                f"the word `scripts` in {policy_path()}",
            )


def _show(item: Setting) -> str:
    return item.path.removeprefix("d/")


def _check_path(item: Setting) -> None:
    if item.path in ("conf", "sh"):
        if item.kind != "f":
            raise Hostile(f"the setting {item.path!r}, which is no file")
        return
    first, _, rest = item.path.partition("/")
    names = rest.split("/") if rest else []
    is_good = first == "d" and all(
        _NAME.fullmatch(name) and name not in (".", "..") for name in names
    )
    if not is_good or item.kind not in "fld" or (not names and item.kind != "d"):
        raise Hostile(f"the setting {item.path!r}")
    if names and names[0] in _LEFT_BEHIND:
        raise Hostile(f"the setting {item.path!r}, which each machine makes for itself")


class Drafted:
    """A guest's configuration that is written, and not in its place yet."""

    def __init__(self, name: str, folder: Path, *, is_old: bool) -> None:
        self._name = name
        self._folder = folder
        self._is_old = is_old

    def put_in_place(self) -> None:
        """Make it the guest's. Raises ToolError where one has been made meanwhile."""
        try:
            if self._is_old:
                self._put_files()
            else:
                (self._folder / "d").rename(confdir() / self._name)
        except OSError as error:
            raise ToolError(
                f"{confdir() / self._name}: the configuration cannot be put in place: "
                f"{error.strerror}",
                hint="the guest's tree is there; run the command again with --refresh",
            ) from error
        self.drop()

    def _put_files(self) -> None:
        if (self._folder / "d").is_dir():
            (self._folder / "d").rename(confdir() / self._name)
        for suffix in ("sh", "conf"):
            path = self._folder / suffix
            if path.exists():
                path.rename(confdir() / f"{self._name}.{suffix}")

    def drop(self) -> None:
        """Remove what has not been put in place."""
        for top, folders, names in os.walk(self._folder, topdown=False):
            for name in names:
                Path(top, name).unlink()
            for name in folders:
                path = Path(top, name)
                path.unlink() if path.is_symlink() else path.rmdir()
        with suppress(FileNotFoundError):
            self._folder.rmdir()


def draft_settings(
    name: str,
    root: Path,
    settings: Sequence[Setting],
    *,
    was: Identity,
    wanted: Identity,
    devices: Sequence[str],
    mark_off: bool,
) -> Drafted:
    """Write the configuration of the guest `name`, whose tree will be `root`, beside its place.

    `was` and `wanted`: the identities to change from and to; `devices`: of addresses, "" for those
    that stay. Raises ToolError.
    """
    is_old = any(item.path == "conf" for item in settings)
    change = change_old_style if is_old else change_settings
    changed = change(settings, was, wanted, devices, mark_off=mark_off, name=name)
    folder = confdir() / f".{name}.copy-{secrets.token_hex(4)}"
    drafted = Drafted(name, folder, is_old=is_old)
    try:
        confdir().mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)
        _write_all(folder, changed)
        if not is_old:
            (folder / "d").mkdir(exist_ok=True)
            (folder / "d" / "vdir").symlink_to(root)
    except OSError as error:
        drafted.drop()
        raise ToolError(
            f"{folder}: the configuration cannot be written: {error.strerror}"
        ) from error
    return drafted


def _write_all(folder: Path, settings: Sequence[Setting]) -> None:
    for item in settings:
        path = folder / item.path.rstrip("/")
        if item.kind == "d":
            path.mkdir(exist_ok=True)
            path.chmod(item.mode | 0o700)
        elif item.kind == "l":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(os.fsdecode(item.content))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(path, flags, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(item.content)
                os.fchmod(fd, item.mode)
