"""Power loss while a guest changes its shared files: every name is complete, as it was or as it was
to be, and the next start of a guest puts the pool right.

What the disk holds is cloned while the supervisor stands still at a step; see fixtures.power.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Final

import pytest

from tests.fixtures.cow import in_guest
from tests.fixtures.filesystems import KINDS, Filesystem
from tests.fixtures.power import Box, make_box
from tests.fixtures.probes import is_soak, need, on
from tests.fixtures.runs import find_faults
from tests.fixtures.trees import differences, snapshot
from tests.fixtures.windows import shared_file
from vrun.cow import keeping, supervisor
from vrun.cow.duty import Duty
from vrun.cow.notifications import Listener

pytestmark = [need("immutable", "lease", "reflink"), on("xfs")]
"""The image lies on xfs: see fixtures.power."""

_NAMES: Final = 10 if is_soak() else 5
_EVERY: Final = 97 if is_soak() else 701
"""A step is a call of a function written in C; some 200 make up a call of the guest."""
_SIZES: Final = (100, 5_000, 70_000, 300_000)


@pytest.fixture(params=KINDS if is_soak() else ["ext4"])
def box(
    request: pytest.FixtureRequest, fs: Filesystem, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Box]:
    yield from make_box(request.param, fs.folder, monkeypatch)


def _content(name: str) -> bytes:
    return (f"{name}, as all guests have it\n" * 9000).encode()[: _SIZES[len(name) % len(_SIZES)]]


_KINDS_OF_CHANGE: Final = ("chmod", "append--", "unlink-", "rename---")
_CHANGED: Final = [f"{kind}{number}" for kind in _KINDS_OF_CHANGE for number in range(_NAMES)]


def _change_all() -> None:
    for number in range(_NAMES):
        Path(f"/chmod{number}").chmod(0o600)
        with Path(f"/append--{number}").open("ab") as file:
            file.write(b"more")
        Path(f"/unlink-{number}").unlink()
        Path(f"/rename---{number}").rename(f"/moved{number}")


def _clone_at_steps(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor clones the image before every so many-th of its steps."""
    be_supervisor = supervisor.be_supervisor

    def be(duty: Duty) -> None:
        camera = box.camera()
        steps = count(1)
        is_serving = [False]

        def look(frame: FrameType, event: str, argument: object) -> None:
            if not is_serving[0] or event != "c_call":
                return
            step = next(steps)
            if step % _EVERY == 0:
                sys.setprofile(None)
                if step // _EVERY % 4:
                    camera.commit()
                camera.clone(f"{step:06}.img")
                sys.setprofile(look)

        receive = Listener.receive

        def received(self: Listener) -> object:
            is_serving[0] = True
            return receive(self)

        Listener.receive = received  # type: ignore[method-assign,assignment] # this process ends
        sys.setprofile(look)
        be_supervisor(duty)

    monkeypatch.setattr(keeping, "be_supervisor", be)


def _broken(box: Box) -> list[str]:
    """The names of the guest that are neither as they were nor as they were to be."""
    root = box.site.root("web")
    found = {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()}
    faults = []
    for name in _CHANGED:
        old, new = _content(name), name.replace("rename---", "moved")
        there = [found[one] for one in {name, new} if one in found]
        may_be = [old]
        if name.startswith("append"):
            may_be += [old + b"more", old + bytes(4)]  # ext4 has the size before the data
        if name.startswith("unlink") and not there:
            continue
        if len(there) != 1 or there[0] not in may_be:
            sizes = [(len(one), one.count(0)) for one in there]
            faults.append(f"{name}: size and zeros {sizes}")
    return faults


@pytest.mark.timeout(3600)
def test_a_guest_that_loses_power_has_every_file_complete(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as stack:
        for name in _CHANGED:
            stack.enter_context(shared_file(box.site, name, _content(name)))
        box.site.root("web").joinpath("proc").mkdir()
        box.sync()
        before = snapshot(box.site.root("db"))
        with monkeypatch.context() as patch:
            _clone_at_steps(box, patch)
            in_guest(box.site.pool, box.site.root("web"), _change_all)
    camera = box.camera()
    camera.commit()
    camera.clone("end.img")
    camera.close()
    box.lose_power()
    clones = sorted(box.folder.glob("[0-9e]*.img"))
    assert len(clones) >= 4
    for clone in clones:
        with box.as_it_was(clone):
            assert _broken(box) == [], clone.name
            assert differences(before, snapshot(box.site.root("db"))) == [], clone.name
            in_guest(box.site.pool, box.site.root("web"), lambda: None)
            assert find_faults(box.site.pool) == [], clone.name
            assert _broken(box) == [], clone.name
            assert differences(before, snapshot(box.site.root("db"))) == [], clone.name
        box.check(clone)
        clone.unlink()
