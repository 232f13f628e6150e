"""vapt-get: real packages into all guests at once, and their files shared afterwards."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Tool
from tests.fixtures import guests
from tests.fixtures.filesystems import thaw_below
from tests.fixtures.guestconfig import write_program
from tests.fixtures.probes import need
from tests.fixtures.simultaneous import CONF, FILE, NAMES, install_first, install_second
from tests.fixtures.vservers import SLEEPER, Host, host_for_guests

pytestmark = [need("root", "immutable", "lease", "debootstrap", "soak"), pytest.mark.timeout(600)]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: Tool) -> Iterator[Host]:
    """Unified Debian guests, each with two versions of a package in /srv."""
    packages = [make_package(tmp_path, version) for version in ("1", "2")]
    for host in host_for_guests(tmp_path, monkeypatch):
        for name in NAMES:
            root = guests.unpack(guests.SMALL[0], host.etc.vdirbase / name)
            for package in packages:
                (root / "srv" / package.name).write_bytes(package.read_bytes())
            host.add(name, root, SLEEPER)
        done = tool("vunify", "--all")
        assert done.returncode == 0, done.stderr
        yield host
        host.stop_all()
        thaw_below(tmp_path)


def make_package(folder: Path, version: str) -> Path:
    """A Debian package with a file, a configuration file and a script that can be made to fail."""
    tree = folder / f"package-{version}"
    for file, text in (
        (FILE, f"version {version}\n" * 1000),
        (CONF, f"# of version {version}\n"),
        (
            "DEBIAN/control",
            f"Package: vtest\nVersion: {version}\nArchitecture: all\n"
            "Maintainer: vtest <vtest@localhost>\nDescription: a test\n",
        ),
        ("DEBIAN/conffiles", f"/{CONF}\n"),
    ):
        (tree / file).parent.mkdir(parents=True, exist_ok=True)
        (tree / file).write_text(text)
    write_program(tree / "DEBIAN/postinst", "[ ! -e /srv/fail ]")
    for path in tree.rglob("*"):
        os.utime(path, (1_500_000_000, 1_500_000_000))
    package = folder / f"vtest_{version}.deb"
    build: list[str | Path] = ["dpkg-deb", "--root-owner-group", "--build", tree, package]
    subprocess.run(build, check=True, capture_output=True)
    return package


def test_all_guests_get_a_package_at_once_and_share_it(host: Host, tool: Tool) -> None:
    said = "Setting up vtest (1) ..."
    install_first(host, tool, "vapt-get", "install", "/srv/vtest_1.deb", said=said)
    install_second(host, tool, "vapt-get", "install", "/srv/vtest_2.deb", code=100)
    assert tool("vpool", "verify").returncode == 0
