"""A name that gets another file in the moment in which its link is broken: what came there last is
what it leads to, and nothing is lost, whoever is killed when.
"""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.cow import Ran, in_guest
from tests.fixtures.filesystems import Site, is_immutable
from tests.fixtures.leftovers import make_dead_stage
from tests.fixtures.probes import need, on
from tests.fixtures.trees import opened
from tests.fixtures.windows import CONTENT, Shared, fork, own_windows, shared_file
from vrun.cow import breaking, keeping, supervisor
from vrun.cow.duty import Duty
from vstore import recovery, stray, syscalls

pytestmark = need("immutable", "lease")

_one = on("ext4")
"""Where the file system makes no difference."""

_NEW = b"written by the guest, and renamed to the name"


def _in_supervisor(monkeypatch: pytest.MonkeyPatch, prepare: Callable[[], object]) -> None:
    """Do this in the first supervisor, a process that ends, before it begins."""
    be_supervisor = supervisor.be_supervisor

    def be(duty: Duty) -> None:
        if duty.bequest is None:
            prepare()
        be_supervisor(duty)

    monkeypatch.setattr(keeping, "be_supervisor", be)


def _before_exchange(monkeypatch: pytest.MonkeyPatch, *acts: Callable[[], object]) -> None:
    """The first supervisor does each of these just before one of its exchanges of names: what a
    call does that was let go on earlier, when the name led to nothing that is shared.
    """
    exchange, left = syscalls.renameat2, list(acts)

    def act_and_exchange(*arguments: int | bytes, flags: int) -> None:
        if left:
            left.pop(0)()
        exchange(*arguments, flags=flags)  # type: ignore[arg-type]

    _in_supervisor(monkeypatch, lambda: setattr(syscalls, "renameat2", act_and_exchange))


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _append() -> None:
    with Path("/conf").open("ab") as file:
        file.write(b"!")


