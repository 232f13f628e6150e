"""`vservers unify`: the nightly run over all guests, and its one line for the mail."""

import gc
import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

import click

from vrun import names, nightly, roster
from vrun.commands.bulkoptions import bulk_options, wanted
from vrun.commands.plain import say, show, show_failure
from vrun.commands.vservers import EXIT_ALL, EXIT_SOME, PROGRAM
from vrun.errors import ToolError
from vrun.nightly import Night
from vstore.cli import complete_guest
from vstore.guest import Guest
from vstore.order import TIME_IS_UP
from vstore.reading import BUSY
from vstore.render import ProgressBar, show_name, show_size

_UNITS: Final = {"": 1, "s": 1, "m": 60, "h": 3600}


class _Duration(click.ParamType[float]):
    """Seconds, or a number with s, m or h."""

    name = "duration"

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> float:
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smh]?)", str(value))
        if match is None:
            self.fail(f"{value!r} is no time; write 5400, 90m or 1.5h", parameter, context)
        return float(match[1]) * _UNITS[match[2]]


@click.command("unify", context_settings={"max_content_width": 80})
@bulk_options
@click.option(
    "--time-budget",
    "budget_s",
    metavar="TIME",
    type=_Duration(),
    help="Begin nothing new after that: 5400, 90m, 2h.",
)
@click.option(
    "-j", "--jobs", type=click.IntRange(min=1), metavar="N", help="Worker processes; all cores."
)
@click.option("--full-speed", is_flag=True, help="Not at the lowest priorities.")
@click.argument("guests", metavar="[NAME]...", nargs=-1, shell_complete=complete_guest)
def command(
    *,
    guests: tuple[str, ...],
    budget_s: float | None,
    jobs: int | None,
    full_speed: bool,
    **given: Any,
) -> int:
    """Unify many guests, for a nightly timer: one line says what was done."""
    chosen = roster.choose(wanted(guests, given))
    if not full_speed:
        nightly.step_back()
    return unify(chosen, budget_s=budget_s, jobs=jobs, program=PROGRAM)


def unify(
    chosen: Sequence[str], *, program: str, budget_s: float | None = None, jobs: int | None = None
) -> int:
    """Unify the guests of these names and say so in one line; the exit code of `vservers`.

    What was left alone is said on stderr, where lines begin with `program`.
    """
    gc.enable()  # this takes longer than a start
    found, unknown = _find(chosen, program)
    if not found:
        say(f"0 guests unified{f', {unknown} failed' if unknown else ''}")
        return EXIT_ALL if unknown else 0
    with ProgressBar() as bar:
        night = nightly.unify_guests(found, budget_s=budget_s, jobs=jobs, progress=bar)
    _show_trouble([*night.refused, *night.result.errors], program)
    say(_summary(night))
    if not (unknown or night.refused or night.result.errors):
        return 0
    return EXIT_ALL if len(night.refused) == night.guests else EXIT_SOME


def _find(chosen: Iterable[str], program: str) -> tuple[list[Guest], int]:
    """The guests of these names, and how many are none."""
    found, unknown = [], 0
    for name in chosen:
        try:
            found.append(names.find(name))
        except ToolError as error:
            show_failure(error.message, error.hint, start=program)
            unknown += 1
    return found, unknown


def _show_trouble(trouble: Iterable[tuple[str, str]], program: str) -> None:
    for what, reason in trouble:
        shown = show_name(what)
        show(
            f"{reason if reason.startswith(f'guest {shown}: ') else f'{shown}: {reason}'}",
            start=program,
        )


def _summary(night: Night) -> str:
    result = night.result
    done = night.guests - len(night.refused)
    parts = [
        f"{done} guest{'' if done == 1 else 's'} unified in {result.seconds:.0f} s",
        f"{show_size(result.bytes_reclaimed)} reclaimed",
        f"{result.files_unified} of {result.files_seen} files unified now",
        f"{result.files_already} before",
    ]
    for count, what in (
        (result.skipped.get(BUSY, 0), "busy"),
        (result.skipped.get(TIME_IS_UP, 0), "left for the next run: the time was up"),
        (
            len(night.refused),
            "guest left alone" if len(night.refused) == 1 else "guests left alone",
        ),
        (len(result.errors), "errors"),
        (result.attacks, "attacks"),
    ):
        if count:
            parts.append(f"{count} {what}")
    return ", ".join(parts)
