"""How fast a guest gets to another machine, and what goes over the wire: the case `copy`.

`vserver-copy` beside `rsync` and `tar | zstd | ssh`, in turn, over the same wire, unlimited and at
100 Mbit/s. Every program copies the same trees to a place of its own on the other machine.
"""

import logging
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Final

from bench import channels
from bench.calls import BenchError, call
from bench.channels import Carried
from bench.figures import Spread, Target, spread
from bench.wires import THERE, Wire, joined
from tests.fixtures.filesystems import mount_image, remove
from tests.fixtures.guests import SMALL, WEB, Recipe, build, personalise, unpack
from tests.fixtures.sshd import remote_command

log = logging.getLogger(__name__)

OURS: Final = "vserver-copy"
RSYNC: Final = "rsync"
TAR: Final = "tar | zstd | ssh"
PROGRAMS: Final = (OURS, RSYNC, TAR)
RATES: Final = {"unlimited": "", "100 Mbit/s": "100mbit"}
FIRST, SIBLING, SAME, UPGRADE, DATABASE = (
    "first guest",
    "second sibling",
    "the same again",
    "after an upgrade",
    "changed database",
)
BYTES, OBJECTS, FAR = "bytes", "small objects", "bytes, 100 ms away, at 100 Mbit/s"
_BYTES_MIB: Final = 400
_OBJECTS: Final = 200_000
_FAR_MIB: Final = 40
_FAR_S: Final = 0.1  # there and back
_LINK_MB_PER_S: Final = 12.5
_PACKAGE: Final = {"small": "perl-base", "full": "perl-base"}
_DATABASE_BYTES: Final = {"small": 256 << 20, "full": 2 << 30}
_PAGE: Final = 16 << 10
_CHANGED_PART: Final = 0.01
_IMAGE_SIZE: Final = {"small": 6 << 30, "full": 24 << 30}
_TIMEOUT_S: Final = 1200.0


@dataclass(frozen=True, slots=True)
class Copy:
    """One copy by one program. Bytes as the wire's device counted them, both ways."""

    program: str
    rate: str
    scenario: str
    round: int
    wall_s: float
    flush_s: float  # how long writing took of what it left to be written
    wire_bytes: int


@dataclass(slots=True)
class Results:
    copies: list[Copy] = field(default_factory=list)
    guest_bytes: int = 0
    guest_files: int = 0
    carried: dict[str, Carried] = field(default_factory=dict)  # by the channel alone


def measure(*, size: str, rounds: int, work: Path) -> Results:
    """Run all programs in turn. Raises BenchError where one cannot."""
    results = Results()
    recipe = SMALL[0] if size == "small" else WEB
    build(recipe)
    for rate in RATES:
        for number in range(1, rounds + 1):
            with _machines(size, work) as wire:
                _Round(wire, recipe, size, rate, number, results).run()
                if number == rounds:
                    results.carried.update(_try_channel(wire, rate))
    return results


def _try_channel(wire: Wire, rate: str) -> dict[str, Carried]:
    """What the ssh channel carries by itself, at this rate of the wire."""
    wire.limit(RATES[rate])
    if RATES[rate]:
        return {FAR: channels.send_from(wire, mib=_FAR_MIB, delay_s=_FAR_S / 2)}
    return {
        BYTES: channels.send_from(wire, mib=_BYTES_MIB),
        OBJECTS: channels.send_from(wire, objects=_OBJECTS),
    }


@contextmanager
def _machines(size: str, work: Path) -> Iterator[Wire]:
    with TemporaryDirectory(prefix="vbench-", dir=work) as folder:
        mount = mount_image("xfs", Path(folder), size=_IMAGE_SIZE[size], options="noatime")
        try:
            with joined(mount) as wire:
                yield wire
        finally:
            remove(mount)


