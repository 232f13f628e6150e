"""vservers: guests that need others, marks, and guests that were configured long ago."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.guestconfig import write_program
from tests.fixtures.persons import read_to_end
from tests.fixtures.probes import need
from tests.fixtures.vservers import (
    SLEEPER,
    VSERVER,
    Host,
    grow_busybox,
    host_for_guests,
    run_installed,
)

pytestmark = [need("root"), pytest.mark.timeout(400)]

VSERVERS = VSERVER.with_name("vservers")

_OLD_KERNEL = "this kernel cannot refuse them"
"""Said of bound guests before Linux 6.7."""
_MEET = 'n=0; while ! [ -e "$1" ]; do n=$((n + 1)); [ $n -lt 600 ] || exit 1; sleep 0.1; done'
"""Waits up to a minute for a file."""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    yield from host_for_guests(tmp_path, monkeypatch)


def bulk(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """`vservers` as installed, which must end with `code`."""
    return run_installed("vservers", *words, code=code, timeout_s=300)


def note_all(host: Host, log: Path) -> None:
    """Have each phase of each guest's starts and stops noted, by scripts that count for all."""
    for phase in ("prepre-start", "post-start", "pre-stop", "postpost-stop"):
        script = host.etc.confdir / ".defaults/scripts" / phase
        write_program(script, f"echo {phase} $2 >>{log}")


def add(host: Host, name: str, *depends: str, mark: str = "default") -> None:
    keys = {"apps/init/mark": mark}
    if depends:
        keys["apps/init/depends"] = "\n".join(depends)
    host.add_busybox(name, {**SLEEPER, **keys})


def test_thirty_guests_start_and_stop_as_they_need_each_other(host: Host, tmp_path: Path) -> None:
    log = tmp_path / "noted"
    note_all(host, log)
    needs = {"disk": [], "db": ["disk"], "bad": [], "unlucky": ["bad", "db"], "worse": ["unlucky"]}
    needs |= {f"web{number}": ["db"] for number in range(20)}
    needs |= {f"front{number}": [f"web{number}", "web19"] for number in range(5)}
    assert len(needs) == 30
    for name, others in needs.items():
        add(host, name, *others)
    host.set_key("bad", "apps/init/cmd.start", "/no/init")
    failed = {"bad", "unlucky", "worse"}
    done = bulk("start", "--mark", "default", "-j", "8", code=2)
    shown = done.stdout.splitlines()
    assert set(shown[:-1]) == {f"{name}: started" for name in needs.keys() - failed}
    assert shown[-1] == "30 guests: 27 started, 3 failed"
    said = [line for line in done.stderr.splitlines() if not line.startswith("hint: ")]
    said = [line for line in said if _OLD_KERNEL not in line]
    assert said == [
        "vservers: guest bad: cannot execute its init /no/init: No such file or directory",
        "vservers: guest unlucky: not started: it needs guest bad, which failed",
        "vservers: guest worse: not started: it needs guest unlucky, which failed",
    ]
    started = log.read_text().splitlines()
    for name in needs.keys() - failed:
        for other in needs[name]:
            assert started.index(f"post-start {other}") < started.index(f"prepre-start {name}")
    assert not any(name in {"unlucky", "worse"} for _, name in map(str.split, started))
    log.unlink()
    done = bulk("stop", "--running", "-j", "8")
    assert done.stdout.endswith("27 guests: 27 stopped\n")
    stopped = log.read_text().splitlines()
    for name in needs.keys() - failed:
        for other in needs[name]:
            assert stopped.index(f"postpost-stop {name}") < stopped.index(f"pre-stop {other}")
    assert host.leftovers() == []


def test_guests_that_do_not_need_each_other_start_side_by_side(host: Host, tmp_path: Path) -> None:
    for name, other in (("one", "two"), ("two", "one")):
        add(host, name)
        script = f"touch {tmp_path}/{name}; set -- {tmp_path}/{other}; {_MEET}"
        write_program(host.etc.confdir / name / "scripts/pre-start", script)
    assert bulk("start", "--all", "-j", "2").stdout.endswith("2 guests: 2 started\n")


