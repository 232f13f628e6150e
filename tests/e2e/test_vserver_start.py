"""vserver start, stop and what stands between, with guests that boot in milliseconds."""

import fcntl
import os
import pty
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.fixtures.guestconfig import write_program
from tests.fixtures.probes import need
from tests.fixtures.vservers import (
    BUSYBOX_INIT,
    SLEEPER,
    VSERVER,
    Host,
    free_number,
    host_for_guests,
    is_alive,
    status_of,
    wait_until,
)

pytestmark = need("root")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    yield from host_for_guests(tmp_path, monkeypatch)


def _link(pid: int, name: str) -> str:
    return os.fspath(Path(f"/proc/{pid}/{name}").readlink())


def test_a_start_returns_with_init_in_namespaces_of_its_own(host: Host) -> None:
    root = host.add_busybox("web")
    done = host.vserver("web", "start")
    assert (done.stdout, done.stderr) == ("", "")
    pid = host.init_pid("web")
    assert status_of(pid)["NSpid"].split()[1:] == ["1"]
    assert os.stat(f"/proc/{pid}/root").st_ino == root.stat().st_ino  # noqa: PTH116
    for kind in ("mnt", "pid", "uts", "ipc", "cgroup", "time"):
        assert _link(pid, f"ns/{kind}") != _link(os.getpid(), f"ns/{kind}"), kind
    assert _link(pid, "ns/net") == _link(os.getpid(), "ns/net")
    shown = subprocess.run(
        ["nsenter", "-t", str(pid), "-u", "hostname"], capture_output=True, text=True, check=True
    )
    assert shown.stdout == "web\n"


def test_the_guests_init_is_what_its_settings_say_and_nothing_more(host: Host) -> None:
    host.add_busybox("web", {**SLEEPER, "apps/init/environment": "PATH=/bin\nCOLOUR=blue"})
    host.vserver("web", "start")
    pid = host.init_pid("web")
    status = status_of(pid)
    environment = Path(f"/proc/{pid}/environ").read_bytes().rstrip(b"\0").split(b"\0")
    assert sorted(environment) == [b"COLOUR=blue", b"PATH=/bin"]
    assert Path(f"/proc/{pid}/cmdline").read_bytes() == b"/bin/sleep\x001000\0"
    assert sorted(path.name for path in Path(f"/proc/{pid}/fd").iterdir()) == ["0", "1", "2"]
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("0", "2")
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0xA44404FF
    assert os.getsid(pid) == pid
    assert _link(pid, "cwd") == _link(pid, "root")


def test_uptime_inside_counts_from_the_start(host: Host) -> None:
    host.add_busybox("web")
    host.vserver("web", "start")
    assert float(host.inside("web", "cat", "/proc/uptime").split()[0]) < 30


def test_a_second_start_is_a_warning_and_changes_nothing(host: Host) -> None:
    host.add_busybox("web")
    host.vserver("web", "start")
    pid = host.init_pid("web")
    done = host.vserver("web", "start")
    assert "runs already" in done.stderr
    assert host.init_pid("web") == pid


def test_a_stop_of_a_stopped_guest_is_a_warning(host: Host) -> None:
    host.add_busybox("web")
    assert "does not run" in host.vserver("web", "stop").stderr


def test_nothing_is_left_after_a_stop(host: Host) -> None:
    host.add_busybox("web")
    host.vserver("web", "start")
    pid = host.init_pid("web")
    host.vserver("web", "stop")
    assert not is_alive(pid)
    assert host.leftovers() == []
    assert not host.is_locked("web")


def test_many_starts_at_once_start_one_guest(host: Host) -> None:
    host.add_busybox("web")
    starts = [host.begin("web", "start") for _ in range(4)]
    outputs = [start.communicate(timeout=60) for start in starts]
    assert [start.returncode for start in starts] == [0] * 4
    assert sum("runs already" in error for _, error in outputs) == 3


