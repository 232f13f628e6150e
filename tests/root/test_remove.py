"""vpool rm deletes a unified tree, all of it and nothing else."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_IFIFO, S_IFSOCK

import pytest

from tests.conftest import Tool
from tests.fixtures.death import run_killed, turns
from tests.fixtures.filesystems import Site, is_immutable
from tests.fixtures.hostile import deep_path, odd_tree
from tests.fixtures.probes import is_soak, need, on, scaled
from tests.fixtures.running import IDLE, running
from tests.fixtures.runs import find_faults, list_objects, stamps, unify
from tests.fixtures.trees import (
    File,
    Folder,
    Link,
    Row,
    Special,
    differences,
    grow,
    snapshot,
)
from vstore.commands import vpool

pytestmark = need("immutable", "lease")


def _rows() -> list[Row]:
    return [
        Folder("empty/one"),
        File("etc/conf", b"a setting\n" * 99),
        File("etc/twin", b"a setting\n" * 99),
        File("lib/one", b"ELF 1" * 99, mode=0o6755, uid=5),
        File("lib/two", b"ELF 2" * 99),
        File("nothing"),
        File("linked", b"x" * 99),
        Link("linked too", "linked"),
        Special("fifo", S_IFIFO),
        Special("socket", S_IFSOCK),
        *odd_tree(),
    ]


def _add_unified(site: Site, tool: Tool, *names: str) -> list[Path]:
    roots = [site.add_guest(name, _rows()) for name in names]
    unify(tool)
    return roots


def _remove(tool: Tool, *paths: Path, code: int = 0) -> str:
    done = tool("vpool", "rm", *paths)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_unified_tree_is_deleted_and_the_others_stay(site: Site, tool: Tool) -> None:
    gone, kept = _add_unified(site, tool, "web", "db")
    before = snapshot(kept)
    assert subprocess.run(["rm", "-rf", gone / "etc"], capture_output=True, check=False).returncode
    assert _remove(tool, gone) == ""
    assert not gone.exists()
    after = snapshot(kept)
    assert differences(before, after) == []
    assert {entry.inode for entry in after.values()} == {entry.inode for entry in before.values()}
    assert is_immutable(kept / "etc/conf")
    assert find_faults(site.pool) == []
    _remove(tool, kept)
    assert {path.stat().st_nlink for path in list_objects(site.pool)} == {1}


@on("ext4")
def test_a_part_of_a_tree_is_deleted(site: Site, tool: Tool) -> None:
    root, _ = _add_unified(site, tool, "web", "db")
    wanted = {path: entry for path, entry in snapshot(root).items() if path[:3] != b"lib"}
    _remove(tool, root / "lib")
    found = differences(wanted, snapshot(root), ignoring={"mtime_ns", "folder_size", "links"})
    assert found == []


@on("ext4")
def test_a_tree_can_be_named_twice_and_with_a_part_of_it(site: Site, tool: Tool) -> None:
    root, _ = _add_unified(site, tool, "web", "db")
    _remove(tool, root, root, root / "etc")
    assert not root.exists()


@on("ext4")
def test_many_names_of_one_object_are_deleted(site: Site, tool: Tool) -> None:
    rows = [File(f"{number % 9}/{number}", b"all the same" * 9) for number in range(400)]
    roots = [site.add_guest(name, rows) for name in ("web", "db")]
    unify(tool, "--all", "--link-twins")
    _remove(tool, *roots)
    assert [path.stat().st_nlink for path in list_objects(site.pool)] == [1]


@on("ext4", "xfs")
def test_a_tree_deeper_than_a_path_can_be_long_is_deleted(site: Site, tool: Tool) -> None:
    rows = [File(deep_path(count) + b"/end", b"deep down %d" % count * 9) for count in (900, 1100)]
    roots = [site.add_guest(name, rows) for name in ("web", "db")]
    unify(tool)
    assert list_objects(site.pool)
    _remove(tool, *roots)
    assert not any(root.exists() for root in roots)


@on("ext4")
def test_what_an_administrator_froze_is_named_and_left(site: Site, tool: Tool) -> None:
    root, _ = _add_unified(site, tool, "web", "db")
    mine, folder = root / "linked", root / "empty"
    subprocess.run(["chattr", "+i", mine, folder], check=True)
    said = _remove(tool, root, code=20)
    assert f"{mine}: " in said
    assert f"{folder}/one: " in said
    left = {path.relative_to(root).as_posix() for path in root.rglob("*")}
    assert left == {"linked", "linked too", "empty", "empty/one"}
    subprocess.run(["chattr", "-i", mine, folder], check=True)
    _remove(tool, root)


# --- what is refused


@on("ext4")
def test_what_must_stay_is_refused(site: Site, tool: Tool) -> None:
    root, _ = _add_unified(site, tool, "web", "db")
    inside = site.pool / "objects"
    places = [Path("/"), site.vdirbase, site.pool, inside, site.confdir, site.rundir]
    for path in [*places, site.vdirbase.parent, root / "..", root / "etc/conf", root / "up"]:
        before = stamps(site.vdirbase)
        assert tool("vpool", "rm", path).returncode == 2, path
        assert stamps(site.vdirbase) == before
    assert tool("vpool", "rm", root, site.vdirbase).returncode == 2
    assert root.exists()
    assert tool("vpool", "rm", root / "missing").returncode == 2


@on("ext4")
def test_the_pool_under_another_name_is_refused(site: Site, tool: Tool) -> None:
    _add_unified(site, tool, "web", "db")
    alias = site.filesystem.folder / "alias"
    alias.mkdir()
    subprocess.run(["mount", "--bind", site.vdirbase, alias], check=True)
    try:
        count = len(list_objects(site.pool))
        for path in (alias / ".pool", alias, alias / ".pool/objects"):
            assert "pool" in _remove(tool, path, code=2)
        assert len(list_objects(site.pool)) == count
    finally:
        subprocess.run(["umount", alias], check=True)


@on("ext4")
def test_a_tree_with_something_mounted_in_it_is_refused(site: Site, tool: Tool) -> None:
    root, _ = _add_unified(site, tool, "web", "db")
    kept = grow(site.filesystem.folder / "other", [File("file", b"mine")])
    subprocess.run(["mount", "--bind", kept, root / "empty/one"], check=True)
    try:
        for path in (root, root / "empty", root / "empty/one"):
            assert "mount" in _remove(tool, path, code=2)
    finally:
        subprocess.run(["umount", root / "empty/one"], check=True)
    assert (kept / "file").read_bytes() == b"mine"
    assert (root / "etc/conf").exists()


@on("btrfs")
def test_a_subvolume_in_the_tree_is_named_and_left(site: Site, tool: Tool) -> None:
    root, _ = _add_unified(site, tool, "web", "db")
    subprocess.run(["btrfs", "-q", "subvolume", "create", root / "etc/volume"], check=True)
    (root / "etc/volume/file").write_text("mine")
    assert f"{root}/etc/volume: " in _remove(tool, root, code=20)
    assert (root / "etc/volume/file").read_text() == "mine"
    subprocess.run(["btrfs", "-q", "subvolume", "delete", root / "etc/volume"], check=True)


@on("ext4")
@need("cgroup_freezer")
def test_a_guest_that_runs_is_refused(site: Site, tool: Tool, cgroup: Path) -> None:
    root, _ = _add_unified(site, tool, "web", "db")
    before = snapshot(root)
    with running(site, "web", cgroup, IDLE):
        for path in (root, root / "etc"):
            assert "web" in _remove(tool, path, code=4)
    assert snapshot(root) == before
    _remove(tool, root)


# --- enemies


def _canary(site: Site) -> Path:
    return grow(site.filesystem.folder / "canary", [File("etc/shadow", b"secret"), Folder("a/b")])


@on("ext4")
def test_links_of_a_guest_on_the_way_lead_nowhere_outside(site: Site, tool: Tool) -> None:
    root, _ = _add_unified(site, tool, "web", "db")
    canary = _canary(site)
    before = stamps(canary)
    (root / "var").symlink_to(canary)
    (root / "lib64").symlink_to("lib")
    (root / "abs").symlink_to("/etc")
    for path in (root / "var/etc", root / "var/a/b", root / "up/shadow", root / "var"):
        assert tool("vpool", "rm", path).returncode == 2, path
    assert stamps(canary) == before
    (root / "lib/below").mkdir()
    _remove(tool, root / "lib64/below")
    assert not (root / "lib/below").exists()
    grow(root / "etc", [File("below/file", b"1")])
    _remove(tool, root / "abs/below")
    assert not (root / "etc/below").exists()


_SWAP = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
print("ready", flush=True)
one, other = (os.fsencode(path) for path in sys.argv[1:])
while True:
    libc.renameat2(-100, one, -100, other, 2)
"""


