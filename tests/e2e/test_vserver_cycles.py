"""Guests that are started and ended again and again, in every way there is: nothing adds up.

The commands run on an island, in a mount and a network namespace of the test's own, so that what
others do on this machine meanwhile is in none of the witnesses. The guests' cgroups are below a
base of the test's own for the same reason.
"""

import os
import random
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

import pytest

from tests.fixtures import vservers
from tests.fixtures.filesystems import device_of_mount
from tests.fixtures.guestconfig import Keys
from tests.fixtures.probes import need, scaled
from tests.fixtures.vservers import (
    VSERVER,
    Host,
    host_for_guests,
    kill,
    status_of,
    wait_until,
)

pytestmark = need("root")

_GROUPS: Final = Path("/sys/fs/cgroup")
_GONE_S: Final = 30
"""So long is waited for what goes a moment after its last word; on a busy machine that is long."""
_POLITE: Final[Keys] = {
    "apps/init/style": "plain",
    "apps/init/cmd.start": "/bin/sh\n-c\ntrap 'exit 0' HUP INT TERM; sleep 1000 & wait",
}
"""A guest of two processes that ends when it is asked to."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a guest could leave behind; each field is a list that is to stay as it was."""

    mounts: list[str]
    links: list[str]
    addresses: list[str]
    groups: list[str]
    processes: list[str]
    files: list[str]
    locks: list[str]
    descriptors: list[str]

    def differences(self, before: "Machine") -> dict[str, set[str]]:
        """What is in one of them only."""
        pairs = {
            one.name: (getattr(self, one.name), getattr(before, one.name)) for one in fields(self)
        }
        return {
            name: set(now) ^ set(then) or {"the number of equal ones"}
            for name, (now, then) in pairs.items()
            if now != then
        }


@dataclass(frozen=True, slots=True)
class Island:
    """Where the commands of the test run."""

    holder: int
    base: str
    host: Host

    def look(self) -> Machine:
        """As the kernel has it, and ip(8)."""
        return Machine(
            mounts=sorted(Path(f"/proc/{self.holder}/mountinfo").read_text().splitlines()),
            links=self._ip("-o", "link"),
            addresses=self._ip("-o", "-4", "address"),
            groups=self._groups(),
            processes=sorted(self._processes()),
            files=sorted(map(os.fspath, self._files())),
            locks=self._locks(),
            descriptors=_descriptors("self"),
        )

    def _files(self) -> Iterator[Path]:
        """Those of RUNDIR, but for what is kept so that the next start need not make it again."""
        rundir = self.host.etc.rundir
        return (path for path in rundir.glob("**/*") if rundir / ".filters" not in path.parents)

    def _groups(self) -> list[str]:
        """Those of the guests; one may be removed while we look."""
        while True:
            with suppress(FileNotFoundError):
                return sorted(map(os.fspath, _GROUPS.glob(f"*/**/{self.base}/**/")))

    def _ip(self, *words: str) -> list[str]:
        command = ["nsenter", f"--net=/proc/{self.holder}/ns/net", "ip", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return sorted(done.stdout.splitlines())

    def _processes(self) -> Iterator[str]:
        """Those in the guests' cgroups, in their trees, and those whose environment names them."""
        variable = f"VSERVER_RUNDIR={self.host.etc.rundir}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                is_ours = (
                    f"/{self.base}" in (folder / "cgroup").read_text()
                    or (folder / "root").readlink().is_relative_to(self.host.etc.vdirbase)
                    or variable in (folder / "environ").read_bytes().split(b"\0")
                )
                status = status_of(int(folder.name))
                # One whose monitor was killed is for the host's init to reap, when it likes.
                is_done = status["State"][0] == "Z" and status["PPid"] == "1"
                if is_ours and not is_done and int(folder.name) != os.getpid():
                    yield f"{folder.name} {status['Name']}"

    def _locks(self) -> list[str]:
        """Inodes below RUNDIR and CONFDIR that somebody has locked; see proc_locks(5)."""
        folders = (self.host.etc.rundir, self.host.etc.confdir)
        major, minor = device_of_mount(folders[0])
        files = {
            f"{major:02x}:{minor:02x}:{path.stat().st_ino}"
            for folder in folders
            for path in folder.glob("**/*")
            if path.is_file()
        }
        lines = Path("/proc/locks").read_text().splitlines()
        return [line for line in lines if line.split()[-3] in files]


def _descriptors(pid: int | str) -> list[str]:
    """What the process has open, without the numbers that differ each time."""
    found = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # that of the folder itself
            found.append(re.sub(r"\[\d+\]", "", os.fspath(path.readlink())))
    return sorted(found)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    yield from host_for_guests(tmp_path, monkeypatch)


@pytest.fixture
def island(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Island]:
    """Three guests: one as simple as can be, one with an address and mounts, one on a cable."""
    with _namespaces() as holder:
        command = f"exec nsenter --target {holder} --mount --net {VSERVER} "
        program = tmp_path / "vserver"
        program.write_text(f'#!/bin/sh\n{command}"$@"\n')
        program.chmod(0o755)
        monkeypatch.setattr(vservers, "VSERVER", program)
        base = f"vtest-cycles-{os.getpid()}"
        host.etc.set_defaults({"cgroup/base": base})
        host.add_busybox("plain", _POLITE)
        (host.add_busybox("bound", {**_POLITE, **_ADDRESS, "fstab": _FSTAB}) / "srv").mkdir()
        host.add_busybox("wired", {**_POLITE, **_CABLE})
        yield Island(holder, base, host)
        host.close()  # while the namespaces are still there


