"""What came out of the runs: figures, ratios, and the targets they are held against. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final, Literal

from bench.ledger import Ledger
from bench.measure import Peak
from bench.rivals import HARDLINK, VUNIFY

MIB: Final = 1 << 20
FIRST_PASS_PART: Final = 0.6
SECOND_PASS_PART: Final = 0.9
SLOPE_LIMIT: Final = 1.2
MEMORY_LIMIT_MIB: Final = 300

State = Literal["warm", "cold", "watched"]
"""How a run began: all in the cache; nothing in it; all in it, and its memory is sampled."""


@dataclass(frozen=True, slots=True)
class Run:
    """One program once over one set of trees."""

    data: str
    files: int
    program: str
    state: State
    round: int
    step: int
    """1: the trees as they were; 2: once more over what step 1 left."""
    wall_s: float
    user_s: float
    system_s: float
    flush_s: float
    """How long writing took of what the program left to be written."""
    exit_code: int
    reclaimed_bytes: int
    """By how much statvfs says that the file system has more room than before step 1."""
    peak: Peak | None = None
    trees_kept: bool | None = None
    """Whether every file has the content, mode, owner, time and xattrs that it had."""
    held_bytes: int | None = None
    """What the files of the trees take up after it, every inode counted once."""
    said: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Spread:
    """The least, the middle and the most of some figures."""

    least: float
    middle: float
    most: float


@dataclass(frozen=True, slots=True)
class Target:
    """A figure that was asked for, and what came out."""

    what: str
    wanted: float
    reached: float | None
    unit: str
    at_most: bool = True
    """Whether less is better."""

    @property
    def is_met(self) -> bool | None:
        """None where nothing was measured."""
        if self.reached is None:
            return None
        return self.reached <= self.wanted if self.at_most else self.reached >= self.wanted


def spread(values: Iterable[float]) -> Spread | None:
    """None where there is no value."""
    known = sorted(values)
    return Spread(known[0], median(known), known[-1]) if known else None


def select(
    runs: Iterable[Run], *, program: str, step: int, state: State = "warm", data: str | None = None
) -> list[Run]:
    """The runs that ended well, in the order of rounds."""
    return [
        run
        for run in runs
        if (run.program, run.step, run.state) == (program, step, state)
        and data in (None, run.data)
        and not run.exit_code
    ]


def wall(runs: Iterable[Run]) -> Spread | None:
    return spread(run.wall_s for run in runs)


def ratios(runs: Sequence[Run], peers: Sequence[Run]) -> Spread | None:
    """Time of each run as a part of the peer's time in the same round.

    A slow minute of the machine slows both, so pairs say more than the quotient of two medians.
    """
    theirs = {run.round: run.wall_s for run in peers}
    return spread(run.wall_s / theirs[run.round] for run in runs if theirs.get(run.round))


def fastest(runs: Sequence[Run], programs: Iterable[str], *, step: int) -> str | None:
    """Which of `programs` has the least median time; None where none ran."""
    medians = {
        name: times.middle
        for name in programs
        if (times := wall(select(runs, program=name, step=step)))
    }
    return min(medians, key=lambda name: medians[name]) if medians else None


def slope(small: Spread | None, large: Spread | None, *, times: float) -> float | None:
    """By what the time of one file grows from a small set to one `times` as large; 1 is linear."""
    if small is None or large is None or not small.middle:
        return None
    return large.middle / (small.middle * times)


def unify_targets(runs: Sequence[Run], peers: Iterable[str], ledger: Ledger | None) -> list[Target]:
    """What was asked for on real guests."""
    rival = fastest(runs, peers, step=1)
    first = _part(runs, rival, step=1)
    second = _part(runs, HARDLINK, step=2)
    return [
        Target(
            f"first pass, as a part of the fastest peer's ({rival})", FIRST_PASS_PART, first, "x"
        ),
        Target("second pass, as a part of hardlink's second", SECOND_PASS_PART, second, "x"),
        *_room_targets(runs, ledger),
    ]


def _part(runs: Sequence[Run], peer: str | None, *, step: int) -> float | None:
    if peer is None:
        return None
    found = ratios(select(runs, program=VUNIFY, step=step), select(runs, program=peer, step=step))
    return found.middle if found else None


def _room_targets(runs: Sequence[Run], ledger: Ledger | None) -> list[Target]:
    if ledger is None:
        return []
    spared = ledger.linked_bytes + ledger.twin_bytes
    owed = "hardlink's less twins and linked"
    return [
        Target(
            f"blocks of files set free, as a part of {owed}",
            1,
            _room_part(_set_free(runs, VUNIFY, ledger), _set_free(runs, HARDLINK, ledger), spared),
            "x",
            at_most=False,
        ),
        Target(
            f"the same by statvfs, less what pool folders and index take, as a part of {owed}",
            1,
            _room_part(_room(runs, VUNIFY), _room(runs, HARDLINK), spared),
            "x",
            at_most=False,
        ),
    ]


def _room_part(ours: float | None, theirs: float | None, spared: int) -> float | None:
    if ours is None or theirs is None or theirs <= spared:
        return None
    return ours / (theirs - spared)


def _room(runs: Sequence[Run], program: str) -> float | None:
    found = spread(run.reclaimed_bytes for run in select(runs, program=program, step=1))
    return found.middle if found else None


def _set_free(runs: Sequence[Run], program: str, ledger: Ledger) -> float | None:
    watched = select(runs, program=program, step=1, state="watched")
    found = spread(run.held_bytes for run in watched if run.held_bytes is not None)
    return ledger.allocated_bytes - found.middle if found else None


def scale_targets(runs: Sequence[Run], kinds: Iterable[str]) -> list[Target]:
    """What was asked for on seeded trees: time linear in files, memory bounded."""
    targets = []
    for kind in kinds:
        own = [run for run in runs if run.data == kind]
        sizes = sorted({run.files for run in own})
        if len(sizes) < 2:
            continue
        targets += [_slope_target(own, kind, step, sizes[0], sizes[-1]) for step in (1, 2)]
        targets.append(_memory_target(own, kind, sizes[-1]))
    return targets


def _slope_target(runs: Sequence[Run], kind: str, step: int, few: int, many: int) -> Target:
    def times(files: int) -> Spread | None:
        return wall(run for run in select(runs, program=VUNIFY, step=step) if run.files == files)

    what = f"{kind}: time of a file at {many:,} against {few:,}, pass {step}"
    return Target(what, SLOPE_LIMIT, slope(times(few), times(many), times=many / few), "x")


def _memory_target(runs: Sequence[Run], kind: str, files: int) -> Target:
    peaks = [
        run.peak.rss / MIB
        for step in (1, 2)
        for run in select(runs, program=VUNIFY, step=step, state="watched")
        if run.files == files and run.peak is not None
    ]
    what = f"{kind}: peak RSS of all processes together at {files:,}"
    return Target(what, MEMORY_LIMIT_MIB, max(peaks, default=None), "MiB")
