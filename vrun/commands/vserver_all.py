"""vserver-all: one command in each of many guests, several at a time.

`vserver-all [--running | --mark M | ... | NAME...] -- COMMAND`. What the guests write comes with
their names in front; how each ended is counted at the end.
"""

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import click

from vrun import chorus, names, roster
from vrun.chorus import Chorus, Ended
from vrun.commands import entry, plain
from vrun.commands.bulkoptions import bulk_options, jobs_option, wanted
from vrun.commands.headway import Headway
from vrun.commands.plain import show
from vrun.commands.vservers import EXIT_ALL, EXIT_SOME, default_jobs
from vrun.errors import ToolError
from vrun.roster import Wanted
from vstore.cli import complete_guest, version_option
from vstore.record import dataclass
from vstore.render import show_text

PROGRAM: Final = "vserver-all"


@dataclass(frozen=True, slots=True)
class Task:
    """A command for many guests."""

    program: str
    """What lines of our own begin with."""
    wanted: Wanted
    argv: tuple[str, ...]
    jobs: int = 0
    """So many at a time; 0: as fits."""
    on_host: bool = False
    is_plain: bool = False
    """Nothing but what the guests write."""


def main() -> None:
    """The console script."""
    entry.run(command, with_rest=True)


@click.command(
    PROGRAM,
    options_metavar="[OPTIONS]",
    context_settings={"max_content_width": 80},
    epilog="The command stands behind `--`.",
)
@bulk_options
@jobs_option
@click.option("--host", "on_host", is_flag=True, help="On the host: COMMAND NAME ARGUMENTS.")
@click.option("--no-prefix", is_flag=True, help="Show nothing but what they write.")
@version_option
@click.argument("guests", metavar="[NAME]... -- COMMAND", nargs=-1, shell_complete=complete_guest)
@click.pass_obj
def command(
    argv: tuple[str, ...],
    /,
    *,
    guests: tuple[str, ...],
    jobs: int | None,
    on_host: bool,
    no_prefix: bool,
    **given: Any,
) -> int:
    """Run a command in each of many guests, several at a time."""
    if not argv:
        raise click.UsageError("which command? it stands behind --")
    if given["stopped"] and not on_host:
        raise click.UsageError("a guest that is stopped runs no command; --host runs one for it")
    task = Task(PROGRAM, wanted(guests, given), argv, jobs or 0, on_host, is_plain=no_prefix)
    return code_of(perform(task))


def perform(task: Task) -> list[Ended]:
    """Carry the task out, and show how it goes; how each guest's command ended."""
    chosen = roster.choose(task.wanted)
    act = _host_act(task.argv) if task.on_host else _guest_act(task)
    headway = Headway(len(chosen))
    crowd = Chorus(task.jobs or default_jobs(), _shower(task, headway), headway.show)
    ended = []
    for one in crowd.perform(chosen, act):
        ended.append(one)
        headway.count()
        headway.clear()
        if one.code and not task.is_plain:
            show(f"guest {one.name}: ended with status {one.code}", start=task.program)
    if len(ended) != 1 and not task.is_plain:
        show(_summary(ended), start=task.program)
    return ended


def code_of(ended: Iterable[Ended]) -> int:
    """0 all well, 1 all failed, 2 some."""
    codes = [one.code for one in ended]
    if not any(codes):
        return 0
    return EXIT_ALL if all(codes) else EXIT_SOME


def _summary(ended: Sequence[Ended]) -> str:
    failed = sorted(f"{one.name} ({one.code})" for one in ended if one.code)
    text = f"{len(ended)} guests: {len(ended) - len(failed)} done"
    return f"{text}, {len(failed)} failed: {', '.join(failed)}" if failed else text


# --- in each worker


def _guest_act(task: Task) -> Callable[[str], int]:
    from vrun import admission, enter

    def act(name: str) -> int:
        try:
            guest = names.find(name)
            admission.check_enter(guest)
            return enter.execute(guest.name, task.argv)
        except ToolError as error:
            _tell(re.sub(rf"^guest {re.escape(name)}:? ", "", error.message))
            if error.hint:
                _tell(f"hint: {error.hint}")
            return plain.code_of(error)

    return act


def _host_act(argv: Sequence[str]) -> Callable[[str], int]:
    """As vsomething of the original: the guest's name is the first argument."""

    def act(name: str) -> int:
        program, *arguments = argv
        try:
            os.execvpe(program, [program, name, *arguments], _environment_for(name))  # noqa: S606
        except OSError as error:
            _tell(f"{program}: {error.strerror}")
            return 127

    return act


def _tell(text: str) -> None:
    """Where the command would have written; who reads it says whose it is."""
    os.write(2, os.fsencode(f"{text}\n"))


def _environment_for(name: str) -> Mapping[str, str]:
    return {**os.environ, "VSERVER_NAME": name}


# --- what is shown


def _shower(task: Task, headway: Headway) -> chorus.Show:
    """Lines of guests are the words of strangers: without a prefix they go on as they are."""
    outputs = {1: sys.stdout.buffer, 2: sys.stderr.buffer}

    def show_line(name: str, number: int, line: bytes) -> None:
        headway.clear()
        if not task.is_plain:
            text = os.fsdecode(line.rstrip(b"\r"))
            shown = "\t".join(show_text(part) for part in text.split("\t"))
            line = f"{name}: {shown}".encode(errors="replace")
        outputs[number].write(line + b"\n")
        outputs[number].flush()

    return show_line
