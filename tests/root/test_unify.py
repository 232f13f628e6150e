"""Equal files of several guests become one frozen inode, and a guest cannot tell."""

import os
import shutil
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path
from time import monotonic, sleep

from tests.conftest import Tool
from tests.fixtures.filesystems import Site, copy_tree, free_bytes, is_immutable
from tests.fixtures.notify import watched
from tests.fixtures.probes import need, on
from tests.fixtures.runs import (
    SETTLED_S,
    find_faults,
    inode_of,
    inodes,
    list_objects,
    stamps,
    unify,
    unify_fresh,
    unshared,
    write_list,
)
from tests.fixtures.trees import (
    EPOCH_NS,
    File,
    Folder,
    Row,
    Symlink,
    acl,
    capability,
    differences,
    snapshot,
)

pytestmark = need("immutable", "lease")

_CAP_NET_RAW = 13  # linux/capability.h


def _system() -> list[Row]:
    """A small guest with something of everything."""
    return [
        Folder("etc", mode=0o750, gid=4),
        File("etc/conf", b"a setting = a value\n" * 9),
        File("etc/copy", b"a setting = a value\n" * 9),
        File("bin/ping", b"ELF" * 999, mode=0o755, xattrs=_xattrs("security.capability")),
        File("bin/su", b"ELF" * 888, mode=0o4755, uid=7, mtime_ns=EPOCH_NS - 10**18),
        File("srv/shared", b"text" * 99, mode=0o660, xattrs=_xattrs("system.posix_acl_access")),
        File("var/holes", b"middle", at=1 << 20, size=3 << 20),
        File("var/big", bytes(range(256)) * 9000),
        Symlink("lib", "usr/lib"),
    ]


def _xattrs(name: str) -> dict[str, bytes]:
    values = {
        "security.capability": capability(_CAP_NET_RAW),
        "system.posix_acl_access": acl(owner=6, group=4, other=0, users={1000: 6}),
    }
    return {name: values[name]}


def test_equal_files_of_guests_become_one_frozen_inode(site: Site, tool: Tool) -> None:
    names = ("web", "db", "mail")
    guests = [site.add_guest(name, _system()) for name in names]
    before = [snapshot(root) for root in guests]
    report = unify(tool)
    after = [snapshot(root) for root in guests]
    assert [differences(*pair) for pair in zip(before, after, strict=True)] == [[], [], []]
    assert unshared(before, after) == []
    assert (report.seen, report.unified, report.new) == (21, 21, 7)
    for path in ("etc/conf", "bin/su", "var/holes", "var/big"):
        assert len(set(inodes(site, path, *names))) == 1
        assert is_immutable(guests[0] / path)
        assert (guests[0] / path).stat().st_nlink == len(names) + 1
    assert find_faults(site.pool) == []


def test_nothing_is_left_in_the_guests_and_the_pool_is_for_root_alone(
    site: Site, tool: Tool
) -> None:
    guests = [site.add_guest(name, _system()) for name in ("web", "db")]
    unify(tool)
    assert snapshot(guests[0]).keys() == snapshot(guests[1]).keys()
    assert site.pool.stat().st_mode & 0o7777 == 0o700
    assert sorted(path.name for path in site.vdirbase.iterdir()) == [".pool", "db", "web"]


def test_json_has_exactly_the_documented_keys(site: Site, tool: Tool) -> None:
    for name in ("web", "db"):
        site.add_guest(name, _system())
    assert unify(tool).keys == {
        "format",
        "files_seen",
        "files_unified",
        "files_already",
        "bytes_reclaimed",
        "objects_new",
        "skipped",
        "errors",
        "seconds",
        "pool",
    }


def _blobs() -> list[Row]:
    rows: list[Row] = [File(f"lib/{number}", os.urandom(1 << 20)) for number in range(16)]
    rows += [File(f"doc/{number}", os.urandom(6_000)) for number in range(300)]
    return [*rows, File("holes", os.urandom(1 << 18), at=1 << 22, size=1 << 25)]


def test_bytes_reclaimed_are_those_that_the_file_system_got_back(site: Site, tool: Tool) -> None:
    rows = _blobs()
    for name in ("web", "db", "mail"):
        site.add_guest(name, rows)
    unify(tool, "web")  # makes the pool, whose own size is not the guests'
    free = free_bytes(site.vdirbase)
    report = unify(tool)
    assert report.unified == 3 * len(rows)
    deadline = monotonic() + 60  # xfs and btrfs free the blocks of removed files in their own time
    while (
        gap := abs(free_bytes(site.vdirbase) - free - report.reclaimed)
    ) > report.reclaimed / 100:
        assert monotonic() < deadline, f"{gap} bytes of {report.reclaimed}"
        sleep(0.1)


