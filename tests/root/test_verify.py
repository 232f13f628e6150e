"""vpool verify finds whatever is wrong with an object; --repair gives the guests good content."""

import fcntl
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests.conftest import Tool
from tests.fixtures.death import add_orphan, run_killed, run_watched, spoil, thawed_by_force, turns
from tests.fixtures.filesystems import Site, is_immutable
from tests.fixtures.hostile import writer
from tests.fixtures.probes import is_soak, need, on, scaled
from tests.fixtures.running import BUSY, is_frozen, running
from tests.fixtures.runs import find_faults, inode_of, list_objects, undo, unify
from tests.fixtures.stepper import command, run_traced
from tests.fixtures.trees import (
    EPOCH_NS,
    MAY_DIFFER,
    File,
    Folder,
    Row,
    differences,
    grow,
    snapshot,
)
from vstore.commands import vpool

pytestmark = need("immutable", "lease")

_XATTRS = {"user.key": b"value", "trusted.key": bytes(99)}


def _rows() -> list[Row]:
    return [
        Folder("etc", mtime_ns=5),
        File("etc/conf", b"a setting\n" * 99, mode=0o640, uid=3),
        File("etc/twin", b"a setting\n" * 99, mode=0o640, uid=3),
        File("lib/one", b"ELF 1" * 99, mode=0o6755, uid=5, xattrs=_XATTRS),
        File("lib/two", b"ELF 2" * 99),
        File("lib/holes", b"middle" * 999, at=1 << 20, size=3 << 20),
    ]


def _add_unified(site: Site, tool: Tool, *names: str) -> list[Path]:
    roots = [site.add_guest(name, _rows()) for name in names or ("web", "db")]
    unify(tool)
    return roots


def _verify(tool: Tool, *arguments: str | Path, code: int = 0) -> dict[str, Any]:
    done = tool("vpool", "verify", "--json", *arguments)
    assert done.returncode == code, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def _files(fault: dict[str, Any], key: str = "files") -> list[tuple[str, str]]:
    return sorted((file["guest"], file["path"]) for file in fault[key])


def _same(*snapshots: dict[bytes, Any]) -> bool:
    first, *others = snapshots
    return all(differences(first, other) == [] for other in others)


# --- finding


def test_a_sound_pool_is_good(site: Site, tool: Tool) -> None:
    _add_unified(site, tool)
    report = _verify(tool)
    assert (report["objects"], report["faults"]) == (5, [])
    assert report["bytes"] == sum(path.stat().st_size for path in list_objects(site.pool))
    assert tool("vpool", "verify").stdout.endswith(": all good\n")


def _truncate(path: Path) -> None:
    os.truncate(path, 0)
    os.utime(path, ns=(EPOCH_NS, EPOCH_NS))


_DAMAGE: dict[str, Callable[[Path], None]] = {
    "content": lambda path: spoil_thawed(path),
    "size, content": _truncate,
    "mode": lambda path: path.chmod(0o4755),
    "owner": lambda path: os.chown(path, 1, 3),
    "modification time": lambda path: os.utime(path, ns=(EPOCH_NS, EPOCH_NS + 1)),
    "extended attributes": lambda path: os.setxattr(path, "user.new", b"1"),
}


def spoil_thawed(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"!")
    os.utime(path, ns=(EPOCH_NS, EPOCH_NS))


@on("ext4")
@pytest.mark.parametrize("what", _DAMAGE)
def test_every_kind_of_damage_is_named_with_its_users(site: Site, tool: Tool, what: str) -> None:
    web, _ = _add_unified(site, tool)
    path = web / "lib/two"
    with thawed_by_force(path):
        _DAMAGE[what](path)
    (fault,) = _verify(tool, code=5)["faults"]
    assert fault["reason"] == f"not as its name says: {what}"
    assert (site.pool / fault["object"]).samefile(path)
    assert _files(fault) == [("db", "lib/two"), ("web", "lib/two")]
    said = tool("vpool", "verify").stdout
    assert fault["object"] in said
    assert "  used by web: /lib/two\n" in said


