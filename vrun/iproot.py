"""IPROOT of an old-style guest: `[dev:]ip[/mask]`, separated by blanks."""

import fcntl
import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address
from typing import Final

from vrun.errors import ConfigInvalid
from vrun.keys import Line
from vrun.netvalues import LABEL_BYTES, parse_device, parse_ip, parse_prefix
from vrun.spec import Address

_FREE: Final = frozenset({"", "0.0.0.0", "ALL"})  # noqa: S104 (names no socket)
_SIOCGIFNETMASK: Final = 0x891B
"""Of linux/sockios.h; see netdevice(7)."""
_IFREQ: Final = struct.Struct("16s4x4s16x")


def is_free(text: str) -> bool:
    """Whether this IPROOT leaves the guest all addresses of the host."""
    return text.strip() in _FREE


def parse_iproot(
    iproot: Line, *, device: Line, mask: Line, broadcast: Line, name: str
) -> Iterator[Address]:
    """The addresses of IPROOT, with IPROOTDEV, IPROOTMASK and IPROOTBCAST for what it leaves out.

    A mask that stands nowhere is the device's own, as it is now. Labels are DEV:NAME, DEV:NAME1 and
    so on, cut to the kernel's 15 bytes. Raises ConfigInvalid with the file and variable.
    """
    seen: set[IPv4Address] = set()
    for number, item in enumerate(iproot.text.split()):
        before, _, rest = item.rpartition(":")
        text, _, own_mask = rest.partition("/")
        ip = parse_ip(Line(iproot.where, text))
        if not isinstance(ip, IPv4Address) or ip.is_unspecified or ip in seen:
            raise ConfigInvalid(
                f"{iproot.where}: {item!r} is no address of a guest, or twice there"
            )
        seen.add(ip)
        chosen = Line(iproot.where, before) if before else device
        on = parse_device(chosen) if chosen.text else None
        given = Line(iproot.where, own_mask) if own_mask else mask
        yield Address(
            entry=f"{number}",
            ip=ip,
            prefix=parse_prefix(given, ip) if given.text else _prefix_of(on),
            device=on,
            label=_label(on, name, number) if on else None,
            broadcast=_broadcast(broadcast),
            vlan=on is not None and "." in on,
        )


def _broadcast(line: Line) -> IPv4Address | None:
    found = parse_ip(line) if line.text else None
    if found is None or isinstance(found, IPv4Address):
        return found
    raise ConfigInvalid(f"{line.where}: {found} is no IPv4 address")


def _label(device: str, name: str, number: int) -> str:
    suffix = f"{number or ''}"
    return f"{device}:{name}"[: LABEL_BYTES - len(suffix)] + suffix


def _prefix_of(device: str | None) -> int:
    """The prefix length of the device's first address; 32 where it has none."""
    if device is None:
        return 32
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        request = _IFREQ.pack(device.encode(errors="surrogateescape"), b"\0" * 4)
        try:
            answer = fcntl.ioctl(asking, _SIOCGIFNETMASK, request)
        except OSError:
            return 32
    return int.from_bytes(_IFREQ.unpack(answer)[1], "big").bit_count()