@need("reflink")
@on("xfs", "btrfs")
def test_blocks_that_copies_share_already_are_not_reclaimed(site: Site, tool: Tool) -> None:
    first = site.add_guest("web", _blobs())
    site.add_copy("db", first)  # cp(1) clones where it can
    report = unify(tool)
    assert report.unified == 2 * len(_blobs())
    assert report.reclaimed < 1 << 20


@on("ext4", "btrfs")
def test_a_second_run_does_nothing_and_opens_nothing(site: Site, tool: Tool) -> None:
    guests = [site.add_guest(name, _system()) for name in ("web", "db")]
    for number, root in enumerate(guests):
        (root / "looks-equal").write_bytes(b"%050d" % number)
        os.utime(root / "looks-equal", ns=(EPOCH_NS, EPOCH_NS))
    sleep(SETTLED_S)
    unify(tool)
    before = [stamps(root) for root in (*guests, site.pool / "objects")]
    with watched(guests[0]) as seen, watched(guests[1]) as seen_too:
        report = unify(tool)
    assert (report.unified, report.new, report.reclaimed) == (0, 0, 0)
    assert report.already == 14
    assert seen.opened == seen_too.opened == set()
    assert [stamps(root) for root in (*guests, site.pool / "objects")] == before


def test_a_file_whose_size_mode_and_owner_no_other_has_is_never_opened(
    site: Site, tool: Tool
) -> None:
    rows: list[Row] = [
        File("same", b"0123456789abcdef"),
        File("size", b"x" * 100),
        File("mode", b"x" * 200, mode=0o600),
        File("owner", b"x" * 300, uid=1),
    ]
    others: list[Row] = [
        File("same", b"0123456789abcdef"),
        File("size", b"x" * 101),
        File("mode", b"x" * 200, mode=0o640),
        File("owner", b"x" * 300, uid=2),
    ]
    root = site.add_guest("web", rows)
    site.add_guest("db", others)
    with watched(root) as seen:
        report = unify(tool)
    assert seen.opened == {b"same"}
    assert report.skipped == {"unique": 6}


def test_a_guest_that_comes_later_joins_the_objects_that_are_there(site: Site, tool: Tool) -> None:
    first = site.add_guest("web", _system())
    pristine = site.filesystem.folder / "pristine"
    copy_tree(first, pristine)
    site.add_guest("db", _system())
    unify(tool)
    objects = list_objects(site.pool)
    third = site.add_copy("mail", pristine)
    before = snapshot(third)
    report = unify(tool, "mail")
    assert (report.unified, report.new) == (7, 0)
    assert list_objects(site.pool) == objects
    assert differences(before, snapshot(third)) == []
    assert inodes(site, "etc/conf", "web") == inodes(site, "etc/conf", "mail")
    assert find_faults(site.pool) == []


def test_a_pool_that_lost_its_index_loses_nothing_else(site: Site, tool: Tool) -> None:
    guests = [site.add_guest(name, _system()) for name in ("web", "db")]
    unify(tool)
    for path in site.pool.glob("index.sqlite*"):
        path.unlink()
    before = [stamps(root) for root in guests]
    report = unify(tool)
    assert (report.unified, report.already) == (0, 14)
    assert [stamps(root) for root in guests] == before
    assert (site.pool / "index.sqlite").exists()
    site.add_guest("mail", _system())
    assert unify(tool, "mail").unified == 7


def test_times_of_folders_stay_though_many_workers_replace_names_in_them(
    site: Site, tool: Tool
) -> None:
    rows: list[Row] = [File(f"lib/{number}", b"%020d" % number) for number in range(3_000)]
    guests = [site.add_guest(name, [*rows, Folder("lib", mtime_ns=77)]) for name in ("web", "db")]
    unify(tool)
    assert [(root / "lib").stat().st_mtime_ns for root in guests] == [77, 77]


@on("ext4")
def test_files_below_the_least_size_stay_as_they_are(site: Site, tool: Tool) -> None:
    rows: list[Row] = [File(str(size), b"x" * size) for size in (0, 1, 15, 16, 99, 100)]
    for name in ("web", "db"):
        site.add_guest(name, rows)
    report = unify(tool)
    assert (report.unified, report.skipped) == (6, {"empty": 2, "small": 4})
    report = unify(tool, "--all", "--min-size", "1")
    assert (report.unified, report.already) == (4, 6)
    assert report.skipped == {"empty": 2}
    assert len(set(inodes(site, "0", "web", "db"))) == 2


