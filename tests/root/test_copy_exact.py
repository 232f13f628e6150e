"""A copy equals its source in all that a guest can see, whatever the source has."""

import json
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Tool
from tests.fixtures.filesystems import Site, has_tools, is_immutable
from tests.fixtures.guests import SMALL, install
from tests.fixtures.hostile import deep_path, odd_tree
from tests.fixtures.probes import need, on
from tests.fixtures.runs import find_faults, list_objects
from tests.fixtures.sshd import PROGRAM
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
    snapshot,
)

pytestmark = need("immutable", "lease")

_XATTRS = {
    "security.capability": capability(13),
    "system.posix_acl_access": acl(owner=7, group=5, other=5, users={1000: 7}),
    "user.key": b"value",
    "trusted.key": bytes(99),
}
_DEFAULT_ACL = {"system.posix_acl_default": acl(owner=7, group=5, other=0, users={1000: 7})}


def _rows() -> list[Row]:
    return [
        Folder("", mode=0o750, uid=1, gid=2, mtime_ns=7),
        Folder("etc", mode=0o2750, gid=9, mtime_ns=5, xattrs={"user.folder": b"x"}),
        File("etc/conf", b"a setting\n" * 99, mode=0o600, uid=3, mtime_ns=EPOCH_NS + 1),
        File("etc/twin", b"a setting\n" * 99, mode=0o600, uid=3, mtime_ns=EPOCH_NS + 1),
        File("etc/other owner", b"a setting\n" * 99, mode=0o644, uid=4),
        File("bin/ping", b"ELF" * 99, mode=0o755, xattrs=_XATTRS),
        File("bin/su", b"ELF" * 99, mode=0o6755, uid=5, gid=6, mtime_ns=-1),
        File("future", b"later" * 99, mtime_ns=4_000_000_000_123_456_789),
        File("holes", b"middle" * 999, at=1 << 20, size=5 << 20),
        File("large", os.urandom(6 << 20)),
        File("large twin", os.urandom(1 << 10) * (5 << 10)),
        File("nothing", mode=0o4711),
        File("tiny", b"x"),
        Folder("shared", xattrs=_DEFAULT_ACL, mtime_ns=3),
        File("shared/file", b"small"),
        Folder("shared/below"),
        Special("shared/fifo", stat.S_IFIFO, mode=0o620, gid=5),
        File("var/log/syslog", b"log line\n" * 999),
        File("var/log/syslog.1", b"log line\n" * 999, mode=0o640),
        Folder("closed", mode=0),
        File("closed/inside", b"inside" * 9, mode=0),
        File("linked", b"x" * 99, xattrs=_XATTRS),
        Link("etc/linked too", "linked"),
        Link("shared/linked", "linked"),
        Symlink("own/link", "/nowhere", uid=4, mtime_ns=9),
        Symlink("own/long", "x/" * 500),
        Link("own/link too", "own/link"),
        Special("own/null", stat.S_IFCHR, (1, 3), mode=0o666),
        Special("own/fifo", stat.S_IFIFO, mode=0o600),
        Link("own/fifo too", "own/fifo"),
        *odd_tree(),
    ]


def _copy(tool: Tool, *arguments: str, code: int = 0) -> dict[str, object]:
    done = tool("vserver-copy", "--json", *arguments)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    found: dict[str, object] = json.loads(done.stdout) if done.stdout else {}
    return found


def _differences(site: Site, one: str, other: str) -> list[str]:
    found = snapshot(site.root(one)), snapshot(site.root(other))
    return differences(*found, ignoring=COPY_MAY_DIFFER)


@pytest.mark.parametrize("is_unified", [False, True], ids=["own", "unified"])
def test_a_copy_is_equal_in_all_that_a_guest_can_see(
    site: Site, tool: Tool, *, is_unified: bool
) -> None:
    root = site.add_guest("web", _rows())
    if is_unified:
        assert tool("vhashify", "web").returncode == 0
    before = snapshot(root)
    _copy(tool, "--verify", "web", "copy")
    assert _differences(site, "web", "copy") == []
    assert differences(before, snapshot(root)) == []
    assert find_faults(site.pool) == []
    copy = site.root("copy")
    assert (copy / "holes").stat().st_blocks * 512 < 1 << 20
    assert is_immutable(copy / "bin/su")
    assert not is_immutable(copy / "var/log/syslog")
    assert (copy / "etc/conf").stat().st_ino != (copy / "etc/twin").stat().st_ino
    _copy(tool, "--refresh", "copy", "web")
    assert _copy(tool, "--refresh", "web", "copy")["same"] is True


