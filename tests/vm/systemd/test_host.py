"""Guests on a host whose process 1 is systemd, with all controllers in the v2 hierarchy.

Groups are systemd's there: each guest is in a scope that it was asked for and then leaves alone.
"""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.fixtures.probes import need
from tests.fixtures.vservers import (
    SLEEPER,
    Host,
    host_for_guests,
    is_alive,
    status_of,
    wait_until,
)

pytestmark = need("systemd_host")

_CGROUPS: Final = Path("/sys/fs/cgroup")
_MIB: Final = 1 << 20


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    yield from host_for_guests(tmp_path, monkeypatch)


def _scope(host: Host, name: str) -> str:
    return f"vservers-{host.state(name)['xid']}.scope"


def _group(host: Host, name: str) -> Path:
    """Where the limits of the guest are, built from its number alone."""
    xid = host.state(name)["xid"]
    return _CGROUPS / f"vservers.slice/vservers-{xid}.scope/{xid}"


def _place(pid: int) -> str:
    (line,) = Path(f"/proc/{pid}/cgroup").read_text().splitlines()  # one hierarchy, no other
    return line.removeprefix("0::")


def _unit(name: str, *properties: str) -> dict[str, str]:
    """What systemd says of a unit."""
    asked = ["systemctl", "show", name, *(f"--property={word}" for word in properties)]
    shown = subprocess.run(asked, check=True, capture_output=True, text=True).stdout
    return dict(line.split("=", 1) for line in shown.splitlines())


def _is_gone(scope: str) -> bool:
    shown = _unit(scope, "LoadState", "ActiveState")
    return shown == {"LoadState": "not-found", "ActiveState": "inactive"}


def _value(path: Path, key: str) -> int:
    """The number after `key` in a control file."""
    words = path.read_text().split()
    return int(words[words.index(key) + 1])


def _refused_forks(group: Path) -> int:
    """Kernels before 6.11 count them where the process is, not where the limit is."""
    return sum(_value(path, "max") for path in group.glob("**/pids.events"))


# --- where a guest is


def test_a_guest_is_in_a_scope_of_its_own_that_is_delegated(host: Host) -> None:
    host.add_busybox("web")
    host.vserver("web", "start")
    scope = _scope(host, "web")
    assert _unit(scope, "ActiveState", "Delegate", "Slice", "ControlGroup", "TasksMax") == {
        "ActiveState": "active",
        "Delegate": "yes",
        "Slice": "vservers.slice",
        "ControlGroup": f"/vservers.slice/{scope}",
        "TasksMax": "infinity",
    }
    group = _group(host, "web")
    assert host.state("web")["cgroup"] == os.fspath(group)
    assert _place(host.init_pid("web")) == f"/{group.relative_to(_CGROUPS)}/guest"
    assert _place(host.monitor_pid("web")) == f"/vservers.slice/{scope}/monitor"
    assert host.inside("web", "cat", "/proc/self/cgroup") == "0::/\n"
    assert host.inside("web", "ls", "/sys/fs/cgroup/cgroup.procs")
    host.vserver("web", "exec", "mkdir", "/sys/fs/cgroup/mine", code=1)
    assert host.vserver("web", "status").stdout.startswith("Vserver 'web' is running")


def test_nothing_is_left_of_it_after_a_stop(host: Host) -> None:
    host.add_busybox("web")
    for _ in range(3):  # at once: systemd has hardly let go of the last scope
        host.vserver("web", "start")
        scope, group = _scope(host, "web"), _group(host, "web")
        assert group.is_dir()
        host.vserver("web", "stop")
        assert not group.exists()
    wait_until(lambda: _is_gone(scope))
    assert not group.parent.exists()
    assert host.leftovers() == []


def test_a_start_that_fails_leaves_no_scope(host: Host) -> None:
    host.add_busybox("web", {**SLEEPER, "apps/init/cmd.start": "/no/such/program"})
    host.vserver("web", "start", code=1)
    wait_until(lambda: not list(_CGROUPS.glob("vservers.slice/*.scope")))
    assert host.leftovers() == []


def test_a_reboot_keeps_the_scope(host: Host) -> None:
    host.add_busybox("web", {"apps/init/style": "plain"})
    host.vserver("web", "start")
    scope, group, pid = _scope(host, "web"), _group(host, "web"), host.init_pid("web")
    host.run_inside("web", "reboot", "-f")
    wait_until(lambda: host.state("web").get("init_pid", pid) != pid, 20)
    assert (_scope(host, "web"), _group(host, "web")) == (scope, group)
    assert _place(host.init_pid("web")) == f"/{group.relative_to(_CGROUPS)}/guest"


def test_a_guest_whose_monitor_was_killed_runs_on_and_can_be_stopped(host: Host) -> None:
    host.add_busybox("web")
    host.vserver("web", "start")
    scope, group, pid = _scope(host, "web"), _group(host, "web"), host.init_pid("web")
    os.kill(host.monitor_pid("web"), signal.SIGKILL)
    assert host.inside("web", "echo", "still here") == "still here\n"
    assert host.init_pid("web") == pid
    host.vserver("web", "stop")
    assert not group.exists()
    wait_until(lambda: _is_gone(scope))
    host.vserver("web", "start")
    assert host.inside("web", "echo", "again") == "again\n"


def test_a_new_monitor_is_in_the_scope_too(host: Host) -> None:
    host.add_busybox("web")
    host.vserver("web", "start")
    old, pid = host.monitor_pid("web"), host.init_pid("web")
    os.kill(old, signal.SIGKILL)
    wait_until(lambda: not is_alive(old))
    host.vserver("web", "start")  # gives it a new one
    assert host.init_pid("web") == pid
    procs = (_group(host, "web").parent / "monitor/cgroup.procs").read_text().split()
    (new,) = map(int, procs)
    assert status_of(new)["Name"] == "vserver-monitor"
    assert _unit(_scope(host, "web"), "ActiveState") == {"ActiveState": "active"}


