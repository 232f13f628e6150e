"""Where the bytes are: the figures of guests and pool against statvfs(2) and du(1)."""

import random
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import Tool
from tests.fixtures.filesystems import Site, free_bytes, freed, remove, thaw_below
from tests.fixtures.guests import SMALL, install
from tests.fixtures.hostile import deep_path, odd_tree
from tests.fixtures.probes import need, on
from tests.fixtures.runs import inodes, list_objects, stamps, unify
from tests.fixtures.trees import File, Folder, Link, Row, Symlink, grow
from vstore.audit import (
    GuestFigures,
    Objects,
    PoolFigures,
    Use,
    find_pool,
    load_objects,
    measure_guest,
    measure_pool,
)
from vstore.errors import FormatUnknown
from vstore.guest import tree_guest

pytestmark = need("immutable")

MIB = 1 << 20


def content(number: int, size: int) -> bytes:
    return random.Random(number).randbytes(size)  # noqa: S311 (no secret)


def allocated(path: Path) -> int:
    return path.lstat().st_blocks * 512


def look(pool: Path) -> Objects:
    found = find_pool(pool)
    assert found is not None
    with found:
        return load_objects(found)


def figures(site: Site, name: str) -> GuestFigures:
    return measure_guest(tree_guest(site.root(name)), look(site.pool))


def pool_figures(site: Site) -> PoolFigures:
    return measure_pool(look(site.pool))


def du(*paths: Path) -> int:
    """What du(1) says the paths use together, in bytes; an inode with several names counts once."""
    done = subprocess.run(
        ["du", "--summarize", "--total", "--block-size=1", "--", *paths],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout.splitlines()[-1].split()[0])


# --- the pool's figures


def test_saved_is_what_statvfs_gives_back(site: Site, tool: Tool) -> None:
    rows: list[Row] = [File(f"bin/{number}", content(number, 8 * MIB)) for number in range(9)]
    rows.append(File("holes", content(9, MIB), at=4 * MIB, size=20 * MIB))
    for name in ("one", "two", "three"):
        site.add_guest(name, [*rows, File("etc/hostname", name.encode() * 10)])
    before = free_bytes(site.vdirbase)
    unify(tool)
    saved = pool_figures(site).saved_bytes
    assert saved == 2 * (9 * 8 * MIB + MIB)
    assert freed(site.vdirbase, before, saved) == pytest.approx(saved, rel=0.01)


@on("ext4")
@need("debootstrap")
def test_saved_is_what_statvfs_gives_back_for_real_guests(site: Site, tool: Tool) -> None:
    for number, name in enumerate(("one", "two")):
        install(SMALL[0], site, name, number=number)
    before = free_bytes(site.vdirbase)
    unify(tool)
    saved = pool_figures(site).saved_bytes
    assert freed(site.vdirbase, before, saved) == pytest.approx(saved, rel=0.01)
    assert saved > 50 * MIB


@on("ext4")
def test_an_object_that_no_guest_uses_saves_nothing(site: Site, tool: Tool) -> None:
    for name in ("one", "two"):
        site.add_guest(name, [File("file", content(1, MIB))])
    unify(tool)
    remove(site.root("one"))
    remove(site.root("two"))
    found = pool_figures(site)
    assert (found.objects, found.saved_bytes, found.unused_objects) == (1, 0, 1)
    assert found.bytes == found.unused_bytes == allocated(list_objects(site.pool)[0])


@on("btrfs")
def test_objects_and_bytes_are_those_of_the_pool_folder(site: Site, tool: Tool) -> None:
    for name in ("one", "two"):
        site.add_guest(name, [File(f"{size}", content(size, size)) for size in (20, 70_000, MIB)])
    unify(tool)
    found = pool_figures(site)
    assert found.objects == 3
    assert found.bytes == sum(allocated(path) for path in list_objects(site.pool))


@on("ext4")
def test_no_pool_and_a_newer_pool(site: Site) -> None:
    assert find_pool(site.pool) is None
    grow(site.pool, [Folder("objects"), File("format", b"vserver-tools pool 9\n")])
    with pytest.raises(FormatUnknown):
        find_pool(site.pool)


# --- a guest's figures


def test_own_and_shared_together_are_what_du_says(site: Site, tool: Tool) -> None:
    for name in ("one", "two"):
        rows: list[Row] = [
            File("shared", content(1, 300_000)),
            File("holes", content(2, 9_000), at=MIB, size=5 * MIB),
            File("own", content(len(name), 50_000) + name.encode()),
            Link("own-too", "own"),
            File("empty"),
            Symlink("short", "own"),
            Symlink("long", "x" * 200),
        ]
        site.add_guest(name, [*rows, *odd_tree()])
    unify(tool)
    found = figures(site, "one")
    assert found.own_bytes + found.shared_bytes == du(site.root("one"))
    assert found.shared_bytes >= allocated(site.root("one") / "shared")
    assert found.errors == []


def test_own_is_what_deleting_the_guest_frees(site: Site, tool: Tool) -> None:
    everywhere = [File(f"bin/{number}", content(number, 2 * MIB)) for number in range(4)]
    twice = [File("twice/a", content(50, 3 * MIB)), File("twice/b", content(50, 3 * MIB))]
    site.add_guest("one", [*everywhere, *twice, File("own", content(60, 5 * MIB))])
    site.add_guest("two", [*everywhere, twice[0]])
    site.add_guest("gone", twice)
    unify(tool)
    remove(site.root("gone"))
    own = figures(site, "one").own_bytes
    assert own >= 8 * MIB  # its own file, and the twin that only the deleted guest shared
    before = free_bytes(site.vdirbase)
    reclaim_by_hand(site, site.root("one"))
    assert freed(site.vdirbase, before, own) == pytest.approx(own, rel=0.01)


