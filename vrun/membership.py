"""Which contexts there are now, and which of them a process is in.

A process is in a context as long as its v2 control group is that of the context, or one below: a
guest may make groups below its own, and cannot leave them. Names of groups, processes and hosts
that a guest chooses mean nothing here.
"""

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from vrun import state
from vrun.cgroup import BASE, Group
from vrun.errors import ToolError
from vrun.hierarchy import find_hierarchies
from vstore.guest import load_state, rundir
from vstore.record import dataclass, field

HOST: Final = 0
SPECTATOR: Final = 1
"""Sees every process; here as the host does, which sees them anyway."""
MADE_BY_HAND: Final = "by-hand"
"""A file in the run folder of a context that is no guest."""

_READ: Final = os.O_RDONLY | os.O_CLOEXEC
_MOST_OF_A_PATH: Final = 1 << 14
"""Bytes of /proc/PID/cgroup: of v2 the path has at most 4096, the lines of v1 as many each."""


@dataclass(frozen=True, slots=True)
class Member:
    """A context that runs, starts or stops."""

    xid: int
    name: str
    """Of the guest; of its run folder where it was made by hand."""
    group: Path
    """Its folder in the v2 hierarchy."""
    init_pid: int = 0
    """Its process 1, as the host numbers it; 0 where it is not known."""
    init_start: int = 0
    """When that began, in clock ticks since boot."""
    is_guest: bool = True

    @property
    def shown(self) -> str:
        """The name that a person knows it by; "" where it has none."""
        return self.name if self.is_guest else ""


@dataclass(frozen=True, slots=True)
class Contexts:
    """All contexts of one moment, but for the host's."""

    by_xid: Mapping[int, Member]
    _by_place: Mapping[str, int]
    """Place below the mount point of the v2 hierarchy, with a slash in front, to number."""
    _known: dict[str, int] = field(default_factory=dict)

    def xid_of_place(self, place: str) -> int:
        """The context of a group, as /proc/PID/cgroup has it behind `0::`."""
        found = self._known.get(place)
        if found is None:
            found = self._known[place] = self._look_up(place)
        return found

    def _look_up(self, place: str) -> int:
        """The innermost one counts: a context by hand can be inside of another."""
        while len(place) > 1:
            if place in self._by_place:
                return self._by_place[place]
            place = place.rpartition("/")[0]
        return HOST

    def xid_of(self, pid: int) -> int | None:
        """The context of a process; None where there is no such process."""
        try:
            fd = os.open(f"/proc/{pid}/cgroup", _READ)
        except (FileNotFoundError, ProcessLookupError):
            return None
        try:
            return self.xid_of_file(fd)
        except ProcessLookupError:
            return None
        finally:
            os.close(fd)

    def xid_of_file(self, fd: int) -> int:
        """The context of the process whose /proc/PID/cgroup is open; ProcessLookupError."""
        text = b""
        while block := os.read(fd, _MOST_OF_A_PATH):
            text += block
        for line in reversed(text.split(b"\n")):
            if line.startswith(b"0::"):
                return self.xid_of_place(os.fsdecode(line[3:]))
        return HOST

    def shown(self, xid: int) -> str:
        """The guest's name; "" where the number is no guest's."""
        member = self.by_xid.get(xid)
        return member.shown if member else ""

    def find(self, word: str) -> Member | None:
        """The context that has that number, or that name."""
        if word.isdecimal() and int(word) in self.by_xid:
            return self.by_xid[int(word)]
        return next((one for one in self.by_xid.values() if one.shown == word), None)


def find_contexts() -> Contexts:
    """Look at all run folders; one that cannot be read is passed over, with a warning.

    Raises NotPermitted where there is no v2 hierarchy.
    """
    v2 = find_hierarchies().v2
    members = sorted(_members(_run_names()), key=lambda member: member.xid)
    by_place = {f"/{BASE}/{SPECTATOR}": SPECTATOR}
    for member in members:
        with suppress(ValueError):  # of another hierarchy than the one mounted now
            by_place[f"/{member.group.relative_to(v2)}"] = member.xid
    return Contexts({member.xid: member for member in members}, by_place)


def _run_names() -> list[str]:
    try:
        with os.scandir(rundir()) as entries:
            return [entry.name for entry in entries if not entry.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _members(names: Iterable[str]) -> Iterable[Member]:
    for name in names:
        try:
            member = _load(name)
        except ToolError as error:
            import logging  # 4 ms that only this warning needs

            logging.getLogger(__name__).warning("%s; its context is left out", error.message)
            continue
        if member is not None:
            yield member


def _load(name: str) -> Member | None:
    """What is known of one; of a guest that starts or stops only what it has made."""
    is_guest = not (rundir() / name / MADE_BY_HAND).exists()
    running = load_state(name)
    if running is not None:
        group, init = running.cgroup, (running.init_pid, running.init_start)
        return Member(running.xid, name, group, *init, is_guest=is_guest)
    made = state.load_resources(name)
    if made is None or not made.cgroup:
        return None
    return Member(made.xid, name, Group.from_record(made.cgroup).path, is_guest=is_guest)
