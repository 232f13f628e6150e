"""A refresh makes the smallest tree anew that has all changes, and leaves every other as it is."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Tool
from tests.fixtures.filesystems import Site, has_tools
from tests.fixtures.probes import need, on
from tests.fixtures.runs import find_faults
from tests.fixtures.sshd import PROGRAM
from tests.fixtures.trees import (
    COPY_MAY_DIFFER,
    File,
    Folder,
    Link,
    Row,
    Snapshot,
    Symlink,
    differences,
    snapshot,
)
from tests.fixtures.windows import wait_for
from vrun import diskquota
from vstore import lease

pytestmark = need("immutable", "lease")

_ROWS: list[Row] = [
    File("etc/conf", b"a setting\n" * 99),
    Folder("etc/deep", mtime_ns=5, xattrs={"user.folder": b"x"}),
    Folder("etc/deep/one", mode=0o2750, gid=9, mtime_ns=7),
    File("etc/deep/one/file", b"one" * 99),
    File("etc/deep/one/tiny", b"x"),
    File("etc/deep/two/file", b"two" * 99),
    File("var/lib/data", b"data" * 99),
    File("var/log/syslog", b"log line\n" * 99),
    File("srv/apart/file", b"apart" * 99),
    File("srv/a/first", b"of two folders" * 99),
    Link("srv/b/second", "srv/a/first"),
    File("srv/b/other", b"other" * 99),
    Symlink("srv/b/link", "other"),
]
"""Of one file the names are in two folders, srv/a and srv/b."""


def _refresh(tool: Tool, *arguments: str) -> dict[str, object]:
    done = tool("vserver-copy", "--json", "--refresh", *arguments, "web", "copy")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.fixture
def root(site: Site, tool: Tool) -> Path:
    """The source's tree; there is a copy of it."""
    folder = site.add_guest("web", _ROWS)
    assert tool("vserver-copy", "-q", "web", "copy").returncode == 0
    return folder


def _differences(site: Site) -> list[str]:
    found = snapshot(site.root("web")), snapshot(site.root("copy"))
    return differences(*found, ignoring=COPY_MAY_DIFFER)


def _made_anew(before: Snapshot, after: Snapshot) -> set[bytes]:
    """The folders that are others now."""
    folders = {path for path, entry in before.items() if entry.kind == "d"}
    return {path for path in folders & set(after) if before[path].inode != after[path].inode}


def _check(site: Site, tool: Tool, before: Snapshot, top: bytes) -> None:
    """The copy is equal, and what is at or below `top` was made anew, nothing else."""
    assert _differences(site) == []
    after = snapshot(site.root("copy"))
    folders = {path for path, entry in before.items() if entry.kind == "d" and path in after}
    wanted = {path for path in folders if not top or path == top or path.startswith(top + b"/")}
    assert _made_anew(before, after) == wanted
    assert find_faults(site.pool) == []
    assert [path.name for path in site.vdirbase.iterdir() if ".copy-" in path.name] == []
    assert _refresh(tool)["same"] is True


def _keep_time(path: Path, change: Callable[[], object]) -> None:
    """Change something in a folder, which shows the time of before."""
    status = path.stat()
    change()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _change_two(root: Path) -> None:
    for name in ("one", "two"):
        (root / "etc/deep" / name / "file").write_text("changed")


def _change_far_apart(root: Path) -> None:
    (root / "etc/deep/one/file").write_text("changed")
    (root / "var/log/syslog").write_text("changed")


_CHANGES: dict[str, tuple[Callable[[Path], object], bytes]] = {
    "file": (lambda root: (root / "etc/deep/one/file").write_text("changed"), b"etc/deep/one"),
    "new file": (lambda root: (root / "etc/deep/new").write_text("new" * 99), b"etc/deep"),
    "file gone": (lambda root: (root / "etc/conf").unlink(), b"etc"),
    "two files": (_change_two, b"etc/deep"),
    "new folder": (lambda root: (root / "etc/deep/new/er").mkdir(parents=True), b"etc/deep"),
    "new folder alone": (
        lambda root: _keep_time(root / "etc/deep", (root / "etc/deep/new").mkdir),
        b"etc/deep",
    ),
    "folder gone": (lambda root: shutil.rmtree(root / "etc/deep"), b"etc"),
    "folder gone alone": (
        lambda root: _keep_time(root / "etc", lambda: shutil.rmtree(root / "etc/deep")),
        b"etc",
    ),
    "mode of a folder": (lambda root: (root / "var/log").chmod(0o700), b"var/log"),
    "attribute of a folder": (lambda root: os.setxattr(root / "var", "user.x", b"y"), b"var"),
    "far apart": (_change_far_apart, b""),
    "the root": (lambda root: root.chmod(0o700), b""),
    "apart from names of one inode": (
        lambda root: (root / "srv/apart/file").write_text("changed"),
        b"srv/apart",
    ),
    "beside one of several names": (
        lambda root: (root / "srv/b/other").write_text("changed"),
        b"srv",
    ),
    "in all names": (lambda root: (root / "srv/a/first").write_text("changed"), b"srv"),
    "a name less": (lambda root: (root / "srv/b/second").unlink(), b"srv/b"),
    "a name more": (
        lambda root: (root / "etc/deep/one/file").hardlink_to(root / "etc/conf"),
        b"etc",
    ),
}


