"""vattribute: what the processes of a guest that runs may do."""

from collections.abc import Sequence
from typing import Final

import click

from vrun import ceiling, names
from vrun.ceiling import Ceiling
from vrun.commands import entry
from vrun.commands.entry import guest_option
from vrun.commands.plain import say, show_failure
from vrun.errors import NotPermitted, ToolError, WrongUsage
from vrun.keys import Line
from vrun.state import find_running
from vrun.wordlist import CAPABILITIES, CCAPS, DEFAULT_CCAPS, SECURE_CAPS, SPACES, Table, read_words
from vstore.cli import version_option
from vstore.record import replace

_ROW: Final = "{:<15}{}"
_KINDS: Final = ("bcapabilities", "ccapabilities", "umask")
"""The files in which the words stand."""


@click.command("vattribute", context_settings=entry.WIDTH)
@guest_option
@click.option("--get", "is_get", is_flag=True, help="Show what it may do.")
@click.option("--set", "is_set", is_flag=True, help="Take away what is named with ~ in front.")
@click.option("--bcap", multiple=True, metavar="WORD,...", help="Capabilities: ~net_raw.")
@click.option("--ccap", multiple=True, metavar="WORD,...", help="Context capabilities.")
@click.option("--umask", multiple=True, metavar="WORD,...", help="Namespaces that it may make.")
@click.option("--secure", is_flag=True, help="First no more than a guest has by default.")
@version_option
def command(
    *,
    xid: str,
    is_get: bool,
    is_set: bool,
    bcap: tuple[str, ...],
    ccap: tuple[str, ...],
    umask: tuple[str, ...],
    secure: bool,
) -> int:
    """Show what the processes of a guest may do, or take something away from those
    that join it from now on (exec, enter).
    """
    if is_get == is_set:
        raise WrongUsage("--get, or --set?")
    if is_get and (bcap or ccap or umask or secure):
        raise WrongUsage("--bcap, --ccap, --umask and --secure belong to --set")
    guest = names.find(xid)
    if find_running(guest.name) is None:
        raise ToolError(
            f"guest {guest.name}: does not run",
            hint="what it may do at the next start is written in its bcapabilities, ccapabilities",
        )
    held = ceiling.load(guest.name)
    if is_get:
        _show(held)
        return 0
    # The names of capabilities(7) are capitals, the words of lists are not.
    capabilities = frozenset(name.lower() for name in held.capabilities)
    usual = frozenset(name.lower() for name in SECURE_CAPS)
    left = _lowered(CAPABILITIES, capabilities, bcap, usual if secure else None)
    wanted = replace(
        held,
        capabilities=frozenset(name.upper() for name in left),
        ccaps=_lowered(CCAPS, held.ccaps, ccap, DEFAULT_CCAPS if secure else None),
        umask=_lowered(SPACES, held.umask, umask, frozenset() if secure else None),
    )
    ceiling.write(guest.name, wanted)
    _warn_of_others(guest.name, held, wanted)
    return 0


def _warn_of_others(name: str, held: Ceiling, wanted: Ceiling) -> None:
    """Say what those keep that run already, where something was taken away."""
    kinds = zip(_KINDS, _words_of(held), _words_of(wanted), strict=True)
    lost = {kind: sorted(before - after) for kind, before, after in kinds if before - after}
    if lost:
        words = " ".join(word for kept in lost.values() for word in kept)
        show_failure(
            f"guest {name}: its processes that run keep {words}: a stock kernel takes nothing "
            "from them",
            f"written with ~ to {', '.join(lost)} it holds for all of the guest when it is "
            "started again",
            start="vattribute",
        )


def _words_of(held: Ceiling) -> tuple[frozenset[str], ...]:
    return held.capabilities, held.ccaps, held.umask


def _lowered(
    table: Table, held: frozenset[str], texts: Sequence[str], most: frozenset[str] | None
) -> frozenset[str]:
    """What is left of `held`. Raises ConfigInvalid for an unknown word, NotPermitted for more."""
    begin = held if most is None else held & most
    words = read_words(table, [Line(table.kind, text) for text in texts], begin).words
    if more := words - held:
        raise NotPermitted(
            f"{table.kind}: a guest that runs cannot get more: {' '.join(sorted(more))}",
            hint="write it to the guest's settings and restart it",
        )
    return words


def _show(held: Ceiling) -> None:
    for name, words in zip(_KINDS, _words_of(held), strict=True):
        say(_ROW.format(name, ",".join(sorted(words)) or "none"))


def main() -> None:
    """The console script."""
    entry.run(command)
