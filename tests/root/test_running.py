"""Guests that run: worked on while their cgroup is frozen, put off where that cannot be had."""

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from time import monotonic, sleep
from typing import Final

import pytest

from tests.conftest import Tool
from tests.fixtures.filesystems import Site, is_immutable, mount_image, private_folder
from tests.fixtures.probes import need, on, own_cgroup
from tests.fixtures.running import (
    BUSY,
    IDLE,
    FreezeWatch,
    hear,
    is_frozen,
    running,
    write_state,
)
from tests.fixtures.runs import find_faults, stamps, undo, unify, unshared
from tests.fixtures.settled import Nursery
from tests.fixtures.trees import File, Snapshot, differences, snapshot
from vstore import freezer
from vstore.pool import Pool

pytestmark = need("immutable", "lease", "cgroup_freezer")

_FIFREEZE: Final = 0xC0045877  # linux/fs.h
_FITHAW: Final = 0xC0045878


_ROWS: Final = [File(f"usr/{number % 7}/{number}", b"%020d" % number) for number in range(400)]
_EQUAL: Final = Nursery(dict.fromkeys(("web", "db", "mail"), _ROWS), sets=8)


def _add_guests(site: Site, *names: str) -> tuple[list[Path], list[Snapshot]]:
    """Guests of the same 400 files each."""
    guests = _EQUAL.add_guests(site, *names)
    return guests, [snapshot(root) for root in guests]


def _unify_all(tool: Tool, *names: str) -> int:
    """Unify until nothing was put off, as a busy machine may not freeze a guest in good time.

    Returns how many files were unified.
    """
    done = 0
    for _ in range(10):
        report = unify(tool, *names)
        assert report.skipped.keys() <= {"not-frozen"}
        done += report.unified
        if not report.skipped:
            break
    return done


def _check(
    site: Site, guests: list[Path], before: list[Snapshot], *, was_killed: bool = False
) -> None:
    """A run that is killed may cost the times of the folders that it was in."""
    after = [snapshot(root) for root in guests]
    for old, new in zip(before, after, strict=True):
        folders = {path for path, entry in old.items() if entry.kind == "d"}
        lost = [line for line in differences(old, new) if not _is_time_of(line, folders)]
        assert (lost if was_killed else differences(old, new)) == []
    assert unshared(before, after) == []
    assert find_faults(site.pool) == []


def _is_time_of(line: str, paths: set[bytes]) -> bool:
    path, found, _ = line.partition(": mtime_ns was")
    return bool(found) and path in map(repr, paths)


def test_a_running_guest_is_unified_in_frozen_batches(site: Site, cgroup: Path, tool: Tool) -> None:
    guests, before = _add_guests(site, "web", "db")
    with running(site, "web", cgroup, BUSY) as busy, FreezeWatch(cgroup) as watch:
        assert _unify_all(tool) == 800
        assert busy.poll() is None
        assert not is_frozen(cgroup)
    assert watch.was_frozen
    assert watch.times < 100  # not one name a pause
    _check(site, guests, before)


_LOOK = """
import os, sys
paths = [os.path.join(folder, name) for folder, _, names in os.walk(sys.argv[1]) for name in names]
seen = {path: (os.stat(path).st_mtime_ns, os.stat(path).st_size) for path in paths}
folders = {os.path.dirname(path) for path in paths}
times = {folder: os.stat(folder).st_mtime_ns for folder in folders}
print("ready", flush=True)
while True:
    for folder in folders:
        if os.stat(folder).st_mtime_ns != times[folder]:
            print("folder", folder, flush=True)
    for path in paths:
        try:
            status = os.stat(path)
        except OSError as error:
            print(error, flush=True)
        if (status.st_mtime_ns, status.st_size) != seen[path]:
            print("file", path, flush=True)
"""


@on("ext4")
def test_a_process_in_the_guest_never_sees_a_folder_or_file_on_its_way(
    site: Site, cgroup: Path, tool: Tool
) -> None:
    guests, before = _add_guests(site, "web", "db")
    with running(site, "web", cgroup, _LOOK, guests[0]) as process:
        assert hear(process) == "ready"
        assert _unify_all(tool) == 800
        sleep(0.05)
        process.kill()
        assert process.stdout is not None
        assert process.stdout.read() == ""
    _check(site, guests, before)


