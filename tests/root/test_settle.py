"""What a killed holder of a window has left is put right, in full and for good: whoever attacks it
meanwhile, and whatever another program does with it.
"""

import fcntl
import os
import signal
import struct
import subprocess
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Timer
from time import monotonic, sleep

import pytest

from tests.conftest import Tool
from tests.fixtures.cow import in_guest, until
from tests.fixtures.filesystems import Site, is_immutable
from tests.fixtures.hostile import writer
from tests.fixtures.leftovers import (
    LEFT,
    in_each_window,
    leave,
    make_dead_stage,
    make_evil,
    thawed,
    times,
)
from tests.fixtures.probes import need, on
from tests.fixtures.running import IDLE, running
from tests.fixtures.runs import find_faults, list_objects
from tests.fixtures.trees import EPOCH_NS, File
from tests.fixtures.windows import (
    CONTENT,
    WAYS_IN,
    Shared,
    broken_lease,
    enemy,
    fork,
    leases_on,
    own_windows,
    shared_file,
    wait_for,
    waits_in_lease,
)
from vrun.cow import supervisor
from vrun.cow.keeping import Supervision
from vstore import window
from vstore.guardedrecovery import recover_guarded
from vstore.pool import Pool

pytestmark = need("immutable", "lease")

_one = on("ext4")
"""Where the file system makes no difference."""
_OTHER = b"of another file that two guests share\n" * 100
_LATER = "[time.sleep(0.001) for _ in iter(lambda: os.path.exists(sys.argv[1] + '.go'), True)]; "
"""The way in of an enemy that waits for a name to be there."""


@pytest.fixture
def shared(site: Site) -> Iterator[Shared]:
    with shared_file(site) as made:
        yield made


# --- what recovery puts right


