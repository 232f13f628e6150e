"""What a guest writes while it is unified is never lost, and never seen by another guest."""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Final

import pytest

from tests.conftest import Tool
from tests.fixtures import scribbler
from tests.fixtures.filesystems import Site, is_immutable
from tests.fixtures.hostile import mapped, store, writer
from tests.fixtures.probes import need, on, own_cgroup, scaled
from tests.fixtures.running import IDLE, hear, running
from tests.fixtures.runs import Report, find_faults, inodes, unify
from tests.fixtures.settled import Nursery
from tests.fixtures.trees import EPOCH_NS, MAY_DIFFER, File, Row, differences, snapshot

pytestmark = need("immutable", "lease")

_SAME = b"the very same content"


def _every_state() -> list[Row]:
    return [
        File(f"{kind}/{number}", content, mtime_ns=EPOCH_NS + number)
        for kind in scribbler.KINDS
        for number, content in enumerate(scribbler.states(kind))
    ]


@need("cgroup_freezer")
@pytest.mark.timeout(3600)
def test_no_write_of_a_running_guest_is_lost_over_many_rounds(
    site: Site, cgroup: Path, tool: Tool
) -> None:
    """Two guests write, two runs at a time unify each with a sibling of its own.

    24 runs or more on three file systems together; 200 on each in the long form.
    """
    program = Path(scribbler.__file__).read_text()
    pairs = (("web", "db"), ("mail", "news"))
    for writing, still in pairs:
        site.add_guest(writing)
        site.add_guest(still, _every_state())
    before = [snapshot(site.root(still)) for _, still in pairs]
    with (
        own_cgroup() as other,
        running(site, "web", cgroup, program, site.root("web")) as first,
        running(site, "mail", other, program, site.root("mail")) as second,
        ThreadPoolExecutor() as threads,
    ):
        assert [hear(process) for process in (first, second)] == ["ready", "ready"]
        began, rounds = monotonic(), 0
        while rounds < scaled(4, 100) or monotonic() - began < _LONG_ENOUGH_S:
            rounds += 1
            runs = [threads.submit(unify, tool, *pair, *_GREEDY) for pair in pairs]
            assert all(run.result().missing() == 0 for run in runs)
        reports = [_stop(process) for process in (first, second)]
    for report, (_, still), old in zip(reports, pairs, before, strict=True):
        assert report["faults"] == []
        assert report["writes"] > 50
        assert report["taken"] > 0
        ignoring = {*MAY_DIFFER, "mtime_ns"}
        assert differences(old, snapshot(site.root(still)), ignoring=ignoring) == []
    assert find_faults(site.pool) == []


_LONG_ENOUGH_S: Final = 6.0
"""So long a scribbler works that files have settled, are taken, and are missed by it again."""
_GREEDY: Final = ("--ignore-mtime", "--link-twins")


def _stop(process: subprocess.Popen[str]) -> dict[str, Any]:
    """End a scribbler; returns what it reports."""
    process.terminate()
    report: dict[str, Any] = json.loads(hear(process))
    return report


def _rewrite(path: Path) -> None:
    """Other content of the same size under the same mtime."""
    before = path.stat()
    path.write_bytes(path.read_bytes().swapcase())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def _replace(path: Path) -> None:
    """Another file of the same size and mtime takes its name."""
    other = path.with_name("other")
    other.write_bytes(path.read_bytes().swapcase())
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.rename(path)


