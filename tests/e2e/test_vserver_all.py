"""vserver-all: one command in each of many guests."""

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

_ALL = VSERVER.with_name("vserver-all")
_MEET = 'n=0; while ! [ -e "$1" ]; do n=$((n + 1)); [ $n -lt 600 ] || exit 1; sleep 0.1; done'
"""Waits up to a minute for a file."""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Three guests that run, one that does not."""
    with pytest.MonkeyPatch.context() as patch:
        made = host_for_guests(tmp_path_factory.mktemp("all"), patch)
        host = next(made)
        for name, mark in (("one", "a"), ("two", "a"), ("three", "b"), ("off", "b")):
            host.add_busybox(name, {**SLEEPER, "apps/init/mark": mark})
        for name in ("one", "two", "three"):
            host.vserver(name, "start")
        yield host
        next(made, None)


def everywhere(*words: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """`vserver-all` as installed, which must end with `code`."""
    return run_installed("vserver-all", *words, code=code)


def lines(text: str) -> list[str]:
    return sorted(text.splitlines())


def test_the_command_runs_in_each_and_lines_say_whose_they_are(host: Host) -> None:
    done = everywhere("--running", "--", "sh", "-c", "hostname; echo to $$ >&2; printf open")
    assert lines(done.stdout) == lines(
        "one: one\none: open\nthree: three\nthree: open\ntwo: two\ntwo: open\n"
    )
    *said, summary = done.stderr.splitlines()
    assert sorted(line.partition(" to ")[0] for line in said) == ["one:", "three:", "two:"]
    assert summary == "vserver-all: 3 guests: 3 done"
    done = everywhere("two", "--", "hostname")
    assert (done.stdout, done.stderr) == ("two: two\n", "")
    assert lines(everywhere("--mark", "a", "--no-prefix", "--", "hostname").stdout) == [
        "one",
        "two",
    ]


def test_each_exit_status_is_told_and_all_are_counted(host: Host) -> None:
    script = "case $(hostname) in one) exit 3 ;; two) kill -9 $$ ;; esac"
    done = everywhere("--all", "-j", "1", "--", "sh", "-c", script, code=2)
    assert done.stderr.splitlines() == [
        "off: does not run",
        "off: hint: vserver off start",
        "vserver-all: guest off: ended with status 1",
        "vserver-all: guest one: ended with status 3",
        "vserver-all: guest two: ended with status 137",
        "vserver-all: 4 guests: 1 done, 3 failed: off (1), one (3), two (137)",
    ]
    done = everywhere("--running", "--", "nothing", code=1)
    assert "one: has no command nothing" in done.stderr
    assert done.stderr.count("ended with status 127") == 3
    assert "nobody (" in everywhere("one", "nobody", "--", "true", code=2).stderr


def test_guests_work_side_by_side(host: Host) -> None:
    script = f"echo >/meet; set -- /other; {_MEET}"
    with subprocess.Popen(
        [_ALL, "one", "two", "-j", "2", "--", "sh", "-c", script], stderr=subprocess.PIPE, text=True
    ) as run:
        for name in ("one", "two"):  # both wait, and only both at once get on
            wait_until(lambda name=name: (host.etc.vdirbase / name / "meet").exists(), 60)
        for name in ("one", "two"):
            (host.etc.vdirbase / name / "other").touch()
        _, said = run.communicate(timeout=60)
    assert said == "vserver-all: 2 guests: 2 done\n"


def test_what_guests_write_does_no_harm_to_a_terminal(host: Host) -> None:
    done = everywhere("one", "--", "sh", "-c", r"printf 'a\033[2Jb\tc\r\nd\377e\n'")
    assert done.stdout == "one: a\\x1b[2Jb\tc\none: d\\xffe\n"
    big = everywhere("one", "--no-prefix", "--", "sh", "-c", "yes 0123456789 | head -n 20000")
    assert big.stdout == "0123456789\n" * 20000


@pytest.mark.parametrize("program", ["vapt-get", "vrpm"])
def test_package_commands_run_the_program_of_the_guest(host: Host, program: str) -> None:
    command = [os.fspath(_ALL.with_name(program)), "one", "off", "--", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    tool = program.removeprefix("v")
    said = done.stderr.splitlines()
    assert f"one: has no command {tool}" in said
    assert said[-1] == f"{program}: 2 guests: 0 done, 2 failed: off (1), one (127)"
    assert (done.returncode, done.stdout) == (1, "")


def test_nothing_can_be_typed(host: Host) -> None:
    assert everywhere("one", "--", "cat").stdout == ""


def test_a_command_of_the_host_gets_the_guests_name_first(host: Host, tmp_path: Path) -> None:
    program = write_program(tmp_path / "program", 'echo "$VSERVER_NAME: $*"')
    done = everywhere("--stopped", "--host", "--", program, "now", "then")
    assert done.stdout == "off: off: off now then\n"
    done = everywhere("--all", "--host", "--", VSERVER, "status", code=2)
    assert "off: Vserver 'off' is stopped" in done.stdout
    assert "one: Vserver 'one' is running" in done.stdout
    assert done.stderr == (
        "vserver-all: guest off: ended with status 3\n"
        "vserver-all: 4 guests: 3 done, 1 failed: off (3)\n"
    )
    assert "No such file" in everywhere("one", "--host", "--", "/no/program", code=1).stderr


@pytest.mark.parametrize(
    "words",
    [
        ["--", "true"],
        ["--all"],
        ["--all", "one", "--", "true"],
        ["--running", "--stopped", "--", "true"],
        ["--stopped", "--", "true"],
    ],
)
def test_wrong_usage_does_nothing(host: Host, words: list[str]) -> None:
    done = everywhere(*words, code=1)
    assert done.stdout == ""
    assert done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_is_ended_leaves_nothing_running(host: Host, number: int) -> None:
    script = "echo $$ >/pid; exec sleep 1000"
    pids = host.etc.vdirbase / "one/pid"
    pids.unlink(missing_ok=True)
    with subprocess.Popen(
        [os.fspath(_ALL), "one", "two", "--", "sh", "-c", script], stderr=subprocess.PIPE, text=True
    ) as run:
        try:
            wait_until(lambda: pids.exists() and pids.read_text(), 60)
            before = sleepers(host)
            assert before
            run.send_signal(number)
            run.communicate(timeout=60)
        finally:
            run.kill()
    assert run.returncode == 128 + number
    wait_until(lambda: not any(map(is_alive, before)), 60)


def sleepers(host: Host) -> list[int]:
    """The processes of guest one beside its init."""
    group = Path(str(host.state("one")["cgroup"]))
    pids = [int(pid) for path in group.glob("**/cgroup.procs") for pid in path.read_text().split()]
    return [pid for pid in pids if pid != host.init_pid("one")]
