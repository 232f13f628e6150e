"""Several programs on one pool: each makes progress, none disturbs another, nobody starves."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

import pytest

from tests.conftest import Tool
from tests.fixtures.filesystems import Site, is_immutable
from tests.fixtures.probes import is_soak, need, on, scaled
from tests.fixtures.runs import find_faults, list_objects, unify, unshared
from tests.fixtures.stepper import Scene, Step, command, run_traced
from tests.fixtures.trees import File, Row, Snapshot, differences, snapshot
from tests.fixtures.windows import fork, shared_file, wait_for
from vstore.commands import vunify
from vstore.pool import Pool

pytestmark = need("immutable", "lease")


def _rows(count: int, tag: str = "common") -> list[Row]:
    return [
        File(f"usr/{number % 5}/{tag}-{number}", f"{tag} content {number}".encode() * 3)
        for number in range(count)
    ]


def _start(name: str, *arguments: str | Path) -> subprocess.Popen[str]:
    """An installed command, started and not waited for."""
    return subprocess.Popen(
        [Path(sys.executable).parent / name, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(process: subprocess.Popen[str], *, timeout_s: float = 60) -> str:
    """What it printed; it must end well."""
    output, errors = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    return output


def _assert_sound(site: Site, names: Sequence[str], before: Sequence[Snapshot]) -> list[Snapshot]:
    after = [snapshot(site.root(name)) for name in names]
    for name, old, new in zip(names, before, after, strict=True):
        assert differences(old, new) == [], name
    assert find_faults(site.pool) == []
    return after


def test_two_runs_over_the_same_guests_share_everything_once(site: Site) -> None:
    names = ("web", "db", "mail")
    before = [snapshot(site.add_guest(name, _rows(scaled(300, 3000)))) for name in names]
    runs = [_start("vunify", "--all", "-q") for _ in range(2)]
    for run in runs:
        _finish(run)
    assert unshared(before, _assert_sound(site, names, before)) == []


def test_runs_over_different_guests_of_one_pool_go_on_at_once(site: Site, tool: Tool) -> None:
    pairs = [("a0", "a1"), ("b0", "b1"), ("c0", "c1")]
    names = [name for pair in pairs for name in pair]
    before = [snapshot(site.add_guest(name, _rows(scaled(300, 3000)))) for name in names]
    runs = [_start("vunify", "-q", *pair) for pair in pairs]
    for run in runs:
        _finish(run)
    _assert_sound(site, names, before)
    unify(tool)
    assert unshared(before, _assert_sound(site, names, before)) == []


def test_a_run_waits_for_the_guests_that_another_one_holds_without_holding_later_ones(
    site: Site,
) -> None:
    for name in ("a", "b"):
        site.add_guest(name, _rows(3))
    with _locked(site.rundir / "a"):
        run = _start("vunify", "-q", "b", "a")
        lock = site.rundir / "b" / "lock"
        sleep(1.0)
        assert run.poll() is None
        # Who would hold b while it waits for a could wait for ever for one that goes round the
        # other way.
        assert not lock.exists() or _can_be_locked(lock)
    _finish(run)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(mode=0o700, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _can_be_locked(path: Path) -> bool:
    with path.open("r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@pytest.mark.timeout(60)
def test_who_goes_round_the_other_way_does_not_stop_us(site: Site) -> None:
    names = ("a", "b", "c", "d")
    before = [snapshot(site.add_guest(name, _rows(20))) for name in names]
    for _ in range(scaled(3, 30)):
        runs = [_start("vunify", "-q", *order) for order in (names, names[::-1])]
        for run in runs:
            _finish(run)
    _assert_sound(site, names, before)


# --- what one program does while another one stands at a certain step ---


class Meanwhile:
    """An on_step that does something once, before the first call that is as described."""

    def __init__(self, met: Callable[[Step], bool], act: Callable[[], object]) -> None:
        self._met = met
        self._act = act
        self._is_done = False

    def __call__(self, step: Step, scene: Scene) -> None:
        if not self._is_done and self._met(step):
            self._is_done = True
            scene.notes.append(str(self._act()))


@on("ext4")
def test_a_stage_folder_that_is_just_being_made_is_nobodys_leftover(site: Site, tool: Tool) -> None:
    names = ("a", "b", "c", "d")
    before = [snapshot(site.add_guest(name, _rows(5))) for name in names]
    tool("vunify", "-q", "a", "b")
    for met in (_locks_its_stage, _fills_its_stage):
        meanwhile = Meanwhile(met, lambda: tool("vunify", "-q", "c", "d").returncode)
        done = run_traced(command(vunify.main, "-q", "a", "b"), meanwhile)
        assert done.notes == ["0"], done.output
        assert done.code == 0, done.output
    _assert_sound(site, names, before)


def _locks_its_stage(step: Step) -> bool:
    if step.call != "flock":
        return False
    return "/stage/" in os.readlink(f"/proc/{step.pid}/fd/{step.arguments[0]}")


def _fills_its_stage(step: Step) -> bool:
    return step.call == "mkdirat" and "/stage/" in os.readlink(
        f"/proc/{step.pid}/fd/{step.arguments[0]}"
    )


@on("ext4")
def test_recovery_leaves_the_open_window_of_a_living_program_alone(site: Site) -> None:
    with shared_file(site) as shared:
        path, number = shared.object, shared.number
    for name in ("new", "c", "d"):
        site.add_guest(name, _rows(3))
        site.root(name).joinpath("conf").write_bytes(path.read_bytes())
        os.utime(site.root(name) / "conf", ns=(path.stat().st_mtime_ns,) * 2)
    before = [snapshot(site.root(name)) for name in ("new", "c", "d")]
    _leave_intent(site.pool, number)
    said, code = site.filesystem.folder / "said", site.filesystem.folder / "code"

    def recover_meanwhile() -> str:
        vunify_path = Path(sys.executable).parent / "vunify"
        script = f"{vunify_path} -q c d 2>{said}; echo $? >{code}"
        subprocess.Popen(["sh", "-c", script])
        sleep(0.7)
        return "open" if path.exists() and not is_immutable(path) else "disturbed"

    def met(step: Step) -> bool:
        return step.call == "linkat" and not is_immutable(path)

    done = run_traced(command(vunify.main, "-q", "new"), Meanwhile(met, recover_meanwhile))
    assert done.notes == ["open"], done.output
    assert done.code == 0, done.output
    wait_for(lambda: code.exists() and code.read_text() != "")
    assert (code.read_text(), said.read_text()) == ("0\n", "")
    assert site.root("new").joinpath("conf").stat().st_ino == number
    _assert_sound(site, ("new", "c", "d"), before)


def _leave_intent(pool: Path, number: int) -> None:
    """The stage folder of a program that was killed when it had noted this object."""
    folder = pool / "stage" / "0123456789abcdef" / "0"
    folder.mkdir(parents=True, mode=0o700)
    folder.joinpath("intent-00000000-0-0").symlink_to(str(number))


# --- turns ---


def _hold_shared(pool: Path, until: float, hold_s: float) -> Callable[[], int]:
    def work() -> int:
        with Pool.load(pool) as mine:
            while monotonic() < until:
                with mine.share():
                    sleep(hold_s)
        return 0

    return work


@on("ext4")
def test_who_wants_the_pool_alone_is_not_starved(site: Site, tool: Tool) -> None:
    Pool.create(site.pool).close()
    until = monotonic() + 3
    sharers = [fork(_hold_shared(site.pool, until, 0.05)) for _ in range(4)]
    sleep(0.1)
    waits = []
    with Pool.load(site.pool) as pool:
        while monotonic() < until - 1:
            began = monotonic()
            with pool.exclude():
                waits.append(monotonic() - began)
    assert [sharer() for sharer in sharers] == [0] * 4
    assert max(waits) < 1
    assert len(waits) >= 3


@on("ext4")
def test_who_shares_the_pool_is_not_starved_by_those_who_want_it_alone(site: Site) -> None:
    Pool.create(site.pool).close()
    until = monotonic() + 2

    def alone() -> int:
        with Pool.load(site.pool) as pool:
            while monotonic() < until:
                with pool.exclude():
                    sleep(0.05)
                sleep(0.05)  # less than a program needs to start
        return 0

    loops = [fork(alone) for _ in range(2)]
    with Pool.load(site.pool) as pool:
        waits = []
        while monotonic() < until - 0.5:
            began = monotonic()
            with pool.share():
                waits.append(monotonic() - began)
    assert [loop() for loop in loops] == [0, 0]
    assert len(waits) >= 3
    assert max(waits) < 1.5


# --- unify and reclaim in a loop ---


@pytest.mark.timeout(900 if is_soak() else 60)
def test_two_unify_and_one_reclaim_in_a_loop_lose_nothing(site: Site) -> None:
    kept = ("web", "db")
    before = [snapshot(site.add_guest(name, _rows(60))) for name in kept]
    _finish(_start("vunify", "-q", *kept))
    until = monotonic() + scaled(3, 100)
    loops = [
        fork(_loop(until, "vunify", "-q", "web", "db")),
        fork(_come_and_go(site, until)),
        fork(_loop(until, "vpool", "reclaim")),
    ]
    assert [loop() for loop in loops] == [0, 0, 0]
    assert _finish(_start("vpool", "reclaim")) is not None
    assert unshared(before, _assert_sound(site, kept, before)) == []
    assert all(path.stat().st_nlink > 1 for path in list_objects(site.pool))


def _loop(until: float, name: str, *arguments: str) -> Callable[[], int]:
    def work() -> int:
        while monotonic() < until:
            _finish(_start(name, *arguments))
        return 0

    return work


def _come_and_go(site: Site, until: float) -> Callable[[], int]:
    """Guests that share with the kept ones and among themselves, unified and deleted again."""

    def work() -> int:
        turn = 0
        while monotonic() < until:
            turn += 1
            names = [f"x{turn}", f"y{turn}"]
            for name in names:
                site.add_guest(name, [*_rows(60), *_rows(10, f"of turn {turn}")])
            _finish(_start("vunify", "-q", *names))
            for name in names:
                _finish(_start("vpool", "rm", site.root(name)))
        return 0

    return work
