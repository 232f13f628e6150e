"""What copy-on-write links cost: the case `cow`.

One Debian guest does the same work in several places in turn: under `vserver` with all its files
shared and copied on write, in a plain chroot of a private copy (native), under systemd-nspawn on
that copy, and in a chroot on overlayfs. A script inside takes the times; each round has files of
its own to break and to delete. What takes longer is done by turns (bench/cowturns.py).
"""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from bench import cowmemory, cowturns, postgres
from bench.calls import BenchError, call
from bench.cowmemory import Memory
from bench.cowturns import PGBENCH, SQLITE, TAR, Turns
from bench.figures import Target, spread
from bench.report import (
    FORMAT,
    Machine,
    show_machine,
    show_mib,
    show_spread,
    show_targets,
    table,
)
from tests.fixtures import guests
from tests.fixtures.filesystems import mount_image, private_folder
from tests.fixtures.guestconfig import write_keys

log = logging.getLogger(__name__)

VSERVER: Final = "vserver"
NATIVE: Final = "chroot"
OVERLAY: Final = "overlayfs"
NSPAWN: Final = "systemd-nspawn"
PLACES: Final = (VSERVER, NATIVE, OVERLAY, NSPAWN)

_BIN: Final = Path(sys.executable).parent
_TIMEOUT_S: Final = 900.0
_MICRO: Final = ("read-open", "write-open", "create and unlink", "chmod")
_SHARED: Final = ("first write-open of a shared file", "unlink of a shared file")
_INSTALL: Final = "install 50 packages again"
_MICROSECONDS: Final = frozenset((*_MICRO, *_SHARED))

_SCRIPT: Final = r"""
import glob, json, os, subprocess, sys, time
loops, turn = map(int, sys.argv[1:3])
found = {}

def micro(name, act):
    best = 1e9
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(loops):
            act()
        best = min(best, (time.perf_counter() - began) / loops)
    found[name] = best

def once(name, act):
    began = time.perf_counter()
    act()
    found[name] = time.perf_counter() - began

def each(name, act, paths):
    began = time.perf_counter()
    for path in paths:
        act(path)
    found[name] = (time.perf_counter() - began) / max(1, len(paths))

def run(*argv):
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

run("rm", "-rf", "/srv/bench")
os.makedirs("/srv/bench")
own = "/srv/bench/own"
with open(own, "w") as file:
    file.write("own")
micro("read-open", lambda: os.close(os.open(own, os.O_RDONLY)))
micro("write-open", lambda: os.close(os.open(own, os.O_WRONLY)))
micro("chmod", lambda: os.chmod(own, 0o644))
new = "/srv/bench/new"
micro("create and unlink",
      lambda: (os.close(os.open(new, os.O_WRONLY | os.O_CREAT, 0o644)), os.unlink(new)))
docs = sorted(path for path in glob.glob("/usr/share/**/*", recursive=True)
              if os.path.isfile(path) and not os.path.islink(path) and os.stat(path).st_size > 99)
part = docs[turn * 400:turn * 400 + 400]
each("first write-open of a shared file",
     lambda path: os.close(os.open(path, os.O_WRONLY)), part[::2])
each("unlink of a shared file", os.unlink, part[1::2])
once("install 50 packages again", lambda: run("sh", "-c",
     "dpkg --force-confnew --force-unsafe-io -i /srv/packages/*.deb"))
run("rm", "-rf", "/srv/bench")
print(json.dumps(found))
"""


@dataclass(frozen=True, slots=True)
class Round:
    """One run of the script in one place; seconds by what was done."""

    place: str
    round: int
    seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Results:
    rounds: Sequence[Round]
    missing: Mapping[str, str]
    """What could not be had, and why: places, programs."""
    turns: Turns
    memory: Sequence[Memory] = ()


@dataclass(frozen=True, slots=True)
class Site:
    """Where everything is: `base` has the guests, which share files, `plain` a private copy."""

    folder: Path
    mount: Path

    @property
    def base(self) -> Path:
        return self.mount / "base"

    @property
    def plain(self) -> Path:
        return self.mount / "plain"

    @property
    def lower(self) -> Path:
        return self.mount / "lower"

    @property
    def booth(self) -> Path:
        """systemd-nspawn's."""
        return self.mount / "booth"

    @property
    def merged(self) -> Path:
        return self.mount / "merged"

    @property
    def environment(self) -> dict[str, str]:
        places = {"CONFDIR": self.folder / "conf", "VDIRBASE": self.base}
        places |= {"RUNDIR": self.folder / "run", "LOGDIR": self.folder / "log"}
        return {**os.environ, **{f"VSERVER_{key}": str(path) for key, path in places.items()}}


