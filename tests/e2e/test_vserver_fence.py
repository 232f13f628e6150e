"""Guests on storage that two hosts share: one of them runs a guest, or the other, never both.

The second host is this kernel with another name, machine-id, boot id and RUNDIR.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.fixtures.probes import need, scaled
from tests.fixtures.vservers import (
    BUSYBOX_INIT,
    SLEEPER,
    VSERVER,
    Host,
    host_for_guests,
    is_alive,
    kill,
    wait_until,
)

pytestmark = need("root")

_FENCED = {**SLEEPER, "apps/fence": False}
_BECOME = """
hostname "$1"; shift
if [ -e /etc/machine-id ]; then mount --bind "$1" /etc/machine-id || exit 99; fi; shift
mount --bind "$1" /proc/sys/kernel/random/boot_id || exit 99; shift
exec "$@"
"""


@dataclass(frozen=True)
class Other:
    """The other host."""

    name: str
    folder: Path
    boot: str

    def command(self, *words: str | Path) -> list[str | Path]:
        machine, boot = self.folder / "machine-id", self.folder / f"boot-{self.boot}"
        machine.write_text(f"{self.name:0<32}\n")
        boot.write_text(f"{self.boot}\n")
        unshare = ["unshare", "--mount", "--uts", "sh", "-c", _BECOME, "sh", self.name]
        return [*unshare, machine, boot, *words]

    def environment(self) -> dict[str, str]:
        rundir = self.folder / f"run-{self.boot}"
        rundir.mkdir(exist_ok=True)
        return {**os.environ, "VSERVER_RUNDIR": os.fspath(rundir)}

    def vserver(self, *words: str, code: int = 0) -> str:
        """What `vserver` shows there; it must end with `code`."""
        done = subprocess.run(
            self.command(VSERVER, *words),
            capture_output=True,
            text=True,
            env=self.environment(),
            timeout=60,
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode == code, f"{words}: {done.returncode}, {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def begin(self, *words: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            self.command(VSERVER, *words),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=self.environment(),
        )


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    yield from host_for_guests(tmp_path, monkeypatch)


@pytest.fixture
def other(host: Host, tmp_path: Path) -> Iterator[Other]:
    folder = tmp_path / "other"
    folder.mkdir()
    made = Other("beta", folder, "1")
    yield made
    for name in host.names:
        for rundir in folder.glob("run-*"):
            if (rundir / name / "resources.json").exists():
                replace(made, boot=rundir.name.removeprefix("run-")).vserver(name, "stop")


def holder(host: Host, name: str = "web") -> Path:
    return host.etc.confdir / name / "apps/fence/holder"


def strays(host: Host, name: str = "web") -> list[str]:
    """What is in the folder beside the file."""
    return [path.name for path in holder(host, name).parent.iterdir() if path != holder(host, name)]


def test_only_one_of_two_hosts_runs_the_guest(host: Host, other: Other) -> None:
    host.add_busybox("web", _FENCED)
    host.vserver("web", "start")
    noted = json.loads(holder(host).read_text())
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert (noted["host"], noted["boot"]) == (os.uname().nodename, boot)
    said = other.vserver("web", "start", code=1)
    assert f"guest web: cannot start it here: host {noted['host']} has it since" in said
    assert f"hint: stop it on {noted['host']}; if that host is off" in said
    assert f"stopped here; host {noted['host']} has it" in other.vserver("web", "status", code=3)
    assert json.loads(other.vserver("web", "status", "--json", code=3))["host"] == noted["host"]
    other.vserver("web", "stop")  # it does not run there; that must not open the fence
    assert "cannot delete it here" in other.vserver("web", "delete", "--yes", code=1)
    assert is_alive(host.init_pid("web"))
    assert json.loads(holder(host).read_text()) == noted
    host.vserver("web", "stop")
    assert not holder(host).exists()
    other.vserver("web", "start")
    assert json.loads(holder(host).read_text())["host"] == "beta"
    assert "host beta has it" in host.vserver("web", "start", code=1).stderr
    assert host.state("web") == {}
    other.vserver("web", "stop")
    assert not holder(host).exists()
    assert strays(host) == []


def test_the_recipe_of_the_readme(host: Host, other: Other, tmp_path: Path) -> None:
    host.add_busybox("web")
    (tmp_path / "shared").mkdir()
    theirs = other.folder / "conf"
    theirs.mkdir()
    commands = recipe()
    assert len(commands) == 7
    for conf, chosen in ((host.etc.confdir, commands[:-1]), (theirs, commands[-2:-1])):
        for command in chosen:
            for usual, place in (
                ("/etc/vservers/", conf),
                ("/var/lib/vservers/", host.etc.vdirbase),
                ("/shared/", tmp_path / "shared"),
            ):
                command = command.replace(usual, f"{place}/")
            subprocess.run(["sh", "-euc", command], check=True)
    assert commands[-1] == "vserver web start"
    host.vserver("web", "start")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VSERVER_CONFDIR", os.fspath(theirs))
        assert "cannot start it here" in other.vserver("web", "start", code=1)
        host_runs = is_alive(host.init_pid("web"))
        patch.setenv("VSERVER_CONFDIR", os.fspath(host.etc.confdir))
        host.vserver("web", "stop")
        patch.setenv("VSERVER_CONFDIR", os.fspath(theirs))
        other.vserver("web", "start")
        other.vserver("web", "stop")
    assert host_runs


def recipe() -> list[str]:
    """The commands of the README's section, as they are typed."""
    text = (Path(__file__).parents[2] / "README.md").read_text()
    section = text.partition("\n## Two hosts, one storage\n")[2].partition("\n## ")[0]
    return [line[6:] for line in section.splitlines() if line.startswith("    # ")]


