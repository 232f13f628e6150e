"""Frames arrive as they were sent, or the connection ends: nothing is taken for another thing."""

import os
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from vstore.copy.wire import FRAME_LIMIT, SILENCE_S, Channel, ConnectionLost, check_of, unpack
from vstore.errors import FormatUnknown, ToolError

_HEAD = struct.Struct(">IIBB")


@contextmanager
def _pair(*, level: int | None = None) -> Iterator[tuple[Channel, Channel]]:
    left, right = socket.socketpair()
    ends = [
        Channel(fd, fd, peer=name, level=level)
        for fd, name in ((left.detach(), "left"), (right.detach(), "right"))
    ]
    try:
        yield ends[0], ends[1]
    finally:
        for end in ends:
            end.close(wait_s=0)


@contextmanager
def _raw(*, silence_s: float = SILENCE_S) -> Iterator[tuple[Channel, socket.socket]]:
    """A channel, and the bare end of what it reads."""
    ours, theirs = socket.socketpair()
    fd = ours.detach()
    channel = Channel(fd, fd, peer="them", silence_s=silence_s)
    try:
        yield channel, theirs
    finally:
        theirs.close()
        channel.close(wait_s=0)


def _send_much(channel: Channel) -> None:
    for _ in range(100):
        channel.send(1, bytes(1 << 20))


def _receive_all(channel: Channel, got: list[bytes]) -> None:
    while True:
        got.append(channel.receive()[1])


def _frame(
    body: bytes, *, number: int = 0, kind: int = 3, plain: int = -1, packing: int = 0
) -> bytes:
    head = _HEAD.pack(len(body), len(body) if plain < 0 else plain, kind, packing)
    return head + check_of(number, head, body) + body


@pytest.mark.parametrize("level", [None, 0, 1, 9])
def test_frames_arrive_as_they_were_sent_both_ways(level: int | None) -> None:
    bodies = [b"", b"x", os.urandom(1000), bytes(FRAME_LIMIT), b"again " * 40_000]
    with _pair(level=level) as (left, right):
        for side in (left, right):
            for kind, body in enumerate(bodies, start=1):
                side.send(kind, body)
        for side in (left, right):
            assert [side.receive() for _ in bodies] == list(enumerate(bodies, start=1))


def test_a_descriptor_shows_whether_there_is_something_to_take() -> None:
    def is_shown(*, within_ms: int = 0) -> bool:
        asking = select.poll()
        asking.register(right.inbox_fd, select.POLLIN)
        return bool(asking.poll(within_ms))

    with _pair() as (left, right):
        assert not is_shown()
        for body in (b"one", b"two"):
            left.send(1, body)
        assert is_shown(within_ms=10_000)
        assert right.receive() == (1, b"one")
        assert right.receive() == (1, b"two")
        assert not is_shown()
        left.close()
        assert is_shown(within_ms=10_000)
        with pytest.raises(ConnectionLost):
            right.poll()


def test_two_sides_that_both_send_much_do_not_wait_for_each_other() -> None:
    body = os.urandom(1 << 20)
    with _pair(level=0) as (left, right):
        senders = [
            threading.Thread(target=lambda end=end: [end.send(1, body) for _ in range(40)])
            for end in (left, right)
        ]
        for sender in senders:
            sender.start()
        for end in (left, right):
            assert all(end.receive() == (1, body) for _ in range(40))
        for sender in senders:
            sender.join(60)
            assert not sender.is_alive()


def test_what_compresses_goes_compressed_and_is_counted() -> None:
    with _pair() as (left, right):
        left.send(1, bytes(1 << 20))
        right.receive()
        left.flush()
        assert left.bytes_sent == right.bytes_received < 2000


def test_a_rate_is_kept() -> None:
    """Never faster; who shares the machine with others may have to try again to be as fast."""
    took: list[float] = []
    with _pair(level=0) as (left, right):
        left.rate = 1 << 20
        while len(took) < 5 and min(took, default=4) >= 4:
            began = time.monotonic()
            left.send(1, bytes(1 << 20))
            right.receive()
            took.append(time.monotonic() - began)
    assert min(took) > 0.5
    assert min(took) < 4


