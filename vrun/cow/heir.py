"""What outlives a monitor: a supervisor hands its listeners to the next one, and a file tells how
things are.

    RUNDIR/NAME/
    ├── heir.sock         the supervisor listens here once its monitor is gone
    └── protection.json   the supervisor's pid, and the attacks that were met
"""

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
_REPORT: Final = "protection.json"
_FORMAT: Final = 1
_FDS_A_MESSAGE: Final = 200
_WAIT_S: Final = 10.0


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
    for file in (_SOCKET, _REPORT):
        with suppress(OSError):
            (run_folder(name) / file).unlink()


def listen(name: str) -> socket.socket:
    """Where a supervisor that has lost its monitor can be asked. Raises OSError."""
    (run_folder(name) / _SOCKET).unlink(missing_ok=True)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    with short_path(name, _SOCKET) as path:
        made.bind(path)
    made.listen(1)
    return made


def bequeath(asked_by: socket.socket, fds: Sequence[int]) -> None:
    """The supervisor's side: hand the listeners over. Raises OSError."""
    for start in range(0, len(fds), _FDS_A_MESSAGE):
        socket.send_fds(asked_by, [b"l"], fds[start : start + _FDS_A_MESSAGE])


def inherit(name: str) -> list[int]:
    """The listeners that the guest's supervisor has kept; it ends then. Empty where there is none.

    Only to be asked when the guest's monitor is gone.
    """
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made.settimeout(_WAIT_S)
    found: list[int] = []
    try:
        with short_path(name, _SOCKET) as path:
            made.connect(path)
        while True:
            data, fds, _, _ = socket.recv_fds(made, 1, _FDS_A_MESSAGE, socket.MSG_CMSG_CLOEXEC)
            if not data:
                break
            found += fds
    except OSError:
        pass
    finally:
        made.close()
    return found
