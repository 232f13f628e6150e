"""Asking a network whether an address is in use on it, before a guest takes it.

An ARP probe (RFC 5227) or a neighbour solicitation as of duplicate address detection (RFC 4862),
sent once. Other machines answer within a fraction of a millisecond; who does not is not there.
"""

import fcntl
import socket
import struct
import time
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address
from typing import Final

ANSWER_S: Final = 0.1
"""So long after the question an answer is waited for."""
_BUSY_S: Final = 1.0
"""So much longer on a network where frames never cease."""

_ETH_P_IP: Final = 0x0800  # linux/if_ether.h
_ETH_P_ARP: Final = 0x0806
_ETH_P_IPV6: Final = 0x86DD
_ARPHRD_ETHER: Final = 1
_REQUEST: Final = 1
_ETHERNET: Final = struct.Struct("!6s6sH")
_ARP: Final = struct.Struct("!HHBBH6s4s6s4s")
_IPV6: Final = struct.Struct("!IHBB16s16s")
_NEIGHBOUR: Final = struct.Struct("!BBHI16s")
_SOLICITATION: Final = 135
_ADVERTISEMENT: Final = 136
_LONGEST: Final = 128
_SIOCGIFFLAGS: Final = 0x8913
_IFF_UP: Final = 0x1
_IFF_NOARP: Final = 0x80


class Probe:
    """A question that was sent; a context manager. The answer may be fetched once, later."""

    def __init__(self, device: str, address: IPv4Address | IPv6Address) -> None:
        """Ask on `device`. On one that is missing, down or without neighbours nothing is asked."""
        self._address = address
        self._own = b""
        self._until = time.monotonic() + ANSWER_S
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        self._is_asked = False
        with suppress(OSError):  # the device is missing
            self._ask(device)

    def __enter__(self) -> "Probe":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def find_owner(self) -> str | None:
        """The hardware address that answered; None if none did within ANSWER_S of the question."""
        while self._is_asked and time.monotonic() < self._until + _BUSY_S:
            # After the time is over, what has come in the meantime is still looked at.
            self._socket.settimeout(max(self._until - time.monotonic(), 0.001))
            try:
                frame = self._socket.recv(_LONGEST)
            except OSError:
                return None
            owner = frame[6:12]
            if owner != self._own and answers(frame, self._address):
                return owner.hex(":")
        return None

    def _ask(self, device: str) -> None:
        protocol = _ETH_P_ARP if self._address.version == 4 else _ETH_P_IPV6
        self._socket.bind((device, protocol))
        *_, kind, self._own = self._socket.getsockname()
        if kind == _ARPHRD_ETHER and _has_neighbours(self._socket, device):
            self._socket.send(question(self._own, self._address))
            self._is_asked = True


def question(own: bytes, address: IPv4Address | IPv6Address) -> bytes:
    """The frame that asks for `address`, from the hardware address `own` and from no address."""
    if address.version == 4:
        head = _ETHERNET.pack(b"\xff" * 6, own, _ETH_P_ARP)
        kinds = (_ARPHRD_ETHER, _ETH_P_IP, 6, 4, _REQUEST)
        return head + _ARP.pack(*kinds, own, bytes(4), bytes(6), address.packed)
    low = address.packed[-3:]
    group = IPv6Address("ff02::1:ff00:0").packed[:-3] + low
    payload = _NEIGHBOUR.pack(_SOLICITATION, 0, 0, 0, address.packed)
    pseudo = bytes(16) + group + struct.pack("!II", len(payload), socket.IPPROTO_ICMPV6) + payload
    payload = payload[:2] + struct.pack("!H", _checksum(pseudo)) + payload[4:]
    packet = _IPV6.pack(6 << 28, len(payload), socket.IPPROTO_ICMPV6, 255, bytes(16), group)
    return _ETHERNET.pack(b"\x33\x33\xff" + low, own, _ETH_P_IPV6) + packet + payload


def answers(frame: bytes, address: IPv4Address | IPv6Address) -> bool:
    """Whether the frame says that its sender has the address."""
    rest = frame[_ETHERNET.size :]
    if address.version == 4:
        return len(rest) >= _ARP.size and _ARP.unpack_from(rest)[6] == address.packed
    if len(rest) < _IPV6.size + _NEIGHBOUR.size:
        return False
    _, _, protocol, hops, _, _ = _IPV6.unpack_from(rest)
    kind, _, _, _, target = _NEIGHBOUR.unpack_from(rest, _IPV6.size)
    is_said = protocol == socket.IPPROTO_ICMPV6 and hops == 255 and kind == _ADVERTISEMENT
    return is_said and bool(target == address.packed)


def _checksum(data: bytes) -> int:
    """Of RFC 1071; `data` has an even length."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _has_neighbours(asker: socket.socket, device: str) -> bool:
    asked = struct.pack("16sH14x", device.encode(), 0)
    (flags,) = struct.unpack("16xH14x", fcntl.ioctl(asker, _SIOCGIFFLAGS, asked))
    return bool(flags & _IFF_UP) and not flags & _IFF_NOARP
