"""vservers unify: the nightly run, behind all others, with one line for the mail."""

import fcntl
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.filesystems import is_immutable, thaw_below
from tests.fixtures.probes import need
from tests.fixtures.runs import SETTLED_S
from tests.fixtures.vservers import VSERVER, Host, host_for_guests, run_installed, wait_until

pytestmark = need("root", "immutable", "lease")

VSERVERS = VSERVER.with_name("vservers")
_NAMES = ("web", "db", "mail")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    for host in host_for_guests(tmp_path, monkeypatch):
        for name in _NAMES:
            add_file(host.add_busybox(name), "conf")
        yield host
        host.stop_all()
        thaw_below(tmp_path)


def add_file(root: Path, name: str) -> None:
    """A file that is the same in every guest."""
    path = root / "etc" / name
    path.write_text(f"{name}: a setting that all guests have\n" * 1000)
    os.utime(path, (1_000_000_000, 1_000_000_000))


def unify(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """`vservers unify` as installed, which must end with `code`."""
    # There may be much else to do.
    return run_installed("vservers", "unify", "--full-speed", *words, code=code)


def file_of(host: Host, guest: str, name: str) -> Path:
    return host.etc.vdirbase / guest / "etc" / name


def test_one_line_says_what_was_done(host: Host) -> None:
    done = unify("--all", "--time-budget", "5m")
    line = r"3 guests unified in \d+ s, \S+ [KM]iB reclaimed, (\d+) of (\d+) files unified now, "
    found = re.fullmatch(line + r"0 before\n", done.stdout)
    assert found, done.stdout
    assert 0 < int(found[1]) < int(found[2])
    assert done.stderr == ""
    first = file_of(host, "web", "conf")
    assert is_immutable(first)
    assert all(first.samefile(file_of(host, name, "conf")) for name in _NAMES)
    assert re.search(r" 0 of \d+ files unified now, [1-9]\d* before$", unify("web").stdout)


def test_guests_that_run_stay_up_and_are_unified_too(host: Host) -> None:
    unify("--all")
    host.vserver("web", "start")
    before = host.init_pid("web")
    for name in _NAMES:
        add_file(host.etc.vdirbase / name, "new")
    changed = max(file_of(host, name, "new").stat().st_ctime for name in _NAMES)
    wait_until(lambda: time.time() > changed + SETTLED_S, 60)  # sooner it is left alone
    done = unify("--all")
    assert done.stdout.startswith("3 guests unified in ")
    assert file_of(host, "web", "new").samefile(file_of(host, "db", "new"))
    assert host.init_pid("web") == before
    host.inside("web", "sh", "-c", "echo mine >>/etc/new")
    assert file_of(host, "web", "new").read_text().endswith("mine\n")
    assert not file_of(host, "db", "new").read_text().endswith("mine\n")


def test_a_guest_that_cannot_take_part_is_named_and_counted(host: Host) -> None:
    host.vserver("web", "start")  # without a supervisor: it shares nothing yet
    done = unify("--all", code=2)
    assert done.stdout.startswith("2 guests unified in ")
    assert done.stdout.endswith(", 1 guest left alone\n")
    assert done.stderr.startswith("vservers: guest web: runs without copy-on-write links")
    assert file_of(host, "db", "conf").samefile(file_of(host, "mail", "conf"))
    assert not is_immutable(file_of(host, "web", "conf"))
    assert unify("web", code=1).stdout.startswith("0 guests unified in ")
    done = unify("nobody", code=1)
    assert (done.stdout, "no guest nobody" in done.stderr) == ("0 guests unified, 1 failed\n", True)


def test_no_time_leaves_all_for_the_next_run(host: Host) -> None:
    done = unify("--all", "--time-budget", "0")
    assert re.search(r" 0 of \d+ files .* left for the next run: the time was up$", done.stdout)
    assert not is_immutable(file_of(host, "web", "conf"))
    assert "is no time" in unify("--all", "--time-budget", "soon", code=1).stderr


def test_it_takes_the_lowest_priorities(host: Host) -> None:
    host.vserver("db", "start")
    host.vserver("db", "stop")
    with (host.etc.rundir / "db/lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # so that it waits where it can be looked at
        command = [os.fspath(VSERVERS), "unify", "--all"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
            wait_until(lambda: os.getpriority(os.PRIO_PROCESS, run.pid) == 19)
            wait_until(lambda: _ionice(run.pid) == "idle")
            os.setpriority(os.PRIO_PROCESS, run.pid, 0)  # on a busy machine it would take minutes
            fcntl.flock(lock, fcntl.LOCK_UN)
            shown, _ = run.communicate(timeout=60)
    assert shown.startswith("3 guests unified in ")


def _ionice(pid: int) -> str:
    """What ionice(1) says of the process."""
    done = subprocess.run(["ionice", "-p", str(pid)], capture_output=True, text=True, check=True)
    return done.stdout.strip()
