"""What the kernel tells of addresses, as bytes."""

import socket
import struct

import pytest

from vstore.copy.hostaddresses import parse_address, split


def _message(kind: int, body: bytes) -> bytes:
    padding = bytes(-len(body) % 4)
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 1, 0) + body + padding


def _address(family: int, prefix: int, *attributes: tuple[int, bytes]) -> bytes:
    body = struct.pack("=BBBBI", family, prefix, 0, 0, 0)
    for kind, value in attributes:
        body += struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)
    return body


def test_messages_are_split_at_their_padded_ends() -> None:
    data = _message(20, b"abcde") + _message(3, b"") + _message(20, b"f")
    assert list(split(data)) == [(20, b"abcde"), (3, b""), (20, b"f")]


@pytest.mark.parametrize(
    "data", [b"short", struct.pack("=IHHII", 15, 3, 0, 1, 0), struct.pack("=IHHII", 99, 3, 0, 1, 0)]
)
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(OSError, match="Bad message"):
        list(split(data))


def test_the_own_end_counts_not_the_other_one() -> None:
    own, other = socket.inet_aton("10.9.1.1"), socket.inet_aton("10.9.1.2")
    body = _address(socket.AF_INET, 32, (3, b"eth0:x\0"), (1, other), (2, own))
    assert [found.address for found in parse_address(body)] == ["10.9.1.1"]


def test_an_address_of_ipv6_has_its_shortest_form() -> None:
    body = _address(socket.AF_INET6, 64, (1, socket.inet_pton(socket.AF_INET6, "fd09:0:0::1")))
    assert [found[:2] for found in parse_address(body)] == [("fd09::1", 64)]


@pytest.mark.parametrize(
    "body",
    [
        _address(socket.AF_INET, 8),
        _address(socket.AF_INET, 8, (1, b"abc")),
        _address(socket.AF_INET, 8) + struct.pack("=HH", 400, 1),
        _address(socket.AF_PACKET, 8, (1, b"abcd")),
    ],
)
def test_what_has_no_address_is_passed_by(body: bytes) -> None:
    assert list(parse_address(body)) == []