@on("ext4", "xfs")
@pytest.mark.parametrize("name", sorted(_CHANGES))
def test_only_what_changed_is_made_anew(site: Site, tool: Tool, root: Path, name: str) -> None:
    change, top = _CHANGES[name]
    if name == "a name more":
        (root / "etc/deep/one/file").unlink()
        _refresh(tool)
    before = snapshot(site.root("copy"))
    change(root)
    report = _refresh(tool)
    files = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    assert report["files"] == len(files)
    _check(site, tool, before, top)


def test_what_the_copy_has_changed_is_made_anew_too(site: Site, tool: Tool, root: Path) -> None:
    before = snapshot(site.root("copy"))
    (site.root("copy") / "var/log/new").write_text("the copy's own")
    (site.root("copy") / "var/lib/new").mkdir()
    _refresh(tool, "--verify")
    _check(site, tool, before, b"var")


@on("ext4")
@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_what_an_administrator_named_like_a_leftover_stays(
    site: Site, tool: Tool, root: Path, mode: int
) -> None:
    """A backup with the date behind `.copy-`, a folder with one of ours in it, another guest."""
    backup = site.vdirbase / "copy.copy-20260731"
    backup.mkdir()
    shutil.copytree(site.root("copy") / "etc", backup / "etc")
    (site.vdirbase / "copy.copy-20260801/tree").mkdir(parents=True)
    (site.vdirbase / "copy.copy-20260801/note").write_text("mine")
    site.add_guest("copy.copy-deadbeef", [File("tree/file", b"a guest's")])
    others = [path for path in site.vdirbase.iterdir() if ".copy-" in path.name]
    for path in others:
        path.chmod(mode if path.name != "copy.copy-deadbeef" else 0o755)
    before = {path: snapshot(path) for path in others}
    (root / "etc/conf").write_text("changed")
    _refresh(tool)
    assert _differences(site) == []
    assert {path: snapshot(path) for path in others} == before


@pytest.mark.parametrize("flag", ["a", "i"])
def test_what_can_have_no_other_name_is_made_anew(
    site: Site, tool: Tool, root: Path, flag: str
) -> None:
    """A file of the copy that was made append-only, or immutable, stands in no refresh's way."""
    kept = site.root("copy") / "var/log/syslog"
    subprocess.run(["chattr", f"+{flag}", kept], check=True)
    (root / "var/log/other").write_text("new")
    before = snapshot(site.root("copy"))
    try:
        _refresh(tool)
    finally:
        for path in (kept, *site.vdirbase.glob("copy.copy-*/tree/syslog")):
            subprocess.run(["chattr", f"-{flag}", path], check=True)
    (root / "var/log/other").write_text("newer")
    _refresh(tool)
    _check(site, tool, before, b"var/log")
    assert not list(site.vdirbase.glob("copy.copy-*"))


