"""The monitor of a guest: what it costs, and what happens when it, or anything else, is killed."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.fixtures.guestconfig import write_program
from tests.fixtures.probes import need, scaled
from tests.fixtures.vservers import (
    SLEEPER,
    VSERVER,
    Host,
    host_for_guests,
    is_alive,
    private_kib,
    status_of,
    wait_until,
)

pytestmark = need("root")

_MOST_KIB = 12 << 10
"""What a monitor may have in memory for itself alone."""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    yield from host_for_guests(tmp_path, monkeypatch)


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid))


def test_a_monitor_is_small_and_has_nothing_of_the_callers(host: Host) -> None:
    host.add_busybox("web")
    host.vserver("web", "start")
    monitor = host.monitor_pid("web")
    assert private_kib(monitor) <= _MOST_KIB
    assert status_of(monitor)["Name"] == "vserver-monitor"
    assert os.fspath(Path(f"/proc/{monitor}/cwd").readlink()) == "/"
    opened = {os.fspath(path.readlink()) for path in Path(f"/proc/{monitor}/fd").iterdir()}
    assert not any(path.startswith("/dev/pts/") and path != "/dev/pts/ptmx" for path in opened)


def test_a_monitor_is_in_no_cgroup_of_the_guest(host: Host) -> None:
    host.add_busybox("web")
    host.vserver("web", "start")
    number = host.state("web")["xid"]
    text = Path(f"/proc/{host.monitor_pid('web')}/cgroup").read_text()
    assert f"/{number}" not in text


def test_a_monitor_that_is_told_to_end_stops_the_guest(host: Host) -> None:
    host.add_busybox("web")
    host.vserver("web", "start")
    os.kill(host.monitor_pid("web"), signal.SIGTERM)
    host.wait_stopped("web")
    assert host.leftovers() == []


def test_orphans_of_scripts_are_reaped(host: Host) -> None:
    host.add_busybox("web")
    write_program(host.etc.confdir / "web/scripts/post-start", "sleep 0.1 & sleep 0.1 &")
    host.vserver("web", "start")
    children = Path(f"/proc/{host.monitor_pid('web')}/task/{host.monitor_pid('web')}/children")
    wait_until(lambda: children.read_text().split() == [str(host.init_pid("web"))])


# --- the monitor killed while the guest runs


def test_a_guest_runs_on_without_its_monitor_and_the_next_start_adopts_it(host: Host) -> None:
    host.add_busybox("web")
    host.vserver("web", "start")
    pid, first = host.init_pid("web"), host.monitor_pid("web")
    _kill(first)
    assert "monitor is gone" in host.vserver("web", "status").stdout
    assert host.inside("web", "hostname") == "web\n"
    assert "is replaced" in host.vserver("web", "start").stderr
    assert host.init_pid("web") == pid
    assert host.is_locked("web")
    assert "monitor is gone" not in host.vserver("web", "status").stdout


def test_a_guest_without_its_monitor_can_be_stopped(host: Host) -> None:
    polite = "trap 'touch /down; exit 0' INT; sleep 1000 & wait"
    root = host.add_busybox("web", {**SLEEPER, "apps/init/cmd.start": f"/bin/sh\n-c\n{polite}"})
    notes = host.etc.confdir / "notes"
    write_program(host.etc.confdir / "web/scripts/post-stop", f"echo $1 >{notes}")
    host.vserver("web", "start")
    pid = host.init_pid("web")
    _kill(host.monitor_pid("web"))
    host.vserver("web", "stop")
    assert not is_alive(pid)
    assert (root / "down").exists()
    assert notes.read_text() == "post-stop\n"
    assert host.leftovers() == []


def test_a_broken_configuration_does_not_keep_a_guest_from_being_stopped(host: Host) -> None:
    host.add_busybox("web")
    host.vserver("web", "start")
    _kill(host.monitor_pid("web"))
    host.set_key("web", "bcapabilities", "FLY")
    assert "FLY" in host.vserver("web", "stop").stderr
    assert host.leftovers() == []


@pytest.mark.parametrize("words", [["status"], ["running"], ["stop"], ["start"]])
def test_what_monitor_and_guest_leave_is_found_by_the_next_command(
    host: Host, words: list[str]
) -> None:
    host.add_busybox("web")
    host.vserver("web", "start")
    pid = host.init_pid("web")
    _kill(host.monitor_pid("web"))
    _kill(pid)
    assert host.leftovers() != []
    host.vserver("web", *words, code={"status": 3, "running": 1}.get(words[0], 0))
    if words == ["start"]:
        assert host.init_pid("web") != pid
    else:
        assert host.leftovers() == []


def test_an_adopted_guest_that_ends_is_cleaned_up(host: Host) -> None:
    host.add_busybox("web")
    host.vserver("web", "start")
    _kill(host.monitor_pid("web"))
    host.vserver("web", "start")
    os.kill(host.init_pid("web"), signal.SIGKILL)
    host.wait_stopped("web")
    assert host.leftovers() == []


# --- anything killed at any moment of a start or stop


_PHASES = ("initialize", "prepre-start", "pre-start", "post-start")


@pytest.mark.parametrize("phase", _PHASES)
def test_the_monitor_killed_in_each_phase_of_a_start(host: Host, phase: str) -> None:
    host.add_busybox("web")
    script = write_program(
        host.etc.confdir / f"web/scripts/{phase}", "kill -9 $PPID; exec sleep 60"
    )
    assert "its monitor was killed" in host.vserver("web", "start", code=1).stderr
    script.unlink()
    host.vserver("web", "start")
    host.vserver("web", "stop")
    assert host.leftovers() == []


@pytest.mark.parametrize("phase", ["pre-stop", "post-stop", "postpost-stop"])
def test_the_monitor_killed_in_each_phase_of_a_stop(host: Host, phase: str) -> None:
    host.add_busybox("web")
    host.vserver("web", "start")
    script = write_program(
        host.etc.confdir / f"web/scripts/{phase}", "rm $0; kill -9 $PPID; exec sleep 60"
    )
    host.vserver("web", "stop")  # begins anew without the monitor
    assert not script.exists()
    assert host.leftovers() == []


def _family(starter: int) -> list[int]:
    """The command that starts a guest and all that it has forked, as long as they are related."""
    found, waiting = [], [starter]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        with suppress(OSError):
            waiting += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return found


def test_what_is_left_of_a_guest_is_not_looked_for_where_another_is_now(host: Host) -> None:
    """The two have one number, and the first was killed together with its monitor."""
    host.add_busybox("web")
    number = (host.etc.confdir / "web/context").read_text()
    host.add_busybox("other", {**SLEEPER, "context": number})
    host.vserver("web", "start")
    pids = host.monitor_pid("web"), host.init_pid("web")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        wait_until(lambda pid=pid: not is_alive(pid))
    host.vserver("other", "start")
    pid = host.init_pid("other")
    host.vserver("web", "stop")
    assert is_alive(pid)
    assert host.inside("other", "echo", "well") == "well\n"
    host.vserver("other", "stop")


def test_anything_killed_at_any_moment_of_a_start_leaves_nothing(host: Host) -> None:
    """Command, monitor or process 1, after a random time."""
    host.add_busybox("web", {**SLEEPER, "spaces/net": ""})
    chance = random.Random(7)  # noqa: S311
    for _ in range(scaled(10, 300)):
        start = subprocess.Popen(
            [VSERVER, "web", "start"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(chance.uniform(0.02, 0.35))
        with suppress(ProcessLookupError):
            os.kill(chance.choice(_family(start.pid)), signal.SIGKILL)
        start.wait(60)
        with suppress(AssertionError):  # what was killed may end a moment later
            wait_until(lambda: not host.is_locked("web") or bool(host.state("web")), 60)
        host.vserver("web", "stop")
        assert host.leftovers() == []


def test_anything_killed_at_any_moment_of_a_stop_leaves_nothing(host: Host) -> None:
    host.add_busybox("web")
    chance = random.Random(8)  # noqa: S311
    for _ in range(scaled(6, 300)):
        host.vserver("web", "start")
        monitor = host.monitor_pid("web")
        stop = subprocess.Popen(
            [VSERVER, "web", "stop"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(chance.uniform(0.02, 0.2))
        with suppress(ProcessLookupError):
            os.kill(chance.choice([monitor, stop.pid]), signal.SIGKILL)
        stop.wait(60)
        host.vserver("web", "stop")
        assert host.leftovers() == []
