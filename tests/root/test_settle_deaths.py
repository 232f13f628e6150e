"""A command that is killed while it puts right what another one has left lets nobody in, and leaves
the next one the notes that it found.
"""

import fcntl
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from time import sleep

import pytest

from tests.fixtures.filesystems import Site, is_immutable
from tests.fixtures.leftovers import (
    LEFT,
    in_each_window,
    leave,
    make_dead_stage,
    thawed,
)
from tests.fixtures.probes import need, on
from tests.fixtures.windows import (
    Shared,
    enemy,
    fork,
    got_in,
    shared_file,
    wait_for,
    waits_in_lease,
)
from vstore import guardedrecovery, window
from vstore.guardedrecovery import recover_guarded
from vstore.pool import Pool
from vstore.workers import WorkerDied

pytestmark = [need("immutable", "lease"), on("ext4", "xfs")]


@pytest.fixture
def shared(site: Site) -> Iterator[Shared]:
    with shared_file(site) as made:
        yield made


def _recover_in_vain(pool: Pool) -> int:
    with suppress(WorkerDied):
        return int(recover_guarded(pool))
    return 0


def _get_in_late(shared: Shared, process: subprocess.Popen[str]) -> None:
    """He passed the check of the flag long ago, and arrives at the lease only now."""
    thawed(shared.object, lambda: wait_for(lambda: waits_in_lease(process.pid)))


@pytest.mark.parametrize("victims", ["worker", "parent", "parent worker"])
def test_whoever_dies_while_a_command_settles_lets_nobody_in(
    shared: Shared, monkeypatch: pytest.MonkeyPatch, victims: str
) -> None:
    """Save both at once: then what was open to others is named."""
    leave(make_dead_stage(shared), shared, spare=True)
    died = shared.pool.path.parent / "died"
    with enemy(shared.db, pause_s=0.001, stays=True) as process:

        def die() -> None:
            if not died.exists():
                died.write_text(str(os.getpid()))
                wait_for(lambda: waits_in_lease(process.pid))
                pids = {"worker": os.getpid(), "parent": os.getppid()}
                for victim in victims.split():
                    os.kill(pids[victim], signal.SIGKILL)

        with monkeypatch.context() as patch:
            in_each_window(patch, die)
            program = fork(lambda: _recover_in_vain(shared.pool))
            assert program() == (0 if victims == "worker" else -signal.SIGKILL)
        worker = Path("/proc", died.read_text())
        wait_for(lambda: not worker.exists())
        _check_nobody_got_in(shared, process, save=victims == "parent worker")


def _check_nobody_got_in(shared: Shared, process: subprocess.Popen[str], *, save: bool) -> None:
    """The next program puts the object right, or in quarantine if somebody did, `save` then."""
    if save:
        wait_for(lambda: got_in(process, shared.db))
    recover_guarded(shared.pool)
    sleep(0.02)
    assert got_in(process, shared.db) == save
    process.kill()
    process.wait()
    assert recover_guarded(shared.pool)
    assert is_immutable(shared.db)
    assert not list((shared.pool.path / "stage").iterdir())
    kept = list(shared.pool.path.glob("quarantine/*"))
    assert [path.samefile(shared.db) for path in kept] == [True] * save
    assert shared.object.exists() != save
    assert save or shared.is_untouched()


def test_what_a_command_has_settled_is_noted_until_its_lease_is_given_up(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(make_dead_stage(shared), shared)
    subprocess.run(["chattr", "-i", shared.object], check=True)
    with monkeypatch.context() as patch:
        patch.setattr(guardedrecovery, "find_linger_s", lambda: window.LINGER_S * 4)
        program = fork(lambda: _recover_in_vain(shared.pool))
    wait_for(lambda: is_immutable(shared.object))
    sleep(0.2)
    with enemy(shared.db, pause_s=0.001, stays=True) as process:
        _get_in_late(shared, process)
        worker = int(Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text())
        for pid in (program.pid, worker):
            os.kill(pid, signal.SIGKILL)
        assert program() == -signal.SIGKILL
        wait_for(lambda: not Path(f"/proc/{worker}").exists())
        _check_nobody_got_in(shared, process, save=True)


def test_what_a_command_has_doubts_about_stays_noted(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_dead_stage(shared)
    leave(folder, shared)
    let_all_go = window.Windows.let_all_go

    def break_and_let_go(self: window.Windows) -> None:
        for _, _, fds, _ in self._lingering:
            for fd in fds:
                fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)  # as the kernel does after 45 s
        let_all_go(self)

    with monkeypatch.context() as patch:
        patch.setattr(guardedrecovery, "find_linger_s", lambda: 0.1)
        patch.setattr(window.Windows, "let_all_go", break_and_let_go)
        assert not recover_guarded(shared.pool)
    assert [path.name for path in folder.iterdir()] == [LEFT[1]]
    assert recover_guarded(shared.pool)
    assert not folder.exists()