@on("ext4")
@pytest.mark.parametrize("what", _DAMAGE)
def test_every_kind_of_damage_is_repaired_from_another_guest(
    site: Site, tool: Tool, what: str
) -> None:
    web, _ = _add_unified(site, tool)
    before = snapshot(web)
    assert tool("vpool", "break", web / "lib/two").returncode == 0
    with thawed_by_force(site.root("db") / "lib/two"):
        _DAMAGE[what](site.root("db") / "lib/two")
    (fault,) = _verify(tool, "--repair", code=0)["faults"]
    assert fault["repaired"]
    assert _same(before, snapshot(web), snapshot(site.root("db")))
    assert _verify(tool)["faults"] == []
    assert tool("vpool", "reclaim").returncode == 0
    assert find_faults(site.pool) == []


@on("ext4")
def test_what_is_no_object_is_named(site: Site, tool: Tool) -> None:
    _add_unified(site, tool)
    (site.pool / "objects/00/strange").write_text("mine")
    (fault,) = _verify(tool, code=5)["faults"]
    assert fault["object"] == "objects/00/strange"
    assert "no object's" in fault["reason"]
    assert _verify(tool, "--repair", code=0)["faults"][0]["outcome"] == "put in quarantine"
    assert _verify(tool)["faults"] == []


@on("ext4")
def test_names_in_plain_trees_are_found_where_they_are_named(site: Site, tool: Tool) -> None:
    _add_unified(site, tool)
    plain = grow(site.filesystem.folder / "plain", _rows())
    unify(tool, "--root", plain, "--offline")
    spoil(plain / "lib/two")
    (fault,) = _verify(tool, code=5)["faults"]
    assert (len(fault["files"]), fault["links"]) == (2, 3)
    assert "1 names that were not found" in tool("vpool", "verify").stdout
    (fault,) = _verify(tool, "--root", plain, code=5)["faults"]
    assert (f"{plain}", "lib/two") in _files(fault)


# --- repairing


def test_a_thawed_object_is_frozen_again(site: Site, tool: Tool) -> None:
    web, _ = _add_unified(site, tool)
    number = inode_of(web / "lib/two")
    subprocess.run(["chattr", "-i", web / "lib/two"], check=True)
    assert _verify(tool, code=5)["faults"][0]["reason"] == "it is not immutable"
    assert not is_immutable(web / "lib/two")
    (fault,) = _verify(tool, "--repair")["faults"]
    assert (fault["outcome"], fault["repaired"]) == ("frozen again", True)
    assert is_immutable(web / "lib/two")
    assert inode_of(web / "lib/two") == number
    assert find_faults(site.pool) == []


@on("ext4")
def test_a_thawed_object_that_is_open_for_writing_is_not_frozen(site: Site, tool: Tool) -> None:
    web, db = _add_unified(site, tool)
    before = snapshot(db)
    good = site.add_guest("new", _rows())
    subprocess.run(["chattr", "-i", web / "lib/two"], check=True)
    with writer(web / "lib/two"):
        number = inode_of(web / "lib/two")
        (fault,) = _verify(tool, "--repair")["faults"]
        assert fault["object"].startswith("quarantine/")
        assert inode_of(web / "lib/two") == inode_of(db / "lib/two") != number
    assert inode_of(good / "lib/two") != inode_of(db / "lib/two")
    assert _same(before, snapshot(web), snapshot(db))
    assert _verify(tool)["faults"] == []


def test_a_damaged_object_is_replaced_in_every_guest(site: Site, tool: Tool) -> None:
    roots = _add_unified(site, tool, "web", "db", "mail")
    before = snapshot(roots[0])
    site.add_guest("new", _rows())
    paths = ["etc/conf", "lib/one", "lib/holes"]
    numbers = {path: inode_of(roots[0] / path) for path in paths}
    for path in paths:
        spoil(roots[0] / path)
    report = _verify(tool, "--repair")
    assert len(report["faults"]) == 3
    for fault in report["faults"]:
        assert (fault["repaired"], fault["links"], len(fault["files"])) == (True, 0, 3)
    assert _same(before, *map(snapshot, roots))
    for path in paths:
        shared = {inode_of(root / path) for root in roots}
        assert len(shared) == 1
        assert shared != {numbers[path]}
        assert is_immutable(roots[0] / path)
    assert inode_of(roots[0] / "etc/conf") != inode_of(roots[0] / "etc/twin")
    assert _verify(tool)["faults"] == []
    assert tool("vpool", "reclaim").returncode == 0
    assert find_faults(site.pool) == []


