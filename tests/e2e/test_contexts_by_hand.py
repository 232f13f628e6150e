"""reducecap, chbind and chcontext: single commands with less than the host's root has."""

import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.fixtures.probes import need
from tests.fixtures.vservers import SLEEPER, Host, host_for_guests, is_alive, wait_until

pytestmark = need("root")

BIN = Path(sys.executable).parent
_CGROUPS = Path("/sys/fs/cgroup")
_WAIT_S = 60
_SECURE = 0xA44404FF
"""The bits of what a guest has by default; linux/capability.h."""
_NET_RAW, _KILL, _CHOWN = 1 << 13, 1 << 5, 1 << 0
_OWN = f"10.213.{os.getpid() % 250}.5"
_INTERFACE = {"ip": _OWN, "prefix": "32", "dev": "lo"}
_NO_PROCESS = 2**22 + 1
_BIND = """\
import socket, sys
listener = socket.create_server(("0.0.0.0", 0))
print(*listener.getsockname())
for address in sys.argv[1:]:
    try:
        socket.socket().bind((address, 0))
        print(address, "bound")
    except OSError as error:
        print(address, error.errno)
client = socket.create_connection(listener.getsockname())
print(client.getsockname()[0])
"""


def attempt(*words: str | Path) -> "subprocess.CompletedProcess[str]":
    """A command as installed, however it ends; what it leaves running may hold its output open."""
    program, *rest = words
    command = [BIN / program, *rest]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        code = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, timeout=_WAIT_S
        ).returncode
        out.seek(0)
        errors.seek(0)
        done = subprocess.CompletedProcess(command, code, out.read(), errors.read())
    assert "Traceback" not in done.stderr, done.stderr
    return done


def run(*words: str | Path, code: int = 0) -> str:
    """A command as installed, which must end with `code`; its output."""
    done = attempt(*words)
    assert done.returncode == code, f"{words}: {done.returncode}, {done.stdout}{done.stderr}"
    return done.stdout


