"""vlimit: the limits of a guest that runs, what it uses, and how often it met them."""

import resource
from collections.abc import Iterator
from typing import Final

import click

from vrun import heldlimits
from vrun.cgroup import Group
from vrun.commands import entry
from vrun.commands.entry import guest_option
from vrun.commands.plain import say
from vrun.config_limits import CONTEXT_ONLY, INFINITE, parse_limit
from vrun.errors import WrongUsage
from vrun.heldlimits import RESOURCES, Kind, find_group
from vrun.keys import Line
from vstore.cli import version_option

_KINDS: Final[dict[str, Kind]] = {"-M": "min", "-S": "soft", "-H": "hard"}
_NUMBERS: Final = {"rss": resource.RLIMIT_RSS, "nproc": resource.RLIMIT_NPROC}
_ROW: Final = "{:<12}{:<20}{:<20}{:<20}{:<20}{}"


class _Ordered(click.Command):
    """-M, -S and -H say of the resource behind them which limits are meant; without one, hard."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words: list[str] = []
        kinds: list[str] = []
        waiting = iter(args)
        for word in waiting:
            name, equals, value = word.removeprefix("--").partition("=")
            if word in _KINDS:
                kinds.append(_KINDS[word])
            elif word.startswith("--") and name in CONTEXT_ONLY:
                raise click.UsageError(f"--{name}: {CONTEXT_ONLY[name]}", ctx)
            elif word.startswith("--") and name in RESOURCES:
                text = value if equals else next(waiting, "")
                words.append(f"--{name}={','.join(kinds) or 'hard'}:{text}")
                kinds.clear()
            else:
                words.append(word)
        if kinds:
            raise click.UsageError("-M, -S, -H: of which resource?", ctx)
        return super().parse_args(ctx, words)


@click.command("vlimit", cls=_Ordered, context_settings=entry.WIDTH)
@guest_option
@click.option("-a", "--all", "everything", is_flag=True, help="Show all, with use and hits.")
@click.option("-n", "by_number", is_flag=True, help="Show numbers for the names of resources.")
@click.option("-d", "is_decimal", is_flag=True, help="Show decimal numbers.")
@click.option("-M", "min_next", is_flag=True, help="The minimum of the next resource.")
@click.option("-S", "soft_next", is_flag=True, help="The soft limit of the next resource.")
@click.option("-H", "hard_next", is_flag=True, help="The hard limit of the next one; the default.")
@click.option("--rss", multiple=True, metavar="PAGES", help="Memory: inf, or a number with k, M...")
@click.option("--nproc", multiple=True, metavar="N", help="Processes, each thread counted.")
@version_option
def command(
    *,
    xid: str,
    everything: bool,
    by_number: bool,
    is_decimal: bool,
    min_next: bool,
    soft_next: bool,
    hard_next: bool,
    rss: tuple[str, ...],
    nproc: tuple[str, ...],
) -> int:
    """Show and change the limits of a guest that runs, until it stops."""
    changes = [*_changes("rss", rss), *_changes("nproc", nproc)]
    if not changes and not everything:
        raise WrongUsage("what is to be done?", hint="--all shows the limits, --rss sets one")
    group = find_group(xid)
    for name, kind, value in changes:
        heldlimits.change(group, name, kind, value)
    if everything:
        _show(group, by_number=by_number, is_decimal=is_decimal)
    return 0


def _changes(name: str, texts: tuple[str, ...]) -> Iterator[tuple[str, Kind, int | None]]:
    """Each limit that is set: `soft,hard:1000`. Raises ConfigInvalid for what is no limit."""
    for text in texts:
        kinds, _, value = text.partition(":")
        number = parse_limit(Line(f"--{name}", value))
        for kind in _KINDS.values():
            if kind in kinds.split(","):
                yield name, kind, None if number == INFINITE else number


def _show(group: Group, *, by_number: bool, is_decimal: bool) -> None:
    say(_ROW.format("RESOURCE", "MIN", "SOFT", "HARD", "USED", "HITS"))
    for total in heldlimits.read_totals(group):
        name = str(_NUMBERS[total.name]) if by_number else total.name
        cells = (total.low, total.soft, total.hard, total.used)
        hits = "N/A" if total.hits is None else str(total.hits)
        say(_ROW.format(name, *(_cell(cell, is_decimal=is_decimal) for cell in cells), hits))


def _cell(value: int | None, *, is_decimal: bool) -> str:
    if value is None:
        return "N/A"
    if value == heldlimits.UNLIMITED:
        return "inf"
    return str(value) if is_decimal else hex(value)


def main() -> None:
    """The console script."""
    entry.run(command)
