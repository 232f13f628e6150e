"""Addresses that the machine has itself, in a network namespace of their own."""

from pathlib import Path

import pytest

from tests.fixtures.lab import DEVICE, Lab
from tests.fixtures.lab import lab as lab
from vstore.copy.hostaddresses import HostAddress, load_host_addresses
from vstore.copy.identity import check_free
from vstore.copy.messages import Identity, Setting
from vstore.errors import WrongUsage


@pytest.fixture(autouse=True)
def confdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VSERVER_CONFDIR", f"{tmp_path}")
    return tmp_path


def _setting(path: str, text: str = "") -> Setting:
    return Setting(path, "f", 0o644, text.encode())


def _check(lab: Lab, address: str, *settings: Setting, device: str = "") -> None:
    wanted = Identity("", [address], 0)
    lab.call(lambda: check_free("new", wanted, settings=settings, devices=[device]))


def test_each_address_is_found_with_its_device(lab: Lab) -> None:
    lab.run("ip", "address", "add", "10.9.1.1", "peer", "10.9.1.2/32", "dev", DEVICE)
    found = lab.call(load_host_addresses)
    assert HostAddress("127.0.0.1", 8, "lo") in found
    assert HostAddress("10.9.0.1", 24, DEVICE) in found
    assert HostAddress("fd09::1", 64, DEVICE) in found
    assert HostAddress("10.9.1.1", 32, DEVICE) in found
    assert "10.9.1.2" not in {address for address, _, _ in found}


def test_many_addresses_are_all_found(lab: Lab, tmp_path: Path) -> None:
    lines = "".join(
        f"address add 10.{100 + number // 250}.{number % 250}.1/32 dev {DEVICE}\n"
        for number in range(2000)
    )
    (tmp_path / "batch").write_text(lines)
    lab.run("ip", "-batch", tmp_path / "batch")
    found = {address for address, _, _ in lab.call(load_host_addresses)}
    assert sum(address.endswith(".1") and address.startswith("10.1") for address in found) == 2000


@pytest.mark.parametrize("address", ["10.9.0.1", "10.9.0.1/25", "FD09:0::1/64"])
def test_an_address_of_the_machine_is_refused(lab: Lab, address: str) -> None:
    with pytest.raises(WrongUsage, match=f"is this machine's own, on {DEVICE}") as caught:
        _check(lab, address, _setting("d/interfaces/0/ip", address))
    assert caught.value.hint is not None
    assert f"dev {DEVICE}" in caught.value.hint


@pytest.mark.parametrize("address", ["10.9.0.2", "127.0.0.1", "::1", "::"])
def test_others_and_those_of_every_machine_are_free(lab: Lab, address: str) -> None:
    _check(lab, address, _setting("d/interfaces/0/ip", address))


@pytest.mark.parametrize("key", ["nodev", "only_ip"])
def test_an_address_that_no_start_adds_may_be_there(lab: Lab, key: str) -> None:
    settings = [_setting("d/interfaces/0/ip"), _setting(f"d/interfaces/0/{key}")]
    _check(lab, "10.9.0.1", *settings)
    with pytest.raises(WrongUsage):
        _check(lab, "10.9.0.1", *settings, device="eth1")
    with pytest.raises(WrongUsage):
        _check(lab, "10.9.0.1", _setting("d/interfaces/0/ip"), _setting(f"d/interfaces/1/{key}"))


@pytest.mark.parametrize(
    ("conf", "is_free"),
    [
        ("IPROOT=10.9.0.1", True),
        ("IPROOT=", True),
        ("IPROOT=eth0:10.9.0.1/24", False),
        ("IPROOT=10.9.0.1\nIPROOTDEV=eth0", False),
        ("IPROOT=\nIPROOTDEV=eth0", False),
    ],
)
def test_an_old_style_guest_without_a_device_has_its_address_there_already(
    lab: Lab, conf: str, is_free: bool
) -> None:
    if is_free:
        _check(lab, "10.9.0.1", _setting("conf", f"{conf}\n"))
    else:
        with pytest.raises(WrongUsage, match=r"10\.9\.0\.1 is this machine's own"):
            _check(lab, "10.9.0.1", _setting("conf", f"{conf}\n"))