@contextmanager
def begun(*words: str | Path) -> "Iterator[subprocess.Popen[str]]":
    """A command as installed, in the background; killed at the end."""
    program, *rest = words
    command = [os.fspath(BIN / program), *rest]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def bounding(text: str) -> int:
    """CapBnd in the lines of /proc/PID/status."""
    found = re.search(r"^CapBnd:\s+([0-9a-f]+)$", text, re.M)
    assert found, text
    return int(found[1], 16)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """`web` runs, bound to an address on the loopback device; `off` lends its number."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for host in host_for_guests(tmp_path_factory.mktemp("site"), monkeypatch):
            keys = {f"interfaces/0/{key}": value for key, value in _INTERFACE.items()}
            host.add_busybox("web", {**SLEEPER, **keys})
            host.add_busybox("off", SLEEPER)
            host.vserver("web", "start")
            yield host


@pytest.fixture
def number(host: Host) -> Iterator[str]:
    """A number that no context has; at the end nothing may be left of one that had it."""
    text = (host.etc.confdir / "off/context").read_text().strip()
    yield text
    wait_until(lambda: leftovers(host) == [], _WAIT_S)


def leftovers(host: Host) -> list[str]:
    """What is left of contexts by hand."""
    found = [f"{path}" for path in host.etc.rundir.glob("context-*")]
    found += [f"{path}" for path in host.etc.rundir.glob(".xids/[0-9]*")]
    own = {f"{host.etc.rundir}/.xids/{host.state('web')['xid']}"}
    number = (host.etc.confdir / "off/context").read_text().strip()
    tops = [_CGROUPS, *_CGROUPS.iterdir()]
    groups = [top / "vservers" / number for top in tops]
    return [*(set(found) - own), *(f"{path}" for path in groups if path.is_dir())]


# --- reducecap


def test_reducecap_lowers_the_ceiling() -> None:
    everything = bounding(Path("/proc/self/status").read_text())
    shown = run("reducecap", "--secure", "grep", "Cap", "/proc/self/status")
    assert bounding(shown) == _SECURE & everything
    assert len(set(re.findall(r"Cap(?:Prm|Eff|Bnd):\s+(\w+)", shown))) == 1
    assert re.search(r"CapInh:\s+0+$", shown, re.M)
    shown = run(
        "reducecap",
        "--cap",
        "CAP_NET_RAW",
        "--secure",
        "--cap",
        "!kill",
        "cat",
        "/proc/self/status",
    )
    assert bounding(shown) == (_SECURE | _NET_RAW) & ~_KILL & everything
    shown = run("reducecap", "--cap", "~chown", "cat", "/proc/self/status")
    assert bounding(shown) == everything & ~_CHOWN


def test_what_was_given_up_does_not_come_back(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    inner = ("reducecap", "--cap", "chown", "chown", "1", os.fspath(file))
    done = attempt("reducecap", "--cap", "!chown", BIN / inner[0], *inner[1:])
    assert done.returncode == 1
    assert file.stat().st_uid == os.getuid()


def test_reducecap_shows_what_a_process_has(host: Host) -> None:
    shown = run("reducecap", "--show", "--pid", str(host.init_pid("web")))
    ceiling = next(line for line in shown.splitlines() if line.startswith("ceiling:"))
    assert {"CHOWN", "SYS_CHROOT"} <= set(ceiling.split())
    assert "SYS_ADMIN" not in shown
    assert run("reducecap", "--secure", BIN / "reducecap", "--show").count("AUDIT_WRITE") == 3
    assert run("reducecap", "--show", "--pid", str(_NO_PROCESS), code=1) == ""


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["sh", "-c", "exit 7"], 7),
        (["no-such-command"], 127),
        (["/etc/passwd"], 126),
        ([], 1),
        (["--cap", "flying", "true"], 1),
        (["--pid", "1", "true"], 1),
        (["--show", "--secure"], 1),
    ],
)
def test_reducecap_ends_as_its_command_does(words: list[str], code: int) -> None:
    assert attempt("reducecap", *words).returncode == code


# --- chbind


def test_chbind_keeps_a_command_to_its_addresses(host: Host) -> None:
    done = run(
        *("chbind", "--ip", "127.0.9.1/8", "--ip", "127.0.9.2"),
        *("/usr/bin/python3", "-c", _BIND, "127.0.9.2", "10.9.9.9"),
    )
    shown, listener, second, other, _ = done.splitlines()
    assert shown == "bound to 127.0.9.1 127.0.9.2"
    assert listener.split()[0] == "127.0.9.1"
    assert (second, other) == ("127.0.9.2 bound", f"10.9.9.9 {errno.EPERM}")


def test_chbind_gives_a_command_a_loopback_of_its_own(host: Host) -> None:
    script = (
        "import socket; own = socket.create_server(('127.0.0.1', 0)); print(*own.getsockname());"
        "print(open('/proc/net/tcp').read())"
    )
    shown = run(
        *("chbind", "--silent", "--ip", "127.0.9.1", "--lback", "127.44.0.1"),
        *("/usr/bin/python3", "-c", script),
    )
    name, port = shown.splitlines()[0].split()
    assert name == "127.0.0.1"
    assert f" 01002C7F:{int(port):04X} " in shown


def test_chbind_takes_the_addresses_of_a_guest_or_a_device(host: Host) -> None:
    python = ("/usr/bin/python3", "-c", _BIND, _OWN)
    for word in ("web", str(host.state("web")["xid"])):
        shown, listener, own, client = run("chbind", "--nid", word, *python).splitlines()
        assert shown == f"bound to {_OWN}"
        assert (listener.split()[0], own, client) == (_OWN, f"{_OWN} bound", _OWN)
    assert run("chbind", "--ip", "lo", "true") == "bound to 127.0.0.1\n"


def test_chbind_stays_in_its_context_and_leaves_no_group(host: Host, number: str) -> None:
    shown = run(
        *(
            "chcontext",
            "--silent",
            "--xid",
            number,
            BIN / "chbind",
            "--silent",
            "--ip",
            "127.0.9.1",
        ),
        *("sh", "-c", f"tail -n1 /proc/self/cgroup; {BIN}/vserver-info - XID"),
    )
    group, xid = shown.splitlines()
    assert f"/{number}/guest/chbind-" in group
    assert xid == number
    group = run("chbind", "--silent", "--ip", "127.0.9.1", "tail", "-n1", "/proc/self/cgroup")
    assert not any(folder.exists() for folder in v2_folders(group.strip().removeprefix("0::")))


def test_a_context_made_by_a_bound_command_is_bound_too(host: Host, number: str) -> None:
    shown = run(
        *("chbind", "--silent", "--ip", "127.0.9.1", BIN / "chcontext", "--silent"),
        *("--xid", number, "/usr/bin/python3", "-c", _BIND, "127.0.9.1"),
    )
    assert shown.split()[0] == "127.0.9.1"


def test_chbind_in_the_background_and_what_it_leaves(host: Host) -> None:
    words = ("chbind", "--silent", "--disconnect", "--ip", "127.0.9.1")
    seconds = f"1000.{os.getpid()}"  # nobody else sleeps that long
    assert run(*words, "sleep", seconds) == ""
    wait_until(lambda: bool(bound_sleepers(seconds)), _WAIT_S)
    (pid,) = bound_sleepers(seconds)
    group = Path(f"/proc/{pid}/cgroup").read_text().splitlines()[-1].removeprefix("0::")
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(folder.is_dir() for folder in v2_folders(group)), _WAIT_S)
    assert run(*words, "no-such-command", code=127) == ""


def bound_sleepers(seconds: str) -> list[int]:
    """The processes `sleep SECONDS` in groups of chbind."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            is_sleeper = (folder / "cmdline").read_text() == f"sleep\0{seconds}\0"
            if is_sleeper and "/chbind-" in (folder / "cgroup").read_text():
                found.append(int(folder.name))
    return found


