"""vtop: guests as top shows processes, and the processes of one."""

import codecs
import curses
import locale
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

import click

from vrun import kill, live, state
from vrun.board import HELP, ORDERS, Board, Victim
from vrun.commands import entry
from vrun.errors import ToolError
from vrun.live import Look
from vrun.membership import HOST, find_contexts
from vrun.termtext import fit
from vstore.cli import version_option
from vstore.render import show_text

_EVERY_S: Final = 2.0
_LEAST_S, _MOST_S = 0.25, 3600.0
_FIRST_S: Final = 0.5
"""Until the second look, with which there is something to compare."""
_ESCAPE: Final = 27
_ESCAPE_MS: Final = 25
"""So long a terminal takes at most between the bytes of one key."""
_SMALLEST: Final = (40, 6)
_WORD_BYTES: Final = 12


@click.command("vtop", context_settings=entry.WIDTH)
@click.option(
    "-d",
    "--delay",
    metavar="SECONDS",
    type=click.FloatRange(_LEAST_S, _MOST_S),
    default=_EVERY_S,
    help="Between two looks; 2 by default.",
)
@version_option
def command(*, delay: float) -> int:
    """Show what guests use at this moment: cpu, memory, tasks, io.

    Enter shows the processes of the chosen one. h lists the keys.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ToolError("vtop needs a terminal", hint="vserver-stat --watch needs none")
    locale.setlocale(locale.LC_ALL, "")
    os.environ.setdefault("ESCDELAY", str(_ESCAPE_MS))
    logging.disable()  # warnings would land in the middle of the screen
    try:
        curses.wrapper(lambda window: _Screen(window, delay).run())
    except curses.error as error:
        name = os.environ.get("TERM", "")
        raise ToolError(
            f"the terminal, TERM={name}, cannot be used: {error}", hint="TERM=xterm vtop"
        ) from error
    except KeyboardInterrupt:
        return 0
    return 0


class _Screen:
    """The terminal: draws the board, and hears keys."""

    def __init__(self, window: "curses.window", delay: float) -> None:
        self._window = window
        self._delay = delay
        self._board = Board()
        self._before: Look | None = None
        self._next_s = 0.0
        self._is_plain = codecs.lookup(locale.getpreferredencoding(False)).name != "utf-8"
        self._keys: Mapping[int, Callable[[], None]] = self._make_keys()

    def run(self) -> None:
        """Until q."""
        try:
            curses.curs_set(0)
        except curses.error:  # a terminal that cannot hide it
            self._window.leaveok(True)
        while True:
            if time.monotonic() >= self._next_s:
                self._look()
            self._draw()
            self._window.timeout(max(0, int((self._next_s - time.monotonic()) * 1000)))
            key = self._get()
            if key in (ord("q"), ord("Q")):
                return
            if key >= 0:
                self._hear(key)

    def _look(self) -> None:
        now = live.take_look()
        self._board.take(live.compare(self._before, now))
        self._next_s = time.monotonic() + (self._delay if self._before else _FIRST_S)
        self._before = now

    def _get(self) -> int:
        """A key; -1 if none has come in time."""
        key = self._window.getch()
        if key == curses.KEY_RESIZE:  # the terminal has moved what was there
            self._window.clearok(True)
        return key

    # --- drawing

    def _draw(self) -> None:
        height, width = self._take_size()
        self._window.erase()
        if width < _SMALLEST[0] or height < _SMALLEST[1]:
            self._put(0, fit("vtop: too small", max(0, width - 1)))
        else:
            lines, chosen = self._board.draw(width - 1, height)  # the last place would scroll
            for number, line in enumerate(lines):
                is_marked = number in (1, chosen)
                self._put(number, line, curses.A_REVERSE if is_marked else curses.A_NORMAL)
        self._window.refresh()

    def _take_size(self) -> tuple[int, int]:
        """Lines and columns, as the kernel has them: of two changes at once curses can miss one."""
        size = os.get_terminal_size(sys.stdout.fileno())
        wanted = size.lines, size.columns
        if 0 not in wanted and wanted != self._window.getmaxyx():
            curses.resizeterm(*wanted)
            self._window.clearok(True)
        return self._window.getmaxyx()

    def _put(self, line: int, text: str, attribute: int = curses.A_NORMAL) -> None:
        if self._is_plain:
            text = text.encode("ascii", "replace").decode()
        self._window.addstr(line, 0, show_text(text), attribute)

    # --- keys

    def _make_keys(self) -> dict[int, Callable[[], None]]:
        board = self._board
        keys: dict[int, Callable[[], None]] = {
            curses.KEY_UP: lambda: board.move(-1),
            curses.KEY_DOWN: lambda: board.move(1),
            curses.KEY_PPAGE: lambda: board.page(-1),
            curses.KEY_NPAGE: lambda: board.page(1),
            curses.KEY_HOME: lambda: board.move_to_end(last=False),
            curses.KEY_END: lambda: board.move_to_end(last=True),
            curses.KEY_ENTER: board.open,
            curses.KEY_LEFT: board.close,
            curses.KEY_RIGHT: board.open,
            curses.KEY_BACKSPACE: board.close,
            _ESCAPE: board.close,
            ord("\n"): board.open,
            ord("\r"): board.open,
            ord("r"): board.turn,
            ord(" "): self._look,
            ord("+"): lambda: self._set_delay(self._delay / 2),
            ord("-"): lambda: self._set_delay(self._delay * 2),
            ord("h"): self._show_help,
            ord("?"): self._show_help,
            ord("k"): self._kill,
        }
        for letter in ORDERS:
            keys[ord(letter)] = partial(board.sort, letter)
        return keys

    def _hear(self, key: int) -> None:
        self._board.note = ""
        action = self._keys.get(key)
        if action is not None:
            action()

    def _set_delay(self, seconds: float) -> None:
        self._delay = min(max(_LEAST_S, seconds), _MOST_S)
        self._next_s = min(self._next_s, time.monotonic() + self._delay)
        self._board.note = f"looks every {self._delay:g} s"

    def _show_help(self) -> None:
        height, width = self._window.getmaxyx()
        self._window.erase()
        for number, line in enumerate((*HELP, "", "any key goes on")[:height]):
            self._put(number, fit(line, width - 1))
        self._window.refresh()
        self._window.timeout(-1)
        self._get()

    # --- signals

    def _kill(self) -> None:
        """Ask which signal, and send it; nothing is sent on Esc or an empty answer."""
        victim = self._board.victim()
        if victim is None:
            return
        word = self._ask(f"signal for {victim.shown} (TERM, KILL, ...; Esc: none): ")
        if not word:
            self._board.note = "nothing was sent"
            return
        try:
            number = kill.parse_signal(word)
            _send(victim, number)
        except (ToolError, OSError) as error:
            self._board.note = error.message if isinstance(error, ToolError) else f"{error}"
        else:
            self._board.note = f"sent {word.upper()} to {victim.shown}"
            self._next_s = time.monotonic() + _LEAST_S

    def _ask(self, question: str) -> str:
        """A word that is typed in the last line; "" where it was not."""
        word = ""
        self._window.timeout(-1)
        while True:
            height, width = self._window.getmaxyx()
            line = fit(question, max(0, min(len(question), width - _WORD_BYTES - 2))) + word
            self._put(height - 1, fit(line, width - 1), curses.A_BOLD)
            self._window.refresh()
            key = self._get()
            if key in (ord("\n"), ord("\r"), curses.KEY_ENTER):
                return word
            if key == _ESCAPE:
                return ""
            if key in (curses.KEY_BACKSPACE, 8, 127):
                word = word[:-1]
            elif 32 < key < 127 and len(word) < _WORD_BYTES:
                word += chr(key)


def _send(victim: Victim, number: int) -> None:
    """Raises ToolError where it has ended meanwhile."""
    contexts = find_contexts()
    member = contexts.by_xid.get(victim.xid)
    if victim.task is None:
        if member is None:
            raise ToolError(f"context {victim.xid} has ended")
        kill.send(contexts, member, kill.ALL, number)
        return
    pid, start = victim.task
    try:
        if state.start_of(pid) != start:
            raise ProcessLookupError
    except (FileNotFoundError, ProcessLookupError):
        raise ToolError(f"process {pid} has ended") from None
    if victim.xid != HOST and member is None:
        raise ToolError(f"context {victim.xid} has ended")
    if pid in (kill.INIT, kill.ALL):
        raise ToolError("process 1 of the host gets no signal from here")
    kill.send(contexts, member, pid, number)


def main() -> None:
    """The console script."""
    entry.run(command)
