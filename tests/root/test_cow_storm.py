"""Supervisor and monitor are killed at any step, while a guest changes its shared files and
somebody waits for the moment in which the shared inode can be written to.
"""

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import Tool
from tests.fixtures.cow import Ran, in_guest
from tests.fixtures.filesystems import Site, is_immutable
from tests.fixtures.probes import is_soak, need, on
from tests.fixtures.storm import FEW_NAMES, GUEST, IN_WINDOW, NAMES, Victim, storm
from tests.fixtures.trees import EPOCH_NS, File
from tests.fixtures.windows import CONTENT, Shared, enemy, got_in, shared_file, wait_for

pytestmark = [need("immutable", "lease"), on("ext4", "xfs")]


@contextmanager
def _many_names(site: Site, count: int) -> Iterator[Shared]:
    """One shared inode, with many names in the guest; afterwards nothing is left of it."""
    with shared_file(site, "conf") as shared:
        root = site.root(GUEST)
        subprocess.run(["chattr", "-i", shared.object], check=True)
        for number in range(count):
            os.link(shared.object, root / f"{number:05}")
        subprocess.run(["chattr", "+i", shared.object], check=True)
        yield shared


def _remove_all(site: Site, shared: Shared) -> None:
    """Nothing is left for the next round."""
    subprocess.run(["chattr", "-f", "-i", shared.db, shared.web, shared.object], check=False)
    folders = (shared.object.parent, site.pool / "quarantine", site.root(GUEST), site.root("db"))
    for folder in folders:
        for path in folder.glob("*"):
            if path.is_file():
                subprocess.run(["chattr", "-f", "-i", path], check=True)
                path.unlink()


def _check(site: Site, shared: Shared) -> None:
    assert shared.is_untouched()
    assert is_immutable(shared.object)
    assert shared.db.samefile(shared.object)
    assert not list((site.pool / "stage").glob("*/*/*"))
    assert not list(site.pool.glob("quarantine/*"))


_REFUSALS = frozenset((errno.ENOSYS, errno.EPERM, errno.EINVAL))  # the last: glibc, of renameat2
_STEPS: dict[Victim, range] = {
    "supervisor": range(1, 1500) if is_soak() else range(7, 700, 53),
    "monitor": range(1, 1500) if is_soak() else range(7, 700, 90),
    "monitor itself": range(1, 1000) if is_soak() else range(7, 700, 90),
}


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("victim", _STEPS)
def test_no_call_is_lost_and_no_shared_byte_whenever_one_dies(site: Site, victim: Victim) -> None:
    steps = _STEPS[victim]
    with _many_names(site, NAMES) as shared, enemy(shared.db, pause_s=0.0005) as writer:
        seen = storm(site, shared, victim, steps)
        assert writer.poll() is None
        _check(site, shared)
        in_guest(site.pool, site.root("db"), lambda: None)
        assert not list((site.pool / "stage").iterdir())
    died, other = seen.supervisors, seen.monitors
    if victim != "supervisor":
        died, other = other, died
    assert died > len(steps)
    assert other == 1 or victim != "supervisor"


@pytest.mark.timeout(7200)
def test_what_is_left_when_both_die_is_put_right_or_in_quarantine(site: Site, tool: Tool) -> None:
    mail = site.add_guest("mail", [File("conf", CONTENT, mode=0o644, mtime_ns=EPOCH_NS)])
    steps = range(1, 600) if is_soak() else range(60, 460, 100)
    for step in [IN_WINDOW, *steps]:
        ran = Ran()
        stays = step % 2 == 1
        with (
            _many_names(site, FEW_NAMES) as shared,
            enemy(shared.db, pause_s=0.0005, stays=stays) as writer,
        ):
            seen = storm(site, shared, "both", [step])
            assert set(seen.errors) <= _REFUSALS, step
            if step == IN_WINDOW:
                wait_for(lambda: writer.poll() is not None)
            in_guest(site.pool, site.root("db"), lambda: None, ran=ran)
            kept = list((site.pool / "quarantine").glob("*"))
            if kept:
                wait_for(partial(got_in, writer, shared.db))
            if kept or stays or shared.db.read_bytes() != CONTENT:
                assert bool(kept) == got_in(writer, shared.db), step
        if kept:
            _check_attacked(shared, kept, ran)
            tool("vpool", "verify", "--repair")
            assert shared.db.read_bytes() == CONTENT, step
        else:
            _check(site, shared)
        assert (mail / "conf").read_bytes() == CONTENT
        assert not list((site.pool / "stage").iterdir()), step
        _remove_all(site, shared)


def _check_attacked(shared: Shared, kept: list[Path], ran: Ran) -> None:
    """Somebody got in when no lease was left: what he wrote to is named, and out of use."""
    (path,) = kept
    assert path.samefile(shared.db)
    assert any(path.name in note and "quarantine" in note for note in ran.notes), ran.notes
    assert not shared.object.exists()
