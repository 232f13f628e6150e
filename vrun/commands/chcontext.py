"""chcontext: a command in a context of its own, or in one that runs."""

import click

from vrun import bound, byhand, foreground, names, reduction
from vrun.byhand import DEFAULT_SPACES, SPACES, Wish
from vrun.commands import entry
from vrun.commands.plain import say, show
from vrun.errors import ToolError, WrongUsage
from vrun.foreground import EXIT_CANNOT_EXECUTE, EXIT_FAILED, EXIT_NOT_FOUND
from vrun.membership import HOST, SPECTATOR, Member, find_contexts
from vrun.state import LAST_DYNAMIC
from vrun.wordlist import CFLAGS
from vstore.cli import complete_guest, version_option

__all__ = ["EXIT_CANNOT_EXECUTE", "EXIT_FAILED", "EXIT_NOT_FOUND"]

_IN_FORCE = frozenset({"lock", "nproc", "hideinfo", "ulimit", "namespace", "sched", "hide_vinfo"})
"""Words of old scripts: each context has what they ask for, or it did nothing there either."""


@click.command("chcontext", context_settings=entry.WITH_COMMAND)
@click.option(
    "--ctx",
    "--xid",
    "xid",
    metavar="N",
    shell_complete=complete_guest,
    help="The context's number, or a guest.",
)
@click.option("--cap", "caps", metavar="[!]C", multiple=True, help="Keep C; !C takes it away.")
@click.option("--secure", is_flag=True, help="Hold it to what guests are held to.")
@click.option("--hostname", metavar="H", help="Its host name.")
@click.option("--domainname", metavar="D", help="Its NIS domain name.")
@click.option("--flag", "flags", metavar="F", multiple=True, help="fakeinit, or private.")
@click.option("--spaces", metavar="LIST", help="Namespaces beside the usual: net, time.")
@click.option("--silent", is_flag=True, help="Do not show the number.")
@click.option("--disconnect", is_flag=True, help="Run the command in the background.")
@version_option
@click.argument("argv", metavar="COMMAND...", nargs=-1, type=click.UNPROCESSED)
def command(
    *,
    xid: str | None,
    caps: tuple[str, ...],
    secure: bool,
    hostname: str | None,
    domainname: str | None,
    flags: tuple[str, ...],
    spaces: str | None,
    silent: bool,
    disconnect: bool,
    argv: tuple[str, ...],
) -> int:
    """Run COMMAND in a new context, which ends with the last of its processes.

    With the number of one that runs, or a guest's name, COMMAND joins that, and is held to what it
    is held to. Context 1 sees the processes of all.
    """
    if not argv:
        raise click.UsageError("which command?")
    member = find_contexts().find(xid) if xid is not None else None
    number = None if xid is None else member.xid if member else _parse_number(xid)
    changes = bool(hostname or domainname or spaces)
    if member is not None and (member.init_pid or member.is_guest):
        if not member.init_pid:
            raise ToolError(f"guest {member.name} starts or stops just now")
        if changes or caps:
            raise WrongUsage(f"context {member.xid} runs: it is as it was made")
        return _join(member, argv, silent=silent, disconnect=disconnect)
    kept = reduction.choose(caps, secure=secure)
    if number == SPECTATOR:
        if changes or flags:
            raise WrongUsage("context 1 is the host's view, with the host's names")
        return _watch(argv, kept if caps or secure else None, disconnect=disconnect)
    wish = Wish(
        argv=argv,
        xid=number,
        kept=kept,
        secure=secure,
        hostname=hostname,
        domainname=domainname,
        spaces=_parse_spaces(spaces),
        is_init="fakeinit" in _parse_flags(flags),
    )
    return byhand.run(wish, _say_number if not silent else _say_nothing, background=disconnect)


def _say_number(xid: int) -> None:
    say(f"New security context is {xid}")


def _say_nothing(xid: int) -> None:
    pass


def _parse_number(text: str) -> int:
    number = int(text) if text.isascii() and text.isdecimal() and len(text) <= 5 else -1
    if not HOST < number <= LAST_DYNAMIC:
        raise WrongUsage(
            f"{text!r} is neither a context that runs nor the number of one",
            hint=f"numbers are 1 for the spectator, or 2 to {LAST_DYNAMIC}",
        )
    return number


def _parse_spaces(text: str | None) -> frozenset[str]:
    words = frozenset(filter(None, (text or "").replace(",", " ").split()))
    unknown = sorted(words - set(SPACES))
    if unknown:
        raise WrongUsage(f"{unknown[0]!r} is no namespace", hint=" ".join(SPACES))
    return DEFAULT_SPACES | words


def _parse_flags(flags: tuple[str, ...]) -> frozenset[str]:
    words = reduction.parse(CFLAGS, flags, option="--flag")
    for word in sorted(words - _IN_FORCE - {"fakeinit"}):
        show(f"flag {word}: is not there for a context that is made by hand", start="chcontext")
    return words


def _join(member: Member, argv: tuple[str, ...], *, silent: bool, disconnect: bool) -> int:
    from vrun import admission, enter  # some ms that a new context need not pay

    if member.is_guest:
        admission.check_enter(names.find(member.name))
    if not silent:
        say(f"Joining security context {member.xid}")
    if not disconnect:
        return enter.execute(member.name, argv)

    def work(started: bound.Started) -> int:
        started()
        return enter.execute(member.name, argv)

    return foreground.in_background(work)


def _watch(argv: tuple[str, ...], kept: frozenset[str] | None, *, disconnect: bool) -> int:
    def before() -> None:
        if kept is not None:
            reduction.reduce(kept)

    if disconnect:
        return foreground.in_background(
            lambda started: bound.run_as_spectator(argv, before, started)
        )
    return bound.run_as_spectator(argv, before)


def main() -> None:
    """The console script."""
    entry.run(command)
