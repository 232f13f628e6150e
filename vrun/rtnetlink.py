"""Addresses of network devices by rtnetlink(7): messages of pyroute2, and nothing else of it.

Whoever imports the package gets all that it can do, which takes 80 ms: twice as long as the rest of
a guest's start. What a module needs of it, load() makes importable without the rest.
"""

import itertools
import os
import socket
import struct
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any, Final

_PACKAGE: Final = "pyroute2"
_ERROR: Final = 2  # NLMSG_ERROR of linux/netlink.h
_DONE: Final = 3
_REQUEST: Final = 0x1
_ACK: Final = 0x4
_DUMP: Final = 0x300
_CREATE: Final = 0x600  # NLM_F_CREATE | NLM_F_EXCL
_NEW_LINK: Final = 16  # linux/rtnetlink.h
_NEW_ADDRESS: Final = 20
_DEL_ADDRESS: Final = 21
_GET_ADDRESS: Final = 22
_IFF_UP: Final = 1
_HEADER: Final = struct.Struct("=IHHII")  # struct nlmsghdr
_LINK: Final = struct.Struct("=BxHiII")  # struct ifinfomsg
_ERRNO: Final = struct.Struct("=i")  # begins struct nlmsgerr
_MOST_BYTES: Final = 1 << 16


def load() -> None:
    """Let modules of pyroute2 be imported each for itself; for a process that ends soon.

    Raises ImportError where there is no pyroute2.
    """
    if _PACKAGE in sys.modules:
        return
    spec = PathFinder.find_spec(_PACKAGE)
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError(f"{_PACKAGE} is not installed")
    package = ModuleType(_PACKAGE)
    package.__path__ = spec.submodule_search_locations
    package.__spec__ = spec
    sys.modules[_PACKAGE] = package


class Route:
    """A connection to the network namespace that this process was in when it was made."""

    def __init__(self) -> None:
        """Raises OSError."""
        load()
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC)
        self._numbers = itertools.count(1)

    def __enter__(self) -> "Route":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def has_address(self, index: int, address: str, prefix: int) -> bool:
        """Whether the device has the address, with that prefix. Raises OSError."""
        found = {
            (message["index"], message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS"))
            for message in self._dump_addresses(_family(address))
            if message["prefixlen"] == prefix
        }
        return (index, address) in found

    def add_address(
        self, index: int, address: str, prefix: int, *, scope: int = 0, **attributes: Any
    ) -> None:
        """Give the device an address; `attributes` are IFA_* of linux/if_addr.h.

        IFA_ADDRESS is the other end of a line between two. Raises OSError: EEXIST where it has it.
        """
        message = _address(index, address, prefix, attributes)
        message["scope"] = scope
        self._ask(_NEW_ADDRESS, _CREATE, _encoded(message))

    def remove_address(self, index: int, address: str, prefix: int, peer: str) -> None:
        """Take it away; raises OSError: EADDRNOTAVAIL where it is gone."""
        message = _address(index, address, prefix, {"IFA_ADDRESS": peer} if peer else {})
        self._ask(_DEL_ADDRESS, 0, _encoded(message))

    def set_up(self, index: int) -> None:
        """Switch the device on. Raises OSError."""
        self._ask(_NEW_LINK, 0, _LINK.pack(socket.AF_UNSPEC, 0, index, _IFF_UP, _IFF_UP))

    def _ask(self, kind: int, flags: int, body: bytes) -> None:
        """Send a request, and wait until it is carried out."""
        for _ in self._answers(self._send(kind, _ACK | flags, body)):
            pass

    def _dump_addresses(self, family: int) -> Iterator[Any]:
        from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg

        wanted = ifaddrmsg()
        wanted["family"] = family
        for answer in self._answers(self._send(_GET_ADDRESS, _DUMP, _encoded(wanted))):
            message = ifaddrmsg(answer)
            message.decode()
            yield message

    def _send(self, kind: int, flags: int, body: bytes) -> int:
        """Send a request; its number."""
        number = next(self._numbers)
        head = _HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | flags, number, 0)
        self._socket.send(head + body)
        return number

    def _answers(self, number: int) -> Iterator[bytes]:
        """The messages that answer the request, whole; raises OSError for a refusal."""
        while True:
            data = self._socket.recv(_MOST_BYTES)
            while data:
                length, kind, _, answered, _ = _HEADER.unpack_from(data)
                message, data = data[:length], data[(length + 3) & ~3 :]
                if answered != number:
                    continue
                if kind == _DONE:
                    return
                if kind == _ERROR:
                    (code,) = _ERRNO.unpack_from(message, _HEADER.size)
                    if code:
                        raise OSError(-code, os.strerror(-code))
                    return
                yield message


def _family(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _address(index: int, address: str, prefix: int, attributes: dict[str, Any]) -> Any:
    from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg

    message = ifaddrmsg()
    message["family"] = _family(address)
    message["index"] = index
    message["prefixlen"] = prefix
    message["attrs"] = [*{"IFA_LOCAL": address, "IFA_ADDRESS": address, **attributes}.items()]
    return message


def _encoded(message: Any) -> bytes:
    """The message without its header, which is ours."""
    message.encode()
    return bytes(message.data[_HEADER.size :])
