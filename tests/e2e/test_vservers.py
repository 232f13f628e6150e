"""vservers: many guests by one command, each for itself."""

import fcntl
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.guestconfig import write_program
from tests.fixtures.probes import need
from tests.fixtures.vservers import (
    SLEEPER,
    VSERVER,
    Host,
    host_for_guests,
    is_alive,
    run_installed,
    wait_until,
)

pytestmark = need("root")

VSERVERS = VSERVER.with_name("vservers")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    yield from host_for_guests(tmp_path, monkeypatch)


def bulk(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """`vservers` as installed, which must end with `code`."""
    return run_installed("vservers", *words, code=code)


def lines(text: str) -> list[str]:
    return sorted(text.splitlines())


def test_many_guests_start_and_stop_by_one_command(host: Host) -> None:
    names = [f"web{number}" for number in range(9)]
    for name in names:
        host.add_busybox(name)
    done = bulk("start", "--all")
    expected = [*(f"{name}: started" for name in names), "9 guests: 9 started"]
    assert lines(done.stdout) == sorted(expected)
    assert done.stderr == ""
    assert all(is_alive(host.init_pid(name)) for name in names)
    monitors = {host.monitor_pid(name) for name in names}
    assert len(monitors) == len(names)
    assert all(os.getsid(pid) == pid for pid in monitors)
    assert bulk("start", *names[:2]).stdout.count("runs already") == 2
    bulk("stop", *names)
    assert host.leftovers() == []
    assert bulk("stop", "web1").stdout == "web1: does not run\n"


def test_what_fails_is_named_and_does_not_stop_the_others(host: Host) -> None:
    for name in ("one", "two", "bad"):
        host.add_busybox(name)
    host.set_key("bad", "apps/init/cmd.start", "/no/init")
    done = bulk("start", "one", "bad", "nobody", "two", code=2)
    assert {"one: started", "two: started"} < set(lines(done.stdout))
    assert done.stdout.endswith("4 guests: 2 started, 2 failed\n")
    assert "vservers: guest bad: cannot execute its init /no/init" in done.stderr
    assert "vservers: guest nobody: " in done.stderr
    assert "hint: " in done.stderr
    assert bulk("start", "bad", "nobody", code=1).stdout == "2 guests: 0 started, 2 failed\n"


def test_a_guest_that_another_program_holds_holds_up_no_other(host: Host) -> None:
    for name in ("held", "free"):
        host.add_busybox(name)
    host.vserver("held", "start")
    host.vserver("held", "stop")
    with (host.etc.rundir / "held/lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with subprocess.Popen(
            [VSERVERS, "start", "held", "free", "-j", "2"], stdout=subprocess.PIPE, text=True
        ) as start:
            assert start.stdout is not None
            assert start.stdout.readline() == "free: started\n"
            fcntl.flock(lock, fcntl.LOCK_UN)
            assert start.stdout.readline() == "held: started\n"
            assert start.wait(60) == 0


def test_no_more_at_a_time_than_was_said(host: Host, tmp_path: Path) -> None:
    count = tmp_path / "count"
    for number in range(5):
        host.add_busybox(f"web{number}")
        write_program(
            host.etc.confdir / f"web{number}/scripts/pre-start",
            f"echo + >>{count}; until [ $(grep -c + {count}) -ge 2 ]; do sleep 0.02; done; "
            f"sleep 0.1; echo - >>{count}",  # the first one waits for a second one
        )
    bulk("start", "--all", "-j", "2")
    now, most = 0, 0
    for line in count.read_text().split():
        now += 1 if line == "+" else -1
        most = max(most, now)
    assert most == 2


def test_status_of_many(host: Host) -> None:
    for name in ("one", "two"):
        host.add_busybox(name)
    assert bulk("status", code=1).stdout.endswith("2 guests: 0 running, 2 not\n")
    bulk("start", "one")
    done = bulk("status", code=2)
    first, second, summary = done.stdout.splitlines()
    assert first.startswith(f"one: runs, context {host.state('one')['xid']}, 1 process, up 00:00")
    assert (second, summary) == ("two: stopped", "2 guests: 1 running, 1 not")
    shown = [json.loads(line) for line in bulk("status", "--json", code=2).stdout.splitlines()]
    assert {(one["guest"], one["running"]) for one in shown} == {("one", True), ("two", False)}
    bulk("restart", "--all")
    bulk("status", "--all")


def test_disabled_guests_are_meant_only_by_name(host: Host) -> None:
    for name in ("one", "off"):
        host.add_busybox(name)
    host.set_key("off", "disabled", "")
    assert bulk("start", "--all").stdout == "one: started\n"
    assert bulk("start", "off").stdout == "off: started\n"


@pytest.mark.parametrize(
    "words",
    [[], ["fly", "--all"], ["start"], ["start", "--all", "web"], ["start", "-j", "0", "--all"]],
)
def test_wrong_usage_does_nothing(host: Host, words: list[str]) -> None:
    host.add_busybox("web")
    assert bulk(*words, code=1).stderr
    assert host.leftovers() == []


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9), (signal.SIGINT, 130)]
)
def test_a_command_that_is_ended_leaves_no_start_half_done(
    host: Host, number: int, code: int
) -> None:
    for name in ("one", "two"):
        host.add_busybox(name)
        hangs = f"touch {host.etc.rundir}/hangs-{name}; exec sleep 1000"
        write_program(host.etc.confdir / name / "scripts/pre-start", hangs)
    start = subprocess.Popen([VSERVERS, "start", "--all"], stderr=subprocess.DEVNULL)
    wait_until(lambda: all((host.etc.rundir / f"hangs-{name}").exists() for name in host.names))
    start.send_signal(number)
    assert start.wait(60) == code
    wait_until(lambda: not any(host.is_locked(name) for name in host.names))
    assert host.leftovers() == []


def test_a_guest_without_a_root_is_left_out_of_all_with_a_warning(host: Host) -> None:
    host.add_busybox("one")
    folder = host.etc.confdir / "gone"
    folder.mkdir()
    (folder / "vdir").symlink_to("/no/such/root")
    done = bulk("start", "--all")
    assert done.stdout == "one: started\n"
    assert done.stderr.startswith("vservers: ")
    assert "gone" in done.stderr
    (folder / "vdir").unlink()


def test_warnings_say_whose_they_are(host: Host) -> None:
    host.add_busybox("web", {**SLEEPER, "keepfds": ""})
    assert "vservers: guest web: " in bulk("start", "web").stderr
