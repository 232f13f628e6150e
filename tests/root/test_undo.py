"""--undo gives every guest private copies back, equal in all that the guest can see."""

import os
import re
import subprocess
from pathlib import Path

from tests.conftest import Tool
from tests.fixtures.filesystems import Site, free_bytes, is_immutable, mount_image, private_folder
from tests.fixtures.probes import need, on
from tests.fixtures.runs import find_faults, inodes, stamps, undo, unify
from tests.fixtures.trees import (
    EPOCH_NS,
    File,
    Folder,
    Link,
    Row,
    Symlink,
    acl,
    capability,
    differences,
    grow,
    snapshot,
)

pytestmark = need("immutable", "lease")


def _rows() -> list[Row]:
    return [
        Folder("etc", mode=0o2750, gid=9, mtime_ns=5),
        File("etc/conf", b"a setting\n" * 99, mode=0o600, uid=3, mtime_ns=EPOCH_NS + 1),
        File("etc/twin", b"a setting\n" * 99, mode=0o600, uid=3, mtime_ns=EPOCH_NS + 1),
        File("bin/ping", b"ELF" * 99, mode=0o755, xattrs=_xattrs()),
        File("bin/su", b"ELF" * 99, mode=0o6755, uid=5, gid=6, mtime_ns=-1),
        File("holes", b"middle" * 999, at=1 << 20, size=5 << 20),
        File("only holes", b"", size=1 << 20),
        File("linked", b"x" * 99),
        Link("linked too", "linked"),
        Symlink("symlink", "etc/conf"),
        File(b"odd\xff\n-name", b"y" * 99, mtime_ns=2**33 * 10**9),
    ]


def _xattrs() -> dict[str, bytes]:
    return {
        "security.capability": capability(13),
        "system.posix_acl_access": acl(owner=7, group=5, other=5, users={1000: 7}),
        "user.key": b"value",
        "trusted.key": bytes(99),
    }


def _frozen_below(root: Path) -> list[str]:
    shown = subprocess.run(["lsattr", "-R", "-a", root], capture_output=True, check=True)
    flags = re.compile(r"^[-A-Za-z]*i[-A-Za-z]* .*$", re.MULTILINE)
    return flags.findall(shown.stdout.decode(errors="replace"))


def test_undo_gives_every_tree_back(site: Site, tool: Tool) -> None:
    guests = [site.add_guest(name, _rows()) for name in ("web", "db")]
    before = [snapshot(root) for root in guests]
    unify(tool)
    assert all(map(_frozen_below, guests))
    undo(tool)
    after = [snapshot(root) for root in guests]
    found = [differences(*pair, ignoring={"inode"}) for pair in zip(before, after, strict=True)]
    assert found == [[], []]
    assert list(map(_frozen_below, guests)) == [[], []]
    assert len(set(inodes(site, "etc/conf", "web", "db"))) == 2
    assert find_faults(site.pool) == []


def test_undo_of_one_guest_leaves_the_others_shared(site: Site, tool: Tool) -> None:
    guests = [site.add_guest(name, _rows()) for name in ("web", "db", "mail")]
    unify(tool)
    before = [snapshot(root) for root in guests]
    undo(tool, "web")
    after = [snapshot(root) for root in guests]
    assert [differences(*pair) for pair in zip(before, after, strict=True)] == [[], [], []]
    assert not is_immutable(guests[0] / "etc/conf")
    assert len(set(inodes(site, "etc/conf", "db", "mail"))) == 1
    assert is_immutable(guests[1] / "etc/conf")
    (guests[0] / "etc/conf").write_text("mine")
    assert differences(before[1], snapshot(guests[1])) == []
    assert find_faults(site.pool) == []


def test_undo_twice_is_once_and_unify_again_finds_the_objects(site: Site, tool: Tool) -> None:
    guests = [site.add_guest(name, _rows()) for name in ("web", "db")]
    before = [snapshot(root) for root in guests]
    unify(tool)
    undo(tool)
    private = [stamps(root) for root in guests]
    undo(tool)
    assert [stamps(root) for root in guests] == private
    report = unify(tool)
    assert (report.unified, report.new) == (14, 0)
    after = [snapshot(root) for root in guests]
    assert [differences(*pair) for pair in zip(before, after, strict=True)] == [[], []]


def test_undo_takes_the_space_that_unifying_gave(site: Site, tool: Tool) -> None:
    rows: list[Row] = [File(f"{number}", os.urandom(1 << 20)) for number in range(8)]
    for name in ("web", "db"):
        site.add_guest(name, rows)
    unify(tool)
    free = free_bytes(site.vdirbase)
    undo(tool, "web")
    can_clone = site.filesystem.kind != "ext4"
    assert (free - free_bytes(site.vdirbase) > 7 << 20) != can_clone


@on("ext4")
def test_undo_without_room_changes_nothing(site: Site, tool: Tool) -> None:
    with private_folder() as folder:
        mount = mount_image("ext4", folder, size=64 << 20)
        content = [os.urandom(1 << 20) for _ in range(12)]
        rows: list[Row] = [File(f"{number}", data) for number, data in enumerate(content)]
        guests = [grow(mount / name, rows) for name in ("web", "db")]
        for root in guests:
            site.register(root.name, root)
        pool = mount / "pool"
        unify(tool, "--all", "--pool", pool)
        (mount / "ballast").write_bytes(bytes(free_bytes(mount) - (8 << 20)))
        before = [stamps(root) for root in guests]
        done = tool("vunify", "--undo", "--all", "--pool", pool)
        assert done.returncode == 9
        assert str(pool) in done.stderr
        assert [stamps(root) for root in guests] == before
        (mount / "ballast").unlink()
        assert tool("vunify", "--undo", "--all", "--pool", pool).returncode == 0
        assert not is_immutable(guests[0] / "0")