def test_systemctl_stop_stops_the_guest(host: Host) -> None:
    host.add_busybox("web")
    host.vserver("web", "start")
    scope = _scope(host, "web")
    subprocess.run(["systemctl", "stop", scope], check=True, timeout=100)
    host.wait_stopped("web")
    host.vserver("web", "status", code=3)
    wait_until(lambda: _is_gone(scope))
    assert host.leftovers() == []


def test_systemd_leaves_a_guests_limits_alone(host: Host) -> None:
    host.add_busybox("web", {**SLEEPER, "rlimits/nproc": "50", "rlimits/rss": "16384"})
    host.vserver("web", "start")
    group = _group(host, "web")
    for command in ("daemon-reload", "daemon-reexec"):
        subprocess.run(["systemctl", command], check=True, timeout=100)
        assert (group / "pids.max").read_text() == "50\n"
        assert (group / "memory.max").read_text() == f"{64 * _MIB}\n"
        assert _unit(_scope(host, "web"), "ActiveState") == {"ActiveState": "active"}
    assert host.inside("web", "echo", "well") == "well\n"


def test_limits_of_the_slice_hold_for_all_guests(host: Host) -> None:
    subprocess.run(
        ["systemctl", "set-property", "--runtime", "vservers.slice", "TasksMax=20"], check=True
    )
    try:
        host.add_busybox("web")
        host.vserver("web", "start")
        script = "for n in $(seq 30); do sleep 100 & done; wait"
        assert "can't fork" in host.try_vserver("web", "exec", "sh", "-c", script).stderr
    finally:
        subprocess.run(["systemctl", "revert", "vservers.slice"], check=True)


# --- limits: most are in tests/e2e/test_vserver_limits.py, which runs here too


def test_it_writes_no_faster_than_it_may(host: Host) -> None:
    device = _disk_below(host.etc.vdirbase)
    host.add_busybox("web", {**SLEEPER, "cgroup/io.max": f"{device} wbps={_MIB}"})
    host.vserver("web", "start")
    assert f"{device} rbps=max wbps={_MIB} " in (_group(host, "web") / "io.max").read_text()
    began = time.monotonic()
    host.inside("web", "dd", "if=/dev/zero", "of=/tmp/file", "bs=1M", "count=4", "conv=fsync")
    assert time.monotonic() - began > 2.5


def _disk_below(path: Path) -> str:
    """MAJOR:MINOR of the disk on which `path` is."""
    device = path.stat().st_dev
    return f"{os.major(device)}:{os.minor(device)}"


# --- a guest with systemd


@pytest.fixture
def systemd_guest(host: Host) -> Iterator[str]:
    """A guest that is this machine's own tree, with a layer of its own on top, and boots."""
    root, layer = host.etc.vdirbase / "twelve", host.etc.vdirbase / ".layer"
    for folder in (root, layer):
        folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "layer", layer], check=True)
    try:
        for name in ("upper", "work"):
            (layer / name).mkdir()
        options = f"lowerdir=/,upperdir={layer}/upper,workdir={layer}/work"
        subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", root], check=True)
        try:
            host.add("twelve", root, {"apps/init/style": "systemd", "rlimits/nproc": "200"})
            yield "twelve"
            host.vserver("twelve", "stop")
        finally:
            subprocess.run(["umount", root], check=True)
    finally:
        subprocess.run(["umount", layer], check=True)


def _controllers(folder: Path) -> set[str]:
    return set((folder / "cgroup.subtree_control").read_text().split())


@pytest.mark.timeout(900)
def test_a_guests_systemd_has_the_controllers_and_exec_finds_its_way(
    host: Host, systemd_guest: str
) -> None:
    name = systemd_guest
    host.vserver(name, "start", timeout_s=300)
    group = _group(host, name)
    wait_until(lambda: "pids" in _controllers(group / "guest"), 120)
    # so the group that processes join can hold none: EBUSY, and init's own is taken
    with pytest.raises(OSError, match="Device or resource busy"):
        (group / "guest/cgroup.procs").write_text(str(os.getpid()))
    assert host.inside(name, "cat", "/proc/self/cgroup") == "0::/init.scope\n"
    state = host.try_vserver(
        name, "exec", "systemctl", "is-system-running", "--wait", timeout_s=300
    )
    failed = host.inside(name, "systemctl", "--failed", "--no-legend", "--plain")
    assert (state.stdout, failed) == ("running\n", "")
    assert re.search(r"/system\.slice/systemd-journald\.service$", _journald_place(host, name))
    _limits_hold_for_all_of_it(host, name, group)
    host.vserver(name, "stop", timeout_s=120)
    assert not group.exists()
    assert "is killed now" not in host.console(name)


def _journald_place(host: Host, name: str) -> str:
    pid = host.inside(name, "systemctl", "show", "-P", "MainPID", "systemd-journald").strip()
    return host.inside(name, "cat", f"/proc/{pid}/cgroup").strip()


def _limits_hold_for_all_of_it(host: Host, name: str, group: Path) -> None:
    """Its root cannot lift what stands one level above its own groups."""
    assert (group / "pids.max").read_text() == "200\n"
    lift = "echo max >/sys/fs/cgroup/pids.max; for n in $(seq 300); do sleep 60 & done; wait"
    assert "annot fork" in host.try_vserver(name, "exec", "sh", "-c", f"{lift}; true").stderr
    assert (group / "pids.max").read_text() == "200\n"
    assert _refused_forks(group) > 0
