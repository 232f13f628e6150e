"""Asking systemd, where that is the host's process 1, for a piece of its cgroup tree.

Groups are systemd's on such a host, but for what it delegates (systemd.io/CGROUP_DELEGATION). A
scope of its own for each guest, below vservers.slice, is asked for on systemd's private socket: one
D-Bus method call, as in the D-Bus specification ("Message Protocol"), without a bus.
"""

import os
import socket
import struct
import time
from pathlib import Path
from typing import Final

from vrun.errors import ToolError

SLICE: Final = "vservers.slice"
_STOPPER: Final = "vservers.service"
"""At shutdown it ends before the scopes do, so that it can stop the guests in their order."""
_BOOTED: Final = Path("/run/systemd/system")  # sd_booted(3)
_SOCKET: Final = "/run/systemd/private"
_TIMEOUT_S: Final = 10.0
_UNLOAD_S: Final = 2.0
_POLL_S: Final = 0.02
_EXISTS: Final = "org.freedesktop.systemd1.UnitExists"
_METHOD_CALL: Final = 1
_METHOD_RETURN: Final = 2
_ERROR: Final = 3
_NO_LIMIT: Final = 2**64 - 1


def is_init() -> bool:
    """Whether systemd manages this machine's groups."""
    return _BOOTED.is_dir()


def scope_name(xid: int) -> str:
    """The unit of the guest with that number."""
    return f"vservers-{xid}.scope"


def start_scope(xid: int, description: str) -> None:
    """Have this process moved into a new scope whose groups below are ours to make.

    The scope ends with its last process. Raises ToolError with systemd's reason.
    """
    name = scope_name(xid)
    call = _message(_scope_call(name, description))
    deadline = time.monotonic() + _UNLOAD_S
    while True:
        try:
            _send(call)
            break
        except (OSError, _Refused) as error:
            is_old = isinstance(error, _Refused) and error.name == _EXISTS
            if is_old and time.monotonic() < deadline:  # of a guest that has just ended
                time.sleep(_POLL_S)
                continue
            raise ToolError(
                f"systemd does not give the guest the unit {name}: {error}",
                hint=f"systemctl status {name}",
            ) from error
    _wait_until_in(name)


class _Refused(Exception):
    """An error that systemd answered, with its D-Bus name."""

    def __init__(self, text: str, name: str = "") -> None:
        super().__init__(text)
        self.name = name


def _send(call: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_TIMEOUT_S)
        connection.connect(_SOCKET)
        _authenticate(connection)
        connection.sendall(call)
        _read_reply(connection)


def _authenticate(connection: socket.socket) -> None:
    identity = str(os.geteuid()).encode().hex()
    connection.sendall(b"\0AUTH EXTERNAL %s\r\nBEGIN\r\n" % identity.encode())
    answer = b""
    while not answer.endswith(b"\r\n"):
        answer += _read(connection, 1)
    if not answer.startswith(b"OK "):
        raise _Refused(answer.decode(errors="replace").strip())


def _scope_call(name: str, description: str) -> bytes:
    """The arguments of StartTransientUnit; see org.freedesktop.systemd1(5)."""
    properties = (
        ("Description", "s", _text(description)),
        ("Slice", "s", _text(SLICE)),
        ("PIDs", "au", _number(4) + _number(os.getpid())),
        ("Delegate", "b", _number(1)),
        ("TasksMax", "t", struct.pack("<Q", _NO_LIMIT)),
        ("CollectMode", "s", _text("inactive-or-failed")),
        ("Before", "as", _number(len(_text(_STOPPER))) + _text(_STOPPER)),
    )
    listed = b""
    for key, kind, value in properties:
        listed += _pad(listed, 8) + _text(key)
        listed += bytes([len(kind)]) + kind.encode() + b"\0"
        listed += _pad(listed, 8 if kind == "t" else 4) + value
    body = _text(name)
    body += _pad(body, 4) + _text("fail")
    body += _pad(body, 4) + _number(len(listed))
    body += _pad(body, 8) + listed
    body += _pad(body, 4) + _number(0)
    return body + _pad(body, 8)


def _message(body: bytes) -> bytes:
    """A call of systemd's manager with the arguments `body`."""
    fields = b""
    for number, kind, value in (
        (1, b"o", "/org/freedesktop/systemd1"),
        (2, b"s", "org.freedesktop.systemd1.Manager"),
        (3, b"s", "StartTransientUnit"),
        (6, b"s", "org.freedesktop.systemd1"),
    ):
        fields += _pad(fields, 8) + bytes([number, 1]) + kind + b"\0" + _text(value)
    signature = b"ssa(sv)a(sa(sv))"
    fields += _pad(fields, 8) + b"\x08\x01g\0" + bytes([len(signature)]) + signature + b"\0"
    header = struct.pack("<cBBBIII", b"l", _METHOD_CALL, 0, 1, len(body), 1, len(fields)) + fields
    return header + _pad(header, 8) + body


def _read_reply(connection: socket.socket) -> None:
    """Wait for the answer to our one call; signals before it are passed over."""
    while True:
        head = _read(connection, 16)
        order = "<" if head[:1] == b"l" else ">"
        body_length, _, fields_length = struct.unpack(f"{order}III", head[4:])
        rest = _read(connection, fields_length + -fields_length % 8 + body_length)
        if head[1] == _METHOD_RETURN:
            return
        if head[1] == _ERROR:
            name = _EXISTS if _EXISTS.encode() + b"\0" in rest else ""
            raise _Refused(_first_text(rest[len(rest) - body_length :], order), name)


def _first_text(body: bytes, order: str) -> str:
    if len(body) < 4:
        return "no reason given"
    (length,) = struct.unpack(f"{order}I", body[:4])
    return body[4 : 4 + length].decode(errors="replace")


def _read(connection: socket.socket, length: int) -> bytes:
    read = b""
    while len(read) < length:
        part = connection.recv(length - len(read))
        if not part:
            raise ConnectionError("systemd closed the connection")
        read += part
    return read


def _wait_until_in(name: str) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while f"/{name}" not in Path("/proc/self/cgroup").read_text():
        if time.monotonic() > deadline:
            raise ToolError(
                f"systemd has not moved this process into {name} within {_TIMEOUT_S:.0f} s",
                hint=f"systemctl status {name}",
            )
        time.sleep(0.001)


def _number(value: int) -> bytes:
    return struct.pack("<I", value)


def _text(value: str) -> bytes:
    """A D-Bus string; it begins at a multiple of 4."""
    octets = value.encode()
    return _number(len(octets)) + octets + b"\0"


def _pad(before: bytes, multiple: int) -> bytes:
    return bytes(-len(before) % multiple)
