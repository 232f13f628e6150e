"""vclone makes a tree that no guest could tell from its source, mostly of links."""

import json
import os
import signal
import stat
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Tool
from tests.fixtures.death import run_killed, turns
from tests.fixtures.filesystems import (
    Site,
    free_bytes,
    is_immutable,
    mount_image,
    private_folder,
)
from tests.fixtures.hostile import deep_path, odd_tree, writer
from tests.fixtures.probes import is_soak, need, on
from tests.fixtures.running import IDLE, running
from tests.fixtures.runs import find_faults, inode_of, list_objects, stamps, unify
from tests.fixtures.stepper import Scene, Step, command, run_traced
from tests.fixtures.trees import (
    COPY_MAY_DIFFER,
    EPOCH_NS,
    File,
    Folder,
    Link,
    Row,
    Special,
    Symlink,
    acl,
    capability,
    differences,
    grow,
    snapshot,
)
from vstore.commands import vclone

pytestmark = need("immutable", "lease")

_DEFAULT_ACL = {"system.posix_acl_default": acl(owner=7, group=5, other=0, users={1000: 7})}
_XATTRS = {
    "security.capability": capability(13),
    "system.posix_acl_access": acl(owner=7, group=5, other=5, users={1000: 7}),
    "user.key": b"value",
    "trusted.key": bytes(99),
}


def _rows() -> list[Row]:
    return [
        Folder("", mode=0o750, uid=1, gid=2, mtime_ns=7),
        Folder("etc", mode=0o2750, gid=9, mtime_ns=5, xattrs={"user.folder": b"x"}),
        File("etc/conf", b"a setting\n" * 99, mode=0o600, uid=3, mtime_ns=EPOCH_NS + 1),
        File("etc/twin", b"a setting\n" * 99, mode=0o600, uid=3, mtime_ns=EPOCH_NS + 1),
        File("bin/ping", b"ELF" * 99, mode=0o755, xattrs=_XATTRS),
        File("bin/su", b"ELF" * 99, mode=0o6755, uid=5, gid=6, mtime_ns=-1),
        File("holes", b"middle" * 999, at=1 << 20, size=5 << 20),
        File("nothing", mode=0o4711),
        Folder("shared", xattrs=_DEFAULT_ACL, mtime_ns=3),
        File("shared/file", b"small"),
        Folder("shared/below"),
        Special("shared/fifo", stat.S_IFIFO, mode=0o620, gid=5),
        *odd_tree(),
    ]


def _private_rows() -> list[Row]:
    """What only one guest has, or what is never unified."""
    return [
        File("own/file", b"mine alone" * 99, mode=0o4755, uid=8, xattrs=_XATTRS),
        File("own/holes", b"x" * 9999, at=3 << 20, size=9 << 20),
        File("linked", b"x" * 99),
        Link("etc/linked too", "linked"),
        Link("own/linked", "linked"),
        Symlink("own/link", "/nowhere", uid=4, mtime_ns=9),
        Link("own/link too", "own/link"),
        Special("own/null", stat.S_IFCHR, (1, 3), mode=0o666),
        Special("own/disk", stat.S_IFBLK, (7, 200), mode=0o640, gid=6),
        Special("own/fifo", stat.S_IFIFO, mode=0o600),
        Link("own/fifo too", "own/fifo"),
    ]


def _add_unified(site: Site, tool: Tool) -> Path:
    root = site.add_guest("web", [*_rows(), *_private_rows()])
    site.add_guest("db", _rows())
    unify(tool)
    return root


