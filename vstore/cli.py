"""What all commands share: options, the way errors reach a person, completion of guest names.

A module of vstore.commands has its click command and `def main() -> None: cli.run(command)`, the
console script. The command returns its exit code, or None for 0.
"""

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Final, NoReturn, TypeVar

import click
from click.shell_completion import CompletionItem

from vstore import __version__, guest
from vstore.errors import EXIT_PARTIAL, NotPermitted, ToolError, kind_of
from vstore.render import show_text
from vstore.streams import fill_standard

log = logging.getLogger(__name__)

EXIT_INTERRUPTED: Final = 130
"""As a shell reports a program that SIGINT ended."""

_ENDING: Final = (signal.SIGTERM, signal.SIGHUP)
_VERBOSITY: Final = __name__ + ".verbosity"
_LEVELS: Final = (logging.WARNING, logging.INFO, logging.DEBUG)

_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])


def run(command: click.Command) -> NoReturn:
    """Run `command` with the arguments of this process and exit with its code.

    A ToolError becomes its message and hint on stderr and its exit code, with a traceback only
    under -vv; what the kernel refused and nobody translated is shown the same way. Every other
    exception is a bug of ours and keeps its traceback. A reader of stdout that went away ends the
    command quietly with exit code 1; with a stdout or stderr that is closed it says nothing there.
    """
    fill_standard()
    name = command.name or "vstore"
    for number in _ENDING:
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup(1) ignores SIGHUP
            signal.signal(number, _end)
    try:
        status = command.main(prog_name=name, standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo(f"{name}: interrupted", err=True)
        status = EXIT_INTERRUPTED
    except _Ended as ended:
        click.echo(f"{name}: ended by {ended.signal.name}", err=True)
        status = 128 + ended.signal
    except BrokenPipeError:
        _forget_stdout()
        status = 1
    except (ToolError, OSError) as error:
        status = _report(name, error if isinstance(error, ToolError) else _translated(error))
        _drop_unwritten()
    sys.exit(status if isinstance(status, int) else 0)


def _show_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """What nobody caught, as ever; but who interrupts a command while it loads is shown nothing."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _show_uncaught


class _Ended(BaseException):
    """SIGTERM or SIGHUP has come: everything is left in order, as after SIGINT."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    for other in _ENDING:
        signal.signal(other, signal.SIG_IGN)
    raise _Ended(number)


def exit_code(*, done: int, failed: int, error: ToolError | None = None) -> int:
    """The code of a command that works on one thing after the other.

    0 when nothing failed, 20 when something did, the code of `error` when nothing was done.
    """
    if not failed:
        return 0
    return EXIT_PARTIAL if done else (error or ToolError("")).exit_code


def _report(name: str, error: ToolError) -> int:
    if log.isEnabledFor(logging.DEBUG):
        traceback.print_exc()
    click.echo(show_text(f"{name}: {error.message}"), err=True)
    if error.hint:
        click.echo(show_text(f"hint: {error.hint}"), err=True)
    return error.exit_code


def _translated(error: OSError) -> ToolError:
    kind = kind_of(error)
    hint = "run as root" if kind is NotPermitted and os.geteuid() else None
    reason = error.strerror or type(error).__name__
    if error.filename is None:
        return kind(reason, hint=hint)
    shown = error.filename if isinstance(error.filename, int) else os.fsdecode(error.filename)
    return kind(f"{shown}: {reason}", hint=hint)


def _drop_unwritten() -> None:
    """What stdout could not take once it would not take at the interpreter's end either."""
    try:
        sys.stdout.flush()
    except OSError:
        _forget_stdout()


def _forget_stdout() -> None:
    """Keep the interpreter from a second complaint when it flushes stdout at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


class _Formatter(logging.Formatter):
    """One harmless line a message, even where it quotes a name from a guest."""

    def __init__(self, program: str) -> None:
        super().__init__()
        self._program = program

    def format(self, record: logging.LogRecord) -> str:
        line = show_text(f"{self._program}: {record.getMessage()}")
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _set_up_logging(context: click.Context, parameter: click.Parameter, count: int) -> None:
    wanted = max(count, context.meta.get(_VERBOSITY, 0))  # of a group and its command, the louder
    context.meta[_VERBOSITY] = wanted
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(context.find_root().info_name or "vstore"))
    for package in ("vstore", "vrun"):
        logger = logging.getLogger(package)
        logger.handlers = [handler]
        logger.setLevel(_LEVELS[min(wanted, 2)])


def verbose_option(function: _Decorated) -> _Decorated:
    """`-v`: say what is done; `-vv`: and how. Warnings are said anyway. Passes no argument on."""
    return click.option(
        "-v",
        "--verbose",
        count=True,
        is_eager=True,
        expose_value=False,
        callback=_set_up_logging,
        help="Say more on stderr; -vv says all.",
    )(function)


def version_option(function: _Decorated) -> _Decorated:
    """`--version`."""
    return click.version_option(__version__, message="%(prog)s %(version)s")(function)


def json_option(function: _Decorated) -> _Decorated:
    """`--json`: the command gets `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, an object a line.")(
        function
    )


def pool_option(function: _Decorated) -> _Decorated:
    """`--pool DIR`: the command gets `pool_path`, a Path or None."""
    return click.option(
        "--pool",
        "pool_path",
        metavar="DIR",
        type=click.Path(path_type=Path),
        help="The pool, on the file system of the guests; .pool beside them if not given.",
    )(function)


def roots_option(function: _Decorated) -> _Decorated:
    """`--root DIR`, as often as wanted: the command gets `roots`, a tuple of Paths."""
    return click.option(
        "--root",
        "roots",
        metavar="DIR",
        multiple=True,
        type=click.Path(path_type=Path),
        help="A tree that is no configured guest; may be repeated.",
    )(function)


def guest_arguments(function: _Decorated) -> _Decorated:
    """`[GUEST]...`: the command gets `guests`, a tuple of names as they were typed."""
    return click.argument("guests", metavar="[GUEST]...", nargs=-1, shell_complete=complete_guest)(
        function
    )


def guest_argument(function: _Decorated) -> _Decorated:
    """`GUEST`: the command gets `guest_name`."""
    return click.argument("guest_name", metavar="GUEST", shell_complete=complete_guest)(function)


def complete_guest(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The guests whose names begin with what was typed, less those that stand there already."""
    taken = context.params.get(parameter.name or "") or ()
    logging.disable()  # a warning would land in the line that is being typed
    try:
        names = [found.name for found in guest.list_guests(include_disabled=True)]
    except (ToolError, OSError):
        return []
    finally:
        logging.disable(logging.NOTSET)
    return [
        CompletionItem(name) for name in names if name.startswith(incomplete) and name not in taken
    ]
