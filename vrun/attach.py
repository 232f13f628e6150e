"""`vserver NAME console`: a guest's console on the caller's terminal, until the detach key."""

import os
import select
import signal
from contextlib import ExitStack
from types import FrameType
from typing import Final

from vrun.control import Connection, connect
from vrun.errors import ToolError
from vrun.relay import Flow, Typing, Wanted
from vrun.terminal import Caller, copy_size, raw

DETACH_KEY: Final = b"\x1d"
"""Ctrl-]"""


def attach(name: str, *, follow: bool = False) -> bool:
    """Show the guest's console, and let it have what is typed; whether the detach key ended that.

    False when the guest has ended, or its monitor. To `follow`, or without a terminal on descriptor
    0, the console is only shown. Raises ToolError where the guest has none that could be shown.
    """
    is_typed = os.isatty(0) and not follow
    with ExitStack() as stack:
        connection = _ask(name, "attach" if is_typed else "follow", stack)
        shown = Flow(connection.socket.fileno(), 1, "standard output", owned=False)
        if not is_typed:
            while shown.is_open:
                _pass_on(shown)
            return False
        master_fd = connection.fds[-1]
        _keep_size(master_fd, stack)
        typed = _Keys(stack.enter_context(raw(0)), master_fd)
        while shown.is_open and not typed.is_detached:
            _pass_on(shown, typed)
        typed.step({master_fd: select.POLLOUT})  # what was typed right before the key
        return typed.is_detached


def _ask(name: str, how: str, stack: ExitStack) -> Connection:
    """A connection on which the guest's console comes from now on."""
    connection = connect(name)
    if connection is None:
        raise ToolError(
            f"guest {name}: nobody keeps its console: its monitor does not run",
            hint=f"if the guest runs, `vserver {name} start` gives it a monitor",
        )
    stack.callback(connection.close)
    connection.send("console", how)
    match connection.receive():
        case ["console"] if how == "follow" or connection.fds:
            return connection
        case ["end", _, message, hint]:
            raise ToolError(message or f"guest {name} has no console", hint=hint or None)
    raise ToolError(f"guest {name}: its monitor does not show the console")


def _keep_size(master_fd: int, stack: ExitStack) -> None:
    """The guest's terminal is as large as the caller's, from now on."""

    def resize(number: int, frame: FrameType | None) -> None:
        copy_size(0, master_fd)

    stack.callback(signal.signal, signal.SIGWINCH, signal.signal(signal.SIGWINCH, resize))
    copy_size(0, master_fd)


def _pass_on(*flows: Flow) -> None:
    wanted = Wanted()
    for flow in flows:
        flow.ask(wanted)
    events = wanted.wait(None)
    for flow in flows:
        flow.step(events)


class _Keys(Typing):
    """What is typed, up to the detach key."""

    def __init__(self, caller: Caller, master_fd: int) -> None:
        super().__init__(caller, master_fd)
        self.is_detached = False

    def _take(self, data: bytes) -> bytes:
        before, key, _ = data.partition(DETACH_KEY)
        self.is_detached = self.is_detached or bool(key)
        return before
