"""vhashify: the original's spelling of vunify."""

import json
import os
from pathlib import Path

from tests.conftest import Tool
from tests.fixtures.filesystems import Site, is_immutable
from tests.fixtures.probes import need, on
from tests.fixtures.runs import find_faults, inode_of, inodes, list_objects
from tests.fixtures.trees import EPOCH_NS, File, Row, differences, grow, snapshot
from vstore.errors import GuestNotFound, WrongUsage

pytestmark = [need("root", "immutable", "lease"), on("ext4")]


def _system() -> list[Row]:
    return [
        File("bin/tool", b"ELF" * 999, mode=0o755),
        File("etc/conf", b"a setting = a value\n" * 9),
        File("small", b"too small"),
    ]


def _hashify(tool: Tool, *arguments: str | Path, code: int = 0) -> str:
    done = tool("vhashify", *arguments)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr if code else done.stdout


def test_guests_hashified_one_after_the_other_share(site: Site, tool: Tool) -> None:
    guests = [site.add_guest(name, _system()) for name in ("web", "db")]
    before = [snapshot(root) for root in guests]
    _hashify(tool, "web")
    assert len(list_objects(site.pool)) == 2
    assert is_immutable(guests[0] / "bin/tool")
    table = _hashify(tool, "db")
    assert len(list_objects(site.pool)) == 2
    assert f"pool {site.pool}" in table
    assert len(set(inodes(site, "bin/tool", "web", "db"))) == 1
    assert [differences(old, snapshot(root)) for root, old in zip(guests, before, strict=True)] == [
        [],
        [],
    ]
    assert find_faults(site.pool) == []


def test_a_file_that_no_other_guest_has_becomes_an_object_too(site: Site, tool: Tool) -> None:
    site.add_guest("web", _system())
    report = json.loads(_hashify(tool, "--json", "web"))
    assert (report["files_unified"], report["objects_new"], report["bytes_reclaimed"]) == (2, 2, 0)
    assert report["skipped"] == {"small": 1}
    report = json.loads(_hashify(tool, "--json", "web"))
    assert (report["files_unified"], report["files_already"]) == (0, 2)


def test_a_dry_run_makes_nothing(site: Site, tool: Tool) -> None:
    root = site.add_guest("web", _system())
    table = _hashify(tool, "--dry-run", "web")
    assert "would be unified" in table
    assert not site.pool.exists()
    assert not is_immutable(root / "bin/tool")


def test_options_without_a_meaning_are_taken_and_said(site: Site, tool: Tool) -> None:
    site.add_guest("web", _system())
    done = tool("vhashify", "-v", "--refresh", "--insecure", "--sledgehammer", "web")
    assert done.returncode == 0, done.stderr
    for option in ("--refresh", "--insecure", "--sledgehammer"):
        assert f"vhashify: {option}: " in done.stderr
    assert "--insecure" not in tool("vhashify", "--insecure", "web").stderr


def test_mtime_can_be_ignored(site: Site, tool: Tool) -> None:
    site.add_guest("web", [File("file", b"a" * 99)])
    site.add_guest("db", [File("file", b"a" * 99, mtime_ns=EPOCH_NS + 10**9)])
    for name in ("web", "db"):
        _hashify(tool, "--ignore-mtime", name)
    assert len(set(inodes(site, "file", "web", "db"))) == 1
    assert (site.root("db") / "file").stat().st_mtime_ns == EPOCH_NS


def test_the_guests_own_list_holds(site: Site, tool: Tool) -> None:
    root = site.add_guest("web", _system())
    site.configure("web", "apps/vunify/exclude", "/bin/*\n")
    _hashify(tool, "web")
    assert is_immutable(root / "etc/conf")
    assert not is_immutable(root / "bin/tool")


def test_a_folder_of_links_names_the_pool_of_the_file_system(site: Site, tool: Tool) -> None:
    site.add_guest("web", _system())
    hash_folder, pool = site.filesystem.folder / "hash", site.filesystem.folder / "store"
    hash_folder.mkdir()
    pool.mkdir()
    (hash_folder / "elsewhere").symlink_to("/proc")
    (hash_folder / "here").symlink_to(pool)
    (hash_folder / "method").write_text("sha1\n")
    _hashify(tool, "--destination", hash_folder, "web")
    assert len(list_objects(pool)) == 2
    assert not site.pool.exists()
    _hashify(tool, "--destination", pool, "web")  # a pool of ours is named itself too
    assert not (pool / "objects" / "objects").exists()


def test_a_second_pool_on_one_file_system_is_said_and_not_used(site: Site, tool: Tool) -> None:
    site.add_guest("web", _system())
    hash_folder = site.filesystem.folder / "hash"
    for name in ("a", "b"):
        (hash_folder / name).mkdir(parents=True)
    done = tool("vhashify", "--destination", hash_folder, "web")
    assert done.returncode == 0, done.stderr
    assert f"{hash_folder}/b: a second pool" in done.stderr
    assert (list(hash_folder.glob("b/*")), len(list_objects(hash_folder / "a"))) == ([], 2)


def test_a_folder_without_a_pool_of_the_file_system_is_refused(site: Site, tool: Tool) -> None:
    site.add_guest("web", _system())
    hash_folder = site.filesystem.folder / "hash"
    hash_folder.mkdir()
    for place in (hash_folder, hash_folder / "nowhere"):
        message = _hashify(tool, "--destination", place, "web", code=WrongUsage.exit_code)
        assert os.fspath(place) in message
        assert "hint: " in message


def test_a_tree_is_done_manually_with_a_list_or_without(site: Site, tool: Tool) -> None:
    rules = site.filesystem.folder / "rules"
    rules.write_text("/bin")  # the last line counts without a newline too
    listed, all_of_it = (grow(site.vdirbase / name, _system()) for name in ("one", "two"))
    pool = site.pool
    pool.mkdir()
    (site.filesystem.folder / "hash").mkdir()
    (site.filesystem.folder / "hash" / "pool").symlink_to(pool)
    to_pool = ("--manually", "--destination", site.filesystem.folder / "hash")
    _hashify(tool, *to_pool, listed, rules)
    assert [is_immutable(listed / name) for name in ("bin/tool", "etc/conf")] == [False, True]
    _hashify(tool, *to_pool, all_of_it, "")
    assert is_immutable(all_of_it / "bin/tool")
    assert inode_of(listed / "etc/conf") == inode_of(all_of_it / "etc/conf")


def test_wrong_arguments_are_named(site: Site, tool: Tool) -> None:
    root = site.add_guest("web", _system())
    usage = WrongUsage.exit_code
    assert "one guest at a time" in _hashify(tool, "web", "db", code=usage)
    assert "--destination" in _hashify(tool, "--manually", root, "", code=usage)
    assert "tree and an exclude list" in _hashify(
        tool, "--manually", "--destination", site.pool, root, code=usage
    )
    assert "nobody" in _hashify(tool, "nobody", code=GuestNotFound.exit_code)
