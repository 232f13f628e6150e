"""Guests that see their own memory, processors and load, by an lxcfs of the test's own."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.probes import need
from tests.fixtures.vservers import SLEEPER, Host, host_for_guests, wait_until

pytestmark = need("root", "lxcfs")

_LIMIT = 64 << 20


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    yield from host_for_guests(tmp_path, monkeypatch)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where lxcfs is mounted, while it runs."""
    mount = tmp_path / "lxcfs"
    mount.mkdir()
    monkeypatch.setenv("VSERVER_LXCFS", os.fspath(mount))
    words = ["--foreground", "--enable-loadavg", f"--pidfile={tmp_path / 'pid'}"]
    with subprocess.Popen(["lxcfs", *words, mount], stderr=subprocess.DEVNULL) as server:
        try:
            wait_until(lambda: (mount / "proc/meminfo").exists() or server.poll() is not None)
            assert server.poll() is None
            yield mount
        finally:
            server.terminate()
            server.wait(60)
            subprocess.run(["umount", "--lazy", "--quiet", mount], check=False)


def _value(text: str, key: str) -> int:
    """The number in the line of a file like /proc/meminfo."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1])


def test_a_guest_sees_its_own_figures(host: Host, place: Path) -> None:
    keys = {"cflags": "virt_mem\nvirt_cpu\nvirt_load", "rlimits/rss": str(_LIMIT // 4096)}
    host.add_busybox("web", {**SLEEPER, "spaces/net": "", **keys})
    assert host.vserver("web", "start").stderr == ""
    assert _value(host.inside("web", "cat", "/proc/meminfo"), "MemTotal") == _LIMIT >> 10
    mounted = host.inside("web", "cat", "/proc/mounts")
    for name in ("meminfo", "swaps", "cpuinfo", "stat", "loadavg"):
        assert f" /proc/{name} fuse.lxcfs ro," in mounted
    assert host.inside("web", "cat", "/proc/loadavg").split()[3].split("/")[1].isdecimal()
    refused = host.try_vserver("web", "exec", "sh", "-c", "echo >/proc/meminfo")
    assert refused.returncode != 0
    host.vserver("web", "stop")


def test_only_what_its_flags_ask_for(host: Host, place: Path) -> None:
    host.add_busybox("web", {**SLEEPER, "spaces/net": "", "cflags": "virt_mem"})
    host.vserver("web", "start")
    mounted = host.inside("web", "cat", "/proc/mounts")
    assert "/proc/meminfo" in mounted
    assert "/proc/stat" not in mounted
    host.vserver("web", "stop")


def test_a_guest_starts_without_lxcfs_and_says_so(host: Host, place: Path) -> None:
    subprocess.run(["umount", place], check=True)
    host.add_busybox("web", {**SLEEPER, "spaces/net": "", "cflags": "virt_mem"})
    assert "needs lxcfs, which does not run" in host.vserver("web", "start").stderr
    host.vserver("web", "stop")
