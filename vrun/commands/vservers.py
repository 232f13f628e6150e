"""vservers: start, stop and look at many guests with one command.

`vservers COMMAND [--all] [-j N] [NAME...]`. One guest's trouble never stops the others: it is shown
where it happens, and counted at the end. Which guests are meant is decided here and nowhere else.
"""

import gc
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, Final, NoReturn

from vrun import crowd, lifecycle, names, state, status
from vrun.commands import plain
from vrun.commands.plain import say, show, show_failure
from vrun.control import Outcome
from vrun.crowd import Crowd, Result
from vrun.errors import ToolError, WrongUsage
from vrun.lifecycle import Hearer
from vrun.order import Order
from vrun.state import find_running
from vstore.guest import list_guests
from vstore.record import dataclass

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

    work: crowd.Work
    done: str
    """What the summary says of a guest of which it is true, ..."""
    failed: str = "failed"
    """... and of another."""


def main() -> NoReturn:
    """The console script."""
    gc.disable()  # as for vserver
    plain.fill_standard()
    words = sys.argv[1:]
    code = plain.run(lambda: _run(words), name=PROGRAM)
    if sys.stdout is not None:  # closed by the caller
        sys.stdout.flush()
    os._exit(code)  # taking the interpreter apart takes 5 ms


def _run(words: Sequence[str]) -> int:
    """Parse the command line; what has no options but --all is done without click."""
    word, *rest = words or [""]
    if word not in COMMANDS or any(one.startswith("-") and one != "--all" for one in rest):
        from vrun.commands import bulkoptions

        return bulkoptions.main(words)
    guests = [one for one in rest if one != "--all"]
    return carry_out(word, guests, everyone=len(guests) < len(rest))


def carry_out(
    word: str, guests: Sequence[str], *, everyone: bool, jobs: int = 0, as_json: bool = False
) -> int:
    """Carry out one of COMMANDS; the exit code. `jobs`: so many guests at a time, 0: as fits.

    Raises WrongUsage where no guest is named.
    """
    command = COMMANDS[word]
    chosen = _choose(guests, everyone=everyone or (word == "status" and not guests))
    if word in ("start", "restart"):
        from vrun import chbind, monitor  # noqa: F401 (once, for all processes)
    work = command.work
    if as_json:
        work = _status_as_json
    tally = Counter[bool]()
    results: Iterable[Result] = Crowd(jobs or default_jobs(), _say, _warn).do(chosen, work)
    if word == "status":
        results = sorted(results, key=lambda result: chosen.index(result.name))
    for result in results:
        tally[result.outcome.code == 0] += 1
        _show(result, as_json=as_json)
    if len(chosen) != 1 and not as_json:
        say(_summary(command, tally))
    return _code(tally)


def default_jobs() -> int:
    """Guests at a time: most of a start or stop is waiting for the guest."""
    return max(_FEWEST_JOBS, 2 * len(os.sched_getaffinity(0)))


def _choose(guests: Sequence[str], *, everyone: bool) -> list[str]:
    """The names that are meant, each once, in the order of the command line."""
    if everyone and guests:
        raise WrongUsage("--all and names of guests exclude each other")
    if not everyone and not guests:
        raise WrongUsage("which guests?", hint="name them, or say --all")
    return list(dict.fromkeys(map(_name_of, guests))) if guests else _list_all()


def _name_of(word: str) -> str:
    """The guest's name, as far as `word` is one: if not, that is said of it in its turn."""
    with suppress(ToolError):
        return names.name_of(word)
    return word


def _list_all() -> list[str]:
    import logging  # what is left out is said there

    from vrun.commands.logged import Shown

    logging.basicConfig(handlers=[Shown(PROGRAM)])
    return [guest.name for guest in list_guests()]


# --- what is done to one guest


def _start(name: str, hearer: Hearer) -> Outcome:
    guest = names.find(name)
    if find_running(guest.name) and state.is_held(guest.name):
        return Outcome(0, "runs already")
    lifecycle.start(guest, _ORDER, hearer)
    return Outcome(0, "started")


def _stop(name: str, hearer: Hearer) -> Outcome:
    guest = names.find(name)
    if find_running(guest.name) is None and not state.is_held(guest.name):
        lifecycle.tidy(guest, hearer)
        return Outcome(0, "does not run")
    lifecycle.stop(guest, _ORDER, hearer)
    return Outcome(0, "stopped")


def _restart(name: str, hearer: Hearer) -> Outcome:
    _stop(name, hearer)
    _start(name, hearer)
    return Outcome(0, "restarted")


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


COMMANDS: Final = {
    "start": Command(_start, "started"),
    "stop": Command(_stop, "stopped"),
    "restart": Command(_restart, "restarted"),
    "status": Command(_status, "running", "not"),
}


# --- what is shown


def _show(result: Result, *, as_json: bool) -> None:
    outcome = result.outcome
    if outcome.code in (0, _STOPPED):
        say(outcome.message if as_json else f"{result.name}: {outcome.message}")
    else:
        show_failure(_about(result.name, outcome.message), outcome.hint, start=PROGRAM)


def _say(name: str, text: str) -> None:
    say(f"{name}: {text}")


def _warn(name: str, text: str) -> None:
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
