"""Debian guests that share every file they can, booted: systemd and its units write as ever."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Tool
from tests.fixtures import guests
from tests.fixtures.filesystems import thaw_below
from tests.fixtures.probes import need
from tests.fixtures.trees import differences, snapshot
from tests.fixtures.vservers import Host, host_for_guests, wait_until

pytestmark = [need("root", "immutable", "lease", "bootable"), pytest.mark.timeout(400)]

_FSTAB = "none /proc proc defaults 0 0\nnone /tmp tmpfs size=64m,mode=1777 0 0\n"
_STYLES = {"twelve": "systemd", "thirteen": "plain", "classic": "sysv"}
_RECIPES = dict(zip(_STYLES, guests.BOOTABLE, strict=True))


@pytest.fixture(params=tuple(_STYLES))
def host(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: Tool
) -> Iterator[Host]:
    """Two guests of one kind; `one` is booted in the test."""
    for host in host_for_guests(tmp_path, monkeypatch):
        for name in ("one", "two"):
            root = guests.unpack(_RECIPES[request.param], host.etc.vdirbase / name)
            host.add(name, root, {"apps/init/style": _STYLES[request.param], "fstab": _FSTAB})
        done = tool("vunify", "--all", timeout_s=300)
        assert done.returncode == 0, done.stderr
        yield host
        host.try_vserver("one", "stop")
        thaw_below(tmp_path)


def test_a_guest_boots_works_and_stops(host: Host) -> None:
    before = snapshot(host.etc.vdirbase / "two")
    host.vserver("one", "start")
    assert host.state("one")["protection"] == "copy-on-write"
    if (host.etc.vdirbase / "one/usr/bin/systemctl").exists():
        ask = ("one", "exec", "systemctl", "is-system-running")
        wait_until(lambda: host.try_vserver(*ask).stdout == "running\n", 120)
    host.inside("one", "useradd", "--create-home", "someone")
    host.inside("one", "sh", "-c", "echo x >> /etc/debian_version; dpkg --configure -a")
    assert host.vserver("one", "suexec", "someone", "sh", "-c", "echo x > ~/x; cat ~/x").stdout
    host.vserver("one", "suexec", "someone", "sh", "-c", "echo x > /etc/debian_version", code=2)
    host.vserver("one", "stop")
    assert differences(before, snapshot(host.etc.vdirbase / "two")) == []
    said = [line for line in host.console("one").splitlines() if "vserver: " in line]
    assert not [line for line in said if "attack" in line or "supervisor" in line], said