@on("ext4")
def test_another_object_of_the_same_content_is_a_good_copy(site: Site, tool: Tool) -> None:
    web, db = _add_unified(site, tool)  # the twin is that object
    before = snapshot(web)
    spoil(web / "etc/twin")
    assert _verify(tool, "--repair")["faults"][0]["repaired"]
    assert _same(before, snapshot(web), snapshot(db))
    assert inode_of(web / "etc/conf") != inode_of(web / "etc/twin")


@on("ext4")
def test_a_copy_with_other_metadata_is_good_enough(site: Site, tool: Tool) -> None:
    web, db = _add_unified(site, tool)
    before = snapshot(web)
    site.add_guest("new", [File("moved", b"ELF 1" * 99, mtime_ns=1)])
    spoil(web / "lib/one")
    assert _verify(tool, "--repair")["faults"][0]["repaired"]
    assert _same(before, snapshot(web), snapshot(db))


@on("ext4")
def test_without_a_good_copy_it_is_named_until_there_is_one(site: Site, tool: Tool) -> None:
    web, db = _add_unified(site, tool)
    before = snapshot(web)
    spoil(web / "lib/two")
    for _ in range(2):
        (fault,) = _verify(tool, "--repair", code=5)["faults"]
        assert fault["object"].startswith("quarantine/")
        assert not fault["repaired"]
        assert _files(fault, "left") == [("db", "lib/two"), ("web", "lib/two")]
        assert is_immutable(web / "lib/two")
    assert _verify(tool, code=5)["faults"][0]["reason"] == "it is in quarantine, and still in use"
    assert tool("vpool", "reclaim").stdout.startswith("0 objects freed")
    site.add_guest("new", _rows())
    assert _verify(tool, "--repair")["faults"][0]["repaired"]
    assert _same(before, snapshot(web), snapshot(db))
    assert _verify(tool)["faults"] == []


@on("ext4")
def test_the_same_object_can_go_bad_again(site: Site, tool: Tool) -> None:
    web, db = _add_unified(site, tool)
    before = snapshot(web)
    site.add_guest("new", _rows())
    for _ in range(3):
        spoil(web / "lib/two")
        assert _verify(tool, "--repair")["faults"][0]["repaired"]
        assert _same(before, snapshot(web), snapshot(db))
    assert len(list((site.pool / "quarantine").iterdir())) == 3
    assert tool("vpool", "reclaim").stdout.endswith("3 out of quarantine among them\n")


@on("ext4")
def test_a_damaged_object_that_nobody_uses_is_put_away(site: Site, tool: Tool) -> None:
    _add_unified(site, tool)
    orphan = add_orphan(site, b"nobody's" * 9)
    spoil(orphan)
    (fault,) = _verify(tool, "--repair")["faults"]
    assert (fault["outcome"], fault["repaired"]) == ("put in quarantine", True)
    assert not orphan.exists()


@on("ext4")
@need("cgroup_freezer")
def test_a_running_guest_is_repaired_while_it_is_frozen(
    site: Site, tool: Tool, cgroup: Path
) -> None:
    web, db = _add_unified(site, tool)
    before = snapshot(web)
    site.add_guest("new", _rows())
    spoil(web / "lib/two")
    with running(site, "web", cgroup, BUSY) as guest:
        done = run_watched(cgroup, vpool.main, "verify", "--repair")
        assert (done.code, guest.poll()) == (0, None), done.output
        assert not is_frozen(cgroup)
    assert sorted(done.notes) == ["frozen", "running", "running"]  # web; db, the quarantine
    assert _same(before, snapshot(web), snapshot(db))
    assert find_faults(site.pool)[:-1] == []