def v2_folders(place: str) -> list[Path]:
    return [_CGROUPS / top / place.strip("/") for top in ("", "unified")]


@pytest.mark.parametrize(
    "words",
    [
        ["true"],
        ["--ip", "127.0.9.1"],
        ["--ip", "0.0.0.0", "true"],  # noqa: S104 (refused)
        ["--ip", "no/device", "true"],
        ["--ip", "eth999", "true"],
        ["--nid", "off", "true"],
        ["--nid", "web", "--ip", "127.0.9.1", "true"],
        ["--ip", "127.0.9.1", "--lback", "x", "true"],
        ["--ip", "127.0.9.1", "--flag", "flying", "true"],
        [*(f"--ip=127.0.9.{number}" for number in range(1, 18)), "true"],
    ],
)
def test_chbind_refuses_what_it_cannot_mean(host: Host, words: list[str]) -> None:
    done = attempt("chbind", *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr


@pytest.mark.parametrize(
    "program", [["chbind", "--silent", "--ip", "127.0.9.1"], ["chcontext", "--silent"]]
)
def test_exit_codes_and_signals_are_those_of_the_command(host: Host, program: list[str]) -> None:
    assert attempt(*program, "sh", "-c", "exit 7").returncode == 7
    assert attempt(*program, "sh", "-c", "kill -KILL $$").returncode == 137
    assert attempt(*program, "no-such-command").returncode == 127
    assert attempt(*program, "/etc/passwd").returncode == 126
    trap = "trap 'echo heard; exit 9' TERM; echo ready; while :; do sleep 0.05; done"
    with begun(*program, "sh", "-c", trap) as command:
        assert command.stdout is not None
        assert command.stdout.readline() == "ready\n"
        command.send_signal(signal.SIGTERM)
        assert command.stdout.readline() == "heard\n"
        assert command.wait(_WAIT_S) == 9


# --- chcontext


def test_a_context_sees_its_own_processes_and_has_its_own_name(host: Host, number: str) -> None:
    script = "hostname; ps axo pid,comm; cd /; pwd"
    done = run("chcontext", "--ctx", number, "--hostname", "byhand", "sh", "-c", script)
    first, name, _, *processes, folder = done.splitlines()
    assert (first, name, folder) == (f"New security context is {number}", "byhand", "/")
    assert [line.split() for line in processes] == [["1", "chcontext"], ["2", "sh"], ["4", "ps"]]
    assert os.uname().nodename != "byhand"
    assert leftovers(host) == []


def test_a_context_with_fakeinit_has_its_command_for_init(host: Host, number: str) -> None:
    words = ("chcontext", "--silent", "--xid", number, "--flag", "fakeinit")
    assert run(*words, "sh", "-c", "echo $$; exit 3", code=3) == "1\n"


def test_a_secure_context_is_held_to_what_guests_are(
    host: Host, number: str, tmp_path: Path
) -> None:
    script = (
        "cat /proc/self/status; mount -t tmpfs none /mnt && echo mounted; "
        "for top in /sys/fs/cgroup /sys/fs/cgroup/*/; do mkdir $top/byhand && echo moved; done; "
        "kill -KILL 1; unshare -U true && echo again"
    )
    done = attempt("chcontext", "--silent", "--secure", "--xid", number, "sh", "-c", script)
    everything = bounding(Path("/proc/self/status").read_text())
    assert bounding(done.stdout) == _SECURE & everything
    assert re.search(r"^Seccomp:\s+2$", done.stdout, re.M)
    assert not re.search(r"^(mounted|moved|again)$", done.stdout, re.M)
    assert not any((folder / "byhand").exists() for folder in (_CGROUPS, *_CGROUPS.iterdir()))


def test_spaces_of_a_context(host: Host, number: str) -> None:
    words = ("chcontext", "--silent", "--xid", number, "--spaces", "net,time")
    script = "readlink /proc/self/ns/net /proc/self/ns/time; cat /proc/uptime; ip -o link show up"
    net, time, uptime, *links = run(*words, "sh", "-c", script).splitlines()
    assert net != Path("/proc/self/ns/net").readlink().name
    assert time != Path("/proc/self/ns/time").readlink().name
    assert float(uptime.split()[0]) < float(Path("/proc/uptime").read_text().split()[0])
    assert [line.split(":")[1].strip() for line in links] == ["lo"]


def test_others_join_a_context_until_it_ends(host: Host, number: str) -> None:
    words = ("chcontext", "--silent", "--secure", "--disconnect", "--xid", number)
    assert run(*words, "sleep", "1000") == ""
    rows = [line for line in run("vserver-stat").splitlines() if line.startswith(f"{number} ")]
    assert len(rows) == 1
    assert rows[0].split()[1] == "2"
    assert len(rows[0]) <= 55  # no name
    shown = run("vps", "axo", "pid,args")
    assert len(re.findall(rf"^ *\d+ +{number} +(?:sleep|chcontext) .*1000$", shown, re.M)) == 2
    joined = run(
        "chcontext", "--xid", number, "sh", "-c", "cat /proc/self/status; ps ax; exit 4", code=4
    )
    assert joined.startswith(f"Joining security context {number}\n")
    assert bounding(joined) & ~_SECURE == 0
    assert "sleep 1000" in joined
    for change in (("--hostname", "x"), ("--cap", "net_raw"), ("--spaces", "net")):
        assert attempt("chcontext", "--xid", number, *change, "true").returncode == 1
    run("vkill", "-c", number, "-s", "KILL")


def test_what_a_command_leaves_keeps_the_context(host: Host, number: str) -> None:
    words = ("chcontext", "--silent", "--xid", number)
    script = "sleep 1000 >/dev/null 2>&1 & echo left; exit 6"
    assert run(*words, "sh", "-c", script, code=6) == "left\n"
    list_all = ("chcontext", "--silent", "--xid", number, "ps", "axo", "comm")
    wait_until(lambda: run(*list_all).split().count("sleep") == 1, _WAIT_S)
    run("vkill", "-c", number, "-s", "TERM", "--", "-1")


def test_a_keeper_that_is_killed_takes_its_context_with_it(host: Host, number: str) -> None:
    with begun(
        "chcontext", "--silent", "--xid", number, "sh", "-c", "echo $$; exec sleep 1000"
    ) as front:
        assert front.stdout is not None
        assert front.stdout.readline() == "2\n"
        keeper = int(Path(f"/proc/{front.pid}/task/{front.pid}/children").read_text().split()[0])
        init = int(Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()[0])
        os.kill(keeper, signal.SIGKILL)
        assert front.wait(_WAIT_S) == 137
        wait_until(lambda: not is_alive(init), _WAIT_S)
    assert leftovers(host) != []
    assert run("chcontext", "--silent", "--xid", number, "echo", "again") == "again\n"
    assert leftovers(host) == []


def test_a_running_guest_is_joined_as_by_exec(host: Host) -> None:
    xid = str(host.state("web")["xid"])
    for word in ("web", xid):
        shown = run("chcontext", "--silent", "--xid", word, "sh", "-c", "hostname; ls /")
        assert shown.split()[:2] == ["web", "bin"]


def test_a_private_guest_is_not_joined(host: Host) -> None:
    host.set_key("web", "cflags", "private")
    try:
        done = attempt("chcontext", "--xid", "web", "true")
    finally:
        (host.etc.confdir / "web/cflags").unlink()
    assert (done.returncode, done.stdout) == (1, "")
    assert "private" in done.stderr


def test_the_spectator_sees_all_processes(host: Host) -> None:
    script = f"{BIN}/vps axo pid,comm; {BIN}/vserver-stat; {BIN}/vserver-info - XID; exit 8"
    shown = run("chcontext", "--ctx", "1", "sh", "-c", script, code=8)
    assert re.search(r"^ *\d+ +1 ALL_PROC +ps$", shown, re.M)
    assert re.search(rf"^ *{host.init_pid('web')} +{host.state('web')['xid']} web ", shown, re.M)
    assert re.search(r"^1 +\d+ .* monitoring server$", shown, re.M)
    assert shown.endswith("\n1\n")
    shown = run("chcontext", "--xid", "1", "--cap", "!kill", "cat", "/proc/self/status")
    assert not bounding(shown) & _KILL


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--xid", "nobody", "true"],
        ["--xid", "0", "true"],
        ["--xid", "65535", "true"],
        ["--xid", "off", "true"],
        ["--xid", "1", "--hostname", "x", "true"],
        ["--spaces", "flying", "true"],
        ["--flag", "flying", "true"],
        ["--cap", "flying", "true"],
    ],
)
def test_chcontext_refuses_what_it_cannot_mean(host: Host, words: list[str]) -> None:
    done = attempt("chcontext", *words)
    assert (done.returncode, done.stdout) == (1, "")


def test_a_guest_does_not_start_with_the_number_of_a_context_by_hand(
    host: Host, number: str
) -> None:
    run("chcontext", "--silent", "--disconnect", "--xid", number, "sleep", "1000")
    done = host.vserver("off", "start", code=1)
    assert number in done.stderr
    run("vkill", "-c", number, "-s", "KILL")
    wait_until(lambda: leftovers(host) == [], _WAIT_S)
    host.vserver("off", "start")
    host.vserver("off", "stop")
