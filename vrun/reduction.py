"""Which capabilities a command by hand is left with: --secure, --cap C and --cap '!C'."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from vrun import capabilities
from vrun.errors import ConfigInvalid, NotPermitted, WrongUsage
from vrun.keys import Line
from vrun.wordlist import CAPABILITIES, SECURE_CAPS, Table, read_words

_SETS: Final = {"CapBnd": "ceiling", "CapPrm": "permitted", "CapEff": "effective"}


def choose(words: Iterable[str], *, secure: bool) -> frozenset[str]:
    """The names of what is kept: of all, or where it is `secure` of what a guest has, less and with
    what `words` say, from left to right. Raises WrongUsage for a word that is none.
    """
    base = SECURE_CAPS if secure else frozenset(capabilities.NUMBERS)
    start = frozenset(name.lower() for name in base)
    chosen = parse(CAPABILITIES, words, option="--cap", default=start)
    return frozenset(name.upper() for name in chosen)


def parse(
    table: Table, words: Iterable[str], *, option: str, default: frozenset[str] = frozenset()
) -> frozenset[str]:
    """The words of an option, as a line of a guest's file has them. Raises WrongUsage."""
    try:
        return read_words(table, [Line(option, word) for word in words], default).words
    except ConfigInvalid as error:
        raise WrongUsage(error.message, hint=error.hint) from None


def reduce(kept: frozenset[str]) -> None:
    """Give up all others, for good, in this process and what it will execute.

    Raises NotPermitted without CAP_SETPCAP.
    """
    try:
        capabilities.limit(kept)
    except PermissionError as error:
        raise NotPermitted(
            f"cannot give up capabilities: {error.strerror}", hint="CAP_SETPCAP is needed"
        ) from error


def show(pid: int | None) -> list[str]:
    """The capability sets of a process, a line each; None is this one. Raises OSError."""
    text = Path(f"/proc/{pid or os.getpid()}/status").read_text(errors="surrogateescape")
    lines = []
    for line in text.splitlines():
        key, _, bits = line.partition(":")
        if key in _SETS:
            lines.append(f"{_SETS[key] + ':':<11} {_names(int(bits, 16))}")
    return sorted(lines)


def _names(bits: int) -> str:
    known = {number: name for name, number in capabilities.NUMBERS.items()}
    every = int(Path("/proc/sys/kernel/cap_last_cap").read_text()) + 1
    numbers = [number for number in range(64) if bits >> number & 1]
    if len(numbers) >= every:
        return "all"
    return " ".join(known.get(number, f"^{number}") for number in numbers) or "none"
