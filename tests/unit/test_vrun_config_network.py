"""interfaces/, netns/ and spaces/: the kind of network that a guest has, and its addresses."""

from ipaddress import IPv4Address, ip_address
from pathlib import Path

import pytest

from tests.fixtures.guestconfig import Configuration, Keys, configure
from vrun.errors import ConfigInvalid
from vrun.spec import Address, Link, Network


@pytest.fixture
def etc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configuration:
    return configure(tmp_path, monkeypatch)


def entry(**keys: str | bool) -> Keys:
    """The keys of interfaces/0; `device=` is not given unless asked for."""
    return {f"interfaces/0/{key}": value for key, value in keys.items()}


def one_address(etc: Configuration, keys: Keys) -> Address:
    [address] = etc.spec_of(keys).addresses
    return address


# --- kinds of network


@pytest.mark.parametrize(
    ("keys", "network"),
    [
        ({}, "bound"),
        ({"noncontext": True}, "free"),
        ({"spaces/net": True}, "own"),
        ({"spaces/net": "0"}, "bound"),
        ({"spaces/net": "0", "noncontext": True}, "free"),
        ({"spaces/net": "db"}, "join"),
        ({"spaces/mask": "0x40000000"}, "own"),
        ({"spaces/mask": "0x20000"}, "bound"),
        ({"spaces/net": "0", "spaces/mask": "1073741824"}, "own"),
        ({"netns/name": "blue"}, "named"),
        ({"netns/interfaces/0/host": "v-web"}, "named"),
        ({"netns/name": "blue", "nonetns": True}, "bound"),
        ({"netns": False}, "named"),
    ],
)
def test_the_files_tell_the_kind_of_network(
    etc: Configuration, keys: Keys, network: Network
) -> None:
    spec = etc.spec_of(keys)
    assert (spec.network, spec.warnings) == (network, ())
    assert spec.has_own_network == (network in ("own", "join", "named"))


def test_another_guests_network_is_named(etc: Configuration) -> None:
    assert etc.spec_of({"spaces/net": "db"}).join_net == "db"


@pytest.mark.parametrize(
    ("keys", "name", "is_kept"),
    [
        ({"netns/name": "blue"}, "blue", False),
        ({"netns/name": "blue", "netns/shared": True}, "blue", True),
        ({"netns/shared": True}, "web", True),
        ({}, "all", False),
        ({"nonetns": True}, None, False),
    ],
)
def test_a_named_namespace_is_the_guests_or_that_of_all(
    etc: Configuration, keys: Keys, name: str | None, is_kept: bool
) -> None:
    etc.set_defaults({"netns/name": "all"})
    spec = etc.spec_of(keys)
    assert (spec.netns_name, spec.netns_keep) == (name, is_kept)


def test_links_are_named_or_numbered(etc: Configuration) -> None:
    spec = etc.spec_of(
        {
            "netns/interfaces/0/host": "v-web",
            "netns/interfaces/1/host": "br0",
            "netns/interfaces/1/type": "bridge",
            "netns/interfaces/1/guest": "lan0",
            "netns/interfaces/2/host": "eth0",
            "netns/interfaces/2/type": "macvlan",
            "netns/interfaces/3": False,
        }
    )
    assert spec.links == (
        Link(entry="0", kind="veth", host="v-web", guest="geth0"),
        Link(entry="1", kind="bridge", host="br0", guest="lan0"),
        Link(entry="2", kind="macvlan", host="eth0", guest="geth1"),
        Link(entry="3", kind="veth", host=None, guest="geth2"),
    )


def test_other_process_and_user_spaces_are_named(etc: Configuration) -> None:
    spec = etc.spec_of({"spaces/pid": "db", "spaces/mask": "0x10000000"})
    assert [line.rpartition("/")[2].split(":")[0] for line in spec.warnings] == ["mask", "pid"]


@pytest.mark.parametrize("text", [True, "0"])
def test_process_spaces_that_every_guest_has_are_not(etc: Configuration, text: str | bool) -> None:
    assert etc.spec_of({"spaces/pid": text}).warnings == ()


@pytest.mark.parametrize("keys", [{"spaces/net": "db"}, {"netns/shared": True}])
def test_a_network_that_is_there_already_gets_no_address(etc: Configuration, keys: Keys) -> None:
    [warning] = etc.spec_of({**keys, **entry(ip="10.0.0.5", nodev=True)}).warnings
    assert warning.startswith(f"{etc.confdir}/web/interfaces: ")


