"""Restoring: what is missing is made, what is there stays, what cannot be made is said."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import Tool
from tests.fixtures.backups import lose, objects_used, restore, save, text, unified_pair
from tests.fixtures.filesystems import Site
from tests.fixtures.hostile import writer
from tests.fixtures.probes import need, on, scaled
from tests.fixtures.running import IDLE, running
from tests.fixtures.runs import find_faults, inode_of, list_objects, unify
from tests.fixtures.trees import (
    COPY_MAY_DIFFER,
    File,
    Folder,
    Symlink,
    differences,
    grow,
    snapshot,
)

pytestmark = need("immutable")


@pytest.fixture
def pair(site: Site, tool: Tool) -> Site:
    """Two unified guests, web and db."""
    return unified_pair(site, tool)


def drop_object(pool: Path, ino: int) -> None:
    """The object is reclaimed, as if no guest used it; the other objects stay frozen."""
    (path,) = [path for path in list_objects(pool) if inode_of(path) == ino]
    subprocess.run(["chattr", "-i", path], check=True)
    path.unlink()


# --- what cannot be had


@on("ext4")
def test_an_object_that_was_reclaimed_is_named_and_the_rest_is_made(pair: Site, tool: Tool) -> None:
    used = objects_used(pair.root("web"), pair.pool)
    file = save(pair, tool)
    root = lose(pair)
    drop_object(pair.pool, used[b"etc/conf"])
    done = tool("vfiles", "--restore", file, "web")
    assert done.returncode == 20
    assert done.stderr == (f"vfiles: {root}/etc/conf: its object is no longer in the pool\n")
    assert done.stdout.endswith("; 1 not restored\n")
    assert objects_used(root, pair.pool) == {
        path: ino for path, ino in used.items() if path != b"etc/conf"
    }


@on("ext4")
def test_a_twin_whose_object_is_gone_gets_one_that_the_guest_does_not_use(
    site: Site, tool: Tool
) -> None:
    twins = [File(name, text("twin")) for name in ("a", "b", "c")]
    site.add_guest("web", twins[:2])
    for name in ("db", "mail"):
        site.add_guest(name, twins)
    unify(tool)
    before = snapshot(site.root("web"))
    file = save(site, tool)
    root = lose(site)
    lost, third = (before[b"a"].inode, inode_of(site.root("db") / "c"))
    drop_object(site.pool, lost)
    found = restore(tool, file)
    assert (found["files_linked"], found["files_copied"]) == (2, 0)
    assert objects_used(root, site.pool) == {b"a": third, b"b": before[b"b"].inode}
    assert differences(before, snapshot(root), ignoring=COPY_MAY_DIFFER) == []


def test_a_twin_with_no_object_of_its_own_becomes_a_private_copy(pair: Site, tool: Tool) -> None:
    before = snapshot(pair.root("web"))
    file = save(pair, tool)
    root = lose(pair)
    for name in (b"twins/a", b"twins/b"):
        drop_object(pair.pool, before[name].inode)
    found = restore(tool, file)
    assert found["files_copied"] == 2
    after = snapshot(root)
    twins = {name: entry for name, entry in after.items() if name.startswith(b"twins")}
    wanted = {name: entry for name, entry in before.items() if name.startswith(b"twins")}
    assert differences(wanted, twins, ignoring=COPY_MAY_DIFFER) == []
    assert len({entry.inode for entry in twins.values()}) == len(twins)
    assert twins[b"twins/sub/c"].inode == before[b"twins/sub/c"].inode


@on("btrfs")
def test_an_object_that_another_name_of_the_guest_uses_is_not_given_twice(
    pair: Site, tool: Tool
) -> None:
    before = snapshot(pair.root("web"))
    file = save(pair, tool)
    root = pair.root("web")
    subprocess.run(["chattr", "-i", root / "twins/a"], check=True)
    (root / "twins/a").rename(root / "twins/elsewhere")
    subprocess.run(["chattr", "+i", root / "twins/elsewhere"], check=True)
    found = restore(tool, file)
    assert (found["files_linked"], found["files_copied"]) == (0, 1)
    after = snapshot(root)
    assert after[b"twins/elsewhere"].inode == before[b"twins/a"].inode
    assert after[b"twins/a"].digest == before[b"twins/a"].digest
    assert after[b"twins/a"].group == ()


@on("ext4")
@need("soak")  # 65,000 links
def test_an_object_that_takes_no_more_links_is_copied(site: Site, tool: Tool) -> None:
    for name in ("web", "db"):
        site.add_guest(name, [File("file", text("full"))])
    unify(tool)
    before = snapshot(site.root("web"))
    file = save(site, tool)
    (first,) = list_objects(site.pool)
    many = site.filesystem.folder / "many"
    many.mkdir()
    subprocess.run(["chattr", "-i", first], check=True)
    for number in range(65_000 - first.stat().st_nlink):
        os.link(first, many / f"{number}")
    subprocess.run(["chattr", "+i", first], check=True)
    root = lose(site)
    found = restore(tool, file)
    assert (found["files_linked"], found["files_copied"]) == (0, 1)
    assert differences(before, snapshot(root), ignoring=COPY_MAY_DIFFER) == []


@on("xfs")
def test_a_folder_of_another_project_gets_a_copy(site: Site, tool: Tool) -> None:
    for name in ("web", "db"):
        site.add_guest(name, [File("sub/file", text("project"))])
    unify(tool)
    file = save(site, tool)
    root = lose(site)
    (root / "sub").mkdir()
    subprocess.run(["chattr", "+P", "-p", "77", root / "sub"], check=True)
    found = restore(tool, file)
    assert (found["files_linked"], found["files_copied"], found["errors"]) == (0, 1, [])
    assert (root / "sub/file").read_bytes() == text("project")


@on("ext4")
def test_an_object_that_is_not_frozen_is_not_given_out(pair: Site, tool: Tool) -> None:
    before = snapshot(pair.root("web"))
    file = save(pair, tool)
    root = lose(pair)
    (path,) = [path for path in list_objects(pair.pool) if inode_of(path) == before[b"holes"].inode]
    subprocess.run(["chattr", "-i", path], check=True)
    found = restore(tool, file, code=20)
    assert found["errors"] == [["./holes", "its object is not frozen; see vpool verify"]]
    assert not (root / "holes").exists()


@on("ext4")
def test_a_pool_without_objects_is_refused(site: Site, tool: Tool) -> None:
    site.add_guest("web", [File("a", text("only here"))])
    unify(tool)
    file = save_quietly(site, tool)
    before = snapshot(site.root("web"))
    done = tool("vfiles", "--restore", file, "web")
    assert done.returncode == 6
    assert "reflink" in done.stderr
    assert differences(before, snapshot(site.root("web")), ignoring=()) == []


def save_quietly(site: Site, tool: Tool) -> Path:
    """As save(); a warning is expected."""
    file = site.filesystem.folder / "manifest"
    done = tool("vfiles", "--save", file, "web")
    assert done.returncode == 0
    assert "no objects" in done.stderr
    return file


# --- what is there stays


@on("xfs")
def test_a_file_that_is_there_is_never_replaced(pair: Site, tool: Tool) -> None:
    file = save(pair, tool)
    root = lose(pair)
    grow(
        root,
        [
            Folder("etc"),
            File("etc/conf", b"written since"),
            File("bin/su", text("su"), mode=0o4755),  # equal, but not shared
            File("bin/ping", text("gnip"), mode=0o755),  # as long, but not equal
            Symlink("holes", "etc/conf"),
            Folder("twins/a"),
            File("default", b"where a folder should be"),
        ],
    )
    before = snapshot(root)
    found = restore(tool, file, code=20)
    errors = found["errors"]
    assert isinstance(errors, list)
    other = "another file is there, which was left as it is"
    assert {path: reason for path, reason in errors if not path.startswith("./default")} == {
        f"./{path}": other for path in ("etc/conf", "bin/ping", "holes", "twins/a")
    }
    assert [path for path, _ in errors if path.startswith("./default")] == [
        "./default",
        "./default/file",
    ]
    after = snapshot(root)
    for path in (b"etc/conf", b"bin/su", b"bin/ping", b"holes", b"twins/a", b"default"):
        same = [{path: replace(tree[path], group=())} for tree in (before, after)]
        assert differences(same[0], same[1], ignoring=("links",)) == []
    assert found["files_present"] == 1
    assert after[b"twins/b"].digest


@on("btrfs")
def test_a_symlink_in_the_way_leads_nowhere(pair: Site, tool: Tool) -> None:
    outside = grow(pair.filesystem.folder / "outside", [File("here", b"x")])
    before = snapshot(outside)
    file = save(pair, tool)
    root = lose(pair)
    (root / "etc").symlink_to(outside)
    (root / "secret").mkdir()
    (root / "secret/deep").symlink_to("../../../outside")
    found = restore(tool, file, code=20)
    errors = found["errors"]
    assert isinstance(errors, list)
    assert {path for path, _ in errors} == {
        *("./etc", "./etc/conf", "./etc/rights"),
        *("./secret/deep", "./secret/deep/er", "./secret/deep/er/file"),
    }
    assert differences(before, snapshot(outside), ignoring=()) == []
    assert (root / "twins/a").exists()


@on("ext4")
def test_folders_that_the_manifest_does_not_name_keep_their_times(pair: Site, tool: Tool) -> None:
    file = save(pair, tool)
    lines = file.read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"folder": "twins' not in line]
    kept[-1] = json.dumps({"end": len(kept) - 2}) + "\n"
    file.write_text("".join(kept))
    root = lose(pair)
    grow(root, [Folder("twins", mtime_ns=5 * 10**9), Folder("twins/sub", mtime_ns=6 * 10**9)])
    restore(tool, file)
    assert (root / "twins").stat().st_mtime_ns == 5 * 10**9
    assert (root / "twins/sub").stat().st_mtime_ns == 6 * 10**9
    assert (root / "twins/sub/c").exists()


# --- who else is there


@on("xfs")
def test_a_running_guest_is_made_whole_too(pair: Site, tool: Tool, cgroup: Path) -> None:
    used = objects_used(pair.root("web"), pair.pool)
    file = save(pair, tool)
    root = lose(pair)
    with running(pair, "web", cgroup, IDLE):
        found = restore(tool, file)
    assert found["errors"] == []
    assert objects_used(root, pair.pool) == used
    assert find_faults(pair.pool) == []


@on("ext4")
def test_a_plain_tree_needs_the_promise_that_nothing_writes_there(pair: Site, tool: Tool) -> None:
    file = save(pair, tool)
    done = tool("vfiles", "--restore", file, "--root", pair.root("web"))
    assert done.returncode == 6
    assert "--offline" in done.stderr
    found = restore(tool, file, "--root", pair.root("web"), "--offline")
    assert found["files_linked"] == 0


@on("xfs")
def test_an_object_that_is_open_for_writing_is_not_given_out(pair: Site, tool: Tool) -> None:
    before = snapshot(pair.root("web"))
    file = save(pair, tool)
    root = lose(pair)
    (path,) = [path for path in list_objects(pair.pool) if inode_of(path) == before[b"holes"].inode]
    subprocess.run(["chattr", "-i", path], check=True)
    with writer(path):
        subprocess.run(["chattr", "+i", path], check=True)
        found = restore(tool, file, code=20)
    assert found["errors"] == [["./holes", "its object is open for writing; see vpool verify"]]
    assert not (root / "holes").exists()


@on("ext4")
def test_killed_at_any_moment_it_goes_on_where_it_ended(site: Site, tool: Tool) -> None:
    rows = [File(f"{number % 30}/{number}", text(f"{number} ", 40)) for number in range(1_500)]
    for name in ("web", "db"):
        site.add_guest(name, rows)
    unify(tool)
    before = snapshot(site.root("web"))
    file = save(site, tool)
    made = []
    for step in range(scaled(5, 50)):
        root = lose(site, step=step)
        made.append(kill_when(root, 200 * step % 1_000, "vfiles", "--restore", file, "web"))
        restore(tool, file)
        assert differences(before, snapshot(root), ignoring=COPY_MAY_DIFFER) == []
    assert 0 < min(made) < len(rows)
    assert find_faults(site.pool) == []


def kill_when(root: Path, made: int, name: str, *arguments: str | Path) -> int:
    """Run an installed command until so many files are below `root`; returns how many there are."""
    command: list[str | Path] = [Path(sys.executable).parent / name, *arguments]
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE) as process:
        while count_files(root) < max(1, made) and process.poll() is None:
            pass
        os.killpg(process.pid, signal.SIGKILL)
    return count_files(root)


def count_files(root: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(root))
