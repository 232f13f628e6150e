"""vservers: start, stop and look at many guests with one command.

`vservers COMMAND [--all | --mark M | NAME...] [-j N]`. One guest's trouble stops no others but
those that need it: it is shown where it happens, and counted at the end. Which guests are meant,
and in which order they come, is decided in roster.py.
"""

import gc
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, Literal, NoReturn

from vrun import crowd, lifecycle, names, roster, state, status
from vrun.commands import plain
from vrun.commands.headway import Headway
from vrun.commands.plain import say, show, show_failure
from vrun.control import Outcome
from vrun.crowd import Crowd, Result
from vrun.graph import Before
from vrun.lifecycle import Hearer
from vrun.order import Order
from vrun.roster import Plan, Wanted, Word
from vrun.state import find_running
from vstore.record import dataclass, replace
from vstore.streams import fill_standard

BulkWord = Word | Literal["status"]

PROGRAM: Final = "vservers"
EXIT_ALL: Final = 1
"""Every guest failed, or nothing was done at all: wrong usage, no such command."""
EXIT_SOME: Final = 2
"""Some guests failed, others did not."""
_STOPPED: Final = 3
_FEWEST_JOBS: Final = 6
_ORDER: Final = Order(sync=True)
"""As with the original's start of many: cmd.start-sync is waited for."""


@dataclass(frozen=True, slots=True)
class Command:
    """One of the words of the command line."""

    done: str
    """What the summary says of a guest of which it is true, ..."""
    failed: str = "failed"
    """... and of another."""


def main() -> NoReturn:
    """The console script."""
    gc.disable()  # as for vserver
    fill_standard()
    words = sys.argv[1:]
    code = plain.run(lambda: _run(words), name=PROGRAM)
    sys.stdout.flush()
    os._exit(code)  # taking the interpreter apart takes 5 ms


def _run(words: Sequence[str]) -> int:
    """Parse the command line; what has no options but --all is done without click."""
    first, *rest = words or [""]
    word = find_command(first)
    if word is None or any(one.startswith("-") and one != "--all" for one in rest):
        from vrun.commands import bulkoptions

        return bulkoptions.main(words)
    guests = tuple(one for one in rest if one != "--all")
    return carry_out(word, Wanted(guests, everyone=len(guests) < len(rest)))


def find_command(text: str) -> BulkWord | None:
    """The one of COMMANDS that the text is."""
    return next((word for word in COMMANDS if word == text), None)


def carry_out(word: BulkWord, wanted: Wanted, *, jobs: int = 0, as_json: bool = False) -> int:
    """Carry out one of COMMANDS; the exit code. `jobs`: so many guests at a time, 0: as fits.

    Raises WrongUsage where no guest is named.
    """
    plan = _plan(word, wanted)
    if word in ("start", "restart"):
        from vrun import chbind, monitor  # noqa: F401 (once, for all processes)
    headway = Headway(len({name for _, name in plan.before} | plan.refused.keys()))
    tally = Counter[bool]()
    for warning in plan.warnings:
        show(warning, start=PROGRAM)
    results: Iterable[Result] = _results(word, plan, jobs, headway, as_json=as_json)
    if word == "status":
        results = sorted(results, key=lambda result: plan.chosen.index(result.name))
    for result in results:
        tally[result.outcome.code == 0] += 1
        headway.count()
        headway.clear()
        _show(result, as_json=as_json)
    if tally.total() != 1 and not as_json:
        say(_summary(COMMANDS[word], tally))
    return _code(tally)


def _plan(word: BulkWord, wanted: Wanted) -> Plan:
    """Which guests are meant, and what before what. Raises WrongUsage."""
    if word == "status" and not wanted.names and not wanted.is_filter:
        wanted = replace(wanted, everyone=True)
    if wanted.is_filter:
        _show_what_is_logged()
    chosen = roster.choose(wanted)
    if word == "status":
        return Plan(tuple(chosen), {("status", name): Before() for name in chosen}, {})
    return roster.plan(word, chosen, by_mark=bool(wanted.marks))


