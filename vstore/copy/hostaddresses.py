"""The addresses that this machine has on its interfaces, as the kernel tells them: rtnetlink(7).

They are those of the network namespace that the process is in.
"""

import errno
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import ip_address
from typing import Final, NamedTuple

from vstore.errors import ToolError

_ERROR: Final = 2  # NLMSG_ERROR of linux/netlink.h
_DONE: Final = 3
_WANTED: Final = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_NEW_ADDRESS: Final = 20  # linux/rtnetlink.h
_GET_ADDRESS: Final = 22
_IFA_ADDRESS: Final = 1  # linux/if_addr.h: of the other end, where there is one
_IFA_LOCAL: Final = 2
_HEADER: Final = struct.Struct("=IHHII")  # struct nlmsghdr
_MESSAGE: Final = struct.Struct("=BBBBI")  # struct ifaddrmsg
_ATTRIBUTE: Final = struct.Struct("=HH")  # struct rtattr
_ERRNO: Final = struct.Struct("=i")  # begins struct nlmsgerr
_MOST_BYTES: Final = 1 << 16


class HostAddress(NamedTuple):
    """An address, in its shortest form, and where it stands."""

    address: str
    prefix: int
    device: str


def load_host_addresses() -> list[HostAddress]:
    """All of them, of both families. Raises ToolError."""
    try:
        return list(_load())
    except OSError as error:
        raise ToolError(
            f"the addresses of this machine cannot be found out: {error.strerror}"
        ) from error


def _load() -> Iterator[HostAddress]:
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
    with socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE) as asking:
        body = _MESSAGE.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
        size = _HEADER.size + len(body)
        asking.send(_HEADER.pack(size, _GET_ADDRESS, _WANTED, 1, 0) + body)
        while True:
            for message, body in split(asking.recv(_MOST_BYTES)):
                if message == _DONE:
                    return
                if message == _ERROR:
                    number = -_ERRNO.unpack_from(body)[0]
                    raise OSError(number, os.strerror(number))
                if message == _NEW_ADDRESS:
                    yield from parse_address(body)


def split(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The types and bodies of netlink's messages. Raises OSError for what is none."""
    while data:
        if len(data) < _HEADER.size:
            raise OSError(errno.EBADMSG, os.strerror(errno.EBADMSG))
        size, kind, *_ = _HEADER.unpack_from(data)
        if not _HEADER.size <= size <= len(data):
            raise OSError(errno.EBADMSG, os.strerror(errno.EBADMSG))
        yield kind, data[_HEADER.size : size]
        data = data[_padded(size) :]


def parse_address(body: bytes) -> Iterator[HostAddress]:
    """What RTM_NEWADDR tells of an address of IPv4 or IPv6, which is not always one."""
    family, prefix, _, _, index = _MESSAGE.unpack_from(body)
    if family not in (socket.AF_INET, socket.AF_INET6):
        return
    found: dict[int, bytes] = {}
    data = body[_MESSAGE.size :]
    while len(data) >= _ATTRIBUTE.size:
        size, kind = _ATTRIBUTE.unpack_from(data)
        if not _ATTRIBUTE.size <= size <= len(data):
            break
        found[kind] = data[_ATTRIBUTE.size : size]
        data = data[_padded(size) :]
    own = found.get(_IFA_LOCAL, found.get(_IFA_ADDRESS, b""))
    with suppress(ValueError):
        yield HostAddress(f"{ip_address(own)}", prefix, _name_of(index))


def _padded(size: int) -> int:
    return (size + 3) & ~3


def _name_of(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:  # it has just been removed
        return f"{index}"