def test_what_is_needed_starts_too_and_a_cycle_is_named(host: Host) -> None:
    add(host, "db", mark="none")
    add(host, "web", "db")
    add(host, "hen", "egg")
    add(host, "egg", "hen")
    done = bulk("start", "--mark", "default", code=2)
    assert done.stdout.splitlines() == [
        "db: started",
        "web: started",
        "4 guests: 2 started, 2 failed",
    ]
    cycle = "not started: guests need each other: egg needs hen, hen needs egg"
    said = [line for line in done.stderr.splitlines() if _OLD_KERNEL not in line]
    assert said == [f"vservers: guest {name}: {cycle}" for name in ("egg", "hen")]
    # What runs needs nothing any more; what is restarted is stopped and started in its turn.
    assert bulk("start", "web").stdout == "web: runs already\n"
    before = host.init_pid("db"), host.init_pid("web")
    assert bulk("restart", "web").stdout == "web: restarted\n"
    assert (host.init_pid("db"), host.init_pid("web") != before[1]) == (before[0], True)
    shown = bulk("restart", "web", "db").stdout.splitlines()
    assert shown == ["db: restarted", "web: restarted", "2 guests: 2 restarted"]
    assert host.init_pid("db") != before[0]
    bulk("status", "--mark", "none")
    assert bulk("status", "--stopped", code=1).stdout.endswith("2 guests: 0 running, 2 not\n")


def test_a_restart_stops_no_guest_that_would_not_start_again(host: Host) -> None:
    add(host, "db")
    add(host, "web")
    add(host, "front", "web")
    bulk("start", "--all")
    before = {name: host.init_pid(name) for name in host.names}
    host.set_key("web", "rlimits/nproc", "many\n")
    for words in (("restart",), ("condrestart",)):
        assert "rlimits/nproc" in host.vserver("web", *words, code=1).stderr
        assert host.init_pid("web") == before["web"]
    done = bulk("restart", "--all", code=2)
    assert done.stdout.splitlines() == ["db: restarted", "3 guests: 1 restarted, 2 failed"]
    assert "rlimits/nproc" in done.stderr
    assert "front: not restarted: it needs guest web, which cannot be started" in done.stderr
    assert (host.init_pid("front"), host.init_pid("web")) == (before["front"], before["web"])
    assert host.init_pid("db") != before["db"]
    host.set_key("web", "rlimits/nproc", "100\n")
    host.vserver("web", "restart")
    assert host.init_pid("web") != before["web"]


def test_guests_of_long_ago_start_by_onboot_and_priority(host: Host, tmp_path: Path) -> None:
    log = tmp_path / "noted"
    note_all(host, log)
    for name, text in (
        ("late", "ONBOOT=yes\nPRIORITY=200"),
        ("early", "ONBOOT=yes\nPRIORITY=5"),
        ("never", "ONBOOT=no"),
    ):
        root = host.etc.vdirbase / name
        grow_busybox(root)
        (root / "sbin/init").unlink()
        write_program(root / "sbin/init", "exec sleep 1000")
        host.etc.add_old_guest(name, f"{text}\nS_FLAGS=fakeinit\nIPROOT=0.0.0.0\n")
        host.names.append(name)
    done = bulk("start", "--mark", "default")
    assert done.stdout.splitlines() == ["early: started", "late: started", "2 guests: 2 started"]
    done = bulk("stop", "--mark", "default")
    assert done.stdout.splitlines() == ["late: stopped", "early: stopped", "2 guests: 2 stopped"]
    noted = [line.split() for line in log.read_text().splitlines()]
    started = ("prepre-start", "post-start", "pre-stop", "postpost-stop")
    assert noted == [
        *([phase, name] for name in ("early", "late") for phase in started[:2]),
        *([phase, name] for name in ("late", "early") for phase in started[2:]),
    ]


def test_a_terminal_shows_how_far_it_is(host: Host, tmp_path: Path) -> None:
    for name in ("one", "two"):
        add(host, name)
        host.set_key(name, "spaces/net", "")  # so that an older kernel has nothing to say
    fd, theirs = os.openpty()
    command = [os.fspath(VSERVERS), "start", "--all", "-j", "1"]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs) as start:
        os.close(theirs)
        shown = read_to_end(fd)
    os.close(fd)
    assert start.returncode == 0
    assert b"\r\x1b[K0 of 2 done; at work: one" in shown
    assert b"\r\x1b[K1 of 2 done; at work: two" in shown
    left = re.sub(rb"[^\r\n]*\r\x1b\[K", b"", shown)  # what is erased is gone
    assert left == b"one: started\r\ntwo: started\r\n2 guests: 2 started\r\n"
