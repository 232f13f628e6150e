"""Reads interfaces/ of a guest: its addresses, and the devices that are made for them."""

import re
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address
from typing import Final, Literal

from vrun.errors import ConfigInvalid
from vrun.keys import Keys, Line, key_names, parse_number
from vrun.netvalues import parse_device, parse_ip, parse_label, parse_prefix
from vrun.spec import Address, Network

_VLAN: Final = r"[^\s/:]+\.([0-9]{1,4})"
_VLAN_IDS: Final = range(1, 4095)
_SCOPES: Final = frozenset({"global", "site", "link", "host", "nowhere"})
_SHARED_KEYS: Final = key_names("bcast lback dev prefix mask scope extip vlandev novlandev gateway")
_KEYS: Final = _SHARED_KEYS | key_names(
    "ip name peer nodev only_ip disabled down tun tap nocsum shared uid gid linktype indirect mac"
)
_ABANDONED: Final = ("indirect", "mac", "extip")
_TUN_DETAILS: Final = ("nocsum", "shared", "linktype")


def load_loopback(interfaces: Keys) -> IPv4Address | None:
    """What 127.0.0.1 means inside; raises ConfigInvalid with the file."""
    line = interfaces.scalar("lback")
    if line is None:
        return None
    found = parse_ip(line)
    if not isinstance(found, IPv4Address) or not found.is_loopback:
        raise ConfigInvalid(f"{line.where}: {found} is not in 127.0.0.0/8")
    return found


def load_addresses(interfaces: Keys, defaults: Keys, network: Network) -> Iterator[Address]:
    """The addresses in the order of their entries; `defaults` is .defaults/interfaces.

    Raises ConfigInvalid with the file.
    """
    interfaces.warn_misspelt(_SHARED_KEYS | frozenset(interfaces.entries()))
    if interfaces.has("extip"):
        _warn_abandoned(interfaces, "extip")
    if network in ("bound", "free") and interfaces.has("gateway"):
        _warn_gateway(interfaces)
    seen: dict[IPv4Address | IPv6Address, str] = {}
    for entry in interfaces.entries():
        keys = interfaces / entry
        keys.warn_misspelt(_KEYS)
        if keys.has("disabled"):
            continue
        address = _Entry(keys, interfaces, defaults, network).read(entry)
        if address.ip in seen:
            raise ConfigInvalid(
                f"{keys.path}/ip: entry {seen[address.ip]} has {address.ip} already"
            )
        seen[address.ip] = entry
        yield address


def _warn_abandoned(keys: Keys, key: str) -> None:
    keys.warn(key, "devices of a guest's own are made with netns/, not with this key")


def _warn_gateway(keys: Keys) -> None:
    keys.warn("gateway", "the guest has the host's routes; spaces/net gives it its own")


