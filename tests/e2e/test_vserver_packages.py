"""Package work inside one of five unified Debian guests: it goes as in any Debian, and the other
guests do not change in one byte, mode, owner, time or attribute.
"""

import json
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import pytest

from tests.conftest import Tool
from tests.fixtures import guests
from tests.fixtures.filesystems import Filesystem, free_bytes, is_immutable, thaw_below
from tests.fixtures.guestconfig import Keys
from tests.fixtures.mirrors import make_mirror, newer_package, served
from tests.fixtures.probes import is_soak, need, on
from tests.fixtures.runs import Report, find_faults
from tests.fixtures.trees import differences, snapshot
from tests.fixtures.vservers import SLEEPER, Host, host_for_guests

pytestmark = [
    need("root", "immutable", "lease", "debootstrap"),
    on("ext4"),
    pytest.mark.timeout(3600 if is_soak() else 600),
]

_NAMES: Final = ("one", "two", "three", "four", "five")
_RECIPE: Final = guests.SMALL[0]
_ADDRESS: Final = f"203.0.113.{os.getpid() % 254 + 1}"
"""One of those for examples, RFC 5737: nobody's; another session on this machine has another. The
demo, whose test may run beside this one, has one of 198.51.100.0/24.
"""
_APT: Final = ("apt-get", "--yes", "-o", "Dpkg::Options::=--force-confold")
_AGAIN: Final = ("bash", "coreutils", "dpkg", "libc6", "perl-base", "tar")
_TIMEOUT_S: Final = 1800


@pytest.fixture
def host(fs: Filesystem, monkeypatch: pytest.MonkeyPatch, tool: Tool) -> Iterator[Host]:
    for host in host_for_guests(fs.folder, monkeypatch):
        for name in _NAMES:
            guests.unpack(_RECIPE, _root(host, name))
        yield host
        for name in host.names:
            host.try_vserver(name, "stop")
        thaw_below(fs.folder)


def _root(host: Host, name: str) -> Path:
    return host.etc.vdirbase / name


class _Work:
    """The guest `one`, in which packages are worked on, and the four others."""

    def __init__(self, host: Host, tool: Tool, interface: Keys) -> None:
        """Unify all five, and start the one with this interface."""
        self._host = host
        self._tool = tool
        self.root = _root(host, "one")
        for name in _NAMES:
            own = interface if name == "one" else {}
            host.add(name, _root(host, name), {**SLEEPER, **own})
        assert self.unify().unified > 5_000
        self._before = {name: snapshot(_root(host, name)) for name in _NAMES[1:]}
        self._verified = _verify(self.root)
        host.vserver("one", "start")
        assert host.state("one")["protection"] == "copy-on-write"

    def unify(self) -> Report:
        done = self._tool("vunify", "--all", "--json", timeout_s=_TIMEOUT_S)
        assert done.returncode == 0, done.stderr
        return Report.parse(done.stdout)

    def run(self, *argv: str) -> str:
        """What a command in the guest writes, which must end well."""
        command = ("one", "exec", "env", "DEBIAN_FRONTEND=noninteractive", *argv)
        done = self._host.try_vserver(*command, timeout_s=_TIMEOUT_S)
        assert done.returncode == 0, (argv, done.stdout[-2000:], done.stderr[-2000:])
        return done.stdout

    def apt(self, *argv: str) -> str:
        return self.run(*_APT, *argv)

    def write(self, path: str, text: str) -> None:
        """Write a file as the guest does."""
        self.run("sh", "-c", 'printf "%s" "$2" > "$1"', "sh", path, text)

    def version(self, package: str) -> str:
        return self.run("dpkg-query", "--show", "--showformat=${Version}", package)

    def installed(self) -> list[str]:
        shown = self.run("dpkg-query", "--show", "--showformat=${db:Status-Abbrev} ${Package}\n")
        return [line.split()[1] for line in shown.splitlines() if line.startswith("ii ")]

    def check(self) -> None:
        """All is in order there, and nothing has happened elsewhere."""
        self.run("dpkg", "--configure", "-a")
        assert self.run("dpkg", "--audit") == ""
        assert set(self.run("dpkg", "-V").splitlines()) <= self._verified
        for name, before in self._before.items():
            assert differences(before, snapshot(_root(self._host, name))) == []
            assert is_immutable(_root(self._host, name) / "bin/bash")
        report = json.loads((self._host.etc.rundir / "one/protection.json").read_text())
        assert report["attacks"] == 0
        said = self._host.console("one").splitlines()
        assert [line for line in said if "vserver:" in line] == []

    def check_unified_again(self) -> None:
        """What the package work has made private is shared again, by the next nightly run."""
        mine, theirs = self.root / "bin/tar", _root(self._host, "two") / "bin/tar"
        assert not mine.samefile(theirs)
        before = free_bytes(self.root)
        report = self.unify()
        assert report.errors == []
        assert report.reclaimed > 1_000_000
        assert mine.samefile(theirs)
        self._host.vserver("one", "stop")
        assert free_bytes(self.root) - before > 1_000_000
        assert self._tool("vpool", "verify").returncode == 0
        assert find_faults(self._host.etc.vdirbase / ".pool") == []