def test_of_two_hosts_at_the_same_moment_one_gets_it(host: Host, other: Other) -> None:
    host.add_busybox("web", _FENCED)
    for _ in range(scaled(2, 20)):
        there, here = other.begin("web", "start"), host.begin("web", "start")
        here.communicate(timeout=60)
        codes = sorted([there.wait(60), here.returncode])
        assert codes == [0, 1]
        if here.returncode == 0:
            host.vserver("web", "stop")
        else:
            other.vserver("web", "stop")
        assert not holder(host).exists()
    assert strays(host) == []


def test_after_a_power_loss_only_the_same_host_starts_it_again(host: Host, other: Other) -> None:
    host.add_busybox("web", _FENCED)
    other.vserver("web", "start")
    left = holder(host).read_text()
    other.vserver("web", "stop")
    holder(host).write_text(left)  # what is on the disk when the power fails
    assert "host beta has it" in host.vserver("web", "start", code=1).stderr
    assert holder(host).read_text() == left
    booted = replace(other, boot="2")
    booted.vserver("web", "start")
    assert json.loads(holder(host).read_text())["boot"] == "2"
    booted.vserver("web", "stop")
    assert not holder(host).exists()
    holder(host).write_text(left)  # the other host is gone for good: the administrator decides
    holder(host).unlink()
    host.vserver("web", "start")
    host.vserver("web", "stop")


def test_a_copied_machine_id_does_not_make_two_hosts_one(host: Host, other: Other) -> None:
    host.add_busybox("web", _FENCED)
    other.vserver("web", "start")
    values = json.loads(holder(host).read_text())
    other.vserver("web", "stop")
    machine = Path("/etc/machine-id")
    values["machine"] = machine.read_text().strip() if machine.exists() else os.uname().nodename
    holder(host).write_text(json.dumps(values))
    assert "host beta has it" in host.vserver("web", "start", code=1).stderr
    holder(host).unlink()


def test_the_fence_outlives_a_killed_monitor_and_goes_when_all_is_cleaned(host: Host) -> None:
    host.add_busybox("web", _FENCED)
    host.vserver("web", "start")
    monitor, init = host.monitor_pid("web"), host.init_pid("web")
    kill(monitor)
    assert is_alive(init)
    assert holder(host).exists()
    host.vserver("web", "start")  # gives it a new monitor
    (monitor,) = host.monitors()
    kill(monitor)
    kill(init)
    assert holder(host).exists()
    host.vserver("web", "stop")
    assert not holder(host).exists()


@need("soak")
def test_a_guest_that_reboots_keeps_it(host: Host) -> None:
    host.add_busybox("web", {**BUSYBOX_INIT, "apps/fence": False})
    host.vserver("web", "start")
    before, noted = host.init_pid("web"), holder(host).stat()
    host.run_inside("web", "reboot", "-f")
    wait_until(lambda: host.state("web").get("init_pid", before) != before, 60)
    assert holder(host).stat().st_ino == noted.st_ino
    host.vserver("web", "stop")
    assert not holder(host).exists()


def test_a_start_that_fails_lets_others_have_it(host: Host) -> None:
    host.add_busybox("web", {**_FENCED, "apps/init/cmd.start": "/no/init"})
    host.vserver("web", "start", code=1)
    assert list(holder(host).parent.iterdir()) == []


def test_a_file_that_cannot_be_read_keeps_the_guest_from_starting(host: Host) -> None:
    host.add_busybox("web", _FENCED)
    holder(host).write_text("beta")
    said = host.vserver("web", "start", code=1).stderr
    assert f"{holder(host)}: does not say which host has the guest" in said
    assert "hint: if the guest runs nowhere, remove it" in said
    host.vserver("web", "stop")
    assert holder(host).read_text() == "beta"
    holder(host).write_text('{"format": 2}')
    assert "has format 2" in host.vserver("web", "start", code=1).stderr
    assert host.leftovers() == []
