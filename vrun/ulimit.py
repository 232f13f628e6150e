"""ULIMIT of an old-style guest: arguments of the shell's `ulimit`, such as `-HS -u 1000`."""

import shlex
from collections.abc import Iterator
from typing import Final

from vrun.config_limits import INFINITE, ULIMITS
from vrun.errors import ConfigInvalid
from vrun.keys import Line, parse_number
from vrun.spec import Rlimit

_LETTERS: Final = {
    "c": ("core", 512),
    "d": ("data", 1024),
    "f": ("fsize", 512),
    "l": ("memlock", 1024),
    "n": ("nofile", 1),
    "s": ("stack", 1024),
    "t": ("cpu", 1),
    "u": ("nproc", 1),
    "v": ("as", 1024),
}
"""Resource, and how many of its units one is; those of bash as sh."""
_DEAD: Final = frozenset("mpwx")
"""Resources that the kernel does not limit."""
_MOST: Final = 1 << 50


def parse_ulimit(line: Line, warnings: list[str]) -> Iterator[Rlimit]:
    """The limits that the arguments set; raises ConfigInvalid with the file and variable."""
    try:
        words = shlex.split(line.text)
    except ValueError as error:
        raise ConfigInvalid(f"{line.where}: {line.text!r} cannot be split: {error}") from error
    is_soft = is_hard = False
    letter = "f"
    for word in words:
        if not word.startswith("-"):
            if letter in _DEAD:
                warnings.append(f"{line.where}: -{letter}: the kernel does not limit it")
            else:
                yield _limit(Line(line.where, word), letter, soft=is_soft, hard=is_hard)
            continue
        for option in word[1:]:
            if option in _LETTERS or option in _DEAD:
                letter = option
            elif option not in "HS":
                raise ConfigInvalid(f"{line.where}: -{option} is no option of ulimit that is known")
            is_soft, is_hard = is_soft or option == "S", is_hard or option == "H"


def _limit(line: Line, letter: str, *, soft: bool, hard: bool) -> Rlimit:
    name, unit = _LETTERS[letter]
    is_endless = line.text == "unlimited"
    value = INFINITE if is_endless else parse_number(line, least=0, most=_MOST) * unit
    both = soft == hard
    return Rlimit(
        ULIMITS[name],
        name,
        soft=value if soft or both else None,
        hard=value if hard or both else None,
    )
