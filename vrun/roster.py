"""Which guests a command for many means, and in which order they start and stop.

    CONFDIR/web/apps/init/mark      the groups that a guest is in: lines, any of them counts
    CONFDIR/web/apps/init/depends   guests that are started before it and stopped after it
    CONFDIR/mail.conf               ONBOOT=yes is the mark `default`; PRIORITY goes before PRIORITY

See reference 3.5, 4 and 18.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Final, Literal

from vrun import names
from vrun.config_init import load_depends
from vrun.errors import ConfigInvalid, ToolError, WrongUsage
from vrun.graph import Before, Key, find_cycles
from vrun.keys import Keys
from vrun.state import find_running
from vstore.guest import Guest, confdir, list_guests
from vstore.record import dataclass, field

Word = Literal["start", "stop", "restart"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a command line says of the guests that are meant: names, or what is true of them."""

    names: tuple[str, ...] = ()
    everyone: bool = False
    marks: tuple[str, ...] = ()
    """One of these is among the guest's."""
    is_running: bool | None = None
    """It runs, it does not; None: either."""
    with_disabled: bool = False

    @property
    def is_filter(self) -> bool:
        """Whether it is more than names."""
        return self.everyone or bool(self.marks) or self.is_running is not None

    def check(self) -> None:
        """Raises WrongUsage where nothing is meant, or it is not clear what."""
        if self.is_filter and self.names:
            raise WrongUsage(
                "names of guests and --all, --mark, --running, --stopped exclude each other"
            )
        if not self.is_filter and not self.names:
            raise WrongUsage("which guests?", hint="name them, or say --all, --mark or --running")


@dataclass(frozen=True, slots=True)
class Place:
    """What a guest's configuration says of its place among others."""

    marks: tuple[str, ...] = ()
    depends: tuple[str, ...] = ()
    priority: int | None = None
    """Of an old-style guest."""
    trouble: str = ""
    """Why that cannot be read."""


_NOWHERE: Final = Place()


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps for the guests that are meant, and for those that they need."""

    chosen: tuple[str, ...]
    before: Mapping[Key, Before]
    refused: Mapping[str, str]
    """Guests for which nothing is done, with the reason."""
    warnings: tuple[str, ...] = field(default_factory=tuple)


def choose(wanted: Wanted) -> list[str]:
    """The names of the guests that are meant, each once; of names, in the order of the command.

    A guest whose marks cannot be read is meant: what is wrong is said in its turn. Raises
    WrongUsage.
    """
    wanted.check()
    if wanted.names:
        return list(dict.fromkeys(map(_name_of, wanted.names)))
    found = list_guests(include_disabled=wanted.with_disabled)
    return [guest.name for guest in found if _is_meant(guest, wanted)]


def _is_meant(guest: Guest, wanted: Wanted) -> bool:
    if wanted.is_running is not None and (find_running(guest.name) is not None) != (
        wanted.is_running
    ):
        return False
    if not wanted.marks:
        return True
    place = load_place(guest)
    return bool(place.trouble or set(place.marks) & set(wanted.marks))


def _name_of(word: str) -> str:
    """The guest's name, as far as `word` is one: if not, that is said of it in its turn."""
    try:
        return names.name_of(word)
    except ToolError:
        return word


def load_place(guest: Guest) -> Place:
    """What the guest's configuration says; an old-style file is run by a shell for that."""
    try:
        if guest.config is not None and guest.config.name == f"{guest.name}.conf":
            from vrun.config import load_spec  # 5 ms that few guests need

            init = load_spec(guest).init
            return Place(init.marks, init.depends, init.priority)
        keys = Keys(confdir() / guest.name, []) / "apps" / "init"
        return Place(tuple(line.text for line in keys.items("mark")), load_depends(keys))
    except ToolError as error:
        return Place(trouble=error.message)


# --- the order


def plan(word: Word, chosen: Sequence[str], *, by_mark: bool = False) -> Plan:
    """What is to be done, and what before what; `by_mark`: the guests were chosen by their marks.

    A start begins with what the guests need and does not run yet, down to the last. A stop ends
    with it, among those that are meant; there cycles are broken, with a warning.
    """
    return _Planner(word, tuple(chosen), by_mark=by_mark).plan()


