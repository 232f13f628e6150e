"""Single values of a network configuration: addresses, masks, names of devices and guests.

They stand in files of a guest, in an old-style file and in options; each error names where.
"""

import re
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

from vrun.errors import ConfigInvalid, WrongUsage
from vrun.keys import Line, parse_number
from vstore.guest import parse_name

_DEVICE: Final = r"[^\s/:]{1,15}"
"""What the kernel takes for a device's name (IFNAMSIZ); a colon is for labels."""
LABEL_BYTES: Final = 15


def parse_ip(line: Line) -> IPv4Address | IPv6Address:
    """The address that the line is; raises ConfigInvalid with file and line."""
    try:
        found = ip_address(line.text)
    except ValueError as error:
        raise ConfigInvalid(f"{line.where}: {line.text!r} is no IP address") from error
    if isinstance(found, IPv6Address) and found.scope_id:
        raise ConfigInvalid(f"{line.where}: {line.text!r} names a device, which belongs into `dev`")
    if found.is_multicast:
        raise ConfigInvalid(f"{line.where}: {found} is a multicast address")
    return found


def parse_prefix(line: Line, ip: IPv4Address | IPv6Address) -> int:
    """The prefix length that the line is: `24`, or a mask like 255.255.255.0.

    Raises ConfigInvalid with file and line.
    """
    if line.text.isdigit():
        return parse_number(line, least=0, most=ip.max_prefixlen)
    try:
        hosts = 0xFFFFFFFF ^ int(IPv4Address(line.text))
    except ValueError as error:
        raise ConfigInvalid(f"{line.where}: {line.text!r} is no network mask") from error
    if hosts & (hosts + 1) or ip.version == 6:
        raise ConfigInvalid(f"{line.where}: {line.text!r} is no network mask for {ip}")
    return 32 - hosts.bit_length()


def parse_device(line: Line) -> str:
    """The name of a network device; raises ConfigInvalid with file and line."""
    if not re.fullmatch(_DEVICE, line.text) or line.text in (".", ".."):
        hint = "the alias goes into a file `name`" if ":" in line.text else None
        raise ConfigInvalid(f"{line.where}: {line.text!r} is no network device's name", hint=hint)
    return line.text


def parse_guest(line: Line) -> str:
    """A guest's name; raises ConfigInvalid with file and line."""
    try:
        return parse_name(line.text)
    except WrongUsage as error:
        raise ConfigInvalid(f"{line.where}: {error.message}") from error


def parse_label(line: Line, device: str) -> str:
    """The label of an address on the device; raises ConfigInvalid with file and line."""
    label = f"{device}:{line.text}"
    is_long = len(label.encode(errors="surrogateescape")) > LABEL_BYTES
    if is_long or line.text.split() != [line.text]:
        raise ConfigInvalid(f"{line.where}: {label!r} has blanks or more than {LABEL_BYTES} bytes")
    return label
