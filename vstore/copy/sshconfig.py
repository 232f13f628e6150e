"""OpenSSH's client configuration as one text, for one host: what `Include` names stands in it.

paramiko reads everything else, but knows no `Include`. A file that is included inside a `Host`
block counts only where that block matches, and after it the block goes on; see ssh_config(5).
"""

import logging
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from vstore.errors import ConfigInvalid

log = logging.getLogger(__name__)

SYSTEM: Final = Path("/etc/ssh/ssh_config")
_DEEPEST: Final = 16
_LINE: Final = re.compile(r"\s*(\w+)(?:\s*=\s*|\s+)(.*?)\s*$")
_EVERYBODY: Final = "Host *"


def user_folder() -> Path:
    return Path("~").expanduser() / ".ssh"


def load_text(host: str, file: Path | None) -> str:
    """The configuration for `host`: of `file` alone, else the user's, then the system's.

    Raises ConfigInvalid for a file that was named and cannot be read, or that includes itself.
    """
    if file is not None:
        if not file.exists():
            raise ConfigInvalid(f"{file}: no such file")
        return "\n".join(_expand(file, host, user_folder(), 0))
    lines = list(_expand(user_folder() / "config", host, user_folder(), 0))
    lines.append(_EVERYBODY)  # what follows belongs to no block of the first file
    lines += _expand(SYSTEM, host, SYSTEM.parent, 0)
    return "\n".join(lines)


def _expand(path: Path, host: str, folder: Path, depth: int) -> Iterator[str]:
    if depth > _DEEPEST:
        raise ConfigInvalid(f"{path}: is included more than {_DEEPEST} files deep, or by itself")
    try:
        text = path.read_text(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise ConfigInvalid(f"{path}: cannot be read: {error.strerror}") from error
    block = ""
    for line in text.splitlines():
        found = _LINE.fullmatch(line)
        key = found[1].lower() if found and not line.lstrip().startswith("#") else ""
        if key in ("host", "match"):
            block = line
        if key != "include" or found is None:
            yield line
        elif _applies(block, host, path):
            for included in _included(found[2], folder):
                yield from _expand(included, host, folder, depth + 1)
                yield block or _EVERYBODY


def _included(value: str, folder: Path) -> Iterator[Path]:
    try:
        patterns = shlex.split(value)
    except ValueError as error:
        raise ConfigInvalid(f"Include {value}: {error}") from error
    for pattern in patterns:
        path = Path(os.path.expandvars(pattern)).expanduser()
        if not path.is_absolute():
            path = folder / path
        above = Path(path.anchor)
        yield from sorted(above.glob(os.fspath(path.relative_to(above))))


def _applies(block: str, host: str, path: Path) -> bool:
    """Whether the block in which an Include stands is one for this host."""
    found = _LINE.fullmatch(block)
    if found is None:
        return True
    if found[1].lower() == "match":
        if found[2].strip().lower() == "all":
            return True
        log.warning("%s: an Include inside a Match block is left out", path)
        return False
    return matches(found[2].split(), host)


def matches(patterns: list[str], host: str) -> bool:
    """Whether a list of OpenSSH's patterns is for this host: one matches, and none behind a `!`.

    Only `*` and `?` are special: the brackets of `[host]:port` are not.
    """
    found = False
    for pattern in patterns:
        is_negated = pattern.startswith("!")
        words = (
            ".*" if letter == "*" else "." if letter == "?" else re.escape(letter)
            for letter in pattern.removeprefix("!").strip('"')
        )
        if re.fullmatch("".join(words), host):
            if is_negated:
                return False
            found = True
    return found
