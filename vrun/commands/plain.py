"""Start and stop of one guest without options; how all commands talk to a person and end."""

import gc
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Final, NoReturn

from vrun import lifecycle, names
from vrun.errors import ToolError
from vrun.order import Order
from vstore.guest import Guest
from vstore.streams import fill_standard

EXIT_INTERRUPTED: Final = 130
"""As a shell reports a program that SIGINT ended."""
_ENDING: Final = (signal.SIGTERM, signal.SIGHUP)


def main() -> NoReturn:
    """Carry out the command line of `vserver`, while no garbage is collected."""
    fill_standard()
    words = sys.argv[1:]
    if len(words) == 2 and words[1] in _PLAIN and not words[0].startswith("-"):
        code = run(lambda: _PLAIN[words[1]](names.find(words[0])))
        sys.stdout.flush()
        os._exit(code)  # taking the interpreter apart takes 5 ms
    from vrun.commands import guestcommands

    gc.enable()
    sys.exit(run(lambda: guestcommands.main(words)))


def run(work: Callable[[], int], *, name: str = "vserver") -> int:
    """The exit code of `work`; a failure of the command `name` is shown as message and hint."""
    for number in _ENDING:
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup(1) ignores SIGHUP
            signal.signal(number, _end)
    try:
        return work()
    except ToolError as error:
        show_failure(error.message, error.hint, start=name)
        return code_of(error)
    except KeyboardInterrupt:
        show("interrupted", start=name)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except OSError as error:
        place = f"{error.filename}: " if isinstance(error.filename, str) else ""
        show(f"{place}{error.strerror or error}", start=name)
        return 1


def _end(number: int, frame: FrameType | None) -> NoReturn:
    for other in _ENDING:  # a second one must not disturb what is taken back
        signal.signal(other, signal.SIG_IGN)
    raise SystemExit(128 + number)


def code_of(error: ToolError) -> int:
    """The exit code of the original: 5 for no configuration, 125 to 127 from `exec`, else 1."""
    code = error.exit_code
    return code if code == names.NoConfiguration.exit_code or code >= 125 else 1


def show(text: str, *, start: str = "vserver") -> None:
    """A line on stderr, harmless even where it quotes a guest."""
    from vstore.render import show_text

    print(show_text(f"{start}: {text}"), file=sys.stderr, flush=True)  # noqa: T201


def show_failure(message: str, hint: str | None, *, start: str) -> None:
    """What failed, and what can be done about it, on stderr."""
    show(message, start=start)
    if hint:
        show(hint, start="hint")


def say(text: str) -> None:
    """A line on stdout."""
    print(text, flush=True)  # noqa: T201


def write_through(data: bytes) -> None:
    """What the guest's console shows."""
    sys.stdout.flush()
    os.write(1, data)


HEARER: Final = lifecycle.Hearer(say=say, warn=show, out=write_through)


def start(guest: Guest) -> int:
    lifecycle.start(guest, Order(), HEARER)
    return 0


def stop(guest: Guest) -> int:
    lifecycle.stop(guest, Order(), HEARER)
    return 0


_PLAIN: Final[dict[str, Callable[[Guest], int]]] = {"start": start, "stop": stop}