def measure(rounds: int, file_system: str, *, is_small: bool) -> Results:
    """Do everything in each place in turn. Raises BenchError."""
    made: list[Round] = []
    missing: dict[str, str] = {}
    loops, files = (500, 2_000) if is_small else (3_000, 20_000)
    with private_folder() as folder, _site(folder, file_system, files, missing) as site:
        for turn in range(rounds):
            for place in PLACES:
                if place in missing:
                    continue
                try:
                    seconds = _run(site, place, loops, turn)
                except (OSError, ValueError, BenchError) as error:
                    missing[place] = str(error)[-300:]
                    log.warning("%s: %s", place, error)
                else:
                    log.info("%s, round %d: done", place, turn + 1)
                    made.append(Round(place, turn + 1, seconds))
        if VSERVER in missing:
            raise BenchError(missing[VSERVER])
        commands = {place: _inside(site, place) for place in PLACES if place not in missing}
        turns = cowturns.measure(commands, site.environment, is_small=is_small)
    memory: list[Memory] = []
    if not is_small:
        with private_folder() as folder:
            folder.chmod(0o755)  # the servers are no longer root when they look for their files
            try:
                memory = cowmemory.measure(folder)
            except BenchError as error:
                missing["memory of further guests"] = str(error)[-300:]
    return Results(made, {**missing, **turns.missing}, turns, memory)


@contextmanager
def _site(folder: Path, file_system: str, files: int, missing: dict[str, str]) -> Iterator[Site]:
    site = Site(folder, mount_image(file_system, folder, size=16 << 30))
    for name in ("conf", "run", "log"):
        (folder / name).mkdir()
    site.base.mkdir()
    guests.unpack(guests.DB, site.lower)
    try:
        postgres.install(site.lower, guests.DB.release)
    except BenchError as error:
        missing["PostgreSQL"] = str(error)
    _add_work(site.lower, files)
    for root in (site.base / "web", site.base / "db", site.plain, site.booth):
        _command(site, "cp", "-a", "--reflink=never", site.lower, root)
    for name in ("upper", "work", "merged"):
        (site.mount / name).mkdir()
    for number, name in enumerate(("web", "db")):
        (folder / "conf" / name).mkdir()
        keys = {"vdir": site.base / name, "run": folder / "run" / name}
        sleep = "/bin/sleep\n100000"
        plain = {"context": str(4900 + number), "apps/init/cmd.start": sleep}
        write_keys(folder / "conf" / name, {**keys, **plain, "apps/init/style": "plain"})
    _command(site, "mount", "--bind", site.plain, site.plain)
    _command(site, "mount", "-t", "proc", "proc", site.plain / "proc")
    options = f"lowerdir={site.lower},upperdir={site.mount / 'upper'},workdir={site.mount / 'work'}"
    _command(site, "mount", "-t", "overlay", "-o", options, "overlay", site.merged)
    _command(site, "mount", "-t", "proc", "proc", site.merged / "proc")
    _command(site, _BIN / "vunify", "--all")
    _command(site, _BIN / "vserver", "web", "start")
    try:
        yield site
    finally:
        with suppress(BenchError):
            _command(site, _BIN / "vserver", "web", "stop")


def _add_work(root: Path, files: int) -> None:
    """What is unpacked and installed: the same in each tree."""
    packages = root / "srv/packages"
    packages.mkdir(parents=True)
    kept = guests.cache_folder() / "packages" / guests.DB.release
    installed = {path.name.split(".")[0] for path in (root / "var/lib/dpkg/info").glob("*.list")}
    installed = {name.partition(":")[0] for name in installed}
    newest = {path.name.partition("_")[0]: path for path in sorted(kept.glob("*.deb"))}
    for name in sorted(newest.keys() & installed)[:50]:
        shutil.copy2(newest[name], packages)
    with private_folder() as folder:
        tree = folder / "tree"
        for number in range(files):
            path = tree / f"{number % 100}" / f"{number}"
            if number < 100:
                path.parent.mkdir(parents=True)
            path.write_bytes(b"%d" % number * 100)
        subprocess.run(["tar", "-cf", root / "srv/files.tar", "-C", tree, "."], check=True)


def _command(site: Site, *argv: str | Path) -> str:
    return call(*argv, env=site.environment, timeout_s=_TIMEOUT_S)


def _inside(site: Site, place: str) -> list[str]:
    """What runs a program in that place."""
    nspawn = (NSPAWN, "-q", "--register=no", "--keep-unit", "--as-pid2", "--pipe")
    commands: dict[str, tuple[str | Path, ...]] = {
        VSERVER: (_BIN / "vserver", "web", "exec"),
        NATIVE: ("chroot", site.plain),
        OVERLAY: ("chroot", site.merged),
        NSPAWN: (*nspawn, "-D", site.booth),
    }
    return [os.fspath(word) for word in commands[place]]


