"""How another machine is reached: a process of its own speaks ssh, and its end is a socket here.

That process is started first of all: while it loads paramiko, shakes hands and starts the program
over there, this one has time to list a guest. Nothing here imports paramiko.
"""

import contextlib
import json
import os
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Final, NoReturn

from vstore.copy.wire import ConnectionLost
from vstore.errors import ToolError
from vstore.heldback import signals_held_back

_NOT_FOUND: Final = 127


class ProgramMissing(ToolError):
    """The other machine has no vserver-copy; `lines` put it there."""

    def __init__(self, access: "Access", command: str, said: str) -> None:
        ssh = access.as_ssh
        super().__init__(
            f"{access.shown}: cannot run {command.split()[0]!r} there: {said or 'not found'}",
            hint="install it there, or name it with --remote-command",
        )
        self.lines = (
            f"tar -c --exclude=.venv . | {ssh} 'mkdir -p /opt/vserver-tools && "
            "tar -x -C /opt/vserver-tools'",
            f"{ssh} 'make -C /opt/vserver-tools install-deps && "
            "ln -sf /opt/vserver-tools/.venv/bin/vserver-copy /usr/local/bin/'",
        )


@dataclass(frozen=True, slots=True)
class Access:
    """How to reach a machine. `host` as the person gave it: a name of ssh_config, or of a host."""

    host: str
    user: str = ""
    port: int = 0
    identities: Sequence[Path] = ()
    config: Path | None = None
    known_hosts: Path | None = None
    accept_new: bool = False
    may_ask: bool = True  # for passwords, on the terminal

    @property
    def shown(self) -> str:
        return f"{self.user}@{self.host}" if self.user else self.host

    @property
    def as_ssh(self) -> str:
        """How ssh(1) reaches it, for a shell."""
        words = ["ssh"]
        words += ["-p", f"{self.port}"] if self.port else []
        words += [word for path in self.identities for word in ("-i", os.fspath(path))]
        words += ["-F", os.fspath(self.config)] if self.config else []
        words += ["-o", f"UserKnownHostsFile={self.known_hosts}"] if self.known_hosts else []
        return shlex.join([*words, self.shown])


class Session:
    """A program that runs on the other machine, or soon will; `end`: of its stdin and stdout."""

    def __init__(self, access: Access, command: str) -> None:
        self.host = access.shown
        self._access = access
        self._command = command
        self.end, theirs = socket.socketpair()
        status_read, status_write = os.pipe()
        with signals_held_back() as let_come:
            self._pid = os.fork()
            if self._pid == 0:
                self.end.close()
                os.close(status_read)
                _speak(access, command, theirs, status_write, let_come)
        theirs.close()
        os.close(status_write)
        self._status: TextIOWrapper = os.fdopen(status_read, encoding="utf-8", errors="replace")
        self._is_connected = False

    def wait(self) -> None:
        """Wait until the program has been started.

        Raises NotPermitted for a host key or a login that is refused, ConnectionLost where the
        machine does not answer, ConfigInvalid.
        """
        if self._is_connected:
            return
        line = self._status.readline()
        told = json.loads(line) if line else {"kind": "ConnectionLost", "message": "ended"}
        if "ok" not in told:
            kinds = {kind.__name__: kind for kind in (*ToolError.__subclasses__(), ConnectionLost)}
            kinds.pop(ProgramMissing.__name__, None)  # which is not made of a message alone
            kind = kinds.get(told["kind"], ToolError)
            raise kind(told["message"], hint=told.get("hint"))
        self._is_connected = True

    def close(self) -> None:
        """End the connection, or what has become of it, and wait for its process."""
        if not self._pid:
            return
        with contextlib.suppress(OSError):
            self.end.shutdown(socket.SHUT_RDWR)
        self.end.close()
        if not self._is_connected:  # it may wait for a machine that does not answer
            os.kill(self._pid, signal.SIGTERM)
        os.waitpid(self._pid, 0)
        self._pid = 0
        self._status.close()

    def explain(self, error: ConnectionLost) -> ToolError:
        """What the end of the other side's program says of a connection that was lost."""
        line = self._status.readline()
        told = json.loads(line) if line else {}
        code, said = int(told.get("exit", -1)), str(told.get("said", "")).strip()
        if code == _NOT_FOUND:
            return ProgramMissing(
                self._access, self._command, said.splitlines()[-1] if said else ""
            )
        if "reason" in told:
            return ConnectionLost(f"{self.host}: {told['reason']}", hint=error.hint)
        if said:
            return ConnectionLost(f"{error.message}; it said: {said[-500:]}", hint=error.hint)
        return error


def _speak(
    access: Access,
    command: str,
    end: socket.socket,
    status_fd: int,
    let_come: Callable[[], None],
) -> NoReturn:
    """The process that speaks ssh; it ends here, whatever happens."""
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        let_come()
        sys.modules["invoke"] = None  # type: ignore[assignment]  # see `session.load_invoke`
        from vstore.copy import session  # paramiko takes 60 ms, in which our parent has begun

        code = session.run(access, command, end, status_fd)
    except KeyboardInterrupt:
        code = 130
    finally:
        os._exit(code)