def test_what_a_slow_wire_carries_is_compressed_the_harder() -> None:
    """A compressor that is much quicker than the wire; each frame has the same words."""
    chance = random.Random(1)  # noqa: S311 - no secret
    words = [chance.randbytes(chance.randrange(3, 12)) for _ in range(500)]
    body = b" ".join(chance.choices(words, k=9000))
    sizes: list[int] = []
    with _pair() as (left, right):
        left.rate = 400_000
        while len(sizes) < 9 or (sizes[-1] > 0.95 * sizes[0] and len(sizes) < 400):
            before = left.bytes_sent
            left.send(1, body)
            right.receive()
            left.flush()
            sizes.append(left.bytes_sent - before)
    assert sizes[-1] < 0.95 * sizes[0]


def test_a_body_that_is_too_long_is_not_sent() -> None:
    with _pair() as (left, _), pytest.raises(ValueError, match="a frame of"):
        left.send(1, bytes(FRAME_LIMIT + 1))


def test_a_cut_connection_ends_both_ways() -> None:
    with _raw() as (channel, theirs):
        theirs.sendall(_frame(b"whole") + _frame(b"half", number=1)[:-2])
        assert channel.receive() == (3, b"whole")
        theirs.close()
        with pytest.raises(ConnectionLost, match="cut"):
            channel.receive()
        with pytest.raises(ConnectionLost):
            _send_much(channel)


def test_who_goes_without_reading_has_cut_the_connection_too() -> None:
    with _raw() as (channel, theirs):
        channel.send(1, b"never read")
        channel.flush()
        theirs.close()
        with pytest.raises(ConnectionLost, match="was cut: Connection reset") as found:
            channel.receive()
        assert found.value.hint == "what arrived is kept: run the command again"


def test_silence_ends_the_connection() -> None:
    with _raw(silence_s=0.3) as (channel, theirs):
        theirs.sendall(_frame(b"x")[:-1])
        with pytest.raises(ConnectionLost, match="nothing came"):
            channel.receive()


@pytest.mark.parametrize(
    "sent",
    [
        _frame(b"x", number=1),
        _frame(b"x", plain=2),
        _frame(b"x", packing=1),
        _frame(b"x", packing=7),
        _HEAD.pack(FRAME_LIMIT * 2, 5, 1, 0) + bytes(8),
        _HEAD.pack(5, 0xFFFFFFFF, 1, 1) + bytes(13),
        _frame(zstandard.compress(bytes(1 << 24)), plain=FRAME_LIMIT, packing=1),
        b"Last login: Sunday\r\nroot@other# ",
    ],
)
def test_what_is_no_frame_ends_the_connection(sent: bytes) -> None:
    with _raw() as (channel, theirs):
        theirs.sendall(sent)
        with pytest.raises(ToolError) as found:
            channel.receive()
    assert "nothing came" not in found.value.message


def test_a_login_shell_that_talks_is_named() -> None:
    with _raw() as (channel, theirs):
        theirs.sendall(b"Last login: Sunday\r\nroot@other# ")
        with pytest.raises(FormatUnknown, match="Last login"):
            channel.receive()


def test_a_bomb_is_refused_before_room_is_made() -> None:
    bomb = zstandard.compress(bytes(1 << 28))
    assert len(bomb) < 1 << 15
    for plain in (100, FRAME_LIMIT):
        with pytest.raises(ConnectionLost):
            unpack(bomb, plain, 1, zstandard.ZstdDecompressor())


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_no_change_to_a_stream_of_frames_goes_unseen(data: st.DataObject) -> None:
    """Flipped, dropped, repeated, cut: what is received is a beginning of what was sent."""
    bodies = data.draw(st.lists(st.binary(max_size=300), min_size=1, max_size=6))
    frames = [_frame(body, number=number) for number, body in enumerate(bodies)]
    stream = bytearray(b"".join(frames))
    at = data.draw(st.integers(0, len(stream) - 1))
    change = data.draw(st.sampled_from(["flip", "drop", "repeat", "cut", "swap"]))
    if change == "flip":
        stream[at] ^= data.draw(st.integers(1, 255))
    elif change == "drop":
        del stream[at : at + data.draw(st.integers(1, 40))]
    elif change == "repeat":
        number = data.draw(st.integers(0, len(frames) - 1))
        stream = bytearray(b"".join([*frames[: number + 1], *frames[number:]]))
    elif change == "swap" and len(frames) > 1:
        stream = bytearray(b"".join([frames[1], frames[0], *frames[2:]]))
    else:
        del stream[at:]
    got: list[bytes] = []
    with _raw() as (channel, theirs):
        theirs.sendall(stream)
        theirs.close()
        with pytest.raises(ToolError) as found:
            _receive_all(channel, got)
    assert "nothing came" not in found.value.message
    assert got == bodies[: len(got)]