def _run(site: Site, place: str, loops: int, turn: int) -> dict[str, float]:
    script = ("python3", "-c", _SCRIPT, str(loops), str(turn))
    said = _command(site, *_inside(site, place), *script)
    found: dict[str, float] = json.loads(said.splitlines()[-1])
    return found


# --- the report


@dataclass(frozen=True, slots=True)
class CowReport:
    day: str
    rounds: int
    machine: Machine
    results: Results
    targets: Sequence[Target]
    notes: str = ""


def targets(results: Results) -> list[Target]:
    """What was asked for, and what came out: medians, parts of the same round."""
    micro = 1e6
    own = spread(_all(results, VSERVER, "write-open"))
    return [
        Target("write-open of a private file", 25, own.middle * micro if own else None, "µs"),
        Target(
            "read-open, more than native",
            0.3,
            _compare(results, NATIVE, "read-open", lambda ours, theirs: (ours - theirs) * micro),
            "µs",
        ),
        Target("packages again, of overlayfs", 1.3, _part(results, OVERLAY, _INSTALL), "times"),
        *(
            Target(f"{what}, of native", most, _by_turns(results, what), "times")
            for what, most in ((TAR, 2), (SQLITE, 1.03), (PGBENCH, 1.03))
        ),
    ]


def _by_turns(results: Results, what: str) -> float | None:
    found = spread(results.turns.ratios(what, VSERVER, NATIVE))
    return found.middle if found else None


def _all(results: Results, place: str, what: str) -> list[float]:
    return [one.seconds[what] for one in results.rounds if one.place == place]


def _part(results: Results, peer: str, what: str) -> float | None:
    return _compare(results, peer, what, lambda ours, theirs: ours / theirs)


def _compare(
    results: Results, peer: str, what: str, how: Callable[[float, float], float]
) -> float | None:
    pairs = zip(_all(results, VSERVER, what), _all(results, peer, what), strict=False)
    found = spread([how(ours, theirs) for ours, theirs in pairs])
    return found.middle if found else None


def as_markdown(report: CowReport) -> str:
    """The report for a reader."""
    places = [place for place in PLACES if place not in report.results.missing]
    rows = []
    for what in (*_MICRO, *_SHARED, _INSTALL):
        is_micro = what in _MICROSECONDS
        figures = [
            _show(_all(report.results, place, what), 1e6 if is_micro else 1) for place in places
        ]
        rows.append([f"{what}, {'µs' if is_micro else 's'}", *figures])
    missing = [f"- {place}: {why}\n" for place, why in report.results.missing.items()]
    parts = [
        "# bench: cow\n",
        f"{report.rounds} rounds in turn, {report.day}. Figures are least / median / most.\n",
        "## Targets\n",
        show_targets(report.targets),
        "## Figures\n",
        table(["", *places], rows),
        "## By turns\n",
        "Milliseconds, and how many times as long as native: the middle of all rounds' ratios.\n",
        table(["", *places], _turn_rows(report.results, places)),
        *(
            ["## Memory of further guests\n", _memory(report.results.memory)]
            if report.results.memory
            else []
        ),
        *(["Could not be had:\n", "".join(missing)] if missing else []),
        "## Machine\n",
        show_machine(report.machine),
        *([f"## Notes\n\n{report.notes}"] if report.notes else []),
    ]
    return "\n".join(parts)


def _show(values: Sequence[float], scale: float) -> str:
    digits = 2 if scale == 1 else 1
    return show_spread(spread([value * scale for value in values]), digits=digits)


def _turn_rows(results: Results, places: Sequence[str]) -> list[list[str]]:
    rows = []
    for what in cowturns.JOBS:
        cells = []
        for place in places:
            ratio = spread(results.turns.ratios(what, place, NATIVE))
            times = f", {ratio.middle:.3f} times" if ratio and place != NATIVE else ""
            cells.append(_show(results.turns.all(what, place), 1e3) + times)
        rows.append([what, *cells])
    return rows


def _memory(memory: Sequence[Memory]) -> str:
    """Of the page cache and the processes, for the first guest and for each further one."""
    heads = ("page cache", "Pss of its processes", "Pss of its runtime")
    rows = []
    for one in memory:
        for which, held in (("the first", one.first), ("each further", one.further)):
            sizes = [show_mib(size) for size in (held.cache, held.pss, held.runtime)]
            rows.append([f"{one.state}, {which} of {one.guests} (MiB)", *sizes])
    return table(["", *heads], rows)


def write(report: CowReport, folder: Path, name: str) -> None:
    """Put NAME.md and NAME.json into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(as_markdown(report))
    facts = {"format": FORMAT, "case": "cow", **asdict(report)}
    facts["targets"] = [{**asdict(target), "is_met": target.is_met} for target in report.targets]
    (folder / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")