def test_a_guest_without_a_number_gets_a_free_dynamic_one(host: Host) -> None:
    for name in ("one", "two"):
        host.add_busybox(name)
        (host.etc.confdir / name / "context").unlink()
        host.vserver(name, "start")
    numbers = [int(host.state(name)["xid"]) for name in ("one", "two")]
    assert numbers[0] != numbers[1]
    assert all(number >= 49152 for number in numbers)
    assert f"context '{numbers[0]}'" in host.vserver(str(numbers[0]), "status").stdout
    for name in ("one", "two"):
        host.vserver(name, "stop")


def test_two_guests_cannot_run_with_one_number(host: Host) -> None:
    number = free_number()
    for name in ("one", "two"):
        host.add_busybox(name, {**SLEEPER, "context": number})
    host.vserver("one", "start")
    failed = host.vserver("two", "start", code=1)
    assert f"{number} is that of guest one" in failed.stderr
    host.vserver("one", "stop")
    host.vserver("two", "start")


# --- reboot and halt


def test_a_reboot_from_inside_starts_it_again(host: Host) -> None:
    host.add_busybox("web")
    host.vserver("web", "start")
    pid, monitor = host.init_pid("web"), host.monitor_pid("web")
    host.run_inside("web", "reboot", "-f")
    wait_until(lambda: host.state("web").get("init_pid", pid) != pid)
    wait_until(lambda: "sleep" in host.try_vserver("web", "exec", "ps").stdout)
    assert not is_alive(pid)
    assert host.monitor_pid("web") == monitor
    assert "rebooted from inside" in host.console("web")


def test_a_halt_from_inside_ends_it(host: Host) -> None:
    host.add_busybox("web")
    host.vserver("web", "start")
    host.run_inside("web", "poweroff", "-f")
    host.wait_stopped("web")
    assert host.leftovers() == []
    assert "was halted from inside" in host.vserver("web", "status", code=3).stdout


def test_a_guest_whose_init_ends_is_cleaned_up(host: Host) -> None:
    waits = "until [ -e /end ]; do sleep 0.1; done; exit 7"
    root = host.add_busybox("web", {**SLEEPER, "apps/init/cmd.start": f"/bin/sh\n-c\n{waits}"})
    host.vserver("web", "start")
    (root / "end").touch()
    host.wait_stopped("web")
    assert host.leftovers() == []
    assert "ended with status 7" in host.vserver("web", "status", code=3).stdout


# --- stop


def test_busyboxs_own_init_is_asked_to_stop(host: Host) -> None:
    inittab = "::sysinit:/bin/touch /up\n::shutdown:/bin/touch /down\n"
    root = host.add_busybox("web", BUSYBOX_INIT, inittab=inittab)
    host.vserver("web", "start")
    wait_until((root / "up").exists)
    host.vserver("web", "stop")
    assert (root / "down").exists()


def test_a_guest_that_ignores_every_signal_is_killed(host: Host) -> None:
    deaf = "trap '' INT TERM HUP; echo deaf > /ready; while :; do sleep 100; done"
    root = host.add_busybox("web", {**SLEEPER, "apps/init/cmd.start": f"/bin/sh\n-c\n{deaf}"})
    host.set_key("web", "apps/init/killseq", "15 1 9")
    host.set_key("web", "apps/vshelper/sync-timeout", "1")
    host.vserver("web", "start")
    pid = host.init_pid("web")
    wait_until((root / "ready").exists)
    host.vserver("web", "stop")
    assert not is_alive(pid)
    assert host.leftovers() == []


def test_a_stop_command_of_the_guest_is_run_inside(host: Host) -> None:
    root = host.add_busybox("web", {**SLEEPER, "apps/init/cmd.stop": "/bin/sh\n-c\nhostname >/by"})
    host.set_key("web", "apps/vshelper/sync-timeout", "1")
    host.vserver("web", "start")
    host.vserver("web", "stop")
    assert (root / "by").read_text() == "web\n"


def test_restart_stops_and_starts(host: Host) -> None:
    host.add_busybox("web")
    host.vserver("web", "condrestart")
    assert host.state("web") == {}
    host.vserver("web", "restart")
    pid = host.init_pid("web")
    host.vserver("web", "condrestart")
    assert host.init_pid("web") != pid


# --- starts that fail