def _verify(root: Path) -> set[str]:
    """What dpkg finds changed from outside, as the recipe left it."""
    command = ["dpkg", f"--root={root}", "--verify"]
    return set(
        subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    )


def _make_local_mirror(folder: Path, root: Path) -> str:
    """All packages that the cache has, and a newer rsync, the version of which is returned."""
    installed = guests.find_package(_RECIPE, root, "rsync")
    assert installed is not None, "the cache has lost the packages of its trees"
    newer, version = newer_package(folder, installed)
    kept = sorted(installed.parent.glob("*.deb"))
    make_mirror(folder / "mirror", _RECIPE.release, [*kept, newer])
    return version


def test_packages_are_installed_upgraded_removed_and_checked(
    host: Host, tool: Tool, tmp_path: Path
) -> None:
    """Downloads come over the host's network stack, from a server on the guest's address."""
    version = _make_local_mirror(tmp_path, _root(host, "one"))
    interface: Keys = {"interfaces/0/ip": _ADDRESS, "interfaces/0/prefix": "32"}
    work = _Work(host, tool, {**interface, "interfaces/0/dev": "lo"})
    with served(tmp_path / "mirror", _ADDRESS) as url:
        work.write("/etc/apt/sources.list", f"deb [trusted=yes] {url} {_RECIPE.release} main\n")
        work.apt("update")
        work.apt("install", "sqlite3")
        assert work.run("sqlite3", ":memory:", "select 6 * 7;") == "42\n"
        work.apt("install", "--reinstall", *_AGAIN)
        work.apt("install", "--only-upgrade", "rsync")
        assert work.version("rsync") == version
        work.check()
        work.apt("remove", "--purge", "rsync", "sqlite3")
        assert not (work.root / "usr/bin/rsync").exists()
        assert (_root(host, "two") / "usr/bin/rsync").exists()
        work.check()
    work.check_unified_again()


def _sources() -> list[str]:
    """The lines of sources.list that take what this machine's apt takes of the release."""
    wanted = "deb $(REPO_URI) $(RELEASE) $(COMPONENT)"
    command = ["apt-get", "indextargets", "--format", wanted, "Created-By: Packages"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    suites = [_RECIPE.release, f"{_RECIPE.release}-updates", f"{_RECIPE.release}-security"]
    return [
        line
        for line in dict.fromkeys(shown.splitlines())
        if line.split()[2] in suites and line.split()[1].startswith("http:")
    ]


def _address_towards(url: str) -> str:
    """The machine's own address from which it reaches a server."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.connect((urlsplit(url).hostname, 80))  # nothing is sent
        found: str = one.getsockname()[0]
        return found


@need("soak")
def test_everything_is_upgraded_and_installed_again_from_the_mirror(host: Host, tool: Tool) -> None:
    """The guest has the machine's own address. What debootstrap took from the last point release is
    upgraded to what security and updates have by now.
    """
    sources = _sources()
    if not sources or not guests.answers(f"{sources[0].split()[1]}dists/{_RECIPE.release}/Release"):
        pytest.skip(f"no mirror of {_RECIPE.release} by HTTP answers on this machine")
    address = _address_towards(sources[0].split()[1])
    work = _Work(host, tool, {"interfaces/0/ip": address, "interfaces/0/nodev": True})
    work.write("/etc/resolv.conf", Path("/etc/resolv.conf").read_text())
    work.write("/etc/apt/sources.list", "".join(f"{line}\n" for line in sources))
    work.apt("update")
    waiting = re.findall(r"^Inst (\S+)", work.apt("--simulate", "dist-upgrade"), re.M)
    old = {package: work.version(package) for package in waiting}
    work.apt("dist-upgrade")
    assert all(work.version(package) != old[package] for package in waiting)
    assert "Inst" not in work.apt("--simulate", "dist-upgrade")
    work.check()
    work.apt("install", "--reinstall", *work.installed())
    work.check()
    work.apt("install", "git", "tmux")
    assert "tmux" in work.run("tmux", "-V")
    server = [name for name in work.installed() if "nginx" in name]
    work.apt("remove", "--purge", "--auto-remove", "git", "tmux", "rsync", *server)
    assert not (work.root / "usr/sbin/nginx").exists()
    assert (_root(host, "two") / "usr/sbin/nginx").exists()
    work.check()
    work.check_unified_again()