# --- addresses


def test_every_key_of_an_address(etc: Configuration) -> None:
    address = one_address(
        etc,
        entry(
            ip="10.0.0.5",
            dev="eth0.231",
            prefix="24",
            bcast="10.0.0.63",
            name="web",
            scope="link",
            peer="10.0.0.6/32",
            down=True,
            vlandev=True,
        ),
    )
    assert address == Address(
        entry="0",
        ip=ip_address("10.0.0.5"),
        prefix=24,
        device="eth0.231",
        label="eth0.231:web",
        broadcast=IPv4Address("10.0.0.63"),
        scope="link",
        peer=ip_address("10.0.0.6"),
        up=False,
        vlan=True,
    )


def test_addresses_come_in_the_order_of_their_names(etc: Configuration) -> None:
    keys = {
        f"interfaces/{name}/ip": f"10.0.0.{number}"
        for number, name in enumerate(["b", "10", "2", "a"], start=1)
    }
    etc.add_guest("web", {**keys, "interfaces/dev": "eth0"})
    assert [address.entry for address in etc.spec().addresses] == ["10", "2", "a", "b"]


@pytest.mark.parametrize(
    ("keys", "prefix"),
    [
        ({}, 32),
        ({"interfaces/0/prefix": "24"}, 24),
        ({"interfaces/0/mask": "255.255.248.0"}, 21),
        ({"interfaces/0/mask": "0.0.0.0"}, 0),  # noqa: S104 (a mask)
        ({"interfaces/0/mask": "255.255.255.255"}, 32),
        ({"interfaces/0/mask": "16"}, 16),
        ({"interfaces/prefix": "20"}, 20),
        ({"interfaces/mask": "255.255.0.0"}, 16),
        ({"interfaces/prefix": "20", "interfaces/0/prefix": "24"}, 24),
        ({"interfaces/prefix": "20", "interfaces/0/mask": "255.255.255.0"}, 20),
        ({"interfaces/mask": "255.0.0.0", "interfaces/0/mask": "255.255.255.0"}, 24),
        ({"interfaces/0/prefix": ""}, 32),
        ({"interfaces/0/ip": "10.0.0.5/25"}, 25),
        ({"interfaces/0/ip": "10.0.0.5/25", "interfaces/prefix": "8"}, 25),
        ({"interfaces/0/ip": "2001:db8::5"}, 128),
        ({"interfaces/0/ip": "2001:db8::5/64"}, 64),
        ({"interfaces/0/ip": "2001:db8::5", "interfaces/0/prefix": "64"}, 64),
        ({"interfaces/0/ip": "2001:db8::5", "interfaces/mask": "255.255.255.0"}, 128),
    ],
)
def test_a_prefix_wins_over_a_mask_even_an_inherited_one(
    etc: Configuration, keys: Keys, prefix: int
) -> None:
    assert one_address(etc, {**entry(ip="10.0.0.5", dev="eth0"), **keys}).prefix == prefix


@pytest.mark.parametrize(
    ("keys", "device"),
    [
        ({"interfaces/0/dev": "eth1"}, "eth1"),
        ({}, "eth0"),
        ({"interfaces/0/nodev": True}, None),
        ({"interfaces/0/nodev": True, "interfaces/0/dev": "eth1"}, None),
    ],
)
def test_the_device_is_its_own_or_the_one_of_all(
    etc: Configuration, keys: Keys, device: str | None
) -> None:
    address = one_address(etc, {"interfaces/dev": "eth0", "interfaces/0/ip": "10.0.0.5", **keys})
    assert address.device == device


@pytest.mark.parametrize(
    ("keys", "is_made"),
    [
        ({}, False),
        ({"interfaces/0/vlandev": True}, True),
        ({"interfaces/vlandev": True}, True),
        ({"interfaces/vlandev": True, "interfaces/0/novlandev": True}, False),
        ({"interfaces/vlandev": True, "interfaces/0/dev": "eth0"}, False),
        ({"interfaces/vlandev": True, "interfaces/0/nodev": True}, False),
    ],
)
def test_a_vlan_is_made_where_files_say_so(etc: Configuration, keys: Keys, is_made: bool) -> None:
    address = one_address(etc, {**entry(ip="10.0.0.5", dev="eth0.7"), **keys})
    assert address.vlan == is_made


