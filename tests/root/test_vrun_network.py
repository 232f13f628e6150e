"""Addresses of guests on a host's devices, and networks of their own, as ip(8) sees them."""

import os
import subprocess
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pyroute2  # once, so that the forked children of these tests have it
import pytest

from tests.fixtures.agent import agent_in
from tests.fixtures.lab import DEVICE, FAR, Lab, empty_lab
from tests.fixtures.lab import lab as lab
from tests.fixtures.witness import wait_until
from vrun import network
from vrun.errors import ToolError
from vrun.spec import Address, Link

assert pyroute2.__version__
_BEFORE = ["10.9.0.1/24", "fd09::1/64"]


@pytest.fixture(autouse=True)
def rundir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VSERVER_RUNDIR", str(tmp_path / "run"))


def _address(text: str, device: str | None = DEVICE, **fields: Any) -> Address:
    ip, _, prefix = text.partition("/")
    return Address(entry="0", ip=ip_address(ip), prefix=int(prefix), device=device, **fields)


def _bring_up(lab: Lab, name: str, *addresses: Address) -> None:
    lab.call(lambda: network.bring_up(name, addresses))


def _take_down(lab: Lab, name: str) -> None:
    lab.call(lambda: network.take_down(name))


def _shown(lab: Lab, ip: str) -> str:
    """The line of ip(8) about an address."""
    (line,) = (line for line in lab.run("ip", "-o", "address").splitlines() if f" {ip}" in line)
    return line


# --- on the host's devices


def test_addresses_come_with_the_guest_and_go_with_it(lab: Lab) -> None:
    _bring_up(lab, "web", _address("10.9.0.5/24", label=f"{DEVICE}:web"), _address("fd09::5/64"))
    line = _shown(lab, "10.9.0.5/24")
    assert f"{DEVICE}:web" in line
    assert "brd 10.9.0.255" in line
    assert "tentative" not in _shown(lab, "fd09::5/64")
    _take_down(lab, "web")
    assert lab.addresses() == _BEFORE


def test_broadcast_scope_and_peer_are_the_configured_ones(lab: Lab) -> None:
    _bring_up(
        lab,
        "web",
        _address("10.6.0.5/24", broadcast=ip_address("10.6.0.9"), scope="link"),
        _address("10.8.0.1/32", peer=ip_address("10.8.0.2")),
        _address("10.7.0.1/32", scope="global"),
        _address("127.7.1.9/8"),
    )
    assert "brd 10.6.0.9 scope link" in _shown(lab, "10.6.0.5/24")
    assert "10.8.0.1 peer 10.8.0.2/32" in _shown(lab, "10.8.0.1 ")
    assert "brd" not in _shown(lab, "10.7.0.1/32")
    assert "scope host" in _shown(lab, "127.7.1.9/8")
    _take_down(lab, "web")
    assert lab.addresses() == _BEFORE


def test_an_address_of_two_guests_stays_until_the_last_stops(lab: Lab) -> None:
    _bring_up(lab, "web", _address("10.9.0.5/24"))
    _bring_up(lab, "db", _address("10.9.0.5/24"), _address("10.9.0.6/24"))
    _take_down(lab, "web")
    assert lab.addresses() == ["10.9.0.1/24", "10.9.0.5/24", "10.9.0.6/24", "fd09::1/64"]
    _take_down(lab, "db")
    assert lab.addresses() == _BEFORE


def test_an_address_that_the_host_had_stays(lab: Lab) -> None:
    _bring_up(lab, "web", _address("10.9.0.1/24"), _address("fd09::1/64"))
    _take_down(lab, "web")
    assert lab.addresses() == _BEFORE


def test_the_first_address_of_a_network_takes_no_other_with_it(lab: Lab) -> None:
    promote = f"/proc/sys/net/ipv4/conf/{DEVICE}/promote_secondaries"
    lab.run(
        "sh", "-c", f"echo 0 >{promote}; echo 0 >/proc/sys/net/ipv4/conf/all/promote_secondaries"
    )
    _bring_up(lab, "web", _address("10.20.0.5/24"))
    _bring_up(lab, "db", _address("10.20.0.6/24"))
    _take_down(lab, "web")
    assert "10.20.0.6/24" in lab.addresses()
    assert lab.run("cat", promote) == "0\n"
    _take_down(lab, "db")
    assert lab.addresses() == _BEFORE


