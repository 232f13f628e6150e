"""Power loss at any moment: what was durable stays, and every object has its name's content.

The file system under test lies in an image that is cloned while the command stands still before a
call: that is what the disk holds at this moment. Before some clones the journal is made to commit,
by an fsync of a file of no interest: then names and flags are on the disk, data perhaps not.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Final

import pytest

from tests.fixtures.filesystems import KINDS, Filesystem
from tests.fixtures.power import Box, make_box
from tests.fixtures.probes import is_soak, need, on, scaled
from tests.fixtures.runs import find_faults
from tests.fixtures.stepper import Outcome, Scene, Step, command, run_traced
from tests.fixtures.trees import File, Row, Snapshot, differences, snapshot
from vstore.commands import vunify

pytestmark = [need("immutable", "lease", "reflink"), on("xfs")]
"""The image lies on xfs: see fixtures.power."""

_HARSH: Final = {"ext4": "noauto_da_alloc"}  # nothing is written out for the sake of a rename
_NAMES: Final = ("web", "db", "mail")


@pytest.fixture(params=KINDS)
def box(
    request: pytest.FixtureRequest, fs: Filesystem, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Box]:
    yield from make_box(
        request.param, fs.folder, monkeypatch, options=_HARSH.get(request.param, "")
    )


class Clock:
    """An on_step that clones the image before some of the steps that change something."""

    def __init__(self, box: Box, every: int, first: int) -> None:
        self._box = box
        self._every = every
        self._first = first
        self.seen = 0

    def __call__(self, step: Step, scene: Scene) -> None:
        if step.call in ("sendto", "lock", "flock", "setlease"):
            return
        self.seen += 1
        if self.seen % self._every != self._first % self._every:
            return
        clone = self._box.folder / f"{self.seen:05}.img"
        with closing(self._box.camera()) as camera:
            if self.seen // self._every % 3:
                camera.commit()
            camera.clone(clone.name)
        scene.notes.append(os.fspath(clone))


def _rows(count: int) -> list[Row]:
    sizes = (20, 300, 5_000, 70_000, 300_000)
    return [
        File(f"usr/{number % 4}/{number}", b"%0*d" % (sizes[number % 5], number))
        for number in range(count)
    ]


def _run(box: Box, *arguments: str) -> Outcome:
    done = run_traced(command(vunify.main, "--all", "-q", *arguments))
    assert done.code == 0, done.output
    return done


def _clone_while(box: Box, *arguments: str) -> list[Path]:
    """Run vunify and clone the image at some twelve moments; at each one in make soak."""
    every = 1 if is_soak() else 9
    clock = Clock(box, every, KINDS.index(box.kind) * 3)
    done = run_traced(command(vunify.main, "--all", "-q", *arguments), clock, timeout_s=300)
    assert done.code == 0, done.output
    assert len(done.notes) >= 5, "too few moments"
    return [Path(path) for path in done.notes]


def _lost(before: Snapshot, root: Path) -> list[str]:
    """What differs, but for the times of folders, which a death may cost."""
    folders = {repr(path) for path, entry in before.items() if entry.kind == "d"}
    return [
        line
        for line in differences(before, snapshot(root))
        if line.split(": mtime_ns was")[0] not in folders
    ]


def _wrong_objects(box: Box) -> list[str]:
    return [
        fault for fault in find_faults(box.site.pool) if "has other" in fault or ": is " in fault
    ]


def _assert_each_clone_recovers(
    box: Box, clones: list[Path], before: dict[str, Snapshot], again: Callable[[], Outcome]
) -> None:
    box.lose_power()
    for clone in clones:
        with box.as_it_was(clone):
            if (box.site.pool / "objects").exists():
                assert _wrong_objects(box) == [], clone
            for name, snap in before.items():
                assert _lost(snap, box.site.root(name)) == [], clone
            done = again()
            assert find_faults(box.site.pool) == [], (clone, done.output)
            for name, snap in before.items():
                assert _lost(snap, box.site.root(name)) == [], clone
        clone.unlink()


@pytest.mark.timeout(3600 if is_soak() else 600)
def test_power_loss_while_unifying_leaves_objects_absent_or_right(box: Box) -> None:
    rows = _rows(scaled(20, 60))
    box.site.add_guest("web", rows)
    _run(box)
    box.sync()
    before = {"web": snapshot(box.site.root("web"))}
    for name in ("db", "mail"):  # not on the disk yet: whatever becomes an object must get there
        box.site.add_guest(name, [*rows, File(f"own/{name}", b"of one guest alone")])
    clones = _clone_while(box)
    _assert_each_clone_recovers(box, clones, before, lambda: _run(box))


@pytest.mark.timeout(3600 if is_soak() else 600)
def test_power_loss_while_links_are_broken_loses_no_file(box: Box) -> None:
    for name in _NAMES:
        box.site.add_guest(name, _rows(scaled(10, 60)))
    _run(box)
    box.sync()
    before = {name: snapshot(box.site.root(name)) for name in _NAMES}
    clones = _clone_while(box, "--undo")
    _assert_each_clone_recovers(box, clones, before, lambda: _run(box, "--undo"))


@pytest.mark.timeout(600)
def test_power_loss_right_after_the_end_leaves_every_file_complete(box: Box) -> None:
    for name in _NAMES:
        box.site.add_guest(name, _rows(20))
    box.sync()
    before = {name: snapshot(box.site.root(name)) for name in _NAMES}
    _run(box)
    clock = Clock(box, 1, 0)
    scene = Scene(0)
    clock(Step(1, 0, "linkat", ()), scene)
    _assert_each_clone_recovers(box, list(map(Path, scene.notes)), before, lambda: _run(box))