class _Round:
    """All scenarios once, each program after the other in each."""

    def __init__(
        self, wire: Wire, recipe: Recipe, size: str, rate: str, number: int, results: Results
    ) -> None:
        self._wire = wire
        self._recipe = recipe
        self._size = size
        self._rate = rate
        self._number = number
        self._results = results

    def run(self) -> None:
        for place, name in enumerate(("web1", "web2"), start=1):
            root = unpack(self._recipe, self._wire.here.root(name))
            personalise(root, name, place)
            self._wire.here.register(name, root)
        self._count(self._wire.here.root("web1"))
        self._wire.limit(RATES[self._rate])
        self._all(FIRST, "web1")
        self._all(SIBLING, "web2")
        self._all(SAME, "web2", is_refresh=True)
        _upgrade(self._wire.here.root("web2"), _PACKAGE[self._size])
        self._all(UPGRADE, "web2", is_refresh=True)
        data = self._wire.here.root("web2") / "var/lib/mysql/shop.ibd"
        _write_database(data, _DATABASE_BYTES[self._size])
        self._wire.limit("")
        self._all("", "web2", is_refresh=True)
        _change_database(data, self._number)
        self._wire.limit(RATES[self._rate])
        self._all(DATABASE, "web2", is_refresh=True)

    def _count(self, root: Path) -> None:
        found = [path.lstat() for path in root.rglob("*") if path.is_file()]
        self._results.guest_files = len(found)
        self._results.guest_bytes = sum(status.st_size for status in found)

    def _all(self, scenario: str, name: str, *, is_refresh: bool = False) -> None:
        """Every program; the order changes with the round. No scenario: it is not measured."""
        turn = self._number % len(PROGRAMS)
        for program in (*PROGRAMS[turn:], *PROGRAMS[:turn]):
            if program == TAR and (not scenario or scenario == DATABASE):
                continue  # it knows no second time
            command = _COMMANDS[program](self._wire, name, is_refresh)
            copy = self._once(program, scenario, command)
            if scenario:
                self._results.copies.append(copy)
                said = (copy.wall_s, copy.wire_bytes / 1e6, program, scenario, self._rate)
                log.info("%7.2f s %8.1f MB  %s: %s, %s", *said)

    def _once(self, program: str, scenario: str, command: Sequence[str]) -> Copy:
        mount = self._wire.here.filesystem.mount
        _sync(mount)
        before = self._wire.count_bytes()
        began = perf_counter()
        done = subprocess.run(
            command,
            env=self._wire.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT_S,
        )
        wall_s = perf_counter() - began
        if done.returncode:
            raise BenchError(f"{program} ended with {done.returncode}: {done.stderr[-500:]}")
        count = self._wire.count_bytes() - before
        began = perf_counter()
        _sync(mount)
        flush_s = perf_counter() - began
        return Copy(program, self._rate, scenario, self._number, wall_s, flush_s, count)


def _sync(mount: Path) -> None:
    subprocess.run(["sync", "--file-system", "--", mount], check=True)


def _our_command(wire: Wire, name: str, is_refresh: bool) -> list[str]:
    known = wire.server.folder / "known"
    wire.ssh()
    return wire.command(
        Path(sys.executable).parent / OURS,
        *("-q", "-F", os.devnull, "-i", wire.server.key, "--known-hosts", known),
        *("--remote-command", remote_command(wire.there)),
        *(["--refresh"] if is_refresh else []),
        name,
        f"root@{THERE}:{name}",
    )


def _rsync_command(wire: Wire, name: str, is_refresh: bool) -> list[str]:
    target = wire.there.filesystem.folder / "rsync" / name
    target.mkdir(parents=True, exist_ok=True)
    options = ["-aHAX", "--numeric-ids", "--sparse", *(["--delete"] if is_refresh else [])]
    return wire.command(
        RSYNC, *options, "-e", wire.ssh(), f"{wire.here.root(name)}/", f"root@{THERE}:{target}/"
    )


def _tar_command(wire: Wire, name: str, is_refresh: bool) -> list[str]:
    target = wire.there.filesystem.folder / "tar" / name
    target.mkdir(parents=True, exist_ok=True)
    tar = "tar --numeric-owner --xattrs --xattrs-include='*' --acls --sparse"
    pack = f"{tar} -C {wire.here.root(name)} -c . | zstd -q -T0"
    unpack_there = f"zstd -q -d | {tar} --unlink-first --recursive-unlink -C {target} -x"
    line = f'{pack} | {wire.ssh()} root@{THERE} "{unpack_there}"'
    return wire.command("bash", "-o", "pipefail", "-c", line)


_COMMANDS: Final[dict[str, Callable[[Wire, str, bool], list[str]]]] = {
    OURS: _our_command,
    RSYNC: _rsync_command,
    TAR: _tar_command,
}


# --- what happens to a guest between two copies


