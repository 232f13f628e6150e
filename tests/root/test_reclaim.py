"""Reclaiming frees what no guest uses, exactly, and nothing else."""

import json
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from threading import Thread
from time import monotonic

import pytest

from tests.conftest import Tool
from tests.fixtures.death import add_orphan, run_killed, spoil, turns
from tests.fixtures.filesystems import Site, free_bytes, freed, is_immutable
from tests.fixtures.hostile import writer
from tests.fixtures.probes import is_soak, need, on, scaled
from tests.fixtures.runs import find_faults, list_objects, unify
from tests.fixtures.trees import File, Row, differences, snapshot
from vstore.commands import vpool
from vstore.index import volume_of
from vstore.pool import Pool
from vstore.reclaim import load_pins, plan_reclaim, reclaim

pytestmark = need("immutable", "lease")


def _rows(count: int = 6, size: int = 100) -> list[Row]:
    return [File(f"lib/{number}", (b"content %d " % number) * size) for number in range(count)]


def _orphan(site: Site, tool: Tool, rows: list[Row], *, keep: int = 0) -> None:
    """Guests `web` and `db` with these rows, unified; then only the first `keep` stay shared."""
    for name in ("web", "db"):
        site.add_guest(name, rows)
    unify(tool)
    for name in ("web", "db"):
        gone = [site.root(name) / str(row.path) for row in rows[keep:] if isinstance(row, File)]
        if gone:
            assert tool("vpool", "break", *gone).returncode == 0


def test_only_what_no_guest_uses_is_freed(site: Site, tool: Tool) -> None:
    _orphan(site, tool, _rows(), keep=2)
    before = [snapshot(site.root(name)) for name in ("web", "db")]
    done = tool("vpool", "reclaim", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["objects"], report["pinned"], report["errors"]) == (4, 0, [])
    assert len(list_objects(site.pool)) == 2
    assert [snapshot(site.root(name)) for name in ("web", "db")] == before
    assert find_faults(site.pool) == []


def test_the_bytes_that_are_named_are_those_that_become_free(site: Site, tool: Tool) -> None:
    rows: list[Row] = [File(f"{number}", os.urandom(1 << 20)) for number in range(8)]
    _orphan(site, tool, rows, keep=2)
    for name in ("web", "db"):  # nothing shares blocks with the objects any more
        for number in range(2, 8):
            (site.root(name) / f"{number}").unlink()
    planned = json.loads(tool("vpool", "reclaim", "-n", "--json").stdout)
    free = free_bytes(site.vdirbase)
    report = json.loads(tool("vpool", "reclaim", "--json").stdout)
    assert report["bytes"] == planned["bytes"] == 6 << 20
    # btrfs counts the nodes of its trees as well, which become free too
    assert freed(site.vdirbase, free, 6 << 20) == pytest.approx(6 << 20, rel=0.01, abs=256 << 10)


@on("xfs", "btrfs")
@need("reflink")
def test_blocks_that_private_copies_share_are_not_counted(site: Site, tool: Tool) -> None:
    _orphan(site, tool, [File("big", os.urandom(4 << 20))])
    free = free_bytes(site.vdirbase)
    report = json.loads(tool("vpool", "reclaim", "--json").stdout)
    assert (report["objects"], report["bytes"]) == (1, 0)
    assert abs(free_bytes(site.vdirbase) - free) < 1 << 20