class _Planner:
    """Knows the places of all guests that matter."""

    def __init__(self, word: Word, chosen: tuple[str, ...], *, by_mark: bool) -> None:
        self._word = word
        self._by_mark = by_mark
        self._chosen = chosen
        self._places: dict[str, Place] = {}
        self._refused: dict[str, str] = {}
        self._warnings: list[str] = []

    def plan(self) -> Plan:
        if self._word == "stop":
            self._places = {name: self._look(name) for name in self._chosen}
            if self._by_mark:  # nobody has said that such a guest is meant
                self._refuse_unreadable()
            before = self._stops(self._without_cycles())
        else:
            self._collect()
            self._refuse()
            before = self._starts()
            if self._word == "restart":
                before = self._with_stops(before)
        return Plan(self._chosen, before, self._refused, tuple(self._warnings))

    def _look(self, name: str) -> Place:
        try:
            return load_place(names.find(name))
        except ToolError:
            return _NOWHERE  # is said in its turn

    # --- start

    def _collect(self) -> None:
        """Find the places of the guests that are meant, and of what they need and does not run."""
        waiting = list(reversed(self._chosen))
        while waiting:
            name = waiting.pop()
            if name in self._places:
                continue
            self._places[name] = place = self._place_for_start(name)
            waiting += (one for one in reversed(place.depends) if not _runs(one))

    def _place_for_start(self, name: str) -> Place:
        """One that runs already needs nothing, unless it is started anew."""
        if self._word == "start" and _runs(name):
            return _NOWHERE
        return self._look(name)

    def _refuse(self) -> None:
        """Note those that cannot be started, and why."""
        self._refuse_unreadable()
        if self._word == "restart":
            self._refuse_mistaken()
        for name, place in self._places.items():
            if name not in self._chosen and not place.trouble:
                self._refuse_unfit(name)
        for cycle in find_cycles({name: one.depends for name, one in self._places.items()}):
            for name in cycle:
                self._refused.setdefault(name, f"not {self._word}ed: {show_cycle(cycle)}")
        for name, other in self._find_hopeless():
            self._refused[name] = (
                f"not {self._word}ed: it needs guest {other}, which cannot be started"
            )

    def _refuse_unreadable(self) -> None:
        for name, place in self._places.items():
            if place.trouble:
                self._refused[name] = place.trouble

    def _refuse_mistaken(self) -> None:
        """One that would be stopped, and could not be started with what its configuration says."""
        from vrun.config import load_spec

        for name in self._chosen:
            try:
                load_spec(names.find(name))
            except ConfigInvalid as error:
                self._refused[name] = error.message
            except ToolError:
                continue  # is said in its turn

    def _refuse_unfit(self, name: str) -> None:
        """One that is only needed by others."""
        try:
            guest = names.find(name)
        except ToolError as error:
            self._refused[name] = error.message
            return
        if (confdir() / guest.name / "disabled").exists():
            self._refused[name] = "is needed by others, does not run, and is disabled"

    def _find_hopeless(self) -> Iterator[tuple[str, str]]:
        """Those that need what cannot be started, however far away, each with what it needs."""
        needed_by: dict[str, list[str]] = {}
        for name, place in self._places.items():
            for other in place.depends:
                needed_by.setdefault(other, []).append(name)
        waiting = list(self._refused)
        seen = set(waiting)
        while waiting:
            other = waiting.pop()
            for name in needed_by.get(other, ()):
                if name not in seen:
                    seen.add(name)
                    waiting.append(name)
                    yield name, other

    def _starts(self) -> dict[Key, Before]:
        names_left = [name for name in self._places if name not in self._refused]
        earlier = self._before_by_priority(names_left)
        return {
            ("start", name): Before(
                frozenset(("start", other) for other in self._places[name].depends),
                frozenset(("start", other) for other in earlier.get(name, ())),
            )
            for name in names_left
        }

    def _before_by_priority(self, candidates: Iterable[str]) -> dict[str, list[str]]:
        """Of each old-style guest, those of the next lower PRIORITY."""
        classes: dict[int, list[str]] = {}
        for name in candidates:
            priority = self._places[name].priority
            if priority is not None:
                classes.setdefault(priority, []).append(name)
        ordered = [classes[priority] for priority in sorted(classes)]
        return {name: before for before, now in pairwise(ordered) for name in now}

    # --- stop and restart

    def _without_cycles(self) -> dict[str, tuple[str, ...]]:
        """What each needs of those that are meant."""
        left = self._places.keys() - self._refused.keys()
        needs = {
            name: tuple(other for other in place.depends if other in left)
            for name, place in self._places.items()
            if name in left
        }
        for cycle in find_cycles(needs):
            self._warnings.append(f"{show_cycle(cycle)}; they are stopped in any order")
            needs[cycle[-1]] = tuple(one for one in needs[cycle[-1]] if one != cycle[0])
        return needs

    def _stops(self, needs: Mapping[str, tuple[str, ...]]) -> dict[Key, Before]:
        """Each after those that need it, whether they could be stopped or not."""
        users: dict[str, set[str]] = {name: set() for name in needs}
        for name, others in needs.items():
            for other in others:
                users[other].add(name)
        for name, before in self._before_by_priority(needs).items():
            for other in before:
                users[other].add(name)
        return {
            ("stop", name): Before(after=frozenset(("stop", user) for user in users[name]))
            for name in needs
        }

    def _with_stops(self, starts: dict[Key, Before]) -> dict[Key, Before]:
        """Each of those that are meant is stopped before it is started."""
        stopped = [name for name in self._chosen if ("start", name) in starts]
        needs = {
            name: tuple(one for one in self._places[name].depends if one in stopped)
            for name in stopped
        }
        before = self._stops(needs)
        for key, one in starts.items():
            stop = ("stop", key[1])
            needed = one.needs | ({stop} if stop in before else set())
            before[key] = Before(needed, one.after)
        return before


def show_cycle(cycle: Sequence[str]) -> str:
    """`guests need each other: a needs b, b needs a`."""
    if len(cycle) == 1:
        return f"guest {cycle[0]} needs itself"
    pairs = zip(cycle, [*cycle[1:], cycle[0]], strict=True)
    return "guests need each other: " + ", ".join(f"{one} needs {other}" for one, other in pairs)


def _runs(name: str) -> bool:
    try:
        return find_running(name) is not None
    except ToolError:
        return False
