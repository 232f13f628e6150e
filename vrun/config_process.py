"""Reads what the processes of a guest are: names, priorities, personality, shell."""

import os
from typing import Final

from vrun.errors import ConfigInvalid
from vrun.keys import Keys, Line, first_of, parse_number

_UTS_BYTES: Final = 64
"""__NEW_UTS_LEN of linux/utsname.h."""

_IO_CLASSES: Final = {"none": 0, "realtime": 1, "best-effort": 2, "idle": 3}
_IO_BEST_EFFORT: Final = 2
_IO_IDLE: Final = 3
_IO_LEVEL: Final = 4

_OOM_SCORES: Final = (-1000, 1000)

_TYPES: Final = {
    "linux": 0x0,
    "linux_32bit": 0x0800000,
    "linux32": 0x0008,
    "linux32_3gb": 0x8000008,
}
"""Of linux/personality.h."""
_OLD_TYPES: Final = frozenset(
    {
        "bsd",
        "hpux",
        "irix32",
        "irix64",
        "irixn32",
        "iscr4",
        "osf4",
        "osr5",
        "riscos",
        "scosvr3",
        "solaris",
        "sunos",
        "svr3",
        "svr4",
        "uw7",
        "wysev386",
        "xenix",
    }
)
"""Of the same header; since Linux 4.1 they mean nothing."""
_FLAGS: Final = {
    "uname26": 0x0020000,
    "addr_no_randomize": 0x0040000,
    "fdpic_funcptrs": 0x0080000,
    "mmap_page_zero": 0x0100000,
    "addr_compat_layout": 0x0200000,
    "read_implies_exec": 0x0400000,
    "addr_limit_32bit": 0x0800000,
    "short_inode": 0x1000000,
    "whole_seconds": 0x2000000,
    "sticky_timeouts": 0x4000000,
    "addr_limit_3gb": 0x8000000,
}
_I386: Final = frozenset({"i386", "i486", "i586", "i686"})


def load_host_name(guest: Keys) -> str | None:
    """uts/nodename, else the obsolete `hostname`; raises ConfigInvalid with the file."""
    return _uts_name(guest, "nodename", obsolete="hostname")


def load_domain_name(guest: Keys) -> str | None:
    """uts/domainname, else the obsolete `domainname`; raises ConfigInvalid with the file."""
    return _uts_name(guest, "domainname", obsolete="domainname")


def _uts_name(guest: Keys, key: str, *, obsolete: str) -> str | None:
    line = (guest / "uts").scalar(key)
    if guest.has(obsolete):
        guest.warn(obsolete, f"is obsolete; use uts/{key}")
        line = line or guest.scalar(obsolete)
    return parse_uts_name(line) if line else None


def parse_uts_name(line: Line) -> str:
    """A host or domain name; raises ConfigInvalid with file and line."""
    if line.text.split() != [line.text] or not line.text.isprintable():
        raise ConfigInvalid(f"{line.where}: {line.text!r} is no name")
    if len(line.text.encode()) > _UTS_BYTES:
        raise ConfigInvalid(f"{line.where}: the name is longer than {_UTS_BYTES} bytes")
    return line.text


def load_ionice(guest: Keys) -> tuple[int, int] | None:
    """(class, level) of ioprio_set(2); raises ConfigInvalid with the file."""
    folder = guest / "ionice"
    line = folder.scalar("class")
    level = folder.number("priority", least=0, most=7)
    if line is None:
        return None if level is None else (_IO_BEST_EFFORT, level)
    chosen = _IO_CLASSES.get(line.text.lower())
    if chosen is None:
        chosen = parse_number(line, least=0, most=_IO_IDLE)
    if chosen in (0, _IO_IDLE):
        return chosen, 0
    return chosen, _IO_LEVEL if level is None else level


def load_oom_score(guest: Keys) -> int | None:
    """badness, brought into the range of oom_score_adj; raises ConfigInvalid with the file."""
    value = guest.number("badness", least=-(1 << 31), most=1 << 31)
    if value is None:
        return None
    least, most = _OOM_SCORES
    if not least <= value <= most:
        guest.warn("badness", f"the range is {least} to {most}; the nearest of it is taken")
    return max(least, min(most, value))


def load_shell(guest: Keys, defaults: Keys) -> tuple[str, ...] | None:
    """The command of `enter`, split as a shell does; raises ConfigInvalid with the file."""
    source = first_of("shell", guest, defaults)
    line = source.scalar("shell") if source else None
    if line is None:
        return None
    import shlex  # few guests have a shell of their own

    try:
        return tuple(shlex.split(line.text))
    except ValueError as error:
        raise ConfigInvalid(f"{line.where}: {line.text!r} is no command: {error}") from error


def load_personality(guest: Keys) -> int | None:
    """A value for personality(2): the file, else what uts/machine asks for.

    Warns of fields of uts/ that no guest can have for itself. Raises ConfigInvalid with file and
    line for a word that is unknown.
    """
    found = _personality(guest)
    uts = guest / "uts"
    for key in ("sysname", "release", "version", "machine"):
        wanted, has = uts.value(key), getattr(os.uname(), key)
        if wanted is None or wanted == has:
            continue
        if key == "machine" and wanted.lower() in _I386 and has == "x86_64":
            found = (found or 0) | _TYPES["linux32"]
        else:
            hint = "; the flag UNAME26 of personality makes a 2.6 of it" if key == "release" else ""
            uts.warn(key, f"the guest sees {has}{hint}")
    if uts.has("context"):
        uts.warn("context", "is not read; the guest is known by its name")
    return found


def _personality(guest: Keys) -> int | None:
    lines = guest.items("personality")
    if not lines:
        return None
    kind = lines[0].text.lower().removeprefix("per_")
    if kind in _OLD_TYPES:
        guest.warn("personality", f"{lines[0].text}: means nothing to this kernel")
    elif kind not in _TYPES:
        raise ConfigInvalid(
            f"{lines[0].where}: {lines[0].text!r} is no type of personality",
            hint=f"known are {' '.join(_TYPES)}; flags stand on the lines after it",
        )
    found = _TYPES.get(kind, 0)
    for line in lines[1:]:
        for word in filter(None, line.text.lower().replace(",", " ").split()):
            if word not in _FLAGS:
                raise ConfigInvalid(
                    f"{line.where}: {word!r} is no flag of a personality",
                    hint=f"known are {' '.join(_FLAGS)}",
                )
            found |= _FLAGS[word]
    return found