def _results(
    word: BulkWord, plan: Plan, jobs: int, headway: Headway, *, as_json: bool
) -> Iterator[Result]:
    """One for each guest, as they come."""
    for name, reason in plan.refused.items():
        yield Result((word, name), Outcome(1, f"guest {name}: {reason}"))
    speaker = _Speaker(headway)
    many = Crowd(jobs or default_jobs(), speaker.say, speaker.warn, headway.show)
    results = many.do(plan.before, WORKS | {"status": _status_as_json} if as_json else WORKS)
    yield from _of_both(results, plan) if word == "restart" else results


def _of_both(results: Iterable[Result], plan: Plan) -> Iterator[Result]:
    """Of a guest that is stopped and started, one result: what has failed, or the last."""
    told: set[str] = set()
    for result in results:
        word, name = result.key
        if name in told or (word == "stop" and result.outcome.code == 0):
            continue
        told.add(name)
        is_both = result.outcome == STARTED and ("stop", name) in plan.before
        yield replace(result, outcome=Outcome(0, "restarted")) if is_both else result


def default_jobs() -> int:
    """Guests at a time: most of a start or stop is waiting for the guest."""
    return max(_FEWEST_JOBS, 2 * len(os.sched_getaffinity(0)))


def _show_what_is_logged() -> None:
    """Such as guests that are left out."""
    import logging

    from vrun.commands.logged import Shown

    logging.basicConfig(handlers=[Shown(PROGRAM)])


# --- what is done to one guest


STARTED: Final = Outcome(0, "started")


def _start(name: str, hearer: Hearer) -> Outcome:
    guest = names.find(name)
    if find_running(guest.name) and state.is_held(guest.name):
        return Outcome(0, "runs already")
    lifecycle.start(guest, _ORDER, hearer)
    return STARTED


def _stop(name: str, hearer: Hearer) -> Outcome:
    guest = names.find(name)
    if find_running(guest.name) is None and not state.is_held(guest.name):
        lifecycle.tidy(guest, hearer)
        return Outcome(0, "does not run")
    lifecycle.stop(guest, _ORDER, hearer)
    return Outcome(0, "stopped")


def _status(name: str, hearer: Hearer) -> Outcome:
    found = _look(name, hearer)
    return Outcome(0 if found.running else _STOPPED, status.as_line(found))


def _status_as_json(name: str, hearer: Hearer) -> Outcome:
    found = _look(name, hearer)
    values: dict[str, Any] = status.as_json(found)
    return Outcome(0 if found.running else _STOPPED, json.dumps(values))


def _look(name: str, hearer: Hearer) -> status.Status:
    guest = names.find(name)
    lifecycle.tidy(guest, hearer)
    return status.look_at(guest)


WORKS: Final[dict[str, crowd.Work]] = {"start": _start, "stop": _stop, "status": _status}

COMMANDS: Final[dict[BulkWord, Command]] = {
    "start": Command("started"),
    "stop": Command("stopped"),
    "restart": Command("restarted"),
    "status": Command("running", "not"),
}


# --- what is shown


def _show(result: Result, *, as_json: bool) -> None:
    outcome = result.outcome
    if outcome.code in (0, _STOPPED):
        say(outcome.message if as_json else f"{result.name}: {outcome.message}")
    else:
        show_failure(_about(result.name, outcome.message), outcome.hint, start=PROGRAM)


@dataclass(frozen=True, slots=True)
class _Speaker:
    """Shows what is told of guests meanwhile."""

    headway: Headway

    def say(self, name: str, text: str) -> None:
        self.headway.clear()
        say(f"{name}: {text}")

    def warn(self, name: str, text: str) -> None:
        self.headway.clear()
        show(_about(name, text), start=PROGRAM)


def _about(name: str, text: str) -> str:
    """A line that says whose it is."""
    return text if text.startswith(f"guest {name}: ") else f"guest {name}: {text}"


def _summary(command: Command, tally: Counter[bool]) -> str:
    counted = [f"{tally[True]} {command.done}"]
    counted += [f"{tally[False]} {command.failed}"] if tally[False] else []
    return f"{tally.total()} guests: {', '.join(counted)}"


def _code(tally: Counter[bool]) -> int:
    """0 if there is nothing to complain of, as with the original where nothing is to be done."""
    if not tally[False]:
        return 0
    return EXIT_SOME if tally[True] else EXIT_ALL
