"""Package work inside one of several unified Debian guests: it goes as in any Debian, and the other
guests do not change in one byte, mode, owner, time or attribute.
"""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Tool
from tests.fixtures import guests
from tests.fixtures.filesystems import is_immutable, thaw_below
from tests.fixtures.probes import need
from tests.fixtures.trees import differences, snapshot
from tests.fixtures.vservers import SLEEPER, Host, host_for_guests

pytestmark = [need("root", "immutable", "lease", "debootstrap"), pytest.mark.timeout(600)]

_NAMES = ("one", "two", "three")
_APT = "DEBIAN_FRONTEND=noninteractive"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: Tool) -> Iterator[Host]:
    for host in host_for_guests(tmp_path, monkeypatch):
        for name in _NAMES:
            root = guests.unpack(guests.SMALL[0], host.etc.vdirbase / name)
            host.add(name, root, SLEEPER)
        done = tool("vunify", "--all")
        assert done.returncode == 0, done.stderr
        yield host
        for name in host.names:
            host.try_vserver(name, "stop")
        thaw_below(tmp_path)


def _copy_packages(root: Path) -> int:
    """The package files of all that is installed in the guest."""
    kept = guests.cache_folder() / "packages" / guests.SMALL[0].release
    installed = {
        file.name.removesuffix(".list").partition(":")[0]
        for file in (root / "var/lib/dpkg/info").glob("*.list")
    }
    target = root / "var/cache/apt/archives"
    newest = {file.name.partition("_")[0]: file for file in sorted(kept.glob("*.deb"))}
    wanted = [file for name, file in newest.items() if name in installed]
    for file in wanted:
        shutil.copy2(file, target / file.name)
    return len(wanted)


def _run(host: Host, *argv: str) -> str:
    done = host.try_vserver("one", "exec", "env", _APT, *argv, timeout_s=300)
    assert done.returncode == 0, (argv, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout


def test_packages_are_installed_again_removed_and_checked(host: Host, tool: Tool) -> None:
    others = {name: snapshot(host.etc.vdirbase / name) for name in _NAMES[1:]}
    root = host.etc.vdirbase / "one"
    count = _copy_packages(root)
    assert count > 80
    verified = _verify(root)
    host.vserver("one", "start")
    _run(host, "sh", "-c", "dpkg --force-confnew -i /var/cache/apt/archives/*.deb")
    _run(host, "dpkg", "--configure", "-a")
    assert _run(host, "dpkg", "-V") == verified
    _run(host, "dpkg", "--purge", "rsync")
    assert not (root / "usr/bin/rsync").exists()
    assert _run(host, "dpkg", "--audit") == ""
    for name, before in others.items():
        assert differences(before, snapshot(host.etc.vdirbase / name)) == []
        assert is_immutable(host.etc.vdirbase / name / "bin/bash")
        assert (host.etc.vdirbase / name / "usr/bin/rsync").exists()
    report = json.loads((host.etc.rundir / "one/protection.json").read_text())
    assert report["attacks"] == 0
    noise = [line for line in host.console("one").splitlines() if "vserver:" in line]
    assert noise == []
    host.vserver("one", "stop")
    done = tool("vunify", "--all")
    assert done.returncode == 0, done.stderr
    assert (root / "bin/bash").samefile(host.etc.vdirbase / "two/bin/bash")
    assert tool("vpool", "verify").returncode == 0


def _verify(root: Path) -> str:
    """What dpkg finds changed from outside, as the recipe left it."""
    return subprocess.run(
        ["dpkg", f"--root={root}", "--verify"], capture_output=True, text=True, check=False
    ).stdout