def test_a_guest_that_is_started_again_claims_nothing_twice(lab: Lab) -> None:
    for _ in range(2):
        _bring_up(lab, "web", _address("10.9.0.5/24"))
    _take_down(lab, "web")
    assert lab.addresses() == _BEFORE
    _take_down(lab, "web")


def test_a_start_that_was_killed_leaves_an_address_that_can_be_taken_down(lab: Lab) -> None:
    def die_before_the_claim_is_carried_out() -> None:
        pid = os.fork()
        if pid == 0:
            network._Namespace.add_address = lambda *_: os._exit(9)  # type: ignore[method-assign]
            network.bring_up("web", [_address("10.9.0.5/24")])
        os.waitpid(pid, 0)

    lab.call(die_before_the_claim_is_carried_out)
    _take_down(lab, "web")  # an address that never came
    _bring_up(lab, "web", _address("10.9.0.5/24"))
    _take_down(lab, "web")
    assert lab.addresses() == _BEFORE


def test_what_went_away_by_itself_is_no_error(lab: Lab) -> None:
    _bring_up(lab, "web", _address("10.9.0.5/24"), _address("10.9.0.6/24"))
    lab.run("ip", "address", "del", "10.9.0.5/24", "dev", DEVICE)
    _take_down(lab, "web")
    assert lab.addresses() == _BEFORE
    _bring_up(lab, "web", _address("10.9.0.5/24"))
    lab.run("ip", "link", "del", DEVICE)
    _take_down(lab, "web")


def test_a_device_is_set_up_unless_the_guest_says_not(lab: Lab) -> None:
    for up in (False, True):
        lab.run("ip", "link", "set", DEVICE, "down")
        _bring_up(lab, "web", _address("10.9.0.5/24", up=up))
        assert (",UP" in lab.run("ip", "link", "show", DEVICE)) is up
        _take_down(lab, "web")


def test_a_missing_device_is_named_and_nothing_is_left(lab: Lab) -> None:
    with pytest.raises(ToolError, match="interfaces/0: there is no network device nosuch"):
        _bring_up(lab, "web", _address("10.9.0.5/24"), _address("10.9.0.6/24", "nosuch"))
    assert lab.addresses() == _BEFORE
    _take_down(lab, "web")


def test_an_address_without_a_device_must_be_the_hosts(lab: Lab) -> None:
    _bring_up(lab, "web", _address("10.9.0.1/32", None), _address("fd09::1/128", None))
    with pytest.raises(ToolError, match=r"interfaces/0: 10\.9\.0\.77 is no address of this host"):
        _bring_up(lab, "web", _address("10.9.0.77/32", None))
    with pytest.raises(ToolError, match="fd09::77 is no address of this host"):
        _bring_up(lab, "web", _address("fd09::77/128", None))


def test_an_address_that_the_host_has_elsewhere_is_added_and_said(lab: Lab) -> None:
    said = lab.call(lambda: network.bring_up("web", [_address("10.9.0.1/32", "lo")]))
    assert said == [
        "interfaces/0: this host has the address 10.9.0.1 already, with another device or prefix; "
        "lo gets it too"
    ]
    assert "10.9.0.1/32" in lab.addresses("lo")
    _take_down(lab, "web")
    assert lab.addresses() == _BEFORE
    assert lab.call(lambda: network.bring_up("web", [_address("10.9.0.1/24")])) == []


@pytest.mark.parametrize("taken", ["10.9.0.5/24", "fd09::5/64"])
def test_an_address_that_another_machine_answers_for_is_refused(lab: Lab, taken: str) -> None:
    with empty_lab() as other:
        lab.run("ip", "link", "set", FAR, "netns", str(other.pid))
        other.run("ip", "link", "set", FAR, "up")
        other.run("ip", "address", "add", taken, "dev", FAR, *(["nodad"] if ":" in taken else []))
        wait_until(lambda: _is_up(lab, DEVICE) and _is_up(other, FAR))
        owner = other.run("ip", "-o", "link", "show", FAR).split("link/ether ")[1].split()[0]
        ip = taken.partition("/")[0]
        with pytest.raises(ToolError, match=f"{ip} is in use on {DEVICE}: {owner} answers"):
            _bring_up(lab, "web", _address("10.9.0.6/24"), _address(taken))
        assert lab.addresses() == _BEFORE
        _bring_up(lab, "web", _address("10.9.0.6/24"), _address("fd09::6/64"))
        assert {"10.9.0.6/24", "fd09::6/64"} < set(lab.addresses())