@on("ext4")
@pytest.mark.parametrize("side", ["web", "copy"])
def test_what_cannot_be_read_is_never_nothing_to_do(
    site: Site, tool: Tool, root: Path, side: str
) -> None:
    """Its owner has a lease on it. In the source it is named; in the copy it goes."""
    kept = site.root(side) / "etc/kept"
    _keep_time(kept.parent, lambda: kept.write_text("kept from us"))
    lease.ignore_break_signals()
    with kept.open("r+b") as holder:
        fcntl.fcntl(holder, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        done = tool("vserver-copy", "--refresh", "--keep-going", "web", "copy")
        assert done.returncode == (20 if side == "web" else 0)
        assert not (site.root("copy") / "etc/kept").exists()
        done = tool("vserver-copy", "--refresh", "web", "copy")
        assert done.returncode == (1 if side == "web" else 0)
        assert ("etc/kept" in done.stderr) is (side == "web")
    _refresh(tool)
    assert _differences(site) == []


def test_a_dry_run_counts_the_rest_too(site: Site, tool: Tool, root: Path) -> None:
    (root / "var/lib/data").write_bytes(os.urandom(5000))
    before = snapshot(site.root("copy"))
    report = _refresh(tool, "--dry-run")
    assert differences(before, snapshot(site.root("copy"))) == []
    files = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    size = sum({path.stat().st_ino: path.stat().st_size for path in files}.values())
    assert report["files"] == len(files)
    assert report["bytes_total"] == size
    assert report["bytes_already_there"] == size - 5000


@on("ext4")
def test_a_folder_that_nobody_may_change_is_made_anew_with_those_around_it(
    site: Site, tool: Tool, root: Path
) -> None:
    fixed = site.root("copy") / "etc/deep"
    (root / "etc/deep/one/file").write_text("changed")
    before = snapshot(site.root("copy"))
    subprocess.run(["chattr", "+a", fixed], check=True)
    try:
        assert tool("vserver-copy", "-q", "--refresh", "web", "copy").returncode == 0
    finally:
        for path in site.vdirbase.rglob("etc/deep"):
            subprocess.run(["chattr", "-a", path], check=True)
    assert _differences(site) == []
    assert b"etc" in _made_anew(before, snapshot(site.root("copy")))


@on("ext4")
def test_a_larger_tree_has_all_names_of_its_inodes_too(site: Site, tool: Tool, root: Path) -> None:
    (root / "srv/b/deep").mkdir()
    _refresh(tool)
    fixed = site.root("copy") / "srv/b/deep"
    (root / "srv/b/deep/new").write_text("new")
    before = snapshot(site.root("copy"))
    subprocess.run(["chattr", "+a", fixed], check=True)
    try:
        done = tool("vserver-copy", "-q", "--refresh", "web", "copy")
    finally:
        for path in site.vdirbase.rglob("srv/b/deep"):
            subprocess.run(["chattr", "-a", path], check=True)
    assert done.returncode == 0, done.stderr
    assert _differences(site) == []
    assert b"srv/a" in _made_anew(before, snapshot(site.root("copy")))


@on("ext4")
def test_a_name_of_another_inode_is_made_anew_where_its_row_is_the_same(
    site: Site, tool: Tool, root: Path
) -> None:
    """The row says how many rows back the first name is; of those between one has gone."""
    (root / "srv/a/later").write_bytes(b"another file" * 99)
    (root / "srv/apart/other").write_bytes(b"apart too")
    other = root / "srv/b/second"

    def link_to(first: str) -> None:
        other.unlink()
        other.hardlink_to(root / "srv/a" / first)

    link_to("later")
    _refresh(tool)
    before = snapshot(site.root("copy"))
    (root / "srv/apart/other").unlink()
    _keep_time(other.parent, lambda: link_to("first"))
    _refresh(tool)
    _check(site, tool, before, b"srv")


@on("ext4")
def test_a_folder_too_deep_to_be_named_at_once_is_made_anew(
    site: Site, tool: Tool, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    for _ in range(25):
        Path("x" * 200).mkdir()
        monkeypatch.chdir("x" * 200)
    Path("file").write_text("old")
    _refresh(tool)
    before = snapshot(site.root("copy") / "etc")
    Path("file").write_text("new")
    _refresh(tool)
    assert _differences(site) == []
    assert _made_anew(before, snapshot(site.root("copy") / "etc")) == set()


@on("btrfs")
@pytest.mark.parametrize("where", ["", "var/log"])
def test_a_subvolume_is_exchanged_with_the_tree_around_it(
    site: Site, tool: Tool, root: Path, where: str
) -> None:
    """It is left with what it has, as all of other file systems."""
    volume = site.root("copy") / where

    def make_volume() -> None:
        volume.rename(site.vdirbase / "old")
        subprocess.run(["btrfs", "subvolume", "create", volume], check=True, capture_output=True)

    _keep_time(volume.parent, make_volume)
    subprocess.run(["cp", "-a", f"{site.vdirbase}/old/.", volume], check=True)
    (root / "etc/tiny").write_text("x")
    (volume / "precious").write_text("precious")
    (root / "etc/deep/one/file").write_text("changed")
    _refresh(tool)
    assert _differences(site) == []
    left = list(site.vdirbase.rglob("precious"))
    assert [path.parent.name for path in left] == ["log" if where else "tree"]


@on("xfs")
def test_a_folder_of_another_project_is_made_anew_with_those_around_it(
    site: Site, tool: Tool, root: Path
) -> None:
    before = snapshot(site.root("copy"))
    folder = os.fspath(site.root("copy") / "var")
    command = ["xfs_io", "-c", "chproj -R 7", "-c", "chattr -R +P", folder]
    subprocess.run(command, check=True, capture_output=True)
    (root / "var/log/syslog").write_text("changed")
    _refresh(tool)
    _check(site, tool, before, b"")


def _give(folder: Path, project: int) -> int:
    """What a start with limits does; it raises for what is shared."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        return diskquota.give_tree(fd, project)
    finally:
        os.close(fd)


@on("xfs")
def test_a_target_with_a_project_gets_files_of_its_own(site: Site, tool: Tool, root: Path) -> None:
    """As its start needs them: a limit of what it stores cannot count what others have too."""
    copy = site.root("copy")
    assert _refresh(tool)["same"] is True
    assert tool("vunify", "--undo", "copy").returncode == 0
    _give(copy, 7)
    (root / "etc/new").write_bytes(b"new" * 99)
    (root / "var/log/syslog").write_text("changed")
    _refresh(tool)
    assert _differences(site) == []
    assert _give(copy, 7) > 0


@on("ext4")
def test_a_mount_in_the_source_is_an_empty_folder_in_the_copy(
    site: Site, tool: Tool, root: Path
) -> None:
    point = root / "etc/deep"
    (root / "var/lib/first").hardlink_to(root / "etc/conf")
    try:
        subprocess.run(["mount", "-t", "tmpfs", "none", point], check=True)
        _refresh(tool, "--verify")
        assert list((site.root("copy") / "etc/deep").iterdir()) == []
        assert _refresh(tool)["same"] is True
        (root / "var/log/syslog").write_text("changed")
        before = snapshot(site.root("copy"))
        _refresh(tool, "--verify")
        assert _made_anew(before, snapshot(site.root("copy"))) == {b"var/log"}
    finally:
        subprocess.run(["umount", point], check=False)


@on("ext4")
def test_a_mount_in_the_tree_stays_or_the_copy_is_refused(
    site: Site, tool: Tool, root: Path
) -> None:
    points = [site.root(name) / "var/lib" for name in ("web", "copy")]
    try:
        for point in points:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "none", point], check=True)
        (root / "etc/conf").write_text("changed")
        _refresh(tool)
        assert points[1].is_mount()
        assert (site.root("copy") / "etc/conf").read_text() == "changed"
        before = snapshot(site.root("copy") / "var/log")
        (root / "var/new").write_text("beside the mount")
        done = tool("vserver-copy", "--refresh", "web", "copy")
        assert done.returncode == 2
        assert f"something is mounted at {points[1]}" in done.stderr
        assert snapshot(site.root("copy") / "var/log") == before
        assert points[1].is_mount()
    finally:
        for point in points:
            subprocess.run(["umount", point], check=False)


@on("ext4", "xfs")
def test_killed_after_the_exchange_the_next_refresh_ends_equal(
    site: Site, tool: Tool, root: Path
) -> None:
    """Then the folder around has another time, and the old tree is in the folder of the copy."""
    if not has_tools("strace"):
        pytest.skip("strace is not installed")
    before = snapshot(site.root("copy"))
    _keep_time(root / "etc/deep/one", lambda: (root / "etc/deep/one/tiny").write_text("y"))
    pause = "inject=renameat2:delay_exit=60s"
    command: list[str | Path] = ["strace", "-f", "-qq", "-o", os.devnull, "-e", pause, PROGRAM]
    command += ["-q", "--refresh", "web", "copy"]
    with subprocess.Popen(command, start_new_session=True) as process:
        tiny = site.root("copy") / "etc/deep/one/tiny"
        wait_for(lambda: process.poll() is not None or tiny.read_text() == "y")
        os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert len([path for path in site.vdirbase.iterdir() if ".copy-" in path.name]) == 1
    after = snapshot(site.root("copy"))
    assert _made_anew(before, after) == {b"etc/deep/one"}
    left = [line.partition(" was ")[0] for line in _differences(site)]
    assert "b'etc/deep': mtime_ns" in left
    assert set(left) <= {"b'etc/deep': mtime_ns", "b'etc/deep/one': mtime_ns"}
    _refresh(tool)
    _check(site, tool, after, b"etc/deep")