_ADDRESS: Final[Keys] = {
    "interfaces/0/ip": "10.9.0.5",
    "interfaces/0/dev": "ve0",
    "interfaces/0/prefix": "24",
}
_CABLE: Final[Keys] = {
    "netns/name": f"vtest-{os.getpid()}",
    "netns/interfaces/0/host": "v-wired",
    "netns/interfaces/0/guest": "eth0",
    "interfaces/0/ip": "10.9.1.5",
    "interfaces/0/dev": "eth0",
    "interfaces/0/prefix": "24",
}
_FSTAB: Final = (
    "none /proc proc defaults 0 0\n"
    "none /tmp tmpfs size=1m,mode=1777 0 0\n"
    "none /dev/pts devpts gid=5,mode=620 0 0\n"
    "none /srv tmpfs size=1m 0 0"
)
_ISLAND: Final = """
mount --make-rshared /
# Copies of what other tests have mounted would vanish with their mount points; some just did.
awk '$2 ~ "/vtest-|/pytest-|/netns/" { print $2 }' /proc/mounts |
    tac | xargs --no-run-if-empty umount --lazy || true
ip link set lo up
ip link add ve0 type veth peer name ve1
ip link set ve0 up
ip link set ve1 up
echo ready
exec sleep 10000
"""


@contextmanager
def _namespaces() -> Iterator[int]:
    """A process in a mount and a network namespace of its own.

    Mounts do propagate within it, as they do on a host, and nowhere else.
    """
    command = ["unshare", "--mount", "--net", "--propagation", "private", "sh", "-ec", _ISLAND]
    path = {"PATH": os.environ["PATH"]}  # it must not look like a process of a guest
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=path) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"ready\n"
            yield holder.pid
        finally:
            holder.kill()


# --- the ways to end


def _stop(host: Host, name: str) -> None:
    host.vserver(name, "stop")


def _restart(host: Host, name: str) -> None:
    pid = host.init_pid(name)
    host.vserver(name, "restart")
    assert host.init_pid(name) != pid
    host.vserver(name, "stop")


def _reboot(host: Host, name: str) -> None:
    pid, monitor = host.init_pid(name), host.monitor_pid(name)
    before = _descriptors(monitor)
    _end_from_inside(host, name, "reboot")
    wait_until(lambda: host.state(name).get("init_pid", pid) != pid)
    wait_until(lambda: host.try_vserver(name, "exec", "true").returncode == 0)
    assert host.monitor_pid(name) == monitor
    wait_until(lambda: _descriptors(monitor) == before)
    host.vserver(name, "stop")


def _halt(host: Host, name: str) -> None:
    _end_from_inside(host, name, "poweroff")
    host.wait_stopped(name)


def _end_from_inside(host: Host, name: str, program: str) -> None:
    """The command is killed with the guest, or done a moment before."""
    done = host.try_vserver(name, "exec", program, "-f")
    assert done.returncode in (0, 128 + signal.SIGKILL), done.stderr


def _kill_init(host: Host, name: str) -> None:
    os.kill(host.init_pid(name), signal.SIGKILL)
    host.wait_stopped(name)


def _kill_monitor(host: Host, name: str) -> None:
    kill(host.monitor_pid(name))
    host.vserver(name, "stop")


def _kill_monitor_and_start(host: Host, name: str) -> None:
    """The guest that runs on is adopted, and then told to stop."""
    pid = host.init_pid(name)
    kill(host.monitor_pid(name))
    host.vserver(name, "start")
    assert host.init_pid(name) == pid
    host.vserver(name, "stop")


def _kill_all(host: Host, name: str) -> None:
    """The next command finds what nobody could take back."""
    kill(host.monitor_pid(name), host.init_pid(name))
    host.vserver(name, "stop")


_ENDINGS: Final[tuple[Callable[[Host, str], None], ...]] = (
    _stop,
    _kill_all,
    _kill_monitor,
    _halt,
    _kill_init,
    _reboot,
    _kill_monitor_and_start,
    _restart,
)


def _cycle(host: Host, name: str, ending: Callable[[Host, str], None]) -> None:
    host.vserver(name, "start")
    ending(host, name)


def test_cycles_of_every_kind_leave_the_machine_as_it_was(island: Island) -> None:
    """Each ending in turn, over guests in turn; what the first runs make for good is no leak."""
    host, chance = island.host, random.Random(20)  # noqa: S311
    for name in host.names:
        _cycle(host, name, _stop)
    before = island.look()
    assert (before.groups, before.processes, before.locks) == ([], [], [])
    for number in range(scaled(len(_ENDINGS), 200)):
        ending = _ENDINGS[number % len(_ENDINGS)]
        name = host.names[number % len(host.names)] if number < 24 else chance.choice(host.names)
        _cycle(host, name, ending)
        with suppress(AssertionError):  # a monitor ends a moment after its last word
            wait_until(lambda: not island.look().differences(before), _GONE_S)
        left = island.look().differences(before)
        assert not left, f"cycle {number}, {name}, {ending.__name__}: {left}"


def test_guests_that_come_and_go_side_by_side_leave_nothing(island: Island) -> None:
    host = island.host
    for name in host.names:
        _cycle(host, name, _stop)
    before = island.look()
    for _ in range(scaled(1, 30)):
        _all_at_once(host, "start")
        seen = island.look().differences(before).keys()
        assert seen >= {"mounts", "links", "addresses", "groups", "processes", "files", "locks"}
        _all_at_once(host, "stop")
    with suppress(AssertionError):
        wait_until(lambda: not island.look().differences(before), _GONE_S)
    assert not island.look().differences(before)


def _all_at_once(host: Host, word: str) -> None:
    commands = [host.begin(name, word) for name in host.names]
    outputs = [command.communicate(timeout=60) for command in commands]
    assert [command.returncode for command in commands] == [0] * len(commands), outputs