@contextmanager
def _swapping(one: Path, other: Path) -> Iterator[None]:
    """Two names change places all the time."""
    command: list[str | bytes | Path] = [sys.executable, "-c", _SWAP, one, other]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield
        finally:
            process.kill()


@on("ext4", "btrfs")
@pytest.mark.timeout(300 if is_soak() else 120)
def test_a_folder_that_is_swapped_for_a_link_leads_nowhere(site: Site, tool: Tool) -> None:
    canary = _canary(site)
    site.add_guest("web", _rows())
    before = stamps(canary)
    for turn in range(scaled(4, 200)):
        root = site.add_guest(f"new{turn}", [*_rows(), File("etc/etc/shadow", b"mine" * 9)])
        unify(tool, "web", f"new{turn}")
        (root / "link").symlink_to(canary)
        with _swapping(root / "etc", root / "link"):
            done = tool("vpool", "rm", root)
        assert done.returncode in (0, 1, 20), done.stderr
        assert "Traceback" not in done.stderr
        assert stamps(canary) == before
        if root.exists():
            _remove(tool, root)
    assert find_faults(site.pool) == []


# --- death


@pytest.mark.timeout(1800 if is_soak() else 120)
def test_killed_after_any_step_it_harms_no_other_and_the_next_run_ends_it(
    site: Site, tool: Tool
) -> None:
    rows = [File(f"lib/{number}", b"content %d" % number * 9) for number in range(3)]
    kept = site.add_guest("web", rows)

    def add(turn: int) -> Path:
        root = site.add_guest(f"new{turn}", [*rows, Folder("empty")])
        unify(tool, "web", f"new{turn}")
        return root

    steps = len(run_killed(0, vpool.main, "rm", add(0)).notes)
    before = snapshot(kept)
    assert steps > 20
    for turn in turns(steps, site, of=4):
        root = add(turn)
        run_killed(turn, vpool.main, "rm", root)
        assert differences(before, snapshot(kept)) == []
        if root.exists():
            _remove(tool, root)
        else:
            assert tool("vpool", "verify").returncode == 0
        assert not root.exists()
        assert all(is_immutable(kept / f"lib/{number}") for number in range(3))
        assert find_faults(site.pool) == []