@on("ext4")
def test_excluded_paths_stay_as_they_are(site: Site, tool: Tool) -> None:
    rows: list[Row] = [
        File(path, b"the very same content")
        for path in ("etc/keep", "etc/join", "var/keep/one", "var/two", "other")
    ]
    for name in ("web", "db"):
        site.add_guest(name, rows)
    listed = write_list(site, "+/etc/join\n/etc/*\n~/var/keep\n/oth*")
    report = unify(tool, "--all", "--exclude-from", listed)
    assert report.skipped == {"excluded": 4, "excluded-folder": 2}
    assert report.unified == 4
    for path in ("etc/keep", "var/keep/one", "other"):
        assert not is_immutable(site.root("web") / path)
    assert len(set(inodes(site, "etc/join", "web", "db"))) == 1


@on("ext4")
def test_the_default_list_keeps_what_is_this_machines_alone(site: Site, tool: Tool) -> None:
    own = ("etc/machine-id", "etc/ssh/ssh_host_rsa_key", "etc/hostname", "var/log/syslog", "tmp/x")
    rows: list[Row] = [File(path, b"the very same content") for path in (*own, "usr/bin/tool")]
    for name in ("web", "db"):
        site.add_guest(name, rows)
    assert unify(tool).unified == 2
    for path in own:
        assert len(set(inodes(site, path, "web", "db"))) == 2


@on("ext4")
def test_a_guests_own_list_counts_for_it_alone(site: Site, tool: Tool) -> None:
    for name in ("web", "db", "mail"):
        site.add_guest(name, [File("data/file", b"the very same content")])
    site.configure("web", "apps/vunify/exclude", "/data")
    assert unify(tool).unified == 2
    assert not is_immutable(site.root("web") / "data/file")
    assert len(set(inodes(site, "data/file", "db", "mail"))) == 1


@on("ext4")
def test_refservers_limit_a_run_to_files_equal_at_the_same_path(site: Site, tool: Tool) -> None:
    same, other = b"in the reference too", b"not in the reference"
    rows: list[Row] = [File("a", same), File("b", other), File("moved", same), File("mine", same)]
    site.add_guest("template", [File("a", same), File("b", same), File("elsewhere", other)])
    for name in ("web", "db"):
        site.add_guest(name, rows)
        folder = site.confdir / name / "apps/vunify"
        folder.mkdir(parents=True)
        (folder / "refserver.00").symlink_to(site.confdir / "template")
    unify(tool, "web", "db")
    assert len(set(inodes(site, "a", "template", "web", "db"))) == 1
    for path in ("b", "moved", "mine"):
        assert len(set(inodes(site, path, "web", "db"))) == 2
        assert not is_immutable(site.root("web") / path)


@on("ext4")
def test_a_guest_that_comes_later_joins_the_objects_of_its_refserver(
    site: Site, tool: Tool
) -> None:
    site.add_guest("template", [File("a", b"the very same content")])
    for name in ("web", "db"):
        site.add_guest(name, [File("a", b"the very same content")])
        folder = site.confdir / name / "apps/vunify"
        folder.mkdir(parents=True)
        (folder / "refserver.00").symlink_to(site.confdir / "template")
        assert unify(tool, name).unified >= 1
    assert len(set(inodes(site, "a", "template", "web", "db"))) == 1


@on("ext4")
def test_one_guest_alone_is_unified_with_the_pool_only(site: Site, tool: Tool) -> None:
    root = site.add_guest("web", _system())
    before = stamps(root)
    assert unify(tool, "web").unified == 0
    assert stamps(root) == before


@on("ext4")
def test_no_time_is_no_failure_and_the_next_run_goes_on(site: Site, tool: Tool) -> None:
    guests = [site.add_guest(name, _system()) for name in ("web", "db")]
    before = [stamps(root) for root in guests]
    report = unify(tool, "--all", "--time-budget", "0")
    assert (report.unified, report.skipped["time-budget"]) == (0, 14)
    assert [stamps(root) for root in guests] == before
    assert unify(tool).unified == 14


@on("ext4")
def test_old_style_guests_are_unified(site: Site, tool: Tool) -> None:
    for name in ("web", "db"):
        site.add_guest(name, [File("file", b"the very same content")])
        shutil.rmtree(site.confdir / name)
        (site.confdir / f"{name}.conf").write_text("S_HOSTNAME=x\n")
    assert unify(tool, "web", "db").unified == 2
    assert len(set(inodes(site, "file", "web", "db"))) == 1


