"""Death after any step leaves every name its full content; the next run puts the rest right."""

import errno
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from time import sleep
from typing import Final

import pytest

from tests.fixtures.filesystems import KINDS, Site, is_immutable
from tests.fixtures.probes import is_soak, need, on
from tests.fixtures.running import IDLE, is_frozen, running
from tests.fixtures.runs import find_faults, list_objects
from tests.fixtures.stepper import OnStep, Outcome, Scene, Step, command, run_traced
from tests.fixtures.trees import File, Folder, Row, Snapshot, differences, snapshot
from tests.fixtures.windows import enemy, wait_for, waits_in_lease
from vstore.commands import vunify

pytestmark = need("immutable", "lease")

_CHANGES: Final = frozenset(
    ("setflags", "setlease", "symlinkat", "sendmsg", "linkat", "renameat", "unlinkat", "mkdirat")
)
"""Calls that change something on the disk or what another process holds."""

_HOLDER, _KEEPER, _ALL = "holder", "keeper", "all"


@dataclass(slots=True)
class Kill:
    """An on_step that kills before the n-th of the calls that matter; they count from the first
    one in the program's own stage folder on.
    """

    at: int
    whom: str
    seen: int = 0

    def __call__(self, step: Step, scene: Scene) -> None:
        if step.call not in _CHANGES or (self.whom != _ALL and step.pid == scene.first):
            return
        self.seen += 1
        if self.seen != self.at:
            return
        scene.notes.append(f"{self.whom} killed before {step.call}")
        if self.whom != _ALL:
            sleep(0.003)  # whoever tries to write has the time to come to the lease
        victims = {_HOLDER: [step.pid], _KEEPER: [scene.first], _ALL: sorted(scene.pids)}
        scene.kill(*victims[self.whom])


def _like_ours() -> list[Row]:
    """Files of a guest that are named like what we make."""
    names = ("spare", "copy-0", "intent-1-2-0", "cgroup-0", ".vstore-1", "stage", "format")
    return [
        Folder("odd"),
        *(File(name, b"a guest's own file, named " + name.encode()) for name in names),
        *(File(f"odd/{name}", b"another one, named " + name.encode()) for name in names),
    ]


