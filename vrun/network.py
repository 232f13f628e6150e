"""The network of guests: addresses on the host's devices, or a network namespace of their own.

Everything here belongs into a child that ends soon: pyroute2 takes its time and some megabytes, and
configure_own() leaves the caller in the guest's network namespace.
"""

import errno
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from pathlib import Path
from typing import Any, Final

from vrun import syscalls
from vrun.claims import Claims, Thing, locked
from vrun.errors import ToolError
from vrun.rtnetlink import Route, load
from vrun.spec import Address, Link
from vrun.wire import Probe

_NODAD: Final = 2  # linux/if_addr.h: usable at once
_SCOPES: Final = {"global": 0, "site": 200, "link": 253, "host": 254, "nowhere": 255}
_PROMOTE: Final = "/proc/sys/net/ipv4/conf/{}/promote_secondaries"
_MADE_UP: Final = "vs{}-{}"
"""The host's end of a pair that no file names, by the guest's number and a count."""


def bring_up(name: str, addresses: Sequence[Address]) -> list[str]:
    """Give the host the addresses of the guest `name` that it does not have yet.

    Returns what an administrator should know of them.

    VLAN and tun or tap devices are made, and devices set up. An address that has no device in the
    configuration must be there. Raises ToolError, with nothing of the guest left, for that, for a
    missing device, an address that another machine answers for, or what the kernel refuses.
    """
    for address in addresses:
        if address.device is None:
            _check_local(address)
    wanted = [address for address in addresses if address.device is not None]
    notes: list[str] = []
    if not wanted:
        return notes
    with ExitStack() as stack:
        probes = [(address, stack.enter_context(probe)) for address, probe in _ask(wanted)]
        for address, probe in probes:
            _check_unused(address, probe.find_owner())
        claims = stack.enter_context(locked())
        host = stack.enter_context(_Namespace())
        try:
            for address in wanted:
                notes += _add_on_host(host, claims, name, address)
        except BaseException:
            _release(host, claims, name)
            raise
    return notes


def take_down(name: str) -> None:
    """Take from the host what the guest `name` had of its network and no other guest uses.

    Addresses and devices that were there before stay, and so do all of a device when an address
    goes that was its first. What is gone already is no error. Raises ToolError.
    """
    with locked() as claims:
        if not claims.used_by(name):
            return
        with _Namespace() as host:
            _release(host, claims, name)


def configure_own(
    name: str, xid: int, links: Sequence[Link], addresses: Sequence[Address], netns_fd: int
) -> None:
    """Set up the guest's own network namespace: devices, loopback, addresses, default routes.

    The caller is in it afterwards. take_down() removes what stands on the host's side, after a
    ToolError too.
    """
    with locked() as claims, _Namespace() as host:
        for index, link in enumerate(links):
            _make_link(host, claims, name, link, _MADE_UP.format(xid, index), netns_fd)
    syscalls.setns(netns_fd, syscalls.CLONE_NEWNET)
    with _Namespace() as own:
        own.set_up("lo")
        for link in links:
            own.set_up(link.guest)
        for address in addresses:
            if address.device is not None:
                if address.vlan or address.tuntap:
                    own.make_device_of(address)
                own.add_address(address)
        for address in addresses:
            if address.gateway is not None:
                own.add_default_route(address)


