"""vpool break gives a host administrator private copies, in the right guest and nowhere else."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Tool
from tests.fixtures.death import run_killed, run_watched, spoil, turns
from tests.fixtures.filesystems import Site, is_immutable
from tests.fixtures.hostile import NAMES, odd_tree
from tests.fixtures.probes import is_soak, need, on
from tests.fixtures.running import BUSY, is_frozen, running
from tests.fixtures.runs import find_faults, inode_of, list_objects, stamps, unify
from tests.fixtures.trees import (
    EPOCH_NS,
    File,
    Folder,
    Row,
    Special,
    Symlink,
    acl,
    capability,
    differences,
    grow,
    snapshot,
)
from vstore.commands import vpool

pytestmark = need("immutable", "lease")

_XATTRS = {
    "security.capability": capability(13),
    "system.posix_acl_access": acl(owner=7, group=5, other=5, users={1000: 7}),
    "user.key": b"value",
}


def _rows() -> list[Row]:
    return [
        Folder("etc", mtime_ns=5),
        File("etc/conf", b"a setting\n" * 99, mode=0o600, uid=3, mtime_ns=EPOCH_NS + 1),
        File("etc/other", b"another one\n" * 99),
        File("bin/ping", b"ELF" * 99, mode=0o6755, uid=5, xattrs=_XATTRS, mtime_ns=-1),
        File("holes", b"middle" * 999, at=1 << 20, size=5 << 20),
        Symlink("conf", "etc/conf"),
        Symlink("settings", "/etc"),
        Special("fifo", stat.S_IFIFO),
    ]


def _add_unified(site: Site, tool: Tool) -> tuple[Path, Path]:
    roots = site.add_guest("web", _rows()), site.add_guest("db", _rows())
    unify(tool)
    return roots


def _break(tool: Tool, *paths: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = tool("vpool", "break", *paths)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_a_private_copy_is_equal_and_can_be_written(site: Site, tool: Tool) -> None:
    web, db = _add_unified(site, tool)
    before, other = snapshot(web), snapshot(db)
    paths = [web / path for path in ("etc/conf", "bin/ping", "holes")]
    said = _break(tool, *paths).stdout
    assert said == "".join(f"{path}: broken\n" for path in paths)
    assert differences(before, snapshot(web)) == []
    for path in paths:
        assert path.stat().st_nlink == 1
        assert not is_immutable(path)
        path.write_text("mine")
    assert differences(other, snapshot(db)) == []
    assert inode_of(web / "etc/other") == inode_of(db / "etc/other")
    assert find_faults(site.pool) == []


@on("ext4")
def test_what_is_private_already_is_said_and_left(site: Site, tool: Tool) -> None:
    web, _ = _add_unified(site, tool)
    (web / "new").write_text("mine")
    before = stamps(web)
    assert _break(tool, web / "new").stdout == f"{web}/new: private already\n"
    assert stamps(web) == before


@on("ext4")
def test_what_is_no_file_is_named_and_the_rest_is_done(site: Site, tool: Tool) -> None:
    web, _ = _add_unified(site, tool)
    subprocess.run(["chattr", "+i", web / "fifo"], check=False, capture_output=True)
    strange = [web / name for name in ("conf", "etc", "fifo", "missing")]
    done = _break(tool, *strange, web / "etc/conf", code=20)
    assert done.stdout == f"{web}/etc/conf: broken\n"
    for path in strange:
        assert f"vpool: {path}: " in done.stderr
    assert _break(tool, web / "conf", code=1).stderr.endswith(
        "is a symlink, which is not followed\n"
    )


@on("ext4")
def test_an_administrators_own_immutable_file_is_left(site: Site, tool: Tool) -> None:
    web, _ = _add_unified(site, tool)
    (web / "new").write_text("mine")
    subprocess.run(["chattr", "+i", web / "new"], check=True)
    assert "no object of this pool" in _break(tool, web / "new", code=1).stderr
    assert is_immutable(web / "new")


@on("ext4")
def test_a_quarantined_file_is_left_to_repair(site: Site, tool: Tool) -> None:
    web, _ = _add_unified(site, tool)
    spoil(web / "etc/conf")
    assert tool("vpool", "verify", "--repair").returncode == 5
    assert "verify --repair" in _break(tool, web / "etc/conf", code=1).stderr


@on("ext4")
def test_undo_names_what_it_leaves_in_quarantine(site: Site, tool: Tool) -> None:
    web, _ = _add_unified(site, tool)
    spoil(web / "etc/conf")
    assert tool("vpool", "verify", "--repair").returncode == 5
    done = tool("vunify", "--undo", "web")
    assert done.returncode == 20, done.stderr
    assert f"{web}/etc/conf: stays shared: " in done.stderr
    assert not is_immutable(web / "bin/ping")


@on("ext4")
def test_odd_names_and_relative_paths(
    site: Site, tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("web", "db"):
        site.add_guest(name, odd_tree())
    unify(tool)
    before = snapshot(site.root("db"))
    monkeypatch.chdir(site.root("web"))
    paths = [Path(os.fsdecode(name + b"/" + name)) for name in NAMES]
    done = _break(tool, "--", *paths, f"{paths[0].parent}/./../{paths[1]}")
    assert done.stdout.count(": broken\n") == len(NAMES)
    assert done.stdout.count(": private already\n") == 1
    assert "\x1b" not in done.stdout
    assert all(path.stat().st_nlink == 1 for path in paths)
    assert differences(before, snapshot(site.root("db"))) == []


# --- where a path leads


@on("ext4")
def test_links_of_a_guest_mean_what_they_mean_to_it(site: Site, tool: Tool) -> None:
    web, db = _add_unified(site, tool)
    _break(tool, web / "settings/conf")
    assert inode_of(web / "etc/conf") != inode_of(db / "etc/conf")
    (web / "sibling").symlink_to("../db")
    (web / "absolute").symlink_to(db)
    for path in (web / "sibling/etc/other", web / "absolute/etc/other", web / "../db/etc/none"):
        _break(tool, path, code=1)
    (web / "up").symlink_to("..")
    _break(tool, web / "up/up/up/etc/other")
    assert inode_of(web / "etc/other") != inode_of(db / "etc/other")
    assert is_immutable(db / "etc/other")


@on("ext4")
def test_links_of_the_host_lead_to_the_guest(site: Site, tool: Tool) -> None:
    web, db = _add_unified(site, tool)
    (site.filesystem.folder / "short").symlink_to("guests/web/etc")
    _break(tool, site.filesystem.folder / "short/conf")
    _break(tool, web / "etc/../etc/./other")
    assert inode_of(web / "etc/conf") != inode_of(db / "etc/conf")
    assert inode_of(web / "etc/other") != inode_of(db / "etc/other")


@on("ext4")
def test_a_plain_tree_needs_no_lock(site: Site, tool: Tool) -> None:
    web, db = _add_unified(site, tool)
    plain = grow(site.filesystem.folder / "plain", _rows())
    unify(tool, "--root", plain, "--offline")
    assert inode_of(plain / "etc/conf") == inode_of(web / "etc/conf")
    _break(tool, plain / "etc/conf")
    assert inode_of(plain / "etc/conf") not in (inode_of(web / "etc/conf"), inode_of(db / "etc"))
    assert find_faults(site.pool) == []


@on("ext4")
@need("cgroup_freezer")
def test_in_a_running_guest_it_is_done_while_that_is_frozen(
    site: Site, tool: Tool, cgroup: Path
) -> None:
    web, db = _add_unified(site, tool)
    before = snapshot(web)
    paths = [web / path for path in ("etc/conf", "etc/other", "bin/ping")]
    with running(site, "web", cgroup, BUSY) as guest:
        done = run_watched(cgroup, vpool.main, "break", *paths)
        assert (done.code, guest.poll()) == (0, None), done.output
        assert not is_frozen(cgroup)
    assert done.notes == ["frozen"] * 3
    assert differences(before, snapshot(web)) == []
    assert inode_of(web / "etc/conf") != inode_of(db / "etc/conf")
    assert find_faults(site.pool) == []


@on("ext4")
def test_without_a_pool_the_command_line_is_wrong(site: Site, tool: Tool) -> None:
    web = site.add_guest("web", _rows())
    assert "no pool" in _break(tool, web / "etc/conf", code=2).stderr


# --- death


@pytest.mark.timeout(1800 if is_soak() else 120)
def test_killed_after_any_step_it_loses_nothing(site: Site, tool: Tool) -> None:
    rows: list[Row] = [File(f"lib/{number}", b"content %d" % number * 9) for number in range(2)]
    web, db = site.add_guest("web", rows), site.add_guest("db", rows)
    unify(tool)
    before = snapshot(web)
    paths = [web / "lib/0", web / "lib/1"]
    steps = len(run_killed(0, vpool.main, "break", *paths).notes)
    assert steps > 15
    for turn in turns(steps, site):
        unify(tool)
        run_killed(turn, vpool.main, "break", *paths)
        again = snapshot(web)
        assert differences(before, again, ignoring={"inode", "links", "blocks", "mtime_ns"}) == []
        assert all(path.lstat().st_mtime_ns == EPOCH_NS for path in paths)
        _break(tool, *paths)
        assert all(not is_immutable(path) for path in paths)
        assert all(is_immutable(db / f"lib/{number}") for number in range(2))
        assert len(list_objects(site.pool)) == 2
        assert find_faults(site.pool) == []
