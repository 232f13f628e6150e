"""The index never vouches for the wrong content, and nothing but time is lost with it."""

import os
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from time import sleep
from typing import Final

from tests.conftest import Tool
from tests.fixtures.filesystems import (
    Site,
    is_immutable,
    mount_image,
    mount_loop,
    private_folder,
)
from tests.fixtures.hostile import mapped, store
from tests.fixtures.notify import watched
from tests.fixtures.probes import need, on
from tests.fixtures.runs import SETTLED_S, find_faults, inode_of, inodes, unify, unify_fresh
from tests.fixtures.settled import Nursery
from tests.fixtures.trees import EPOCH_NS, File, Row, differences, grow, snapshot

pytestmark = need("immutable", "lease")

_OLD: Final = b"old content of the file" * 99
_NEW: Final = b"new content of the file" * 99
_TRIES: Final = 20


def _rewrite(path: Path, content: bytes) -> None:
    """As touch -r puts it back: size and mtime are as before."""
    before = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert after.st_ino == before.st_ino


def _known(site: Site) -> set[int]:
    with closing(sqlite3.connect(site.pool / "index.sqlite")) as database:
        return {number for (number,) in database.execute("SELECT ino FROM digests")}


_LOOK_EQUAL = Nursery({"web": [File("a", _OLD)], "db": [File("a", _NEW)]}, sets=4)


def _settle_two(site: Site, tool: Tool) -> list[Path]:
    """Two guests whose files look equal and are not, both known to the index."""
    guests = _LOOK_EQUAL.add_guests(site)
    unify(tool)
    assert {inode_of(root / "a") for root in guests} <= _known(site)
    return guests


def test_content_that_changed_under_a_restored_mtime_is_read_again(site: Site, tool: Tool) -> None:
    guests = _settle_two(site, tool)
    _rewrite(guests[0] / "a", _NEW)
    assert unify(tool).unified == 2
    assert (guests[0] / "a").read_bytes() == (guests[1] / "a").read_bytes() == _NEW
    assert find_faults(site.pool) == []


def test_content_that_changed_is_not_taken_for_what_it_was(site: Site, tool: Tool) -> None:
    guests = _settle_two(site, tool)
    site.add_guest("mail", [File("a", _OLD)])
    _rewrite(guests[0] / "a", _OLD[:-1] + b"X")
    before = snapshot(guests[0])
    assert unify(tool).unified == 0
    assert snapshot(guests[0]) == before


def test_another_file_in_the_place_of_a_known_one_is_read(site: Site, tool: Tool) -> None:
    """ext4 gives a new file the inode number of one that was just removed."""
    guests = _settle_two(site, tool)
    number = inode_of(guests[0] / "a")
    for _ in range(50):
        (guests[0] / "a").unlink()
        (guests[0] / "a").write_bytes(_NEW)
        os.utime(guests[0] / "a", ns=(EPOCH_NS, EPOCH_NS))
        if inode_of(guests[0] / "a") == number:
            break
    assert unify(tool).unified == 2
    assert (guests[0] / "a").read_bytes() == _NEW


@on("ext4")
def test_xattrs_that_changed_are_read_again(site: Site, tool: Tool) -> None:
    guests = [
        site.add_guest("web", [File("a", _OLD, xattrs={"user.key": b"1"})]),
        site.add_guest("db", [File("a", _OLD, xattrs={"user.key": b"2"})]),
    ]
    sleep(SETTLED_S)
    assert unify(tool).unified == 0
    os.setxattr(guests[0] / "a", "user.key", b"2")
    assert unify(tool).unified == 2


def test_a_store_to_a_dirty_mapped_page_is_seen_although_it_changes_no_time(
    site: Site, tool: Tool
) -> None:
    size = len(_OLD)
    web = site.add_guest("web", [File("a", b"0" * size)])
    site.add_guest("db", [File("a", b"1" * 23 + b"0" * (size - 23))])
    site.add_guest("mail", [File("a", b"2" * 23 + b"0" * (size - 23))])
    with mapped(web / "a") as process:
        for _ in range(_TRIES):
            store(process, "3" * 23)
            stored = (web / "a").stat()
            sleep(SETTLED_S)
            store(process, "1" * 23)
            again = (web / "a").stat()
            if again.st_ctime_ns == stored.st_ctime_ns:  # else somebody's sync(1) came between
                break
        assert (again.st_mtime_ns, again.st_ctime_ns) == (stored.st_mtime_ns, stored.st_ctime_ns)
        assert unify(tool, "--all", "--ignore-mtime").skipped["busy"] == 1
        assert inode_of(web / "a") not in _known(site)
        store(process, "2" * 23)
    assert unify(tool, "--all", "--ignore-mtime").unified == 2
    assert len(set(inodes(site, "a", "web", "mail"))) == 1
    assert (web / "a").read_bytes().startswith(b"2" * 23)
    assert find_faults(site.pool) == []


def test_a_file_that_has_just_changed_is_not_kept_in_the_index(site: Site, tool: Tool) -> None:
    guests = _settle_two(site, tool)
    unify_fresh(tool, lambda: _rewrite(guests[0] / "a", os.urandom(len(_OLD))))
    known = _known(site)
    assert inode_of(guests[1] / "a") in known
    with closing(sqlite3.connect(site.pool / "index.sqlite")) as database:
        ((ctime,),) = database.execute(
            "SELECT ctime FROM digests WHERE ino = ?", (inode_of(guests[0] / "a"),)
        )
    assert ctime < (guests[0] / "a").stat().st_ctime_ns


def _make_garbage(path: Path) -> None:
    path.write_bytes(b"this is no database at all" * 999)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def _cut_to_its_header(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(100)


def _damage_pages(path: Path) -> None:
    """All pages but the first, which says that it is a database of ours."""
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(path.stat().st_size - 4096))


