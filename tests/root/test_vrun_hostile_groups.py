"""A guest that may write its own cgroups, as systemd must, and uses them against the host."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.vservers import Host, host_for_guests

_INIT = "#!/bin/sh\nwhile :; do sleep 1000; done\n"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    yield from host_for_guests(tmp_path, monkeypatch)


@pytest.fixture
def web(host: Host) -> Host:
    """A host with the guest `web`, whose init is taken for systemd."""
    root = host.add_busybox("web", {"apps/init/style": "plain"})
    init = root / "lib/systemd/systemd"
    init.parent.mkdir(parents=True)
    init.write_text(_INIT)
    init.chmod(0o755)
    (root / "sbin/init").unlink()
    (root / "sbin/init").symlink_to("/lib/systemd/systemd")
    host.vserver("web", "start")
    return host


_DEEP = """
cd /sys/fs/cgroup
n=0
while mkdir a 2>/dev/null && cd a; do n=$((n + 1)); test $n -gt 1500 && break; done
echo $n
"""
_WIDE = """
cd /sys/fs/cgroup
n=0
while mkdir g$n 2>/dev/null; do n=$((n + 1)); test $n -gt 10000 && break; done
echo $n
"""


def test_groups_cannot_be_so_deep_that_nobody_can_remove_them(web: Host) -> None:
    assert 16 < int(web.inside("web", "sh", "-c", _DEEP)) < 64
    assert "Number of processes: 2" in web.vserver("web", "status").stdout
    assert web.inside("web", "echo", "there") == "there\n"
    web.vserver("web", "stop")


def test_groups_cannot_be_so_many_that_a_stop_takes_forever(web: Host) -> None:
    assert 1000 < int(web.inside("web", "sh", "-c", _WIDE)) < 10_000
    assert "running" in web.vserver("web", "status").stdout
    begin = time.monotonic()
    web.vserver("web", "stop")
    assert time.monotonic() - begin < 30


def test_a_guest_that_freezes_itself_can_be_stopped(web: Host) -> None:
    with web.begin("web", "exec", "sh", "-c", "echo 1 >/sys/fs/cgroup/cgroup.freeze"):
        frozen = Path(web.state("web")["cgroup"], "guest/cgroup.events")
        deadline = time.monotonic() + 60
        while "frozen 1" not in frozen.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert "is frozen: " in web.vserver("web", "exec", "true", code=125).stderr
        assert "is running" in web.vserver("web", "status").stdout
        web.vserver("web", "stop")
