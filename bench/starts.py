"""How fast a guest starts, beside other programs that start one: the case `start`.

All start the same tree of busybox in turn. Its init writes a byte to a FIFO as the first thing it
does: from the command to that byte is the time to the first instruction (of a shell, for all). A
whole cycle ends when nothing is left: for `vserver` it is the commands `start` and `stop`, for the
others, which stay in the foreground, one command whose init ends by itself.
"""

import json
import logging
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Final

from bench import bulk
from bench.bulk import Bulk
from bench.calls import BenchError
from bench.figures import MIB, Spread, Target, spread
from bench.guestsite import (
    ONCE,
    STAYS,
    TIMEOUT_S,
    Site,
    await_marks,
    check,
    configure,
    family,
    held,
    make_site,
    mark,
    program,
    running,
)
from bench.report import Listed

log = logging.getLogger(__name__)

VSERVER: Final = "vserver"
NSPAWN: Final = "systemd-nspawn"
MEMORY_LIMIT_MIB: Final = 12


@dataclass(frozen=True, slots=True)
class Starter:
    """One program of the comparison."""

    name: str
    shown: str
    """The command as a report shows it."""
    command: Callable[[Site, str], list[str]]
    """What starts the guest with this line of a shell as its init."""
    package: str
    end: Callable[[Site], list[str]] | None = None
    """What stops it, for a program that does not stay in the foreground."""

    def find(self) -> str | None:
        """The path of the program; None where it is not installed."""
        if self.name == VSERVER:
            return program(VSERVER)
        return shutil.which(self.name)

    def list(self) -> Listed:
        found = self.find()
        version = None
        if found:
            asked = subprocess.run(
                [found, "--version"], capture_output=True, text=True, check=False, timeout=30
            )
            version = next(iter(asked.stdout.splitlines()), None)
        return Listed(self.name, self.shown, version, self.package, is_missing=found is None)


@dataclass(frozen=True, slots=True)
class Start:
    """One guest that was started and ended."""

    program: str
    round: int
    first_s: float
    """From the command to the first instruction of its init."""
    started_s: float
    """To the end of that command; the others' is only over with the guest."""
    cycle_s: float
    """To the end of the last command."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What the processes hold outside a guest that runs, in bytes."""

    program: str
    round: int
    processes: int
    private: int
    """Of pages that no other process has."""
    pss: int
    """Shared pages count by their part."""


@dataclass(frozen=True, slots=True)
class Results:
    starts: list[Start]
    memory: list[Memory]
    refused: dict[str, str]
    """Programs that are installed and could not start it, and what they said."""
    bulks: list[Bulk]


# --- the programs


def _vserver(site: Site, init: str) -> list[str]:
    configure(site, "bench", site.root, init)
    return [program(VSERVER), "bench", "start"]


def _end_vserver(_: Site) -> list[str]:
    return [program(VSERVER), "bench", "stop"]


def _nspawn(site: Site, init: str) -> list[str]:
    options = ["--quiet", "--register=no", "--keep-unit", "--link-journal=no", "--console=pipe"]
    return [NSPAWN, *options, f"--directory={site.root}", "/bin/sh", "-c", init]


def _runc(site: Site, init: str) -> list[str]:
    bundle = site.folder / "bundle"
    if not bundle.exists():
        bundle.mkdir()
        subprocess.run(["runc", "spec", "--bundle", bundle], check=True)
    spec = json.loads((bundle / "config.json").read_text())
    spec["process"] |= {"terminal": False, "args": ["/bin/sh", "-c", init]}
    spec["root"] = {"path": os.fspath(site.root), "readonly": False}
    spaces = spec["linux"]["namespaces"]  # the host's network, as the others
    spec["linux"]["namespaces"] = [space for space in spaces if space["type"] != "network"]
    (bundle / "config.json").write_text(json.dumps(spec))
    root = os.fspath(site.folder / "runc")
    return ["runc", "--root", root, "run", "--bundle", os.fspath(bundle), "bench"]


def _lxc(site: Site, init: str) -> list[str]:
    script = site.root / "init.sh"
    script.write_text(f"#!/bin/sh\n{init}\n")
    script.chmod(0o755)
    config = site.folder / "lxc.conf"
    config.write_text(
        f"lxc.rootfs.path = dir:{site.root}\nlxc.uts.name = bench\nlxc.net.0.type = none\n"
        "lxc.mount.auto = proc sys\nlxc.init.cmd = /init.sh\nlxc.apparmor.profile = unconfined\n"
    )
    paths = ["--lxcpath", os.fspath(site.folder / "lxc"), "--rcfile", os.fspath(config)]
    return ["lxc-start", "--foreground", "--name", "bench", *paths]


def _bwrap(site: Site, init: str) -> list[str]:
    spaces = [f"--unshare-{kind}" for kind in ("pid", "uts", "ipc", "cgroup")]
    mounts = ["--bind", os.fspath(site.root), "/", "--proc", "/proc", "--dev", "/dev"]
    return ["bwrap", *spaces, *mounts, "--as-pid-1", "/bin/sh", "-c", init]


STARTERS: Final = (
    Starter(
        VSERVER,
        "vserver NAME start; vserver NAME stop",
        _vserver,
        "vserver-tools",
        _end_vserver,
    ),
    Starter(
        NSPAWN,
        "systemd-nspawn --quiet --register=no --keep-unit --console=pipe --directory=ROOT INIT",
        _nspawn,
        "systemd-container",
    ),
    Starter("runc", "runc run --bundle BUNDLE NAME", _runc, "runc"),
    Starter("lxc-start", "lxc-start --foreground --rcfile FILE --name NAME", _lxc, "lxc"),
    Starter(
        "bwrap",
        "bwrap --unshare-{pid,uts,ipc,cgroup} --bind ROOT / --proc /proc --dev /dev "
        "--as-pid-1 INIT",
        _bwrap,
        "bubblewrap",
    ),
)


