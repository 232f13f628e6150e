"""The witnesses that other tests rely on see what they say they see."""

import os
import stat
import subprocess

import pytest

from tests.fixtures.filesystems import Site, is_immutable, remove
from tests.fixtures.hostile import NAMES, deep_path, odd_tree
from tests.fixtures.probes import need, on
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

_CAP_NET_RAW = 13  # linux/capability.h


def _rows() -> list[Row]:
    shared = acl(owner=6, group=4, other=4, users={1000: 6})
    return [
        Folder("etc", mode=0o750, uid=3, gid=4),
        File("etc/conf", b"a = 1\n", xattrs={"system.posix_acl_access": shared}),
        File(
            "bin/ping",
            b"ping",
            mode=0o755,
            xattrs={"security.capability": capability(_CAP_NET_RAW)},
        ),
        File("bin/su", b"su", mode=0o4755, uid=7),
        Link("bin/su2", to="bin/su"),
        File("holes", b"middle", at=1 << 20, size=3 << 20),
        Symlink("link", "etc/conf", uid=9),
        Special("fifo", stat.S_IFIFO),
        Special("socket", stat.S_IFSOCK),
        Special("null", stat.S_IFCHR, (1, 3), mode=0o666),
        Folder("empty", mtime_ns=EPOCH_NS + 1),
    ]


@need("acl")
def test_a_grown_tree_is_what_its_table_says(site: Site) -> None:
    root = site.add_guest("web", _rows())

    def ask(*command: str) -> str:
        return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout

    assert "user:1000:rw-" in ask("getfacl", "-n", "etc/conf")
    assert "cap_net_raw=ep" in ask("getcap", "bin/ping")
    assert ask("stat", "-c", "%a %u %h", "bin/su2") == "4755 7 2\n"
    assert ask("stat", "-c", "%F %Hr %Lr", "null") == "character special file 1 3\n"
    assert (root / "holes").stat().st_blocks * 512 < 1 << 20
    assert {path.lstat().st_mtime_ns for path in root.rglob("*")} == {EPOCH_NS, EPOCH_NS + 1}


def test_a_copy_has_no_differences(site: Site) -> None:
    before = snapshot(site.add_guest("web", [*_rows(), *odd_tree()]))
    after = snapshot(site.add_copy("copy", site.root("web")))
    assert differences(before, after, ignoring=COPY_MAY_DIFFER) == []
    assert len(before) > 2 * len(NAMES)


_CHANGES = {
    "digest": "printf 'a = 2\\n' >etc/conf",
    "mode": "chmod 755 bin/su",
    "uid": "chown -h 1 link",
    "xattrs": "setfattr -n user.note -v 1 holes",
    "mtime_ns": "touch -d @1700000000.123456791 etc",
    "group": "mv bin/su2 bin/su3",
    "rdev": "rm null && mknod null c 1 5",
    "kind": "rm fifo && mkdir fifo",
    "target": "ln -sfn etc/canf link",
    "appeared": "touch new",
    "vanished": "rmdir empty",
}


@on("ext4")
@need("acl")
@pytest.mark.parametrize("word", sorted(_CHANGES))
def test_every_kind_of_change_is_seen(site: Site, word: str) -> None:
    root = site.add_guest("web", _rows())
    before = snapshot(root)
    subprocess.run(["sh", "-c", _CHANGES[word]], cwd=root, check=True)
    assert any(f": {word}" in line for line in differences(before, snapshot(root)))


def test_an_endless_path_is_recorded_and_removed(site: Site) -> None:
    path = deep_path() + b"/end"
    root = site.add_guest("web", [File(path, b"deep")])
    assert len(path) > os.pathconf(root, "PC_PATH_MAX")
    assert path in snapshot(root)
    remove(root)
    assert not root.exists()


def test_frozen_files_do_not_keep_a_tree_from_being_removed(site: Site) -> None:
    root = grow(site.root("web"), [File("a/b", b"x"), File("c", b"x")])
    subprocess.run(["chattr", "+i", root / "a/b", root / "a", root / "c"], check=True)
    assert is_immutable(root / "a/b")
    remove(root)
    assert not root.exists()
