"""What outlives a monitor: a supervisor hands its listeners to the next one, and a file tells how
things are.

    RUNDIR/NAME/
    ├── heir.sock         the supervisor listens here once its monitor is gone
    ├── heir.next          so does one that is about to take its place
    └── protection.json   the supervisor's pid, and the attacks that were met
"""

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from vrun.state import run_folder, short_path
from vstore.record import dataclass

NONE: Final = "none"
"""Nothing is shared by links: there is nothing to protect."""
OPEN: Final = "open"
"""The guest may thaw files by itself: LINUX_IMMUTABLE is among its capabilities."""
READ_ONLY: Final = "read-only"
"""As copy-on-write, but the supervisor is gone: what is shared can only be read."""

PROCESS_NAME: Final = "vserver-cow"
_ENDED: Final = "Z"

_SOCKET: Final = "heir.sock"
_NEXT: Final = "heir.next"
_REPORT: Final = "protection.json"
_FORMAT: Final = 1
_FDS_A_MESSAGE: Final = 200
_WAIT_S: Final = 10.0
_TRIES: Final = 20
_LISTENERS: Final = b"l"
_ALL: Final = b"."
_TAKEN: Final = b"t"


@dataclass(frozen=True, slots=True)
class Report:
    """How a guest's shared files are protected at the moment."""

    supervisor: int
    """Its pid."""
    attacks: int
    attackers: tuple[tuple[int, str], ...]
    """The last ones: pid and command."""

    @property
    def is_alive(self) -> bool:
        """Whether that supervisor is there."""
        try:
            shown = Path(f"/proc/{self.supervisor}/stat").read_text(errors="replace")
        except OSError:
            return False
        return f"({PROCESS_NAME}) " in shown and f") {_ENDED} " not in shown


def write_report(name: str, report: Report) -> None:
    """Raises OSError."""
    import json  # a millisecond that most commands need not pay

    path = run_folder(name) / _REPORT
    values = {
        "format": _FORMAT,
        "supervisor": report.supervisor,
        "attacks": report.attacks,
        "attackers": [{"pid": pid, "command": command} for pid, command in report.attackers],
    }
    spare = path.with_suffix(".new")
    spare.write_text(json.dumps(values) + "\n")
    spare.replace(path)


def load_report(name: str) -> Report | None:
    """None where there is none that can be read."""
    import json

    try:
        values = json.loads((run_folder(name) / _REPORT).read_bytes())
        return Report(
            int(values["supervisor"]),
            int(values["attacks"]),
            tuple((int(item["pid"]), str(item["command"])) for item in values["attackers"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def forget(name: str) -> None:
    """The guest does not run any more."""
    for file in (_SOCKET, _NEXT, _REPORT):
        with suppress(OSError):
            (run_folder(name) / file).unlink()


def listen(name: str) -> socket.socket:
    """Where a supervisor that has lost its monitor can be asked, from `announce` on. Raises
    OSError.
    """
    (run_folder(name) / _NEXT).unlink(missing_ok=True)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    with short_path(name, _NEXT) as path:
        made.bind(path)
    made.listen(1)
    return made


def announce(name: str) -> None:
    """From now on it is the one who `listen`s that is asked. Raises OSError."""
    folder = run_folder(name)
    with suppress(FileNotFoundError):  # it was announced before
        (folder / _NEXT).replace(folder / _SOCKET)


def bequeath(asked_by: socket.socket, fds: Sequence[int]) -> bool:
    """The supervisor's side: hand the listeners over, and wait until another serves them; False
    where those who asked for them have died before. Raises OSError.
    """
    asked_by.settimeout(None)
    for start in range(0, len(fds), _FDS_A_MESSAGE):
        socket.send_fds(asked_by, [_LISTENERS], fds[start : start + _FDS_A_MESSAGE])
    asked_by.send(_ALL)
    return asked_by.recv(1) == _TAKEN


def take_place(predecessor: socket.socket) -> None:
    """The other supervisor's side: what `inherit` gave is served from now on."""
    with suppress(OSError):
        predecessor.send(_TAKEN)
    predecessor.close()


def inherit(name: str) -> tuple[list[int], socket.socket | None]:
    """The listeners that the guest's supervisor has kept, and the connection to it; it ends when
    it is told that its place is taken, and goes on when that is closed. None where there is none.

    Only to be asked when the guest's monitor is gone.
    """
    for _ in range(_TRIES):
        made = _connect(name)
        if made is None:
            break
        try:
            return _receive(made), made
        except OSError:
            made.close()  # it has just handed over to another one
    return [], None


def _connect(name: str) -> socket.socket | None:
    for entry in (_SOCKET, _NEXT, _SOCKET):  # it may be announced meanwhile
        made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        made.settimeout(_WAIT_S)
        try:
            with short_path(name, entry) as path:
                made.connect(path)
        except OSError:
            made.close()
            continue
        return made
    return None


def _receive(made: socket.socket) -> list[int]:
    found: list[int] = []
    while True:
        data, fds, _, _ = socket.recv_fds(made, 1, _FDS_A_MESSAGE, socket.MSG_CMSG_CLOEXEC)
        found += fds
        if data == _ALL:
            return found
        if not data:
            for fd in found:
                os.close(fd)
            raise ConnectionResetError
