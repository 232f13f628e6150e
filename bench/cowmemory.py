"""Memory of many guests that run the same daemon: private trees, shared blocks, shared inodes.

The very same trees are measured in turn: as copies that share nothing, after `vunify --link
reflink`, and after `vunify`. Each time the image is mounted anew, so that nothing of it is in the
page cache, and the guests are started one by one, each with a server of its own that has answered.

    FOLDER/
    ├── conf/ run/ log/     of the guests m1 ... m20
    └── xfs.img, xfs/       their trees, from a small Debian guest with nginx
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Final

from bench.calls import BenchError, call
from bench.guestsite import family, held
from tests.fixtures import guests
from tests.fixtures.filesystems import mount_image
from tests.fixtures.guestconfig import write_keys

PRIVATE: Final = "private"
REFLINK: Final = "reflink"
UNIFIED: Final = "unified"
STATES: Final = (PRIVATE, REFLINK, UNIFIED)
"""In the order in which the trees can go through them."""

_DAEMON: Final = "/usr/sbin/nginx\n-g\ndaemon off;"
_SERVED: Final = "exec 3<>/dev/tcp/127.0.0.1/80; printf 'HEAD / HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3"
_FSTAB: Final = "none /proc proc defaults 0 0\nnone /tmp tmpfs size=16m,mode=1777 0 0\n"
_RECIPE: Final = guests.SMALL[0]
_BIN: Final = Path(sys.executable).parent
_IMAGE_SIZE: Final = 16 << 30
_TIMEOUT_S: Final = 600.0
_UP_S: Final = 60.0
_UNIFY: Final = {REFLINK: ("--link", "reflink"), UNIFIED: ()}
_FIRST_NUMBER: Final = 47_000 + os.getpid() % 100 * 20
"""Of a context."""


@dataclass(frozen=True, slots=True)
class Held:
    """What some guests hold together, in bytes."""

    cache: int
    """Pages of the guests' files that are in memory, each file counted once (fincore(1))."""
    pss: int
    """Proportional memory of the guests' own processes (smaps_rollup of proc(5))."""
    runtime: int
    """The same of what the guests are run by: their monitors and supervisors."""

    def minus(self, other: "Held") -> "Held":
        """What these hold more."""
        return Held(self.cache - other.cache, self.pss - other.pss, self.runtime - other.runtime)

    def part(self, count: int) -> "Held":
        """Each one's part where `count` hold this."""
        return Held(self.cache // count, self.pss // count, self.runtime // count)


@dataclass(frozen=True, slots=True)
class Memory:
    """One state of the trees, measured."""

    state: str
    guests: int
    first: Held
    """What the first guest took."""
    further: Held
    """What each further one took: the mean of all but the first."""
    protection: str
    """How shared files were protected, as the runtime's state says."""


def measure(folder: Path, *, count: int = 20) -> list[Memory]:
    """Start `count` guests (two or more) with the same web server, in each of STATES; stop them.

    `folder` is an empty one of the caller's own on a disk with some 5 GB to spare; what is made
    there stays for the caller to remove (immutable files too, mounted: `private_folder` does it).
    Takes some minutes. Raises BenchError where a guest does not start or a program is missing.
    """
    try:
        site = _Site(folder, count)
        site.make()
        return [site.measure(state) for state in STATES]
    except OSError as error:
        raise BenchError(f"memory of guests: {error}") from error


class _Site:
    """The guests and where they are."""

    def __init__(self, folder: Path, count: int) -> None:
        self._folder = folder
        self._mount = folder / "xfs"
        self._names = [f"m{number}" for number in range(1, count + 1)]

    @property
    def _base(self) -> Path:
        return self._mount / "base"

    def make(self) -> None:
        """Make the trees, which share nothing, and the guests' settings."""
        mount_image("xfs", self._folder, size=_IMAGE_SIZE)
        for name in ("conf", "run", "log"):
            (self._folder / name).mkdir()
        self._base.mkdir()
        first, *others = self._names
        guests.unpack(_RECIPE, self._base / first)
        for name in others:
            self._run("cp", "-a", "--reflink=never", self._base / first, self._base / name)
        for number, name in enumerate(self._names):
            (self._folder / "conf" / name).mkdir()
            keys = {"vdir": self._base / name, "run": self._folder / "run" / name}
            init = {"apps/init/style": "plain", "apps/init/cmd.start": _DAEMON, "fstab": _FSTAB}
            own = {"context": str(_FIRST_NUMBER + number), "spaces/net": ""}
            write_keys(self._folder / "conf" / name, {**keys, **init, **own})

    def measure(self, state: str) -> Memory:
        """Bring the trees into this state, start all guests on a cold cache, and look."""
        if state in _UNIFY:
            self._run(_BIN / "vunify", "--all", *_UNIFY[state])
        self._mount_again()
        files = self._list_files()
        with self._stopped_in_the_end():
            before = self._look(files)
            self._start(self._names[0])
            first = self._look(files)
            for name in self._names[1:]:
                self._start(name)
            last = self._look(files)
            protection = self._protection()
        others = len(self._names) - 1
        return Memory(
            state,
            len(self._names),
            first.minus(before),
            last.minus(first).part(others),
            protection,
        )

    @contextmanager
    def _stopped_in_the_end(self) -> Iterator[None]:
        """After the block no guest runs."""
        with ExitStack() as stack:
            for name in self._names:
                stack.callback(self._stop, name)
            yield

    def _stop(self, name: str) -> None:
        if (self._folder / "run" / name / "resources.json").exists():
            self._run(_BIN / "vserver", name, "stop")

    def _start(self, name: str) -> None:
        """Start a guest; its server has answered in the end."""
        self._run(_BIN / "vserver", name, "start")
        deadline = monotonic() + _UP_S
        while True:
            try:
                if "200 OK" in self._run(_BIN / "vserver", name, "exec", "bash", "-c", _SERVED):
                    return
            except BenchError as error:
                if monotonic() > deadline:
                    raise BenchError(f"{name}: its server does not answer: {error}") from error
            sleep(0.05)

    def _protection(self) -> str:
        text = (self._folder / "run" / self._names[0] / "state.json").read_text()
        found = re.search(r'"protection": *"([^"]*)"', text)
        return found[1] if found else ""

    # --- what is in memory

    def _look(self, files: Sequence[Path]) -> Held:
        inside, outside = set(), set()
        for name in self._names:
            state = self._folder / "run" / name / "state.json"
            if not state.exists():
                continue
            found = re.search(r'"init_pid": *(\d+)', state.read_text())
            if found is None:
                raise BenchError(f"{name}: no init in its state")
            init = int(found[1])
            inside |= set(family(init))
            outside |= set(family(_parent(init)))
        return Held(
            self._resident(files),
            sum(held(pid)[1] for pid in inside),
            sum(held(pid)[1] for pid in outside - inside),
        )

    def _resident(self, files: Sequence[Path]) -> int:
        """Bytes of these files that are in the page cache; the question brings none there."""
        words = ("fincore", "--bytes", "--raw", "--noheadings", "--output", "RES")
        names = b"".join(os.fsencode(path) + b"\0" for path in files)
        done = subprocess.run(
            ["xargs", "-0", *words], input=names, capture_output=True, check=False
        )
        if done.returncode:
            raise BenchError(f"fincore: {done.stderr[-200:].decode(errors='replace')}")
        return sum(map(int, done.stdout.split()))

    def _list_files(self) -> list[Path]:
        """One name of each regular file in the guests' trees that has bytes."""
        found: dict[int, Path] = {}
        for folder, _, names in os.walk(self._base):
            for name in names:
                path = Path(folder, name)
                status = path.lstat()
                if status.st_size and path.is_file() and not path.is_symlink():
                    found.setdefault(status.st_ino, path)
        return list(found.values())

    # --- programs

    def _mount_again(self) -> None:
        """Mount the image anew, and without the cache of the image's own file.

        A process that took a mount namespace meanwhile may have the old mount for a moment: as long
        xfs refuses a second one.
        """
        self._run("umount", self._mount)
        image = self._folder / "xfs.img"
        deadline = monotonic() + _UP_S
        while True:
            device = self._run("losetup", "--find", "--show", "--direct-io=on", image).strip()
            try:
                self._run("mount", "-t", "xfs", device, self._mount)
            except BenchError:
                if monotonic() > deadline:
                    raise
            else:
                return
            finally:
                self._run("losetup", "--detach", device)  # it goes with its last mount
            sleep(0.2)

    def _run(self, *argv: str | Path) -> str:
        return call(*argv, env=self._environment, timeout_s=_TIMEOUT_S)

    @property
    def _environment(self) -> dict[str, str]:
        names = {"CONFDIR": "conf", "RUNDIR": "run", "LOGDIR": "log"}
        places = {key: self._folder / name for key, name in names.items()}
        places["VDIRBASE"] = self._base
        return {**os.environ, **{f"VSERVER_{key}": os.fspath(path) for key, path in places.items()}}


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