@on("ext4")
def test_plain_trees_are_unified_on_the_promise_that_nothing_writes(site: Site, tool: Tool) -> None:
    site.add_guest("web", [File("file", b"the very same content")])
    tree = site.add_guest("tree", [File("file", b"the very same content")])
    shutil.rmtree(site.confdir / "tree")
    before = stamps(tree)
    done = tool("vunify", "web", "--root", tree)
    assert done.returncode == 6
    assert "--offline" in done.stderr
    assert stamps(tree) == before
    assert unify(tool, "web", "--root", tree, "--offline").unified == 2
    assert len(set(inodes(site, "file", "web", "tree"))) == 1


def test_another_pool_on_the_same_file_system_can_be_named(site: Site, tool: Tool) -> None:
    for name in ("web", "db"):
        site.add_guest(name, [File("file", b"the very same content")])
    pool = site.filesystem.folder / "objects of ours"
    assert unify(tool, "--all", "--pool", pool).unified == 2
    assert not site.pool.exists()
    assert find_faults(pool) == []
    assert len(list_objects(pool)) == 1


def test_a_thousand_equal_files_are_one_inode_in_each_place(site: Site, tool: Tool) -> None:
    rows: list[Row] = [File(f"{number}", b"the very same content") for number in range(700)]
    guests = [site.add_guest(name, rows) for name in ("web", "db")]
    report = unify(tool)
    assert (report.unified, report.new) == (1_400, 700)
    links = Counter(path.stat().st_nlink for root in guests for path in root.iterdir())
    assert links == {3: 1_400}


@on("ext4")
def test_linked_twins_are_one_inode(site: Site, tool: Tool) -> None:
    rows: list[Row] = [File(f"{number}", b"the very same content") for number in range(700)]
    guests = [site.add_guest(name, rows) for name in ("web", "db")]
    report = unify(tool, "--all", "--link-twins")
    assert (report.unified, report.new) == (1_400, 1)
    assert len({inode_of(path) for root in guests for path in root.iterdir()}) == 1
    assert find_faults(site.pool) == []
    assert unify(tool, "--all", "--link-twins").already == 1_400


@on("ext4")
def test_linked_twins_of_one_guest_are_one_inode(site: Site, tool: Tool) -> None:
    root = site.add_guest("web", [File("a", b"x" * 99), File("b", b"x" * 99)])
    assert unify(tool, "web", "--link-twins").unified == 2
    assert inode_of(root / "a") == inode_of(root / "b")


@on("ext4")
def test_what_the_index_knows_was_read_when_it_had_settled(site: Site, tool: Tool) -> None:
    rows: list[Row] = [File("equal", b"x" * 99), File("different", b"y" * 99)]
    others: list[Row] = [File("equal", b"x" * 99), File("different", b"z" * 99)]
    guests = [site.add_guest("web", rows), site.add_guest("db", others)]
    index = site.pool / "index.sqlite"

    def change() -> None:
        index.unlink(missing_ok=True)
        for root in guests:
            (root / "different").chmod(0o644)

    unify_fresh(tool, change)
    assert _known(site) == set()
    sleep(SETTLED_S)
    unify(tool)
    assert _known(site) == {inode_of(root / "different") for root in guests}


def _known(site: Site) -> set[int]:
    with closing(sqlite3.connect(site.pool / "index.sqlite")) as database:
        return {number for (number,) in database.execute("SELECT ino FROM digests")}


def test_jobs_change_nothing_but_the_number_of_workers(site: Site, tool: Tool) -> None:
    results = []
    for jobs in ("1", "4"):
        names = [f"{name}{jobs}" for name in ("web", "db")]
        guests = [site.add_guest(name, _system()) for name in names]
        before = [snapshot(root) for root in guests]
        pool = site.filesystem.folder / f"pool{jobs}"
        report = unify(tool, *names, "--jobs", jobs, "--pool", pool)
        after = [snapshot(root) for root in guests]
        assert unshared(before, after) == []
        results.append((report.unified, report.reclaimed, [p.name for p in list_objects(pool)]))
        assert find_faults(pool) == []
    assert results[0] == results[1]


def test_the_root_folder_of_a_guest_may_hold_the_pool(site: Site, tool: Tool) -> None:
    """A tree that is named may have the pool inside, whose objects are nobody's files."""
    for name in ("web", "db"):
        site.add_guest(name, [File("file", b"the very same content")])
    unify(tool)
    objects = list_objects(site.pool)
    tree: Path = site.vdirbase
    report = unify(tool, "--root", tree, "--offline", "--pool", site.pool)
    assert (report.seen, report.already) == (2, 2)
    assert list_objects(site.pool) == objects
