"""showattr and setattr on real inodes: what may be frozen and thawed, and what never."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Tool
from tests.fixtures.filesystems import Filesystem, is_immutable
from tests.fixtures.hostile import deep_path, odd_tree
from tests.fixtures.probes import need, on
from tests.fixtures.trees import File, Folder, Link, Row, Special, Symlink, grow, walk
from vstore.attributes import Changed, Reach, change, show
from vstore.errors import NotPermitted

pytestmark = need("immutable")

ONE = Reach()
ALL = Reach(contents=True, recursive=True)
OBJECT = f"{'0' * 64}.5.644.0.0.1700000000000000000.0-0"


def put(path: Path, reach: Reach = ONE, *, immutable: bool) -> list[Changed]:
    return list(change(os.fsencode(path), reach, immutable=immutable))


def frozen_below(root: Path) -> set[str]:
    """What lsattr(1) says has the flag, at `root` and below it."""
    found = {root, *root.rglob("*")}
    kept = {path for path in found if not path.is_symlink() and (path.is_file() or path.is_dir())}
    return {os.path.relpath(path, root) for path in kept if is_immutable(path)}


def test_set_show_and_clear_a_file(fs: Filesystem) -> None:
    path = fs.folder / "file"
    path.write_text("text")
    assert put(path, immutable=True) == [Changed(os.fsencode(path))]
    assert is_immutable(path)
    assert [item.letters for item in show(os.fsencode(path), ONE)] == ["------I--"]
    with pytest.raises(PermissionError):
        path.write_text("other")
    assert put(path, immutable=False) == [Changed(os.fsencode(path))]
    assert not is_immutable(path)
    assert [item.letters for item in show(os.fsencode(path), ONE)] == ["------i--"]


def test_set_and_clear_twice_is_once(fs: Filesystem) -> None:
    path = fs.folder / "file"
    path.touch()
    for immutable in (True, True, False, False):
        assert put(path, immutable=immutable)[0].error is None
        assert is_immutable(path) == immutable


def test_set_and_clear_a_folder(fs: Filesystem) -> None:
    tree = grow(fs.folder / "tree", [Folder("a/b"), File("a/c")])
    assert put(tree / "a", immutable=True)[0].error is None
    assert frozen_below(tree) == {"a"}
    assert put(tree / "a", immutable=False)[0].error is None
    assert frozen_below(tree) == set()


def test_a_file_with_several_names_is_never_thawed(fs: Filesystem) -> None:
    tree = grow(fs.folder / "tree", [File("one", b"text"), Link("two", "one")])
    put(tree / "one", immutable=True)
    (refused,) = put(tree / "two", immutable=False)
    assert isinstance(refused.error, NotPermitted)
    assert "vpool break" in (refused.error.hint or "")
    assert f"{tree}/two" in refused.error.message
    assert is_immutable(tree / "one")


def test_an_object_that_no_guest_uses_is_never_thawed(fs: Filesystem) -> None:
    tree = grow(fs.folder / "pool", [File(f"objects/3f/{OBJECT}", b"12345")])
    path = tree / "objects/3f" / OBJECT
    put(path, immutable=True)
    (tree / "alias").symlink_to("objects")
    for spelling in (path, tree / "alias/3f" / OBJECT):
        (refused,) = put(spelling, immutable=False)
        assert isinstance(refused.error, NotPermitted)
        assert "an object of a pool" in refused.error.message
    assert is_immutable(path)


def test_recursion_freezes_and_thaws_files_and_folders_alone(fs: Filesystem) -> None:
    rows: list[Row] = [
        File(".hidden/file"),
        File("file"),
        Symlink("link", "file"),
        Special("fifo", 0o010000),
        Special("null", 0o020000, (1, 3)),
    ]
    tree = grow(fs.folder / "tree", rows)
    assert [item.error for item in put(tree, ALL, immutable=True)] == [None] * 4
    assert frozen_below(tree) == {".", ".hidden", ".hidden/file", "file"}
    assert [item.error for item in put(tree, ALL, immutable=False)] == [None] * 4
    assert frozen_below(tree) == set()


def test_odd_names_are_frozen_and_thawed(fs: Filesystem) -> None:
    rows = odd_tree()
    tree = grow(fs.folder / "tree", rows)
    put(tree, ALL, immutable=True)
    letters = [item.letters for item in show(os.fsencode(tree), ALL)]
    assert letters.count("------I--") == sum(not isinstance(row, Symlink) for row in rows)
    assert [item for item in put(tree, ALL, immutable=False) if item.error] == []


@on("ext4")
def test_folders_deeper_than_a_path_can_be_long_are_reached(fs: Filesystem) -> None:
    tree = grow(fs.folder / "tree", [File(deep_path(1_000) + b"/file")])
    assert [item.error for item in put(tree, ALL, immutable=True)] == [None] * 1_002
    assert {item.letters for item in show(os.fsencode(tree), ALL)} == {"------I--"}
    assert [item.error for item in put(tree, ALL, immutable=False)] == [None] * 1_002


@pytest.mark.parametrize("kind", ["link", "fifo", "device"])
def test_what_has_no_flags_is_refused_by_name(fs: Filesystem, kind: str) -> None:
    rows: dict[str, Row] = {
        "link": Symlink("odd", "file"),
        "fifo": Special("odd", 0o010000),
        "device": Special("odd", 0o020000, (10, 130)),  # the watchdog: to open it is to start it
    }
    tree = grow(fs.folder / "tree", [File("file"), rows[kind]])
    (refused,) = put(tree / "odd", immutable=True)
    assert refused.error is not None
    assert "has no flags" in refused.error.message
    assert not is_immutable(tree / "file")


@pytest.fixture
def mounted(fs: Filesystem) -> Iterator[Path]:
    """A tree with a folder of the same file system mounted in it."""
    tree = grow(fs.folder / "tree", [File("here"), Folder("mnt")])
    grow(fs.folder / "other", [File("there/file")])
    subprocess.run(["mount", "--bind", fs.folder / "other", tree / "mnt"], check=True)
    try:
        yield tree
    finally:
        subprocess.run(["umount", tree / "mnt"], check=True)


@on("ext4")
def test_other_file_systems_are_entered_unless_that_is_unwanted(mounted: Path) -> None:
    wide = Reach(contents=True, recursive=True)
    narrow = Reach(contents=True, recursive=True, one_filesystem=True)
    everything = [os.fsdecode(item.path) for item in show(os.fsencode(mounted), wide)]
    assert [os.path.relpath(path, mounted) for path in everything] == [
        "here",
        "mnt",
        "mnt/there",
        "mnt/there/file",
    ]
    assert len(list(show(os.fsencode(mounted), narrow))) == 2


# --- the commands


@on("ext4")
def test_setattr_and_showattr_as_installed(fs: Filesystem, tool: Tool) -> None:
    tree = grow(fs.folder / "tree", [File("file"), File("one"), Link("two", "one")])
    done = tool("setattr", "-v", "-R", "--iunlink", tree)
    assert (done.returncode, done.stdout) == (0, "")
    assert f"setattr: {tree}/file: set\n" in done.stderr
    assert tool("showattr", tree).stdout == "".join(
        f"------I-- {tree}/{name}\n" for name in ("file", "one", "two")
    )
    done = tool("setattr", "-R", "--~immutable", tree)
    assert done.returncode == 20
    assert f"setattr: {tree}/one: " in done.stderr
    assert done.stderr.count("hint: ") == 1
    assert frozen_below(tree) == {"one", "two"}
    assert tool("setattr", "--!immutable", tree / "two").returncode == 6


@on("ext4")
def test_a_file_system_without_flags_is_named(fs: Filesystem, tool: Tool) -> None:
    done = tool("setattr", "--immutable", "/proc/self/status")
    assert done.returncode == 6
    assert "has no immutable flag" in done.stderr


def test_nothing_is_left_open(fs: Filesystem) -> None:
    tree = grow(fs.folder / "tree", [File("a/b/c"), Symlink("l", "a")])
    before = len(list(Path("/proc/self/fd").iterdir()))
    list(show(os.fsencode(tree), ALL))
    put(tree, ALL, immutable=True)
    put(tree, ALL, immutable=False)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert sum(1 for _ in walk(tree)) == 3
