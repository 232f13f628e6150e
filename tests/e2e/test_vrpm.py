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
from tests.fixtures.filesystems import thaw_below
from tests.fixtures.probes import need
from tests.fixtures.simultaneous import (
    CONF,
    FILE,
    NAMES,
    file_of,
    install_first,
    install_second,
)
from tests.fixtures.vservers import SLEEPER, Host, host_for_guests

pytestmark = [need("root", "immutable", "lease", "rpm", "soak"), pytest.mark.timeout(600)]

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
            spec = _SPEC.format(version=version, file=FILE, conf=CONF)
            packages.append(build(master, f"vtest-{version}", spec))
        for package in packages:
            shutil.copy(package, master / "srv")
        rpm(master, "--initdb")
        rpm(master, "--install", f"/srv/{packages[0].name}")
        for name in NAMES:
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


def test_all_guests_get_a_package_at_once_and_share_it(host: Host, tool: Tool) -> None:
    first, second = (f"/srv/vtest-{version}-1.noarch.rpm" for version in (1, 2))
    install_first(host, tool, "vrpm", "-Uv", first, said="vtest-1-1.noarch")
    install_second(host, tool, "vrpm", "-U", second, code=1)
    assert file_of(host, "two").read_text().startswith("version 1\n")
    # Each guest's own database says what it has; an rpm that only asks is followed by no unify.
    done = tool("vrpm", "--running", "--", "-q", "vtest")
    shown = sorted(done.stdout.splitlines())
    assert shown == ["one: vtest-2-1.noarch", "two: vtest-1-1.noarch"]
    host.stop_all()
    for name, version in zip(NAMES, (2, 1, 1), strict=True):
        assert rpm(host.etc.vdirbase / name, "-q", "vtest") == f"vtest-{version}-1.noarch\n"
    assert rpm(host.etc.vdirbase / "two", "--verify", "vtest") == ""
    assert tool("vpool", "verify").returncode == 0
