"""A folder of configuration with one file per key, read as the original's scripts read it.

    boolean   the file is there; its content says nothing
    scalar    one value: the first line that is not blank, without blanks around it
    list      one item a line; blank lines and those that begin with # say nothing
    hash      VAR=VAL a line
    number    a scalar: decimal, 0x1f or 017

Accepted everywhere: a last line without its newline, the line ends of other systems, a byte order
mark. What begins with a dot, and what editors and package managers leave behind, is no key and no
entry. A symlink that leads nowhere counts as missing, with a warning.
"""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from vrun.errors import ConfigInvalid
from vstore.guest import LEFTOVER
from vstore.record import dataclass

_MOST_BYTES: Final = 1 << 20
"""No configuration is longer; a symlink to a device could be without end."""
_NEARLY: Final = 0.8
"""How much alike two names are of which one may be meant for the other; 1 is the same."""
_NUMBER: Final = r"[-+]?(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)"


@dataclass(frozen=True, slots=True)
class Line:
    """A piece of text and where it stands."""

    where: str
    """`file:line`, for messages."""
    text: str


class Keys:
    """The keys of one folder; a folder that does not exist has none.

    `warnings` is shared by all folders of one guest and grows as they are read.
    """

    __slots__ = ("_names", "path", "warnings")

    def __init__(self, path: Path, warnings: list[str]) -> None:
        """Raises ConfigInvalid where `path` is there but cannot be listed."""
        self.path = path
        self.warnings = warnings
        self._names = frozenset(_list(path))

    def __truediv__(self, key: str) -> "Keys":
        """The folder `key`; keys within it are only looked for where it exists."""
        if key not in self._names:
            return _absent(self.path / key, self.warnings)
        return Keys(self.path / key, self.warnings)

    @property
    def exists(self) -> bool:
        return bool(self._names) or self.path.is_dir()

    def has(self, key: str) -> bool:
        """Whether the key is there: the value of a boolean."""
        if key not in self._names:
            return False
        if os.path.exists(f"{self.path}/{key}"):  # noqa: PTH110 - a start asks a hundred times
            return True
        self.warn(key, "is a symlink that leads nowhere; it counts as missing")
        return False

    def warn(self, key: str, message: str) -> None:
        self.warnings.append(f"{self.path / key}: {message}")

    def warn_misspelt(self, known: frozenset[str]) -> None:
        """Warn of names that are none of `known` and nearly one: they would say nothing.

        What is nothing like a key, a note of the administrator's, does no harm, nor does a key that
        was put aside: cflags.old.
        """
        for name in sorted(self._names - known):
            if LEFTOVER.search(name) or name.partition(".")[0] in known:
                continue
            from difflib import get_close_matches  # few guests have such a file

            if near := get_close_matches(name, known, 1, _NEARLY):
                self.warn(name, f"is no key and not read; is {near[0]} meant?")

    def entries(self) -> list[str]:
        """The names of its folders, in the order that counts; none that is a leftover."""
        return sorted(
            name
            for name in self._names
            if not LEFTOVER.search(name) and (self.path / name).is_dir()
        )

    def files(self) -> list[str]:
        """The names of all that is no folder, sorted; none that is a leftover."""
        return sorted(
            name
            for name in self._names
            if not LEFTOVER.search(name) and self.has(name) and not (self.path / name).is_dir()
        )

    def text(self, key: str) -> str | None:
        """The whole content, lines ended by newlines; None where the key is missing.

        Raises ConfigInvalid for a directory, a FIFO, a NUL byte, and what cannot be read.
        """
        if not self.has(key):
            return None
        data = _read(self.path / key)
        return os.fsdecode(data.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n"))

    def numbered(self, key: str) -> list[Line]:
        """Every line, blank ones and comments too, without blanks around it."""
        text = self.text(key)
        if not text:
            return []
        where = f"{self.path}/{key}:"
        return [
            Line(f"{where}{number}", line.strip())
            for number, line in enumerate(text.split("\n"), start=1)
        ]

    def scalar(self, key: str) -> Line | None:
        """The value of the key; None where it is missing or blank."""
        return next((line for line in self.numbered(key) if line.text), None)

    def value(self, key: str) -> str | None:
        """As `scalar`, its text alone."""
        line = self.scalar(key)
        return line.text if line else None

    def items(self, key: str) -> list[Line]:
        """The items of a list; none where the key is missing."""
        return [line for line in self.numbered(key) if line.text and not line.text.startswith("#")]

    def arguments(self, key: str) -> tuple[str, ...] | None:
        """A command, one argument a line; None where the key is missing.

        Raises ConfigInvalid for one without any argument.
        """
        if not self.has(key):
            return None
        found = tuple(line.text for line in self.items(key))
        if not found:
            raise ConfigInvalid(
                f"{self.path / key}: names no command",
                hint="write the program and each of its arguments on a line of its own",
            )
        return found

    def number(self, key: str, *, least: int, most: int) -> int | None:
        """The key as a number; None where it is missing or blank.

        Raises ConfigInvalid for what is no number of `least` to `most`.
        """
        line = self.scalar(key)
        return parse_number(line, least=least, most=most) if line else None

    def pairs(self, key: str) -> Iterator[tuple[str, str]]:
        """The VAR=VAL lines of a hash; raises ConfigInvalid for a line that is none."""
        for line in self.items(key):
            name, equals, value = line.text.partition("=")
            if not equals or not name or name != name.strip():
                raise ConfigInvalid(f"{line.where}: {line.text!r} is not of the form NAME=value")
            yield name, value


def key_names(text: str) -> frozenset[str]:
    """The names of keys in a text, separated by blanks."""
    return frozenset(text.split())


def first_of(key: str, *folders: Keys) -> Keys | None:
    """The first of `folders` that has the key: a chain in which nothing is merged."""
    return next((folder for folder in folders if folder.has(key)), None)


def parse_number(line: Line, *, least: int, most: int) -> int:
    """The number that the line is, as C writes one: 31, 0x1f, 037.

    Raises ConfigInvalid with file and line.
    """
    match = re.fullmatch(_NUMBER, line.text)
    if not match:
        raise ConfigInvalid(f"{line.where}: {line.text!r} is no number")
    digits = match[1]
    is_octal = digits.startswith("0") and digits.isdigit() and len(digits) > 1
    value = int(digits, 8 if is_octal else 0)
    value = -value if line.text.startswith("-") else value
    if not least <= value <= most:
        raise ConfigInvalid(f"{line.where}: {line.text} is not in the range {least} to {most}")
    return value


def _absent(path: Path, warnings: list[str]) -> Keys:
    folder = Keys.__new__(Keys)
    folder.path, folder.warnings, folder._names = path, warnings, frozenset()
    return folder


def _list(path: Path) -> list[str]:
    try:
        return [name for name in os.listdir(path) if not name.startswith(".")]  # noqa: PTH208 (names alone, no Path each)
    except FileNotFoundError:
        return []
    except NotADirectoryError as error:
        raise ConfigInvalid(f"{path}: is no directory, where a folder of keys belongs") from error
    except OSError as error:
        raise ConfigInvalid(f"{path}: cannot be listed: {error.strerror}") from error


def _read(path: Path) -> bytes:
    try:
        # O_NONBLOCK: a FIFO without a writer must not hold up the start
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigInvalid(f"{path}: cannot be read: {error.strerror}") from error
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISCHR(mode):
        os.close(fd)
        raise ConfigInvalid(f"{path}: is no file, where a value belongs")
    try:
        data = b""
        while len(data) <= _MOST_BYTES and (more := os.read(fd, _MOST_BYTES)):
            data += more
    except OSError as error:
        raise ConfigInvalid(f"{path}: cannot be read: {error.strerror}") from error
    finally:
        os.close(fd)
    if len(data) > _MOST_BYTES:
        raise ConfigInvalid(f"{path}: is longer than {_MOST_BYTES} bytes")
    if b"\0" in data:
        raise ConfigInvalid(f"{path}: holds a NUL byte, so it is no text")
    return data