def reclaim_by_hand(site: Site, root: Path) -> None:
    """Delete a tree, and every object that nothing uses then."""
    remove(root)
    thaw_below(site.pool / "objects")
    for path in list_objects(site.pool):
        if path.stat().st_nlink == 1:
            path.unlink()


@on("xfs")
def test_each_inode_counts_once(site: Site, tool: Tool) -> None:
    twins = [File("a", content(1, 100_000)), File("b", content(1, 100_000))]
    rows: list[Row] = [*twins, File("c", content(2, 100_000)), Link("d", "c")]
    for name in ("one", "two"):
        site.add_guest(name, rows)
    unify(tool, "--all", "--link-twins")
    assert len(set(inodes(site, "a", "one", "two") + inodes(site, "b", "one", "two"))) == 1
    found = figures(site, "one")
    assert (found.files, found.apparent_bytes) == (4, 200_000)
    assert found.shared_bytes == allocated(site.root("one") / "a")
    assert found.own_bytes == du(site.root("one")) - found.shared_bytes
    assert pool_figures(site).saved_bytes == 3 * found.shared_bytes


def test_apparent_is_the_sizes_of_files(site: Site) -> None:
    rows: list[Row] = [File("a", b"12345"), File("holes", b"x", size=3 * MIB), Folder("sub")]
    rows.append(Symlink("link", "a"))
    found = measure_guest(tree_guest(site.add_guest("one", rows)), Objects())
    assert (found.files, found.apparent_bytes) == (2, 5 + 3 * MIB)
    assert (found.own_inodes, found.shared_inodes) == (5, 0)
    assert (found.own_bytes, found.shared_bytes) == (du(site.root("one")), 0)


@on("ext4")
def test_a_file_that_has_names_elsewhere_is_not_its_own(site: Site) -> None:
    root = site.add_guest("one", [File("a", content(1, 100_000)), File("b", content(2, 100_000))])
    (site.filesystem.folder / "outside").hardlink_to(root / "a")
    found = measure_guest(tree_guest(root), Objects())
    assert found.shared_bytes == allocated(root / "a")
    assert found.own_bytes == du(root) - allocated(root / "a")


@on("ext4")
def test_folders_deeper_than_a_path_can_be_long_are_counted(site: Site) -> None:
    root = site.add_guest("one", [File(deep_path() + b"/file", b"deep")])
    found = measure_guest(tree_guest(root), Objects())
    assert (found.files, found.own_inodes, found.errors) == (1, 1_002, [])


@on("xfs")
def test_the_pool_in_a_tree_is_not_counted_as_the_trees(site: Site, tool: Tool) -> None:
    for name in ("one", "two"):
        site.add_guest(name, [File("file", content(1, MIB)), File("own", name.encode() * 9_000)])
    unify(tool)
    found = measure_guest(tree_guest(site.vdirbase), look(site.pool))
    assert found.files == 4
    assert found.own_bytes == du(site.root("one"), site.root("two")) + allocated(site.vdirbase)


@pytest.fixture
def mounted(site: Site) -> Iterator[Path]:
    """A guest with a folder of the host mounted in it."""
    root = site.add_guest("one", [File("here", content(1, 10_000)), Folder("mnt")])
    other = grow(site.filesystem.folder / "other", [File("file", content(2, MIB))])
    subprocess.run(["mount", "--bind", other, root / "mnt"], check=True)
    try:
        yield root
    finally:
        subprocess.run(["umount", root / "mnt"], check=True)


@on("ext4")
def test_what_is_mounted_in_a_guest_is_not_counted(mounted: Path) -> None:
    found = measure_guest(tree_guest(mounted), Objects())
    assert (found.files, found.apparent_bytes, found.errors) == (1, 10_000, [])


@on("btrfs")
def test_a_guest_on_another_subvolume_shares_nothing(site: Site, tool: Tool) -> None:
    for name in ("one", "two"):
        site.add_guest(name, [File("file", content(1, MIB))])
    unify(tool)
    volume = site.filesystem.folder / "volume"
    subprocess.run(["btrfs", "-q", "subvolume", "create", volume], check=True)
    file = grow(volume, [File("file", content(2, 10_000))]) / "file"
    same_number = replace(look(site.pool), uses={file.stat().st_ino: Use(3, 4096, 4096)})
    found = measure_guest(tree_guest(volume), same_number)
    assert (found.files, found.apparent_bytes, found.shared_bytes) == (1, 10_000, 0)


# --- harmless


@on("ext4")
def test_looking_changes_nothing(site: Site, tool: Tool) -> None:
    for name in ("one", "two"):
        site.add_guest(name, [File("dir/file", content(1, 50_000)), File("own", name.encode() * 9)])
    unify(tool)
    before = [stamps(site.vdirbase), stamps(site.confdir), stamps(site.rundir)]
    assert tool("vdu").returncode == 0
    assert [stamps(site.vdirbase), stamps(site.confdir), stamps(site.rundir)] == before