@pytest.mark.parametrize(
    ("keys", "is_made"),
    [
        ({}, True),
        ({"interfaces/novlandev": True}, False),
        ({"interfaces/0/novlandev": True}, False),
    ],
)
def test_vlans_of_all_guests_can_be_taken_back(
    etc: Configuration, keys: Keys, is_made: bool
) -> None:
    etc.set_defaults({"interfaces/vlandev": True})
    address = one_address(etc, {**entry(ip="10.0.0.5", dev="eth0.7"), **keys})
    assert address.vlan == is_made


def test_ipv6_has_neither_label_nor_broadcast(etc: Configuration) -> None:
    spec = etc.spec_of(entry(ip="2001:db8::5", dev="eth0", name="web", bcast="10.0.0.255"))
    [address] = spec.addresses
    assert (address.label, address.broadcast, address.is_ipv4) == (None, None, False)
    assert spec.warnings == (f"{etc.confdir}/web/interfaces/0/name: an IPv6 address has no label",)


@pytest.mark.parametrize(("text", "broadcast"), [("+", None), ("10.0.0.63", "10.0.0.63")])
def test_broadcast_can_be_left_to_the_system(
    etc: Configuration, text: str, broadcast: str | None
) -> None:
    address = one_address(etc, entry(ip="10.0.0.5", dev="eth0", bcast=text))
    assert address.broadcast == (ip_address(broadcast) if broadcast else None)


def test_an_entry_that_is_disabled_is_not_read(etc: Configuration) -> None:
    assert etc.spec_of(entry(ip="no address", disabled=True)).addresses == ()


def test_a_tap_device_belongs_to_a_user(etc: Configuration) -> None:
    spec = etc.spec_of(entry(ip="10.0.0.5", dev="tap0", tap=True, uid="1000", nocsum=True))
    [address] = spec.addresses
    assert (address.tuntap, address.tuntap_uid, address.tuntap_gid) == ("tap", 1000, None)
    assert "interfaces/0/nocsum: is not set" in spec.warnings[0]


@pytest.mark.parametrize("key", ["indirect", "mac", "extip"])
def test_keys_that_the_original_gave_up_are_named(etc: Configuration, key: str) -> None:
    spec = etc.spec_of({**entry(ip="10.0.0.5", nodev=True), f"interfaces/0/{key}": "x"})
    assert f"interfaces/0/{key}: devices of a guest's own are made with netns/" in spec.warnings[0]


def test_the_loopback_address_may_be_chosen(etc: Configuration) -> None:
    assert etc.spec_of({"interfaces/lback": "127.0.9.1"}).loopback == ip_address("127.0.9.1")


def test_a_network_of_its_own_may_have_a_gateway(etc: Configuration) -> None:
    spec = etc.spec_of(
        {
            "spaces/net": True,
            "interfaces/dev": "geth0",
            "interfaces/gateway": "10.0.0.1",
            "interfaces/0/ip": "10.0.0.5",
            "interfaces/1/ip": "2001:db8::5",
            "interfaces/2/ip": "2001:db8::6",
            "interfaces/2/gateway": "2001:db8::1",
        }
    )
    assert [address.gateway for address in spec.addresses] == [
        ip_address("10.0.0.1"),
        None,
        ip_address("2001:db8::1"),
    ]
    assert spec.warnings == ()


def test_the_hosts_network_takes_no_gateway_from_a_guest(etc: Configuration) -> None:
    spec = etc.spec_of(
        {**entry(ip="10.0.0.5", nodev=True, gateway="10.0.0.1"), "interfaces/gateway": "10.0.0.1"}
    )
    assert spec.addresses[0].gateway is None
    assert len(spec.warnings) == 2


def test_the_old_word_for_nodev_still_counts(etc: Configuration) -> None:
    spec = etc.spec_of(entry(ip="10.0.0.5", only_ip=True))
    assert spec.addresses[0].device is None
    assert "interfaces/0/only_ip: is obsolete; use nodev" in spec.warnings[0]


