"""The two cases: real guests beside the other programs, and seeded trees of growing number.

Every program works on a fresh copy of the same image. A round lets each of them have its turn, in
another order than the round before, so that a slow minute of the machine hits each. Times, memory
and a cold start are runs of their own.
"""

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Final

from bench import datasets, seeded
from bench.figures import Run, State
from bench.images import Image, flush, free_bytes, fresh_copy, new_image
from bench.ledger import Ledger, allocated, count_files, fingerprints, read_all, take_stock
from bench.measure import Peak, Timing, can_watch, run_timed, run_watched
from bench.rivals import HARDLINK, VUNIFY, Place, Program

log = logging.getLogger(__name__)

_GIB: Final = 1 << 30
_GUESTS_SIZE: Final = 16 * _GIB
_GUESTS_INODES: Final = 400_000

SCALE_PROGRAMS: Final = (VUNIFY, HARDLINK)
SCALE_KINDS: Final = ("equal", "different", "mix")
SCALE_FILES: Final = {"full": (100_000, 1_000_000), "small": (2_000, 20_000)}

_SAID_KEYS: Final = (
    "files_seen",
    "files_unified",
    "files_already",
    "bytes_reclaimed",
    "objects_new",
    "skipped",
    "seconds",
)
"""What a report quotes of the program's own; its other keys name paths."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asked for."""

    size: str
    rounds: int
    file_system: str
    work: Path
    """A folder on a disk with room for two images; nothing stays in it."""
    programs: Sequence[Program]
    kinds: Sequence[str]
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Stage:
    """One set of trees, ready to be copied as often as needed."""

    data: str
    image: Image
    trees: tuple[str, ...]
    files: int
    work: Path
    timeout_s: float
    ledger: Ledger | None
    prints: Sequence[bytes] | None
    """What each tree's fingerprint must be after a run; None where that takes too long."""


@dataclass(frozen=True, slots=True)
class Turn:
    program: Program
    state: State
    round: int


@dataclass(frozen=True, slots=True)
class Results:
    runs: Sequence[Run]
    ledger: Ledger | None = None


def unify(options: Options) -> Results:
    """Real guests: rounds of two passes each, warm; then one cold first pass; then one watched."""
    corpus = datasets.CORPORA[options.size]
    datasets.prepare(corpus)
    fill = partial(datasets.lay_out, corpus)
    extra: tuple[State, ...] = ("cold", "watched") if can_watch() else ("cold",)
    with _work_folder(options) as work:
        room = {"size": _GUESTS_SIZE, "inodes": _GUESTS_INODES}
        with _stage(options, work, "guests", fill, **room, is_counted=True) as stage:
            runs = _rounds(stage, options.programs, options.rounds)
            for state in extra:
                for program in options.programs:
                    runs += _measure(stage, Turn(program, state, 1))
            return Results(runs, stage.ledger)


def scale(options: Options) -> Results:
    """Seeded trees, then ten times as many files, to see how time and memory grow."""
    runs: list[Run] = []
    with _work_folder(options) as work:
        for kind in options.kinds:
            for files in SCALE_FILES[options.size]:
                runs += _scale_step(options, work, kind, files)
    return Results(runs)


def _scale_step(options: Options, work: Path, kind: str, files: int) -> list[Run]:
    fill = partial(seeded.grow, kind, files)
    room = {"size": 2 * _GIB + files * 16_384, "inodes": files * 3 // 2 + 50_000}
    with _stage(options, work, kind, fill, **room, is_counted=False) as stage:
        runs = _rounds(stage, options.programs, 1)
        runs += _rounds(
            stage, [one for one in options.programs if one.name == VUNIFY], options.rounds, first=2
        )
        for program in options.programs if can_watch() else ():
            runs += _measure(stage, Turn(program, "watched", 1))
        return runs


@contextmanager
def _work_folder(options: Options) -> Iterator[Path]:
    options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.work) as folder:
        yield Path(folder)


