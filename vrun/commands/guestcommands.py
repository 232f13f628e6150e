"""The words of `vserver NAME COMMAND`, and the options before NAME and behind COMMAND."""

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

import click
from click.shell_completion import CompletionItem

from vrun import lifecycle, names, status
from vrun.commands.logged import Shown
from vrun.commands.plain import HEARER, say, show
from vrun.errors import ToolError
from vrun.order import Order, Rescue
from vrun.state import find_running
from vstore.cli import complete_guest, version_option
from vstore.guest import Guest
from vstore.record import dataclass, replace

EXIT_OPTIONS: Final = 1
"""A wrong option, as with the original's getopt."""
EXIT_USAGE: Final = 2
"""An unknown command, or a question that was not answered with yes."""
EXIT_STOPPED: Final = 3
"""`status` of a guest that does not run."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a command is told."""

    word: str
    """The guest, as it was typed."""
    arguments: tuple[str, ...]
    order: Order
    is_silent: bool = False

    @property
    def guest(self) -> Guest:
        """The guest that is meant; raises NoConfiguration, GuestNotFound, ConfigInvalid."""
        return names.find(self.word)

    @property
    def hearer(self) -> lifecycle.Hearer:
        return replace(HEARER, say=_ignore) if self.is_silent else HEARER


Command = Callable[[Request], int]


def main(words: Sequence[str]) -> int:
    """Carry out the command line behind `vserver`; the exit code. Raises ToolError, OSError."""
    try:
        result = _command.main(list(words), "vserver", standalone_mode=False)
    except click.UsageError as error:
        error.show()
        return EXIT_OPTIONS
    except click.Abort:
        raise KeyboardInterrupt from None
    return int(result or 0)


def _ignore(text: str) -> None:
    pass


