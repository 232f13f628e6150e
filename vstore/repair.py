"""Put right what `verify` found: freeze again, or take out of use and give the guests good content.

A damaged object goes to quarantine. Its names become links to another object that is the same in
all, where their guest has no link to that one yet; else to a new one, made from any good copy:
another object, or a file of any guest. What cannot be restored stays as it is, and is named.
"""

import os
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, Final

from vstore import inode
from vstore.folders import Folder, join
from vstore.guest import Guest
from vstore.hold import Held
from vstore.mender import CHANGED, RESTORED, Mender, opened
from vstore.pool import Identity, Pool, parse_object
from vstore.progress import SILENT, Progress
from vstore.quarantine import former_name
from vstore.undo import guarded_worker
from vstore.verify import Fault, GuestFile, walk_guests
from vstore.workers import Crew

_LIKELY_AT_MOST: Final = 100
_OTHERS_AT_MOST: Final = 1000


@dataclass(slots=True)
class _Family:
    """The good objects of one identity, and which of them each guest has links to."""

    objects: dict[int, str]  # inode number -> name below `objects`
    used: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))

    def find_free(self, guest: str) -> int:
        """The number of an object that the guest has no link to; 0 where there is none."""
        return next((number for number in self.objects if number not in self.used[guest]), 0)


@dataclass(slots=True)
class _Search:
    """What a walk through the guests found for one damaged inode."""

    identity: Identity
    family: _Family
    uses: dict[tuple[str, bytes], list[bytes]] = field(default_factory=lambda: defaultdict(list))
    likely: list[tuple[str, bytes, bytes]] = field(default_factory=list)  # guest, folder, name
    others: list[tuple[str, bytes, bytes]] = field(default_factory=list)  # equal in size alone


def repair(
    pool: Pool,
    faults: Sequence[Fault],
    guests: Sequence[Guest],
    held: Sequence[Held],
    progress: Progress = SILENT,
) -> None:
    """Put right the faults, each of which says afterwards what became of it.

    Good copies are looked for in all `guests`; names are replaced in those that are `held`. Raises
    PoolBusy, NoSpace.
    """
    by_name = {item.guest.name: item for item in held}
    with ExitStack() as stack:
        stack.enter_context(pool.exclude())
        roots = {
            guest.name: stack.enter_context(opened(os.open(guest.root, inode.OPEN_FOLDER)))
            for guest in guests
        }
        crew = stack.enter_context(guarded_worker(pool, Mender))
        progress.phase("repair", len(faults), "objects")
        for fault in faults:
            _settle(crew, fault)
        broken = [fault for fault in faults if not fault.is_repaired and _identity(fault.path)]
        searches = _search(pool, guests, broken) if broken else {}
        for fault in broken:
            _Restorer(crew, pool, fault, searches[fault.ino], roots).restore(by_name)
            fault.links = os.stat(fault.path, dir_fd=pool.fd).st_nlink - 1
            fault.is_repaired = not fault.links
        progress.advance(len(faults))


def _ask(crew: Crew, *job: Any) -> Any:
    """The one answer to one job."""
    (answer,) = (answer for _, answer in crew.map([(job, None)]))
    return answer


def _settle(crew: Crew, fault: Fault) -> None:
    fault.path, fault.outcome, is_good = _ask(crew, "settle", fault.path)
    fault.is_repaired = is_good or (fault.path.startswith("quarantine/") and not fault.links)


def _identity(path: str) -> Identity | None:
    """What an inode in quarantine was; None for what is not there, or never was an object."""
    with suppress(ValueError):
        if path.startswith("quarantine/"):
            return parse_object(former_name(path).rpartition("/")[2])[0]
    return None


def _search(pool: Pool, guests: Sequence[Guest], broken: Sequence[Fault]) -> dict[int, _Search]:
    """Look in all guests, once, for names of the damaged inodes and for copies of their content."""
    searches = _begin_searches(pool, broken)
    by_size: dict[int, list[_Search]] = defaultdict(list)
    families: dict[int, _Family] = {}
    for search in searches.values():
        by_size[search.identity.size].append(search)
        families |= dict.fromkeys(search.family.objects, search.family)
    objects = pool.load_numbers()
    for guest, folder in walk_guests(guests, pool):
        for entry in folder.entries:
            number = entry.inode()
            if number in searches:
                name = os.fsencode(entry.name)
                searches[number].uses[guest.name, folder.path].append(name)
            elif number in families:
                families[number].used[guest.name].add(number)
            elif number not in objects and entry.is_file(follow_symlinks=False):
                _note_candidate(by_size, guest, folder, entry)
    return searches