def test_a_change_in_the_window_in_which_a_spare_is_removed_is_put_back(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(make_dead_stage(shared), shared, spare=True)
    met = shared.pool.path.parent / "met"

    def attack() -> None:
        make_evil(shared.web)
        met.touch()

    with monkeypatch.context() as patch:
        in_each_window(patch, times(1, attack))
        recover_guarded(shared.pool)
    assert met.exists()
    assert find_faults(shared.pool.path) == []


@pytest.mark.parametrize("windows", [1, 3, 10**9])
def test_who_goes_on_changing_an_object_is_outlasted_or_it_is_named(
    shared: Shared, monkeypatch: pytest.MonkeyPatch, windows: int
) -> None:
    leave(make_dead_stage(shared), shared)
    thawed(shared.object, lambda: make_evil(shared.object))
    with monkeypatch.context() as patch:
        in_each_window(patch, times(windows, lambda: make_evil(shared.web)))
        recover_guarded(shared.pool)
    assert is_immutable(shared.db)
    kept = list(shared.pool.path.glob("quarantine/*"))
    if windows < 10:
        assert find_faults(shared.pool.path) == []
    else:
        assert [path.samefile(shared.db) for path in kept] == [True]
        assert not shared.object.exists()


@on("xfs")
def test_an_object_that_has_nothing_but_a_project_is_named(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as somebody gives it one again in each window."""
    leave(make_dead_stage(shared), shared)

    def mark() -> None:
        subprocess.run(["chattr", "-p", "77", shared.web], check=True)

    thawed(shared.object, mark)
    with monkeypatch.context() as patch:
        in_each_window(patch, mark)
        recover_guarded(shared.pool)
    assert is_immutable(shared.db)
    (kept,) = shared.pool.path.glob("quarantine/*")
    assert kept.samefile(shared.db)


_CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0)  # linux/capability.h: NET_RAW


@pytest.fixture
def capable(site: Site, tool: Tool) -> Shared:
    """A shared file with a file capability and another attribute."""
    for name in ("web", "db"):
        path = site.add_guest(name, [File("ping", CONTENT, mode=0o755)]) / "ping"
        os.setxattr(path, "user.note", b"as all guests have it")
        os.setxattr(path, "security.capability", _CAPABILITY)
        os.utime(path, ns=(EPOCH_NS, EPOCH_NS))
    done = tool("vunify", "--all", "-q")
    assert done.returncode == 0, done.stderr
    (path,) = list_objects(site.pool)
    return Shared(Pool.load(site.pool), path, site.root("web") / "ping", site.root("db") / "ping")


@pytest.mark.parametrize("windows", [0, 2])
def test_an_object_with_a_file_capability_comes_back_with_it(
    capable: Shared, monkeypatch: pytest.MonkeyPatch, windows: int
) -> None:
    """Though its owner or the capability itself is changed in the windows that this takes."""
    leave(make_dead_stage(capable), capable)
    thawed(capable.object, lambda: capable.object.chmod(0o777))

    def attack() -> None:
        os.chown(capable.web, 7, 7)
        os.setxattr(capable.web, "user.note", b"of an enemy")

    with monkeypatch.context() as patch, capable.pool:
        in_each_window(patch, times(windows, attack))
        recover_guarded(capable.pool)
    assert os.getxattr(capable.db, "security.capability") == _CAPABILITY
    assert os.getxattr(capable.db, "user.note") == b"as all guests have it"
    assert find_faults(capable.pool.path) == []


def test_an_object_that_has_lost_its_file_capability_is_named(capable: Shared) -> None:
    leave(make_dead_stage(capable), capable)
    thawed(capable.object, lambda: os.chown(capable.object, 7, 7))
    with capable.pool:
        recover_guarded(capable.pool)
    assert is_immutable(capable.db)
    (kept,) = capable.pool.path.glob("quarantine/*")
    assert kept.samefile(capable.db)


def test_an_object_that_is_open_for_writing_a_moment_longer_is_no_suspect(shared: Shared) -> None:
    """One who waited in a lease and was turned away has it open until he gets his turn; the lease
    itself may be gone by then.
    """
    leave(make_dead_stage(shared), shared)
    subprocess.run(["chattr", "-i", shared.object], check=True)
    with ExitStack() as stack:
        stack.enter_context(writer(shared.web))
        subprocess.run(["chattr", "+i", shared.object], check=True)
        Timer(0.3, stack.close).start()
        recover_guarded(shared.pool)
    assert find_faults(shared.pool.path) == []


@_one
@need("cgroup_freezer")
def test_the_lease_of_a_repair_lingers_too_where_a_guest_runs(site: Site, cgroup: Path) -> None:
    with shared_file(site) as shared, running(site, "web", cgroup, IDLE):
        leave(make_dead_stage(shared), shared)
        subprocess.run(["chattr", "-i", shared.object], check=True)
        began = monotonic()
        repair = fork(lambda: int(not recover_guarded(shared.pool)))
        wait_for(lambda: is_immutable(shared.object))
        sleep(max(0.0, began + window.LINGER_S / 2 - monotonic()))
        assert leases_on(shared.object) == 1
        assert repair() == 0
        assert leases_on(shared.object) == 0
        assert find_faults(shared.pool.path) == []


def test_who_unifies_puts_an_object_right_that_was_changed_in_the_window_of_another(
    site: Site, tool: Tool
) -> None:
    """The keeper of the one who was killed is about to do so."""
    with shared_file(site) as shared:
        thawed(shared.object, lambda: make_evil(shared.object))
        new = site.add_guest("new", [File("conf", CONTENT, mode=0o644, mtime_ns=EPOCH_NS)])
        done = tool("vunify", "-q", "new")
        assert done.returncode == 0, done.stderr
        assert (new / "conf").samefile(shared.db)
        assert find_faults(site.pool) == []


@_one
def test_a_lease_that_the_kernel_has_broken_while_it_lingered_is_noted(shared: Shared) -> None:
    with own_windows(shared.pool, linger_s=0.2) as (windows, _, stage_fd):
        fd = shared.open()
        with windows.guard([fd]), windows.thawed(fd):
            pass
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)  # as it does after 45 s
        windows.close()
        folder = Path(f"/proc/self/fd/{stage_fd}").resolve()
        assert [str(path.readlink()) for path in folder.iterdir()] == [str(shared.number)]
    recover_guarded(shared.pool)
    assert find_faults(shared.pool.path) == []


# --- what a supervisor cannot settle at once

Disturb = Callable[[Supervision, int], None]
Telling = Generator[None, Supervision, None]
"""What is done in the monitor of a guest, a step at a time; it is sent the supervision first."""


def _told(telling: Telling, at_the_end: Callable[[], None] = lambda: None) -> Disturb:
    begun: list[bool] = []

    def disturb(supervision: Supervision, guest: int) -> None:
        try:
            if not begun:
                begun.append(True)
                next(telling)
                telling.send(supervision)
            else:
                next(telling)
        except StopIteration:
            if len(begun) == 1:
                begun.append(True)
                at_the_end()

    return disturb


def _stage_of(supervision: Supervision) -> Path:
    return Path(f"/proc/self/fd/{supervision._stage_fd}").resolve()


def _killed(supervision: Supervision) -> Iterator[None]:
    """Until another supervisor serves."""
    os.kill(supervision.pid, signal.SIGKILL)
    while supervision.is_serving:
        yield
    while not supervision.is_serving:
        yield


@_one
@pytest.mark.parametrize("whose", ["its own", "another's"])
def test_a_supervisor_settles_later_what_another_program_keeps_it_from(
    site: Site, whose: str
) -> None:
    stop, seen = site.root("web") / "stop", site.filesystem.folder / "seen"

    def tell(shared: Shared, let_go: Callable[[], None]) -> Telling:
        supervision = yield
        folder = _stage_of(supervision) if whose == "its own" else make_dead_stage(shared)
        leave(folder, shared, spare=True)
        yield from _killed(supervision)
        left = [path.name for path in folder.iterdir() if path.name in LEFT]
        (site.root("web") / "left").touch()
        while not (site.root("web") / "served").exists():
            yield
        let_go()
        while any(folder.glob("*")):
            yield
        seen.write_text(" ".join(sorted(left)))
        stop.touch()

    with (
        shared_file(site) as shared,
        shared_file(site, "other", _OTHER),
        broken_lease(shared) as let_go,
    ):
        story = _told(tell(shared, let_go))
        written = in_guest(site.pool, site.root("web"), _work_meanwhile, disturb=story)
        assert written == b"mine" + _OTHER[4:]
        assert seen.read_text() == " ".join(LEFT), "nothing kept it from settling at once"
        assert shared.is_untouched()
        assert is_immutable(shared.object)
        assert shared.object.stat().st_nlink == 3


def _work_meanwhile() -> bytes:
    """The supervisor has not settled everything, and serves all the same."""
    until(Path("/left").exists)
    fd = os.open("/other", os.O_WRONLY)
    os.write(fd, b"mine")
    os.close(fd)
    Path("/served").touch()
    until(Path("/stop").exists)
    return Path("/other").read_bytes()


@_one
def test_what_keeps_a_supervisor_from_settling_when_its_guest_ends_is_waited_for(
    site: Site,
) -> None:
    seen = site.filesystem.folder / "seen"

    def tell(shared: Shared) -> Telling:
        supervision = yield
        folder = _stage_of(supervision)
        leave(folder, shared, spare=True)
        seen.symlink_to(folder)
        (site.root("web") / "stop").touch()

    with shared_file(site) as shared, broken_lease(shared) as let_go:
        in_guest(
            site.pool,
            site.root("web"),
            lambda: until(Path("/stop").exists),
            disturb=_told(tell(shared), at_the_end=lambda: Timer(1, let_go).start()),
        )
        assert not seen.exists(), "the folder is removed when it is empty"


@_one
def test_a_supervisor_that_dies_while_it_settles_lets_nobody_in(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    died = site.filesystem.folder / "died"

    def tell(shared: Shared) -> Telling:
        supervision = yield
        leave(_stage_of(supervision), shared, spare=True)
        Path(f"{shared.db}.go").touch()
        yield from _killed(supervision)
        (site.root("web") / "stop").touch()

    way_in = _LATER + WAYS_IN["overwrite"]
    with shared_file(site) as shared, enemy(shared.db, way_in=way_in, pause_s=0.001) as writer:

        def die() -> None:
            if not died.exists():
                died.touch()
                wait_for(lambda: waits_in_lease(writer.pid))
                os.kill(os.getpid(), signal.SIGKILL)

        with monkeypatch.context() as patch:
            in_each_window(patch, die)
            in_guest(
                site.pool,
                site.root("web"),
                lambda: until(Path("/stop").exists),
                disturb=_told(tell(shared)),
            )
        assert died.exists()
        sleep(0.02)
        assert writer.poll() is None
    assert shared.is_untouched()
    assert find_faults(site.pool) == []


@_one
def test_what_was_changed_in_every_window_is_put_right_while_the_guest_runs(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window, "_PUT_RIGHT_S", 0.3)
    monkeypatch.setattr(supervisor, "_SETTLE_AGAIN_S", 3.0)
    tried = site.root("web") / "tried"

    def work() -> None:
        with suppress(PermissionError):
            os.close(os.open("/conf", os.O_WRONLY))
        Path("/tried").touch()
        until(Path("/stop").exists)

    def tell(shared: Shared) -> Telling:
        yield
        while not tried.exists():
            yield
        evil.write_text(str(os.listxattr(shared.object)))
        while "user.evil" in os.listxattr(shared.object):
            yield
        (site.root("web") / "stop").touch()

    evil = site.filesystem.folder / "evil"
    with shared_file(site) as shared:
        with monkeypatch.context() as patch:
            in_each_window(patch, lambda: None if tried.exists() else make_evil(shared.db))
            in_guest(site.pool, site.root("web"), work, disturb=_told(tell(shared)))
        assert "user.evil" in evil.read_text(), "the attack did not last"
    assert find_faults(site.pool) == []