def _failed_start(host: Host, name: str = "web", *, code: int = 1) -> str:
    """What a start says that fails; nothing may be left of it."""
    done = host.vserver(name, "start", code=code)
    wait_until(lambda: not host.is_locked(name))
    assert host.leftovers() == []
    assert done.stdout == ""
    return done.stderr


def test_an_init_that_is_missing_is_named(host: Host) -> None:
    host.add_busybox("web", {**SLEEPER, "apps/init/cmd.start": "/sbin/nothing"})
    said = _failed_start(host)
    assert "cannot execute its init /sbin/nothing: No such file or directory" in said


def test_an_init_that_cannot_be_executed_is_named(host: Host) -> None:
    host.add_busybox("web", {**SLEEPER, "apps/init/cmd.start": "/etc/passwd"})
    assert "/etc/passwd: Permission denied" in _failed_start(host)


def test_an_init_that_fails_at_once_is_a_failed_start(host: Host) -> None:
    host.add_busybox("web", {**SLEEPER, "apps/init/cmd.start": "/bin/sh\n-c\nexit 3"})
    assert "its init ended with status 3" in _failed_start(host)


def test_an_init_that_fails_at_once_is_one_where_it_gets_little_time_too(host: Host) -> None:
    """Of each processor it has a hundredth; it works for some milliseconds."""
    slow = {"cflags": "sched_hard", "sched/fill-rate": "1", "sched/interval": "100"}
    fails = "n=0; while [ $n -lt 2000 ]; do n=$((n + 1)); done; exit 3"
    host.add_busybox("web", {**SLEEPER, **slow, "apps/init/cmd.start": f"/bin/sh\n-c\n{fails}"})
    assert "its init ended with status 3" in _failed_start(host)


def test_a_missing_root_is_named(host: Host) -> None:
    root = host.add_busybox("web")
    root.rename(root.with_name("elsewhere"))
    assert f"{root}" in _failed_start(host)


def test_a_broken_value_is_named_with_its_file_and_line(host: Host) -> None:
    host.add_busybox("web", {**SLEEPER, "bcapabilities": "CHOWN\nFLY"})
    assert re.search(r"web/bcapabilities:2: .*FLY", _failed_start(host))


def test_a_guest_without_configuration_is_code_5(host: Host) -> None:
    assert "there is no guest nobody" in host.vserver("nobody", "start", code=5).stderr


def test_an_unknown_style_aborts(host: Host) -> None:
    host.add_busybox("web", {"apps/init/style": "upstart"})
    assert "apps/init/style" in _failed_start(host)


def test_an_interrupted_start_is_undone(host: Host) -> None:
    host.add_busybox("web")
    start = _begin_and_hang(host)
    start.send_signal(signal.SIGINT)
    start.communicate(timeout=60)
    assert start.returncode == 130
    wait_until(lambda: not host.is_locked("web"))
    assert host.leftovers() == []


def _begin_and_hang(host: Host) -> "subprocess.Popen[str]":
    """A start that has come to a script which takes its time."""
    mark = host.etc.rundir / "hangs"
    write_program(host.etc.confdir / "web/scripts/pre-start", f"touch {mark}; exec sleep 1000")
    start = host.begin("web", "start")
    wait_until(mark.exists)
    return start


def test_a_stop_during_a_start_ends_it(host: Host) -> None:
    host.add_busybox("web")
    start = _begin_and_hang(host)
    host.vserver("web", "stop")
    _, said = start.communicate(timeout=60)
    assert start.returncode == 1
    assert "given up" in said
    assert host.leftovers() == []


