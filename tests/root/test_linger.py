"""Leases that outlive their windows, for whoever comes late."""

import os
import subprocess
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, sleep

import pytest

from tests.fixtures.filesystems import Site
from tests.fixtures.probes import need, on
from tests.fixtures.trees import opened
from tests.fixtures.windows import (
    Shared,
    enemy,
    leases_on,
    own_windows,
    shared_file,
    wait_for,
    waits_in_lease,
)
from vstore import window
from vstore.exclude import NOTHING
from vstore.hand import Hand
from vstore.plan import Rules
from vstore.pool import InodeNumbers
from vstore.reading import READ, key_of
from vstore.recovery import settle_stage
from vstore.scan import Tree

pytestmark = need("immutable", "lease")

_one = on("ext4")
"""Where the file system makes no difference."""


@pytest.fixture
def shared(site: Site) -> Iterator[Shared]:
    with shared_file(site) as made:
        yield made


@_one
def test_a_lease_lingers_for_those_who_come_late(shared: Shared) -> None:
    with own_windows(shared.pool, linger_s=0.3) as (windows, _, _):
        fd = shared.open()
        began = monotonic()
        with windows.guard([fd]), windows.thawed(fd):
            pass
        assert leases_on(shared.object) == 1
        windows.close()
        assert monotonic() - began >= 0.3
        assert leases_on(shared.object) == 0


@_one
def test_the_note_of_a_window_stays_as_long_as_its_lease(shared: Shared) -> None:
    """Whoever is late for a lease gets through when holder and keeper are killed: then somebody is
    to look at the object.
    """
    with own_windows(shared.pool, linger_s=0.3) as (windows, _, stage_fd):
        folder = Path(f"/proc/self/fd/{stage_fd}").resolve()
        fd = shared.open()
        with windows.guard([fd]), windows.thawed(fd):
            pass
        (intent,) = folder.iterdir()
        assert str(intent.readlink()) == str(shared.number)
        assert settle_stage(shared.pool, stage_fd, windows=windows)
        assert list(folder.iterdir()) == [intent]
        windows.close()
        assert not list(folder.iterdir())


@_one
def test_a_lease_lingers_no_longer_though_its_holder_has_a_long_job(site: Site) -> None:
    large = site.root("web") / "large"
    with shared_file(site) as shared, own_windows(shared.pool, linger_s=0.2) as (windows, _, at):
        with large.open("wb") as file:
            file.truncate(3 << 30)
        with opened(site.root("web")) as root_fd:
            status = large.stat()
            tree = Tree(root_fd, status.st_dev, NOTHING, 1, 0, False)
            hand = Hand([tree], InodeNumbers(array("Q")), {})
            hand.equip(shared.pool, windows, at, [""], Rules())
            fd = shared.open()
            with windows.guard([fd]), windows.thawed(fd):
                pass
            began = monotonic()
            answers = list(hand.serve(("read", [(0, b"", b"large", key_of(status))])))
            assert answers[0][0][0] == READ
            assert monotonic() - began > 0.3, "the job is too short to show anything"
            assert leases_on(shared.object) == 0


@_one
def test_who_waits_in_a_lingering_lease_is_turned_away_at_its_end(shared: Shared) -> None:
    with enemy(shared.web) as process, own_windows(shared.pool, linger_s=0.1) as (windows, _, _):
        fd = shared.open()
        with windows.guard([fd]), windows.thawed(fd):
            subprocess.run(["chattr", "+i", shared.object], check=True)
        # Somebody who passed the check of the flag long ago arrives at the lease only now.
        subprocess.run(["chattr", "-i", shared.object], check=True)
        wait_for(lambda: waits_in_lease(process.pid))
        subprocess.run(["chattr", "+i", shared.object], check=True)
        windows.close()
        sleep(0.02)
        assert process.poll() is None
    assert shared.is_untouched()


@_one
def test_who_arrives_at_the_lease_after_the_freeze_does_not_get_through_at_its_end(
    site: Site,
) -> None:
    with shared_file(site) as shared, enemy(shared.web) as process:
        with own_windows(shared.pool) as (windows, _, _):
            fd = shared.open()
            with windows.guard([fd]):
                with windows.thawed(fd):
                    pass
                # As above, between the freeze and the end of a batch that holds many leases.
                subprocess.run(["chattr", "-i", shared.object], check=True)
                wait_for(lambda: waits_in_lease(process.pid))
                subprocess.run(["chattr", "+i", shared.object], check=True)
        sleep(0.02)
        assert process.poll() is None
        assert shared.is_untouched()


@_one
def test_what_was_put_right_while_a_lease_lingered_stays_so(shared: Shared) -> None:
    """A holder that was killed in its window has left a change, which recovery finds only when the
    next window on the file is over.
    """
    _change(shared, lambda: os.setxattr(shared.object, "user.evil", b"1"))
    with own_windows(shared.pool, linger_s=0.2) as (windows, _, _):
        fd = shared.open()
        with windows.guard([fd]), windows.thawed(fd):
            pass
        _change(shared, lambda: os.removexattr(shared.object, "user.evil"))
        windows.close()
    assert "user.evil" not in os.listxattr(shared.object)


def _change(shared: Shared, change: Callable[[], None]) -> None:
    subprocess.run(["chattr", "-i", shared.object], check=True)
    change()
    subprocess.run(["chattr", "+i", shared.object], check=True)


@_one
def test_the_queue_of_lingering_leases_is_bounded_and_never_cut_short(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window, "_LINGER_LIMIT", 512)
    linger_s = 0.4
    began: dict[int, float] = {}
    with shared_file(site, "0") as first:
        for number in range(1, 150):
            with shared_file(site, str(number), b"%d" % number * 20):
                pass
        paths = [site.root("web") / str(number) for number in range(150)]
        with own_windows(first.pool, linger_s=linger_s) as (windows, keeper, _):
            for turn in range(6):
                fds = [os.open(path, os.O_RDONLY) for path in paths]
                with windows.guard(fds) as refused:
                    assert not refused
                    began[turn] = monotonic()
                keeper.drain()
                held = sum(len(group) for _, _, group, _ in windows._lingering)
                assert held <= window.find_linger_limit() + len(paths)
            windows.close()
            # Six batches of 150 are more than the queue takes at a time, so the last ones waited.
            assert monotonic() - began[0] >= 2 * linger_s
        assert [leases_on(path) for path in paths[:5]] == [0] * 5