def test_what_is_equal_in_both_is_one_inode(site: Site, tool: Tool) -> None:
    root = site.add_guest("web", _rows())
    assert tool("vhashify", "web").returncode == 0
    _copy(tool, "web", "copy")
    numbers = {path.stat().st_ino for path in list_objects(site.pool)}
    before, after = snapshot(root), snapshot(site.root("copy"))
    shared = [path for path, entry in before.items() if entry.inode in numbers]
    assert len(shared) > 8
    # Twins are as many inodes as they were, whichever of them is which.
    assert {after[path].inode for path in shared} == {before[path].inode for path in shared}


def test_objects_that_are_copies_are_on_disk_before_their_names_and_wait_for_it_together(
    site: Site,
) -> None:
    """As strace(1) shows: of equal files of other times only the first one arrives."""
    if not has_tools("strace"):
        pytest.skip("strace is not installed")
    site.add_guest("web", [File(f"{time}", b"same" * 99, mtime_ns=time) for time in range(100)])
    trace = site.filesystem.folder / "trace"
    calls = "trace=openat,renameat2,syncfs,fdatasync"
    command: list[str | Path] = ["strace", "-f", "-qq", "-e", calls, "-o", trace]
    command += [PROGRAM, "-q", "web", "copy"]
    subprocess.run(command, check=True, timeout=100)
    lines = trace.read_text().splitlines()
    made = [at for at, line in enumerate(lines) if '"object-' in line and "O_CREAT" in line]
    named = [at for at, line in enumerate(lines) if '"object-' in line and "renameat2(" in line]
    waits = [at for at, line in enumerate(lines) if "sync" in line and "resumed" not in line]
    assert len(made) == len(named) == 99
    assert any(made[-1] < at < named[0] for at in waits)
    assert len(waits) < len(named) / 2


def test_sockets_devices_without_leave_and_mounts_stay_behind(site: Site, tool: Tool) -> None:
    disk = Special("disk", stat.S_IFBLK, (7, 200), mode=0o640, gid=6)
    root = site.add_guest("web", [disk, Special("socket", stat.S_IFSOCK), Folder("mnt")])
    subprocess.run(["mount", "-t", "tmpfs", "none", root / "mnt"], check=True)
    try:
        (root / "mnt/file").write_text("not the guest's")
        report = _copy(tool, "web", "copy", code=20)
    finally:
        subprocess.run(["umount", root / "mnt"], check=True)
    assert [path for path, _ in report["changed"]] == ["disk"]  # type: ignore[attr-defined]
    assert sorted(path.name for path in site.root("copy").iterdir()) == ["mnt"]
    assert list((site.root("copy") / "mnt").iterdir()) == []
    site.configure(".defaults", "apps/vserver-copy/policy", "devices  # ours\n")
    _copy(tool, "web", "again")
    assert (site.root("again") / "disk").lstat().st_rdev == os.makedev(7, 200)


@on("xfs")
def test_a_tree_deeper_than_a_path_can_be_long(site: Site, tool: Tool) -> None:
    site.add_guest("web", [File(deep_path() + b"/end", b"deep down" * 9)])
    _copy(tool, "web", "copy")
    assert _differences(site, "web", "copy") == []


def test_a_refresh_ends_equal_whatever_has_become_of_the_copy(site: Site, tool: Tool) -> None:
    root = site.add_guest("web", _rows())
    _copy(tool, "web", "copy")
    copy = site.root("copy")
    (copy / "var/log/syslog").write_text("the copy's own")
    (copy / "var/log/syslog.1").chmod(0o600)
    (copy / "etc/extra").write_text("not the source's")
    (copy / "shared/below").rmdir()
    (copy / "shared/below").write_text("a file now")
    (copy / "own/null").unlink()
    (root / "linked").write_text("changed in all its names")
    shutil.rmtree(root / "closed")
    (root / "closed").symlink_to("etc")
    with (root / "large").open("r+b") as file:
        file.seek(3 << 20)
        file.write(b"changed in the middle")
    _copy(tool, "--refresh", "web", "copy")
    assert _differences(site, "web", "copy") == []
    assert find_faults(site.pool) == []
    assert [path.name for path in site.vdirbase.iterdir() if ".copy-" in path.name] == []