@on("ext4")
def test_undo_freezes_a_running_guest_too(site: Site, cgroup: Path, tool: Tool) -> None:
    guests, before = _add_guests(site, "web", "db")
    unify(tool)
    with running(site, "web", cgroup, BUSY), FreezeWatch(cgroup) as watch:
        undo(tool, "web")
        assert not is_frozen(cgroup)
    assert watch.was_frozen
    assert not is_immutable(guests[0] / "usr/0/0")
    assert differences(before[0], snapshot(guests[0]), ignoring={"inode"}) == []


def test_two_holders_of_a_freeze_do_not_end_each_others(cgroup: Path) -> None:
    began, ended = Event(), Event()

    def hold() -> None:
        with freezer.opened(str(cgroup)) as fd, freezer.frozen(str(cgroup), fd):
            began.set()
            ended.wait(0.3)

    first = Thread(target=hold)
    first.start()
    began.wait()
    with freezer.opened(str(cgroup)) as fd, freezer.frozen(str(cgroup), fd) as is_still:
        ended.set()
        first.join()
        assert is_still
        assert is_frozen(cgroup)
    assert not is_frozen(cgroup)


@on("ext4")
def test_a_guest_that_its_administrator_has_frozen_stays_frozen(
    site: Site, cgroup: Path, tool: Tool
) -> None:
    guests, before = _add_guests(site, "web", "db")
    with running(site, "web", cgroup, BUSY):
        (cgroup / "cgroup.freeze").write_text("1")
        _wait_for(lambda: is_frozen(cgroup))
        assert unify(tool).unified == 800
        assert is_frozen(cgroup)
    _check(site, guests, before)


@contextmanager
def _no_freeze(site: Site, name: str, cgroup: Path) -> Iterator[Callable[[], None]]:
    """The guest runs a process that cannot be frozen: it waits for a file system that stands still.

    As where a disk does not answer, the wait is one that no signal ends; the function that this
    yields does.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(private_folder())
        mount = mount_image("ext4", folder, size=16 << 20)
        program = "import sys; print('ready', flush=True); open(sys.argv[1], 'w').write('x')"
        mount_fd = os.open(mount, os.O_RDONLY)
        stack.callback(os.close, mount_fd)
        fcntl.ioctl(mount_fd, _FIFREEZE, 0)
        process = stack.enter_context(running(site, name, cgroup, program, mount / "file"))

        def let_go() -> None:
            with suppress(OSError):  # once is enough
                fcntl.ioctl(mount_fd, _FITHAW, 0)

        stack.callback(let_go)
        assert hear(process) == "ready"
        _wait_for(lambda: _state(process.pid) == "D")
        yield let_go


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _wait_for(come: Callable[[], bool], *, timeout_s: float = 60) -> None:
    deadline = monotonic() + timeout_s
    while not come():
        assert monotonic() < deadline
        sleep(0.002)


@on("ext4")
def test_a_guest_that_cannot_be_frozen_is_put_off_and_the_others_are_not(
    site: Site, cgroup: Path, tool: Tool
) -> None:
    guests, before = _add_guests(site, "web", "db", "mail")
    with _no_freeze(site, "web", cgroup):
        untouched = stamps(guests[0])
        report = unify(tool)
        assert (report.unified, report.skipped) == (800, {"not-frozen": 400})
        assert stamps(guests[0]) == untouched
        assert (cgroup / "cgroup.freeze").read_text() == "0\n"
    assert unify(tool).unified == 400
    _check(site, guests, before)


@on("ext4")
def test_undo_tries_again_to_freeze_a_guest(site: Site, cgroup: Path, tool: Tool) -> None:
    guests, before = _add_guests(site, "web", "db")
    unify(tool)
    with _no_freeze(site, "web", cgroup) as let_go:

        def let_go_late() -> None:
            _wait_for(lambda: _wanted_state(cgroup) == "1", timeout_s=60)
            _wait_for(lambda: _wanted_state(cgroup) == "0", timeout_s=60)
            let_go()  # after a try that was given up

        thread = Thread(target=let_go_late)
        thread.start()
        undo(tool, "web")
        thread.join()
    assert not is_immutable(guests[0] / "usr/0/0")
    assert differences(before[0], snapshot(guests[0]), ignoring={"inode"}) == []


def _wanted_state(cgroup: Path) -> str:
    return (cgroup / "cgroup.freeze").read_text().strip()


@on("ext4")
def test_between_two_tries_to_hold_it_still_a_guest_runs(site: Site, cgroup: Path) -> None:
    site.add_guest("web")
    with (
        _no_freeze(site, "web", cgroup),
        freezer.opened(str(cgroup)) as fd,
        ExitStack() as stack,
    ):
        began = monotonic()
        assert not freezer.hold(str(cgroup), fd, stack, tries=3)
        assert monotonic() - began >= 3 * freezer.TIMEOUT_S + 2 * freezer.BREATH_S
        assert (cgroup / "cgroup.freeze").read_text() == "0\n"


@on("ext4")
def test_a_guest_whose_cgroup_goes_away_is_put_off(site: Site, cgroup: Path, tool: Tool) -> None:
    guests, before = _add_guests(site, "web", "db", "mail")
    with running(site, "web", cgroup, IDLE) as process:
        write_state(site, "web", process.pid, cgroup / "gone")
        report = unify(tool)
    assert (report.unified, report.skipped) == (800, {"not-frozen": 400})
    assert unify(tool).unified == 400
    _check(site, guests, before)


@on("ext4")
def test_a_state_whose_init_is_gone_is_that_of_a_stopped_guest(site: Site, tool: Tool) -> None:
    guests, before = _add_guests(site, "web", "db")
    (site.rundir / "web").mkdir()
    with subprocess.Popen([sys.executable, "-c", IDLE]) as process:
        write_state(site, "web", process.pid, Path("/nowhere"))
        process.kill()
    assert unify(tool).unified == 800
    _check(site, guests, before)


@on("ext4")
def test_a_running_guests_own_pool_is_used(site: Site, cgroup: Path, tool: Tool) -> None:
    _add_guests(site, "web", "db")
    pool = site.filesystem.folder / "other"
    with running(site, "web", cgroup, IDLE, pool=pool):
        assert tool("vunify", "web", "db", "--pool", site.pool).returncode == 2
        assert not site.pool.exists()
        assert _unify_all(tool) == 800
    assert find_faults(pool) == []


@contextmanager
def _held_up(site: Site) -> Iterator[Callable[[], None]]:
    """Runs wait where they lock objects, which they do in the middle of a batch, until the block
    ends or what it yields is called.
    """
    Pool.create(site.pool).close()
    with (site.pool / "windows").open("w") as locks:
        fcntl.lockf(locks, fcntl.LOCK_EX)
        yield lambda: fcntl.lockf(locks, fcntl.LOCK_UN)


@on("ext4")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_guest_runs_again_after_a_run_that_was_ended_in_a_batch(
    site: Site, cgroup: Path, tool: Tool, number: signal.Signals
) -> None:
    guests, before = _add_guests(site, "web", "db")
    with running(site, "web", cgroup, BUSY) as busy:
        command = (Path(sys.executable).parent / "vunify", "--all", "-q")
        with (
            _held_up(site) as go_on,
            subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE) as run,
        ):
            _wait_for(lambda: is_frozen(cgroup), timeout_s=60)
            os.killpg(run.pid, number)
            go_on()
            assert run.stderr is not None
            said = run.stderr.read()
        assert b"Traceback" not in said, said.decode()
        assert run.returncode == (130 if number == signal.SIGINT else -number)
        if number == signal.SIGINT:
            assert not is_frozen(cgroup)
        _unify_all(tool)
        assert not is_frozen(cgroup)
        assert busy.poll() is None
    _check(site, guests, before, was_killed=number == signal.SIGKILL)


@need("soak")
@on("ext4")
def test_several_running_guests_are_each_frozen(site: Site, cgroup: Path, tool: Tool) -> None:
    guests, before = _add_guests(site, "web", "db")
    with (
        own_cgroup() as other,
        running(site, "web", cgroup, BUSY),
        running(site, "db", other, BUSY),
        FreezeWatch(cgroup) as first,
        FreezeWatch(other) as second,
    ):
        assert _unify_all(tool) == 800
    assert first.was_frozen
    assert second.was_frozen
    _check(site, guests, before)


@need("soak")
@on("ext4")
def test_two_runs_at_once_on_a_running_guest_both_come_to_an_end(
    site: Site, cgroup: Path, tool: Tool
) -> None:
    guests, before = _add_guests(site, "web", "db")
    with running(site, "web", cgroup, BUSY):
        command = (Path(sys.executable).parent / "vunify", "web", "db", "-q")
        runs = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
        # The stopped guest is one run's at a time; the other may wait for it or give up.
        codes = sorted(run.wait(60) for run in runs)
        for run in runs:
            assert run.stderr is not None
            run.stderr.close()
        assert codes in ([0, 0], [0, 4])
        assert not is_frozen(cgroup)
    unify(tool)
    _check(site, guests, before)
