"""Reads the limits of a guest: ulimits/, rlimits/ and dlimits/."""

import re
import resource
from pathlib import Path
from typing import Final, NamedTuple

from vrun.errors import ConfigInvalid
from vrun.keys import Keys, Line, parse_number
from vrun.spec import ContextLimits, DiskLimit, Rlimit
from vstore.record import replace

INFINITE: Final = resource.RLIM_INFINITY

ULIMITS: Final = {
    "as": resource.RLIMIT_AS,
    "core": resource.RLIMIT_CORE,
    "cpu": resource.RLIMIT_CPU,
    "data": resource.RLIMIT_DATA,
    "fsize": resource.RLIMIT_FSIZE,
    "memlock": resource.RLIMIT_MEMLOCK,
    "msgqueue": resource.RLIMIT_MSGQUEUE,
    "nice": resource.RLIMIT_NICE,
    "nofile": resource.RLIMIT_NOFILE,
    "nproc": resource.RLIMIT_NPROC,
    "rtprio": resource.RLIMIT_RTPRIO,
    "sigpending": resource.RLIMIT_SIGPENDING,
    "stack": resource.RLIMIT_STACK,
}
"""Names of files in ulimits/; as, msgqueue, nice, rtprio and sigpending are ours."""

_DEAD_ULIMITS: Final = {
    "locks": "the kernel no longer limits locks",
    "rss": "the kernel does not limit the memory of one process; rlimits/rss limits the guest's",
}
CONTEXT_ONLY: Final = {
    "as": "address space has no total; rlimits/rss limits the guest's memory",
    "anon": "memory is limited as a whole; use rlimits/rss",
    "shmem": "memory is limited as a whole; use rlimits/rss",
    "memlock": "locked memory has no total for a guest; ulimits/memlock limits each process",
    "nofile": "open files have no total for a guest; ulimits/nofile limits each process",
    "openfd": "open files have no total for a guest; ulimits/nofile limits each process",
    "nsock": "sockets have no total for a guest; ulimits/nofile limits each process",
    "locks": "file locks have no limit",
    "msgqueue": "message queues have no total for a guest; ulimits/msgqueue limits each user",
    "nsems": "semaphores have no limit of their own; use sysctl/ with kernel.sem",
    "semary": "semaphores have no limit of their own; use sysctl/ with kernel.sem",
    "dentry": "names in the kernel's cache have no limit of their own; rlimits/rss counts them",
    "cpu": "cpu time has no total for a guest; ulimits/cpu limits each process",
    "fsize": "is a limit of each process; use ulimits/fsize",
    "data": "is a limit of each process; use ulimits/data",
    "stack": "is a limit of each process; use ulimits/stack",
    "core": "is a limit of each process; use ulimits/core",
}
"""Totals of the original that no guest has here, and what there is instead."""
_CONTEXT: Final = frozenset({"rss", "nproc", *CONTEXT_ONLY})

_LIMIT: Final = r"(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)([kKmM]?)"
_UNITS: Final = {"": 1, "k": 1000, "m": 1000**2, "K": 1024, "M": 1024**2}
_PAGE: Final = 4096
"""What rlimits/ counts memory in."""
_MOST: Final = (1 << 63) - 1


class _Limit(NamedTuple):
    """The values of a resource; each is None where no file gives it."""

    low: int | None
    soft: int | None
    hard: int | None


def parse_limit(line: Line) -> int:
    """The limit that the line is: `inf...`, or a number with k, m (1000) or K, M (1024).

    RLIM_INFINITY is no limit. Raises ConfigInvalid with file and line.
    """
    if line.text.startswith("inf"):
        return INFINITE
    match = re.fullmatch(_LIMIT, line.text)
    if not match:
        raise ConfigInvalid(
            f"{line.where}: {line.text!r} is no limit",
            hint="write inf, or a number that k or m (1000), K or M (1024) may follow",
        )
    number = parse_number(Line(line.where, match[1]), least=0, most=_MOST) * _UNITS[match[2]]
    return min(number, _MOST)


def load_rlimits(guest: Keys, *, is_per_context: bool) -> tuple[tuple[Rlimit, ...], int | None]:
    """The limits of each process (ulimits/), and how many processes the whole guest may have.

    With flag `nproc` (`is_per_context`) ulimits/nproc counts the guest's processes, else those of
    each of its users. Raises ConfigInvalid with the file.
    """
    folder = guest / "ulimits"
    found, processes = [], None
    for name in _resources(folder, frozenset(ULIMITS) | frozenset(_DEAD_ULIMITS)):
        limit = _limit(folder, name)
        if name in _DEAD_ULIMITS:
            folder.warn(name, _DEAD_ULIMITS[name])
        elif name == "nproc" and is_per_context:
            processes = limit.soft if limit.hard is None else limit.hard
        else:
            found.append(Rlimit(ULIMITS[name], name, _clamped(limit), limit.hard))
            if name == "nproc":
                folder.warn(
                    name,
                    "counts a user's processes on the whole machine; with cflags "
                    "nproc those of the guest",
                )
    return tuple(found), None if processes == INFINITE else processes


