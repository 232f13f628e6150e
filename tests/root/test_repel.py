"""Who waits in a window to write to a shared file is turned away, or killed if he is a guest's."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep

import pytest

from tests.fixtures.filesystems import Site, is_immutable
from tests.fixtures.hostile import writer
from tests.fixtures.probes import need, on, scaled
from tests.fixtures.runs import find_faults
from tests.fixtures.windows import (
    WAYS_IN,
    Shared,
    crowd,
    enemy,
    fork,
    guest_cgroup,
    own_windows,
    shared_file,
    state_of,
    wait_for,
    waits_in_lease,
)
from vstore.window import Windows

pytestmark = need("immutable", "lease")

_one = on("ext4")
"""Where the file system makes no difference."""


@pytest.fixture
def shared(site: Site) -> Iterator[Shared]:
    with shared_file(site) as made:
        yield made


@pytest.mark.parametrize("way_in", WAYS_IN)
def test_a_host_process_that_waits_in_a_window_is_turned_away_unharmed(
    shared: Shared, way_in: str
) -> None:
    with enemy(shared.web, way_in=WAYS_IN[way_in]) as process:
        with own_windows(shared.pool) as (windows, _, _):
            for _ in range(scaled(20, 500)):
                _let_wait(windows, shared, process)
        sleep(0.02)
        assert process.poll() is None
        assert not waits_in_lease(process.pid)
        assert {attack.pid for attack in windows.attacks} == {process.pid}
        assert not any(attack.is_guest for attack in windows.attacks)
    assert shared.is_untouched()


def _let_wait(windows: Windows, shared: Shared, process: subprocess.Popen[str]) -> None:
    """Open a window, and close it only when the process waits in the lease."""
    fd = shared.open()
    with windows.guard([fd]) as refused, windows.thawed(fd):
        assert not refused
        wait_for(lambda: waits_in_lease(process.pid))


@need("cgroup_freezer")
def test_a_process_of_a_guest_that_waits_in_a_window_is_killed_and_reported(
    shared: Shared, cgroup: Path
) -> None:
    with (
        enemy(shared.web, guest_cgroup(cgroup)) as process,
        own_windows(shared.pool) as (windows, _, _),
    ):
        _let_wait(windows, shared, process)
        assert process.wait(60) == -signal.SIGKILL
        assert [(attack.pid, attack.is_guest) for attack in windows.attacks] == [
            (process.pid, True)
        ]
    assert shared.is_untouched()


@_one
@need("cgroup_freezer")
def test_every_thread_and_child_that_waits_goes(shared: Shared, cgroup: Path) -> None:
    group = guest_cgroup(cgroup)
    with (
        enemy(shared.web, group) as one,
        enemy(shared.db, group) as two,
        enemy(shared.object) as three,
        own_windows(shared.pool) as (windows, _, _),
    ):
        fd = shared.open()
        with windows.guard([fd]), windows.thawed(fd):
            wait_for(lambda: all(waits_in_lease(each.pid) for each in (one, two, three)))
        assert {attack.pid for attack in windows.attacks} == {one.pid, two.pid, three.pid}
        assert (one.wait(60), two.wait(60), three.poll()) == (-9, -9, None)
    assert shared.is_untouched()


@_one
def test_a_crowd_of_writers_is_turned_away_within_seconds(shared: Shared) -> None:
    count = scaled(300, 4000)
    with own_windows(shared.pool) as (windows, _, _):
        fd = shared.open()
        with windows.guard([fd]), windows.thawed(fd), crowd(shared.web, count) as pids:
            wait_for(lambda: all(waits_in_lease(pid) for pid in pids))
            began = monotonic()
            windows.freeze(fd)
            took_s = monotonic() - began
            codes = {os.waitstatus_to_exitcode(_wait_status(pid)) for pid in pids}
        assert codes == {1}, "an open for writing went through"
        assert took_s < 10, "the kernel breaks a lease by force after 45 s"
    assert shared.is_untouched()


def _wait_status(pid: int) -> int:
    """The status with which the process ended, which stays there for the crowd's own wait."""
    result = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert result is not None
    return result.si_status << 8 if result.si_code == os.CLD_EXITED else result.si_status


def test_a_writer_without_patience_gets_nothing(shared: Shared) -> None:
    with own_windows(shared.pool) as (windows, _, _):
        fd = shared.open()
        with windows.guard([fd]), windows.thawed(fd), pytest.raises(BlockingIOError):
            os.open(shared.web, os.O_WRONLY | os.O_NONBLOCK)
    assert find_faults(shared.pool.path) == []


def test_an_object_that_somebody_can_write_to_is_refused_and_stays_closed(site: Site) -> None:
    with shared_file(site) as shared:
        subprocess.run(["chattr", "-i", shared.object], check=True)
        with writer(shared.web), own_windows(shared.pool) as (windows, _, _):
            subprocess.run(["chattr", "+i", shared.object], check=True)
            fd = shared.open()
            with windows.guard([fd]) as refused:
                assert refused == {fd}
            assert is_immutable(shared.object)


@_one
def test_who_is_turned_away_goes_on_though_the_holder_is_killed_over_it(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No process of the host stays stopped."""
    with enemy(shared.web) as process:

        def work() -> int:
            send, holder = signal.pidfd_send_signal, os.getpid()

            def sent(fd: int, number: int) -> None:
                send(fd, number)
                if number == signal.SIGSTOP:
                    wait_for(lambda: state_of(process.pid) == "T")
                    os.kill(holder, signal.SIGKILL)

            monkeypatch.setattr(signal, "pidfd_send_signal", sent)
            with own_windows(shared.pool) as (windows, _, _):
                fd = shared.open()
                with windows.guard([fd]), windows.thawed(fd):
                    wait_for(lambda: waits_in_lease(process.pid))
            return 0

        assert fork(work)() == -signal.SIGKILL
        wait_for(lambda: state_of(process.pid) != "T", timeout_s=10)
        assert process.poll() is None
    assert shared.is_untouched()
