"""What an administrator keeps for all guests of a distribution: CONFDIR/.distributions/DIST.

    devs                     device table: name, type, numbers, mode or target; one a line
    initpre, initpost        programs run before and after the tree is filled
    files/                   hosts, nsswitch.conf, ...: for guests that lack them
    template                 link to a tarball
    debootstrap.{mirror,options,script}

What a distribution has not, .defaults has for all of them, or this module.
"""

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vrun.errors import ConfigInvalid, WrongUsage
from vstore.guest import confdir

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MOST_BYTES: Final = 1 << 20
_KINDS: Final = {"c": stat.S_IFCHR, "b": stat.S_IFBLK, "d": stat.S_IFDIR, "l": stat.S_IFLNK}
_KINDS_WITH_FILES: Final = {**_KINDS, "f": stat.S_IFREG}


@dataclass(frozen=True, slots=True)
class Device:
    """A row of a device table: what stands below a guest's /dev."""

    name: str
    kind: int  # S_IFCHR, S_IFBLK, S_IFDIR, S_IFREG or S_IFLNK of stat
    mode: int = 0
    device: int = 0
    target: str = ""


DEVICES: Final = (
    Device("null", stat.S_IFCHR, 0o666, os.makedev(1, 3)),
    Device("zero", stat.S_IFCHR, 0o666, os.makedev(1, 5)),
    Device("full", stat.S_IFCHR, 0o666, os.makedev(1, 7)),
    Device("random", stat.S_IFCHR, 0o644, os.makedev(1, 8)),
    Device("urandom", stat.S_IFCHR, 0o644, os.makedev(1, 9)),
    Device("tty", stat.S_IFCHR, 0o666, os.makedev(5, 0)),
    Device("ptmx", stat.S_IFCHR, 0o666, os.makedev(5, 2)),
    Device("fd", stat.S_IFLNK, target="/proc/self/fd"),
    Device("stdin", stat.S_IFLNK, target="fd/0"),
    Device("stdout", stat.S_IFLNK, target="fd/1"),
    Device("stderr", stat.S_IFLNK, target="fd/2"),
    Device("shm", stat.S_IFDIR, 0o1777),
    Device("pts", stat.S_IFDIR, 0o755),
)
"""What every guest's /dev has where no table says otherwise."""


class Distribution:
    """The settings of one distribution; one that has no folder, or no name, has none."""

    def __init__(self, name: str | None) -> None:
        """Raises WrongUsage for what cannot be a distribution's name."""
        if name is not None and not _NAME.fullmatch(name):
            raise WrongUsage(f"{name!r} cannot be a distribution's name")
        self.name = name
        self._folder = confdir() / ".distributions" / name if name else None

    @property
    def is_missing(self) -> bool:
        """Whether it was named and has no settings."""
        return self._folder is not None and not self._folder.is_dir()

    def find(self, key: str) -> Path | None:
        """The file `key` of this distribution; None where it has none.

        Raises ConfigInvalid for a symlink that leads nowhere.
        """
        if self._folder is None or not os.path.lexists(self._folder / key):
            return None
        if not (self._folder / key).exists():
            raise ConfigInvalid(f"{self._folder / key}: is a symlink that leads nowhere")
        return self._folder / key

    def find_file(self, name: str) -> Path | None:
        """A file for guests that lack it: of the distribution, else of .defaults."""
        return self.find(f"files/{name}") or existing(confdir() / ".defaults" / "files" / name)

    def value(self, key: str) -> str | None:
        """The first line of a setting that is not blank."""
        path = self.find(key)
        return first_line(path) if path else None

    def devices(self) -> tuple[Device, ...]:
        """The device table. Raises ConfigInvalid with file and line."""
        path = self.find("devs")
        return tuple(_parse_devices(path)) if path else DEVICES


def default_setting(key: str) -> str | None:
    """The first line of CONFDIR/.defaults/KEY that is not blank; None where there is none."""
    path = existing(confdir() / ".defaults" / key)
    return first_line(path) if path else None


def existing(path: Path) -> Path | None:
    return path if path.is_file() else None


def first_line(path: Path) -> str | None:
    return next((line for line in read_lines(path) if line), None)


def read_lines(path: Path) -> list[str]:
    """The lines of a configuration file without blanks around them and without comments.

    Raises ConfigInvalid.
    """
    try:
        with path.open(errors="surrogateescape") as file:
            text = file.read(_MOST_BYTES)
    except OSError as error:
        raise ConfigInvalid(f"{path}: cannot be read: {error.strerror}") from error
    return [line.strip() for line in text.split("\n") if not line.lstrip().startswith("#")]


def _parse_devices(path: Path) -> Iterator[Device]:
    text = path.read_text(errors="surrogateescape")
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if words:
            try:
                yield _parse_device(words)
            except ValueError as error:
                raise ConfigInvalid(f"{path}:{number}: {error}") from error


def _parse_device(words: list[str]) -> Device:
    """`null c 1 3 666`, `shm d 1777`, `fd l /proc/self/fd`."""
    name, kind, *rest = words if len(words) > 1 else [*words, ""]
    if name.startswith("/") or ".." in name.split("/"):
        raise ValueError(f"{name!r} does not stand below /dev")
    if kind in ("c", "b") and len(rest) == 3:
        major, minor = int(rest[0]), int(rest[1])
        return Device(name, _KINDS[kind], int(rest[2], 8), os.makedev(major, minor))
    if kind in ("d", "f") and len(rest) == 1:
        return Device(name, _KINDS_WITH_FILES[kind], int(rest[0], 8))
    if kind == "l" and len(rest) == 1:
        return Device(name, stat.S_IFLNK, target=rest[0])
    raise ValueError(f"{' '.join(words)!r} is no row of a device table")
