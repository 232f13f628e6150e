"""The other words of vserver: exit codes, status, console, scripts, init styles, rescue, delete."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.fixtures.guestconfig import write_program
from tests.fixtures.probes import need
from tests.fixtures.vservers import SLEEPER, VSERVER, Host, host_for_guests, is_alive, wait_until

pytestmark = need("root")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    yield from host_for_guests(tmp_path, monkeypatch)


# --- exit codes: reference 7.2


_CODES: Final[tuple[tuple[list[str], int], ...]] = (
    (["--version"], 0),
    (["--help"], 0),
    ([], 1),
    (["--unknown", "web", "start"], 1),
    (["web", "start", "--unknown"], 1),
    (["web", "status", "--unknown"], 1),
    (["web", "start", "/bin/sh"], 1),
    (["web"], 2),
    (["web", "fly"], 2),
    (["web", "delete"], 2),
    (["web", "start"], 0),
    (["--", "web", "start"], 0),
    (["web/", "status"], 3),
    (["web", "status", "--json"], 3),
    (["web", "running"], 1),
    (["web", "exec", "true"], 1),
    (["web", "enter"], 1),
    (["web", "chkconfig", "--list"], 1),
    (["nobody", "start"], 5),
    (["nobody", "stop"], 5),
    (["nobody", "status"], 5),
    (["nobody", "running"], 5),
    (["nobody", "exec", "true"], 5),
    (["nobody", "delete"], 5),
    (["a/b", "status"], 5),
    (["no body", "start"], 5),
)


def test_exit_codes_of_the_original(host: Host) -> None:
    host.add_busybox("web")
    for words, code in _CODES:
        done = host.vserver(*words, code=code)
        is_quiet = code in (0, 3) or words == ["web", "running"]
        assert bool(done.stderr) == (not is_quiet), words
        host.stop_all()


def test_codes_of_a_running_guest(host: Host) -> None:
    host.add_busybox("web")
    host.vserver("web", "start")
    assert host.vserver("web", "running").stdout == ""
    for argv, code in ((["true"], 0), (["sh", "-c", "exit 42"], 42), (["nothing"], 127)):
        host.vserver("web", "exec", *argv, code=code)
    host.vserver("web", "exec", "/etc/passwd", code=126)
    host.vserver("web", "exec", "sh", "-c", "kill -9 $$", code=137)


def test_help_says_each_word(host: Host) -> None:
    said = host.vserver("--help").stdout
    for word in ("restart", "condrestart", "suexec", "enter", "console", "running", "status"):
        assert word in said
    assert max(map(len, said.splitlines())) <= 80


# --- status


def test_status_of_a_running_guest(host: Host) -> None:
    host.add_busybox("web")
    host.vserver("web", "start")
    number = host.state("web")["xid"]
    lines = host.vserver("web", "status").stdout.splitlines()
    assert lines == [
        f"Vserver 'web' is running at context '{number}'",
        "Number of processes: 1",
        "Uptime: 00:00",
    ]


def test_status_as_json(host: Host) -> None:
    root = host.add_busybox("web")
    host.vserver("web", "start")
    found = json.loads(host.vserver("web", "status", "--json").stdout)
    state = host.state("web")
    assert 0 <= found.pop("uptime_s") < 60
    assert found == {
        "format": 1,
        "guest": "web",
        "root": os.fspath(root),
        "running": True,
        "processes": 1,
        "monitor": True,
        **{key: state[key] for key in ("xid", "init_pid", "cgroup", "pool", "protection")},
    }
    host.vserver("web", "stop")
    found = json.loads(host.vserver("web", "status", "--json", code=3).stdout)
    assert found["running"] is False
    assert found["ended"]["how"] == "stopped"


# --- console


def test_the_console_is_kept_and_a_guest_that_floods_it_does_no_harm(host: Host) -> None:
    flood = "echo first; i=0; while [ $i -lt 40 ]; do head -c 65536 /dev/zero | tr '\\0' x; "
    flood += "i=$((i+1)); done; echo last; exec sleep 1000"
    host.add_busybox("web", {**SLEEPER, "apps/init/cmd.start": f"/bin/sh\n-c\n{flood}"})
    host.vserver("web", "start")
    wait_until(lambda: "last" in host.console("web")[-200:])
    logs = sorted(host.logdir.iterdir())
    assert [path.name for path in logs] == ["web.console", "web.console.1", "web.console.2"]
    assert "first" in logs[2].read_text()
    assert all(path.stat().st_size < 2 << 20 for path in logs)
    assert all(path.stat().st_mode & 0o777 == 0o640 for path in logs)


def test_somebody_who_follows_the_console_sees_it_until_the_end(host: Host) -> None:
    speak = "while :; do echo tick; sleep 0.05; done"
    host.add_busybox("web", {**SLEEPER, "apps/init/cmd.start": f"/bin/sh\n-c\n{speak}"})
    host.vserver("web", "start")
    with host.begin("web", "console", "--follow") as follower:
        assert follower.stdout
        first = [follower.stdout.readline() for _ in range(3)]
        host.vserver("web", "stop")
        follower.communicate(timeout=60)
    assert "".join(first).count("tick") > 1
    assert follower.returncode == 0


def test_the_console_of_a_stopped_guest_is_a_failure(host: Host) -> None:
    host.add_busybox("web")
    assert "console" in host.vserver("web", "console", code=1).stderr


# --- scripts


_PHASES = (
    *("initialize", "prepre-start", "pre-start", "post-start"),
    *("pre-stop", "post-stop", "postpost-stop"),
)


def _add_scripts(host: Host, folder: Path, *, who: str) -> Path:
    """A script for each phase that notes who was called how."""
    notes = host.etc.confdir / "notes"
    for phase in _PHASES:
        write_program(folder / phase, f'echo "{who} $1 $2 $(basename "$PWD")" >>{notes}')
    return notes


def test_scripts_of_all_phases_run_in_their_order(host: Host) -> None:
    root = host.add_busybox("web")
    notes = _add_scripts(host, host.etc.confdir / "web/scripts", who="own")
    _add_scripts(host, host.etc.confdir / ".defaults/scripts", who="default")
    host.vserver("web", "start")
    host.vserver("web", "stop")
    places = ["web"] * 7
    assert root.name == "web"
    expected = [f"own {phase} web {place}" for phase, place in zip(_PHASES, places, strict=True)]
    assert notes.read_text().splitlines() == expected


def test_default_scripts_run_where_the_guest_has_none(host: Host) -> None:
    host.add_busybox("web")
    notes = _add_scripts(host, host.etc.confdir / ".defaults/scripts", who="default")
    write_program(host.etc.confdir / "web/scripts/pre-start.d/10-own", f"echo own >>{notes}")
    sourced = host.etc.confdir / "web/scripts/post-start"
    sourced.write_text(f"echo sourced $1 >>{notes}; DONT_SKIP_DEFAULTS=1\n")
    host.vserver("web", "start")
    assert notes.read_text().splitlines() == [
        "default initialize web web",
        "default prepre-start web web",
        "own",
        "sourced post-start",
        "default post-start web web",
    ]


@pytest.mark.parametrize("phase", ["initialize", "prepre-start", "pre-start", "post-start"])
def test_a_script_that_fails_undoes_the_start(host: Host, phase: str) -> None:
    host.add_busybox("web")
    script = write_program(host.etc.confdir / f"web/scripts/{phase}", "echo heard; exit 3")
    done = host.vserver("web", "start", code=1)
    assert done.stdout == "heard\n"
    assert f"{script} ended with status 3" in done.stderr
    assert host.leftovers() == []


def test_a_script_that_fails_does_not_hold_up_a_stop(host: Host) -> None:
    host.add_busybox("web")
    for phase in ("pre-stop", "post-stop", "postpost-stop"):
        write_program(host.etc.confdir / f"web/scripts/{phase}", "exit 1")
    host.vserver("web", "start")
    done = host.vserver("web", "stop")
    assert done.stderr.count("ended with status 1") == 3


def test_the_guest_sees_what_a_script_mounts_and_the_host_does_not(host: Host) -> None:
    root = host.add_busybox("web")
    (root / "data").mkdir()
    write_program(
        host.etc.confdir / "web/scripts/pre-start", 'mount -t tmpfs none "$VDIR/data"; touch data/x'
    )
    host.vserver("web", "start")
    assert host.inside("web", "ls", "/data") == "x\n"
    assert list((root / "data").iterdir()) == []


# --- init styles


_DAEMON = "if [ $1 = 3 ]; then sleep 1000 & echo $! >/pid; else kill $(cat /pid); fi"
"""An rc script that starts a daemon and ends it."""


def _add_sysv(host: Host, script: str) -> Path:
    root = host.add_busybox("web", {"apps/init/style": "sysv"})
    write_program(root / "etc/init.d/rc", script)
    return root


def test_sysv_runs_rc_to_its_end_and_lives_as_long_as_a_daemon(host: Host) -> None:
    script = """echo "$0 $1 $PREVLEVEL $RUNLEVEL" >>/notes; tail -n 1 /notes"""
    root = _add_sysv(host, f"{script}; {_DAEMON}")
    (root / "var/run/stale.pid").write_text("1")
    done = host.vserver("web", "start")
    assert done.stdout.replace("\r", "") == "/etc/init.d/rc 3 N 3\n"
    processes = ["init /etc/init.d/rc /etc/init.d/rc 3", "sleep 1000"]
    list_all = ("web", "ps", "-o", "args")
    wait_until(lambda: host.inside(*list_all).splitlines()[1:3] == processes)
    assert not (root / "var/run/stale.pid").exists()
    host.vserver("web", "stop")
    assert (root / "notes").read_text().splitlines()[1:] == ["/etc/init.d/rc 6 3 6"]


def test_sysv_ends_with_its_last_daemon(host: Host) -> None:
    _add_sysv(host, "(sleep 0.5) &")
    host.vserver("web", "start")
    host.wait_stopped("web")
    assert host.leftovers() == []


def test_sysv_without_any_daemon_has_started_and_ended(host: Host) -> None:
    _add_sysv(host, "echo done")
    host.vserver("web", "start")
    host.wait_stopped("web")


def test_sysv_whose_rc_fails_is_a_failed_start(host: Host) -> None:
    _add_sysv(host, f"{_DAEMON}; exit 4")
    assert "ended with status 4" in host.vserver("web", "start", code=1).stderr
    assert host.leftovers() == []


def test_sysv_reaps_orphans(host: Host) -> None:
    _add_sysv(host, f"{_DAEMON}; (sh -c 'sleep 0.1 & sleep 0.1 &')")
    host.vserver("web", "start")
    wait_until(lambda: host.inside("web", "ps", "-o", "args").count("sleep") == 1)
    assert "Z" not in host.inside("web", "ps", "-o", "stat")


def test_sysv_without_rc_says_what_is_missing(host: Host) -> None:
    host.add_busybox("web", {"apps/init/style": "sysv"})
    done = host.vserver("web", "start", code=1)
    assert "/etc/init.d/rc" in done.stderr
    assert "hint: " in done.stderr


def test_no_file_of_the_host_is_the_program_of_a_process_inside(host: Host) -> None:
    _add_sysv(host, _DAEMON)
    host.vserver("web", "start")
    pid = host.init_pid("web")
    assert os.fspath(Path(f"/proc/{pid}/exe").readlink()).startswith("/memfd:")
    host.vserver("web", "exec", "sh", "-c", "echo x >/proc/1/exe", code=1)


def test_rescue_runs_a_command_in_the_guests_place(host: Host) -> None:
    root = host.add_busybox("web", {"apps/init/style": "sysv"})
    host.vserver("web", "start", "--rescue", "/bin/sh", "-c", "echo $$ >/pid; sleep 0.2")
    assert (root / "pid").read_text() == "2\n"
    host.wait_stopped("web")
    host.vserver("web", "start", "--rescue-init", "/bin/sh", "-c", "echo $$ >/pid; sleep 9")
    wait_until(lambda: (root / "pid").read_text() == "1\n")
    host.vserver("web", "stop")
    host.vserver("web", "start", "--rescue")
    assert "sleep 900" in host.inside("web", "ps", "-o", "args")


# --- old-style guests


def test_an_old_style_guest_starts(host: Host) -> None:
    host.add_busybox("old")
    folder = host.etc.confdir / "old"
    number = (folder / "context").read_text().strip()
    subprocess.run(["rm", "-r", folder], check=True)
    host.etc.vdirbase.joinpath("old/etc/init.d").mkdir()
    write_program(host.etc.vdirbase / "old/etc/init.d/rc", _DAEMON)
    (host.etc.confdir / "old.conf").write_text(
        f"case $PROFILE in alpha) S_HOSTNAME=one;; *) S_HOSTNAME=two;; esac\nS_CONTEXT={number}\n"
        'S_FLAGS="lock nproc"\n'
    )
    write_program(host.etc.confdir / "old.sh", f'echo "$1 $2" >>{host.etc.confdir}/notes')
    host.vserver("--profile", "alpha", "old", "start")
    assert host.inside("old", "hostname") == "one\n"
    host.vserver("old", "stop")
    assert (host.etc.confdir / "notes").read_text().splitlines() == [
        f"{phase} old" for phase in ("pre-start", "post-start", "pre-stop", "post-stop")
    ]


# --- delete


def test_delete_asks_and_then_stops_and_removes(host: Host) -> None:
    root = host.add_busybox("web")
    host.vserver("web", "start")
    pid = host.init_pid("web")
    assert "nothing is deleted" in host.vserver("web", "delete", code=2, stdin="n\n").stderr
    assert is_alive(pid)
    host.vserver("web", "delete", stdin="y\n")
    assert not is_alive(pid)
    assert not root.exists()
    assert not (host.etc.confdir / "web").exists()
    host.names.clear()


def test_silent_asks_nothing(host: Host) -> None:
    root = host.add_busybox("web")
    host.vserver("--silent", "web", "delete")
    assert not root.exists()
    host.names.clear()


# --- with a configuration by hand


def test_a_reader_that_goes_away_ends_it_quietly(host: Host) -> None:
    host.add_busybox("web")
    done = subprocess.run(
        ["sh", "-c", f"{VSERVER} web status | true"], capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr
