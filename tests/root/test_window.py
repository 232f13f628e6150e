"""Thaw windows: whoever wants to write in one is turned away or killed, whatever dies meanwhile."""

import os
import signal
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep

import pytest

from tests.fixtures.filesystems import Site, is_immutable
from tests.fixtures.probes import need, on, scaled
from tests.fixtures.runs import find_faults
from tests.fixtures.stepper import Scene, Step, command, run_traced
from tests.fixtures.trees import acl, differences, snapshot
from tests.fixtures.windows import (
    Doorman,
    Shared,
    enemy,
    fork,
    leases_on,
    own_windows,
    shared_file,
    state_of,
    wait_for,
    waits_in_lease,
)
from vstore import lease
from vstore.commands import vunify
from vstore.errors import PoolBusy
from vstore.recovery import settle_stage
from vstore.window import Windows
from vstore.workers import Crew, Worker, WorkerDied

pytestmark = need("immutable", "lease")

_one = on("ext4")
"""Where the file system makes no difference."""


@pytest.fixture
def shared(site: Site) -> Iterator[Shared]:
    with shared_file(site) as made:
        yield made


# --- the order of a window ---


def test_a_window_has_lock_lease_intent_and_keeper_before_the_thaw(site: Site) -> None:
    with shared_file(site) as shared:
        number = shared.number
        site.add_copy("new", site.root("web"))
    seen = run_traced(command(vunify.main, "new", "--jobs", "1"), _notes_of(number), timeout_s=60)
    assert seen.code == 0, seen.output
    assert seen.notes == [
        "lock",
        "lease",
        "intent",
        "keeper",
        "thaw",
        "link",
        "rename",
        "freeze",
        "release",
        "intent gone",
        "unlock",
    ]


def _notes_of(number: int) -> Callable[[Step, Scene], None]:
    """An on_step that notes what is done about the inode of this number, from its lock on."""

    def note(step: Step, scene: Scene) -> None:
        said = _describe(step, number)
        if not said and "thaw" in scene.notes and "freeze" not in scene.notes:
            said = f"{step.call} inside the window"
        if said == "lock" or (said and scene.notes and "unlock" not in scene.notes):
            scene.notes.append(said)

    return note


def _describe(step: Step, number: int) -> str:
    first, second, third = step.arguments[:3]
    if step.call == "lock":
        kind, start = step.read(third, "=h6xq")
        return {1: "lock" if start == number else "", 2: "unlock"}.get(kind, "")
    if step.call == "setlease" and step.inode(first) == number:
        return "lease" if third == 0 else "release"
    if step.call == "setflags" and step.inode(first) == number:
        return "freeze" if step.read(third, "=I")[0] & 0x10 else "thaw"
    if step.call == "symlinkat":
        return "intent" if str(number).encode() in step.text(first).split(b",") else ""
    if step.call == "unlinkat":
        return "intent gone" if step.text(second).startswith(b"intent-") else ""
    return {"sendmsg": "keeper", "linkat": "link", "renameat": "rename"}.get(step.call, "")


def test_inside_a_window_lease_and_intent_are_there_and_afterwards_gone(shared: Shared) -> None:
    with own_windows(shared.pool) as (windows, _, _):
        fd = shared.open()
        with windows.guard([fd]) as refused:
            assert refused == set()
            assert is_immutable(shared.object)
            with windows.thawed(fd):
                assert not is_immutable(shared.object)
                assert leases_on(shared.object) == 1
                assert [os.readlink(path) for path in _left(shared)] == [str(shared.number)]
            assert is_immutable(shared.object)
        assert _left(shared) == []
    assert leases_on(shared.object) == 0
    assert find_faults(shared.pool.path) == []


def _left(shared: Shared) -> list[Path]:
    """What stands in the stage folders."""
    return list((shared.pool.path / "stage").glob("*/*/*"))


def test_a_block_that_fails_leaves_the_object_frozen(shared: Shared) -> None:
    with own_windows(shared.pool) as (windows, _, _):
        fd = shared.open()
        with pytest.raises(ZeroDivisionError), windows.guard([fd]), windows.thawed(fd):
            raise ZeroDivisionError
    assert find_faults(shared.pool.path) == []
    assert leases_on(shared.object) == 0


def test_windows_of_two_programs_on_one_object_follow_each_other(shared: Shared) -> None:
    mark = shared.pool.path / "a window is open"

    def work() -> int:
        with own_windows(shared.pool) as (windows, _, _):
            for _ in range(scaled(30, 1000)):
                fd = shared.open()
                with windows.guard([fd]), windows.thawed(fd):
                    mark.mkdir()  # fails where another one stands
                    mark.rmdir()
        return 0

    programs = [fork(work) for _ in range(3)]
    assert [program() for program in programs] == [0, 0, 0]
    assert find_faults(shared.pool.path) == []


# --- who waits ---


def test_waiters_are_found_by_their_file(shared: Shared, tmp_path: Path) -> None:
    other = shared.web.with_name("another")
    other.write_bytes(b"x")
    fds = [os.open(path, os.O_RDONLY) for path in (shared.object, other)]
    subprocess.run(["chattr", "-i", shared.object], check=True)
    lease.ignore_break_signals()
    assert all(map(lease.take, fds))
    with enemy(shared.web) as here, enemy(other) as there:
        wait_for(lambda: waits_in_lease(here.pid) and waits_in_lease(there.pid))
        assert lease.find_waiters(fds[0]) == [here.pid]
        assert lease.find_waiters(fds[1]) == [there.pid]
    assert lease.find_waiters(fds[0]) == []
    for fd in fds:
        os.close(fd)


# --- what needs no open for writing ---

_CHANGES: dict[str, Callable[[Path], object]] = {
    "chmod": lambda path: path.chmod(0o4777),
    "chown": lambda path: os.chown(path, 1234, 5678),
    "utimes": lambda path: os.utime(path, ns=(1, 1)),
    "setxattr": lambda path: os.setxattr(path, "user.note", b"mine"),
    "acl": lambda path: os.setxattr(
        path, "system.posix_acl_access", acl(owner=7, group=7, other=7, users={1000: 7})
    ),
    "inode flag": lambda path: subprocess.run(["chattr", "+d", path], check=True),
}


@pytest.mark.parametrize("change", _CHANGES)
def test_metadata_that_were_changed_in_a_window_are_put_back(site: Site, change: str) -> None:
    with shared_file(site) as shared:
        before = snapshot(site.root("db"))
        _change_in_window(shared, _CHANGES[change])
        assert differences(before, snapshot(site.root("db"))) == []
        assert (
            "d"
            not in subprocess.run(
                ["lsattr", "-d", shared.web], capture_output=True, text=True, check=True
            ).stdout.split()[0]
        )
    assert find_faults(site.pool) == []


@on("xfs")
def test_a_project_that_was_changed_in_a_window_is_put_back(shared: Shared) -> None:
    _change_in_window(shared, lambda path: subprocess.run(["chattr", "-p", "77", path], check=True))
    shown = subprocess.run(["lsattr", "-p", shared.web], capture_output=True, text=True, check=True)
    assert shown.stdout.split()[0] == "0"
    assert find_faults(shared.pool.path) == []


def _change_in_window(shared: Shared, change: Callable[[Path], object]) -> None:
    with own_windows(shared.pool, linger_s=0.05) as (windows, _, _):
        fd = shared.open()
        with windows.guard([fd]), windows.thawed(fd):
            change(shared.web)


@_one
def test_who_changes_metadata_all_the_time_does_not_keep_a_window_open(shared: Shared) -> None:
    program = "import os, sys\nwhile True:\n try: os.chmod(sys.argv[1], 0o777)\n except OSError: 0"
    loops = [
        subprocess.Popen(["python3", "-c", program, path], stderr=subprocess.DEVNULL)
        for path in (shared.web, shared.db)
    ]
    try:
        sleep(0.1)
        with own_windows(shared.pool, linger_s=0.05) as (windows, _, _):
            for _ in range(scaled(20, 500)):
                fd = shared.open()
                began = monotonic()
                with windows.guard([fd]), windows.thawed(fd):
                    pass
                assert monotonic() - began < 5
                assert is_immutable(shared.object)
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    assert stat.S_IMODE(shared.object.stat().st_mode) == 0o644


# --- SIGKILL of the holder or of the keeper ---


@contextmanager
def _guarded(shared: Shared, linger_s: float = 0.0) -> Iterator[tuple[Crew, socket.socket]]:
    """A crew of one worker that holds a window open, and the socket that lets it go on."""
    ours, theirs = socket.socketpair()
    with shared.pool.stage(1) as stages:

        def start(_: int, keeper: socket.socket) -> Doorman:
            ours.close()
            windows = Windows(keeper, pool_fd=shared.pool.fd, stage_fd=stages[0], linger_s=linger_s)
            return Doorman(shared, windows, theirs)

        def bury(worker: Worker) -> None:
            worker.keeper.take_over(lambda leased: settle_stage(shared.pool, stages[0], leased))

        with ours, Crew(1, start, bury=bury) as crew:
            theirs.close()
            yield crew, ours


def test_the_holder_is_killed_in_a_window_and_the_keeper_closes_it(shared: Shared) -> None:
    with _guarded(shared) as (crew, _):
        answers = crew.map([("go", None)])
        _, holder = next(answers)
        with enemy(shared.web) as process:
            wait_for(lambda: waits_in_lease(process.pid))
            os.kill(holder, signal.SIGKILL)
            with pytest.raises(WorkerDied):
                next(answers)
            assert is_immutable(shared.object)
            sleep(0.02)
            assert process.poll() is None
            assert not waits_in_lease(process.pid)
    assert shared.is_untouched()
    assert find_faults(shared.pool.path) == []
    assert leases_on(shared.object) == 0


@pytest.mark.parametrize("change", _CHANGES)
def test_metadata_changed_after_the_holders_death_are_put_back_or_the_object_is_named(
    site: Site, change: str
) -> None:
    with shared_file(site) as shared:
        before = snapshot(site.root("db"))
        with _guarded(shared) as (crew, _):
            answers = crew.map([("go", None)])
            _, holder = next(answers)
            os.kill(holder, signal.SIGKILL)
            _CHANGES[change](shared.web)
            with pytest.raises(WorkerDied):
                next(answers)
        changed = differences(before, snapshot(site.root("db")))
        assert changed == [] or list((site.pool / "quarantine").iterdir())


def test_a_full_disk_does_not_keep_the_keeper_from_closing_a_dead_holders_window(
    shared: Shared,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with _guarded(shared) as (crew, _):
        answers = crew.map([("go", None)])
        _, holder = next(answers)
        stage = next((shared.pool.path / "stage").glob("*/0"))
        os.link(shared.object, stage / "spare")  # left between link and rename
        with enemy(shared.web) as process:
            wait_for(lambda: waits_in_lease(process.pid))
            os.kill(holder, signal.SIGKILL)
            with monkeypatch.context() as patched:
                patched.setattr(os, "symlink", _no_space)
                patched.setattr(os, "unlink", _no_space)
                with suppress(OSError), pytest.raises(WorkerDied):
                    next(answers)
            assert is_immutable(shared.object)
            sleep(0.02)
            assert process.poll() is None
    assert shared.is_untouched()


def _no_space(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def test_the_keeper_is_killed_and_the_holder_closes_its_window_and_stops(shared: Shared) -> None:
    with _guarded_elsewhere(shared) as (keeper, holder, go_on), enemy(shared.web) as process:
        wait_for(lambda: waits_in_lease(process.pid))
        os.kill(keeper, signal.SIGKILL)
        sleep(0.05)
        assert waits_in_lease(process.pid)
        go_on.send(b"!")
        wait_for(lambda: is_immutable(shared.object))
        wait_for(lambda: not waits_in_lease(process.pid))
        sleep(0.02)
        assert process.poll() is None
        wait_for(lambda: not Path(f"/proc/{holder}").exists())
    assert shared.is_untouched()
    assert leases_on(shared.object) == 0


def test_the_lease_of_a_holder_lingers_though_its_keeper_is_killed(shared: Shared) -> None:
    with _guarded_elsewhere(shared, 3.0) as (keeper, _, go_on), enemy(shared.web) as process:
        wait_for(lambda: waits_in_lease(process.pid))
        os.kill(keeper, signal.SIGKILL)
        wait_for(lambda: state_of(keeper) == "Z")
        go_on.send(b"!")
        wait_for(lambda: is_immutable(shared.object))
        wait_for(lambda: not waits_in_lease(process.pid))
        # Somebody who passed the check of the flag long ago arrives at the lease only now; it may
        # be the one who is just being turned away.
        subprocess.run(["chattr", "-i", shared.object], check=True)
        wait_for(lambda: waits_in_lease(process.pid))
        subprocess.run(["chattr", "+i", shared.object], check=True)
        wait_for(lambda: leases_on(shared.object) == 0, timeout_s=15)
        sleep(0.02)
        assert process.poll() is None
    assert shared.is_untouched()


@contextmanager
def _guarded_elsewhere(
    shared: Shared, linger_s: float = 0.0
) -> Iterator[tuple[int, int, socket.socket]]:
    """A window that a worker of another program holds open and has been told to open once more.

    Yields the pids of that program and of its worker, and the socket that lets the worker go on.
    """
    told, tells = socket.socketpair()

    def keep() -> int:
        with _guarded(shared, linger_s) as (crew, go_on):
            answers = crew.map([("go", None), ("again", None)])
            _, holder = next(answers)
            socket.send_fds(tells, [holder.to_bytes(8, "little")], [go_on.fileno()])
            signal.pause()
        return 0

    with told, tells:
        keeper = fork(keep)
        message, fds, _, _ = socket.recv_fds(told, 8, 1)
        holder = int.from_bytes(message, "little")
        try:
            with socket.socket(fileno=fds[0]) as go_on:
                yield keeper.pid, holder, go_on
        finally:
            for pid in (keeper.pid, holder):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            keeper()


@_one
def test_without_a_keeper_no_window_is_opened(shared: Shared) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with shared.pool.stage(1) as stages, ours:
        windows = Windows(ours, pool_fd=shared.pool.fd, stage_fd=stages[0], linger_s=0)
        theirs.close()
        fd = shared.open()
        with pytest.raises(PoolBusy), windows.guard([fd]), windows.thawed(fd):
            raise AssertionError("a window was opened")
    assert is_immutable(shared.object)
    assert leases_on(shared.object) == 0


@pytest.mark.parametrize("name", ["SIGHUP", "SIGTERM", "SIGTSTP", "SIGINT"])
def test_a_signal_from_the_terminal_or_the_service_manager_does_not_end_a_window(
    shared: Shared, name: str
) -> None:
    number = signal.Signals[name]
    with _guarded(shared) as (crew, go_on):
        answers = crew.map([("go", None)])
        _, holder = next(answers)
        os.kill(holder, number)
        sleep(0.05)
        wait_for(lambda: state_of(holder) == "S")  # neither stopped nor ended
        go_on.send(b"!")
        assert list(answers) == []
    assert find_faults(shared.pool.path) == []