def _replace_by_symlink(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


def _replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _replace_folder(path: Path) -> None:
    """The folder of the file is another one now, with files of the same names."""
    path.parent.rename(path.parent.with_name("moved"))
    path.parent.mkdir()
    path.write_bytes(_SAME.swapcase())


_CHANGES: Final[dict[str, Callable[[Path], object]]] = {
    "rewrite": _rewrite,
    "append": _append,
    "replace": _replace,
    "remove": Path.unlink,
    "symlink": _replace_by_symlink,
    "fifo": _replace_by_fifo,
    "folder": _replace_folder,
    "chmod": lambda path: path.chmod(0o600),
    "chown": lambda path: os.chown(path, 1, 1),
    "utime": lambda path: os.utime(path, ns=(0, 0)),
    "xattr": lambda path: os.setxattr(path, "user.key", b"value"),
    "link": lambda path: path.with_name("second").hardlink_to(path),
    "truncate": lambda path: os.truncate(path, 0),
}
"""What a guest may do to a file between the time it is read and the time its name is replaced."""


_ROWS: Final = [
    File(f"{name}/file", name.encode().ljust(50, b"."), mode=0o640) for name in (*_CHANGES, "still")
]
_TO_CHANGE: Final = Nursery({"web": _ROWS, "db": _ROWS}, sets=1)


def _is_waited_for(path: Path) -> bool:
    """Whether somebody waits for a flock on the file, as /proc/locks tells."""
    status = path.stat()
    number = f" {os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino} "
    lines = Path("/proc/locks").read_text().splitlines()
    return any(number in line for line in lines if " -> FLOCK" in line)


@need("cgroup_freezer")
@on("ext4")
def test_what_changed_after_it_was_read_is_left_as_it_is(
    site: Site, cgroup: Path, tool: Tool
) -> None:
    """The run is held up where it would freeze the guest: it has read all and linked nothing."""
    guests = _TO_CHANGE.add_guests(site)
    vunify = (Path(sys.executable).parent / "vunify", "web", "db", "--json")
    with (
        running(site, "web", cgroup, IDLE),
        (cgroup / "cgroup.freeze").open() as lock,
        subprocess.Popen(vunify, stdout=subprocess.PIPE, text=True) as run,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        deadline = monotonic() + 60
        while not _is_waited_for(cgroup / "cgroup.freeze"):
            assert monotonic() < deadline
            sleep(0.005)
        for name, change in _CHANGES.items():
            change(guests[0] / name / "file")
        changed = [snapshot(root) for root in guests]
        fcntl.flock(lock, fcntl.LOCK_UN)
        report = Report.parse(run.communicate(timeout=100)[0])
    assert [differences(*pair) for pair in zip(changed, map(snapshot, guests), strict=True)] == [
        [],
        [],
    ]
    assert report.errors == []
    assert report.skipped == {"changed": len(_CHANGES)}
    assert len(set(inodes(site, "still/file", "web", "db"))) == 1
    shared = {path.parent.name for path in guests[0].glob("*/file") if path.stat().st_nlink > 2}
    assert shared == {"still"}
    assert find_faults(site.pool) == []


def test_a_file_open_for_writing_is_left_alone(site: Site, tool: Tool) -> None:
    guests = [site.add_guest(name, [File("log", _SAME)]) for name in ("web", "db", "mail")]
    with writer(guests[0] / "log"):
        report = unify(tool)
        assert report.skipped == {"busy": 1}
        assert report.unified == 2
        assert not is_immutable(guests[0] / "log")
    assert unify(tool).unified == 1
    assert len(set(inodes(site, "log", "web", "db", "mail"))) == 1


def test_a_file_mapped_for_writing_is_left_alone(site: Site, tool: Tool) -> None:
    guests = [site.add_guest(name, [File("data", _SAME * 9)]) for name in ("web", "db", "mail")]
    before = snapshot(guests[1])
    with mapped(guests[0] / "data") as process:
        assert unify(tool).skipped == {"busy": 1}
        store(process, "changed")
    assert (guests[0] / "data").read_bytes().startswith(b"changed")
    assert differences(before, snapshot(guests[1])) == []
    assert unify(tool).unified == 0
    assert find_faults(site.pool) == []


@on("ext4")
def test_all_being_busy_makes_no_object(site: Site, tool: Tool) -> None:
    guests = [site.add_guest(name, [File("log", _SAME)]) for name in ("web", "db")]
    with writer(guests[0] / "log"), writer(guests[1] / "log"):
        report = unify(tool)
    assert (report.unified, report.new, report.skipped) == (0, 0, {"busy": 2})
    assert not any(is_immutable(root / "log") for root in guests)


@on("ext4")
def test_one_of_two_being_busy_makes_no_object(site: Site, tool: Tool) -> None:
    guests = [site.add_guest(name, [File("log", _SAME)]) for name in ("web", "db")]
    with writer(guests[0] / "log"):
        report = unify(tool)
    assert (report.unified, report.new) == (0, 0)
    assert report.skipped == {"busy": 1, "unique": 1}
    assert not any(is_immutable(root / "log") for root in guests)


@on("ext4")
def test_a_reader_in_a_guest_makes_nothing_busy_and_keeps_its_file(site: Site, tool: Tool) -> None:
    guests = [site.add_guest(name, [File("data", _SAME)]) for name in ("web", "db")]
    files = [(root / "data").open("rb") for root in guests]
    assert unify(tool).unified == 2
    assert [file.read() for file in files] == [_SAME, _SAME]
    for file in files:
        file.close()
