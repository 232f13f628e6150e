"""What a guest is held to as a whole, as the control files have it and as the guest meets it.

Runs where the controllers are in v1 hierarchies, and where they are in that of v2 (make test-vm).
"""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.fixtures.guestconfig import Keys
from tests.fixtures.probes import need
from tests.fixtures.vservers import SLEEPER, Host, host_for_guests, kill, wait_until
from vrun.hierarchy import find_hierarchies

pytestmark = need("root")

_MIB: Final = 1 << 20
_FILL: Final = ("dd", "if=/dev/zero", "of=/dev/null", "count=1")
"""dd(1) has a buffer of one block."""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    yield from host_for_guests(tmp_path, monkeypatch)


def _start(host: Host, keys: Keys) -> str:
    """Start the guest `web`; what the command wrote on stderr.

    With a network of its own: what an older kernel cannot keep a bound guest from is said too.
    """
    host.add_busybox("web", {**SLEEPER, "spaces/net": "", **keys})
    return host.vserver("web", "start").stderr


def _folder(host: Host, controller: str) -> tuple[Path, bool]:
    """Where the guest's init is limited, as the kernel says; whether that is v2."""
    hierarchies = find_hierarchies()
    places: dict[str, str] = {}
    for line in Path(f"/proc/{host.init_pid('web')}/cgroup").read_text().splitlines():
        _, words, place = line.split(":", 2)
        places |= dict.fromkeys(words.split(","), place.lstrip("/"))
    if controller in places:
        return hierarchies.v1[controller] / places[controller], False
    return (hierarchies.v2 / places[""]).parent, True


def _read(host: Host, v2: str, v1: str | None = None) -> str:
    folder, is_v2 = _folder(host, v2.partition(".")[0])
    return (folder / (v2 if is_v2 else v1 or v2)).read_text().strip()


def _count(host: Host, key: str, v2: str, v1: str | None = None) -> int:
    words = _read(host, v2, v1).split()
    return int(words[words.index(key) + 1])


def test_more_processes_than_it_may_have_are_refused(host: Host) -> None:
    assert _start(host, {"rlimits/nproc": "20"}) == ""
    assert _read(host, "pids.max") == "20"
    script = "for n in $(seq 40); do sleep 100 & done; wait"
    assert "can't fork" in host.try_vserver("web", "exec", "sh", "-c", script).stderr
    assert int(_read(host, "pids.current")) <= 20
    assert host.inside("web", "echo", "still here") == "still here\n"


def test_more_memory_than_it_may_have_ends_the_process(host: Host) -> None:
    assert _start(host, {"rlimits/rss": str(64 * _MIB // 4096)}) == ""
    assert _read(host, "memory.max", "memory.limit_in_bytes") == f"{64 * _MIB}"
    host.inside("web", *_FILL, "bs=32M")
    host.vserver("web", "exec", *_FILL, "bs=200M", code=128 + signal.SIGKILL)
    assert _count(host, "oom_kill", "memory.events", "memory.oom_control") == 1
    assert host.inside("web", "echo", "still here") == "still here\n"


def test_it_gets_no_more_cpu_time_than_its_share(host: Host) -> None:
    keys = {"cflags": "sched_hard", "sched/fill-rate": "1", "sched/interval": "40"}
    assert _start(host, keys) == ""
    share = len(os.sched_getaffinity(host.init_pid("web"))) / 40  # less than is left for it
    quota = _read(host, "cpu.max", "cpu.cfs_quota_us").split()[0]
    assert int(quota) == 100_000 * share
    busy = "(while :; do :; done) & (while :; do :; done) & sleep 3; kill %1 %2"

    def is_held_back() -> bool:
        """It never gets more; on a very busy machine it may even get less."""
        used, began = _cpu_us(host), time.monotonic()
        host.inside("web", "sh", "-c", busy)
        assert (_cpu_us(host) - used) / (time.monotonic() - began) / 1e6 < 1.5 * share
        return _count(host, "nr_throttled", "cpu.stat") > 0

    wait_until(is_held_back)


def _cpu_us(host: Host) -> int:
    """What all of the guest has used of the processors; v2 counts it without a controller."""
    stat = (Path(str(host.state("web")["cgroup"])) / "cpu.stat").read_text().split()
    return int(stat[stat.index("usage_usec") + 1])


def test_its_priority_and_processors(host: Host) -> None:
    keys = {"cflags": "sched_prio", "sched/priority-bias": "5", "cpuset/cpus": "1"}
    assert "this machine has no" not in _start(host, keys)
    folder, is_v2 = _folder(host, "cpu")
    if is_v2:
        assert (folder / "cpu.weight.nice").read_text() == "5\n"
    else:
        assert (folder / "cpu.shares").read_text() == f"{round(1024 / 1.25**5)}\n"
    assert _read(host, "cpuset.cpus.effective", "cpuset.effective_cpus") == "1"
    assert "\nCpus_allowed_list:\t1\n" in host.inside("web", "cat", "/proc/self/status")


def test_groups_with_names_of_their_own_go_even_after_a_monitor_was_killed(host: Host) -> None:
    name = f"vtest-{os.getpid()}"
    _start(host, {"cpuset/name": name, "cpuset/cpus": "0", "cgroup/name": name})
    assert list(_named(name))
    kill(host.monitor_pid("web"))
    host.vserver("web", "stop")
    assert list(_named(name)) == []


def _named(name: str) -> Iterator[Path]:
    hierarchies = find_hierarchies()
    for mount in {hierarchies.v2, *hierarchies.v1.values()}:
        for place in (name, f"vservers/{name}"):
            yield from mount.glob(place)
        yield from mount.glob(f"vservers.slice/*/{name}")


def test_control_files_may_be_named_as_in_either_version(host: Host) -> None:
    keys = {"cgroup/memory.limit_in_bytes": str(80 * _MIB), "cgroup/cpu.weight": "50"}
    assert _start(host, keys) == ""
    assert _read(host, "memory.max", "memory.limit_in_bytes") == f"{80 * _MIB}"
    assert _read(host, "cpu.weight", "cpu.shares") in ("50", "512")


def test_what_cannot_be_limited_is_said_at_each_start(host: Host) -> None:
    disk = {"directory": "/proc", "space_total": "2000", "inodes_total": "100", "reserved": "5"}
    said = _start(
        host,
        {
            **{f"dlimits/0/{key}": text for key, text in disk.items()},
            "rlimits/nofile": "100",
            "cgroup/memory.unheard_of": "1",
        },
    )
    for key, reason in {
        "dlimits/0": "below /proc is not limited to 2000 KiB and 100 files: the guest's tree is on",
        "rlimits/nofile": "open files have no total for a guest",
        "cgroup/memory.unheard_of": "this machine has no memory.unheard_of",
    }.items():
        assert any(f"/web/{key}: " in line and reason in line for line in said.splitlines())
