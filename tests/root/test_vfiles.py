"""A guest's own files and a manifest make the whole guest again, and nothing else."""

import json
import os
import signal
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import Tool
from tests.fixtures.filesystems import Site
from tests.fixtures.guests import SMALL, install
from tests.fixtures.hostile import NAMES, deep_path, odd_tree, writer
from tests.fixtures.probes import need, on, scaled
from tests.fixtures.running import IDLE, running
from tests.fixtures.runs import find_faults, inode_of, list_objects, unify
from tests.fixtures.trees import (
    COPY_MAY_DIFFER,
    File,
    Folder,
    Link,
    Row,
    Snapshot,
    Special,
    Symlink,
    acl,
    capability,
    differences,
    grow,
    snapshot,
)

pytestmark = need("immutable")

_CAP_NET_RAW = 13  # linux/capability.h
FULL_TAR = "--xattrs --xattrs-include='*' --acls --sparse --numeric-owner"


def text(name: str, size: int = 5_000) -> bytes:
    return (name.encode() * size)[:size]


def _shared_rows() -> list[Row]:
    """What both guests have: twins, attributes, holes, odd names, folders of every mode."""
    rights = acl(owner=6, group=4, other=4, users={1000: 6})
    return [
        Folder("etc", mode=0o750, uid=3, gid=4, xattrs={"user.note": b"\0\xff"}),
        File("etc/conf", text("conf"), mode=0o640, uid=7, gid=8),
        File("etc/rights", text("rights"), xattrs={"system.posix_acl_access": rights}),
        Folder("bin", mode=0o2775, gid=50),
        File("bin/ping", text("ping"), xattrs={"security.capability": capability(_CAP_NET_RAW)}),
        File("bin/su", text("su"), mode=0o4755),
        File("twins/a", text("twin")),
        File("twins/b", text("twin")),
        File("twins/sub/c", text("twin")),
        File("holes", text("hole"), at=1 << 20, size=3 << 20),
        Folder("secret", mode=0),
        File("secret/deep/er/file", text("secret"), mode=0),
        Folder("default", xattrs={"system.posix_acl_default": rights}),
        File("default/file", text("default")),
        *odd_tree(text("odd")),
        File(deep_path(50) + b"/end", text("deep")),
    ]


def _own_rows(name: str) -> list[Row]:
    """What each guest has for itself, of every kind."""
    return [
        File("etc/hostname", name.encode() * 9),
        File("own/one", text(f"own of {name}"), mode=0o600, uid=9),
        Link("own/two", to="own/one"),
        File("own/empty"),
        Symlink("etc/link", "conf", uid=5),
        Symlink("bin/dangling", "nowhere"),
        Special("dev/fifo", stat.S_IFIFO),
        Special("dev/null", stat.S_IFCHR, (1, 3), mode=0o666),
        Folder("nothing", mode=0o1777, uid=11),
        Folder("srv/a/b/nothing", mode=0o700),
    ]


@pytest.fixture
def pair(site: Site, tool: Tool) -> Site:
    """Two unified guests, web and db."""
    for name in ("web", "db"):
        site.add_guest(name, [*_shared_rows(), *_own_rows(name)])
    unify(tool)
    return site


def shell(command: str, folder: Path) -> None:
    """Run a line of the man page in `folder`, with the installed commands before all others."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")


def save(site: Site, tool: Tool, name: str = "web") -> Path:
    file = site.filesystem.folder / "manifest"
    done = tool("vfiles", "--save", file, name)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return file


def lose(site: Site, *, step: int = 0) -> Path:
    """The tree of web is gone, the pool is as it was; returns the new, empty root."""
    site.root("web").rename(site.filesystem.folder / f"lost-{step}")
    site.root("web").mkdir()
    return site.root("web")


def restore(tool: Tool, file: Path, *arguments: str | Path, code: int = 0) -> dict[str, object]:
    """What `vfiles --restore --json` says."""
    done = tool("vfiles", "--restore", file, "--json", *(arguments or ("web",)))
    assert done.returncode == code, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    assert found.pop("format") == 1
    return found


def list_paths(tool: Tool, *options: str) -> list[bytes]:
    done = tool("vfiles", "-0", *options, "web")
    assert done.returncode == 0, done.stderr
    return os.fsencode(done.stdout).split(b"\0")[:-1]


def objects_used(root: Path, pool: Path) -> dict[bytes, int]:
    """The names below `root` that are objects: path -> inode number."""
    numbers = {inode_of(path) for path in list_objects(pool)}
    found = snapshot(root).items()
    return {path: entry.inode for path, entry in found if entry.inode in numbers}


def drop_object(pool: Path, ino: int) -> None:
    """The object is reclaimed, as if no guest used it; the other objects stay frozen."""
    (path,) = [path for path in list_objects(pool) if inode_of(path) == ino]
    subprocess.run(["chattr", "-i", path], check=True)
    path.unlink()


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
        for row in [*_shared_rows(), *_own_rows("web")]
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
    for step in range(scaled(5, 50)):
        root = lose(site, step=step)
        made = kill_when(root, 280 * step % 1_400, "vfiles", "--restore", file, "web")
        assert made < len(rows)
        restore(tool, file)
        assert differences(before, snapshot(root), ignoring=COPY_MAY_DIFFER) == []
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