def _make_newer(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 99")


def _make_foreign(path: Path) -> None:
    """Of another program, with a table of the same name."""
    path.unlink()
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE digests (what TEXT)")
        database.execute("CREATE TABLE origin (what TEXT)")
        database.execute("PRAGMA user_version = 1")


def _make_another_pools(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("UPDATE origin SET born = born + 1")
        database.execute("UPDATE digests SET digest = randomblob(32)")
        database.commit()


def _lose_columns(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("DROP TABLE digests")


_DAMAGES: Final[list[Callable[[Path], None]]] = [
    _make_garbage,
    _empty,
    _cut,
    _cut_to_its_header,
    _damage_pages,
    _make_newer,
    _make_foreign,
    _make_another_pools,
    _lose_columns,
]


@on("ext4")
def test_an_index_that_cannot_be_used_is_made_anew(site: Site, tool: Tool) -> None:
    rows: list[Row] = [File(f"{number}", b"%099d" % number) for number in range(300)]
    others: list[Row] = [File(f"{number}", b"%098dx" % number) for number in range(300)]
    guests = [
        site.add_guest("web", [*rows, File("a", _OLD)]),
        site.add_guest("db", [*others, File("a", _OLD)]),
    ]
    sleep(SETTLED_S)
    unify(tool)
    before = [snapshot(root) for root in guests]
    for number, damage in enumerate(_DAMAGES):
        damage(site.pool / "index.sqlite")
        site.add_guest(f"mail{number}", [File("a", _OLD)])
        report = unify(tool)
        assert (report.unified, report.already) == (1, 2 + number), damage.__name__
        for root, old in zip(guests, before, strict=True):
            assert differences(old, snapshot(root)) == [], damage.__name__
        with watched(guests[0]) as seen:
            unify(tool)
        assert seen.opened == set(), damage.__name__
    assert find_faults(site.pool) == []


@on("ext4")
def test_a_copy_does_without_an_index_that_cannot_be_used(site: Site, tool: Tool) -> None:
    """The guest's files are known to it: no other has them, so they are its own."""
    rows: list[Row] = [File(f"{number}", b"%099d" % number) for number in range(300)]
    web = site.add_guest("web", rows)
    sleep(SETTLED_S)
    for number, damage in enumerate(_DAMAGES):
        for name in (f"before{number}", f"after{number}"):
            done = tool("vserver-copy", "-q", "web", name)
            assert done.returncode == 0, (damage.__name__, done.stderr)
            assert differences(snapshot(web), snapshot(site.root(name))) == [], damage.__name__
            if name.startswith("before"):
                assert inode_of(web / "7") in _known(site)
                damage(site.pool / "index.sqlite")
    assert find_faults(site.pool) == []


@on("ext4")
def test_a_damaged_index_of_a_dry_run_is_no_failure(site: Site, tool: Tool) -> None:
    _settle_two(site, tool)
    _make_garbage(site.pool / "index.sqlite")
    assert unify(tool, "--all", "--dry-run").unified == 0
    assert unify(tool).unified == 0


@on("xfs")
def test_an_index_is_good_after_the_file_system_was_mounted_on_another_device(
    site: Site, tool: Tool
) -> None:
    with private_folder() as folder:
        mount = mount_image("xfs", folder, size=512 << 20)
        image = folder / "xfs.img"
        for name, content in (("web", _OLD), ("db", _NEW)):
            site.register(name, grow(mount / name, [File("a", content)]))
        sleep(SETTLED_S)
        unify(tool, "--all", "--pool", mount / "pool")
        number = mount.stat().st_dev
        with _taken_from(mount, folder / "other.img"):
            mount_loop(image, mount, "xfs")
            assert mount.stat().st_dev != number
            with watched(mount / "web") as seen, watched(mount / "db") as seen_too:
                unify(tool, "--all", "--pool", mount / "pool")
            assert seen.opened | seen_too.opened == set()


def _image_of(device: str) -> str:
    """What the loop device has; "" where it is free."""
    command = ("losetup", "--list", "--noheadings", "--output", "BACK-FILE", device)
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


@contextmanager
def _taken_from(mount: Path, other: Path) -> Iterator[None]:
    """The file system is unmounted, and its loop device has another image meanwhile: ours, or that
    of another test which was quicker.
    """
    command = ("findmnt", "--noheadings", "--output", "SOURCE", "--mountpoint", mount)
    device = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    with other.open("xb") as file:
        file.truncate(1 << 20)
    before = _image_of(device)
    subprocess.run(["umount", mount], check=True)
    is_ours = False
    while not is_ours and _image_of(device) in ("", before):  # it is let go a moment later
        is_ours = not subprocess.run(["losetup", device, other], check=False).returncode
    try:
        yield
    finally:
        if is_ours:
            subprocess.run(["losetup", "--detach", device], check=True)


@on("ext4")
def test_an_object_that_is_not_immutable_is_no_object(site: Site, tool: Tool) -> None:
    """Its inode number alone says nothing: somebody lifted the flag and changed it."""
    guests = [site.add_guest(name, [File("a", _OLD)]) for name in ("web", "db")]
    unify(tool)
    (found,) = (site.pool / "objects").glob("*/*")
    subprocess.run(["chattr", "-i", found], check=True)
    found.write_bytes(_NEW)
    mail = site.add_guest("mail", [File("a", _OLD)])
    done = tool("vunify", "--all")
    assert done.returncode in (0, 5, 20), done.stderr
    assert "Traceback" not in done.stderr
    assert (mail / "a").read_bytes() == _OLD
    assert not is_immutable(guests[0] / "a")
