"""vserver exec, suexec, enter and console, as installed, in guests that vserver has started."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import pytest

from tests.fixtures.joins import command_of
from tests.fixtures.persons import Person, at_terminal
from tests.fixtures.probes import need
from tests.fixtures.vservers import (
    SLEEPER,
    VSERVER,
    Host,
    grow_busybox,
    host_for_guests,
    kill,
    status_of,
    wait_until,
)
from tests.fixtures.witness import children_of, link

pytestmark = need("root")

_READER = {
    "apps/init/style": "plain",
    "apps/init/cmd.start": '/bin/sh\n-c\nwhile read line; do eval "$line"; done\n',
}
"""A guest that does what is typed on its console."""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    yield from host_for_guests(tmp_path, monkeypatch)


@pytest.fixture
def web(host: Host) -> Host:
    """A host whose guest `web` runs; bob is one of its users."""
    root = host.add_busybox("web", {**SLEEPER, "ulimits/nofile": "300", "badness": "50"})
    (root / "etc/passwd").write_text(
        "root:x:0:0:root:/root:/bin/sh\nbob:x:1000:1000::/home/bob:/bin/sh\n"
    )
    (root / "etc/group").write_text("root:x:0:\nusers:x:100:bob\nbob:x:1000:\n")
    host.vserver("web", "start")
    return host


def _at(*words: str) -> AbstractContextManager[Person]:
    return at_terminal([VSERVER, *words])


# --- exit codes: reference 7.2 and 22.1


def test_the_commands_own_exit_code_is_vservers(web: Host) -> None:
    for code in (0, 1, 5, 42, 255):
        web.vserver("web", "exec", "sh", "-c", f"exit {code}", code=code)
    web.vserver("web", "exec", "sh", "-c", "kill -9 $$", code=128 + signal.SIGKILL)


@pytest.mark.parametrize("flags", ["lock,PRIVATE", "^3", "~private\nall"])
def test_nobody_enters_a_guest_that_is_private(host: Host, flags: str) -> None:
    host.add_busybox("web", {**SLEEPER, "cflags": flags})
    host.vserver("web", "start")
    for words in (("exec", "id"), ("suexec", "root", "id"), ("enter",), ("chkconfig", "--list")):
        done = host.vserver("web", *words, code=1)
        assert (done.stdout, "private keeps everybody out" in done.stderr) == ("", True)
    host.set_key("web", "cflags", "lock,~private,virt_uptime")
    assert host.inside("web", "id", "-u") == "0\n"
    host.vserver("web", "stop")


def test_an_old_file_can_make_a_guest_private(host: Host) -> None:
    root = host.etc.vdirbase / "web"
    grow_busybox(root)
    (root / "etc/inittab").write_text("::ctrlaltdel:/sbin/reboot\n::respawn:/bin/sleep 1000\n")
    host.names.append("web")
    host.etc.add_old_guest("web", 'S_FLAGS="fakeinit private"\n')
    host.vserver("web", "start")
    assert "private keeps" in host.vserver("web", "exec", "id", code=1).stderr
    host.vserver("web", "stop")


def test_what_cannot_be_run_has_the_codes_of_a_shell(web: Host) -> None:
    assert "has no command frob" in web.vserver("web", "exec", "frob", code=127).stderr
    assert "Is a directory" in web.vserver("web", "exec", "/etc", code=126).stderr
    assert "Permission denied" in web.vserver("web", "exec", "/etc/group", code=126).stderr
    assert "has no user 'eve'" in web.vserver("web", "suexec", "eve", "id", code=125).stderr


@pytest.mark.parametrize("words", [("exec", "true"), ("suexec", "bob", "true"), ("enter",)])
def test_a_stopped_guest_is_error_1(host: Host, words: tuple[str, ...]) -> None:
    host.add_busybox("web")
    done = host.vserver("web", *words, code=1)
    assert done.stderr == "vserver: guest web does not run\nhint: vserver web start\n"


def test_a_guest_that_there_is_not_is_error_5(host: Host) -> None:
    host.vserver("nobody", "exec", "true", code=5)


def test_chkconfig_is_run_inside(web: Host) -> None:
    assert "has no command chkconfig" in web.vserver("web", "chkconfig", "x", code=127).stderr


# --- the same as the guest's own processes


def test_a_command_has_what_the_guests_init_has(web: Host) -> None:
    init = status_of(web.init_pid("web"))

    lines = web.inside("web", "cat", "/proc/self/status").splitlines()

    inside = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    names = (
        "CapInh",
        "CapPrm",
        "CapEff",
        "CapBnd",
        "CapAmb",
        "NoNewPrivs",
        "Seccomp",
        "Uid",
        "Gid",
    )
    assert {name: inside[name] for name in names} == {name: init[name] for name in names}
    assert inside["Seccomp_filters"] == init["Seccomp_filters"]


def test_a_command_is_in_all_namespaces_and_groups_of_the_guest(web: Host) -> None:
    pid = web.init_pid("web")
    with web.begin("web", "exec", "sleep", "60") as client:
        command = command_of(client.pid, "sleep")
        try:
            for kind in ("mnt", "pid", "uts", "ipc", "net", "cgroup", "time", "user"):
                assert link(f"/proc/{command}/ns/{kind}") == link(f"/proc/{pid}/ns/{kind}"), kind
            for what in ("cgroup", "limits", "oom_score_adj", "mountinfo"):
                assert _read(command, what) == _read(pid, what)
            assert link(f"/proc/{command}/cwd") == link(f"/proc/{pid}/root")
            assert link(f"/proc/{command}/root") == link(f"/proc/{pid}/root")
            assert os.getsid(command) == os.getpgid(command) == command
        finally:
            client.kill()


def test_an_edit_since_the_start_gives_a_command_no_more(web: Host) -> None:
    before = web.inside("web", "grep", "-E", "Cap(Bnd|Eff)", "/proc/self/status")
    web.set_key("web", "bcapabilities", "SYS_ADMIN\nSYS_PTRACE\n")

    assert web.inside("web", "grep", "-E", "Cap(Bnd|Eff)", "/proc/self/status") == before


def test_a_command_dies_with_its_guest(web: Host) -> None:
    with web.begin("web", "exec", "sleep", "60") as client:
        command_of(client.pid, "sleep")
        web.vserver("web", "stop")
        assert client.wait(60) in (128 + signal.SIGTERM, 128 + signal.SIGKILL)


def test_a_signal_reaches_a_command_that_has_yet_to_begin(host: Host) -> None:
    """The guest gets so little time that its stub can be held before it forks the command."""
    slow = {"cflags": "sched_hard", "sched/fill-rate": "1", "sched/interval": "100"}
    host.add_busybox("web", {**SLEEPER, **slow})
    host.vserver("web", "start")
    freeze = Path(host.state("web")["cgroup"]) / "cgroup.freeze"
    was_held = False
    deadline = time.monotonic() + 100
    while not was_held and time.monotonic() < deadline:
        with host.begin("web", "exec", "sleep", "1000") as client:
            try:
                wait_until(lambda client=client: bool(_stubs(client.pid)))
                freeze.write_text("1")
                was_held = not any(children_of(stub) for stub in _stubs(client.pid))
                if was_held:
                    wait_until(lambda client=client: _polls(client.pid))
                client.send_signal(signal.SIGTERM)
                wait_until(lambda client=client: _has_heard(client.pid))
                freeze.write_text("0")
                assert client.wait(60) == 128 + signal.SIGTERM
            finally:
                freeze.write_text("0")
                client.kill()
    assert was_held


def _stubs(client_pid: int) -> list[int]:
    """Children of the client that are our interpreter no more."""
    found = []
    for pid in children_of(client_pid):
        with suppress(OSError):
            if link(f"/proc/{pid}/exe").startswith("/memfd:"):
                found.append(pid)
    return found


def _polls(pid: int) -> bool:
    """Whether the process waits in poll(2), or ppoll(2) where there is no other."""
    return _read(pid, "syscall").split()[0] in ("7", "73")  # asm/unistd_64.h, asm-generic/unistd.h


def _has_heard(pid: int) -> bool:
    """Whether no signal waits for the process any more."""
    status = status_of(pid)
    return int(status["SigPnd"], 16) == int(status["ShdPnd"], 16) == 0


def test_a_command_can_be_run_where_the_monitor_was_killed(web: Host) -> None:
    kill(web.monitor_pid("web"))

    assert web.inside("web", "id", "-u") == "0\n"


def test_suexec_is_a_user_of_the_guest(web: Host) -> None:
    done = web.vserver("web", "suexec", "bob", "sh", "-c", "id; pwd; echo $HOME")
    assert done.stdout.startswith("uid=1000(bob) gid=1000(bob)")
    assert done.stdout.endswith("\n/\n/home/bob\n")
    assert web.vserver("web", "suexec", "1000:users", "id", "-g").stdout == "100\n"


# --- terminals


def test_enter_is_a_shell_at_a_terminal_of_the_guest(web: Host) -> None:
    with _at("web", "enter") as person:
        person.type("tty; echo $((6 * 7))\r")
        assert re.search(r"/dev/pts/\d+\r\n42\r\n", person.wait_for("42\r\n"))
        person.type("exit 9\r")
        assert person.wait() == 9


def test_enter_runs_the_shell_that_is_configured(web: Host) -> None:
    web.set_key("web", "shell", "/bin/hostname\n")

    assert web.vserver("web", "enter").stdout == "web\n"


def test_the_console_shows_the_guest_and_takes_what_is_typed(host: Host) -> None:
    host.add_busybox("web", _READER)
    host.vserver("web", "start")
    with _at("web", "console") as person:
        person.resize(31, 77)
        person.type("stty size; echo $((6 * 7))\r")
        assert "31 77" in person.wait_for("42\r\n")
        assert not person.shows_typing()

        person.type("\x1d")

        assert person.wait() == 0
    assert host.state("web")


def test_the_console_ends_with_the_guest(host: Host) -> None:
    host.add_busybox("web", _READER)
    host.vserver("web", "start")
    with _at("web", "console") as person:
        person.type("echo $((6 * 7))\r")
        person.wait_for("42\r\n")
        host.vserver("web", "stop")
        assert person.wait() == 0


def test_the_console_of_a_stopped_guest_is_an_error(host: Host) -> None:
    host.add_busybox("web")
    assert "console" in host.vserver("web", "console", code=1).stderr


# --- nothing of the host


def test_a_command_sees_three_descriptors_and_none_of_the_hosts(web: Host, tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = "ls /proc/$$/fd; for fd in 0 1 2; do readlink /proc/$$/fd/$fd; done"
    with out.open("w") as file:
        subprocess.run(
            ["sh", "-c", f"exec 9</etc/passwd; {VSERVER} web exec sh -c '{script}' </etc/passwd"],
            stdout=file,
            check=True,
        )
    numbers, targets = out.read_text().split()[:3], out.read_text().split()[3:]
    assert numbers == ["0", "1", "2"]
    assert all(re.fullmatch(r"pipe:\[\d+\]", target) for target in targets)


def _read(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()
