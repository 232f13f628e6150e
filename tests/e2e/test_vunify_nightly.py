"""`vunify` of a guest that works on: not one error, lost write, or pause that it would notice."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Final

import pytest

from tests.conftest import Tool
from tests.fixtures import labour
from tests.fixtures.filesystems import KINDS, Filesystem, copy_tree, is_immutable, thaw_below
from tests.fixtures.labour import STOP, USED, Labour, content, file_of
from tests.fixtures.probes import is_soak, need, on, scaled
from tests.fixtures.runs import SETTLED_S, Report, find_faults
from tests.fixtures.vservers import SLEEPER, Host, host_for_guests

pytestmark = [need("root", "immutable", "lease", "cgroup_freezer"), pytest.mark.timeout(1200)]

_NAMES: Final = scaled(1_500, 45_000)
_LONGEST_S: Final = 0.05
_TRIES: Final = 5
_BUSIER: Final = 1.5
"""`vunify` wants a core as any program does: so much longer may the pauses of a busy machine be."""
_YEAR_2001: Final = 1_000_000_000
_FSTAB: Final = "none /proc proc defaults 0 0\n/usr /usr none bind,ro 0 0\n"
"""The guest's Python is the machine's."""
_LIBRARIES: Final = ("lib", "lib32", "lib64", "libx32")


@pytest.fixture
def host(fs: Filesystem, monkeypatch: pytest.MonkeyPatch, tool: Tool) -> Iterator[Host]:
    """`db` and `mail` share all their files; `web`, which runs, has the same ones for itself."""
    for host in host_for_guests(fs.folder, monkeypatch):
        first = host.add_busybox("db", {**SLEEPER, "fstab": _FSTAB})
        for name in _LIBRARIES:
            if Path(f"/{name}").is_symlink():
                (first / name).symlink_to(Path(f"/{name}").readlink())
        _grow(first / "srv/0", _NAMES)
        for name in ("mail", "web"):
            copy_tree(first, _root(host, name))
            host.add(name, _root(host, name), {**SLEEPER, "fstab": _FSTAB})
        with _elsewhere(_root(host, "web") / "srv", fs.folder / "srv"):
            assert _unify(tool).unified > 2 * _NAMES
        _come_to_rest(_root(host, "web") / "srv/0")
        (_root(host, "web") / "labour.py").write_text(Path(labour.__file__).read_text())
        host.vserver("web", "start")
        assert host.state("web")["protection"] == "copy-on-write"
        sleep(SETTLED_S)
        yield host
        for name in host.names:
            host.try_vserver(name, "stop")
        thaw_below(fs.folder)


def _root(host: Host, name: str) -> Path:
    return host.etc.vdirbase / name


def _grow(folder: Path, count: int) -> None:
    for number in range(count):
        path = file_of(folder, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(number))
        os.utime(path, (_YEAR_2001, _YEAR_2001))


def _come_to_rest(folder: Path) -> None:
    """Have the files on the disk, and in memory too, as those that a guest has worked with for long
    are. Copies of the last moment may be neither: on xfs and btrfs, cp(1) clones. Whoever reads or
    cuts one waits for the disk then, which anybody who reads and writes as much as `vunify` must
    here keeps as busy.
    """
    subprocess.run(["sync", "-f", folder], check=True)
    for number in range(_NAMES):
        file_of(folder, number).read_bytes()


@contextmanager
def _elsewhere(path: Path, place: Path) -> Iterator[None]:
    path.rename(place)
    try:
        yield
    finally:
        place.rename(path)


def _unify(tool: Tool) -> Report:
    done = tool("vunify", "--all", "--json", timeout_s=600)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return Report.parse(done.stdout)


@dataclass(frozen=True, slots=True)
class _Stretch:
    """When `vunify` ran, and the time after it in which nothing did, on our clock."""

    began: float
    ended: float
    control_ended: float


def _unify_while_it_works(tool: Tool, wanted: int) -> list[_Stretch]:
    """Unify until so many names are replaced; a busy machine may have some put off."""
    stretches = []
    for _ in range(10):
        began = monotonic()
        report = _unify(tool)
        assert report.missing() == 0
        ended = monotonic()
        assert report.errors == []
        sleep(max(1.0, ended - began))
        stretches.append(_Stretch(began, ended, monotonic()))
        wanted -= report.unified
        if wanted <= 0:
            return stretches
    raise AssertionError(f"{wanted} names are still to be replaced")


def _begin_work(host: Host, folder: str) -> tuple["subprocess.Popen[str]", float]:
    """The guest's program at work, and by how much our clock is ahead of the guest's."""
    (_root(host, "web") / STOP.lstrip("/")).unlink(missing_ok=True)
    command = ("/usr/bin/python3", "/labour.py", f"/{folder}", str(_NAMES))
    process = host.begin("web", "exec", *command)
    assert process.stdout is not None
    first = process.stdout.readline().split()
    assert first[:1] == ["ready"], process.communicate(timeout=60)
    return process, monotonic() - float(first[1])


def _end_work(host: Host, process: "subprocess.Popen[str]") -> Labour:
    (_root(host, "web") / STOP.lstrip("/")).touch()
    said, wrong = process.communicate(timeout=300)
    assert process.returncode == 0, wrong
    return Labour(**json.loads(said))


def _longest(found: Labour, ahead: float, began: float, ended: float) -> float:
    """The longest time (s) for which a process of the guest stood still, or waited for a file."""
    pauses = [(start + ahead, took) for start, took in found.pauses]
    pauses += [(start + ahead, took) for start, took, _ in found.waits]
    within = [took for start, took in pauses if start < ended and start + took > began]
    return max(within, default=0.0)


@on(*(KINDS if is_soak() else KINDS[:1]))
def test_a_guest_at_work_does_not_notice_that_it_is_unified(host: Host, tool: Tool) -> None:
    """However busy the machine is: its pauses without `vunify` are known from the same run, and one
    run of several may have been unlucky.
    """
    figures = []
    for turn in range(_TRIES):
        figures.append(_try(host, tool, turn))
        pause, usual = figures[-1]
        if pause < max(_LONGEST_S, usual * _BUSIER):
            break
    else:
        raise AssertionError(f"longest pauses (s) with and without vunify: {figures}")
    host.vserver("web", "stop")
    assert find_faults(host.etc.vdirbase / ".pool") == []


def _try(host: Host, tool: Tool, turn: int) -> tuple[float, float]:
    """The longest pause (s) while `web` is unified, and the longest one without."""
    folder = f"srv/{turn}"
    if turn:
        for name in ("db", "web"):
            _grow(_root(host, name) / folder, _NAMES)
        _come_to_rest(_root(host, "web") / folder)
        sleep(SETTLED_S)
    process, ahead = _begin_work(host, folder)
    try:
        stretches = _unify_while_it_works(tool, _NAMES - USED)
    finally:
        found = _end_work(host, process)
    assert found.errors == []
    assert found.lost == []
    assert found.done > 500
    assert is_immutable(file_of(_root(host, "web") / folder, _NAMES - 1))
    pause = max(_longest(found, ahead, one.began, one.ended) for one in stretches)
    usual = max(_longest(found, ahead, one.ended, one.control_ended) for one in stretches)
    return pause, usual