class _Namespace:
    """The network namespace of this process; failures become ToolErrors that say of what.

    What every guest with addresses needs is done by rtnetlink.py, devices and routes by pyroute2.
    """

    def __init__(self) -> None:
        self._route = Route()
        self._opened = ExitStack()
        self._opened.enter_context(self._route)

    def __enter__(self) -> "_Namespace":
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    @cached_property
    def _netlink(self) -> Any:
        load()
        from pyroute2.iproute.linux import IPRoute

        return self._opened.enter_context(IPRoute())

    def find_device(self, device: str) -> int | None:
        """The device's index."""
        try:
            return socket.if_nametoindex(device)
        except OSError:
            return None

    def index_of(self, device: str, where: str) -> int:
        index = self.find_device(device)
        if index is None:
            raise ToolError(
                f"{where}: there is no network device {device}", hint="see them with: ip link"
            )
        return index

    def set_up(self, device: str) -> None:
        with _saying(f"cannot set the device {device} up"):
            self._route.set_up(self.index_of(device, "start"))

    def add_device(self, device: str, kind: str, **options: Any) -> None:
        with _saying(f"cannot make the {kind} device {device}"):
            self._netlink.link("add", ifname=device, kind=kind, **options)

    def make_device_of(self, address: Address) -> None:
        """Make the VLAN, tun or tap device of the address; one that is there stays."""
        device = address.device or ""
        if self.find_device(device) is not None:
            return
        if address.vlan:
            parent, _, number = device.rpartition(".")
            lower = self.index_of(parent, _where(address))
            self.add_device(device, "vlan", link=lower, vlan_id=int(number))
        else:
            owner = {"uid": address.tuntap_uid, "gid": address.tuntap_gid}
            given = {key: value for key, value in owner.items() if value is not None}
            self.add_device(device, "tuntap", mode=address.tuntap, **given)

    def add_to_bridge(self, device: str, bridge: str, where: str) -> None:
        master = self.index_of(bridge, where)
        with _saying(f"{where}: cannot make {device} a port of the bridge {bridge}"):
            self._netlink.link("set", index=self.index_of(device, where), master=master)

    def remove_device(self, device: str) -> None:
        index = self.find_device(device)
        if index is not None:
            with _saying(f"cannot remove the device {device}", errno.ENODEV):
                self._netlink.link("del", index=index)

    def has_address(self, address: Address) -> bool:
        """Whether the device has the address with that prefix."""
        index = self.index_of(address.device or "", _where(address))
        return self._route.has_address(index, str(address.ip), address.prefix)

    def add_address(self, address: Address) -> None:
        """Add the address to its device, and set that up; one that is there is no error."""
        index = self.index_of(address.device or "", _where(address))
        with _saying(
            f"{_where(address)}: cannot add {address.ip} to {address.device}", errno.EEXIST
        ):
            self._route.add_address(
                index,
                str(address.ip),
                address.prefix,
                scope=_scope_of(address),
                **_attributes_of(address),
            )
        if address.up:
            self.set_up(address.device or "")

    def remove_address(self, thing: Thing) -> None:
        index = self.find_device(thing.device)
        if index is None:
            return
        local, _, prefix = thing.address.partition("/")
        with (
            _promoting(thing.device),
            _saying(f"cannot remove {local} from {thing.device}", *_GONE),
        ):
            self._route.remove_address(index, local, int(prefix), thing.peer)

    def add_default_route(self, address: Address) -> None:
        where = _where(address)
        index = self.index_of(address.device or "", where)
        family = socket.AF_INET if address.is_ipv4 else socket.AF_INET6
        with _saying(f"{where}: cannot add the gateway {address.gateway}", errno.EEXIST):
            self._netlink.route(
                "add", dst="default", gateway=str(address.gateway), oif=index, family=family
            )


_GONE: Final = (errno.EADDRNOTAVAIL, errno.ENODEV)


@contextmanager
def _saying(what: str, *accepted: int) -> Iterator[None]:
    """Turn a refusal of the kernel into a ToolError, but for errors that are as good as done."""
    try:
        yield
    except _refusals() as error:
        code = (error.errno if isinstance(error, OSError) else error.code) or 0
        if code in accepted:
            return
        hint = None
        if code == errno.EOPNOTSUPP:
            hint = "the kernel lacks it: see modprobe and the kernel's configuration"
        raise ToolError(f"{what}: {os.strerror(code)}", hint=hint) from error


def _refusals() -> tuple[Any, ...]:
    """What the two ways to the kernel raise."""
    load()
    from pyroute2.netlink.exceptions import NetlinkError

    return (OSError, NetlinkError)


@contextmanager
def _promoting(device: str) -> Iterator[None]:
    """Let others of a network stay on the device when its first address goes; ip-sysctl.rst."""
    path = Path(_PROMOTE.format(device))
    was = path.read_text() if path.exists() else ""
    if was.strip() != "0" or Path(_PROMOTE.format("all")).read_text().strip() != "0":
        yield
        return
    path.write_text("1")
    try:
        yield
    finally:
        with suppress(OSError):
            path.write_text(was)


def _where(address: Address) -> str:
    return f"interfaces/{address.entry}"


