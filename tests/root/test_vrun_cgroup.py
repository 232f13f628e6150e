"""Control groups of guests: made, joined, limited, emptied, and gone without a trace."""

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.stepper import Scene, Step, run_traced
from vrun import cgroup, grouplimits
from vrun.cgroup import Group
from vrun.errors import ConfigInvalid, ToolError
from vrun.hierarchy import find_hierarchies
from vrun.spec import (
    CgroupFile,
    CgroupSettings,
    ContextLimits,
    CpuLimit,
    Cpuset,
    GuestSpec,
)
from vrun.usage import read_usage

_XID = 1001


def _groups() -> set[Path]:
    """Every group of this machine."""
    hierarchies = find_hierarchies()
    mounts = {hierarchies.v2, *hierarchies.v1.values()}
    return {Path(folder) for mount in mounts for folder, _, _ in os.walk(mount)}


@pytest.fixture
def base() -> Iterator[str]:
    """A base of the test's own; nothing may be left below any mount point."""
    name = f"vtest-{secrets.token_hex(4)}"
    yield name
    left = [path for path in _groups() if name in path.parts]
    for path in sorted(left, reverse=True):
        path.rmdir()
    assert left == []


@pytest.fixture
def group(base: str) -> Iterator[Group]:
    made = cgroup.create(_XID, CgroupSettings(base=base))
    yield made
    made.kill()
    made.wait_empty(60)
    made.remove()


def _spec(**fields: Any) -> GuestSpec:
    return GuestSpec(name="web", root=Path("/"), **fields)


def _join_and_run(group: Group, program: str, *arguments: str) -> "subprocess.Popen[str]":
    """A Python program that starts inside the group."""
    command = [sys.executable, "-c", f"import os, sys, time\ninput()\n{program}", *arguments]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    group.join(process.pid)
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return process


