"""Disk use against the number of guests: one more real guest at a time, unified as it comes.

Two releases in turn, each guest made different as real ones are (datasets.py). What the guests
would take up as private trees is what their own blocks say before they are unified; what they take
up is what statvfs says of the file system, pool folders and index included.
"""

import json
import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from bench import datasets
from bench.calls import BenchError
from bench.datasets import Herd
from bench.figures import MIB
from bench.images import free_bytes, new_image
from bench.ledger import allocated
from bench.measure import run_timed
from bench.report import FORMAT, Machine, show_machine, table
from bench.rivals import VUNIFY, find_program
from tests.fixtures.guests import SMALL

log = logging.getLogger(__name__)

_GUESTS: Final = {"full": 20, "small": 4}
_SIZE: Final = 24 << 30
_INODES: Final = 600_000
_KINDS: Final = tuple(recipe for recipe in SMALL if recipe.role == "small-web")
_TIMEOUT_S: Final = 1800.0


@dataclass(frozen=True, slots=True)
class Growth:
    """So many guests on one file system; bytes."""

    guests: int
    private: int
    """What they would take up if nothing were shared."""
    unified: int
    """What they take up."""


@dataclass(frozen=True, slots=True)
class GrowthReport:
    day: str
    size: str
    machine: Machine
    steps: Sequence[Growth]
    notes: str = ""


def measure(size: str, file_system: str, work: Path) -> list[Growth]:
    """Add guest after guest to a fresh image below `work`. Raises BenchError."""
    herds = [Herd(recipe, 1) for recipe in _KINDS]
    corpus = [herds[number % len(herds)] for number in range(_GUESTS[size])]
    datasets.prepare(herds)
    steps: list[Growth] = []
    with (
        tempfile.TemporaryDirectory(prefix="bench-", dir=work) as folder,
        new_image(Path(folder), file_system, size=_SIZE, inodes=_INODES) as (image, root),
    ):
        os.close(image.fd)
        empty = free_bytes(root)
        private, trees = 0, []
        for tree in datasets.lay_out_one_by_one(corpus, root):
            trees.append(tree)
            private += allocated([tree])
            _unify(trees, root / ".pool", Path(folder))
            steps.append(Growth(len(trees), private, empty - free_bytes(root)))
            log.info("%d guests: %d MiB, private %d", *_in_mib(steps[-1]))
    return steps


def _in_mib(step: Growth) -> tuple[int, int, int]:
    return step.guests, step.unified // MIB, step.private // MIB


def _unify(trees: Sequence[Path], pool: Path, scratch: Path) -> None:
    """As an administrator does it: the default exclude list keeps private what it names."""
    vunify = find_program(VUNIFY).find()
    if vunify is None:
        raise BenchError("vunify is not installed beside this interpreter")
    roots = [word for tree in trees for word in ("--root", os.fspath(tree))]
    command = [vunify, "--offline", "--quiet", "--pool", os.fspath(pool), *roots]
    done = run_timed(command, cwd=scratch, timeout_s=_TIMEOUT_S, keep_output=False)
    if done.exit_code:
        raise BenchError(f"vunify failed over {len(trees)} guests: {done.complaint}")


def part_of_further(steps: Sequence[Growth]) -> float:
    """What a guest of a kind that is there takes up, as a part of a private one."""
    first, last = steps[len(_KINDS) - 1], steps[-1]
    return (last.unified - first.unified) / (last.private - first.private)


def write(report: GrowthReport, folder: Path, name: str) -> None:
    """Write NAME.json and NAME.md into `folder`."""
    part = part_of_further(report.steps)
    facts = {"format": FORMAT, "case": "growth", **asdict(report), "part_of_further": part}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")
    rows = [
        [f"{step.guests}", f"{step.private / MIB:,.0f}", f"{step.unified / MIB:,.0f}"]
        for step in report.steps
    ]
    parts = [
        "# bench: growth\n",
        f"Size `{report.size}`, {report.day}. MiB on disk by number of guests, of two releases in "
        f"turn. A further guest takes {part:.3f} of what a private one takes.\n",
        "## Figures\n",
        table(["guests", "private", "unified"], rows),
        "## Machine\n",
        show_machine(report.machine),
        *([report.notes] if report.notes else []),
    ]
    (folder / f"{name}.md").write_text("\n".join(parts))
