"""Guests that share files, under the runtime: they write as if each had its own."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import Tool
from tests.fixtures.filesystems import is_immutable, thaw_below
from tests.fixtures.probes import need
from tests.fixtures.vservers import (
    Host,
    host_for_guests,
    is_alive,
    kill,
    private_kib,
    wait_until,
)
from vstore.pool import Identity

pytestmark = need("immutable", "lease")

_MOST_KIB = 8 << 10
"""What a supervisor may have in memory for itself alone, beside what it knows of objects."""
_BYTES_AN_OBJECT = 64
_MANY = 100_000
_CONF = "a setting that all guests have\n" * 10


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: Tool) -> Iterator[Host]:
    for host in host_for_guests(tmp_path, monkeypatch):
        for name in ("web", "db"):
            root = host.add_busybox(name)
            for file in ("conf", "other", "third"):
                (root / "etc" / file).write_text(f"{file}: {_CONF}")
                os.utime(root / "etc" / file, (1_000_000_000, 1_000_000_000))
        done = tool("vunify", "--all")
        assert done.returncode == 0, done.stderr
        assert is_immutable(host.etc.vdirbase / "web/etc/conf")
        yield host
        for name in host.names:
            host.try_vserver(name, "stop")
        thaw_below(tmp_path)


def _root(host: Host, name: str) -> Path:
    return host.etc.vdirbase / name


def _report(host: Host, name: str) -> dict[str, int]:
    found: dict[str, int] = json.loads((host.etc.rundir / name / "protection.json").read_text())
    return found


def test_a_guest_writes_and_the_others_keep_what_they_have(host: Host) -> None:
    host.vserver("web", "start")
    assert host.state("web")["protection"] == "copy-on-write"
    host.inside("web", "sh", "-c", "echo mine >> /etc/conf; rm /etc/other; chmod 600 /etc/third")
    assert (_root(host, "web") / "etc/conf").read_text() == f"conf: {_CONF}mine\n"
    assert not (_root(host, "web") / "etc/other").exists()
    assert (_root(host, "web") / "etc/third").stat().st_mode & 0o777 == 0o600
    for file in ("conf", "other", "third"):
        assert (_root(host, "db") / "etc" / file).read_text() == f"{file}: {_CONF}"
        assert is_immutable(_root(host, "db") / "etc" / file)
    assert "attack" not in host.console("web")


def test_init_itself_and_its_children_write(host: Host) -> None:
    host.set_key("web", "apps/init/cmd.start", "/bin/sh\n-c\necho x > /etc/conf; sleep 1000")
    host.vserver("web", "start")
    wait_until(lambda: (_root(host, "web") / "etc/conf").read_text() == "x\n")
    assert (_root(host, "db") / "etc/conf").read_text() == f"conf: {_CONF}"


def test_a_guest_whose_attackers_could_not_be_seen_is_not_started(host: Host) -> None:
    """In another namespace of processes /proc/locks hides what a killed program has left."""
    started = _run_elsewhere("vserver", "web", "start")
    assert started.returncode == 1
    assert "not the host's namespace of processes" in started.stderr
    assert "vunify --undo" in started.stderr
    assert not (host.etc.rundir / "web/protection.json").exists()
    unified = _run_elsewhere("vunify", "--all")
    assert unified.returncode == 0
    assert unified.stderr.count("run it on the host if guests run") == 1


def _run_elsewhere(name: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    program = os.fspath(Path(sys.executable).parent / name)
    elsewhere = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", program, *arguments]
    return subprocess.run(elsewhere, capture_output=True, text=True, check=False)


def test_a_killed_supervisor_is_replaced(host: Host) -> None:
    host.vserver("web", "start")
    first = _report(host, "web")["supervisor"]
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: _report(host, "web")["supervisor"] not in (0, first))
    host.inside("web", "sh", "-c", "echo x > /etc/conf")
    assert (_root(host, "web") / "etc/conf").read_text() == "x\n"
    assert "its supervisor was killed" in host.console("web")


def test_a_supervisor_is_small_and_many_objects_make_it_little_larger(host: Host) -> None:
    small = _supervisor_kib(host)
    assert small <= _MOST_KIB
    with _many_objects(host.etc.vdirbase / ".pool/objects"):
        large = _supervisor_kib(host)
    assert large - small <= _MANY * _BYTES_AN_OBJECT >> 10


def _supervisor_kib(host: Host) -> int:
    """Of a guest that was started just now and has broken a link: all objects are known then."""
    host.vserver("web", "start")
    host.inside("web", "sh", "-c", "echo x >> /etc/conf; echo x >> /etc/other")
    private = private_kib(_report(host, "web")["supervisor"])
    host.vserver("web", "stop")
    return private


@contextmanager
def _many_objects(folder: Path) -> Iterator[None]:
    """So many names of objects more, no two of one inode."""
    chance = random.Random(5)  # noqa: S311
    names = [
        Identity(chance.randbytes(32), size, 0o100644, 0, 0, 1, b"").name(0)
        for size in range(_MANY)
    ]
    folder_fd = os.open(folder, os.O_PATH)
    made: list[str] = []
    try:
        for name in names:
            os.mknod(name, dir_fd=folder_fd)
            made.append(name)
        yield
    finally:
        for name in made:
            os.unlink(name, dir_fd=folder_fd)
        os.close(folder_fd)


def test_a_killed_monitor_leaves_a_supervisor_that_the_next_one_takes_over(host: Host) -> None:
    host.vserver("web", "start")
    init = host.init_pid("web")
    first = _report(host, "web")["supervisor"]
    kill(host.monitor_pid("web"))
    assert is_alive(first)
    host.vserver("web", "exec", "true", code=125)
    host.vserver("web", "start")
    assert host.init_pid("web") == init
    wait_until(lambda: not is_alive(first))
    host.inside("web", "sh", "-c", "echo x > /etc/conf")
    assert (_root(host, "web") / "etc/conf").read_text() == "x\n"
    assert (_root(host, "db") / "etc/conf").read_text() == f"conf: {_CONF}"


def test_both_killed_the_guest_can_only_read(host: Host) -> None:
    host.set_key("web", "apps/init/cmd.start", "/bin/sh\n-c\n" + _KEEPS_TRYING)
    host.vserver("web", "start")
    wait_until(lambda: (_root(host, "web") / "tries").exists())
    supervisor, monitor = _report(host, "web")["supervisor"], host.monitor_pid("web")
    os.kill(monitor, signal.SIGSTOP)
    kill(supervisor, monitor)
    done = host.vserver("web", "start", code=1)
    assert "its supervisor is gone" in done.stderr
    assert (_root(host, "web") / "etc/conf").read_text() == f"conf: {_CONF}"
    host.try_vserver("web", "stop")


_KEEPS_TRYING = "while :; do echo x > /tries; sleep 0.1; done"


def _share_nothing(host: Host) -> None:
    thaw_below(host.etc.vdirbase)
    for name in ("web", "db"):
        for path in _root(host, name).glob("**/*"):
            if path.is_file() and not path.is_symlink() and path.stat().st_nlink > 1:
                content = path.read_bytes()
                mode = path.stat().st_mode
                path.unlink()
                path.write_bytes(content)
                path.chmod(mode)
                os.utime(path, (1_000_000_000, 1_000_000_000))
    for path in (host.etc.vdirbase / ".pool/objects").glob("*/*"):
        path.unlink()


def test_a_guest_that_shares_nothing_has_no_supervisor(host: Host) -> None:
    _share_nothing(host)
    host.vserver("web", "start")
    assert host.state("web")["protection"] == "none"
    assert not (host.etc.rundir / "web/protection.json").exists()
    assert host.inside("web", "sh", "-c", "echo x > /etc/conf; cat /etc/conf") == "x\n"


def test_a_guest_that_runs_is_unified_again_and_writes_on(host: Host, tool: Tool) -> None:
    host.vserver("web", "start")
    host.inside("web", "sh", "-c", "echo x >> /etc/conf; cp -p /etc/other /etc/again")
    host.inside("web", "sh", "-c", "mv /etc/again /etc/other")
    assert not (_root(host, "web") / "etc/other").samefile(_root(host, "db") / "etc/other")
    done = tool("vunify", "--all")
    assert done.returncode == 0, done.stderr
    assert (_root(host, "web") / "etc/other").samefile(_root(host, "db") / "etc/other")
    host.inside("web", "sh", "-c", "echo y >> /etc/other")
    assert (_root(host, "web") / "etc/other").read_text() == f"other: {_CONF}y\n"
    assert (_root(host, "db") / "etc/other").read_text() == f"other: {_CONF}"


def test_a_guest_without_supervisor_is_not_unified_while_it_runs(host: Host, tool: Tool) -> None:
    _share_nothing(host)
    host.vserver("web", "start")
    assert host.state("web")["protection"] == "none"
    done = tool("vunify", "--all")
    assert "web" in done.stderr
    assert "without copy-on-write links" in done.stderr
    assert not is_immutable(_root(host, "web") / "etc/conf")
    host.inside("web", "sh", "-c", "echo x > /etc/conf")


def test_status_tells_which_protection_is_in_force(host: Host) -> None:
    host.vserver("web", "start")
    assert "Shared files: copy-on-write\n" in host.vserver("web", "status").stdout
    shown = json.loads(host.vserver("web", "status", "--json").stdout)
    assert (shown["protection"], shown["attacks"], shown["attackers"]) == ("copy-on-write", 0, [])
    assert is_alive(shown["supervisor"])
    kill(host.monitor_pid("web"))
    kill(shown["supervisor"])
    assert "Shared files: read only" in host.vserver("web", "status").stdout
    assert json.loads(host.vserver("web", "status", "--json").stdout)["protection"] == "read-only"


def test_a_guest_whose_supervisor_cannot_work_does_not_start(host: Host) -> None:
    (host.etc.vdirbase / ".pool/format").write_text("something newer\n")
    done = host.vserver("web", "start", code=1)
    assert "format" in done.stderr
    assert not host.state("web")
    (host.etc.vdirbase / ".pool/format").write_text("vserver-tools pool 1\n")
    host.vserver("web", "start")


def test_what_a_guest_inherits_is_not_what_its_monitor_needs(host: Host) -> None:
    shown = "ulimit -Sn; ulimit -Hn"
    host.vserver("web", "start")
    inside = host.inside("web", "sh", "-c", shown).split()
    init = Path(f"/proc/{host.init_pid('web')}/limits").read_text()
    line = next(line for line in init.splitlines() if line.startswith("Max open files"))
    assert line.split()[3:5] == inside