MISTAKES: list[tuple[Keys, str]] = [
    (entry(dev="eth0"), r"/interfaces/0/ip: is missing or empty"),
    (entry(ip=True, dev="eth0"), r"/interfaces/0/ip: is missing or empty"),
    (entry(ip="10.0.0", dev="eth0"), r"/interfaces/0/ip:1: '10.0.0' is no IP address"),
    (entry(ip="10.0.0.256", dev="eth0"), r"/interfaces/0/ip:1"),
    (entry(ip="10.0.0.5/33", dev="eth0"), r"/interfaces/0/ip:1"),
    (entry(ip="web.example.org", dev="eth0"), r"/interfaces/0/ip:1"),
    (entry(ip="0.0.0.0", nodev=True), r"/interfaces/0/ip:1: 0.0.0.0 is no"),  # noqa: S104
    (entry(ip="::", nodev=True), r"/interfaces/0/ip:1: :: is no address of a guest"),
    (entry(ip="224.0.0.1", nodev=True), r"/interfaces/0/ip:1: 224.0.0.1 is a multicast"),
    (entry(ip="fe80::1%eth0", dev="eth0"), r"/interfaces/0/ip:1: .* names a device"),
    (entry(ip="10.0.0.5"), r"/interfaces/0/dev: is missing, and .*/interfaces/dev too"),
    (entry(ip="10.0.0.5", dev="eth0:1"), r"/interfaces/0/dev:1: 'eth0:1' is no network device"),
    (entry(ip="10.0.0.5", dev="a/b"), r"/interfaces/0/dev:1"),
    (entry(ip="10.0.0.5", dev=".."), r"/interfaces/0/dev:1"),
    (entry(ip="10.0.0.5", dev="x" * 16), r"/interfaces/0/dev:1"),
    (entry(ip="10.0.0.5", nodev=True, prefix="33"), r"/interfaces/0/prefix:1: 33 is not in"),
    (entry(ip="10.0.0.5", nodev=True, mask="255.0.255.0"), r"/interfaces/0/mask:1"),
    (entry(ip="10.0.0.5", nodev=True, mask="0.0.0.255"), r"/interfaces/0/mask:1"),
    (entry(ip="10.0.0.5", nodev=True, mask="wide"), r"/interfaces/0/mask:1: 'wide' is no"),
    (entry(ip="::5", nodev=True, mask="255.0.0.0"), r"/interfaces/0/mask:1"),
    (entry(ip="10.0.0.5", dev="eth0", bcast="all"), r"/interfaces/0/bcast:1"),
    (entry(ip="10.0.0.5", dev="eth0", scope="wide"), r"/interfaces/0/scope:1"),
    (entry(ip="10.0.0.5", dev="eth0", peer="::1"), r"/interfaces/0/peer:1: the peer ::1"),
    (entry(ip="10.0.0.5", dev="eth0", name="a-long-name-x"), r"/interfaces/0/name:1: 'eth0:a-"),
    (entry(ip="10.0.0.5", dev="eth0", name="a b"), r"/interfaces/0/name:1: 'eth0:a b' has blanks"),
    (entry(ip="10.0.0.5", dev="vlan0007", vlandev=True), r"/interfaces/0: vlan0007 cannot be made"),
    (entry(ip="10.0.0.5", dev="eth0.4095", vlandev=True), r"/interfaces/0: eth0.4095: 4095 is no"),
    (entry(ip="10.0.0.5", dev="t0", tun=True, tap=True), r"/interfaces/0: has both tun and tap"),
    (entry(ip="10.0.0.5", nodev=True, tun=True), r"/interfaces/0: a tun or tap device needs"),
    (entry(ip="10.0.0.5", dev="t0", tun=True, uid="me"), r"/interfaces/0/uid:1: 'me' is no number"),
    (
        {**entry(ip="::5", nodev=True), "interfaces/1/ip": "0::5", "interfaces/1/nodev": True},
        r"/interfaces/1/ip: entry 0 has ::5 already",
    ),
    ({"interfaces/lback": "10.0.0.1"}, r"/interfaces/lback:1: 10.0.0.1 is not in 127"),
    ({"spaces/net": "../db"}, r"/spaces/net:1: '../db' cannot be a guest's name"),
    ({"spaces/mask": "net"}, r"/spaces/mask:1: 'net' is no number"),
    ({"netns/name": "../x"}, r"/netns/name:1: '../x' cannot name"),
    ({"netns/interfaces/0/type": "dummy"}, r"/netns/interfaces/0/type:1: 'dummy' is no type"),
    ({"netns/interfaces/0/type": "macvlan"}, r"/netns/interfaces/0/host: is missing"),
    (
        {"netns/interfaces/0/guest": "e0", "netns/interfaces/1/guest": "e0"},
        r"/netns/interfaces/1: gives the guest a second e0",
    ),
]


@pytest.mark.parametrize(("keys", "message"), MISTAKES)
def test_a_mistake_is_named_with_its_file_and_line(
    etc: Configuration, keys: Keys, message: str
) -> None:
    etc.add_guest("web", keys)
    with pytest.raises(ConfigInvalid, match=message):
        etc.spec()
