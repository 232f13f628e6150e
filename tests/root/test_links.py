"""Link groups and twins: what is one inode stays one, what is two stays two, inside each guest."""

import fcntl
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Tool
from tests.fixtures.filesystems import Site, is_immutable
from tests.fixtures.probes import need, on
from tests.fixtures.runs import (
    find_faults,
    inode_of,
    inodes,
    list_objects,
    stamps,
    undo,
    unify,
    unshared,
)
from tests.fixtures.trees import File, Link, Row, differences, snapshot

pytestmark = need("immutable", "lease")

_SAME = b"the very same content"
_EXT4_LINKS = 65_000


def _objects(site: Site) -> set[int]:
    return {inode_of(path) for path in list_objects(site.pool)}


def test_empty_files_are_never_shared(site: Site, tool: Tool) -> None:
    for name in ("web", "db"):
        site.add_guest(name, [File("var/one.lock"), File("var/two.lock")])
    report = unify(tool, "--all", "--min-size", "1")
    assert (report.unified, report.skipped) == (0, {"empty": 4})
    paths = [
        site.root(name) / f"var/{lock}.lock" for name in ("web", "db") for lock in ("one", "two")
    ]
    files = [path.open("w") for path in paths]
    for file in files:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.close()
    assert len({inode_of(path) for path in paths}) == 4


def test_twins_stay_two_inodes_and_keep_theirs_over_runs(site: Site, tool: Tool) -> None:
    rows: list[Row] = [File(name, _SAME) for name in ("a", "b", "c")]
    guests = [site.add_guest(name, rows[:count]) for name, count in (("web", 2), ("db", 3))]
    before = [snapshot(root) for root in guests]
    assert unify(tool).unified == 4
    after = [snapshot(root) for root in guests]
    assert unshared(before, after) == []
    settled = [stamps(root) for root in guests]
    assert unify(tool).already == 4
    assert [stamps(root) for root in guests] == settled
    third = site.add_guest("mail", rows)
    assert unify(tool, "mail").unified == 2
    assert unify(tool).unified == 2  # the third twins of db and mail
    assert len({inode_of(root / name) for root in (guests[1], third) for name in "abc"}) == 3
    assert {inode_of(guests[0] / name) for name in "ab"} < _objects(site)
    assert find_faults(site.pool) == []


def test_a_new_twin_takes_the_object_that_its_guest_does_not_use(site: Site, tool: Tool) -> None:
    rows: list[Row] = [File(name, _SAME) for name in ("b", "c")]
    for name in ("web", "db"):
        site.add_guest(name, rows)
    unify(tool)
    objects = _objects(site)
    undo(tool, "web")
    (site.root("web") / "b").rename(site.root("web") / "z")  # now first in another order
    report = unify(tool, "web")
    assert (report.unified, report.new) == (2, 0)
    assert _objects(site) == objects
    assert {inode_of(site.root("web") / name) for name in ("c", "z")} == objects


def test_names_of_one_file_in_a_guest_stay_one_file_and_thawed(site: Site, tool: Tool) -> None:
    rows: list[Row] = [File("a", _SAME), Link("b", "a"), Link("deep/c", "a"), File("twin", _SAME)]
    guests = [site.add_guest(name, rows) for name in ("web", "db")]
    before = [snapshot(root) for root in guests]
    kept = inodes(site, "a", "web", "db")
    report = unify(tool)
    assert report.skipped == {"linked": 6}
    assert report.unified == 2
    assert inodes(site, "a", "web", "db") == kept
    assert not is_immutable(guests[0] / "a")
    after = [snapshot(root) for root in guests]
    assert [differences(*pair) for pair in zip(before, after, strict=True)] == [[], []]
    undo(tool)
    after = [snapshot(root) for root in guests]
    assert [differences(*pair) for pair in zip(before, after, strict=True)] == [[], []]


def test_names_outside_the_guests_keep_an_inode_as_it_is(site: Site, tool: Tool) -> None:
    guests = [site.add_guest(name, [File("a", _SAME)]) for name in ("web", "db")]
    outside = site.filesystem.folder / "snapshot"
    outside.mkdir()
    os.link(guests[0] / "a", outside / "a")
    report = unify(tool)
    assert report.skipped == {"linked-elsewhere": 1, "unique": 1}
    assert not is_immutable(outside / "a")
    (outside / "a").unlink()
    assert unify(tool).unified == 2


def test_an_inode_that_guests_share_already_becomes_the_object(site: Site, tool: Tool) -> None:
    web, db = site.add_guest("web", [File("a", _SAME)]), site.add_guest("db")
    os.link(web / "a", db / "b")
    mail = site.add_guest("mail", [File("c", _SAME)])
    shared = inode_of(web / "a")
    report = unify(tool)
    assert (report.unified, report.new) == (3, 1)
    assert _objects(site) == {shared}
    assert {inode_of(path) for path in (web / "a", db / "b", mail / "c")} == {shared}
    assert is_immutable(web / "a")
    assert find_faults(site.pool) == []


def test_an_inode_that_guests_share_becomes_an_object_although_no_other_equals_it(
    site: Site, tool: Tool
) -> None:
    web, db = site.add_guest("web", [File("a", _SAME)]), site.add_guest("db")
    os.link(web / "a", db / "a")
    before = inode_of(web / "a")
    report = unify(tool)
    assert (report.unified, report.new, report.reclaimed) == (2, 1, 0)
    assert _objects(site) == {before}


