"""The other side of a copy: the program that serves, here or on another machine, and how a client
reaches it.
"""

import logging
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from vstore import __version__
from vstore.copy.access import Session
from vstore.copy.messages import Dialogue, Done, Hostile, Request, greet
from vstore.copy.receiving import receive_guest
from vstore.copy.sending import Outgoing
from vstore.copy.wire import Channel, ConnectionLost
from vstore.errors import NoSpace, ToolError, kind_of
from vstore.guest import parse_name
from vstore.heldback import signals_held_back
from vstore.progress import SILENT

log = logging.getLogger(__name__)

_SAID_AT_MOST: Final = 2000


# --- serving


def serve(read_fd: int, write_fd: int, *, peer: str) -> int:
    """Answer a client until it has no more to ask; returns the exit code."""
    channel = Channel(read_fd, write_fd, peer=peer)
    dialogue = Dialogue(channel)
    try:
        greet(dialogue, __version__, socket.gethostname())
        while (request := dialogue.expect(Request)).task != "end":
            _answer(dialogue, request)
    except (ToolError, OSError) as error:
        known = error if isinstance(error, ToolError) else translated(error)
        if not isinstance(known, ConnectionLost):
            with suppress(ToolError):
                dialogue.fail(known)
        log.info("%s", known.message)
        channel.close()
        return known.exit_code
    channel.close()
    return 0


def _answer(dialogue: Dialogue, request: Request) -> None:
    set_up(dialogue.channel, request)
    if request.task == "receive":
        receive_guest(dialogue, request, SILENT)
    elif request.task == "send":
        with Outgoing(request) as outgoing:
            outgoing.send(dialogue, SILENT)
    elif request.task in ("start", "stop"):
        dialogue.send(run_vserver(request.target, request.task))
    else:
        raise Hostile(f"the task {request.task!r}")


def set_up(channel: Channel, request: Request) -> None:
    """How what this side sends is compressed, and how fast it may go."""
    channel.level = None if request.compress < 0 else request.compress
    channel.rate = request.rate


def run_vserver(name: str, action: str) -> Done:
    """`vserver NAME start` or `stop`, with the program that is installed."""
    beside = Path(sys.executable).parent / "vserver"  # of the same installation
    program = os.fspath(beside) if beside.exists() else shutil.which("vserver")
    if program is None:
        return Done(127, "vserver is not installed")
    done = subprocess.run(  # noqa: S603 - a fixed program, a checked name
        [program, parse_name(name), action],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    said = done.stdout.decode(errors="replace").strip()
    return Done(min(255, abs(done.returncode)), said[-_SAID_AT_MOST:])


def translated(error: OSError) -> ToolError:
    """What the kernel refused, as an error that can travel."""
    kind = kind_of(error)
    reason = error.strerror or type(error).__name__
    shown = "" if error.filename is None else f"{error.filename}: "
    return kind(
        f"{shown}{reason}",
        hint="free some space and run the command again: what arrived is kept"
        if kind is NoSpace
        else None,
    )


# --- reaching one that serves


@contextmanager
def local_peer() -> Iterator[Dialogue]:
    """A process of this machine that serves."""
    ours, theirs = socket.socketpair()
    with signals_held_back() as let_come:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                let_come()
                ours.close()
                fd = theirs.detach()
                code = serve(fd, fd, peer="the sending side")
            finally:
                os._exit(code)
    theirs.close()
    fd = ours.detach()
    channel = Channel(fd, fd, peer="the other process")
    try:
        dialogue = Dialogue(channel)
        greet(dialogue, __version__, "")
        yield dialogue
    finally:
        channel.close()
        os.waitpid(pid, 0)


@contextmanager
def remote_peer(session: Session) -> Iterator[Dialogue]:
    """The program on another machine, over ssh. Raises what `Session.wait` raises."""
    session.wait()
    fd = os.dup(session.end.fileno())
    channel = Channel(fd, fd, peer=session.host)
    try:
        dialogue = Dialogue(channel)
        greet(dialogue, __version__, socket.gethostname())
        yield dialogue
    except ConnectionLost as error:
        channel.close(wait_s=0)
        raise session.explain(error) from error
    finally:
        channel.close()
        session.close()
