"""Joining a running guest: what the command gets, what it cannot get, and what comes back.

The guests are made by unshare(1), so nothing but the joining itself is of the runtime.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fixtures.ahead import before_others
from tests.fixtures.contexts import (
    KEPT,
    Context,
    Wish,
    capability_sets,
    mask,
    starting,
)
from tests.fixtures.joins import PROGRAM, background, command_of, environment, join
from tests.fixtures.probes import need, own_v1_freezer
from tests.fixtures.witness import children_of, link, state_of, wait_until
from vrun.freezer import find_frozen

Start = Callable[[Wish], Context]


start = pytest.fixture(starting)


@pytest.fixture
def web(start: Start) -> Context:
    """A guest that is configured with nothing."""
    return start(Wish())


def _script(guest: Context, name: str, text: str, *, mode: int = 0o755) -> str:
    """A file of the guest; its path inside."""
    (guest.root / name).write_text(text)
    (guest.root / name).chmod(mode)
    return f"/{name}"


def _perl(guest: Context, name: str, text: str) -> tuple[str, ...]:
    """A perl program of the guest, as a command."""
    return "/usr/bin/perl", _script(guest, name, text)


# --- exit codes


@pytest.mark.parametrize("code", [0, 1, 7, 125, 255])
def test_the_commands_own_exit_code_comes_back(web: Context, code: int) -> None:
    assert join("exec", "web", "sh", "-c", f"exit {code}").returncode == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
def test_a_signal_that_ends_the_command_comes_back(web: Context, number: int) -> None:
    assert join("exec", "web", "sh", "-c", f"kill -{number} $$").returncode == 128 + number


def test_what_is_not_there_is_not_found(web: Context) -> None:
    _script(web, "lost", "#!/no/such/interpreter\n")

    for command, reason in (
        ("frob", "has no command frob"),
        ("/bin/frob", "has no /bin/frob"),
        ("/bin/sh/frob", "has no /bin/sh/frob"),
        ("/lost", "cannot execute /lost: No such file or directory"),
    ):
        done = join("exec", "web", command)
        assert (done.returncode, done.stderr) == (127, f"guest web: {reason}\n")


def test_what_cannot_be_executed_is_told_of(web: Context) -> None:
    _script(web, "bin/plain", "text", mode=0o644)
    _script(web, "bin/odd", "no program")

    for command, reason in (
        ("/bin/plain", "Permission denied"),
        ("plain", "Permission denied"),
        ("/etc", "Is a directory"),
        ("odd", "Exec format error"),
    ):
        done = join("exec", "web", command)
        assert done.returncode == 126
        assert reason in done.stderr


def test_a_file_that_its_user_may_not_execute_is_told_of(web: Context) -> None:
    _script(web, "bin/mine", "#!/bin/sh\n", mode=0o700)

    assert join("suexec", "web", "bob", "mine").returncode == 126
    assert join("exec", "web", "mine").returncode == 0


def test_a_guest_that_is_stopped_has_exit_code_1(web: Context, tmp_path: Path) -> None:
    (tmp_path / "run/web/state.json").unlink()

    done = join("exec", "web", "true")

    assert (done.returncode, done.stderr) == (1, "guest web does not run\n")


def test_a_user_that_the_guest_lacks_is_our_own_failure(web: Context) -> None:
    done = join("suexec", "web", "games", "id")

    assert (done.returncode, done.stderr) == (125, "guest web: has no user 'games'\n")


def test_nothing_is_run_where_it_is_not_known_what_it_may_do(web: Context, tmp_path: Path) -> None:
    (tmp_path / "run/web/ceiling.json").unlink()

    done = join("exec", "web", "true")

    assert done.returncode == 125
    assert "it is not known what its processes may do" in done.stderr


def test_a_process_of_the_host_is_no_guest(web: Context, tmp_path: Path) -> None:
    path = tmp_path / "run/web/state.json"
    state = json.loads(path.read_text())
    started = Path(f"/proc/{os.getpid()}/stat").read_text().rpartition(")")[2].split()[19]
    path.write_text(json.dumps(state | {"init_pid": os.getpid(), "init_start": int(started)}))

    done = join("exec", "web", "true")

    assert done.returncode == 125
    assert "is in the host's own mount or pid namespace" in done.stderr


# --- what the command is


def test_the_command_is_held_to_what_the_guest_is_held_to(web: Context) -> None:
    status = join("exec", "web", "cat", "/proc/self/status").stdout

    ceiling = mask(KEPT)
    assert capability_sets(status) == {
        "CapInh": 0,
        "CapPrm": ceiling,
        "CapEff": ceiling,
        "CapBnd": ceiling,
        "CapAmb": 0,
    }
    assert re.search(r"Seccomp:\s+2", status)
    assert re.search(r"NoNewPrivs:\s+0", status)
    assert re.search(r"Uid:\s+0\s+0\s+0\s+0\n", status)
    assert re.search(r"Groups:\s+0\s*\n", status)
    assert "0022" in join("exec", "web", "sh", "-c", "umask").stdout


def test_what_the_guests_init_has_given_up_is_not_had_either(web: Context, tmp_path: Path) -> None:
    path = tmp_path / "run/web/ceiling.json"
    ceiling = json.loads(path.read_text())
    ceiling["capabilities"] += ["SYS_ADMIN", "MKNOD"]
    path.write_text(json.dumps(ceiling))

    status = join("exec", "web", "cat", "/proc/self/status").stdout

    assert capability_sets(status)["CapBnd"] == mask(KEPT)


def test_the_command_is_where_the_guests_init_is(web: Context) -> None:
    kinds = ("mnt", "pid", "uts", "ipc", "net", "cgroup", "time", "user")
    script = f"for kind in {' '.join(kinds)}; do readlink /proc/self/ns/$kind; done; hostname; pwd"

    seen = join("exec", "web", "sh", "-c", script).stdout.split()

    of_init = [link(f"/proc/{web.pid}/ns/{kind}") for kind in kinds]
    assert seen == [*of_init, "web", "/"]


def test_the_command_is_in_the_guests_cgroup(web: Context) -> None:
    with background("exec", "web", "sleep", "60") as client:
        pid = command_of(client.pid, "sleep")
        placed = Path(f"/proc/{pid}/cgroup").read_text()

        assert f"0::/{web.cgroup.name}/guest\n" in placed


def test_the_limits_of_the_guest_are_the_commands(web: Context) -> None:
    seen = join("exec", "web", "cat", "/proc/self/limits", "/proc/self/oom_score_adj").stdout

    assert re.search(r"Max open files\s+512\s+1024", seen)
    assert seen.endswith("\n77\n")


def test_what_the_caller_has_set_for_itself_is_not_handed_on(web: Context) -> None:
    script = "cat /proc/self/personality; ulimit -S -n; cat /proc/self/stat"
    odd = ("setarch", "--addr-no-randomize", "chrt", "--fifo", "1")
    done = subprocess.run(
        [*odd, *PROGRAM, "exec", "web", "sh", "-c", script],
        capture_output=True,
        text=True,
        check=True,
    )

    personality, files, stat = done.stdout.splitlines()
    assert (int(personality, 16), files) == (0, "512")
    assert stat.rpartition(")")[2].split()[38] == "0"  # policy, field 41: SCHED_OTHER


def test_suexec_is_the_guests_own_user(web: Context) -> None:
    seen = join("suexec", "web", "bob", "sh", "-c", "id; echo $HOME $USER; cat /proc/self/status")

    assert seen.stdout.startswith("uid=1000(bob) gid=1000(bob) groups=100(users),1000(bob)\n")
    assert "\n/home/bob bob\n" in seen.stdout
    sets = capability_sets(seen.stdout)
    assert sets == {"CapInh": 0, "CapPrm": 0, "CapEff": 0, "CapBnd": mask(KEPT), "CapAmb": 0}


def test_set_user_id_programs_work_inside(web: Context) -> None:
    (web.root / "usr/bin/perl").chmod(0o4755)

    assert join("suexec", "web", "bob", "perl", "-e", "print $>").stdout == "0"


def test_the_host_is_not_told_of_in_the_environment(
    web: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "of the host")
    monkeypatch.setenv("DEBIAN_FRONTEND", "noninteractive")
    monkeypatch.setenv("WANTED", "inside")
    monkeypatch.setenv("VSERVER_PASS_ENV", "WANTED OTHER")

    seen = join("exec", "web", "env").stdout.splitlines()

    names = {line.partition("=")[0] for line in seen}
    assert names <= {
        *("DEBIAN_FRONTEND", "HOME", "LANG", "LOGNAME", "PATH", "SHELL", "TERM", "USER", "WANTED"),
        *("LC_ALL", "LC_CTYPE", "PAGER", "TZ", "COLORTERM", "EDITOR", "LANGUAGE", "NO_COLOR"),
    }
    assert {"DEBIAN_FRONTEND=noninteractive", "WANTED=inside", "HOME=/root"} <= set(seen)


# --- input and output


def test_input_and_output_pass_through(web: Context) -> None:
    text = "".join(f"line {number}\n" for number in range(20_000))

    done = join("exec", "web", "sh", "-c", "cat; echo done >&2", stdin=text)

    assert (done.stdout, done.stderr) == (text, "done\n")


@pytest.mark.parametrize("source", ["<list", "cat list |"])
def test_a_loop_over_a_list_of_guests_goes_on(web: Context, tmp_path: Path, source: str) -> None:
    (tmp_path / "list").write_text("one\ntwo\nthree\n")
    body = 'while read name; do "$@" exec web echo "$name"; done'
    script = f"{source} {body}" if source.endswith("|") else f"{body} {source}"

    done = subprocess.run(
        ["sh", "-c", script, "sh", *PROGRAM],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(),
        check=True,
    )

    assert done.stdout == "one\ntwo\nthree\n"


def test_a_daemon_that_keeps_its_output_is_not_waited_for(web: Context) -> None:
    done = join("exec", "web", "sh", "-c", "sleep 1000 & echo started", timeout_s=60)

    assert (done.returncode, done.stdout) == (0, "started\n")


def test_a_reader_that_goes_away_ends_the_command(web: Context) -> None:
    line = " ".join(PROGRAM)

    done = subprocess.run(
        [
            "bash",
            "-c",
            f"{line} exec web sh -c 'while echo y; do :; done' | head -n 1; "
            "echo ${PIPESTATUS[0]}",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    assert done.stdout == f"y\n{128 + signal.SIGPIPE}\n"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_descriptors_that_the_caller_has_closed_are_at_their_end(web: Context, closed: str) -> None:
    script = f'"$@" exec web sh -c "cat; echo out; echo err >&2; exit 3" {closed}'

    done = subprocess.run(
        ["sh", "-c", script, "sh", *PROGRAM],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 3
    assert done.stdout == ("" if ">&-" in closed.split() else "out\n")
    assert done.stderr == ("" if "2>&-" in closed else "err\n")


def test_a_full_disk_is_told_of_and_ends_the_command(web: Context) -> None:
    command = [*PROGRAM, "exec", "web", "sh", "-c", "while echo one; do sleep 0.1; done; exit 3"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=full, stderr=subprocess.PIPE, check=False
        )

    assert b"cannot write to standard output: No space left on device" in done.stderr
    assert done.returncode == 128 + signal.SIGPIPE


# --- signals


def test_signals_reach_the_command(web: Context) -> None:
    script = "trap 'echo got it; exit 9' TERM; echo ready; while :; do sleep 0.01; done"
    with background("exec", "web", "sh", "-c", script) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "ready\n"

        client.send_signal(signal.SIGTERM)

        assert client.stdout.read() == "got it\n"
        assert client.wait() == 9


def test_a_stop_stops_the_command_until_it_goes_on(web: Context) -> None:
    with background("exec", "web", "sleep", "60") as client:
        pid = command_of(client.pid, "sleep")

        client.send_signal(signal.SIGTSTP)
        wait_until(lambda: state_of(client.pid) == "T" and state_of(pid) == "T")

        client.send_signal(signal.SIGCONT)
        wait_until(lambda: state_of(client.pid) == "S" and state_of(pid) == "S")


@pytest.mark.parametrize("group", ["", "guest"])
def test_a_frozen_guest_is_waited_for_a_moment_and_then_said(web: Context, group: str) -> None:
    join("exec", "web", "true")  # compiles the filter, for which libraries are looked for
    file = web.cgroup / group / "cgroup.freeze"
    file.write_text("1")
    try:
        done = join("exec", "web", "true")
    finally:
        file.write_text("0")
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr == f"guest web: is frozen: {file}\n"
    assert join("exec", "web", "true").returncode == 0


def test_a_guest_that_is_frozen_for_a_moment_is_no_failure(web: Context) -> None:
    (web.cgroup / "cgroup.freeze").write_text("1")
    try:
        with before_others(), background("exec", "web", "echo", "there") as client:
            time.sleep(0.5)
            (web.cgroup / "cgroup.freeze").write_text("0")
            assert client.wait(60) == 0
    finally:
        (web.cgroup / "cgroup.freeze").write_text("0")


def test_a_guest_that_freezes_whoever_joins_holds_nobody_up(web: Context) -> None:
    """It is frozen when the joiner comes, and was not when we looked."""
    join("exec", "web", "true")
    freeze = web.cgroup / "guest/cgroup.freeze"
    interpreter = Path(sys.executable).resolve()
    done = None
    deadline = time.monotonic() + 90
    while done is None and time.monotonic() < deadline:
        with before_others(), background("exec", "web", "sleep", "60") as client:
            while not children_of(client.pid):  # without a pause: it is milliseconds from the stub
                assert client.poll() is None
            freeze.write_text("1")
            try:
                time.sleep(0.2)
                if Path(f"/proc/{children_of(client.pid)[0]}/exe").readlink() == interpreter:
                    done = client.wait(60)  # held before it became the stub
            finally:
                freeze.write_text("0")
    assert done == 125


@need("v1_freezer")
def test_the_v1_freezer_holds_groups_still_too() -> None:
    with own_v1_freezer() as group:
        (group / "below").mkdir()
        try:
            assert find_frozen([group / "below"]) is None
            (group / "freezer.state").write_text("FROZEN")
            assert find_frozen([group / "below"]) in {
                group / "freezer.state",
                group / "below/freezer.state",
            }
        finally:
            (group / "below").rmdir()


def test_the_end_of_the_guest_ends_the_command(web: Context) -> None:
    with background("exec", "web", "sleep", "60") as client:
        command_of(client.pid, "sleep")

        os.kill(web.pid, signal.SIGKILL)

        assert client.wait(60) == 128 + signal.SIGKILL