def _clone(tool: Tool, *arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = tool("vclone", *arguments)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def _leftovers(site: Site) -> list[Path]:
    return [path for path in site.vdirbase.iterdir() if ".clone-" in path.name]


def test_a_clone_is_equal_and_shares_what_is_unified(site: Site, tool: Tool) -> None:
    source, target = _add_unified(site, tool), site.root("new")
    before = snapshot(source)
    report = json.loads(_clone(tool, "web", target, "--json").stdout)
    after = snapshot(target)
    assert differences(before, after, ignoring=COPY_MAY_DIFFER) == []
    assert snapshot(source).keys() == before.keys()
    assert differences(before, snapshot(source)) == []
    numbers = {path.stat().st_ino for path in list_objects(site.pool)}
    shared = [path for path, entry in before.items() if entry.inode in numbers]
    assert shared
    assert [path for path in shared if after[path].inode != before[path].inode] == []
    assert report["linked"] == len(shared)
    assert (report["errors"], report["skipped"]) == ([], {})
    assert not is_immutable(target / "own/file")
    assert (target / "own/holes").stat().st_blocks * 512 < 1 << 20
    assert find_faults(site.pool) == []
    assert tool("vpool", "verify").returncode == 0


def test_a_clone_of_a_unified_tree_takes_hardly_any_space(site: Site, tool: Tool) -> None:
    rows = [File(f"{number}", os.urandom(1 << 20)) for number in range(12)]
    for name in ("web", "db"):
        site.add_guest(name, rows)
    unify(tool)
    free = free_bytes(site.vdirbase)
    _clone(tool, "web", site.root("new"))
    assert free - free_bytes(site.vdirbase) < 1 << 20


@on("ext4")
def test_a_clone_can_be_cloned_and_unified(site: Site, tool: Tool) -> None:
    source = _add_unified(site, tool)
    (source / "own/fresh").write_bytes(b"made since" * 9)
    _clone(tool, "web", site.root("one"))
    _clone(tool, f"{site.root('one')}/", site.root("two"))
    before = snapshot(source)
    for name in ("one", "two"):
        site.register(name, site.root(name))
        assert differences(before, snapshot(site.root(name)), ignoring=COPY_MAY_DIFFER) == []
    unify(tool)
    assert len({inode_of(site.root(name) / "own/fresh") for name in ("web", "one", "two")}) == 1
    assert differences(before, snapshot(source)) == []


@on("ext4")
def test_sockets_and_what_is_mounted_are_left_out(site: Site, tool: Tool) -> None:
    root = site.add_guest("web", [*_rows(), Special("socket", stat.S_IFSOCK), Folder("mnt")])
    site.add_guest("db", _rows())
    unify(tool)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0711", "none", root / "mnt"], check=True)
    try:
        (root / "mnt/file").write_text("not the guest's")
        report = json.loads(_clone(tool, "web", site.root("new"), "--json").stdout)
    finally:
        subprocess.run(["umount", root / "mnt"], check=True)
    assert report["skipped"] == {"other-mount": 1, "socket": 1}
    assert list((site.root("new") / "mnt").iterdir()) == []
    assert not (site.root("new") / "socket").exists()


@on("xfs")
def test_a_tree_deeper_than_a_path_can_be_long(site: Site, tool: Tool) -> None:
    rows = [File(deep_path() + b"/end", b"deep down" * 9)]
    source = site.add_guest("web", rows)
    site.add_guest("db", rows)
    unify(tool)
    _clone(tool, "web", site.root("new"))
    assert snapshot(site.root("new")).keys() == snapshot(source).keys()


@on("ext4")
def test_a_link_limit_ends_in_copies(site: Site, tool: Tool) -> None:
    source = _add_unified(site, tool)
    (path,) = [path for path in list_objects(site.pool) if path.samefile(source / "bin/su")]
    ballast = grow(site.filesystem.folder / "ballast", [])
    subprocess.run(["chattr", "-i", path], check=True)
    for number in range(65_000 - path.stat().st_nlink):
        os.link(path, ballast / f"{number}")
    subprocess.run(["chattr", "+i", path], check=True)
    _clone(tool, "web", site.root("new"))
    found = differences(snapshot(source), snapshot(site.root("new")), ignoring=COPY_MAY_DIFFER)
    assert found == []
    assert inode_of(site.root("new") / "bin/su") != inode_of(source / "bin/su")
    subprocess.run(["chattr", "-i", path], check=True)


@on("ext4")
def test_an_object_that_is_open_for_writing_is_copied(site: Site, tool: Tool) -> None:
    source = _add_unified(site, tool)
    path = source / "bin/su"
    subprocess.run(["chattr", "-i", path], check=True)
    with writer(path):
        subprocess.run(["chattr", "+i", path], check=True)
        _clone(tool, "web", site.root("new"))
    found = differences(snapshot(source), snapshot(site.root("new")), ignoring=COPY_MAY_DIFFER)
    assert found == []
    assert inode_of(site.root("new") / "bin/su") != inode_of(path)


# --- what is refused


@on("ext4")
def test_a_target_that_cannot_be_is_refused(site: Site, tool: Tool) -> None:
    source = _add_unified(site, tool)
    full = grow(site.root("full"), [File("file")])
    (site.vdirbase / "link").symlink_to("web")
    (site.vdirbase / "file").write_text("mine")
    before = stamps(site.vdirbase)
    elsewhere = Path("/dev/shm") / "vtest-clone"  # noqa: S108 - it must not be made
    wrong = [full, source, source / "new", site.pool / "new", site.vdirbase / "link"]
    wrong += [site.vdirbase / "file", site.vdirbase / "none/new", elsewhere, Path("/")]
    for target in wrong:
        assert _clone(tool, "web", target, code=2).stderr.startswith("vclone: "), target
    assert not elsewhere.exists()
    assert stamps(site.vdirbase) == before


@on("ext4")
def test_an_empty_folder_is_replaced(site: Site, tool: Tool) -> None:
    source = _add_unified(site, tool)
    site.root("new").mkdir(mode=0o700)
    _clone(tool, "web", site.root("new"))
    found = differences(snapshot(source), snapshot(site.root("new")), ignoring=COPY_MAY_DIFFER)
    assert found == []


@on("ext4")
def test_sources_that_cannot_be_are_refused(site: Site, tool: Tool) -> None:
    _add_unified(site, tool)
    assert _clone(tool, "none", site.root("new"), code=3).stderr
    assert _clone(tool, f"{site.vdirbase}/none", site.root("new"), code=3).stderr
    beside = site.filesystem.folder / "new"
    assert "pool" in _clone(tool, f"{site.vdirbase}/", beside, code=2).stderr
    assert not site.root("new").exists()


@on("ext4")
@need("cgroup_freezer")
def test_a_guest_that_runs_is_refused(site: Site, tool: Tool, cgroup: Path) -> None:
    source = _add_unified(site, tool)
    with running(site, "web", cgroup, IDLE):
        for name in ("web", f"{source}"):
            assert "runs" in _clone(tool, name, site.root("new"), code=4).stderr
    assert not site.root("new").exists()
    assert _leftovers(site) == []


# --- death and other ends


@on("ext4")
def test_without_room_nothing_is_left(site: Site, tool: Tool) -> None:
    with private_folder() as folder:
        mount = mount_image("ext4", folder, size=64 << 20)
        shared: list[Row] = [File(f"{number}", b"%d " % number * 999) for number in range(400)]
        private = [File(f"own/{number}", os.urandom(1 << 20)) for number in range(28)]
        grow(mount / "web", [*shared, *private])
        grow(mount / "db", shared)
        pool = ["--pool", str(mount / "pool")]
        unify(tool, "--root", mount / "web", "--root", mount / "db", "--offline", *pool)
        before = stamps(mount / "db")
        free = free_bytes(mount)
        assert free < 28 << 20
        done = _clone(tool, f"{mount}/web", mount / "new", *pool, code=9)
        assert "no room" in done.stderr
        assert {path.name for path in mount.iterdir()} == {"web", "db", "pool", "lost+found"}
        assert stamps(mount / "db").keys() == before.keys()
        assert free_bytes(mount) == pytest.approx(free, abs=256 << 10)
        assert find_faults(mount / "pool") == []


@on("ext4")
def test_an_interrupted_clone_leaves_nothing(site: Site, tool: Tool) -> None:
    rows: list[Row] = [
        File(f"{number % 50}/{number}", b"%d " % number * 9) for number in range(900)
    ]
    site.add_guest("web", rows)
    unify(tool, "web")
    clone = command(vclone.main, "web", site.root("new"))

    def work() -> int:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return clone()

    def interrupt(step: Step, scene: Scene) -> None:
        if step.pid != scene.first and step.number > 400 and not scene.notes:
            assert _leftovers(site) != []
            scene.notes.append("interrupted")
            os.kill(scene.first, signal.SIGINT)

    done = run_traced(work, interrupt)
    assert done.notes == ["interrupted"], done.output
    assert done.code == 130, done.output
    assert "Traceback" not in done.output
    assert _leftovers(site) == []
    assert not site.root("new").exists()


@pytest.mark.timeout(1800 if is_soak() else 120)
def test_killed_after_any_step_it_leaves_no_target_and_names_what_it_left(
    site: Site, tool: Tool
) -> None:
    rows: list[Row] = [File(f"lib/{number}", b"content %d" % number * 9) for number in range(2)]
    more: list[Row] = [File("own", b"1" * 99), Link("own too", "own"), Folder("empty")]
    source = site.add_guest("web", [*rows, *more])
    site.add_guest("db", rows)
    unify(tool)
    before = snapshot(source)
    target = site.root("new")
    steps = len(run_killed(0, vclone.main, "web", target).notes)
    assert steps > 20
    for turn in turns(steps, site, of=4):
        _remove(tool, target)
        run_killed(turn, vclone.main, "web", target)
        assert differences(before, snapshot(source)) == []
        found = _leftovers(site)
        if target.exists():
            assert found == []
            assert differences(before, snapshot(target), ignoring=COPY_MAY_DIFFER) == []
            continue
        done = _clone(tool, "web", target)
        assert [path for path in found if f"{path}: left by a clone" not in done.stderr] == []
        assert differences(before, snapshot(target), ignoring=COPY_MAY_DIFFER) == []
        for path in found:
            _remove(tool, path)
        assert find_faults(site.pool) == []


def _remove(tool: Tool, path: Path) -> None:
    if path.exists():
        assert tool("vpool", "rm", path).returncode == 0
