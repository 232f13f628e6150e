"""What vfiles lists and saves makes the whole guest again."""

import json
import os
import stat
import subprocess
from dataclasses import replace

import pytest

from tests.conftest import Tool
from tests.fixtures.backups import (
    FULL_TAR,
    lose,
    objects_used,
    own_rows,
    restore,
    save,
    shared_rows,
    shell,
    text,
    unified_pair,
)
from tests.fixtures.filesystems import Site
from tests.fixtures.guests import SMALL, install
from tests.fixtures.hostile import NAMES
from tests.fixtures.probes import need, on
from tests.fixtures.runs import find_faults, inode_of, list_objects, unify
from tests.fixtures.trees import (
    COPY_MAY_DIFFER,
    File,
    Folder,
    Link,
    Row,
    Snapshot,
    Special,
    differences,
    snapshot,
)

pytestmark = need("immutable")


@pytest.fixture
def pair(site: Site, tool: Tool) -> Site:
    """Two unified guests, web and db."""
    return unified_pair(site, tool)


def list_paths(tool: Tool, *options: str) -> list[bytes]:
    done = tool("vfiles", "-0", *options, "web")
    assert done.returncode == 0, done.stderr
    return os.fsencode(done.stdout).split(b"\0")[:-1]


def without_sockets(tree: Snapshot) -> Snapshot:
    return {path: entry for path, entry in tree.items() if entry.kind != "s"}


# --- the list


@on("ext4")
def test_own_and_shared_together_are_all_but_folders_with_something_in_them(
    pair: Site, tool: Tool
) -> None:
    own, shared = list_paths(tool), list_paths(tool, "--shared")
    tree = snapshot(pair.root("web"))
    used = {path.rpartition(b"/")[0] for path in tree}
    wanted = {b"./" + path for path in tree if path not in used}
    assert sorted(own + shared) == sorted(wanted)
    assert set(shared) == {b"./" + path for path in objects_used(pair.root("web"), pair.pool)}
    assert {b"./etc/hostname", b"./own/two", b"./dev/null", b"./etc/link"} <= set(own)
    assert {b"./nothing", b"./srv/a/b/nothing"} <= set(own)
    assert {b"./" + name + b"/" + name for name in NAMES} <= set(shared)


@on("ext4")
def test_without_a_pool_everything_is_the_guests_own(site: Site, tool: Tool) -> None:
    site.add_guest("web", [File("a", text("a")), Folder("b"), File("c/d", text("d"))])
    assert list_paths(tool) == [b"./a", b"./b", b"./c/d"]
    assert list_paths(tool, "--shared") == []


@on("ext4")
def test_a_socket_is_not_listed(site: Site, tool: Tool) -> None:
    site.add_guest("web", [Special("run/socket", stat.S_IFSOCK), File("run/pid", b"1")])
    assert list_paths(tool) == [b"./run/pid"]


@on("ext4")
def test_json_says_kind_and_object(pair: Site, tool: Tool) -> None:
    done = tool("vfiles", "--json", "web")
    found = {record["path"]: record for record in map(json.loads, done.stdout.splitlines())}
    assert found["./dev/fifo"] == {"format": 1, "path": "./dev/fifo", "kind": "fifo"}
    kinds = [found[f"./{path}"]["kind"] for path in ("own/one", "etc/link", "dev/null", "nothing")]
    assert kinds == ["file", "symlink", "device", "folder"]
    done = tool("vfiles", "--json", "--shared", "web")
    names = {path.name: inode_of(path) for path in list_objects(pair.pool)}
    shared = {
        os.fsencode(record["path"][2:]): names[record["object"]]
        for record in map(json.loads, done.stdout.splitlines())
    }
    assert shared == objects_used(pair.root("web"), pair.pool)


# --- backup and restore


@need("acl")
def test_list_and_manifest_make_the_whole_guest_again(pair: Site, tool: Tool) -> None:
    root = pair.root("web")
    before, used = snapshot(root), objects_used(root, pair.pool)
    file = save(pair, tool)
    shell(f"vfiles -0 web | tar --null -T - {FULL_TAR} -czf ../../web.tgz", root)
    root = lose(pair)
    shell("tar --numeric-owner --xattrs --xattrs-include='*' --acls -xpzf ../../web.tgz", root)
    found = restore(tool, file)
    assert found["files_linked"] == len(used)
    assert (found["files_copied"], found["errors"]) == (0, [])
    assert differences(before, snapshot(root), ignoring=COPY_MAY_DIFFER) == []
    assert objects_used(root, pair.pool) == used
    assert find_faults(pair.pool) == []


