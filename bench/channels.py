"""What the ssh channel carries by itself, without a guest: bytes, small objects, and over a long
way.

    python -m bench.channels take           the other side, on stdin and stdout
    python -m bench.channels send WAY       send what WAY (JSON) says; prints what came of it
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Final

import msgspec

from bench.calls import call
from bench.wires import THERE, Wire
from tests.fixtures.delaying import delaying
from vstore.copy.access import Access, Session
from vstore.copy.messages import Contents, Dialogue, Piece, Same, Served, greet
from vstore.copy.peer import remote_peer
from vstore.copy.wire import Channel, ConnectionLost

_PIECE: Final = 1 << 20
_OBJECT: Final = 200
_OBJECTS_A_MESSAGE: Final = 1000
TAKE: Final = f"{sys.executable} -m bench.channels take"


@dataclass(frozen=True, slots=True)
class Way:
    """How to get to the other side, and what to send there: so many MiB, or so many objects."""

    address: str
    port: int
    key: str
    folder: str  # of the bench, for the other side's Python
    mib: int = 0
    objects: int = 0
    delay_s: float = 0.0
    rate: float = 0.0


@dataclass(frozen=True, slots=True)
class Carried:
    """What was carried, in how many seconds from the first byte to the other side's word."""

    bytes: int
    objects: int
    seconds: float

    @property
    def mb_per_s(self) -> float:
        return self.bytes / self.seconds / 1e6

    @property
    def objects_per_s(self) -> float:
        return self.objects / self.seconds


def send(way: Way, known_hosts: Path) -> Carried:
    """Send what the way says. Raises ToolError."""
    with _place(way) as (address, port):
        access = Access(
            address,
            "root",
            port,
            [Path(way.key)],
            Path(os.devnull),
            known_hosts,
            accept_new=True,
            may_ask=False,
        )
        session = Session(access, f"cd {way.folder} && {TAKE}")
        try:
            with remote_peer(session) as dialogue:
                dialogue.channel.level = 0
                _ask(dialogue)
                began = perf_counter()
                size = _send_all(dialogue, way)
                _ask(dialogue)
                return Carried(size, way.objects, perf_counter() - began)
        finally:
            session.close()


@contextmanager
def _place(way: Way) -> Iterator[tuple[str, int]]:
    if not way.delay_s and not way.rate:
        yield way.address, way.port
        return
    with delaying(way.address, way.port, way.delay_s, way.rate) as port:
        yield "127.0.0.1", port


def _ask(dialogue: Dialogue) -> None:
    dialogue.send(Served(0))
    dialogue.expect(Same)


def _send_all(dialogue: Dialogue, way: Way) -> int:
    data = os.urandom(_PIECE)
    for number in range(way.mib):
        dialogue.send(Piece(0, number * _PIECE, data))
    size = way.mib * _PIECE
    for first in range(0, way.objects, _OBJECTS_A_MESSAGE):
        last = min(way.objects, first + _OBJECTS_A_MESSAGE)
        dialogue.send(Contents([(number, data[:_OBJECT]) for number in range(first, last)]))
        size += (last - first) * _OBJECT
    return size


def send_from(wire: Wire, *, mib: int = 0, objects: int = 0, delay_s: float = 0.0) -> Carried:
    """As `send`, from the one machine to the other. Raises BenchError."""
    folder = os.fspath(Path(__file__).parents[1])
    way = Way(THERE, 22, os.fspath(wire.server.key), folder, mib, objects, delay_s)
    program = [sys.executable, "-m", "bench.channels", "send", json.dumps(asdict(way))]
    said = call(*wire.command("env", f"--chdir={folder}", *program))
    return msgspec.json.decode(said, type=Carried)


def take() -> None:
    """Take all that comes, as messages, until the other side is gone."""
    dialogue = Dialogue(Channel(os.dup(0), os.dup(1), peer="the other side"))
    greet(dialogue, "bench", "")
    while True:
        try:
            message = dialogue.receive()
        except ConnectionLost:
            return
        if isinstance(message, Served):
            dialogue.send(Same(same=True))


def main(arguments: list[str]) -> None:
    if arguments == ["take"]:
        take()
    else:
        way = msgspec.json.decode(arguments[1], type=Way)
        known_hosts = Path(way.key).with_name("known-ways")
        known_hosts.unlink(missing_ok=True)
        print(json.dumps(asdict(send(way, known_hosts))))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