def _begin_searches(pool: Pool, broken: Sequence[Fault]) -> dict[int, _Search]:
    searches: dict[int, _Search] = {}
    families: dict[Identity, _Family] = {}
    for fault in broken:
        identity = _identity(fault.path)
        if identity is not None:
            if identity not in families:
                families[identity] = _Family(_list_same(pool, identity))
            searches[fault.ino] = _Search(identity, families[identity])
    return searches


def _list_same(pool: Pool, identity: Identity) -> dict[int, str]:
    """The objects of this identity by inode number."""
    folder, _, name = identity.name(0).partition("/")
    stem = name.removesuffix("0")
    found = (entry for entry in pool.scan_folder(folder) if entry.name.startswith(stem))
    return {entry.inode(): f"{folder}/{entry.name}" for entry in found}


def _note_candidate(
    by_size: dict[int, list[_Search]], guest: Guest, folder: Folder, entry: os.DirEntry[str]
) -> None:
    try:
        status = entry.stat(follow_symlinks=False)
    except OSError:
        return
    for search in by_size.get(status.st_size, ()):
        found, most = search.others, _OTHERS_AT_MOST
        if _looks_alike(status, search.identity):
            found, most = search.likely, _LIKELY_AT_MOST
        if len(found) < most:
            found.append((guest.name, folder.path, os.fsencode(entry.name)))


def _looks_alike(status: os.stat_result, identity: Identity) -> bool:
    return (status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns) == (
        identity.mode,
        identity.uid,
        identity.gid,
        identity.mtime_ns,
    )


class _Restorer:
    """Gives every name of one damaged inode good content."""

    def __init__(
        self, crew: Crew, pool: Pool, fault: Fault, search: _Search, roots: dict[str, int]
    ) -> None:
        self._crew = crew
        self._pool = pool
        self._fault = fault
        self._search = search
        self._roots = roots
        self._chosen: dict[str, str] = {}  # guest -> the good object for it; empty: none
        self._can_rebuild = True

    def restore(self, held: dict[str, Held]) -> None:
        """Replace the names in the guests that are held; say in the fault what became of each."""
        fault = self._fault
        fault.names.clear()
        restored = 0
        for (guest, folder), names in self._search.uses.items():
            outcomes = self._replace(held.get(guest), guest, folder, names)
            for name, outcome in zip(names, outcomes, strict=True):
                file = GuestFile(guest, join(folder, name))
                fault.names.append(file)
                if outcome in (RESTORED, CHANGED):
                    restored += outcome == RESTORED
                else:
                    fault.left.append((file, outcome))
        fault.outcome = f"put in quarantine; names that have good content again: {restored}"

    def _replace(
        self, held: Held | None, guest: str, folder: bytes, names: list[bytes]
    ) -> list[str]:
        if held is None:
            return ["the guest could not be held"] * len(names)
        if guest not in self._chosen:
            self._chosen[guest] = self._choose(guest)
        good = self._chosen[guest]
        if not good:
            return ["no good copy was found"] * len(names)
        job = (self._fault.path, good, held.fd, folder, names, held.cgroup)
        outcomes: list[str] = _ask(self._crew, "replace", *job)
        return outcomes

    def _choose(self, guest: str) -> str:
        """A good object that the guest has no link to, since equal files of it never share one."""
        family = self._search.family
        number = family.find_free(guest)
        if not number and self._can_rebuild:
            number = self._rebuild()
        family.used[guest].add(number)
        return family.objects[number] if number else ""

    def _rebuild(self) -> int:
        """Make a good object from any copy; returns its inode number, 0 where there is no copy."""
        search = self._search
        files = (*search.likely, *search.others)
        copies = [(self._roots[guest], *place) for guest, *place in files]
        name: str = _ask(self._crew, "rebuild", self._fault.path, copies)
        if not name:
            self._can_rebuild = False
            return 0
        number = os.stat(name, dir_fd=self._pool.objects_fd).st_ino
        search.family.objects[number] = name
        return number
