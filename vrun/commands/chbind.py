"""chbind: a command whose sockets are kept to some addresses."""

from ipaddress import AddressValueError, IPv4Address

import click

from vrun import bound, names, reduction
from vrun.bound import IpAddress
from vrun.chbind import default_loopback, limits
from vrun.commands import entry
from vrun.commands.plain import say, show
from vrun.errors import ToolError, WrongUsage
from vrun.foreground import EXIT_CANNOT_EXECUTE, EXIT_NOT_FOUND, in_background
from vrun.membership import find_contexts
from vrun.wordlist import NCAPS, NFLAGS
from vstore.cli import version_option

__all__ = ["EXIT_CANNOT_EXECUTE", "EXIT_NOT_FOUND"]

_IN_FORCE = frozenset({"lock", "single_ip", "raw_icmp"})
"""Words that say what is so anyway."""
_WITH_LOOPBACK = frozenset({"lback_remap", "lback_allow"})


@click.command("chbind", context_settings=entry.WITH_COMMAND)
@click.option("--ip", "texts", metavar="A[/M]", multiple=True, help="An address, or a device.")
@click.option("--nid", metavar="X", help="The addresses of guest X, which runs.")
@click.option("--bcast", metavar="B", expose_value=False, help="Taken, and ignored.")
@click.option("--lback", metavar="L", help="What 127.0.0.1 means to the command.")
@click.option("--ncap", "ncaps", metavar="C", multiple=True, help="Taken: raw_icmp.")
@click.option("--flag", "flags", metavar="F", multiple=True, help="Taken: lock, single_ip.")
@click.option("--secure", is_flag=True, expose_value=False, help="Taken, and ignored.")
@click.option("--silent", is_flag=True, help="Do not show the addresses.")
@click.option("--disconnect", is_flag=True, help="Run the command in the background.")
@version_option
@click.argument("argv", metavar="COMMAND...", nargs=-1, type=click.UNPROCESSED)
def command(
    *,
    texts: tuple[str, ...],
    nid: str | None,
    lback: str | None,
    ncaps: tuple[str, ...],
    flags: tuple[str, ...],
    silent: bool,
    disconnect: bool,
    argv: tuple[str, ...],
) -> int:
    """Run COMMAND, whose sockets can have no other address than these.

    The first --ip of a family is what 0.0.0.0 or :: means to it. What COMMAND starts is bound too.
    """
    if not argv:
        raise click.UsageError("which command?")
    if bool(texts) == (nid is not None):
        raise click.UsageError("which addresses? name them by --ip, or a guest by --nid")
    _check_words(ncaps, flags)
    addresses, loopback = _of_guest(nid) if nid is not None else (_parse(texts), None)
    if lback is not None:
        loopback = _parse_loopback(lback)
    for line in limits(addresses):
        show(line, start="chbind")
    if not silent:
        say(f"bound to {' '.join(map(str, addresses))}")
    if disconnect:
        return in_background(
            lambda started: bound.run(argv, addresses, loopback=loopback, started=started)
        )
    return bound.run(argv, addresses, loopback=loopback)


def _parse(texts: tuple[str, ...]) -> list[IpAddress]:
    addresses = list(dict.fromkeys(map(bound.parse_address, texts)))
    if len(addresses) > bound.MOST:
        raise WrongUsage(f"{len(addresses)} addresses: at most {bound.MOST} can be named")
    return addresses


def _parse_loopback(text: str) -> IPv4Address:
    try:
        return IPv4Address(text)
    except AddressValueError:
        raise WrongUsage(f"{text!r} is no IPv4 address") from None


def _check_words(ncaps: tuple[str, ...], flags: tuple[str, ...]) -> None:
    words = reduction.parse(NCAPS, ncaps, option="--ncap")
    words |= reduction.parse(NFLAGS, flags, option="--flag")
    for word in sorted(words - _IN_FORCE - _WITH_LOOPBACK):
        show(f"{word}: is not there for a single command", start="chbind")


def _of_guest(word: str) -> tuple[list[IpAddress], IPv4Address | None]:
    """What a running guest is bound to."""
    from vrun.config import load_spec  # 20 ms

    member = find_contexts().find(word)
    if member is None or not member.is_guest:
        raise ToolError(f"{word}: no guest of that name or number runs", hint="see vserver-stat")
    spec = load_spec(names.find(member.name))
    if spec.network != "bound":
        raise ToolError(
            f"guest {member.name}: has a network of its own, and so no addresses of the host's",
            hint=f"vserver {member.name} exec COMMAND",
        )
    loopback = spec.loopback or default_loopback(member.xid)
    addresses = [address.ip for address in spec.addresses]
    return addresses, None if "lback_allow" in spec.nflags else loopback


def main() -> None:
    """The console script."""
    entry.run(command)
