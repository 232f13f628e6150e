"""Two Debian guests on one network, each with its own unmodified sshd on 0.0.0.0:22."""

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from tests.fixtures import guests
from tests.fixtures.lab import DEVICE, Lab
from tests.fixtures.lab import lab as lab
from tests.fixtures.probes import need
from tests.fixtures.vservers import VSERVER, Host, host_for_guests, wait_until

pytestmark = [need("root", "bootable"), pytest.mark.timeout(400)]

_RECIPES: Final = {"thirteen": guests.SYSTEMD[1], "classic": guests.SYSVINIT}
_ADDRESSES: Final = {"thirteen": "10.9.0.5", "classic": "10.9.0.7"}
_STYLES: Final = {"thirteen": "systemd", "classic": "sysv"}
_VERSIONS: Final = {"thirteen": "13", "classic": "12"}
_OF_HOST: Final = "10.9.0.1"
_UP_S: Final = 120


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    yield from host_for_guests(tmp_path, monkeypatch)


@dataclass(frozen=True, slots=True)
class Site:
    """The guests as they run, and a person on the host who has a key for both."""

    host: Host
    lab: Lab
    home: Path

    def key_of(self, name: str) -> str:
        """The public host key that the guest was installed with: kind and key."""
        path = self.host.etc.vdirbase / name / "etc/ssh/ssh_host_ed25519_key.pub"
        return " ".join(path.read_text().split()[:2])

    def offered_key(self, ip: str) -> str:
        """The host key of the server that answers there; "" where none does, a failure."""
        command = self.lab.command("ssh-keyscan", "-T", "10", "-t", "ed25519", ip)
        said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        # Debian 13's says its version too.
        lines = [line for line in said.splitlines() if not line.startswith("#")]
        return " ".join(lines[0].split()[1:]) if lines else ""

    def ssh(self, ip: str, expected_key: str, *command: str) -> "subprocess.CompletedProcess[str]":
        """A login as root, which fails where the server has another key than this one."""
        known = self.home / "known_hosts"
        known.write_text(f"{ip} {expected_key}\n")
        options = {
            "IdentityFile": self.home / "key",
            "UserKnownHostsFile": known,
            "GlobalKnownHostsFile": "/dev/null",
            "StrictHostKeyChecking": "yes",
            "BatchMode": "yes",
            "ConnectTimeout": "10",
        }
        words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        return subprocess.run(
            self.lab.command("ssh", "-F", "none", *words, f"root@{ip}", *command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def try_sshd(self, name: str, address: str) -> str:
        """What a second sshd of the guest says that is told to listen there."""
        command = ["exec", "/usr/sbin/sshd", "-D", "-e", "-p", "2222", "-o"]
        return self.host.vserver(name, *command, f"ListenAddress={address}", code=255).stderr


@pytest.fixture
def site(host: Host, lab: Lab, tmp_path: Path) -> Site:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    for name, recipe in _RECIPES.items():
        root = guests.unpack(recipe, host.etc.vdirbase / name)
        keys = {"apps/init/style": _STYLES[name], "interfaces/0/ip": _ADDRESSES[name]}
        host.add(name, root, {**keys, "interfaces/0/prefix": "24", "interfaces/0/dev": DEVICE})
        (root / "root/.ssh").mkdir(mode=0o700, exist_ok=True)
        (root / "root/.ssh/authorized_keys").write_bytes(key.with_suffix(".pub").read_bytes())
        lab.run(VSERVER, name, "start")
    made = Site(host, lab, tmp_path)
    for ip in _ADDRESSES.values():  # each asked no more than needed: who only asks is put off
        wait_until(lambda ip=ip: bool(made.offered_key(ip)), _UP_S)
    return made


def test_each_guests_own_sshd_answers_at_its_address_and_nowhere_else(site: Site) -> None:
    keys = {name: site.key_of(name) for name in _RECIPES}
    assert keys["thirteen"] != keys["classic"]
    for name, ip in _ADDRESSES.items():
        assert site.offered_key(ip) == keys[name]
        _log_in(site, name, ip, keys[name])
    refused = site.ssh(_ADDRESSES["thirteen"], keys["classic"], "true")
    assert (refused.returncode, "Host key verification failed" in refused.stderr) == (255, True)
    listening = [line.split()[3] for line in site.lab.run("ss", "-Htln4").splitlines()]
    assert sorted(listening) == sorted(f"{ip}:22" for ip in _ADDRESSES.values())
    assert "Connection refused" in site.ssh(_OF_HOST, keys["classic"], "true").stderr
    for name, own in _ADDRESSES.items():
        for address in {_OF_HOST, *_ADDRESSES.values()} - {own}:
            said = site.try_sshd(name, address)
            assert f"Bind to port 2222 on {address} failed: Operation not permitted" in said


def _log_in(site: Site, name: str, ip: str, key: str) -> None:
    done = site.ssh(ip, key, "hostname; echo $SSH_CONNECTION; cat /etc/debian_version")
    assert done.returncode == 0, done.stderr
    hostname, connection, version = done.stdout.splitlines()
    assert (hostname, version.partition(".")[0]) == (name, _VERSIONS[name])
    assert connection.split()[0::2] == [_OF_HOST, ip]
