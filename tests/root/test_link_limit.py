"""Limits of the file system: its links to one inode, and its room."""

import os
from pathlib import Path
from time import monotonic

import pytest

from tests.conftest import Tool
from tests.fixtures.filesystems import (
    Filesystem,
    Site,
    free_bytes,
    freed,
    make_site,
    mount_image,
    remove,
)
from tests.fixtures.probes import is_soak, need, on, scaled
from tests.fixtures.runs import Report, find_faults, list_objects
from tests.fixtures.trees import EPOCH_NS, File, differences, snapshot

pytestmark = need("immutable", "lease")

_EXT4_LINK_MAX = 65_000  # fs/ext4/ext4.h


def _add_equal_files(root: Path, count: int) -> None:
    """Grow `count` equal files below `root`, quicker than from a table."""
    for folder in range(-(-count // 1000)):
        (root / str(folder)).mkdir()
        folder_fd = os.open(root / str(folder), os.O_RDONLY)
        for number in range(min(1000, count - 1000 * folder)):
            file_fd = os.open(str(number), os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=folder_fd)
            os.write(file_fd, b"the same in every one of them")
            os.utime(file_fd, ns=(EPOCH_NS, EPOCH_NS))
            os.close(file_fd)
        os.close(folder_fd)


@on("ext4")
@pytest.mark.timeout(300)
def test_more_equal_files_than_an_inode_can_have_links_become_several_objects(
    site: Site, tool: Tool
) -> None:
    count = 70_000
    site.add_guest("web")
    _add_equal_files(site.root("web"), count)
    done = tool("vunify", "--all", "--link-twins", "--json", timeout_s=250)
    assert done.returncode == 0, done.stderr
    report = Report.parse(done.stdout)
    assert (report.unified, report.new, report.skipped, report.errors) == (count, 2, {}, [])
    links = sorted(path.stat().st_nlink for path in list_objects(site.pool))
    assert links == [count + 2 - _EXT4_LINK_MAX, _EXT4_LINK_MAX]
    assert find_faults(site.pool) == []
    done = tool("vunify", "--all", "--link-twins", "--json", timeout_s=250)
    assert Report.parse(done.stdout).already == count


_SMALL = {"ext4": 24 << 20, "xfs": 300 << 20, "btrfs": 110 << 20}


@pytest.fixture
def tiny(fs: Filesystem, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A site on a file system of its own that is as small as its kind can be."""
    mount = mount_image(fs.kind, fs.folder, size=_SMALL[fs.kind])
    (mount / "top").mkdir()
    site = make_site(Filesystem(fs.kind, mount, mount / "top"))
    for name in ("confdir", "vdirbase", "rundir"):
        monkeypatch.setenv(f"VSERVER_{name.upper()}", os.fspath(getattr(site, name)))
    return site


def _fill(site: Site) -> Path:
    """Take all the room that is left, and give it up by removing the file that is returned."""
    path = site.filesystem.folder / "ballast"
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 16, 1 << 12, 1):
            try:
                while file.write(b"\xff" * size):
                    pass
                os.fsync(file.fileno())
            except OSError:
                continue
    return path


def _remove_and_wait(ballast: Path) -> None:
    """Give the room up; the file system has it a moment later."""
    folder, size = ballast.parent, ballast.stat().st_size
    before = free_bytes(folder)
    ballast.unlink()
    freed(folder, before, size)


def _rows() -> list[File]:
    return [File(f"usr/{number}", b"%05000d" % number) for number in range(40)]


def test_a_full_disk_costs_no_file_and_is_said(tiny: Site, tool: Tool) -> None:
    before = [snapshot(tiny.add_guest(name, _rows())) for name in ("web", "db")]
    ballast = _fill(tiny)
    done = tool("vunify", "--all")
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 9, 20), done.stderr
    assert done.returncode == 0 or "No space left" in done.stderr
    after = [snapshot(tiny.root(name)) for name in ("web", "db")]
    assert [differences(*pair) for pair in zip(before, after, strict=True)] == [[], []]
    _remove_and_wait(ballast)
    done = tool("vunify", "--all")
    assert done.returncode == 0, done.stderr
    after = [snapshot(tiny.root(name)) for name in ("web", "db")]
    assert [differences(*pair) for pair in zip(before, after, strict=True)] == [[], []]
    assert find_faults(tiny.pool) == []
    remove(tiny.filesystem.mount)


def test_undo_looks_for_room_before_it_begins(tiny: Site, tool: Tool) -> None:
    before = [snapshot(tiny.add_guest(name, _rows())) for name in ("web", "db", "mail")]
    assert tool("vunify", "--all").returncode == 0
    ballast = _fill(tiny)
    done = tool("vunify", "--undo", "--all")
    assert done.returncode == 9, done.stderr
    after = [snapshot(tiny.root(name)) for name in ("web", "db", "mail")]
    assert {entry.links for entry in after[0].values() if entry.kind == "-"} == {4}
    assert find_faults(tiny.pool) == []
    _remove_and_wait(ballast)
    assert tool("vunify", "--undo", "--all").returncode == 0
    after = [snapshot(tiny.root(name)) for name in ("web", "db", "mail")]
    assert [differences(*pair) for pair in zip(before, after, strict=True)] == [[], [], []]
    remove(tiny.filesystem.mount)


@need("soak")
@on("ext4")
@pytest.mark.timeout(600)
def test_the_link_limit_costs_no_time_over_many_objects(site: Site, tool: Tool) -> None:
    assert is_soak()
    site.add_guest("web")
    _add_equal_files(site.root("web"), scaled(1000, 270_000))
    began = monotonic()
    done = tool("vunify", "--all", "--link-twins", "--json", timeout_s=500)
    assert done.returncode == 0, done.stderr
    assert Report.parse(done.stdout).new == 5
    assert monotonic() - began < 120