def _clamped(limit: _Limit) -> int | None:
    """The soft limit, which is never above the hard one."""
    if limit.soft is None or limit.hard in (None, INFINITE):
        return limit.soft
    return limit.hard if limit.soft == INFINITE else min(limit.soft, limit.hard or 0)


def load_context_limits(guest: Keys, *, processes: int | None) -> ContextLimits:
    """What the guest as a whole may use (rlimits/); `processes` is the bound from ulimits/.

    Raises ConfigInvalid with the file.
    """
    folder = guest / "rlimits"
    limits = ContextLimits(pids_max=processes)
    for name in _resources(folder, _CONTEXT):
        limit = _limit(folder, name)
        if name == "rss":
            limits = _with_memory(limits, limit, has_low=folder.has("rss.min"))
        elif name == "nproc":
            limits = replace(limits, pids_max=_least(processes, _finite(limit.hard)))
        elif any(_finite(value) is not None for value in limit):
            folder.warn(name, CONTEXT_ONLY[name])
    return limits


def _with_memory(limits: ContextLimits, limit: _Limit, *, has_low: bool) -> ContextLimits:
    hard, soft = _bytes(limit.hard), _bytes(limit.soft)
    return replace(
        limits,
        memory_max=hard,
        memory_high=soft if soft is not None and (hard is None or soft < hard) else None,
        memory_low=_bytes(limit.low) if has_low else None,
    )


def _bytes(pages: int | None) -> int | None:
    finite = _finite(pages)
    return None if finite is None else finite * _PAGE


def _finite(value: int | None) -> int | None:
    return None if value == INFINITE else value


def _least(*values: int | None) -> int | None:
    return min((value for value in values if value is not None), default=None)


def _resources(folder: Keys, known: frozenset[str]) -> list[str]:
    """The resources that files of the folder are about; others are warned of."""
    found = set()
    for file in folder.files():
        name, _, kind = file.partition(".")
        if name in known and kind in ("", "min", "soft", "hard"):
            found.add(name)
        else:
            folder.warn(file, "is no limit that is known; it is not read")
    return sorted(found)


def _limit(folder: Keys, name: str) -> _Limit:
    """RES sets all, RES.min, RES.soft and RES.hard one each."""
    values = []
    for key in (name, f"{name}.min", f"{name}.soft", f"{name}.hard"):
        line = folder.scalar(key)
        values.append(parse_limit(line) if line else None)
    every, *single = values
    return _Limit(*(every if value is None else value for value in single))


# --- dlimits/


def load_disk_limits(guest: Keys, *, is_static: bool) -> tuple[DiskLimit, ...]:
    """The complete entries of dlimits/; with a dynamic xid there are none.

    Raises ConfigInvalid with the file.
    """
    folder = guest / "dlimits"
    entries = [entry for entry in folder.entries() if not (folder / entry).has("disabled")]
    if entries and not is_static:
        guest.warn("dlimits", "needs a file `context`: without a number of its own nothing counts")
        return ()
    return tuple(filter(None, (_disk_limit(folder / entry, entry) for entry in entries)))


def _disk_limit(keys: Keys, entry: str) -> DiskLimit | None:
    directory = keys.scalar("directory")
    space = keys.number("space_total", least=-1, most=_MOST >> 10)
    inodes = keys.number("inodes_total", least=-1, most=_MOST)
    reserved = keys.number("reserved", least=0, most=100)
    if directory is None or space is None or inodes is None or reserved is None:
        missing = [
            key
            for key in ("directory", "space_total", "inodes_total", "reserved")
            if keys.value(key) is None
        ]
        keys.warn(missing[0], "is missing, so the disk limit is not set")
        return None
    if not directory.text.startswith("/"):
        raise ConfigInvalid(f"{directory.where}: {directory.text!r} is no absolute path")
    return DiskLimit(
        entry,
        Path(directory.text),
        space_total=None if space < 0 else space << 10,
        inodes_total=None if inodes < 0 else inodes,
        reserved_percent=reserved,
        where=directory.where.rpartition("/")[0],
    )
