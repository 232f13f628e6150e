"""Init styles: what a guest's start and stop run inside it, and what is made ready before.

sysv      rc scripts below an init of ours that reaps, and ends with the guest's last process
plain     the guest's own /sbin/init is its process 1; SIGINT asks it to stop
systemd   plain, with what systemd looks for: $container, and SIGRTMIN+3 to halt
openrc    rc scripts of OpenRC, as sysv
rescue    a command of the administrator's, as sysv

`resolve` gives what a path of the guest is without links, "" where it is nothing. See reference 10.
"""

import os
import signal
from collections.abc import Callable
from typing import Final

from vrun.errors import ConfigInvalid
from vrun.order import Rescue
from vrun.spec import GuestSpec
from vstore.record import dataclass

Resolve = Callable[[str], str]

_SYSTEMD_HALT: Final = signal.SIGRTMIN + 3  # systemd(1): starts halt.target
_RC: Final = ("/etc/rc.d/rc", "/etc/init.d/rc")
_OPENRC: Final = ("/lib/rc/sh/init-vserver.sh", "/lib/rcscripts/sh/init-vserver.sh")
_RESCUE: Final = ("/bin/sleep", "900")


@dataclass(frozen=True, slots=True)
class Program:
    """A program of the guest: its path inside, or a name to look for in PATH, and arguments."""

    argv: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    """Beside what apps/init/environment says."""


def is_pid_one(spec: GuestSpec, rescue: Rescue | None) -> bool:
    """Whether the program of start_program() is the guest's process 1."""
    return rescue.is_init if rescue else spec.init.pid_one


def start_program(
    spec: GuestSpec, rescue: Rescue | None, resolve: Resolve, *, is_traced: bool = False
) -> Program:
    """What starts the guest; `is_traced`: with a trace of the rc script of the style sysv.

    Raises ConfigInvalid where the guest has nothing of the kind.
    """
    if rescue:
        return Program(rescue.argv or _RESCUE)
    init = spec.init
    if init.cmd_start:
        return Program(init.cmd_start, _surroundings(spec, resolve))
    level = init.runlevel_start
    match init.style:
        case "plain" | "systemd":
            return Program(
                ("/sbin/init", *([level] if level else [])), _surroundings(spec, resolve)
            )
        case "openrc":
            return _openrc(spec, level or "default", resolve)
        case _:
            level = level or "3"
            trace = ("/bin/sh", "-x") if is_traced else ()
            return Program((*trace, _find_rc(spec, resolve), level), _levels("N", level))


def stop_program(spec: GuestSpec, rescue: Rescue | None, resolve: Resolve) -> Program | None:
    """What is run inside to stop the guest; None: a signal to its init."""
    if rescue:
        return None
    init = spec.init
    if init.cmd_stop:
        return Program(init.cmd_stop)
    if init.pid_one:
        return None
    if init.style == "openrc":
        return Program(("/sbin/openrc", "shutdown"), (("RUNLEVEL", "0"),))
    level = init.runlevel_stop or "6"
    return Program((_find_rc(spec, resolve), level), _levels(init.runlevel_start or "3", level))


def stop_signal(spec: GuestSpec, resolve: Resolve) -> int:
    """What asks the guest's own init to end."""
    return _SYSTEMD_HALT if is_systemd(spec, resolve) else signal.SIGINT


def is_systemd(spec: GuestSpec, resolve: Resolve) -> bool:
    """Whether the guest's process 1 is systemd, by its style or by what its /sbin/init is."""
    init = spec.init
    if init.style == "systemd":
        return True
    command = init.cmd_start[0] if init.cmd_start else "/sbin/init"
    return init.pid_one and resolve(command).endswith("/systemd")


def _surroundings(spec: GuestSpec, resolve: Resolve) -> tuple[tuple[str, str], ...]:
    # systemd(1) and others look at $container of process 1 to know that there is no hardware
    return (("container", "vserver"),) if is_systemd(spec, resolve) else ()


def _levels(previous: str, level: str) -> tuple[tuple[str, str], ...]:
    return (("PREVLEVEL", previous), ("RUNLEVEL", level))


def _find_rc(spec: GuestSpec, resolve: Resolve) -> str:
    found = next(filter(resolve, _RC), None)
    if found is None:
        raise ConfigInvalid(
            f"guest {spec.name}: has neither {_RC[0]} nor {_RC[1]}, which the init style sysv runs",
            hint="write plain or systemd into apps/init/style for a guest with an init of its own, "
            "or the command that starts it into apps/init/cmd.start",
        )
    return found


def _openrc(spec: GuestSpec, level: str, resolve: Resolve) -> Program:
    """The script of old releases, else the runlevels that OpenRC's init goes through."""
    for script in _OPENRC:
        if resolve(script):
            return Program((script, level))
    if not resolve("/sbin/openrc"):
        raise ConfigInvalid(f"guest {spec.name}: has no /sbin/openrc, which its init style runs")
    line = 'openrc sysinit && openrc boot && exec openrc "$1"'
    return Program(("/bin/sh", "-c", line, "sh", level), (("container", "vserver"),))


def find_in_path(program: str, path: str) -> str:
    """Where execvp(3) would find `program` below the root of this process; itself if nowhere."""
    if "/" in program:
        return program
    for folder in path.split(":"):
        place = os.path.join(folder, program)  # noqa: PTH118 (text that goes to execve)
        if folder.startswith("/") and os.access(place, os.X_OK):
            return place
    return f"/bin/{program}"