class Stage:
    """A site whose pool has objects, and pairs of fresh guests to unify, undo or kill in."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self._turns = count()
        rows = [File(f"old/{number}", b"known to the pool %d" % number) for number in range(2)]
        for name in ("first", "second"):
            site.add_guest(name, rows)
        self._rows = rows
        assert self.run("first", "second").code == 0

    def add_pair(self) -> "Pair":
        """Two guests with equal files of which the pool knows two and nobody the rest."""
        turn = next(self._turns)
        new = [
            File(f"new/{number}", b"made for turn %d, number %d" % (turn, number))
            for number in range(2)
        ]
        rows = [*self._rows, *new]
        names = (f"web{turn}", f"db{turn}")
        roots = [
            self.site.add_guest(names[0], [*rows, *_like_ours()]),
            self.site.add_guest(names[1], rows),
        ]
        return Pair(self, names, roots, [snapshot(root) for root in roots])

    def run(self, *arguments: str, on_step: OnStep | None = None) -> Outcome:
        work = command(vunify.main, *arguments, "--jobs", "1", "-q")
        return run_traced(work, on_step) if on_step else run_traced(work)


@dataclass(frozen=True, slots=True)
class Pair:
    stage: Stage
    names: tuple[str, str]
    roots: list[Path]
    before: list[Snapshot]

    def run(self, *arguments: str, on_step: OnStep | None = None) -> Outcome:
        """vunify both guests; with --undo only the first, so that the other goes on sharing."""
        names = self.names[:1] if "--undo" in arguments else self.names
        return self.stage.run(*arguments, *names, on_step=on_step)

    def lost(self) -> list[str]:
        """What the guests have lost: all but the times of folders, which a death may cost."""
        after = [snapshot(root) for root in self.roots]
        lines = []
        for old, new in zip(self.before, after, strict=True):
            folders = {repr(path) for path, entry in old.items() if entry.kind == "d"}
            lines += [
                line
                for line in differences(old, new)
                if not (": mtime_ns was" in line and line.split(": mtime_ns")[0] in folders)
            ]
        return lines

    def unshared(self) -> list[str]:
        """The equal files of both guests that are not one inode of the pool."""
        numbers = {path.lstat().st_ino for path in list_objects(self.stage.site.pool)}
        return [
            f"{root}: {name}"
            for root in self.roots
            for name in ("old/0", "old/1", "new/0", "new/1")
            if (root / name).lstat().st_ino not in numbers
        ]

    def frozen_strangers(self) -> list[Path]:
        """Immutable files of the guests that are no objects: nobody could change these again."""
        numbers = {path.lstat().st_ino for path in list_objects(self.stage.site.pool)}
        shown = subprocess.run(
            ["lsattr", "-Ra", *self.roots], capture_output=True, text=True, check=True
        )
        rows = [line.split(None, 1) for line in shown.stdout.splitlines() if " " in line]
        frozen = [Path(path) for flags, path in rows if "i" in flags]
        return [path for path in frozen if path.lstat().st_ino not in numbers]


@pytest.fixture
def stage(site: Site) -> Stage:
    return Stage(site)


def _turns(steps: int, kind: str) -> Iterator[int]:
    """Every step in make soak; else a third of them for each file system, together all."""
    if is_soak():
        return iter(range(1, steps + 1))
    return iter(range(1 + KINDS.index(kind), steps + 1, len(KINDS)))


def _count_steps(pair: Pair, whom: str, *arguments: str) -> int:
    watch = Kill(at=0, whom=whom)
    outcome = pair.run(*arguments, on_step=lambda step, scene: _count(watch, step, scene))
    assert outcome.code == 0, outcome.output
    return len(outcome.notes)


def _count(watch: Kill, step: Step, scene: Scene) -> None:
    before = watch.seen
    watch(step, scene)
    scene.notes.extend(["step"] * (watch.seen - before))


def _assert_put_right(pair: Pair, killed: Outcome) -> None:
    """The next run is enough to put everything right."""
    again = pair.run()
    assert again.code == 0, (killed.notes, again.output)
    assert pair.lost() == [], killed.notes
    assert pair.unshared() == [], (killed.notes, again.output)
    assert pair.frozen_strangers() == [], killed.notes
    assert find_faults(pair.stage.site.pool) == [], (killed.notes, again.output)


@pytest.mark.timeout(1800 if is_soak() else 120)
def test_unify_killed_after_any_step_loses_nothing_and_the_next_run_puts_it_right(
    stage: Stage,
) -> None:
    steps = _count_steps(stage.add_pair(), _ALL)
    assert steps > 30
    for turn in _turns(steps, stage.site.filesystem.kind):
        pair = stage.add_pair()
        killed = pair.run(on_step=Kill(at=turn, whom=_ALL))
        assert killed.code == -signal.SIGKILL, killed.output
        assert pair.lost() == [], killed.notes
        _assert_put_right(pair, killed)


@pytest.mark.timeout(1800 if is_soak() else 120)
def test_undo_killed_after_any_step_loses_nothing_and_the_next_run_puts_it_right(
    stage: Stage,
) -> None:
    pair = stage.add_pair()
    assert pair.run().code == 0
    steps = _count_steps(pair, _ALL, "--undo")
    assert steps > 30
    for turn in _turns(steps, stage.site.filesystem.kind):
        pair = stage.add_pair()
        assert pair.run().code == 0
        killed = pair.run("--undo", on_step=Kill(at=turn, whom=_ALL))
        assert killed.code == -signal.SIGKILL, killed.output
        assert pair.lost() == [], killed.notes
        again = pair.run("--undo")
        assert again.code == 0, (killed.notes, again.output)
        assert pair.lost() == [], killed.notes
        assert pair.frozen_strangers() == [], killed.notes
        assert (pair.roots[0] / "new/0").stat().st_nlink == 1
        assert find_faults(stage.site.pool) == [], (killed.notes, again.output)


@pytest.mark.timeout(1800 if is_soak() else 120)
@pytest.mark.parametrize("whom", [_HOLDER, _KEEPER])
@pytest.mark.parametrize("what", ["unify", "undo"])
def test_one_process_killed_after_any_step_lets_no_writer_through(
    stage: Stage, what: str, whom: str
) -> None:
    arguments = ["--undo"] if what == "undo" else []
    pair = stage.add_pair()
    assert not arguments or pair.run().code == 0
    steps = _count_steps(pair, whom, *arguments)
    shared = stage.site.root("first") / "old/0"
    with enemy(shared, pause_s=0.0005) as writer:
        for turn in _turns(steps, stage.site.filesystem.kind):
            pair = stage.add_pair()
            assert not arguments or pair.run().code == 0
            killed = pair.run(*arguments, on_step=Kill(at=turn, whom=whom))
            assert killed.notes, "the step was not met"
            assert writer.poll() is None, killed.notes
            assert pair.lost() == [], killed.notes
            assert is_immutable(shared), killed.notes
            _assert_put_right(pair, killed)
        assert not waits_in_lease(writer.pid)
    assert shared.read_bytes() == b"known to the pool 0"


def test_an_object_that_was_written_to_after_both_died_is_quarantined_and_named(
    stage: Stage,
) -> None:
    pair = stage.add_pair()
    shared = stage.site.root("first") / "old/0"
    killed = pair.run(on_step=_killed_in_the_window_on(shared.stat().st_ino))
    assert killed.code == -signal.SIGKILL, killed.output
    assert not is_immutable(shared)
    (path,) = [path for path in list_objects(stage.site.pool) if path.samefile(shared)]
    with shared.open("r+b") as file:
        file.write(b"UNKNOWN")
    again = pair.run()
    assert path.name in again.output
    assert "quarantine" in again.output
    assert not path.exists() or not path.samefile(shared)
    (fault,) = find_faults(stage.site.pool)
    assert f"/quarantine/{path.name}" in fault
    assert [line for line in pair.lost() if not line.startswith("b'old/0':")] == []


def _killed_in_the_window_on(number: int) -> Callable[[Step, Scene], None]:
    """An on_step that kills all just before the inode of this number is frozen again."""

    def look(step: Step, scene: Scene) -> None:
        if step.call == "setflags" and step.inode(step.arguments[0]) == number:
            (flags,) = step.read(step.arguments[2], "=I")
            if flags & 0x10:
                scene.kill(*scene.pids)

    return look


def test_a_window_that_was_left_open_is_closed_by_the_next_run(stage: Stage) -> None:
    pair = stage.add_pair()
    shared = stage.site.root("first") / "old/0"
    killed = pair.run(on_step=_killed_in_the_window_on(shared.stat().st_ino))
    assert killed.code == -signal.SIGKILL, killed.output
    assert not is_immutable(shared)
    assert pair.lost() == []
    _assert_put_right(pair, killed)
    assert is_immutable(shared)


@on("ext4")
@need("cgroup_freezer")
@pytest.mark.parametrize("whom", [_HOLDER, _KEEPER, _ALL])
def test_a_frozen_guest_runs_again_whoever_was_killed(
    stage: Stage, cgroup: Path, whom: str
) -> None:
    pair = stage.add_pair()
    with running(stage.site, pair.names[0], cgroup, IDLE) as guest:
        killed = pair.run(on_step=_killed_while_frozen(cgroup, whom))
        assert killed.notes == ["frozen"], killed.output
        if whom == _ALL:
            assert is_frozen(cgroup)
            assert pair.run().code == 0
        wait_for(lambda: not is_frozen(cgroup))
        assert guest.poll() is None
    assert pair.lost() == []
    _assert_put_right(pair, killed)


def _killed_while_frozen(cgroup: Path, whom: str) -> Callable[[Step, Scene], None]:
    def look(step: Step, scene: Scene) -> None:
        if step.call == "renameat" and is_frozen(cgroup) and not scene.notes:
            scene.notes.append("frozen")
            victims = {_HOLDER: [step.pid], _KEEPER: [scene.first], _ALL: sorted(scene.pids)}
            scene.kill(*victims[whom])

    return look


@on("ext4")
@pytest.mark.parametrize("call", ["linkat", "renameat", "symlinkat", "setflags"])
@pytest.mark.parametrize("failure", ["ENOSPC", "EIO", "EMLINK", "EXDEV", "EPERM"])
def test_a_call_that_fails_costs_one_file_and_no_content(
    stage: Stage, call: str, failure: str
) -> None:
    number = getattr(errno, failure)
    for turn in range(1, 4):
        pair = stage.add_pair()
        failed = pair.run(on_step=_fails_at(call, turn, number))
        assert failed.notes, "the step was not met"
        assert "Traceback" not in failed.output, (turn, failed.output)
        assert failed.code in (0, 1, 6, 9, 20), (turn, failed.output)
        assert pair.lost() == [], turn
        _assert_put_right(pair, failed)


def _fails_at(call: str, turn: int, number: int) -> Callable[[Step, Scene], int | None]:
    def look(step: Step, scene: Scene) -> int | None:
        if step.call != call or step.pid == scene.first or len(scene.notes) == turn:
            return None
        scene.notes.append(f"{call} of {step.pid}")
        return number if len(scene.notes) == turn else None

    return look