def _wait_for(come: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not come():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_process_that_joins_is_in_the_guests_group_of_every_hierarchy(
    group: Group, base: str
) -> None:
    with _join_and_run(group, "time.sleep(100)") as process:
        seen = Path(f"/proc/{process.pid}/cgroup").read_text().splitlines()
        process.kill()
    places = {line.split(":")[1]: line.split(":")[2] for line in seen}
    assert places[""] == f"/{base}/{_XID}/guest"
    assert group.path.name == str(_XID)
    controllers = {word for words in places for word in words.split(",")}
    for controller in {"cpu", "cpuacct", "memory", "pids"} & controllers:
        (place,) = (place for words, place in places.items() if controller in words.split(","))
        assert place == f"/{base}/{_XID}"


def _note_folder(step: Step, scene: Scene) -> None:
    """Each folder that is made or removed; other programs' groups come and go meanwhile."""
    if step.call in ("mkdir", "rmdir"):
        scene.notes.append(os.fsdecode(step.text(step.arguments[0])))
    elif step.call in ("mkdirat", "unlinkat"):
        scene.notes.append(os.fsdecode(step.text(step.arguments[1])))


def test_other_groups_are_left_alone(base: str) -> None:
    def create_and_remove() -> int:
        cgroup.create(_XID, CgroupSettings(base=base)).remove()
        return 0

    done = run_traced(create_and_remove, _note_folder)
    assert done.code == 0, done.output
    assert {Path(note).name for note in done.notes} >= {base, str(_XID)}
    assert [note for note in done.notes if base not in Path(note).parts] == []
    assert [path for path in _groups() if base in path.parts] == []


def test_a_record_means_the_same_group(group: Group) -> None:
    assert Group.from_record(group.as_record()) == group
    assert Group.load(group.path) == group


def test_kill_ends_all_of_it_and_nothing_else(group: Group) -> None:
    fork = "os.fork(); os.setsid() if os.fork() else 0; time.sleep(100)"
    with (
        _join_and_run(group, fork) as inside,
        subprocess.Popen(["sleep", "100"]) as outside,
    ):
        _wait_for(lambda: len(group.pids()) == 4)
        assert group.is_populated()
        group.kill()
        assert group.wait_empty(60)
        assert group.pids() == []
        assert inside.wait(60) == -signal.SIGKILL
        assert outside.poll() is None
        outside.kill()


def test_a_frozen_guest_stands_still_and_can_be_killed(group: Group) -> None:
    with _join_and_run(group, "print(1, flush=True)\nwhile True: pass") as busy:
        assert busy.stdout is not None
        busy.stdout.readline()
        group.set_frozen(True)
        _wait_for(lambda: "frozen 1" in (group.path / "cgroup.events").read_text())
        used = Path(f"/proc/{busy.pid}/stat").read_text().split()[13]
        time.sleep(0.05)
        assert Path(f"/proc/{busy.pid}/stat").read_text().split()[13] == used
        group.kill()
        assert group.wait_empty(60)


def test_what_the_guest_made_below_is_removed_with_it(base: str) -> None:
    made = cgroup.create(_XID, CgroupSettings(base=base))
    (made.path / "guest/system.slice/cron.service").mkdir(parents=True)
    made.remove()
    assert not made.path.exists()
    made.remove()  # again: there is nothing to do


def test_a_group_with_processes_is_not_removed_in_silence(group: Group) -> None:
    with _join_and_run(group, "time.sleep(100)") as process:
        with pytest.raises(ToolError, match="processes are in it"):
            group.remove(timeout_s=0.02)
        process.kill()
    assert group.wait_empty(60)


def test_a_number_whose_group_has_processes_is_refused(group: Group, base: str) -> None:
    with _join_and_run(group, "time.sleep(100)") as process:
        with pytest.raises(ToolError, match=f"context {_XID} already"):
            cgroup.create(_XID, CgroupSettings(base=base))
        process.kill()


def test_the_leftovers_of_a_killed_start_are_taken_over(base: str) -> None:
    cgroup.create(_XID, CgroupSettings(base=base))
    again = cgroup.create(_XID, CgroupSettings(base=base))
    again.remove()


def test_guests_that_come_and_go_at_once_do_not_take_the_base_from_each_other(base: str) -> None:
    program = (
        "import sys; from vrun import cgroup; from vrun.spec import CgroupSettings\n"
        "for _ in range(40): cgroup.create(int(sys.argv[1]), "
        "CgroupSettings(base=sys.argv[2])).remove()"
    )
    runs = [subprocess.Popen([sys.executable, "-c", program, str(xid), base]) for xid in (7, 8, 9)]
    assert [run.wait(60) for run in runs] == [0, 0, 0]


def test_guests_may_share_a_group_of_a_name(base: str) -> None:
    settings = CgroupSettings(base=base, name="customers")
    first, second = cgroup.create(7, settings), cgroup.create(8, settings)
    assert first.path != second.path
    assert first.v1 == second.v1
    with _join_and_run(second, "time.sleep(100)") as process:
        first.remove()
        assert not first.path.exists()
        assert all(folder.is_dir() for folder in second.v1.values())
        process.kill()
    assert second.wait_empty(60)
    second.remove()


def test_what_a_guest_uses_is_counted(group: Group) -> None:
    program = """
import threading
filled = bytearray(b"x") * (20 << 20)
until = time.process_time() + 0.1
while time.process_time() < until: pass
threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
print("done", flush=True)
time.sleep(100)
"""
    with _join_and_run(group, program) as process:
        assert process.stdout is not None
        process.stdout.readline()
        used = read_usage(group)
        group.kill()
    assert used.tasks == 2
    assert 80_000 < used.cpu_user_us + used.cpu_system_us < 2_000_000
    assert used.memory is None or 20 << 20 <= used.memory < 100 << 20
    assert used.anonymous is None or 20 << 20 <= used.anonymous < 100 << 20
    assert used.oom_kills == 0
    assert group.wait_empty(60)
    assert read_usage(group).tasks == 0


# --- limits


def test_more_processes_than_the_guest_may_have_are_refused(group: Group) -> None:
    missing = grouplimits.limit_group(group, _spec(limits=ContextLimits(pids_max=5)))
    assert missing == ()
    program = """
for count in range(10):
    try:
        if not os.fork():
            time.sleep(100)
    except OSError as error:
        print(count, error.strerror, flush=True)
        break
"""
    with _join_and_run(group, program) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "4 Resource temporarily unavailable\n"
        group.kill()


def test_more_memory_than_the_guest_may_have_ends_it(group: Group) -> None:
    limits = ContextLimits(memory_max=32 << 20, memory_high=24 << 20)
    assert grouplimits.limit_group(group, _spec(limits=limits)) == ()
    with _join_and_run(group, "x = bytearray(b'x') * (200 << 20)") as process:
        assert process.wait(60) == -signal.SIGKILL
    assert read_usage(group).oom_kills == 1


def test_the_token_bucket_becomes_a_quota_of_all_processors(group: Group) -> None:
    cpu = CpuLimit(fill_rate=1, interval=10, burst_ticks=2)
    assert grouplimits.limit_group(group, _spec(cpu=cpu)) == ()
    assert _quota(group) == len(os.sched_getaffinity(0)) * 10_000
    with _join_and_run(group, "print(1, flush=True)\nwhile True: pass") as busy:
        assert busy.stdout is not None
        busy.stdout.readline()
        _wait_for(lambda: _throttled(group) > 0)
        group.kill()


def _quota(group: Group) -> int:
    """Microseconds in each tenth of a second."""
    folder = group.folder_of("cpu")
    assert folder is not None
    if "cpu" in group.v1:
        return int((folder / "cpu.cfs_quota_us").read_text())
    return int((folder / "cpu.max").read_text().split()[0])


def _throttled(group: Group) -> int:
    folder = group.folder_of("cpu")
    assert folder is not None
    words = (folder / "cpu.stat").read_text().split()
    return int(words[words.index("nr_throttled") + 1])


def test_processors_of_the_guest_are_those_of_its_cpuset(base: str) -> None:
    cpuset = Cpuset(name=None, cpus="0", mems=None)
    made = cgroup.create(_XID, CgroupSettings(base=base), cpuset=cpuset)
    try:
        missing = grouplimits.limit_group(made, _spec(cpuset=cpuset, cpu=CpuLimit(weight_nice=5)))
        assert missing == ()
        with _join_and_run(made, "print(os.sched_getaffinity(0))") as process:
            assert process.communicate(timeout=60)[0] == "{0}\n"
    finally:
        made.kill()
        made.wait_empty(60)
        made.remove()


def test_a_named_cpuset_is_shared_and_goes_with_the_last(base: str) -> None:
    cpuset = Cpuset(name=f"{base}-named", cpus="0", mems="0", mem_exclusive=False)
    settings = CgroupSettings(base=base)
    if "cpuset" not in find_hierarchies().v1:
        pytest.skip("the cpuset controller is in the v2 hierarchy, where names are not shared")
    first, second = (cgroup.create(xid, settings, cpuset=cpuset) for xid in (7, 8))
    shared = first.v1["cpuset"]
    assert shared == second.v1["cpuset"]
    with _join_and_run(second, "time.sleep(100)") as process:
        first.remove()
        assert shared.is_dir()
        process.kill()
    assert second.wait_empty(60)
    second.remove()
    assert not shared.exists()


def test_a_cpuset_that_the_administrator_made_stays(base: str) -> None:
    hierarchies = find_hierarchies()
    if "cpuset" not in hierarchies.v1:
        pytest.skip("the cpuset controller is in the v2 hierarchy, where names are not shared")
    theirs = hierarchies.v1["cpuset"] / f"{base}-theirs"
    theirs.mkdir()
    try:
        cpuset = Cpuset(name=theirs.name, cpus=None, mems=None, create=False)
        cgroup.create(7, CgroupSettings(base=base), cpuset=cpuset).remove()
        assert theirs.is_dir()
        missing = Cpuset(name=f"{base}-none", cpus=None, mems=None, create=False)
        made = cgroup.create(7, CgroupSettings(base=base), cpuset=missing)
        assert "cpuset" not in made.v1
        made.remove()
    finally:
        theirs.rmdir()


def test_control_files_are_written_whichever_version_they_are_of(group: Group) -> None:
    files = (
        CgroupFile("memory.limit_in_bytes", "67108864\n", "cgroup/memory.limit_in_bytes"),
        CgroupFile("pids.max", "77", "cgroup/pids.max"),
        CgroupFile("cpu.weight", "50\n", "cgroup/cpu.weight"),
        CgroupFile("nothing.known", "1", "cgroup/nothing.known"),
    )
    spec = _spec(cgroup=CgroupSettings(files=files), limits=ContextLimits(pids_max=5))
    assert grouplimits.limit_group(group, spec) == (
        "cgroup/nothing.known: this machine has no nothing.known for the guest",
    )
    memory, pids, cpu = (group.folder_of(name) for name in ("memory", "pids", "cpu"))
    assert memory
    assert pids
    assert cpu
    name = "memory.limit_in_bytes" if "memory" in group.v1 else "memory.max"
    assert (memory / name).read_text() == "67108864\n"
    assert (pids / "pids.max").read_text() == "77\n"
    shares = ("cpu.shares", "512\n") if "cpu" in group.v1 else ("cpu.weight", "50\n")
    assert (cpu / shares[0]).read_text() == shares[1]


def test_a_value_that_the_kernel_does_not_take_is_named(group: Group) -> None:
    files = (CgroupFile("pids.max", "many", "/etc/vservers/web/cgroup/pids.max"),)
    with pytest.raises(ConfigInvalid, match=r"^/etc/vservers/web/cgroup/pids\.max: 'many'"):
        grouplimits.limit_group(group, _spec(cgroup=CgroupSettings(files=files)))


def test_a_limit_that_the_machine_cannot_set_is_told(group: Group) -> None:
    without = Group(group.path)  # as where no controller is mounted
    limits = ContextLimits(memory_max=1 << 30, pids_max=9)
    spec = _spec(limits=limits, cpu=CpuLimit(fill_rate=1, interval=2))
    if "memory" in (group.path / "cgroup.controllers").read_text().split():
        pytest.skip("the v2 hierarchy has the controllers here")
    assert grouplimits.limit_group(without, spec) == (
        "limit of memory: this machine has no memory.max for the guest",
        "limit of processes: this machine has no pids.max for the guest",
        "limit of cpu time: this machine has no cpu.max for the guest",
    )


def test_the_guest_sees_its_own_group_as_the_root(group: Group) -> None:
    show = "unshare --cgroup cat /proc/self/cgroup"
    with _join_and_run(group, f"os.system({show!r})") as process:
        lines = process.communicate(timeout=60)[0].splitlines()
    assert "0::/" in lines
    assert not any(str(_XID) in line for line in lines)