@on("ext4", "xfs")
@pytest.mark.parametrize("change", ["middle", "grow", "shrink", "punch", "rewrite"])
def test_large_files_travel_as_the_blocks_that_differ(site: Site, tool: Tool, change: str) -> None:
    content = os.urandom(24 << 20)
    path = site.add_guest("web", [File("var/lib/mysql/data", content)]) / "var/lib/mysql/data"
    _copy(tool, "web", "copy")
    with path.open("r+b") as file:
        if change == "middle":
            for page in range(0, 24 << 20, 2 << 20):
                file.seek(page)
                file.write(b"page" * 100)
        elif change == "grow":
            file.seek(0, os.SEEK_END)
            file.write(os.urandom(100_000))
        elif change == "shrink":
            file.truncate((20 << 20) + 77)
        elif change == "punch":
            file.flush()
            subprocess.run(
                ["fallocate", "--punch-hole", "--offset", "4M", "--length", "8M", path], check=True
            )
        else:
            file.write(os.urandom(24 << 20))
    report = _copy(tool, "--refresh", "--compress", "none", "web", "copy")
    assert _differences(site, "web", "copy") == []
    sent = report["bytes_sent"]
    assert isinstance(sent, int)
    if change == "rewrite":
        assert sent > 24 << 20
    else:
        assert sent < (9 << 20 if change == "punch" else 1 << 20)


def test_so_many_large_files_as_there_are_travel_as_the_blocks_that_differ(
    site: Site, tool: Tool
) -> None:
    """Twenty of them, of whole blocks, which one batch of the manifest names."""
    names = [f"var/lib/mysql/{number}" for number in range(20)]
    root = site.add_guest("web", [File(name, os.urandom(4112 << 10)) for name in names])
    _copy(tool, "web", "copy")
    for place, name in enumerate(names):
        with (root / name).open("r+b") as file:
            file.seek(place * 200_000)
            file.write(b"page" * 100)
    report = _copy(tool, "--refresh", "--compress", "none", "web", "copy")
    assert _differences(site, "web", "copy") == []
    assert report["files_sent"] == 20
    sent = report["bytes_sent"]
    assert isinstance(sent, int)
    assert 20 * (16 << 10) <= sent < 20 * (16 << 10) + (64 << 10)


@pytest.mark.timeout(300)
@need("debootstrap")
def test_a_debian_guest_is_equal_arrives_unified_and_its_sibling_costs_little(
    site: Site, tool: Tool
) -> None:
    web = install(SMALL[0], site, "web", number=1)
    install(SMALL[1], site, "db", number=2)
    report = _copy(tool, "web", "web-copy")
    assert _differences(site, "web", "web-copy") == []
    pinged = subprocess.run(
        ["getcap", "-n", site.root("web-copy") / "usr/bin/ping"], capture_output=True, check=True
    )
    wanted = subprocess.run(["getcap", "-n", web / "usr/bin/ping"], capture_output=True, check=True)
    assert pinged.stdout.split()[1:] == wanted.stdout.split()[1:] != []
    total, sent = report["bytes_total"], report["bytes_sent"]
    assert isinstance(total, int)
    assert isinstance(sent, int)
    assert sent < 0.6 * total
    sibling = _copy(tool, "db", "db-copy")
    assert _differences(site, "db", "db-copy") == []
    lacking = sibling["bytes_lacking"]
    assert isinstance(lacking, int)
    assert lacking < total / 2
    assert _copy(tool, "--refresh", "web", "web-copy")["same"] is True
    assert tool("vpool", "verify").returncode == 0


@on("btrfs")
def test_what_is_the_file_systems_own_stays_behind(site: Site, tool: Tool) -> None:
    """Where files are compressed by an attribute, as `chattr +c` does: here, there, or both."""
    root = site.add_guest("web", [File("packed", b"text " * 999), File("plain", b"plain" * 999)])
    packed = root / "packed"
    subprocess.run(["chattr", "+c", root, packed], check=True)
    assert os.listxattr(packed) == ["btrfs.compression"]
    for flag, target in (("+c", "first"), ("-c", "second")):
        subprocess.run(["chattr", flag, site.vdirbase], check=True)
        done = tool("vserver-copy", "-q", "web", target)
        assert (done.returncode, done.stderr) == (0, "")
        for name in ("packed", "plain"):
            assert (site.root(target) / name).read_bytes() == (root / name).read_bytes()
        assert "nothing to do" in tool("vserver-copy", "--refresh", "web", target).stdout
    assert os.listxattr(site.root("second") / "packed") == []
