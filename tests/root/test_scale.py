"""A million files: time grows as they do, and memory does not."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Final

import pytest

from tests.fixtures.filesystems import Site
from tests.fixtures.probes import is_soak, need, on, scaled
from tests.fixtures.runs import Report, list_objects
from tests.fixtures.trees import EPOCH_NS
from tests.fixtures.windows import fork

pytestmark = [need("immutable", "lease"), on("xfs")]

_LIMIT_MB: Final = 300
_GUESTS: Final = 4
_FILES_A_FOLDER: Final = 500

Content = Callable[[int, int], bytes]
"""The content of the file of this number in the guest of this number."""


@dataclass(frozen=True, slots=True)
class Measured:
    report: Report
    cpu_s: float
    """Of all processes: what else this machine does at the time makes no difference to it."""
    peak_mb: float


def _grow(base: Path, count: int, content: Content) -> list[str | Path]:
    """Plain trees with `count` files in all below `base`, each grown by a process of its own.

    Returns the arguments of vunify for them and a pool of their own.
    """
    roots = [base / f"guest{number}" for number in range(_GUESTS)]
    growers = []
    for number, root in enumerate(roots):
        root.mkdir(parents=True)
        growers.append(fork(_filler(root, count, number, content)))
    assert [grower() for grower in growers] == [0] * _GUESTS
    subprocess.run(["sync", "--file-system", base], check=True)
    return ["--offline", "--pool", base / ".pool", *_as_options(roots)]


def _filler(root: Path, count: int, guest: int, content: Content) -> Callable[[], int]:
    return lambda: _fill(root, count // _GUESTS, guest, content)


def _as_options(roots: list[Path]) -> list[str | Path]:
    return [argument for root in roots for argument in ("--root", root)]


def _fill(root: Path, count: int, guest: int, content: Content) -> int:
    for start in range(0, count, _FILES_A_FOLDER):
        folder = root / f"{start // 50_000}" / f"{start}"
        folder.mkdir(parents=True)
        folder_fd = os.open(folder, os.O_RDONLY)
        for number in range(start, min(start + _FILES_A_FOLDER, count)):
            file_fd = os.open(str(number), os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=folder_fd)
            os.write(file_fd, content(guest, number))
            os.utime(file_fd, ns=(EPOCH_NS, EPOCH_NS))
            os.close(file_fd)
        os.close(folder_fd)
    return 0


def _measure(*arguments: str | Path) -> Measured:
    """Run vunify and add up the memory of all its processes as it goes."""
    before_s = _children_cpu_s()
    with subprocess.Popen(
        [Path(sys.executable).parent / "vunify", "--json", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        watch = _MemoryWatch(process.pid)
        with watch:
            output, errors = process.communicate()
    assert process.returncode == 0, errors
    return Measured(Report.parse(output), _children_cpu_s() - before_s, watch.peak_mb)


def _children_cpu_s() -> float:
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


class _MemoryWatch:
    """Looks at a process and its children ten times a second; shared pages count once for each of
    those that have them, divided among them (Pss of smaps_rollup, see proc(5)).
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._done = Event()
        self._thread = Thread(target=self._look)
        self.peak_mb = 0.0

    def __enter__(self) -> "_MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(0.1):
            total = sum(_memory_kb(pid) for pid in [self._pid, *_children(self._pid)])
            self.peak_mb = max(self.peak_mb, total / 1024)


def _children(pid: int) -> list[int]:
    try:
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except OSError:
        return []


def _memory_kb(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def _equal(guest: int, number: int) -> bytes:
    return b"the same in all of them ".ljust(1024, b".")


def _unique(guest: int, number: int) -> bytes:
    return b"%d of %d " % (number, guest) + b"." * (number % 1000 + 1000 * guest + 20)


def _one_size(guest: int, number: int) -> bytes:
    return b"%016d of %d " % (number, guest % 2) + b"." * 1000


_KINDS: Final[dict[str, Content]] = {"equal": _equal, "unique": _unique, "one size": _one_size}


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", _KINDS)
def test_many_files_take_little_memory_and_no_more_time_each(site: Site, kind: str) -> None:
    few, many = (100_000, 1_000_000) if is_soak() else (1_000, 8_000)
    each_s = {}
    for count in (few, many):
        arguments = _grow(site.vdirbase / str(count), count, _KINDS[kind])
        first = _measure(*arguments)
        assert first.report.seen == count
        assert first.report.unified == (0 if kind == "unique" else count)
        assert first.peak_mb <= _LIMIT_MB
        again = _measure(*arguments)
        assert again.report.unified == 0
        assert again.peak_mb <= _LIMIT_MB
        each_s[count] = first.cpu_s / count
    if is_soak():
        assert each_s[many] <= each_s[few] * 1.2


@pytest.mark.timeout(600)
def test_a_large_file_of_holes_is_shared_without_being_written_out(site: Site) -> None:
    size = scaled(2, 50) << 30
    roots = []
    for number in range(2):
        roots.append(site.vdirbase / f"guest{number}")
        roots[-1].mkdir()
        with (roots[-1] / "image").open("wb") as file:
            file.write(b"a boot sector")
            file.truncate(size)
            os.pwrite(file.fileno(), b"something in the middle", size // 2)
        os.utime(roots[-1] / "image", ns=(EPOCH_NS, EPOCH_NS))
    before = os.statvfs(site.vdirbase).f_bfree
    seen = _measure("--offline", "--pool", site.pool, *_as_options(roots))
    assert seen.report.unified == 2
    assert seen.peak_mb <= _LIMIT_MB
    assert (before - os.statvfs(site.vdirbase).f_bfree) * 4096 < 16 << 20
    assert len(list_objects(site.pool)) == 1
    assert (roots[0] / "image").stat().st_blocks * 512 < 1 << 20
