"""What another machine asks before it lets a person in, put to the person at the terminal.

Its text is a stranger's: nothing of it moves the cursor, and each line says who it comes from.
"""

import getpass
import itertools
import signal
import termios
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

_TERMINAL: Final = Path("/dev/tty")


def put(place: str, said: Sequence[str], questions: Sequence[tuple[str, bool]]) -> list[str]:
    """Show what `place` says, and the person's answer to each question; whether that is shown
    while it is typed stands beside the question.

    Raises OSError without a terminal, EOFError where the person gives up.
    """
    answers = []
    _show(place, said)
    for text, is_shown in questions:
        *notice, question = text.splitlines() or [""]  # sshd puts what PAM says before it
        _show(place, notice)
        line = f"({place}) {_plain(question)} "
        answers.append(_ask_openly(line) if is_shown else getpass.getpass(line))
    return answers


def ask_secret(question: str) -> str:
    """What the person types without its being shown. Raises OSError, EOFError as `put`."""
    with terminal_kept():
        return getpass.getpass(question)


@contextmanager
def terminal_kept() -> Iterator[None]:
    """The terminal is at the end as it was before, though who asks may be in another thread, and
    this process be ended by its parent, who has heard the person's interrupt too.
    """
    try:
        opened = _TERMINAL.open("rb", buffering=0)
    except OSError:  # none is there to be kept
        yield
        return
    with opened as terminal:
        before = termios.tcgetattr(terminal)

        def put_back() -> None:
            with suppress(termios.error):  # it has been hung up
                termios.tcsetattr(terminal, termios.TCSADRAIN, before)

        def end(number: int, _: object) -> None:
            put_back()
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

        ends = signal.signal(signal.SIGTERM, end)
        try:
            yield
        finally:
            put_back()
            signal.signal(signal.SIGTERM, ends)


def _show(place: str, texts: Sequence[str]) -> None:
    with _TERMINAL.open("w", encoding="utf-8", errors="replace") as screen:
        for line in itertools.chain.from_iterable(map(str.splitlines, texts)):
            screen.write(f"({place}) {_plain(line)}\n")


def _ask_openly(question: str) -> str:
    with _TERMINAL.open("r+b", buffering=0) as terminal:
        terminal.write(question.encode(errors="replace"))
        answer = terminal.readline()
    if not answer:
        raise EOFError
    return answer.decode(errors="replace").rstrip("\n")


def _plain(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text).strip()
