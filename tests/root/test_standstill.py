"""Guests are held still for as short a time as may be, and run between two of them."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from time import monotonic, sleep
from typing import Final

import pytest

from tests.fixtures.filesystems import Site
from tests.fixtures.probes import need, on
from tests.fixtures.running import is_frozen
from tests.fixtures.windows import own_windows, shared_file
from tests.fixtures.witness import wait_until
from vstore import freezer
from vstore.member import Member
from vstore.plan import Slot
from vstore.pool import Identity
from vstore.standstill import Standstill

pytestmark = need("immutable", "lease", "cgroup_freezer")

_STOPPED: Final = 1
_SLOTS: Final = 100
_LONG_S: Final = 0.02


@pytest.fixture
def standstill(site: Site, cgroup: Path) -> Iterator[Standstill]:
    """For two trees: that of a guest in `cgroup`, and that of one that does not run."""
    with shared_file(site) as shared, own_windows(shared.pool) as (windows, _, _):
        yield Standstill([os.fspath(cgroup), ""], windows)


def _slots(tree: int) -> list[Slot]:
    """Each with one file of the tree."""
    identity = Identity(b"d" * 32, 100, 0o100644, 0, 0, 1, b"")
    content = (identity.digest, identity.xattrs, 0)
    files = [
        Member(0, 0, tree, row, 0, b"%d" % row, row, 100, 0o100644, 0, 0, 1, 1, 1, 8, 0, *content)
        for row in range(_SLOTS)
    ]
    return [Slot(identity, 0, 1, [file]) for file in files]


def _hold_for(standstill: Standstill, seconds: float) -> None:
    with ExitStack() as stack:
        standstill.hold({0}, stack)
        sleep(seconds)


@on("ext4")
def test_a_guest_runs_for_as_long_as_it_stood_still_before_it_does_so_again(
    standstill: Standstill, cgroup: Path
) -> None:
    with ExitStack() as stack:
        standstill.hold({0}, stack)
        assert standstill.moving == set()
        assert is_frozen(cgroup)
        sleep(_LONG_S)
        ended = monotonic()
    assert monotonic() - ended >= _LONG_S


@on("ext4")
def test_a_long_standstill_makes_the_next_pieces_smaller_and_a_short_one_larger(
    standstill: Standstill,
) -> None:
    sizes = []
    for slots in standstill.pieces(_slots(0)):
        sizes.append(len(slots))
        _hold_for(standstill, _LONG_S)
    assert sum(sizes) == _SLOTS
    assert sizes[0] > sizes[1] >= sizes[2] > 1
    wait_until(lambda: _largest_piece(standstill) > sizes[2], timeout_s=30)


def _largest_piece(standstill: Standstill) -> int:
    """Where the guest stands still for so short a time as the machine can."""
    sizes = []
    for slots in standstill.pieces(_slots(0)):
        sizes.append(len(slots))
        _hold_for(standstill, 0)
    return max(sizes)


@on("ext4")
def test_what_was_noted_about_a_batch_is_deleted_when_the_guest_runs_again(
    site: Site, cgroup: Path
) -> None:
    """On xfs a deletion may have to wait for those of many files that were replaced before."""
    with shared_file(site) as shared, own_windows(shared.pool) as (windows, _, _):
        with ExitStack() as stack:
            Standstill([os.fspath(cgroup)], windows).hold({0}, stack)
            for _ in range(2):
                fd = shared.open()
                with windows.guard([fd]), windows.thawed(fd):
                    pass
            assert is_frozen(cgroup)
            assert len(list((site.pool / "stage").glob("*/*/intent-*"))) == 2
        assert not is_frozen(cgroup)
        assert not list((site.pool / "stage").glob("*/*/*"))


@on("ext4")
def test_guests_that_do_not_run_are_worked_on_at_once(standstill: Standstill) -> None:
    assert [len(slots) for slots in standstill.pieces(_slots(_STOPPED))] == [_SLOTS]


def _policy() -> str:
    """The scheduling policy of this process, as chrt(1) has it."""
    command = ["chrt", "--pid", str(os.getpid())]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _may_be_urgent() -> bool:
    command = ["chrt", "--rr", "1", "true"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_who_holds_a_guest_still_waits_for_no_other_program(cgroup: Path) -> None:
    before = _policy()
    with freezer.opened(str(cgroup)) as fd, freezer.frozen(str(cgroup), fd) as is_still:
        assert is_still
        assert ("SCHED_RR" in _policy()) == _may_be_urgent()
    assert _policy() == before
