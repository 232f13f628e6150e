"""The walk meets what no guest should have, and goes on; it never leaves the tree."""

import mmap
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Final

import pytest

from tests.conftest import Tool
from tests.fixtures.filesystems import (
    Site,
    is_immutable,
    mount_image,
    private_folder,
    wait_released,
)
from tests.fixtures.hostile import NAMES, deep_path, odd_tree
from tests.fixtures.probes import need, on, scaled
from tests.fixtures.runs import (
    Stamp,
    find_faults,
    inodes,
    stamps,
    undo,
    unify,
    unshared,
    write_list,
)
from tests.fixtures.trees import (
    File,
    Folder,
    Row,
    Special,
    Symlink,
    differences,
    grow,
    snapshot,
)

pytestmark = need("immutable", "lease")

_SAME: Final = b"the very same content"


def _special_rows() -> list[Row]:
    return [
        Special("fifo", stat.S_IFIFO),
        Special("socket", stat.S_IFSOCK),
        Special("dev/null", stat.S_IFCHR, (1, 3)),
        Special("dev/loop", stat.S_IFBLK, (7, 200)),
        Symlink("dangling", "nowhere"),
        Symlink("loop", "loop"),
        Symlink("out", "/etc/passwd"),
        Symlink("out too", "../../../../../../../etc"),
        Symlink("in", "file"),
        File("file", _SAME),
    ]


def test_sockets_fifos_devices_and_symlinks_stay_as_they_are(site: Site, tool: Tool) -> None:
    guests = [site.add_guest(name, _special_rows()) for name in ("web", "db")]
    before = [snapshot(root) for root in guests]
    unlinked = [_without(stamps(root), b"file") for root in guests]
    report = unify(tool, "--all", "--exclude-from", write_list(site))
    assert (report.seen, report.unified, report.skipped) == (2, 2, {})
    after = [snapshot(root) for root in guests]
    assert [differences(*pair) for pair in zip(before, after, strict=True)] == [[], []]
    assert [_without(stamps(root), b"file") for root in guests] == unlinked


def _without(found: dict[bytes, Stamp], path: bytes) -> dict[bytes, Stamp]:
    """Less that file, and the folder whose ctime tells of it."""
    return {name: stamp for name, stamp in found.items() if name not in (path, b"")}


def test_odd_names_are_unified_and_undone_like_any(site: Site, tool: Tool) -> None:
    rows = [*odd_tree(_SAME), *(File(name + b".one", _SAME) for name in NAMES if len(name) < 250)]
    guests = [site.add_guest(name, rows) for name in ("web", "db")]
    before = [snapshot(root) for root in guests]
    report = unify(tool, "--all", "--exclude-from", write_list(site))
    assert (report.unified, report.errors) == (2 * (2 * len(NAMES) - 1), [])
    after = [snapshot(root) for root in guests]
    assert [differences(*pair) for pair in zip(before, after, strict=True)] == [[], []]
    assert unshared(before, after) == []
    assert find_faults(site.pool) == []
    undo(tool)
    after = [snapshot(root) for root in guests]
    assert [differences(*pair) for pair in zip(before, after, strict=True)] == [[], []]


def test_folders_deeper_than_a_path_can_be_long_are_unified_and_undone(
    site: Site, tool: Tool
) -> None:
    deep = deep_path()
    path = deep + b"/file"
    guests = [site.add_guest(name, [Folder(deep), File(path, _SAME)]) for name in ("web", "db")]
    before = [snapshot(root) for root in guests]
    assert len(path) > 4_096
    assert unify(tool).unified == 2
    after = [snapshot(root) for root in guests]
    assert [differences(*pair) for pair in zip(before, after, strict=True)] == [[], []]
    assert after[0][path].inode == after[1][path].inode
    undo(tool)
    after = [snapshot(root) for root in guests]
    assert [differences(*pair) for pair in zip(before, after, strict=True)] == [[], []]
    assert after[0][path].inode != after[1][path].inode


def test_folders_with_names_as_long_as_can_be_are_unified(site: Site, tool: Tool) -> None:
    path = deep_path(60, b"x" * 255) + b"/" + b"y" * 255
    guests = [site.add_guest(name, [File(path, _SAME)]) for name in ("web", "db")]
    assert unify(tool).unified == 2
    numbers = {snapshot(root)[path].inode for root in guests}
    assert len(numbers) == 1