def _attributes_of(address: Address) -> dict[str, Any]:
    """What rtnetlink has to know of it."""
    attributes: dict[str, Any] = {}
    if address.peer is not None:
        attributes["IFA_ADDRESS"] = str(address.peer)
    if not address.is_ipv4:
        return attributes | {"IFA_FLAGS": _NODAD}
    broadcast = address.broadcast or _broadcast(address)
    if broadcast is not None:
        attributes["IFA_BROADCAST"] = str(broadcast)
    if address.label:
        attributes["IFA_LABEL"] = address.label
    return attributes


def _scope_of(address: Address) -> int:
    """Where it is known; IPv4 only. Unless a file says otherwise that is everywhere, or the host
    alone for one of the loopback network: the kernel takes no other.
    """
    if not address.is_ipv4:
        return 0
    if address.scope is None:
        return _SCOPES["host"] if address.ip.is_loopback else 0
    known = _SCOPES.get(address.scope)
    return int(address.scope) if known is None else known


def _broadcast(address: Address) -> IPv4Address | None:
    """What ip(8) computes for `broadcast +`."""
    if address.prefix > 30 or address.peer is not None:
        return None
    return IPv4Network(f"{address.ip}/{address.prefix}", strict=False).broadcast_address


# --- the host's side


def _ask(addresses: Sequence[Address]) -> Iterator[tuple[Address, Probe]]:
    """Questions for those addresses that this host does not have."""
    for address in addresses:
        if not _is_local(address.ip):
            yield address, Probe(address.device or "", address.ip)


def _check_unused(address: Address, owner: str | None) -> None:
    if owner is not None:
        raise ToolError(
            f"{_where(address)}: {address.ip} is in use on {address.device}: {owner} answers",
            hint="stop the machine or guest that has the address, or give this guest another",
        )


def _check_local(address: Address) -> None:
    if not _is_local(address.ip):
        raise ToolError(
            f"{_where(address)}: {address.ip} is no address of this host",
            hint=f"name the device that it is to be added to in {_where(address)}/dev",
        )


def _is_local(ip: IPv4Address | IPv6Address) -> bool:
    """Whether this host has the address on some device."""
    family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as asker:
            asker.bind((str(ip), 0))
    except OSError as error:
        return error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
    return True


def _add_on_host(host: _Namespace, claims: Claims, name: str, address: Address) -> list[str]:
    device = address.device or ""
    if address.vlan or address.tuntap:
        _make_device(host, claims, name, address)
    peer = "" if address.peer is None else str(address.peer)
    thing = Thing("address", device, f"{address.ip}/{address.prefix}", peer)
    exists = host.has_address(address)
    claims.add(thing, name, exists=exists)
    notes = []
    if not exists and _is_local(address.ip):
        notes.append(
            f"{_where(address)}: this host has the address {address.ip} already, with another "
            f"device or prefix; {device} gets it too"
        )
    host.add_address(address)
    return notes


def _make_device(host: _Namespace, claims: Claims, name: str, address: Address) -> None:
    device = address.device or ""
    exists = host.find_device(device) is not None
    claims.add(Thing("device", device), name, exists=exists)
    host.make_device_of(address)


def _make_link(
    host: _Namespace, claims: Claims, name: str, link: Link, made_up: str, netns_fd: int
) -> None:
    """Make a device for the guest in its network namespace."""
    where = f"netns/interfaces/{link.entry}"
    if link.kind in ("macvlan", "ipvlan"):
        lower = host.index_of(link.host or "", where)
        mode = {"macvlan_mode": "bridge"} if link.kind == "macvlan" else {"ipvlan_mode": 0}
        host.add_device(link.guest, link.kind, link=lower, net_ns_fd=netns_fd, **mode)
        return
    end = link.host if link.kind == "veth" and link.host else made_up
    if host.find_device(end) is not None:
        raise ToolError(
            f"{where}: the host has a network device {end} already",
            hint=f"choose another name in {where}/host, or remove it: ip link del {end}",
        )
    claims.add(Thing("device", end), name, exists=False)
    host.add_device(end, "veth", peer={"ifname": link.guest, "net_ns_fd": netns_fd})
    if link.kind == "bridge":
        host.add_to_bridge(end, link.host or "", where)
    host.set_up(end)


def _release(host: _Namespace, claims: Claims, name: str) -> None:
    for thing in claims.used_by(name):
        if claims.must_go(thing, name):
            if thing.kind == "address":
                host.remove_address(thing)
            else:
                host.remove_device(thing.device)
        claims.drop(thing, name)
