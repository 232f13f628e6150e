"""Copy-on-write links on this kernel: that they work, and what a notified call costs.

Figures of an emulated machine say little by themselves, so they are shown and held against nothing;
`python -m bench cow` has those of a real one.
"""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import perf_counter

import pytest

from tests.fixtures.cow import Ran, in_guest
from tests.fixtures.filesystems import Site, is_immutable
from tests.fixtures.inside import in_child
from tests.fixtures.probes import need, on
from tests.fixtures.windows import shared_file
from vrun.cow import notifyfilter
from vrun.cow.notifications import SET_FLAGS, SYNC_WAKE_UP

pytestmark = need("immutable", "lease")

_LOOPS = 200
_ROUNDS = 9


def _set_sync_wake_up() -> bool:
    """Whether a listener takes the flag."""
    listener_fd = notifyfilter.load(notifyfilter.compile_program())
    try:
        fcntl.ioctl(listener_fd, SET_FLAGS, SYNC_WAKE_UP)
    except OSError:
        return False
    return True


def _has_sync_wake_up() -> bool:
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int(minor)) >= (6, 6)


def test_the_flag_is_known_from_linux_6_6_on() -> None:
    assert in_child(_set_sync_wake_up) is _has_sync_wake_up()


def _time_opens(path: str) -> float:
    """Seconds for opening and closing it: the middle of some rounds."""
    rounds = []
    for _ in range(_ROUNDS):
        began = perf_counter()
        for _ in range(_LOOPS):
            os.close(os.open(path, os.O_WRONLY))
        rounds.append((perf_counter() - began) / _LOOPS)
    return median(rounds)


def _time_own_and_shared() -> tuple[float, float]:
    """Of a private file; and of the first time that a shared one is opened."""
    Path("/own").write_bytes(b"own")
    own_s = _time_opens("/own")
    began = perf_counter()
    os.close(os.open("/conf", os.O_WRONLY))
    return own_s, perf_counter() - began


@pytest.fixture(params=["any processor", "one processor"])
def processors(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where all processes run. To wake another processor is dear where all of them are emulated."""
    before = os.sched_getaffinity(0)
    which: str = request.param
    try:
        if which == "one processor":
            os.sched_setaffinity(0, {min(before)})
        yield which
    finally:
        os.sched_setaffinity(0, before)


@on("ext4")
def test_what_opening_a_file_for_writing_costs(
    site: Site, processors: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with shared_file(site) as shared:
        (site.root("web") / "own").write_bytes(b"own")
        native_s = _time_opens(os.fspath(site.root("web") / "own"))
        ran = Ran()
        own_s, shared_s = in_guest(site.pool, site.root("web"), _time_own_and_shared, ran=ran)
        assert not ran.notes
        assert shared.web.stat().st_ino != shared.db.stat().st_ino
        assert shared.is_untouched()
        assert is_immutable(shared.db)
    assert own_s > native_s, "the calls were not notified"
    with capsys.disabled():
        sync = "with" if _has_sync_wake_up() else "without"
        print(  # noqa: T201 (it goes to the console of the machine)
            f"\n== {os.uname().release}, {sync} SYNC_WAKE_UP, {processors}: write-open and close, "
            f"native {native_s * 1e6:.1f} us, of a private file in a guest {own_s * 1e6:.1f} us "
            f"({own_s / native_s:.1f} times), the first of a shared one {shared_s * 1e6:.0f} us"
        )
