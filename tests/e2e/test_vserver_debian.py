"""Real guests: Debian 12 and 13 with systemd, Debian 12 with sysvinit, booted and stopped."""

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.fixtures import guests
from tests.fixtures.probes import need
from tests.fixtures.vservers import Host, host_for_guests, status_of, wait_until

pytestmark = [need("root", "bootable"), pytest.mark.timeout(400)]

_FSTAB = "none /proc proc defaults 0 0\nnone /tmp tmpfs size=64m,mode=1777 0 0\n"
_RECIPES = dict(zip(("twelve", "thirteen", "classic"), guests.BOOTABLE, strict=True))
_STYLES = {"twelve": "systemd", "thirteen": "plain", "classic": "sysv"}
_SYSTEMD = ("twelve", "thirteen")
_NOT_YET = ("", "offline", "initializing", "starting")
_UP_S = 120


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """All of them, running."""
    with pytest.MonkeyPatch.context() as patch:
        made = host_for_guests(tmp_path_factory.mktemp("debian"), patch)
        host = next(made)
        for name, recipe in _RECIPES.items():
            root = guests.unpack(recipe, host.etc.vdirbase / name)
            host.add(name, root, {"apps/init/style": _STYLES[name], "fstab": _FSTAB})
            host.vserver(name, "start")
        yield host
        next(made, None)


@pytest.fixture(params=tuple(_RECIPES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("name", _SYSTEMD)
def test_systemd_comes_up_with_every_unit(host: Host, name: str) -> None:
    state = _state_when_up(host, name)
    failed = host.inside(name, "systemctl", "--failed", "--no-legend", "--plain")
    assert (state, failed) == ("running", "")
    # Its journal gets this line always, its console only where it cannot reach the journal.
    journal = ("exec", "journalctl", "--output=cat", "_PID=1")
    wait_until(lambda: "\nStartup finished in " in host.vserver(name, *journal).stdout, _UP_S)
    wait_until(lambda: "login:" in host.console(name), _UP_S)


def _state_when_up(host: Host, name: str) -> str:
    """What its systemd says of itself once it has done all that it does at the start.

    `is-system-running --wait` does not wait for a systemd that cannot be asked yet.
    """
    ask = ("exec", "systemctl", "is-system-running", "--wait")
    deadline = time.monotonic() + _UP_S
    state = ""
    while state in _NOT_YET and time.monotonic() < deadline:
        state = host.try_vserver(name, *ask, timeout_s=_UP_S).stdout.strip()
    return state


def test_sysvinit_starts_its_daemons(host: Host) -> None:
    shown = host.inside("classic", "ps", "-eo", "comm=").split()
    assert {"cron", "sshd"} <= set(shown)


def test_a_guest_sees_its_own_processes_alone(host: Host, name: str) -> None:
    before = _known(host, name)
    pids = set(map(int, host.inside(name, "ps", "-eo", "pid=").split()))
    known = before & _known(host, name)
    assert 1 in known
    assert pids - known  # ps itself, which is gone
    assert known <= pids
    assert host.inside(name, "hostname") == f"{name}\n"


def _known(host: Host, name: str) -> set[int]:
    """The numbers that the guest's processes have inside; one may end while it is looked at."""
    numbers = set()
    for pid in _processes(host, name):
        with suppress(FileNotFoundError, ProcessLookupError):
            numbers.add(int(status_of(pid)["NSpid"].split()[-1]))
    return numbers


def _processes(host: Host, name: str) -> list[int]:
    group = Path(str(host.state(name)["cgroup"]))
    return [int(pid) for path in group.glob("**/cgroup.procs") for pid in path.read_text().split()]


def test_its_root_is_its_own_tree_with_nothing_of_the_host(host: Host, name: str) -> None:
    lines = Path(f"/proc/{host.init_pid(name)}/mountinfo").read_text().splitlines()
    roots = [line.split()[3] for line in lines if line.split()[4] == "/"]
    assert [root.endswith(f"/{name}") for root in roots] == [True]
    of_disks = [line for line in lines if line.partition(" - ")[2].split()[1].startswith("/dev/")]
    assert len(of_disks) == 1
    assert host.inside(name, "cat", "/etc/debian_version").startswith(("12.", "13."))


def test_setuid_programs_work_inside(host: Host, name: str) -> None:
    script = "cp /usr/bin/id /srv/id && chmod 4755 /srv/id"
    host.inside(name, "sh", "-c", script)
    shown = host.vserver(name, "suexec", "nobody", "/srv/id").stdout
    assert "euid=0(root)" in shown


def test_sudo_works_inside(host: Host, name: str) -> None:
    host.inside(name, "sh", "-c", "echo 'nobody ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/nobody")
    assert host.vserver(name, "suexec", "nobody", "sudo", "id", "-u").stdout == "0\n"
    shown = host.inside(name, "su", "-s", "/bin/sh", "nobody", "-c", "id -un")
    assert shown == "nobody\n"


def test_file_capabilities_work_inside(host: Host, name: str) -> None:
    script = "cp /bin/cat /srv/cat && setcap cap_dac_override+ep /srv/cat"
    host.inside(name, "sh", "-c", script)
    assert "root:" in host.vserver(name, "suexec", "nobody", "/srv/cat", "/etc/shadow").stdout
    host.vserver(name, "suexec", "nobody", "/bin/cat", "/etc/shadow", code=1)


def test_no_guest_can_see_or_signal_another(host: Host, name: str) -> None:
    others = {host.init_pid(other) for other in _RECIPES if other != name}
    # A number of the host may be that of a process of its own, too.
    foreign = others - _known(host, name)
    assert foreign
    for pid in foreign:
        host.vserver(name, "exec", "sh", "-c", f"kill -0 {pid}", code=1)
        host.vserver(name, "exec", "ls", f"/proc/{pid}", code=2)
    shown = host.inside(name, "findmnt", "-rno", "TARGET")
    assert not any(other in shown for other in _RECIPES if other != name)


@pytest.mark.parametrize("name", _SYSTEMD)
def test_systemctl_reboot_boots_again(host: Host, name: str) -> None:
    pid = host.init_pid(name)
    host.run_inside(name, "systemctl", "reboot")
    wait_until(lambda: host.state(name).get("init_pid", pid) != pid, _UP_S)
    assert _state_when_up(host, name) == "running"
    assert "rebooted from inside" in host.console(name)


def test_a_guest_shuts_itself_down_when_it_is_stopped(host: Host, name: str) -> None:
    began = time.monotonic()
    host.vserver(name, "stop")
    assert time.monotonic() - began < 15
    said = host.console(name)
    assert "Halting system" in said or name == "classic"
    assert "is killed now" not in said
    assert not os.path.lexists(host.etc.rundir / name / "resources.json")
    host.vserver(name, "start")
    assert host.init_pid(name)