@contextmanager
def _mounted(*options: str | Path) -> Iterator[None]:
    subprocess.run(["mount", *options], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--", options[-1]], check=True)


def test_other_mounts_below_a_root_are_not_entered(site: Site, tool: Tool) -> None:
    web = site.add_guest("web", [Folder("other"), Folder("bound"), File("file", _SAME)])
    site.add_guest("db", [File(f"{path}/file", _SAME) for path in ("other", "bound", "below")])
    outside = grow(site.filesystem.folder / "outside", [File("file", _SAME)])
    with (
        _mounted("-t", "tmpfs", "tmpfs", web / "other"),
        _mounted("--bind", outside, web / "bound"),
    ):
        (web / "other/file").write_bytes(_SAME)
        before = stamps(outside)
        report = unify(tool)
        assert (report.unified, report.skipped) == (2, {"other-mount": 2, "unique": 2})
        assert stamps(outside) == before


def test_a_file_mounted_over_a_guests_is_not_taken_for_it(site: Site, tool: Tool) -> None:
    web = site.add_guest("web", [File("cover", _SAME), File("file", b"x" * 99)])
    site.add_guest("db", [File("cover", _SAME), File("file", b"x" * 99)])
    outside = grow(site.filesystem.folder / "outside", [File("file", _SAME)])
    with _mounted("--bind", outside / "file", web / "cover"):
        before = stamps(outside)
        done = tool("vunify", "--all")
        assert done.returncode == 0, done.stderr
        assert stamps(outside) == before
        assert not is_immutable(outside / "file")
    assert len(set(inodes(site, "file", "web", "db"))) == 1
    assert not is_immutable(web / "cover")
    assert find_faults(site.pool) == []


@on("btrfs")
def test_subvolumes_below_a_root_are_not_entered(site: Site, tool: Tool) -> None:
    web = site.add_guest("web", [File("file", _SAME)])
    site.add_guest("db", [File("file", _SAME), File("sub/file", _SAME)])
    subprocess.run(["btrfs", "-q", "subvolume", "create", web / "sub"], check=True)
    (web / "sub/file").write_bytes(_SAME)
    before = stamps(web / "sub")
    report = unify(tool)
    assert report.skipped["other-mount"] == 1
    assert stamps(web / "sub") == before


_CHURN: Final = """
import os, sys
root, count = sys.argv[1], 0
while True:
    count += 1
    for number in range(20):
        folder = f"{root}/churn/{number}"
        os.makedirs(folder + "/below", exist_ok=True)
        for name in ("a", "below/b"):
            with open(f"{folder}/{name}", "wb") as file:
                file.write(b"the very same content")
        os.rename(folder + "/a", folder + "/c")
        os.unlink(folder + "/c")
        os.unlink(folder + "/below/b")
        os.rmdir(folder + "/below")
        if count % 2:
            os.rmdir(folder)
    if count == 1:
        print("ready", flush=True)
"""


@contextmanager
def _program(text: str, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", text, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
            assert process.poll() is None
        finally:
            process.kill()


@on("ext4")
def test_entries_that_come_and_go_are_nobodys_error(site: Site, tool: Tool) -> None:
    rows: list[Row] = [File(f"still/{number}", b"%020d" % number) for number in range(200)]
    guests = [site.add_guest(name, rows) for name in ("web", "db")]
    with _program(_CHURN, guests[0]):
        for _ in range(scaled(5, 200)):
            done = tool("vunify", "--all", "--json")
            assert done.returncode == 0, done.stderr
    unify(tool)
    assert len(set(inodes(site, "still/0", "web", "db"))) == 1
    assert find_faults(site.pool) == []


@on("btrfs")
def test_a_file_that_cannot_be_read_is_named_and_the_rest_is_done(site: Site, tool: Tool) -> None:
    damaged = os.urandom(1 << 16)
    with private_folder() as folder:
        mount = mount_image("btrfs", folder, size=256 << 20)
        for name in ("web", "db"):
            site.register(name, grow(mount / name, [File("file", _SAME), File("bad", damaged)]))
        subprocess.run(["umount", mount], check=True)
        wait_released(folder / "btrfs.img")
        _flip(folder / "btrfs.img", damaged)
        subprocess.run(["mount", "-o", "loop", folder / "btrfs.img", mount], check=True)
        report = unify(tool, "--all", "--pool", mount / "pool", code=20)
        assert sorted(path for path, _ in report.errors) == [f"{mount}/db/bad", f"{mount}/web/bad"]
        assert report.unified == 2
        assert not is_immutable(mount / "web/bad")


def _flip(image: Path, content: bytes) -> None:
    """Damage every place of the image where `content` stands; its checksum no longer fits."""
    with image.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        place = -1
        while (place := memory.find(content, place + 1)) >= 0:
            memory[place] ^= 0xFF


_SWAP: Final = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
folder, link = (os.fsencode(path) for path in sys.argv[1:])
print("ready", flush=True)
while True:
    if libc.renameat2(-100, folder, -100, link, 2):
        raise OSError(ctypes.get_errno(), "renameat2")
"""


def _canary(site: Site) -> Path:
    """A tree outside the guests whose files equal theirs: unifying them would be seen."""
    rows: list[Row] = [File(f"{number}", b"%020d" % number) for number in range(60)]
    rows += [File(f"deep/{number}", b"%020d" % number) for number in range(60)]
    return grow(site.filesystem.folder / "canary", rows)


def _look(tree: Path) -> object:
    """All of the tree but access times."""
    found = {path: (one[0], one[1], one[3], one[4]) for path, one in stamps(tree).items()}
    return snapshot(tree), found


def _add_swapped_guests(site: Site, canary: Path) -> list[Path]:
    rows: list[Row] = [File(f"swap/{number}", b"%020d" % number) for number in range(60)]
    rows += [File(f"swap/deep/{number}", b"%020d" % number) for number in range(60)]
    rows += [File(f"rest/{number}", b"%020d" % number) for number in range(60, 120)]
    links: list[Row] = [Symlink("to canary", os.fspath(canary))]
    return [site.add_guest(name, [*rows, *links]) for name in ("web", "db")]


@pytest.mark.timeout(300)
def test_a_folder_swapped_for_a_symlink_never_leads_a_run_outside(site: Site, tool: Tool) -> None:
    canary = _canary(site)
    guests = _add_swapped_guests(site, canary)
    before = _look(canary)
    deadline = monotonic() + scaled(2, 60)
    rounds = 0
    with _program(_SWAP, guests[0] / "swap", guests[0] / "to canary"):
        while monotonic() < deadline or rounds < 3:
            for arguments in (
                (("--all",), ("--undo", "--all")) if rounds % 3 == 2 else (("--all",),)
            ):
                done = tool("vunify", *arguments, "--json")
                assert done.returncode in (0, 20), done.stderr
                assert "Traceback" not in done.stderr
            rounds += 1
            assert _look(canary) == before
    assert rounds >= 3
    assert find_faults(site.pool) == []


@on("ext4")
def test_only_descriptors_lead_below_a_guests_root(site: Site, tool: Tool) -> None:
    """No call names a path that goes through a guest's root, as strace(1) shows."""
    trace = site.filesystem.folder / "trace"
    try:
        subprocess.run(["strace", "-V"], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("strace is not installed")
    guests = [site.add_guest(name, [File("a/b/file", _SAME)]) for name in ("web", "db")]
    command: list[str | Path] = ["strace", "-f", "-qq", "-e", "trace=%file", "-o", trace]
    command += [Path(sys.executable).parent / "vunify", "--all", "-q"]
    subprocess.run(command, check=True, timeout=100)
    lines = trace.read_text().splitlines()
    assert any(f'"{guests[0]}"' in line for line in lines)
    assert [line for line in lines if f"{guests[0]}/" in line or '"a/b/' in line] == []


@on("ext4")
def test_a_file_of_a_guest_may_have_the_name_of_a_spare(site: Site, tool: Tool) -> None:
    rows: list[Row] = [
        File(name, _SAME) for name in (".vstore-0123456789abcdef", "spare", "intent-1", "copy-0")
    ]
    guests = [site.add_guest(name, rows) for name in ("web", "db")]
    before = [snapshot(root) for root in guests]
    for _ in range(2):
        unify(tool)
        undo(tool)
    after = [snapshot(root) for root in guests]
    assert [differences(*pair) for pair in zip(before, after, strict=True)] == [[], []]


@on("ext4")
def test_a_guest_full_of_fifos_holds_nobody_up(site: Site, tool: Tool) -> None:
    """A name that was a file when it was seen may be a FIFO when it is opened."""
    program = """
import os, sys
os.chdir(sys.argv[1])
print("ready", flush=True)
while True:
    for number in range(50):
        name, other = f"{number}", f"fifo{number}"
        try:
            os.rename(name, f"file{number}")
            os.mkfifo(name)
            os.rename(f"file{number}", name)
        except OSError:
            pass
"""
    rows: list[Row] = [File(f"{number}", b"%020d" % number) for number in range(50)]
    guests = [site.add_guest(name, rows) for name in ("web", "db")]
    with _program(program, guests[0]):
        for _ in range(scaled(5, 100)):
            done = tool("vunify", "--all")
            assert done.returncode in (0, 20), done.stderr
            assert "Traceback" not in done.stderr
    assert find_faults(site.pool) == []


@on("ext4")
def test_each_file_in_a_folder_of_its_own_needs_no_more_descriptors_than_there_are(
    site: Site, tool: Tool
) -> None:
    rows: list[Row] = [File(f"{number}/file", b"%020d" % number) for number in range(1_500)]
    for name in ("web", "db"):
        site.add_guest(name, rows)
    assert unify(tool).unified == 3_000
    assert find_faults(site.pool) == []
