"""Run one program and measure it: time in one run, memory in another, since looking costs time."""

import logging
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from resource import struct_rusage
from time import perf_counter, sleep
from typing import IO, Final

from bench.calls import BenchError

log = logging.getLogger(__name__)

_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_SAMPLE_EVERY_S: Final = 0.003
_PSS_EVERY: Final = 8
"""Proportional shares are dearer to read than resident pages: one sample of so many."""

TIMEOUT_EXIT: Final = 124

_ENVIRONMENT: Final = {
    name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
}
"""Without what would make every start of a Python program compile it again."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One run of a program; the times hold its children's too."""

    wall_s: float
    user_s: float
    system_s: float
    exit_code: int
    output: bytes
    """What it wrote on stdout, where that was asked for."""
    complaint: str
    """The end of what it wrote on stderr."""


@dataclass(frozen=True, slots=True)
class Peak:
    """The most memory that all processes of one run held at one moment, in bytes."""

    rss: int
    """Sum of the resident sets; pages that processes share count once for each."""
    pss: int
    """Sum of the proportional sets; a page that n processes share counts 1/n for each."""
    processes: int


def run_timed(command: Sequence[str], *, cwd: Path, timeout_s: float, keep_output: bool) -> Timing:
    """Run `command` to its end, or kill it after `timeout_s` (exit code 124)."""
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as complaint:
        start = perf_counter()
        process = subprocess.Popen(
            command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=said if keep_output else subprocess.DEVNULL,
            stderr=complaint,
            process_group=0,
            env=_ENVIRONMENT,
        )
        usage, is_late = _wait(process, timeout_s)
        wall_s = perf_counter() - start
        code = TIMEOUT_EXIT if is_late else process.returncode
        said.seek(0)
        return Timing(wall_s, usage.ru_utime, usage.ru_stime, code, said.read(), _tail(complaint))


def _wait(process: subprocess.Popen[bytes], timeout_s: float) -> tuple[struct_rusage, bool]:
    """Reap `process`; gives what it and its children used, and whether it had to be killed."""
    late = threading.Event()

    def stop() -> None:
        late.set()
        _kill_group(process)

    timer = threading.Timer(timeout_s, stop)
    timer.daemon = True
    timer.start()
    try:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    except BaseException:
        _kill_group(process)
        process.wait()
        raise
    finally:
        timer.cancel()
    return usage, late.is_set()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End the program with all that it started: its group has its number."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _tail(stream: IO[bytes]) -> str:
    stream.seek(0)
    return stream.read()[-400:].decode(errors="replace").strip()


def can_watch() -> bool:
    """Whether `run_watched` works here; says why where it does not."""
    try:
        with _own_cgroup():
            return True
    except BenchError as error:
        log.warning("%s", error)
        return False


def run_watched(command: Sequence[str], *, cwd: Path, timeout_s: float) -> tuple[Timing, Peak]:
    """Run `command` in a cgroup of its own and sample the memory of every process in it.

    Its times are those of a run that is being watched: no figure for a report.
    Raises BenchError when no version 2 hierarchy can be written.
    """
    with _own_cgroup() as group, _sampled(group) as peaks:
        enter = 'echo $$ >"$0/cgroup.procs" && exec "$@"'
        joined = ["sh", "-c", enter, os.fspath(group), *command]
        timing = run_timed(joined, cwd=cwd, timeout_s=timeout_s, keep_output=True)
    return timing, Peak(*(max(column) for column in zip(*peaks, strict=True)))


@contextmanager
def _own_cgroup() -> Iterator[Path]:
    group = _unified_hierarchy() / f"vserver-bench-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        raise BenchError(f"memory cannot be measured: {group.name}: {error.strerror}") from error
    try:
        yield group
    finally:
        _remove_cgroup(group)


def _remove_cgroup(group: Path) -> None:
    with suppress(
        OSError
    ):  # before Linux 5.14 there is no cgroup.kill, and all have ended by themselves
        (group / "cgroup.kill").write_text("1")
    for _ in range(50):
        with suppress(OSError):
            return group.rmdir()
        sleep(0.1)
    log.warning("the benchmark's cgroup could not be removed")


def _unified_hierarchy() -> Path:
    """Where the version 2 hierarchy is mounted, hybrid hosts too. See proc_pid_mountinfo(5)."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, source = line.partition(" - ")
        if source.startswith("cgroup2 "):
            return Path(fields.split()[4])
    raise BenchError("memory cannot be measured: no version 2 cgroup hierarchy is mounted")


@contextmanager
def _sampled(group: Path) -> Iterator[list[tuple[int, int, int]]]:
    """Collect (rss, pss, processes) of the group while the block runs."""
    samples = [(0, 0, 0)]
    done = threading.Event()

    def watch() -> None:
        turn = 0
        while not done.wait(_SAMPLE_EVERY_S):
            samples.append(_sample(group, with_pss=turn % _PSS_EVERY == 0))
            turn += 1

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def _sample(group: Path, *, with_pss: bool) -> tuple[int, int, int]:
    pids = (group / "cgroup.procs").read_text().split()
    rss = sum(_rss(pid) for pid in pids)
    pss = sum(_pss(pid) for pid in pids) if with_pss else 0
    return rss, pss, len(pids)


def _rss(pid: str) -> int:
    with suppress(OSError, IndexError):  # it has just ended
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    return 0


def _pss(pid: str) -> int:
    with suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0