def _is_up(lab: Lab, device: str) -> bool:
    """Whether frames pass: the kernel says so a moment after both ends were set up."""
    return " state UP " in lab.run("ip", "link", "show", device)


def _has_vlans(lab: Lab) -> bool:
    words = ["ip", "link", "add", "link", DEVICE, "name", "vprobe", "type", "vlan", "id", "9"]
    made = subprocess.run(lab.command(*words), capture_output=True, check=False).returncode == 0
    if made:
        lab.run("ip", "link", "del", "vprobe")
    return made


def test_a_vlan_comes_and_goes_with_its_guests(lab: Lab) -> None:
    vlan = f"{DEVICE}.100"
    if not _has_vlans(lab):
        refused = f"cannot make the vlan device {vlan}: Operation not supported"
        with pytest.raises(ToolError, match=refused):
            _bring_up(lab, "web", _address("10.30.0.5/24", vlan, vlan=True))
        assert vlan not in lab.devices()
        return
    _bring_up(lab, "web", _address("10.30.0.5/24", vlan, vlan=True))
    _bring_up(lab, "db", _address("10.30.0.6/24", vlan, vlan=True))
    assert "vlan protocol 802.1Q id 100" in lab.run("ip", "-d", "link", "show", vlan)
    _take_down(lab, "web")
    assert lab.addresses(vlan) == ["10.30.0.6/24"]
    _take_down(lab, "db")
    assert vlan not in lab.devices()
    assert DEVICE in lab.devices()


def test_a_tap_comes_and_goes_with_its_guest(lab: Lab) -> None:
    _bring_up(lab, "web", _address("10.31.0.1/24", "vtap0", tuntap="tap", tuntap_uid=1234))
    shown = lab.run("ip", "-d", "link", "show", "vtap0")
    assert "tun type tap" in shown
    assert "user 1234" in shown
    _take_down(lab, "web")
    assert "vtap0" not in lab.devices()


def test_starts_at_once_do_not_lose_each_others_claims(lab: Lab) -> None:
    def start_many() -> None:
        pids = []
        for number in range(8):
            pid = os.fork()
            if pid == 0:
                network.bring_up(f"g{number}", [_address("10.9.0.5/24")])
                os._exit(0)
            pids.append(pid)
        assert {os.waitpid(pid, 0)[1] for pid in pids} == {0}

    lab.call(start_many)
    for number in range(8):
        assert "10.9.0.5/24" in lab.addresses()
        _take_down(lab, f"g{number}")
    assert lab.addresses() == _BEFORE


# --- a network of its own


@pytest.fixture
def inner() -> Iterator[Lab]:
    """The namespace of a guest, as its first process has it."""
    with empty_lab() as made:
        yield made


def _configure(lab: Lab, inner: Lab, links: list[Link], *addresses: Address) -> None:
    def work() -> None:
        fd = os.open(inner.path, os.O_RDONLY)
        network.configure_own("web", 1001, links, addresses, fd)

    lab.call(work)


def test_a_pair_leads_from_the_host_into_the_guest(lab: Lab, inner: Lab) -> None:
    link = Link(entry="0", host="vweb", guest="geth0")
    gateway = ip_address("10.40.0.1")
    _configure(
        lab,
        inner,
        [link],
        _address("10.40.0.5/24", "geth0", gateway=gateway),
        _address("fd40::5/64", "geth0"),
    )
    assert inner.devices() == ["lo", "geth0"]
    assert inner.addresses("geth0") == ["10.40.0.5/24", "fd40::5/64"]
    assert inner.addresses("lo") == ["127.0.0.1/8", "::1/128"]
    assert "default via 10.40.0.1 dev geth0" in inner.run("ip", "route")
    assert "vweb" in lab.devices()
    lab.run("ip", "address", "add", "10.40.0.1/24", "dev", "vweb")
    with agent_in(inner) as guest, agent_in(lab) as host:
        guest("listen('10.40.0.5', 5000)")
        assert host("connect('10.40.0.5', 5000)") == ["10.40.0.1", "10.40.0.5"]
    _take_down(lab, "web")
    assert "vweb" not in lab.devices()
    assert inner.devices() == ["lo"]


