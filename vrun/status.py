"""How a guest is: what `vserver NAME status` shows, for people and for programs."""

import os
import time
from typing import Any, Final

from vrun import control, fence, state
from vrun.cgroup import Group
from vrun.cow.heir import NONE, READ_ONLY, Report, load_report
from vrun.errors import ToolError
from vrun.state import Ended, find_running
from vstore.guest import COPY_ON_WRITE, Guest, RunState
from vstore.record import dataclass
from vstore.render import show_name

_TICKS: Final = os.sysconf("SC_CLK_TCK")
_DAY_S: Final = 86_400
_SHOWN: Final = {
    READ_ONLY: "read only: the supervisor is gone; restart the guest",
    "open": "not protected: the guest has the capability LINUX_IMMUTABLE",
}


@dataclass(frozen=True, slots=True)
class Status:
    """A guest at this moment."""

    guest: Guest
    running: RunState | None
    processes: int
    uptime_s: float
    has_monitor: bool
    ended: Ended | None
    """How its last run ended, if it does not run."""
    report: Report | None = None
    """Of the supervisor of its shared files, if it has one."""
    holder: fence.Holder | None = None
    """Another host that has it, if it does not run here."""

    @property
    def protection(self) -> str:
        """Which protection of its shared files is in force."""
        if self.running is None:
            return NONE
        if self.running.protection == COPY_ON_WRITE and not (self.report and self.report.is_alive):
            return READ_ONLY
        return self.running.protection


def look_at(guest: Guest) -> Status:
    """Look at the guest. Raises ConfigInvalid, FormatUnknown for a state that cannot be read."""
    running = find_running(guest.name)
    if running is None:
        ended = state.load_ended(guest.name)
        return Status(guest, None, 0, 0.0, False, ended, holder=_find_holder(guest))
    return Status(
        guest,
        running,
        len(Group(running.cgroup).pids()),
        time.clock_gettime(time.CLOCK_BOOTTIME) - running.init_start / _TICKS,
        control.is_listening(guest.name),
        None,
        load_report(guest.name) if running.protection == COPY_ON_WRITE else None,
    )


def _find_holder(guest: Guest) -> fence.Holder | None:
    try:
        return fence.find_holder(guest)
    except (ToolError, OSError):
        return None  # a start says what is wrong with it


def as_text(status: Status) -> str:
    """The lines of the original, and what it did not know."""
    name, running = status.guest.name, status.running
    if running is None:
        return f"Vserver '{name}' is {_stopped(status)}"
    lines = [
        f"Vserver '{name}' is running at context '{running.xid}'",
        f"Number of processes: {status.processes}",
        f"Uptime: {show_uptime(status.uptime_s)}",
    ]
    lines += _shared_lines(status)
    if not status.has_monitor:
        lines.append(f"Its monitor is gone; vserver {name} start gives it a new one")
    return "\n".join(lines)


def _shared_lines(status: Status) -> list[str]:
    """How its shared files are protected; nothing where it has none."""
    if status.protection == NONE:
        return []
    lines = [f"Shared files: {_SHOWN.get(status.protection, status.protection)}"]
    if status.report and status.report.attacks:
        lines.append(f"Attacks on shared files: {status.report.attacks}")
        lines += [
            f"  process {pid} ({show_name(command)}) was killed"
            for pid, command in status.report.attackers
        ]
    return lines


def as_line(status: Status) -> str:
    """One line, behind the guest's name."""
    running = status.running
    if running is None:
        return _stopped(status)
    count = "1 process" if status.processes == 1 else f"{status.processes} processes"
    monitor = "" if status.has_monitor else "; its monitor is gone"
    return f"runs, context {running.xid}, {count}, up {show_uptime(status.uptime_s)}{monitor}"


def as_json(status: Status) -> dict[str, Any]:
    """The object that `status --json` prints."""
    running, ended = status.running, status.ended
    values: dict[str, Any] = {
        "format": 1,
        "guest": status.guest.name,
        "root": os.fspath(status.guest.root),
        "running": running is not None,
    }
    if running is not None:
        values |= {
            "xid": running.xid,
            "processes": status.processes,
            "uptime_s": round(status.uptime_s, 2),
            "init_pid": running.init_pid,
            "cgroup": os.fspath(running.cgroup),
            "pool": os.fspath(running.pool) if running.pool else None,
            "protection": status.protection,
            "monitor": status.has_monitor,
        }
        if status.report is not None:
            values["supervisor"] = status.report.supervisor
            values["attacks"] = status.report.attacks
            values["attackers"] = [
                {"pid": pid, "command": command} for pid, command in status.report.attackers
            ]
    if status.holder is not None:
        values["host"] = status.holder.host
    if running is None and ended is not None:
        values["ended"] = {
            "how": ended.how,
            "status": ended.status,
            "text": ended.text,
            "at": round(ended.at, 3),
        }
    return values


def show_uptime(seconds: float) -> str:
    """`3 days, 04:05`, or `04:05`."""
    days, rest = divmod(int(seconds), _DAY_S)
    clock = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}"
    return f"{days} days, {clock}" if days else clock


def _stopped(status: Status) -> str:
    if status.holder:
        return f"stopped here; host {status.holder.host} has it since {status.holder.since}"
    return f"stopped; {_when(status.ended)}" if status.ended else "stopped"


def _when(ended: Ended) -> str:
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(ended.at))
    return f"{stamp}: {ended.text}"
