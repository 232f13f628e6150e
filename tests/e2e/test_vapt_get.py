"""vapt-get: real packages into all guests at once, and their files shared afterwards."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Tool
from tests.fixtures import guests
from tests.fixtures.filesystems import is_immutable, thaw_below
from tests.fixtures.guestconfig import write_program
from tests.fixtures.probes import need
from tests.fixtures.vservers import SLEEPER, Host, host_for_guests

pytestmark = [need("root", "immutable", "lease", "debootstrap", "soak"), pytest.mark.timeout(600)]

_NAMES = ("one", "two", "three")
_FILE = "usr/share/vtest/data"
_CONF = "etc/vtest.conf"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: Tool) -> Iterator[Host]:
    """Unified Debian guests, each with two versions of a package in /srv."""
    packages = [make_package(tmp_path, version) for version in ("1", "2")]
    for host in host_for_guests(tmp_path, monkeypatch):
        for name in _NAMES:
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
        (_FILE, f"version {version}\n" * 1000),
        (_CONF, f"# of version {version}\n"),
        (
            "DEBIAN/control",
            f"Package: vtest\nVersion: {version}\nArchitecture: all\n"
            "Maintainer: vtest <vtest@localhost>\nDescription: a test\n",
        ),
        ("DEBIAN/conffiles", f"/{_CONF}\n"),
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


def file_of(host: Host, name: str, path: str = _FILE) -> Path:
    return host.etc.vdirbase / name / path


def test_all_guests_get_a_package_at_once_and_share_it(host: Host, tool: Tool) -> None:
    for name in _NAMES:
        host.vserver(name, "start")
    done = tool("vapt-get", "--running", "--", "install", "/srv/vtest_1.deb", timeout_s=300)
    assert done.returncode == 0, (done.stdout, done.stderr)
    for name in _NAMES:
        assert f"{name}: Setting up vtest (1) ..." in done.stdout.splitlines()
        assert file_of(host, name).samefile(file_of(host, "one"))
    assert is_immutable(file_of(host, "one"))
    assert "vapt-get: 3 guests: 3 done" in done.stderr.splitlines()
    assert done.stdout.splitlines()[-1].startswith("3 guests unified in ")
    # The next version: one has changed its configuration, one cannot be upgraded, one is off.
    file_of(host, "one", _CONF).write_text("# of mine\n")
    file_of(host, "two", "srv/fail").touch()
    host.vserver("three", "stop")
    words = ("--all", "--no-unify", "--", "install", "/srv/vtest_2.deb")
    done = tool("vapt-get", *words, timeout_s=300)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert file_of(host, "one", _CONF).read_text() == "# of mine\n"
    assert file_of(host, "one").read_text().startswith("version 2\n")
    assert file_of(host, "three").read_text().startswith("version 1\n")
    assert "vapt-get: guest two: ended with status 100" in done.stderr.splitlines()
    assert "three: does not run" in done.stderr.splitlines()
    summary = done.stderr.splitlines()[-1]
    assert summary == "vapt-get: 3 guests: 1 done, 2 failed: three (1), two (100)"
    assert "unified" not in done.stdout
    assert tool("vpool", "verify").returncode == 0