class _Entry:
    """One folder of interfaces/, and the folders that its values are inherited from."""

    __slots__ = ("_all", "_defaults", "_keys", "_network")

    def __init__(self, keys: Keys, shared: Keys, defaults: Keys, network: Network) -> None:
        self._keys = keys
        self._all = shared
        self._defaults = defaults
        self._network = network

    def read(self, entry: str) -> Address:
        keys = self._keys
        for key in filter(keys.has, _ABANDONED):
            _warn_abandoned(keys, key)
        ip, own_prefix = self._ip()
        device = self._device()
        tuntap = self._tuntap(device)
        return Address(
            entry=entry,
            ip=ip,
            prefix=self._prefix(ip, own_prefix),
            device=device,
            label=self._label(ip, device),
            broadcast=self._broadcast(ip),
            scope=self._scope(),
            peer=self._peer(ip),
            gateway=self._gateway(ip),
            up=not keys.has("down"),
            vlan=self._is_vlan(device),
            tuntap=tuntap,
            tuntap_uid=keys.number("uid", least=0, most=0xFFFFFFFE) if tuntap else None,
            tuntap_gid=keys.number("gid", least=0, most=0xFFFFFFFE) if tuntap else None,
        )

    def _inherited(self, key: str) -> Line | None:
        return self._keys.scalar(key) or self._all.scalar(key)

    def _ip(self) -> tuple[IPv4Address | IPv6Address, int | None]:
        """The address, and the prefix that stands behind a slash in the same file."""
        line = self._keys.scalar("ip")
        if line is None:
            raise ConfigInvalid(
                f"{self._keys.path / 'ip'}: is missing or empty",
                hint="write the address into it; an empty file `disabled` turns an entry off",
            )
        if "/" not in line.text:
            return _not_any(parse_ip(line), line), None
        text, _, prefix = line.text.partition("/")
        ip = _not_any(parse_ip(Line(line.where, text)), line)
        return ip, parse_prefix(Line(line.where, prefix), ip)

    def _prefix(self, ip: IPv4Address | IPv6Address, own: int | None) -> int:
        if own is not None:
            return own
        line = self._inherited("prefix")
        mask = self._keys.scalar("mask")
        if line and mask:
            self._keys.warn("mask", f"is not read, since there is {line.where.rpartition(':')[0]}")
        line = line or mask
        if line is None and ip.version == 4:
            line = self._all.scalar("mask")
        return parse_prefix(line, ip) if line else ip.max_prefixlen

    def _device(self) -> str | None:
        keys = self._keys
        if keys.has("only_ip"):
            keys.warn("only_ip", "is obsolete; use nodev")
        if keys.has("nodev") or keys.has("only_ip"):
            return None
        line = self._inherited("dev")
        if line is None:
            raise ConfigInvalid(
                f"{keys.path / 'dev'}: is missing, and {self._all.path / 'dev'} too",
                hint="write the device into one of them, or make an empty file `nodev` beside `ip` "
                "if the address exists already",
            )
        return parse_device(line)

    def _label(self, ip: IPv4Address | IPv6Address, device: str | None) -> str | None:
        line = self._keys.scalar("name")
        if line is None or device is None:
            return None
        if ip.version == 6:
            self._keys.warn("name", "an IPv6 address has no label")
            return None
        return parse_label(line, device)

    def _broadcast(self, ip: IPv4Address | IPv6Address) -> IPv4Address | None:
        line = self._inherited("bcast")
        if line is None or line.text == "+" or ip.version == 6:
            return None
        try:
            return IPv4Address(line.text)
        except ValueError as error:
            raise ConfigInvalid(f"{line.where}: {line.text!r} is no IPv4 address") from error

    def _scope(self) -> str | None:
        line = self._inherited("scope")
        if line and line.text not in _SCOPES:
            parse_number(line, least=0, most=255)
        return line.text if line else None

    def _peer(self, ip: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address | None:
        return self._other("peer", self._keys.scalar("peer"), ip)

    def _gateway(self, ip: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address | None:
        """Its own, or the one of all entries where that is an address of the same kind."""
        if self._network in ("bound", "free"):
            if self._keys.has("gateway"):
                _warn_gateway(self._keys)
            return None
        shared = self._all.scalar("gateway")
        if shared and parse_ip(shared).version != ip.version:
            shared = None
        return self._other("gateway", self._keys.scalar("gateway") or shared, ip)

    def _other(
        self, key: str, line: Line | None, ip: IPv4Address | IPv6Address
    ) -> IPv4Address | IPv6Address | None:
        """Another address, which has to be of the entry's kind."""
        if line is None:
            return None
        found = parse_ip(Line(line.where, line.text.partition("/")[0]))
        if found.version != ip.version:
            raise ConfigInvalid(f"{line.where}: the {key} {found} does not go with {ip}")
        return found

    def _is_vlan(self, device: str | None) -> bool:
        """Whether the device is one that a start makes: eth0.231."""
        if device is None or not self._wants_vlan():
            return False
        if device.startswith("vlan"):
            raise ConfigInvalid(
                f"{self._keys.path}: {device} cannot be made, since its name has no parent in it",
                hint="name it PARENT.ID (eth0.231), or make it before and use nodev",
            )
        match = re.fullmatch(_VLAN, device)
        if match and int(match[1]) not in _VLAN_IDS:
            raise ConfigInvalid(f"{self._keys.path}: {device}: {match[1]} is no number of a vlan")
        return match is not None

    def _wants_vlan(self) -> bool:
        if self._keys.has("vlandev"):
            return True
        if self._keys.has("novlandev"):
            return False
        if self._all.has("vlandev"):
            return True
        return self._defaults.has("vlandev") and not self._all.has("novlandev")

    def _tuntap(self, device: str | None) -> Literal["tun", "tap"] | None:
        keys = self._keys
        has_tun, has_tap = keys.has("tun"), keys.has("tap")
        if not has_tun and not has_tap:
            return None
        for key in filter(keys.has, _TUN_DETAILS):
            keys.warn(key, "is not set on the tun device that is made")
        if has_tun and has_tap:
            raise ConfigInvalid(f"{keys.path}: has both tun and tap, and a device is one of them")
        if device is None:
            raise ConfigInvalid(f"{keys.path}: a tun or tap device needs a name in `dev`")
        return "tun" if has_tun else "tap"


def _not_any(ip: IPv4Address | IPv6Address, line: Line) -> IPv4Address | IPv6Address:
    if ip.is_unspecified:
        raise ConfigInvalid(
            f"{line.where}: {line.text} is no address of a guest",
            hint="an empty file `noncontext` leaves the guest all addresses of the host",
        )
    return ip