def _upgrade(root: Path, package: str) -> None:
    """Let the guest's own dpkg install the next version of a package, in which every file differs.

    There is no next version at hand: it is packed from what is installed.
    """
    described = call("chroot", root, "dpkg-query", "--status", package)
    version = re.search(r"^Version: (.*)$", described, re.MULTILINE)
    if version is None:
        raise BenchError(f"{root}: dpkg does not say which version {package} has")
    control = re.sub(r"^(Status|Conffiles):.*\n( .*\n)*", "", described, flags=re.MULTILINE)
    control = control.replace(version[0], f"{version[0]}+1")
    with TemporaryDirectory(prefix="upgrade-", dir=root) as folder:
        tree = Path(folder) / "tree"
        (tree / "DEBIAN").mkdir(parents=True)
        (tree / "DEBIAN/control").write_text(f"{control.rstrip()}\n")
        for line in call("chroot", root, "dpkg-query", "--listfiles", package).splitlines():
            _pack_next(root / line.lstrip("/"), tree / line.lstrip("/"))
        call("dpkg-deb", "--root-owner-group", "--build", "-Znone", tree, f"{folder}/next.deb")
        call("chroot", root, "dpkg", "--install", f"/{Path(folder).name}/next.deb")


def _pack_next(path: Path, packed: Path) -> None:
    """The next version of a file."""
    if path.is_symlink():
        packed.parent.mkdir(parents=True, exist_ok=True)
        packed.symlink_to(path.readlink())
    elif path.is_file():
        packed.parent.mkdir(parents=True, exist_ok=True)
        packed.write_bytes(path.read_bytes() + b"\n#\n")
        packed.chmod(path.stat().st_mode & 0o7777)


def _write_database(path: Path, size: int) -> None:
    """Pages that compress by half, as rows of a table do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    chance = random.Random(1)  # noqa: S311 - no secret
    with path.open("wb") as file:
        for _ in range(size // _PAGE):
            file.write(chance.randbytes(_PAGE // 2).ljust(_PAGE, b" "))


def _change_database(path: Path, seed: int) -> None:
    pages = path.stat().st_size // _PAGE
    chance = random.Random(seed)  # noqa: S311
    with path.open("r+b") as file:
        for page in chance.sample(range(pages), int(pages * _CHANGED_PART)):
            file.seek(page * _PAGE + 100)
            file.write(chance.randbytes(400))


# --- figures


def part_of(
    copies: Sequence[Copy], scenario: str, rate: str, value: Callable[[Copy], float]
) -> Spread | None:
    """Ours as a part of rsync's in the same round."""
    chosen = [copy for copy in copies if (copy.scenario, copy.rate) == (scenario, rate)]
    theirs = {copy.round: value(copy) for copy in chosen if copy.program == RSYNC}
    ours = [copy for copy in chosen if copy.program == OURS and theirs.get(copy.round)]
    return spread(value(copy) / theirs[copy.round] for copy in ours)


def wall_of(copy: Copy) -> float:
    return copy.wall_s


def bytes_of(copy: Copy) -> float:
    return copy.wire_bytes


_WANTED: Final = (
    (FIRST, "unlimited", wall_of, 1.0),
    (FIRST, "unlimited", bytes_of, 0.6),
    (SIBLING, "100 Mbit/s", bytes_of, 1 / 20),
    (SIBLING, "100 Mbit/s", wall_of, 1 / 5),
    (SAME, "unlimited", wall_of, 1.0),
    (DATABASE, "unlimited", bytes_of, 1.5),
    (DATABASE, "unlimited", wall_of, 1.0),
    (DATABASE, "100 Mbit/s", wall_of, 1.0),
)


def targets(results: Results) -> list[Target]:
    """What was asked for, against rsync in the same round."""
    found = []
    for scenario, rate, value, wanted in _WANTED:
        part = part_of(results.copies, scenario, rate, value)
        what = "time" if value is wall_of else "bytes on the wire"
        name = f"{scenario}, {rate}: {what}, as a part of rsync's"
        found.append(Target(name, wanted, part.middle if part else None, "x"))
    return [*found, *_channel_targets(results.carried)]


def _channel_targets(carried: Mapping[str, Carried]) -> list[Target]:
    raw, small, far = (carried.get(name) for name in (BYTES, OBJECTS, FAR))
    name = "the ssh channel alone"
    part = far.mb_per_s / _LINK_MB_PER_S if far else None
    return [
        Target(f"{name}: {BYTES}", 200, raw.mb_per_s if raw else None, "MB/s", at_most=False),
        Target(
            f"{name}: {OBJECTS}",
            20_000,
            small.objects_per_s if small else None,
            "/s",
            at_most=False,
        ),
        Target(f"{name}: {FAR}, as a part of the link", 0.8, part, "x", at_most=False),
    ]