def test_guests_on_a_bridge_reach_each_other(lab: Lab, inner: Lab) -> None:
    lab.run("ip", "link", "add", "vbr0", "type", "bridge")
    lab.run("ip", "link", "set", "vbr0", "up")
    lab.run("ip", "address", "add", "10.41.0.1/24", "dev", "vbr0")
    link = Link(entry="0", kind="bridge", host="vbr0", guest="eth0")
    _configure(lab, inner, [link], _address("10.41.0.5/24", "eth0"))
    assert "vs1001-0" in lab.run("ip", "link", "show", "master", "vbr0")
    with agent_in(inner) as guest, agent_in(lab) as host:
        guest("listen('10.41.0.5', 5000)")
        assert host("connect('10.41.0.5', 5000)") == ["10.41.0.1", "10.41.0.5"]
    _take_down(lab, "web")
    assert "vs1001-0" not in lab.devices()
    assert "vbr0" in lab.devices()


def test_a_macvlan_on_a_device_of_the_host(lab: Lab, inner: Lab) -> None:
    link = Link(entry="0", kind="macvlan", host=DEVICE, guest="eth0")
    _configure(lab, inner, [link], _address("10.9.0.5/24", "eth0"))
    assert "macvlan mode bridge" in inner.run("ip", "-d", "link", "show", "eth0")
    with agent_in(inner) as guest, empty_lab() as other, agent_in(other) as far:
        lab.run("ip", "link", "set", FAR, "netns", str(other.pid))
        other.run("ip", "link", "set", FAR, "up")
        other.run("ip", "address", "add", "10.9.0.8/24", "dev", FAR)
        guest("listen('10.9.0.5', 5000)")
        assert far("connect('10.9.0.5', 5000)") == ["10.9.0.8", "10.9.0.5"]
        assert lab.addresses() == _BEFORE
    _take_down(lab, "web")


def test_a_guest_with_its_own_network_gets_its_devices_there(lab: Lab, inner: Lab) -> None:
    before = lab.devices()
    addresses = [_address("10.42.0.5/24", "tap7", tuntap="tap", tuntap_uid=4321)]
    if _has_vlans(lab):
        addresses.append(_address("10.43.0.5/24", "geth0.7", vlan=True))
    _configure(lab, inner, [Link(entry="0", host="vweb", guest="geth0")], *addresses)
    assert "tap7" in inner.devices()
    assert "user 4321" in inner.run("ip", "-d", "link", "show", "tap7")
    for address in addresses:
        assert inner.addresses(address.device or "") == [f"{address.ip}/24"]
    _take_down(lab, "web")
    assert lab.devices() == before


@pytest.mark.parametrize(
    ("link", "message"),
    [
        (Link(entry="7", kind="bridge", host="nosuch", guest="eth0"), "no network device nosuch"),
        (Link(entry="7", kind="macvlan", host="nosuch", guest="eth0"), "no network device nosuch"),
        (Link(entry="7", host=DEVICE, guest="eth0"), f"a network device {DEVICE} already"),
    ],
)
def test_a_link_that_cannot_be_made_is_named_and_nothing_is_left(
    lab: Lab, inner: Lab, link: Link, message: str
) -> None:
    before = lab.devices()
    good = Link(entry="0", host="vweb", guest="geth0")
    with pytest.raises(ToolError, match=f"netns/interfaces/7: .* {message}"):
        _configure(lab, inner, [good, link])
    _take_down(lab, "web")
    assert lab.devices() == before
    assert inner.devices() == ["lo"]


def test_the_pair_goes_when_the_guest_died_with_its_network(lab: Lab) -> None:
    with empty_lab() as inner:
        _configure(lab, inner, [Link(entry="0", host="vweb", guest="geth0")])
    wait_until(lambda: "vweb" not in lab.devices())  # the kernel removes it a moment later
    _take_down(lab, "web")
