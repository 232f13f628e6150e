"""A place for guests that are started to measure it: a tree of busybox, and what starts it.

The guest's init writes a byte to the FIFO /mark as the first thing it does.
"""

import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Final

from bench.calls import BenchError
from tests.fixtures.vservers import grow_busybox

ONCE: Final = "echo >/mark"
STAYS: Final = "echo >/mark; trap 'exit 0' HUP INT TERM; sleep 1000 & wait"
TIMEOUT_S: Final = 30.0
_ENVIRONMENT: Final = {
    name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
}


@dataclass(frozen=True, slots=True)
class Site:
    """Where the guest is, and what the programs keep of it."""

    folder: Path

    @property
    def root(self) -> Path:
        return self.folder / "base" / "bench"

    @property
    def environment(self) -> dict[str, str]:
        names = {"CONFDIR": "conf", "VDIRBASE": "base", "RUNDIR": "run", "LOGDIR": "log"}
        ours = {f"VSERVER_{key}": os.fspath(self.folder / name) for key, name in names.items()}
        return {**_ENVIRONMENT, **ours}


@contextmanager
def make_site(work: Path) -> Iterator[Site]:
    """A place with one guest of busybox below `work`, which needs a mount namespace of our own.

    RUNDIR is in memory, as /run is.
    """
    with tempfile.TemporaryDirectory(prefix="bench-start-", dir=work) as folder:
        site = Site(Path(folder))
        site.folder.chmod(0o755)
        for name in ("conf", "base", "run", "log", "lxc"):
            (site.folder / name).mkdir()
        grow_busybox(site.root)
        (site.root / "sys").mkdir(exist_ok=True)
        os.mkfifo(site.root / "mark")
        run = site.folder / "run"
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0755", "none", run], check=True)
        try:
            yield site
        finally:
            subprocess.run(["umount", "--lazy", run], check=True)


def program(name: str) -> str:
    """The path of one of our own commands."""
    return os.fspath(Path(sys.executable).parent / name)


def configure(site: Site, name: str, root: Path, init: str) -> None:
    """A guest of `vserver` that runs this line of a shell as its init."""
    keys = site.folder / "conf" / name / "apps/init"
    keys.mkdir(parents=True, exist_ok=True)
    (keys / "style").write_text("plain\n")
    (keys / "cmd.start").write_text(f"/bin/sh\n-c\n{init}\n")
    vdir = site.folder / "conf" / name / "vdir"
    if not vdir.is_symlink():
        vdir.symlink_to(root)


def held(pid: int) -> tuple[int, int]:
    """Private and proportional bytes; see proc_pid_smaps(5)."""
    private = pss = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, size, *_ = line.split()
        private += int(size) * 1024 if name.startswith("Private_") else 0
        pss += int(size) * 1024 if name == "Pss:" else 0
    return private, pss


def family(pid: int) -> list[int]:
    """The process and all below it."""
    found, waiting = [], [pid]
    while waiting:
        one = waiting.pop()
        found.append(one)
        for path in Path(f"/proc/{one}/task").glob("*/children"):
            with suppress(OSError):
                waiting += map(int, path.read_text().split())
    return found


@contextmanager
def mark(site: Site) -> Iterator[int]:
    """A descriptor of the FIFO in which guests leave their mark."""
    fd = os.open(site.root / "mark", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def running(command: Sequence[str], site: Site) -> Iterator["subprocess.Popen[bytes]"]:
    """A command that runs as long as the block; what it says goes into a BenchError."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command,
            cwd="/",
            env=site.environment,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
        )
        try:
            yield process
        except BenchError as error:
            said.seek(0)
            text = said.read()[-300:].decode(errors="replace").strip()
            raise BenchError(f"{error}: {text}") from error
        finally:
            if process.poll() is None:
                for pid in reversed(family(process.pid)):  # a guest of it would stay
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.wait()


def await_marks(mark_fd: int, process: "subprocess.Popen[bytes]", count: int = 1) -> None:
    """Wait until the inits of so many guests have begun. Raises BenchError if they do not."""
    deadline = perf_counter() + TIMEOUT_S
    poller = select.poll()
    poller.register(mark_fd, select.POLLIN)
    while count > 0:
        if poller.poll(50):
            count -= len(os.read(mark_fd, count))
        elif process.poll() is not None and not poller.poll(0):
            raise BenchError(f"ended with {process.returncode} without a guest")
        if perf_counter() > deadline:
            raise BenchError("its init did nothing")


def check(process: "subprocess.Popen[bytes]") -> None:
    """Wait until it has ended; raises BenchError if not well."""
    try:
        code = process.wait(TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise BenchError("has not ended") from None
    if code:
        raise BenchError(f"ended with {code}")