def test_two_shared_inodes_that_are_equal_become_one(site: Site, tool: Tool) -> None:
    big = os.urandom(1 << 16)
    guests = [site.add_guest(name) for name in ("web", "db", "mail", "news")]
    for first, second in (guests[:2], guests[2:]):
        (first / "a").write_bytes(big)
        os.utime(first / "a", ns=(0, 0))
        os.link(first / "a", second / "a")
    report = unify(tool)
    assert (report.unified, report.new) == (4, 1)
    assert 1 << 16 <= report.reclaimed < 1 << 17  # once, although two names were replaced
    assert len({inode_of(root / "a") for root in guests}) == 1


def test_shared_inodes_in_a_chain_lose_nothing(site: Site, tool: Tool) -> None:
    """db shares one with web and an equal one with mail: they are twins there."""
    web, mail = (site.add_guest(name, [File("a", _SAME)]) for name in ("web", "mail"))
    db = site.add_guest("db")
    os.link(web / "a", db / "a")
    os.link(mail / "a", db / "b")
    guests = (web, db, mail)
    before = [snapshot(root) for root in guests]
    for _ in range(3):
        unify(tool)
        after = [snapshot(root) for root in guests]
        assert [differences(*pair) for pair in zip(before, after, strict=True)] == [[], [], []]
        assert inode_of(db / "a") != inode_of(db / "b")
        assert find_faults(site.pool) == []


def test_an_inode_shared_with_a_guest_that_is_not_named_is_left_alone(
    site: Site, tool: Tool
) -> None:
    web, db = site.add_guest("web", [File("a", _SAME)]), site.add_guest("db")
    os.link(web / "a", db / "a")
    mail = site.add_guest("mail", [File("a", _SAME)])
    report = unify(tool, "web", "mail")
    assert report.skipped == {"linked-elsewhere": 1, "unique": 1}
    assert not any(is_immutable(root / "a") for root in (web, db, mail))


@pytest.fixture(params=["thawed", "frozen"])
def original(request: pytest.FixtureRequest, site: Site) -> Iterator[Path]:
    """A pool of the original tools with one member that two guests use, as they left it."""
    web = site.add_guest("web", [File("a", _SAME), File("b", b"of one guest alone")])
    db = site.add_guest("db")
    pool = site.filesystem.folder / "hashes"
    (pool / "5f").mkdir(parents=True)
    member = pool / "5f/5f0c1d"
    os.link(web / "a", member)
    os.link(web / "a", db / "a")
    if request.param == "frozen":
        subprocess.run(["chattr", "+i", member], check=True)
    folder = site.confdir / ".defaults/apps/vunify/hash"
    folder.mkdir(parents=True)
    (folder / "root").symlink_to(pool)
    yield pool
    subprocess.run(["chattr", "-R", "-i", site.filesystem.folder], check=False)


def test_members_of_an_original_pool_become_objects_as_they_are(
    site: Site, tool: Tool, original: Path
) -> None:
    member = inode_of(original / "5f/5f0c1d")
    guests = [site.root(name) for name in ("web", "db")]
    before = [snapshot(root) for root in guests]
    report = unify(tool)
    assert (report.unified, report.reclaimed) == (2, 0)
    assert _objects(site) == {member}
    assert inodes(site, "a", "web", "db") == [member, member]
    assert is_immutable(guests[0] / "a")
    after = [snapshot(root) for root in guests]
    assert [differences(*pair) for pair in zip(before, after, strict=True)] == [[], []]
    assert find_faults(site.pool) == []


def test_a_guest_that_comes_later_shares_what_was_an_original_pools(
    site: Site, tool: Tool, original: Path
) -> None:
    member = inode_of(original / "5f/5f0c1d")
    site.add_guest("mail", [File("elsewhere/a", _SAME)])
    assert unify(tool).unified == 3
    assert inodes(site, "elsewhere/a", "mail") == [member]
    undo(tool)
    assert len(set(inodes(site, "a", "web", "db"))) == 2


@on("ext4")
def test_an_object_that_takes_no_more_links_gets_a_second_one(site: Site, tool: Tool) -> None:
    for number in range(2):
        site.add_guest(f"old{number}", [File("file", _SAME)])
    unify(tool)
    (first,) = list_objects(site.pool)
    _use_up_links(first, site.filesystem.folder / "others", leave=5)
    for number in range(20):
        site.add_guest(f"new{number}", [File("file", _SAME)])
    report = unify(tool)
    assert (report.unified, report.new) == (20, 1)
    assert first.stat().st_nlink == _EXT4_LINKS
    assert len(list_objects(site.pool)) == 2
    assert find_faults(site.pool) == []
    assert unify(tool).already == 22


def _use_up_links(path: Path, folder: Path, *, leave: int) -> None:
    """Give the frozen file so many names in `folder` that it can have only `leave` more."""
    folder.mkdir()
    subprocess.run(["chattr", "-i", path], check=True)
    for number in range(_EXT4_LINKS - leave - path.stat().st_nlink):
        os.link(path, folder / str(number))
    subprocess.run(["chattr", "+i", path], check=True)