# --- measuring


def measure(starters: Sequence[Starter], rounds: int, work: Path) -> Results:
    """Rounds in turn, each in another order than the one before; the first fills the caches."""
    results = Results([], [], {}, [])
    with make_site(work) as site:
        names = bulk.prepare(site) if any(one.name == VSERVER for one in starters) else []
        try:
            for number in range(rounds + 1):
                turn = number % len(starters)
                for starter in [*starters[turn:], *starters[:turn]]:
                    if starter.name not in results.refused:
                        _measure_one(starter, site, number, results)
                if names:
                    _measure_many(site, names, number, results)
        finally:  # however it ends, no guest runs afterwards
            command = [program("vservers"), "stop", "--all"]
            subprocess.run(command, env=site.environment, capture_output=True, check=False)
    return results


def _measure_one(starter: Starter, site: Site, number: int, results: Results) -> None:
    try:
        start = _start_once(starter, site, number)
        if number:
            results.memory.append(_weigh(starter, site, number))
    except BenchError as error:
        log.warning("%s: %s", starter.name, error)
        results.refused[starter.name] = str(error)
        return
    if number:
        results.starts.append(start)
        log.info(
            "%s, round %d: %.1f ms to the first instruction, %.1f ms in all",
            *(starter.name, number, start.first_s * 1000, start.cycle_s * 1000),
        )


def _measure_many(site: Site, names: Sequence[str], number: int, results: Results) -> None:
    made = bulk.measure_once(site, names, number)
    if number:
        results.bulks.append(made)
        log.info(
            "%d guests, round %d: %.0f ms to the last one's first instruction",
            *(made.guests, number, made.first_s * 1000),
        )


def _start_once(starter: Starter, site: Site, number: int) -> Start:
    # An init that ends at once is what the others show best; ours is asked to stop.
    command = starter.command(site, STAYS if starter.end else ONCE)
    with mark(site) as mark_fd:
        began = perf_counter()
        with running(command, site) as process:
            await_marks(mark_fd, process)
            first_s = perf_counter() - began
            check(process)
            started_s = perf_counter() - began
            if starter.end:
                with running(starter.end(site), site) as stopping:
                    check(stopping)
        return Start(starter.name, number, first_s, started_s, perf_counter() - began)


def _weigh(starter: Starter, site: Site, number: int) -> Memory:
    """What holds a guest up that runs: its monitor, or the program in the foreground."""
    command = starter.command(site, STAYS)
    with mark(site) as mark_fd, running(command, site) as process:
        await_marks(mark_fd, process)
        if starter.end:
            check(process)
            state = json.loads((site.folder / "run/bench/state.json").read_text())
            status = Path(f"/proc/{state['init_pid']}/status").read_text()
            outside = [int(status.partition("PPid:")[2].split()[0])]
        else:
            outside = [pid for pid in family(process.pid) if _depth(pid) == 1]
        time.sleep(0.2)  # what it does after the start
        sizes = [held(pid) for pid in outside]
        private, pss = sum(one[0] for one in sizes), sum(one[1] for one in sizes)
        if starter.end:
            with running(starter.end(site), site) as stopping:
                check(stopping)
        else:
            for pid in family(process.pid):
                if _depth(pid) > 1:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            process.wait(TIMEOUT_S)
    return Memory(starter.name, number, len(outside), private, pss)


def _depth(pid: int) -> int:
    """In how many pid namespaces it has a number: 1 is only the host's; 0 where it is gone."""
    with suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text()
        return len(status.partition("NSpid:")[2].partition("\n")[0].split())
    return 0


# --- figures


def part_of(starts: Sequence[Start], peer: str, value: Callable[[Start], float]) -> Spread | None:
    """Our time as a part of the peer's in the same round."""
    theirs = {start.round: value(start) for start in starts if start.program == peer}
    ours = [start for start in starts if start.program == VSERVER and start.round in theirs]
    return spread(value(start) / theirs[start.round] for start in ours)


def part_of_many(results: Results, value: Callable[[Bulk], float]) -> Spread | None:
    """The time of all as a part of so many times systemd-nspawn's first instruction, by rounds."""
    theirs = {start.round: start.first_s for start in results.starts if start.program == NSPAWN}
    return spread(
        value(one) / (one.guests * theirs[one.round])
        for one in results.bulks
        if one.round in theirs
    )


def first_of(start: Start) -> float:
    return start.first_s


def started_of(start: Start) -> float:
    return start.started_s


def cycle_of(start: Start) -> float:
    return start.cycle_s


def targets(results: Results) -> list[Target]:
    """What was asked for."""
    first = part_of(results.starts, NSPAWN, first_of)
    cycle = part_of(results.starts, NSPAWN, cycle_of)
    many = part_of_many(results, lambda one: one.first_s)
    private = spread(one.private / MIB for one in results.memory if one.program == VSERVER)
    return [
        Target(
            "first instruction, as a part of systemd-nspawn's",
            1,
            first.middle if first else None,
            "x",
        ),
        Target(
            "whole cycle, as a part of systemd-nspawn's", 1, cycle.middle if cycle else None, "x"
        ),
        Target(
            "memory of the monitor that is its own",
            MEMORY_LIMIT_MIB,
            private.middle if private else None,
            "MiB",
        ),
        Target(
            "first instruction of the last of 50 guests by one command, as a part of 50 x "
            "systemd-nspawn's",
            0.5,
            many.middle if many else None,
            "x",
        ),
    ]
