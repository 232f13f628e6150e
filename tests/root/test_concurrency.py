"""Several programs on one pool: each makes progress, none disturbs another, nobody starves."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import monotonic, sleep

import pytest

from tests.conftest import Tool
from tests.fixtures.ahead import before_others
from tests.fixtures.filesystems import KINDS, Site, is_immutable
from tests.fixtures.probes import is_soak, need, on, scaled
from tests.fixtures.running import IDLE, hear, running, say
from tests.fixtures.runs import SETTLED_S, find_faults, list_objects, unify, unshared
from tests.fixtures.stepper import Scene, Step, command, run_traced
from tests.fixtures.trees import MAY_DIFFER, File, Row, Snapshot, differences, snapshot
from tests.fixtures.windows import fork, guest_cgroup, shared_file, wait_for
from vstore.commands import vunify
from vstore.pool import Pool

pytestmark = need("immutable", "lease")


_PARTIAL = 20  # some files could not be done


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


def _finish(process: subprocess.Popen[str], *codes: int) -> str:
    """What it printed; it must end well, or with one of these exit codes."""
    output, errors = process.communicate(timeout=100)
    assert process.returncode in (0, *codes), errors
    assert "Traceback" not in errors
    return output


def _assert_sound(
    site: Site,
    names: Sequence[str],
    before: Sequence[Snapshot],
    *,
    ignoring: Collection[str] = MAY_DIFFER,
) -> list[Snapshot]:
    after = [snapshot(site.root(name)) for name in names]
    for name, old, new in zip(names, before, after, strict=True):
        assert differences(old, new, ignoring=ignoring) == [], name
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


# --- guests that run ---

_CLOCK = """
import os, sys, time, threading
longest, last = 0.0, time.monotonic()
def stop():
    sys.stdin.readline()
    print(longest, flush=True)
    os._exit(0)
threading.Thread(target=stop).start()
print("ready", flush=True)
while True:
    time.sleep(0.001)
    now = time.monotonic()
    longest, last = max(longest, now - last), now
"""


@on("ext4")
@need("cgroup_freezer")
def test_a_running_guest_stands_still_for_moments_only(
    site: Site, cgroup: Path, tool: Tool
) -> None:
    large = File("usr/large", b"x" * 5000, size=4 << 30)
    for name in ("web", "db"):
        site.add_guest(name, [large, *_rows(300)])
    unify(tool)
    site.add_guest("mail", [large, *_rows(300)])
    sleep(SETTLED_S)
    with before_others(), running(site, "mail", cgroup, _CLOCK) as guest:
        assert hear(guest) == "ready"
        report = unify(tool, "mail")
        say(guest, "stop")
        longest_s = float(hear(guest))
    assert report.unified == 301
    assert longest_s < 0.5


# --- turns ---


@contextmanager
def _at_work(site: Site, count: int, turn: Callable[[Pool], object]) -> Iterator[Pool]:
    """So many others, before all else on the machine, take their turns at the pool while the block
    runs, with the pool for itself too; each of them has had one when it begins.
    """
    stop = site.filesystem.folder / "stop"
    begun = [site.filesystem.folder / f"begun{number}" for number in range(count)]

    def work(mark: Path) -> int:
        with Pool.load(site.pool) as mine:
            while not stop.exists():
                turn(mine)
                mark.touch()
        return 0

    Pool.create(site.pool).close()
    with before_others(), Pool.load(site.pool) as pool:
        others = [fork(partial(work, mark)) for mark in begun]
        wait_for(lambda: all(mark.exists() for mark in begun))
        try:
            yield pool
        finally:
            stop.touch()
            codes = [other() for other in others]
    assert codes == [0] * count


@on("ext4")
def test_who_wants_the_pool_alone_is_not_starved(site: Site, tool: Tool) -> None:
    def share(pool: Pool) -> None:
        with pool.share():
            sleep(0.05)

    waits = []
    with _at_work(site, 4, share) as pool:
        for _ in range(20):
            began = monotonic()
            with pool.exclude():
                waits.append(monotonic() - began)
    assert max(waits) < 1


@on("ext4")
def test_who_shares_the_pool_can_ask_whether_somebody_waits_for_it(site: Site) -> None:
    def exclude(pool: Pool) -> None:
        with pool.exclude():
            sleep(0.01)

    with Pool.create(site.pool) as pool, pool.share():
        assert not pool.is_waited_for()
    with _at_work(site, 1, exclude) as pool, pool.share():
        wait_for(pool.is_waited_for)


@on("ext4")
def test_who_shares_the_pool_is_not_starved_by_those_who_want_it_alone(site: Site) -> None:
    def exclude(pool: Pool) -> None:
        with pool.exclude():
            sleep(0.05)
        sleep(0.05)  # less than a program needs to start

    waits = []
    with _at_work(site, 2, exclude) as pool:
        for _ in range(20):
            began = monotonic()
            with pool.share():
                waits.append(monotonic() - began)
    assert max(waits) < 1.5


# --- unify and reclaim in a loop ---


@pytest.mark.timeout(900 if is_soak() else 120)
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


# --- a hostile guest beside all that ---

_ENEMY = """
import os, sys
root, cgroup = sys.argv[1:]
paths = [os.path.join(top, name) for top, _, names in os.walk(root) for name in names]
got = []
deeds = [
    lambda path: got.append(os.open(path, os.O_RDWR)),
    lambda path: got.append(os.open(path, os.O_WRONLY | os.O_NONBLOCK)),
    lambda path: [os.pwrite(file_fd, b"attack", 0) for file_fd in got],
    lambda path: os.truncate(path, 1),
    lambda path: os.chmod(path, 0o4777),
    lambda path: os.chown(path, 1, 1),
    lambda path: os.utime(path, (1, 1)),
    lambda path: os.setxattr(path, "user.enemy", b"1"),
    lambda path: os.link(path, path + "-more"),
    lambda path: os.rename(path, path),
]
while True:
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        continue
    with open(cgroup + "/cgroup.procs", "w") as group:
        group.write(str(os.getpid()))
    while True:
        for deed in deeds:
            for path in paths:
                try:
                    deed(path)
                except OSError:
                    pass