@on("ext4")
def test_a_dry_run_says_the_same_and_changes_nothing(site: Site, tool: Tool) -> None:
    _orphan(site, tool, _rows(), keep=1)
    before = [(path, path.stat().st_ctime_ns) for path in list_objects(site.pool)]
    done = tool("vpool", "reclaim", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("5 objects would be freed: ")
    assert [(path, path.stat().st_ctime_ns) for path in list_objects(site.pool)] == before
    assert tool("vpool", "reclaim").stdout.startswith("5 objects freed: ")


@on("ext4")
def test_what_is_pinned_stays(site: Site, tool: Tool) -> None:
    _orphan(site, tool, _rows())
    kept = list_objects(site.pool)[:2]
    with Pool.load(site.pool) as pool, pool.stage(1) as (stage_fd,):
        for path in kept:
            number = path.stat().st_ino
            os.symlink(f"{number}", f"pin-{number}", dir_fd=stage_fd)
        assert load_pins(pool) == {path.stat().st_ino for path in kept}
        assert plan_reclaim(pool).pinned == 2
        result = reclaim(pool)
        assert (result.objects, result.pinned) == (4, 2)
        assert list_objects(site.pool) == kept
        for path in kept:
            os.unlink(f"pin-{path.stat().st_ino}", dir_fd=stage_fd)
    assert all(is_immutable(path) for path in kept)
    assert tool("vpool", "reclaim").stdout.startswith("2 objects freed")


@on("ext4")
def test_what_is_open_for_writing_is_named_and_stays(site: Site, tool: Tool) -> None:
    _orphan(site, tool, _rows(1))
    (path,) = list_objects(site.pool)
    subprocess.run(["chattr", "-i", path], check=True)
    with writer(path):
        subprocess.run(["chattr", "+i", path], check=True)
        done = tool("vpool", "reclaim")
        assert done.returncode == 20
        assert "open for writing" in done.stderr
        assert path.exists()
    assert tool("vpool", "reclaim").returncode == 0
    assert not path.exists()


@on("ext4")
def test_quarantined_inodes_go_when_no_guest_has_them(site: Site, tool: Tool) -> None:
    _orphan(site, tool, _rows(3), keep=2)
    site.add_guest("copy", _rows(1))
    for path in list_objects(site.pool):
        spoil(path)
    assert tool("vpool", "verify", "--repair").returncode == 5  # nobody has good content of lib/1
    assert len(list((site.pool / "quarantine").iterdir())) == 3
    report = json.loads(tool("vpool", "reclaim", "--json").stdout)
    assert report["quarantined"] == 2
    assert len(list((site.pool / "quarantine").iterdir())) == 1
    assert (site.root("web") / "lib/1").read_bytes().startswith(b"!ontent 1 ")


@on("ext4")
def test_the_index_forgets_inodes_that_are_gone(site: Site, tool: Tool) -> None:
    _orphan(site, tool, _rows(3), keep=1)
    numbers = [path.stat().st_ino for path in list_objects(site.pool)]
    with Pool.load(site.pool) as pool:
        volume = volume_of(pool.objects_fd)
    with closing(sqlite3.connect(site.pool / "index.sqlite")) as index, index:
        index.executemany(
            "INSERT OR REPLACE INTO digests VALUES (?, ?, 1, 1, 1, x'', x'')",
            [(volume, number) for number in numbers],
        )
    assert tool("vpool", "reclaim").returncode == 0
    (kept,) = list_objects(site.pool)
    with closing(sqlite3.connect(site.pool / "index.sqlite")) as index:
        known = {number for (number,) in index.execute("SELECT ino FROM digests")}
    assert known & set(numbers) == {kept.stat().st_ino}


@pytest.mark.timeout(1800 if is_soak() else 120)
def test_killed_after_any_step_it_loses_nothing_and_the_next_run_ends_it(
    site: Site, tool: Tool
) -> None:
    for name in ("web", "db"):
        site.add_guest(name, _rows(2))
    unify(tool)
    before = snapshot(site.root("web"))
    add_orphan(site, b"to be counted" * 9)
    steps = len(run_killed(0, vpool.main, "reclaim").notes)
    assert steps > 10
    for turn in turns(steps, site):
        gone = add_orphan(site, b"made for turn %d" % turn)
        run_killed(turn, vpool.main, "reclaim")
        assert differences(before, snapshot(site.root("web"))) == []
        assert is_immutable(site.root("web") / "lib/0")
        done = tool("vpool", "reclaim")
        assert done.returncode == 0, done.stderr
        assert not gone.exists()
        assert len(list_objects(site.pool)) == 2
        assert find_faults(site.pool) == []


@contextmanager
def _looping(tool: Tool, *arguments: str) -> Iterator[list[str]]:
    """The command runs again and again while the block does; yields what went wrong."""
    wrong: list[str] = []
    is_over = False

    def loop() -> None:
        while not is_over:
            done = tool(*arguments)
            if done.returncode:
                wrong.append(f"{arguments}: {done.returncode}: {done.stderr}")

    thread = Thread(target=loop)
    thread.start()
    try:
        yield wrong
    finally:
        is_over = True
        thread.join()


@on("ext4", "btrfs")
@pytest.mark.timeout(900 if is_soak() else 120)
def test_two_vunify_and_a_reclaim_in_a_loop_lose_nothing(site: Site, tool: Tool) -> None:
    names = ("web", "db", "mail")
    for name in names:
        site.add_guest(name, _rows(30))
    unify(tool)
    before = {name: snapshot(site.root(name)) for name in names}
    deadline = monotonic() + scaled(3, 600)
    turn = 0
    with (
        _looping(tool, "vunify", "web", "db", "-q") as first,
        _looping(tool, "vunify", "mail", "-q") as second,
        _looping(tool, "vpool", "reclaim") as third,
    ):
        while monotonic() < deadline:
            turn += 1
            site.add_guest(f"new{turn}", _rows(30))
            paths = [site.root(f"new{turn}") / f"lib/{number}" for number in range(30)]
            assert tool("vpool", "break", *paths).returncode == 0
            assert tool("vpool", "rm", site.root(f"new{turn}")).returncode == 0
            (site.confdir / f"new{turn}" / "vdir").unlink()
    assert [*first, *second, *third] == []
    for name in names:
        assert differences(before[name], snapshot(site.root(name))) == []
    unify(tool)
    assert tool("vpool", "verify").returncode == 0
    assert find_faults(site.pool) == []
