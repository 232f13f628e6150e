"""vkill: signals to processes of guests."""

import click

from vrun import kill
from vrun.commands import entry
from vrun.commands.plain import show_failure
from vrun.errors import ToolError, WrongUsage
from vrun.membership import find_contexts
from vstore.cli import complete_guest, version_option


@click.command("vkill", context_settings={**entry.WIDTH, "ignore_unknown_options": True})
@click.option(
    "-c",
    "--xid",
    metavar="X",
    shell_complete=complete_guest,
    help="The guest, by its name or its number.",
)
@click.option("-s", "--signal", "word", metavar="SIG", default="TERM", help="TERM by default.")
@version_option
@click.argument("words", metavar="[PID]...", nargs=-1, type=click.UNPROCESSED)
def command(*, xid: str | None, word: str, words: tuple[str, ...]) -> int:
    """Send a signal to processes, by their numbers on the host.

    With --xid only to those of that guest: PID 1 is its init then, 0 or no PID are all its
    processes, -1 all but its init. If a PID is no number, nothing is sent at all.
    """
    number = kill.parse_signal(word)
    pids = [_parse_pid(text) for text in words]
    if xid is None and not pids:
        raise WrongUsage("which processes?", hint="name a PID, or --xid for all of a guest")
    contexts = find_contexts()
    member = contexts.find(xid) if xid is not None else None
    if xid is not None and member is None:
        raise ToolError(f"{xid}: no context has that name or number", hint="see vserver-stat")
    if xid is None and any(pid <= 0 for pid in pids):
        raise WrongUsage("a PID below 1 means processes of a guest", hint="say which with --xid")
    failed = 0
    for pid in pids or [kill.ALL]:
        try:
            kill.send(contexts, member, pid, number)
        except ToolError as error:
            failed += 1
            show_failure(error.message, error.hint, start="vkill")
    return entry.EXIT_FAILED if failed else 0


def _parse_pid(text: str) -> int:
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= 9):
        raise WrongUsage(f"{text!r} is no PID; nothing was sent")
    pid = int(text)
    if pid < kill.ALL_BUT_INIT:
        raise WrongUsage(f"{text}: process groups are not known here; nothing was sent")
    return pid


def main() -> None:
    """The console script."""
    entry.run(command)