@contextmanager
def _stage(
    options: Options,
    work: Path,
    data: str,
    fill: Callable[[Path], list[Path]],
    *,
    size: int,
    inodes: int,
    is_counted: bool,
) -> Iterator[Stage]:
    log.info("%s: laying out the trees", data)
    with new_image(work, options.file_system, size=size, inodes=inodes) as (image, root):
        trees = fill(root)
        ledger = take_stock(trees) if is_counted else None
        prints = fingerprints(trees) if is_counted else None
        names = tuple(tree.name for tree in trees)
        files = count_files(trees)
    try:
        yield Stage(data, image, names, files, work, options.timeout_s, ledger, prints)
    finally:
        os.close(image.fd)


def rotated(programs: Sequence[Program], number: int) -> list[Program]:
    """The order of turns in round `number`, which starts with 1."""
    start = (number - 1) % len(programs) if programs else 0
    return [*programs[start:], *programs[:start]]


def _rounds(stage: Stage, programs: Sequence[Program], last: int, *, first: int = 1) -> list[Run]:
    runs: list[Run] = []
    for number in range(first, last + 1):
        for program in rotated(programs, number):
            runs += _measure(stage, Turn(program, "warm", number))
    return runs


def _measure(stage: Stage, turn: Turn) -> list[Run]:
    """Both passes over a fresh copy of the stage; only the first where it is cold."""
    with fresh_copy(stage.image, stage.work, is_cold=turn.state == "cold") as root:
        place = _place(stage, root)
        if turn.state != "cold":
            read_all(place.trees)
        free_before = free_bytes(root)
        steps = (1,) if turn.state == "cold" else (1, 2)
        return [_pass(stage, turn, place, step, free_before) for step in steps]


def _place(stage: Stage, root: Path) -> Place:
    scratch = stage.work / "scratch"
    scratch.mkdir(exist_ok=True)
    empty = scratch / "empty"
    empty.touch()
    return Place([root / name for name in stage.trees], root / ".pool", empty, scratch)


def _pass(stage: Stage, turn: Turn, place: Place, step: int, free_before: int) -> Run:
    timing, peak = _run_once(turn, place, stage.timeout_s)
    flush_s = _time_flush(place)
    done = Run(
        data=stage.data,
        files=stage.files,
        program=turn.program.name,
        state=turn.state,
        round=turn.round,
        step=step,
        wall_s=timing.wall_s,
        user_s=timing.user_s,
        system_s=timing.system_s,
        flush_s=flush_s,
        exit_code=timing.exit_code,
        reclaimed_bytes=free_bytes(place.pool.parent) - free_before,
        peak=peak,
        trees_kept=_are_kept(stage, place) if turn.state == "watched" else None,
        held_bytes=allocated(place.trees) if turn.state == "watched" else None,
        said=_said(timing.output) if turn.program.name == VUNIFY else {},
    )
    if timing.exit_code:
        log.warning("%s: exit code %d: %s", done.program, timing.exit_code, timing.complaint)
    log.info(
        "%s %d: %s, %s, round %d, pass %d: %.2f s, %.0f MiB reclaimed%s",
        *(done.data, done.files, done.program, done.state, done.round, done.step, done.wall_s),
        done.reclaimed_bytes / (1 << 20),
        f", {peak.rss / (1 << 20):.0f} MiB resident" if peak else "",
    )
    return done


def _run_once(turn: Turn, place: Place, timeout_s: float) -> tuple[Timing, Peak | None]:
    command = turn.program.command(place)
    if turn.state == "watched":
        return run_watched(command, cwd=place.scratch, timeout_s=timeout_s)
    is_ours = turn.program.name == VUNIFY
    return run_timed(command, cwd=place.scratch, timeout_s=timeout_s, keep_output=is_ours), None


def _time_flush(place: Place) -> float:
    start = perf_counter()
    flush(place.pool.parent)
    return perf_counter() - start


def _are_kept(stage: Stage, place: Place) -> bool | None:
    if stage.prints is None:
        return None
    return fingerprints(place.trees) == stage.prints


def _said(output: bytes) -> dict[str, Any]:
    try:
        told = json.loads(output)
    except ValueError:
        return {}
    return {key: told[key] for key in _SAID_KEYS if key in told}