@on("ext4")
def test_a_guest_that_another_program_holds_is_named_and_done_later(
    site: Site, tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    web, db = _add_unified(site, tool)
    before = snapshot(web)
    site.add_guest("new", _rows())
    spoil(web / "lib/two")
    folder = site.rundir / "web"
    folder.mkdir(mode=0o700, exist_ok=True)
    monkeypatch.setattr("vstore.hold._WAIT_S", 0.1)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run_traced(command(vpool.main, "verify", "--repair"))
    assert done.code == 5
    assert "left: web: /lib/two: the guest could not be held" in done.output
    assert differences(before, snapshot(db)) == []
    assert _verify(tool, "--repair")["faults"][0]["repaired"]
    assert _same(before, snapshot(web), snapshot(db))


@on("ext4")
def test_an_equal_object_that_the_guest_has_no_link_to_is_used(site: Site, tool: Tool) -> None:
    web, db = _add_unified(site, tool)
    spoil(web / "lib/two")
    for name in ("new", "newer"):
        site.add_guest(name, _rows())
    unify(tool, "new", "newer")  # takes the damaged object out of use and makes a good one
    number = inode_of(site.root("new") / "lib/two")
    assert _verify(tool, "--repair")["faults"][0]["repaired"]
    assert inode_of(web / "lib/two") == inode_of(db / "lib/two") == number


def test_unifying_never_gives_a_damaged_object_to_a_new_guest(site: Site, tool: Tool) -> None:
    web, db = _add_unified(site, tool)
    before = snapshot(web)
    for path in ("etc/conf", "lib/one"):
        spoil(web / path)
    new = site.add_guest("new", _rows())
    unify(tool, "new")
    assert differences(before, snapshot(new)) == []
    assert len(list((site.pool / "quarantine").iterdir())) == 2
    report = _verify(tool, "--repair")
    assert [fault["repaired"] for fault in report["faults"]] == [True, True]
    assert _same(before, snapshot(web), snapshot(db), snapshot(new))
    assert _verify(tool)["faults"] == []


# --- at the same time, and death


@on("ext4")
def test_windows_of_others_are_no_faults(site: Site, tool: Tool) -> None:
    names = ("web", "db")
    for name in names:
        site.add_guest(name, [File(f"{number}", b"%d" % number * 99) for number in range(300)])
    unify(tool)
    wrong: list[str] = []

    def loop() -> None:
        for _ in range(scaled(3, 30)):
            undo(tool, "web")
            unify(tool)

    thread = Thread(target=loop)
    thread.start()
    while thread.is_alive():
        done = tool("vpool", "verify")
        if done.returncode:
            wrong.append(done.stdout + done.stderr)
    thread.join()
    assert wrong == []


@pytest.mark.timeout(1800 if is_soak() else 120)
def test_killed_after_any_step_of_a_repair_nothing_gets_worse(site: Site, tool: Tool) -> None:
    rows: list[Row] = [File("conf", b"a setting" * 99), File("other", b"another" * 99)]
    web, db = site.add_guest("web", rows), site.add_guest("db", rows)
    site.add_guest("good", [File("elsewhere", b"a setting" * 99)])
    unify(tool, "web", "db")
    before = snapshot(web)
    spoil(web / "conf")
    steps = len(run_killed(0, vpool.main, "verify", "--repair").notes)
    assert steps > 30
    for turn in turns(steps, site, of=5):
        spoil(web / "conf")
        bad = (web / "conf").read_bytes()
        run_killed(turn, vpool.main, "verify", "--repair")
        for root in (web, db):
            assert (root / "conf").read_bytes() in (bad, b"a setting" * 99)
            assert (root / "other").read_bytes() == b"another" * 99
        _verify(tool, "--repair")
        for root in (web, db):  # the death may cost the time of a folder
            lost = differences(before, snapshot(root), ignoring=MAY_DIFFER | {"mtime_ns"})
            assert lost == []
            assert (root / "conf").stat().st_mtime_ns == EPOCH_NS
        assert _verify(tool)["faults"] == []
        assert is_immutable(web / "conf")
        assert inode_of(web / "conf") == inode_of(db / "conf")
        assert tool("vpool", "reclaim").returncode == 0
        assert find_faults(site.pool) == []