def test_a_start_waits_for_another_command_that_has_the_lock(host: Host) -> None:
    host.add_busybox("web")
    host.vserver("web", "start")
    host.vserver("web", "stop")
    with (host.etc.rundir / "web/lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        start = host.begin("web", "start")
        wait_until(lambda: _sleeps(start.pid))
        assert start.poll() is None
        assert host.state("web") == {}
        fcntl.flock(lock, fcntl.LOCK_UN)
    _, said = start.communicate(timeout=60)
    assert (start.returncode, said) == (0, "")
    assert is_alive(host.init_pid("web"))


def _sleeps(pid: int) -> bool:
    """Whether the process waits for time to pass, as one does that looks again and again."""
    with suppress(OSError):
        return "nanosleep" in Path(f"/proc/{pid}/wchan").read_text()
    return False


def test_the_guest_survives_the_terminal_that_started_it(host: Host) -> None:
    host.add_busybox("web")
    child, terminal_fd = pty.fork()
    if child == 0:
        os.execv(VSERVER, [os.fspath(VSERVER), "web", "start"])  # noqa: S606
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(terminal_fd)
    pid, monitor = host.init_pid("web"), host.monitor_pid("web")
    assert is_alive(pid)
    assert is_alive(monitor)
    assert os.getsid(monitor) == monitor
    for fd in ("0", "1", "2"):
        assert _link(monitor, f"fd/{fd}") == "/dev/null"


# --- networks that are not the host's


def test_a_network_of_its_own_has_nothing_of_the_hosts(host: Host) -> None:
    host.add_busybox("web", {**SLEEPER, "spaces/net": ""})
    host.vserver("web", "start")
    pid = host.init_pid("web")
    assert _link(pid, "ns/net") != _link(os.getpid(), "ns/net")
    devices = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
    assert [line.split(":")[0].strip() for line in devices] == ["lo"]


def test_a_named_network_is_made_and_removed(host: Host) -> None:
    name = f"vtest-{os.getpid()}"
    host.add_busybox("web", {**SLEEPER, "netns/name": name})
    host.vserver("web", "start")
    place = Path("/run/netns") / name
    inode = place.stat().st_ino
    assert _link(host.init_pid("web"), "ns/net") == f"net:[{inode}]"
    assert "there is a network namespace" in _start_of_another(host, name)
    host.vserver("web", "stop")
    assert not place.exists()


def _start_of_another(host: Host, netns: str) -> str:
    host.add_busybox("other", {**SLEEPER, "netns/name": netns})
    return host.vserver("other", "start", code=1).stderr


def test_a_guest_can_share_the_network_of_another_that_runs(host: Host) -> None:
    host.add_busybox("web", {**SLEEPER, "spaces/net": ""})
    host.add_busybox("db", {**SLEEPER, "spaces/net": "web"})
    assert "does not run" in host.vserver("db", "start", code=1).stderr
    host.vserver("web", "start")
    host.vserver("db", "start")
    assert _link(host.init_pid("web"), "ns/net") == _link(host.init_pid("db"), "ns/net")


def test_warnings_name_what_cannot_be_had(host: Host) -> None:
    host.add_busybox("web", {**SLEEPER, "keepfds": "", "sysctl/0/setting": "vm.swappiness"})
    host.set_key("web", "sysctl/0/value", "1")
    said = host.vserver("web", "start").stderr
    assert "web/keepfds" in said
    assert "sysctl/0" in said


@pytest.mark.parametrize("free", range(0, 4))
def test_a_full_disk_is_named_and_nothing_is_left(host: Host, free: int) -> None:
    """Room for so many files of a page where the run state is kept."""
    host.add_busybox("web")
    host.vserver("web", "start")
    host.vserver("web", "stop")
    kept = [path.name for path in host.etc.rundir.iterdir()]
    options = f"size={4 * (free + 1)}k"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", host.etc.rundir], check=True)
    try:
        (host.etc.rundir / "filler").write_bytes(bytes(4096))
        done = host.try_vserver("web", "start")
        if done.returncode:
            assert "No space left on device" in done.stderr
        host.try_vserver("web", "stop")
        assert host.leftovers() == []
    finally:
        subprocess.run(["umount", "--lazy", host.etc.rundir], check=True)
    assert kept


def test_a_console_that_cannot_be_kept_is_a_warning(host: Host) -> None:
    host.add_busybox("web")
    host.logdir.write_text("a file in the folder's place")
    assert "console is not kept" in host.vserver("web", "start").stderr


def test_a_caller_without_descriptors_can_start_and_stop(host: Host) -> None:
    host.add_busybox("web")
    for word in ("start", "stop"):
        subprocess.run(["sh", "-c", f"exec {VSERVER} web {word} <&- >&- 2>&-"], check=True)
    host.vserver("web", "start")
