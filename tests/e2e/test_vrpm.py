"""vrpm: real packages into all guests at once by their own rpm, and their files shared afterwards.

The guests are Debian trees with Debian's rpm: a database of rpm's in each, and packages that are
built by the rpmbuild of one.
"""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.conftest import Tool
from tests.fixtures import guests
from tests.fixtures.filesystems import is_immutable, thaw_below
from tests.fixtures.probes import need
from tests.fixtures.vservers import SLEEPER, Host, host_for_guests

pytestmark = [need("root", "immutable", "lease", "rpm", "soak"), pytest.mark.timeout(600)]

_NAMES: Final = ("one", "two", "three")
_FILE: Final = "usr/share/vtest/data"
_CONF: Final = "etc/vtest.conf"
_BASE: Final = """\
Name: vtest-base
Version: 1
Release: 1
Summary: what the Debian packages below have
License: none
BuildArch: noarch
Provides: /bin/sh
%description
Of rpm's own dependencies, and without files.
%files
"""
_SPEC: Final = """\
Name: vtest
Version: {version}
Release: 1
Summary: a test
License: none
BuildArch: noarch
%description
A file, a configuration file and a script that can be made to fail.
%install
mkdir -p %{{buildroot}}/usr/share/vtest %{{buildroot}}/etc
yes "version {version}" | head -n 1000 >%{{buildroot}}/{file}
echo "# of version {version}" >%{{buildroot}}/{conf}
find %{{buildroot}} -exec touch -d 2017-07-14 {{}} +
%pre
[ ! -e /srv/fail ]
%files
/{file}
%config(noreplace) /{conf}
"""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: Tool) -> Iterator[Host]:
    """Unified guests, each with a database of rpm's and two versions of a package in /srv."""
    for host in host_for_guests(tmp_path, monkeypatch):
        master = guests.unpack(guests.RPM, tmp_path / "master")
        packages = [build(master, "base", _BASE)]
        for version in ("1", "2"):
            spec = _SPEC.format(version=version, file=_FILE, conf=_CONF)
            packages.append(build(master, f"vtest-{version}", spec))
        for package in packages:
            shutil.copy(package, master / "srv")
        rpm(master, "--initdb")
        rpm(master, "--install", f"/srv/{packages[0].name}")
        for name in _NAMES:
            root = host.etc.vdirbase / name
            subprocess.run(["cp", "-a", master, root], check=True)
            host.add(name, root, SLEEPER)
        done = tool("vunify", "--all")
        assert done.returncode == 0, done.stderr
        yield host
        host.stop_all()
        thaw_below(tmp_path)


def build(root: Path, name: str, spec: str) -> Path:
    """A package that rpmbuild(8) has made in the tree."""
    (root / f"root/{name}.spec").write_text(spec)
    before = set(root.glob("root/rpmbuild/RPMS/noarch/*.rpm"))
    inside(root, "rpmbuild", "-bb", f"/root/{name}.spec")
    (made,) = set(root.glob("root/rpmbuild/RPMS/noarch/*.rpm")) - before
    return made


def rpm(root: Path, *words: str) -> str:
    """What rpm(8) of the tree says, which must end well."""
    return inside(root, "rpm", *words)


def inside(root: Path, *argv: str) -> str:
    environ = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LC_ALL": "C"}
    command: list[str | Path] = ["chroot", root, *argv]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 0, (argv, done.stdout, done.stderr)
    return done.stdout


def file_of(host: Host, name: str, path: str = _FILE) -> Path:
    return host.etc.vdirbase / name / path


def test_all_guests_get_a_package_at_once_and_share_it(host: Host, tool: Tool) -> None:
    for name in _NAMES:
        host.vserver(name, "start")
    done = tool("vrpm", "--running", "--", "-Uv", "/srv/vtest-1-1.noarch.rpm", timeout_s=300)
    assert done.returncode == 0, (done.stdout, done.stderr)
    for name in _NAMES:
        assert f"{name}: vtest-1-1.noarch" in done.stdout.splitlines()
        assert file_of(host, name).samefile(file_of(host, "one"))
    assert is_immutable(file_of(host, "one"))
    assert "vrpm: 3 guests: 3 done" in done.stderr.splitlines()
    assert done.stdout.splitlines()[-1].startswith("3 guests unified in ")
    # The next version: one has changed its configuration, one cannot be upgraded, one is off.
    file_of(host, "one", _CONF).unlink()
    file_of(host, "one", _CONF).write_text("# of mine\n")
    file_of(host, "two", "srv/fail").touch()
    host.vserver("three", "stop")
    words = ("--all", "--no-unify", "--", "-U", "/srv/vtest-2-1.noarch.rpm")
    done = tool("vrpm", *words, timeout_s=300)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert file_of(host, "one", _CONF).read_text() == "# of mine\n"
    assert file_of(host, "one").read_text().startswith("version 2\n")
    assert file_of(host, "two").read_text().startswith("version 1\n")
    assert file_of(host, "three").read_text().startswith("version 1\n")
    assert "vrpm: guest two: ended with status 1" in done.stderr.splitlines()
    assert "three: does not run" in done.stderr.splitlines()
    summary = done.stderr.splitlines()[-1]
    assert summary == "vrpm: 3 guests: 1 done, 2 failed: three (1), two (1)"
    assert "unified" not in done.stdout
    # Each guest's own database says what it has; an rpm that only asks is followed by no unify.
    done = tool("vrpm", "--running", "--", "-q", "vtest")
    shown = sorted(done.stdout.splitlines())
    assert shown == ["one: vtest-2-1.noarch", "two: vtest-1-1.noarch"]
    host.stop_all()
    for name, version in zip(_NAMES, (2, 1, 1), strict=True):
        assert rpm(host.etc.vdirbase / name, "-q", "vtest") == f"vtest-{version}-1.noarch\n"
    assert rpm(host.etc.vdirbase / "two", "--verify", "vtest") == ""
    assert tool("vpool", "verify").returncode == 0