@on("btrfs")
def test_the_short_pipeline_makes_a_plain_guest_again(site: Site, tool: Tool) -> None:
    second = 1_700_000_000 * 10**9
    plain = [
        replace(row, mtime_ns=second) if not isinstance(row, Link) else row
        for row in [*shared_rows(), *own_rows("web")]
        if isinstance(row, Link) or not row.xattrs
    ]
    folders: list[Row] = [
        Folder(path, mtime_ns=second) for path in ("own", "dev", "srv", "srv/a", "srv/a/b", "twins")
    ]
    for name in ("web", "db"):
        site.add_guest(name, [*folders, *plain])
    unify(tool)
    root = site.root("web")
    before = snapshot(root)
    file = save(site, tool)
    shell("vfiles -0 web | tar --null -T - -czf ../../web.tgz", root)
    shell("tar -xzf ../../web.tgz", lose(site))
    restore(tool, file)
    assert differences(before, snapshot(root), ignoring=COPY_MAY_DIFFER) == []


@on("ext4")
def test_the_archive_holds_what_the_list_says_once_and_nothing_shared(
    pair: Site, tool: Tool
) -> None:
    root = pair.root("web")
    shell("vfiles -0 web | tar --null -T - -czf ../../web.tgz", root)
    shell("vfiles -0 web | tar --null --no-recursion -T - -czf ../../flat.tgz", root)
    listed = sorted(list_paths(tool))
    for archive in ("web.tgz", "flat.tgz"):
        done = subprocess.run(
            ["tar", "--quoting-style=literal", "--null", "-tzf", pair.filesystem.folder / archive],
            capture_output=True,
            check=True,
        )
        packed = [name.rstrip(b"/") for name in done.stdout.split(b"\n")]
        assert len(packed) == len(b"\n".join(listed).split(b"\n")) + 1
        assert set(packed) - {b""} == set(b"\n".join(listed).split(b"\n"))


@on("xfs")
@need("debootstrap")
def test_a_real_guest_is_made_again(site: Site, tool: Tool) -> None:
    for number, name in enumerate(("web", "db"), 1):
        install(SMALL[0], site, name, number=number)
    unify(tool)
    root = site.root("web")
    before = snapshot(root)
    file = save(site, tool)
    shell(f"vfiles -0 web | tar --null -T - {FULL_TAR} -cf ../../web.tar", root)
    assert (site.filesystem.folder / "web.tar").stat().st_size < 20 << 20
    shell("tar --numeric-owner --xattrs --xattrs-include='*' --acls -xf ../../web.tar", lose(site))
    restore(tool, file)
    after = snapshot(root)
    assert differences(without_sockets(before), after, ignoring=COPY_MAY_DIFFER) == []


def test_restoring_again_changes_nothing(pair: Site, tool: Tool) -> None:
    file = save(pair, tool)
    root = lose(pair)
    linked = restore(tool, file)["files_linked"]
    before = snapshot(root)
    found = restore(tool, file)
    assert (found["files_linked"], found["files_present"]) == (0, linked)
    assert differences(before, snapshot(root), ignoring=()) == []


@on("ext4")
def test_a_guest_that_lacks_nothing_is_left_as_it_is(pair: Site, tool: Tool) -> None:
    before = snapshot(pair.root("web"))
    file = save(pair, tool)
    found = restore(tool, file)
    assert (found["files_linked"], found["folders_made"]) == (0, 0)
    assert differences(before, snapshot(pair.root("web")), ignoring=()) == []


@on("ext4")
def test_another_guest_can_be_made_of_a_manifest(pair: Site, tool: Tool) -> None:
    file = save(pair, tool)
    root = pair.add_guest("copy")
    restore(tool, file, "copy")
    assert objects_used(root, pair.pool) == objects_used(pair.root("web"), pair.pool)


@on("xfs")
def test_linked_twins_come_back_linked(site: Site, tool: Tool) -> None:
    for name in ("web", "db"):
        site.add_guest(name, [File("a", text("twin")), File("sub/b", text("twin"))])
    unify(tool, "--all", "--link-twins")
    before = snapshot(site.root("web"))
    file = save(site, tool)
    root = lose(site)
    restore(tool, file)
    assert differences(before, snapshot(root), ignoring=COPY_MAY_DIFFER) == []
    assert before[b"a"].group == (b"a", b"sub/b")