def _complete(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """A guest, then a command; what follows is for the guest to know."""
    typed = context.params.get("words") or ()
    if not typed:
        return complete_guest(context, parameter, incomplete)
    commands = COMMANDS if len(typed) == 1 else ()
    return [CompletionItem(word) for word in commands if word.startswith(incomplete)]


@click.command(
    "vserver",
    context_settings={"allow_interspersed_args": False, "max_content_width": 80},
)
@click.option("-s", "--sync", is_flag=True, help="Wait as apps/init/sync would have it.")
@click.option("-v", "--verbose", is_flag=True, help="Show the context and its addresses.")
@click.option("--silent", is_flag=True, help="No messages but warnings; ask nothing.")
@click.option("--debug", is_flag=True, help="Say on stderr what is done, and how.")
@click.option("--defaulttty", "default_tty", is_flag=True, help="Write to apps/init/tty.")
@click.option("--strace", is_flag=True, help="Trace into /tmp/vserver-start.PID.")
@click.option("--debug-sysv", is_flag=True, help="Run rc scripts of style sysv with a trace.")
@click.option("--profile", metavar="WORD", help="PROFILE of an old-style guest.")
@version_option
@click.argument(
    "words",
    metavar="NAME COMMAND [ARGUMENTS]...",
    nargs=-1,
    type=click.UNPROCESSED,
    shell_complete=_complete,
)
@click.pass_context
def _command(context: click.Context, /, *, words: tuple[str, ...], **given: Any) -> int:
    """Start, stop and look into guests.

    \b
    start [--rescue [--rescue-init] [COMMAND...]]    restart    condrestart
    stop          status [--json]       running      console [--follow]
    exec COMMAND...     suexec USER COMMAND...       enter      service ...
    chkconfig ...       build -m METHOD ...          delete     unify   hashify
    """
    if len(words) < 2:
        click.echo(context.get_usage(), err=True)
        return EXIT_USAGE if words else EXIT_OPTIONS
    word, name, *arguments = words
    if name not in COMMANDS:
        click.echo(context.get_usage(), err=True)
        show(f"{name!r} is no command; known are {' '.join(COMMANDS)}")
        return EXIT_USAGE
    logging.basicConfig(
        level=logging.DEBUG if given["debug"] else None, handlers=[Shown("vserver")]
    )
    if given["strace"]:
        _trace(sys.argv[1:])
    order = Order(
        sync=given["sync"],
        is_noisy=given["verbose"],
        debug_rc=given["debug_sysv"],
        profile=given["profile"] or os.environ.get("PROFILE"),
    )
    request = Request(word, tuple(arguments), order, given["silent"])
    if given["default_tty"]:
        _use_default_tty(request.guest)
    return COMMANDS[name](request)


def _trace(words: list[str]) -> NoReturn:
    """Become strace(1) of the same command without its option."""
    kept = [word for word in words if word != "--strace"]
    log = f"/tmp/vserver-start.{os.getpid()}"  # noqa: S108 (where the original has it)
    os.execvp("strace", ["strace", "-f", "-o", log, sys.executable, sys.argv[0], *kept])  # noqa: S606, S607


def _use_default_tty(guest: Guest) -> None:
    """apps/init/tty for output, as boot scripts want it; a file is appended to."""
    from vrun.config import load_spec

    tty = load_spec(guest).init.tty or os.devnull
    fd = os.open(tty, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOCTTY | os.O_CLOEXEC, 0o600)
    for number in range(3):
        os.dup2(fd, number)


def _parse(command: click.Command, request: Request, name: str) -> dict[str, Any]:
    """The options of a command, by its click command without a callback."""
    program = f"vserver {request.word} {name}"
    context = command.make_context(program, list(request.arguments))
    return context.params


# --- start and stop


_START = click.Command(
    "start",
    params=[
        click.Option(["--rescue"], is_flag=True, help="Run a command instead of its init."),
        click.Option(["--rescue-init"], is_flag=True, help="The command is its process 1."),
        click.Argument(["argv"], metavar="[COMMAND]...", nargs=-1, type=click.UNPROCESSED),
    ],
    context_settings={"allow_interspersed_args": False},
    help="Start the guest; returns when its init runs.",
)


def _start(request: Request) -> int:
    given = _parse(_START, request, "start")
    rescue = None
    if given["rescue"] or given["rescue_init"]:
        rescue = Rescue(tuple(given["argv"]), is_init=given["rescue_init"])
    elif given["argv"]:
        raise click.UsageError("a command is only run with --rescue")
    lifecycle.start(request.guest, replace(request.order, rescue=rescue), request.hearer)
    return 0


_STOP = click.Command(
    "stop",
    params=[click.Option(["--rescue-init"], is_flag=True, help="As start: needs nothing here.")],
    help="Stop the guest; returns when nothing of it is left.",
)


def _stop(request: Request) -> int:
    _parse(_STOP, request, "stop")
    lifecycle.stop(request.guest, request.order, request.hearer)
    return 0


_PLAIN = click.Command("plain", help="Needs no options.")


def _restart(request: Request) -> int:
    _parse(_PLAIN, request, "restart")
    from vrun.config import load_spec

    guest, order = request.guest, replace(request.order, sync=True)
    load_spec(guest, profile=order.profile)  # a mistake in it is found while the guest still runs
    lifecycle.stop(guest, order, request.hearer)
    lifecycle.start(guest, request.order, request.hearer)
    return 0


def _condrestart(request: Request) -> int:
    return _restart(request) if find_running(request.guest.name) else 0


# --- looking


def _running(request: Request) -> int:
    _parse(_PLAIN, request, "running")
    guest = request.guest
    lifecycle.tidy(guest, request.hearer)
    return 0 if find_running(guest.name) else 1


_STATUS = click.Command(
    "status",
    params=[click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object.")],
    help="Say whether the guest runs; exit code 3 if not.",
)


def _status(request: Request) -> int:
    given = _parse(_STATUS, request, "status")
    guest = request.guest
    lifecycle.tidy(guest, request.hearer)
    found = status.look_at(guest)
    say(json.dumps(status.as_json(found)) if given["as_json"] else status.as_text(found))
    return 0 if found.running else EXIT_STOPPED


_CONSOLE = click.Command(
    "console",
    params=[click.Option(["-f", "--follow"], is_flag=True, help="Only show it.")],
    help="Show the guest's console, and type on it; Ctrl-] leaves it.",
)


def _console(request: Request) -> int:
    given = _parse(_CONSOLE, request, "console")
    from vrun.attach import attach

    attach(request.guest.name, follow=given["follow"])
    return 0


# --- inside


def _admitted(request: Request) -> Guest:
    """The guest that is meant, if it may be entered. Raises NotPermitted."""
    from vrun.admission import check_enter

    guest = request.guest
    check_enter(guest)
    return guest


def _exec(request: Request) -> int:
    from vrun.enter import execute

    if not request.arguments:
        raise click.UsageError("exec: which command?")
    return execute(_admitted(request).name, request.arguments)


def _suexec(request: Request) -> int:
    from vrun.enter import execute_as

    if len(request.arguments) < 2:
        raise click.UsageError("suexec: which user, and which command?")
    user, *argv = request.arguments
    return execute_as(_admitted(request).name, user, tuple(argv))


def _enter(request: Request) -> int:
    from vrun.config import load_spec
    from vrun.enter import enter

    guest = _admitted(request)
    return enter(guest.name, load_spec(guest).shell)


def _chkconfig(request: Request) -> int:
    from vrun.enter import execute

    return execute(_admitted(request).name, ("chkconfig", *request.arguments))


def _service(request: Request) -> int:
    """As the old tools: one of the guest's init scripts with an action."""
    from vrun.enter import execute

    return execute(_admitted(request).name, ("service", *request.arguments))


# --- guests as wholes


def _build(request: Request) -> int:
    from vrun.commands.build import build_command

    return build_command(request.word, request.arguments, quiet=request.is_silent)


_DELETE = click.Command(
    "delete",
    params=[
        click.Option(["--keep-root"], is_flag=True, help="Leave the tree where it is."),
        click.Option(["-y", "--yes"], is_flag=True, help="Do not ask."),
    ],
    help="Delete the guest: its tree and its configuration.",
)


def _delete(request: Request) -> int:
    from vrun.delete import delete_guest, load_doomed

    given = _parse(_DELETE, request, "delete")
    try:
        guest = load_doomed(names.name_of(request.word))
    except ToolError as error:
        raise names.NoConfiguration(error.message, hint=error.hint) from error
    question = f"Delete guest {guest.name} with all in {guest.root}?"
    if not (request.is_silent or given["yes"]) and not _is_yes(question):
        show("nothing is deleted")
        return EXIT_USAGE
    if find_running(guest.name):
        lifecycle.stop(guest, replace(request.order, sync=True), request.hearer)
    lifecycle.tidy(guest, request.hearer)
    kept = delete_guest(guest, keep_root=given["keep_root"])
    for path, reason in kept:
        show(f"{os.fsdecode(path)}: cannot be deleted: {reason}")
    return 1 if kept else 0


def _is_yes(question: str) -> bool:
    try:
        return click.confirm(question, default=False, err=True)
    except click.Abort:
        return False


def _unify(request: Request) -> int:
    from vstore.commands.vunify import command

    words = ["--undo" if word == "-R" else word for word in request.arguments]
    return _run_storage(command, [*words, request.word])


def _hashify(request: Request) -> int:
    from vstore.commands.vhashify import command

    return _run_storage(command, [*request.arguments, request.word])


def _run_storage(command: click.Command, words: list[str]) -> NoReturn:
    """Become one of the storage commands, with its options and its exit codes."""
    from vstore import cli

    sys.argv[1:] = words
    cli.run(command)


COMMANDS: Final[dict[str, Command]] = {
    "start": _start,
    "stop": _stop,
    "restart": _restart,
    "condrestart": _condrestart,
    "running": _running,
    "status": _status,
    "console": _console,
    "exec": _exec,
    "suexec": _suexec,
    "enter": _enter,
    "chkconfig": _chkconfig,
    "service": _service,
    "build": _build,
    "delete": _delete,
    "unify": _unify,
    "hashify": _hashify,
}