def test_a_file_that_was_renamed_to_the_name_is_there_after_the_supervisor_is_killed(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    with shared_file(site) as shared:
        new = shared.web.with_name("new")
        new.write_bytes(_NEW)
        _before_exchange(monkeypatch, lambda: new.rename(shared.web), _die)
        ran = Ran()
        in_guest(site.pool, site.root("web"), _append, ran=ran)
        assert any("was killed" in note for note in ran.notes)
        assert shared.web.read_bytes() == _NEW + b"!"
        assert shared.is_untouched()
        assert is_immutable(shared.object)
        assert not list((site.pool / "stage").glob("*/*/*"))


def test_a_file_that_was_renamed_to_the_name_and_away_again_is_not_lost(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    with shared_file(site) as shared:
        new, moved = shared.web.with_name("new"), shared.web.with_name("moved")
        new.write_bytes(_NEW)
        _before_exchange(
            monkeypatch, lambda: new.rename(shared.web), lambda: shared.web.rename(moved)
        )
        in_guest(site.pool, site.root("web"), _append)
        assert moved.read_bytes() == _NEW
        assert shared.web.read_bytes() == b"!"
        assert not list((site.pool / "stage").glob("*/*/*"))


@_one
def test_a_name_that_is_gone_when_its_link_is_to_be_broken_is_made_anew(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As open(2) with O_CREAT does without a supervisor."""
    with shared_file(site) as shared:
        swap = breaking._swap

        def swap_late(*arguments: Any) -> None:
            shared.web.unlink(missing_ok=True)
            swap(*arguments)

        _in_supervisor(monkeypatch, lambda: setattr(breaking, "_swap", swap_late))
        in_guest(site.pool, site.root("web"), _append)
        assert shared.web.read_bytes() == b"!"
        assert shared.is_untouched()


# --- what recovery makes of a stage between the two exchanges


@dataclass(frozen=True, slots=True)
class Left:
    """The guest's file stands in a dead supervisor's stage, and the copy at the guest's name."""

    shared: Shared
    spare: Path
    name: Path

    def recover(self) -> bool:
        with own_windows(self.shared.pool) as (windows, _, _):
            return recovery.recover(self.shared.pool, windows)


@pytest.fixture
def left(site: Site) -> Iterator[Left]:
    with shared_file(site) as shared:
        stage = make_dead_stage(shared)
        name = shared.web.with_name("folder") / "changing"
        name.parent.mkdir()
        name.write_bytes(CONTENT)
        with name.open("rb") as copy, opened(name.parent) as folder_fd:
            handle = syscalls.load_handle(folder_fd)
            spare = stage / os.fsdecode(stray.name_copy(shared.number, copy.fileno(), handle))
        spare.write_bytes(_NEW)
        yield Left(shared, spare, name)


def test_it_is_put_back(left: Left) -> None:
    assert left.recover()
    assert left.name.read_bytes() == _NEW
    assert not left.spare.parent.parent.exists()


@_one
def test_it_stays_there_where_recovery_is_killed_too(
    left: Left, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(recovery, "_remove_spare", _die)
        fork(left.recover)()
    assert left.name.read_bytes() == _NEW
    assert left.spare.exists()
    assert left.recover()
    assert left.name.read_bytes() == _NEW


def test_so_is_a_folder(left: Left) -> None:
    left.spare.unlink()
    left.spare.mkdir()
    (left.spare / "inside").write_bytes(_NEW)
    assert left.recover()
    assert (left.name / "inside").read_bytes() == _NEW
    assert not left.spare.parent.parent.exists()


@_one
def test_it_comes_to_where_the_guest_has_moved_what_stood_in_its_place(left: Left) -> None:
    moved = left.name.rename(left.name.with_name("moved"))
    assert left.recover()
    assert moved.read_bytes() == _NEW
    assert not left.name.exists()


@_one
def test_it_goes_where_the_guest_has_deleted_what_stood_in_its_place(left: Left) -> None:
    left.name.unlink()
    assert left.recover()
    assert not left.name.exists()
    assert not left.spare.exists()


@_one
def test_so_it_does_with_the_folder(left: Left) -> None:
    shutil.rmtree(left.name.parent)
    assert left.recover()
    assert not left.spare.exists()


@_one
def test_what_the_guest_has_put_in_its_place_stays(left: Left) -> None:
    later = left.name.with_name("later")
    later.write_bytes(b"later")
    later.rename(left.name)
    assert left.recover()
    assert left.name.read_bytes() == b"later"
    assert not left.spare.exists()


@_one
def test_so_does_what_it_puts_there_meanwhile(left: Left, monkeypatch: pytest.MonkeyPatch) -> None:
    later, exchange = left.name.with_name("later"), syscalls.renameat2
    later.write_bytes(b"later")

    def exchange_late(*arguments: int | bytes, flags: int) -> None:
        with suppress(FileNotFoundError):
            later.rename(left.name)
        exchange(*arguments, flags=flags)  # type: ignore[arg-type]

    monkeypatch.setattr(syscalls, "renameat2", exchange_late)
    assert left.recover()
    assert left.name.read_bytes() == b"later"
    assert not left.spare.exists()


@_one
def test_a_new_file_of_the_same_number_stays(left: Left) -> None:
    number = left.name.stat().st_ino
    left.name.unlink()
    for turn in range(1000):
        new = left.name.with_name(f"new{turn}")
        new.write_bytes(b"later")
        if new.stat().st_ino == number:
            break
    else:
        pytest.fail("the file system does not use the number again")
    assert left.recover()
    assert new.read_bytes() == b"later"


@_one
def test_it_is_kept_where_its_place_has_gone_to_another_folder(
    left: Left, caplog: pytest.LogCaptureFixture
) -> None:
    moved = left.name.rename(left.shared.web.with_name("moved"))
    assert not left.recover()
    assert left.spare.name in caplog.text
    assert left.spare.read_bytes() == _NEW
    moved.rename(left.name)
    assert left.recover()
    assert left.name.read_bytes() == _NEW
