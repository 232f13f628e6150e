"""The addresses of this machine, in the network namespace of the process."""

import socket
from ipaddress import ip_address
from typing import NamedTuple

from vstore.errors import ToolError


class HostAddress(NamedTuple):
    """An address, in its shortest form, and where it stands."""

    address: str
    prefix: int
    device: str


def load_host_addresses() -> list[HostAddress]:
    """All of them, of both families. Raises ToolError. See rtnetlink(7)."""
    # takes as long to load as all else: not before somebody asks
    from pyroute2.iproute.linux import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with IPRoute() as route:
            found = []
            for message in route.get_addr():
                own = message.get("IFA_LOCAL") or message.get("IFA_ADDRESS")
                device = _name_of(message["index"])
                found.append(HostAddress(f"{ip_address(own)}", message["prefixlen"], device))
            return found
    except (OSError, NetlinkError) as error:
        raise ToolError(f"the addresses of this machine cannot be found out: {error}") from error


def _name_of(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:  # it has just been removed
        return f"{index}"
