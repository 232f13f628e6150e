"""What each context comes to, the host's included: the rows of vserver-stat and vtop."""

import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from vrun.membership import HOST, SPECTATOR, Contexts
from vrun.procs import TICKS, Process
from vstore.record import dataclass

ROOT_SERVER: Final = "root server"
MONITORING_SERVER: Final = "monitoring server"
_MS: Final = 1000
_US_OF_MS: Final = 1000
_SUFFIXES: Final = " KMGT"
_FAR: Final = "+"
_WIDEST_TIME: Final = 9
HEADER: Final = "CTX   PROC    VSZ    RSS  userTIME   sysTIME    UPTIME NAME"
_WIDEST_NAME: Final = 20


@dataclass(frozen=True, slots=True)
class Row:
    """The sums of one context. What its processes share is counted for each of them."""

    xid: int
    name: str
    """"" for a context that is no guest."""
    processes: int
    threads: int
    virtual: int
    """Bytes, as the next."""
    resident: int
    user_ms: int
    """Of cpu time, of processes that have ended too; as the next."""
    system_ms: int
    uptime_ms: int
    """A context's age, the host's time since boot."""


def sum_up(processes: Iterable[Process], contexts: Contexts) -> list[Row]:
    """A row for the host and for each context, by number; the cpu time of a guest as its group
    counted it, of the host as its processes did, with what they have waited for.
    """
    members: dict[int, list[Process]] = defaultdict(list)
    for process in processes:
        members[process.xid].append(process)
    numbers = sorted({HOST, *members, *contexts.by_xid})
    return [_sum(xid, members[xid], contexts) for xid in numbers]


def _sum(xid: int, processes: list[Process], contexts: Contexts) -> Row:
    user = sum(one.user + one.reaped_user for one in processes) * _MS // TICKS
    system = sum(one.system + one.reaped_system for one in processes) * _MS // TICKS
    member = contexts.by_xid.get(xid)
    if member is not None:
        user, system = _counted(member.group) or (user, system)
    began = [one.start for one in processes]
    if member is not None and member.init_start:
        began = [member.init_start]
    return Row(
        xid=xid,
        name=_name_of(xid, contexts),
        processes=len(processes),
        threads=sum(one.threads for one in processes),
        virtual=sum(one.virtual for one in processes),
        resident=sum(one.resident for one in processes),
        user_ms=user,
        system_ms=system,
        uptime_ms=_age_ms(0 if xid == HOST else min(began)) if began else 0,
    )


def _name_of(xid: int, contexts: Contexts) -> str:
    return {HOST: ROOT_SERVER, SPECTATOR: MONITORING_SERVER}.get(xid) or contexts.shown(xid)


def _age_ms(start_ticks: int) -> int:
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    return max(0, int(now * _MS) - start_ticks * _MS // TICKS)


def _counted(group: Path) -> tuple[int, int] | None:
    """Milliseconds of cpu time that ever were used in the group; None where it is gone."""
    with suppress(OSError, KeyError, ValueError):
        pairs = (line.split() for line in (group / "cpu.stat").read_text().splitlines())
        values = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
        return values["user_usec"] // _US_OF_MS, values["system_usec"] // _US_OF_MS
    return None


# --- as vserver-stat writes them


def show_row(row: Row, *, is_legacy: bool = False) -> str:
    """The row in the columns of HEADER; the name of an old-style guest stands in brackets."""
    name = f"[{row.name[: _WIDEST_NAME - 2]}]" if is_legacy else row.name[:_WIDEST_NAME]
    sizes = f"{show_bytes(row.virtual):>7}{show_bytes(row.resident):>7}"
    times = "".join(f"{show_ms(ms):>10}" for ms in (row.user_ms, row.system_ms, row.uptime_ms))
    return f"{row.xid:<5}{row.processes:>5}{sizes}{times} {name}".rstrip()


def show_bytes(value: int) -> str:
    """`999 `, `0.9K`, `976.5M`: 1000 of a unit are the next one, which has 1024 of them."""
    power = rest = 0
    while value >= 1000:
        value, rest = divmod(value, 1024)
        power += 1
    tenth = 10 * rest // 1024
    suffix = _SUFFIXES[power] if power < len(_SUFFIXES) else _FAR
    return f"{value}.{tenth}{suffix}" if tenth else f"{value}{suffix}"


def show_ms(milliseconds: int) -> str:
    """`1m01s23`, `1h02m05`, `1d01h01`; from 1000 days on `2y27d05`, where the day of the year has
    lost all but its first two digits, as in the original. Below an hour the last two digits are
    hundredths of a second.
    """
    seconds, rest = divmod(milliseconds, _MS)
    minutes, second = divmod(seconds, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days >= 1000:
        years, day = divmod(days, 365)
        shown = f"{years}y{f'{day:02d}'[:2]}d{hour:02d}"
    elif days:
        shown = f"{days}d{hour:02d}h{minute:02d}"
    elif hours:
        shown = f"{hours}h{minute:02d}m{second:02d}"
    else:
        shown = f"{minutes}m{second:02d}s{rest // 10:02d}"
    return shown if milliseconds >= 0 and len(shown) <= _WIDEST_TIME else "INVALID"


def as_json(row: Row) -> dict[str, Any]:
    """The object that `vserver-stat --json` prints."""
    return {
        "format": 1,
        "xid": row.xid,
        "name": row.name,
        "processes": row.processes,
        "threads": row.threads,
        "vsz": row.virtual,
        "rss": row.resident,
        "user_ms": row.user_ms,
        "system_ms": row.system_ms,
        "uptime_ms": row.uptime_ms,
    }