"""


@on(*(KINDS if is_soak() else KINDS[1:2]))
@need("cgroup_freezer")
@pytest.mark.timeout(900 if is_soak() else 120)
def test_enemies_in_a_running_guest_never_change_its_sibling(site: Site, cgroup: Path) -> None:
    for name in ("web", "db"):
        site.add_guest(name, _rows(12))
    _finish(_start("vunify", "-q", "web", "db"))
    before = [snapshot(site.root("db"))]
    group = guest_cgroup(cgroup)
    with running(site, "web", group, IDLE), _enemies(site.root("web"), group):
        until = monotonic() + scaled(3, 200)
        turn = 0
        while monotonic() < until:
            turn += 1
            before.append(snapshot(site.add_guest(f"new{turn}", _twins(12, 60))))
            _finish(_start("vunify", "-q", "--link-twins", f"new{turn}"), _PARTIAL)
            if turn % 2:
                _finish(_start("vunify", "-q", "--undo", f"new{turn}"), _PARTIAL)
    assert turn >= 1
    _finish(_start("vunify", "-q", "db"))
    names = ["db", *(f"new{number}" for number in range(1, turn + 1))]
    _assert_sound(site, names, before, ignoring=MAY_DIFFER | {"group"})


def _twins(count: int, copies: int) -> list[Row]:
    """As `_rows`, each file so many times, for windows that are open for long."""
    return [
        File(f"{copy}/{number}", f"common content {number}".encode() * 3)
        for copy in range(copies)
        for number in range(count)
    ]


@contextmanager
def _enemies(root: Path, group: Path) -> Iterator[None]:
    """Two loops outside the guest's group, each of which has one process in it do its worst; who is
    killed has a successor.
    """
    outside = group.parent.parent / "loops"
    outside.mkdir()
    loops = [_start_enemy(root, group, outside) for _ in range(2)]
    try:
        yield
    finally:
        for killed in (outside, group):  # no loop, no successor
            (killed / "cgroup.kill").write_text("1")
        for loop in loops:
            loop.wait()


def _start_enemy(root: Path, group: Path, outside: Path) -> subprocess.Popen[str]:
    program = f"input()\n{_ENEMY}"
    loop = subprocess.Popen(
        [sys.executable, "-c", program, root, group], stdin=subprocess.PIPE, text=True
    )
    (outside / "cgroup.procs").write_text(str(loop.pid))
    say(loop, "go")
    assert loop.stdin is not None
    loop.stdin.close()
    return loop
