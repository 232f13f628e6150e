"""The one call to systemd, read back by the rules of the D-Bus specification, and its answers."""

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from vrun import systemd
from vrun.errors import ToolError


class _Reader:
    """Takes values off a message; what it does not expect is an error."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def align(self, multiple: int) -> None:
        end = self._at + -self._at % multiple
        assert not any(self._data[self._at : end])
        self._at = end

    def take(self, layout: str, size: int) -> int:
        self.align(size)
        (value,) = struct.unpack_from(f"<{layout}", self._data, self._at)
        self._at += size
        return int(value)

    def text(self, length_layout: str = "I") -> str:
        length = self.take(length_layout, 4 if length_layout == "I" else 1)
        value = self._data[self._at : self._at + length].decode()
        assert self._data[self._at + length] == 0
        self._at += length + 1
        return value

    def variant(self) -> Any:
        kind = self.text("B")
        if kind == "au":
            count = self.take("I", 4) // 4
            return [self.take("I", 4) for _ in range(count)]
        if kind == "as":
            end = self.take("I", 4) + self._at
            found = []
            while self._at < end:
                found.append(self.text())
            assert self._at == end
            return found
        if kind in "sog":
            return self.text("B" if kind == "g" else "I")
        return self.take(*{"b": ("I", 4), "t": ("Q", 8), "u": ("I", 4)}[kind])

    def pairs(self, read_key: str) -> Iterator[tuple[Any, Any]]:
        length = self.take("I", 4)
        self.align(8)
        end = self._at + length
        while self._at < end:
            self.align(8)
            key = self.text() if read_key == "s" else self.take("B", 1)
            yield key, self.variant()

    def is_at_end(self) -> bool:
        return self._at == len(self._data)


class _Init:
    """Stands for systemd at the other end of its socket."""

    def __init__(self, path: Path, answer: bytes) -> None:
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen()
        self._answer = answer
        self.heard = b""
        self._thread = Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        connection, _ = self._listening.accept()
        with connection:
            lines = b""
            while not lines.endswith(b"BEGIN\r\n"):
                lines += connection.recv(4096)
            assert (
                lines
                == b"\0AUTH EXTERNAL %s\r\nBEGIN\r\n" % str(os.geteuid()).encode().hex().encode()
            )
            connection.sendall(b"OK 0123\r\n")
            self.heard = connection.recv(65536)
            connection.sendall(self._answer)

    def close(self) -> None:
        self._thread.join(60)
        self._listening.close()


def _reply(kind: int, body: bytes = b"") -> bytes:
    """A message with one header field, the serial number that it answers."""
    fields = b"\x05\x01u\0" + struct.pack("<I", 1)
    return struct.pack("<cBBBIII", b"l", kind, 0, 1, len(body), 7, len(fields)) + fields + body


def _ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes, *, timeout_s: float = 60
) -> tuple[bytes, str]:
    """The call as systemd hears it, and what is said when this process is moved nowhere."""
    monkeypatch.setattr(systemd, "_SOCKET", str(tmp_path / "private"))
    monkeypatch.setattr(systemd, "_TIMEOUT_S", timeout_s)
    init = _Init(tmp_path / "private", answer)
    try:
        with pytest.raises(ToolError) as caught:
            systemd.start_scope(1001, "Guest web")
    finally:
        init.close()
    return init.heard, caught.value.message


def test_the_call_asks_for_a_delegated_scope_with_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal_first = _reply(4, b"\0" * 8) + _reply(2)
    heard, message = _ask(tmp_path, monkeypatch, signal_first, timeout_s=3)  # waited out
    assert "has not moved this process into vservers-1001.scope" in message
    assert heard[:4] == b"l\x01\x00\x01"
    reader = _Reader(heard)
    reader.take("I", 4)
    body_length = reader.take("I", 4)
    assert reader.take("I", 4) == 1
    fields = dict(reader.pairs("y"))
    assert fields == {
        1: "/org/freedesktop/systemd1",
        2: "org.freedesktop.systemd1.Manager",
        3: "StartTransientUnit",
        6: "org.freedesktop.systemd1",
        8: "ssa(sv)a(sa(sv))",
    }
    reader.align(8)
    body = _Reader(heard[len(heard) - body_length :])
    assert (body.text(), body.text()) == ("vservers-1001.scope", "fail")
    assert dict(body.pairs("s")) == {
        "Description": "Guest web",
        "Slice": "vservers.slice",
        "PIDs": [os.getpid()],
        "Delegate": 1,
        "TasksMax": 2**64 - 1,
        "CollectMode": "inactive-or-failed",
        "Before": ["vservers.service"],
    }
    assert dict(body.pairs("s")) == {}
    assert body.is_at_end()


def test_what_systemd_refuses_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = b"Unit vservers-1001.scope already exists."
    body = struct.pack("<I", len(reason)) + reason + b"\0"
    _, message = _ask(tmp_path, monkeypatch, _reply(3, body))
    assert message.endswith(f"the unit vservers-1001.scope: {reason.decode()}")


def test_a_connection_that_ends_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, message = _ask(tmp_path, monkeypatch, b"")
    assert message.endswith("systemd closed the connection")
