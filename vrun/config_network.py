"""Reads netns/ and spaces/ of a guest: which network it has."""

import re
from collections.abc import Iterator
from ipaddress import IPv4Address
from typing import Final, Literal, cast

from vrun.config_addresses import load_addresses, load_loopback
from vrun.errors import ConfigInvalid
from vrun.keys import Keys, first_of
from vrun.netvalues import parse_device, parse_guest
from vrun.spec import Address, Link, Network
from vstore.record import dataclass

_NETNS: Final = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}"
_KINDS: Final = ("veth", "bridge", "macvlan", "ipvlan")
_CLONE_NEWUSER: Final = 0x10000000
_CLONE_NEWNET: Final = 0x40000000


@dataclass(frozen=True, slots=True)
class NetworkSettings:
    """What the files say of the guest's network; the fields are those of GuestSpec."""

    network: Network
    join_net: str | None = None
    netns_name: str | None = None
    netns_keep: bool = False
    addresses: tuple[Address, ...] = ()
    loopback: IPv4Address | None = None
    links: tuple[Link, ...] = ()


def load_network(guest: Keys, defaults: Keys, *, name: str) -> NetworkSettings:
    """The network of the guest `name`, whose folder is `guest`; `defaults` is .defaults.

    Raises ConfigInvalid with the file of what cannot be meant.
    """
    netns = _netns(guest, defaults)
    network, joined = ("named", None) if netns else _network(guest)
    interfaces = guest / "interfaces"
    is_kept = netns is not None and netns.has("shared")
    if interfaces.entries() and (joined or is_kept):
        guest.warn("interfaces", "the network is there already; no address is added to it")
    return NetworkSettings(
        network,
        joined,
        netns_name=(_netns_name(netns) or name) if netns else None,
        netns_keep=is_kept,
        addresses=tuple(load_addresses(interfaces, defaults / "interfaces", network)),
        loopback=load_loopback(interfaces),
        links=tuple(_links(netns / "interfaces")) if netns else (),
    )


# --- spaces/ and the files beside it


def _network(guest: Keys) -> tuple[Network, str | None]:
    """How the guest reaches the network, and the guest whose namespace it shares."""
    spaces = guest / "spaces"
    mask = spaces.number("mask", least=0, most=0xFFFFFFFF) or 0
    if mask & _CLONE_NEWUSER:
        spaces.warn("mask", "the guest gets no user namespace")
    _check_pid_space(spaces)
    if spaces.has("net"):
        line = spaces.scalar("net")
        if line is None:
            return "own", None
        if line.text != "0":
            return "join", parse_guest(line)
    if mask & _CLONE_NEWNET:
        return "own", None
    return ("free" if guest.has("noncontext") else "bound"), None


def _check_pid_space(spaces: Keys) -> None:
    other = spaces.value("pid")
    if other not in (None, "0"):
        spaces.warn("pid", f"the guest has processes of its own and does not see those of {other}")


# --- netns/


def _netns(guest: Keys, defaults: Keys) -> Keys | None:
    """The folder that counts: the guest's, else the one of all guests."""
    if guest.has("nonetns"):
        return None
    source = first_of("netns", guest, defaults)
    return source / "netns" if source else None


def _netns_name(netns: Keys) -> str | None:
    line = netns.scalar("name")
    if line and not re.fullmatch(_NETNS, line.text):
        raise ConfigInvalid(f"{line.where}: {line.text!r} cannot name a network namespace")
    return line.text if line else None


def _links(interfaces: Keys) -> Iterator[Link]:
    """The devices of netns/interfaces; those without a name are numbered in their order."""
    unnamed = 0
    taken: dict[str, str] = {}
    for entry in interfaces.entries():
        keys = interfaces / entry
        line = keys.scalar("guest")
        guest = parse_device(line) if line else f"geth{unnamed}"
        unnamed += line is None
        if guest in taken:
            raise ConfigInvalid(
                f"{keys.path}: gives the guest a second {guest}, which {taken[guest]} is already"
            )
        taken[guest] = entry
        yield Link(entry=entry, kind=_kind(keys), host=_host(keys), guest=guest)


def _kind(keys: Keys) -> Literal["veth", "bridge", "macvlan", "ipvlan"]:
    line = keys.scalar("type")
    if line is None:
        return "veth"
    if line.text not in _KINDS:
        raise ConfigInvalid(
            f"{line.where}: {line.text!r} is no type of link", hint=f"known are {' '.join(_KINDS)}"
        )
    return cast(Literal["veth", "bridge", "macvlan", "ipvlan"], line.text)


def _host(keys: Keys) -> str | None:
    line = keys.scalar("host")
    if line:
        return parse_device(line)
    if _kind(keys) == "veth":
        return None
    raise ConfigInvalid(
        f"{keys.path / 'host'}: is missing, and a {_kind(keys)} needs the host's device in it"
    )
