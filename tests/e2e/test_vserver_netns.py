"""Guests in a network namespace that `ip netns` shows: netns/.

The commands run in a mount namespace of the test's own, with a /run of its own: what a start mounts
in /run/netns is not the machine's.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.probes import need
from tests.fixtures.vservers import SLEEPER, VSERVER, Host, host_for_guests

pytestmark = need("root")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    yield from host_for_guests(tmp_path, monkeypatch)


def _run(script: str) -> list[str]:
    """What a shell script writes that finds nothing in /run; `vserver` is the one of the test."""
    lines = f'set -e\nmount -t tmpfs none /run\nvserver() {{ {VSERVER} "$@"; }}\n{script}'
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", lines]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_ip_shows_the_namespace_and_works_beside_it(host: Host) -> None:
    name = f"vt{os.getpid()}"
    host.add_busybox("web", {**SLEEPER, "netns/name": name, "interfaces/0/ip": "10.9.8.7/24",
                             "interfaces/0/dev": "lo"})  # fmt: skip
    said = _run(
        f"""
        vserver web start
        findmnt -no PROPAGATION /run/netns | tail -n 1
        ip netns exec {name} ip -br -4 addr show lo
        vserver web exec ip addr show lo | grep -c 10.9.8.7/24
        ip netns add {name}o
        ip netns list | sort
        vserver web stop
        ip netns list
        ip netns del {name}o
        ls /run/netns
        """
    )
    assert said[0] == "shared"
    assert "10.9.8.7/24" in said[1]
    assert said[2:] == ["1", name, f"{name}o", f"{name}o"]


def test_other_mount_namespaces_see_it_come_and_go(host: Host) -> None:
    name = f"vt{os.getpid()}"
    host.add_busybox("web", {**SLEEPER, "netns/name": name})
    said = _run(
        f"""
        ip netns add {name}o
        mkfifo /run/go /run/seen
        unshare --mount --propagation slave sh -c '
            echo >/run/seen
            cat /run/go; findmnt -no FSTYPE /run/netns/{name}; echo >/run/seen
            cat /run/go; ls /run/netns' &
        read line </run/seen
        vserver web start
        echo started >/run/go
        read line </run/seen
        vserver web stop
        echo stopped >/run/go
        wait
        ip netns del {name}o
        """
    )
    assert said == ["started", "nsfs", "stopped", f"{name}o"]


def test_a_namespace_that_is_there_stays(host: Host) -> None:
    name = f"vt{os.getpid()}"
    host.add_busybox("web", {**SLEEPER, "netns/name": name, "netns/shared": True})
    said = _run(
        f"""
        ip netns add {name}
        ip -n {name} link add dum0 type veth
        vserver web start
        vserver web exec ip link show | grep -c " dum0"
        vserver web stop
        ip netns list
        ip netns del {name}
        """
    )
    assert said == ["1", name]


def test_a_name_that_is_taken_is_refused_and_nothing_is_left(host: Host) -> None:
    name = f"vt{os.getpid()}"
    host.add_busybox("web", {**SLEEPER, "netns/name": name})
    said = _run(
        f"""
        ip netns add {name}
        vserver web start 2>&1 && exit 9
        ip netns del {name}
        vserver web start && vserver web stop && ls /run/netns
        """
    )
    assert "there is a network namespace" in said[0]
    assert "netns/shared" in said[1]
    assert said[2:] == []
