"""`vunify --link reflink`: guests share blocks; a file changes in nothing but where it lies."""

import os
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Event
from time import monotonic, sleep
from typing import Final

import pytest

from tests.conftest import Tool
from tests.fixtures.ahead import before_others
from tests.fixtures.filesystems import Filesystem, Site, free_bytes
from tests.fixtures.probes import need, on
from tests.fixtures.runs import (
    SETTLED_S,
    Report,
    find_faults,
    inodes,
    list_objects,
    stamps,
    unify,
    write_list,
)
from tests.fixtures.trees import (
    EPOCH_NS,
    File,
    Link,
    Row,
    differences,
    grow,
    opened,
    snapshot,
)
from tests.fixtures.windows import leases_on, wait_for
from vstore import extents
from vstore.blocks import check_sharing
from vstore.errors import NotPermitted

pytestmark = need("immutable", "lease", "reflink")

_NAMES: Final = ("web", "db", "mail")
_UNTOUCHED: Final = frozenset({"blocks"})
"""What of a file may be found changed: its blocks; not even inode numbers and link counts."""

both = on("xfs", "btrfs")


def _system() -> list[Row]:
    return [
        File("lib/one", bytes(range(256)) * 4000),
        File("lib/odd", b"not a whole number of blocks" * 999),
        File("bin/su", b"ELF" * 9000, mode=0o4755, uid=7),
        File("var/holes", b"middle" * 9000, at=1 << 20, size=3 << 20),
    ]


def _reflink(tool: Tool, *arguments: str | Path, code: int = 0) -> Report:
    return unify(tool, "--link", "reflink", *(arguments or ("--all",)), code=code)


def _shares(path: Path) -> bool:
    """Whether filefrag(8) says that all of the file's extents are shared."""
    shown = subprocess.run(["filefrag", "-sv", "--", path], capture_output=True, check=True)
    lines = [line for line in shown.stdout.decode().splitlines() if line[:5].strip(" :").isdigit()]
    return bool(lines) and all("shared" in line for line in lines)


def _settle(site: Site, before: int, wanted: int) -> int:
    """The bytes that became free since `before`, once they are `wanted` to 1 % or time is up."""
    deadline = monotonic() + 60
    while True:
        gained = free_bytes(site.vdirbase) - before
        if abs(gained - wanted) <= wanted / 100 or monotonic() > deadline:
            return gained
        sleep(0.2)


@both
def test_equal_files_share_blocks_and_nothing_else_changes(site: Site, tool: Tool) -> None:
    guests = [site.add_guest(name, _system()) for name in _NAMES]
    before, stamped = [snapshot(root) for root in guests], [stamps(root) for root in guests]
    report = _reflink(tool)
    after = [snapshot(root) for root in guests]
    for root, old, new, stamp in zip(guests, before, after, stamped, strict=True):
        assert differences(old, new, ignoring=_UNTOUCHED) == []
        assert stamps(root) == stamp
        assert [path for path in ("lib/one", "lib/odd", "bin/su") if not _shares(root / path)] == []
    assert (report.seen, report.unified, report.new, report.skipped) == (12, 12, 0, {})
    assert list_objects(site.pool) == []


@both
def test_metadata_need_not_be_equal(site: Site, tool: Tool) -> None:
    content = os.urandom(50_000)
    site.add_guest("web", [File("one", content, mode=0o600, uid=5)])
    site.add_guest("db", [File("two", content, mtime_ns=EPOCH_NS + 1, xattrs={"user.a": b"b"})])
    assert _reflink(tool).unified == 2
    assert _shares(site.root("web") / "one")


@both
def test_a_second_run_finds_all_shared(site: Site, tool: Tool) -> None:
    for name in _NAMES:
        site.add_guest(name, _system())
    _reflink(tool)
    report = _reflink(tool)
    assert (report.already, report.unified, report.reclaimed) == (12, 0, 0)


@both
def test_a_digest_is_kept_and_the_kernel_is_asked_all_the_same(site: Site, tool: Tool) -> None:
    """Given an index that calls two files equal which are not, then neither changes."""
    files = {name: os.urandom(60_000) for name in ("web", "db")}
    for name, content in files.items():
        site.add_guest(name, [File("file", content)])
    sleep(SETTLED_S)
    assert _reflink(tool).skipped == {"unique": 2}
    with closing(sqlite3.connect(site.pool / "index.sqlite")) as index, index:
        assert index.execute("SELECT count(*) FROM digests").fetchone() == (2,)
        index.execute("UPDATE digests SET digest = zeroblob(32)")
    assert _reflink(tool).skipped == {"changed": 1, "unique": 1}
    assert {name: (site.root(name) / "file").read_bytes() for name in files} == files


@both
def test_bytes_reclaimed_are_those_that_the_file_system_got_back(site: Site, tool: Tool) -> None:
    rows: list[Row] = [File(f"big/{number}", os.urandom(1 << 20)) for number in range(12)]
    rows += [File(f"doc/{number}", os.urandom(6_000)) for number in range(200)]
    rows += [File("holes", os.urandom(1 << 18), at=1 << 22, size=1 << 25)]
    for name in _NAMES:
        site.add_guest(name, rows)
    free = free_bytes(site.vdirbase)
    promised = _reflink(tool, "--all", "--dry-run")
    assert not _shares(site.root("web") / "big/0")
    report = _reflink(tool)
    assert promised.reclaimed == report.reclaimed > 2 * 12 << 20
    assert promised.unified == report.unified == 3 * len(rows)
    gained = _settle(site, free, report.reclaimed)
    assert abs(gained - report.reclaimed) <= report.reclaimed / 50


@both
def test_files_that_a_guest_writes_to_are_shared_and_stay_its_own(site: Site, tool: Tool) -> None:
    content = os.urandom(1 << 20)
    web, db = (site.add_guest(name, [File("file", content)]) / "file" for name in ("web", "db"))
    with web.open("r+b", buffering=0) as writer:
        assert _reflink(tool).unified == 2
        writer.write(b"new")
    assert db.read_bytes() == content
    assert web.read_bytes() == b"new" + content[3:]
    report = _reflink(tool)
    assert (report.already, report.unified, report.skipped) == (0, 0, {"unique": 2})


@both
def test_a_writer_who_comes_while_a_file_is_read_does_not_wait_for_its_end(
    site: Site, tool: Tool
) -> None:
    content = os.urandom(1 << 20)
    rows: list[Row] = [File("image", content, at=1 << 30, size=2 << 30)]
    images = [site.add_guest(name, rows) / "image" for name in ("web", "db")]
    is_over = Event()
    waits: list[float] = []

    def write() -> None:
        wait_for(lambda: any(map(leases_on, images)))  # a file is read from now on
        while not is_over.is_set():
            for image in images:
                began = monotonic()
                os.close(os.open(image, os.O_WRONLY))
                waits.append(monotonic() - began)
            sleep(0.02)

    with before_others(), ThreadPoolExecutor(1) as writers:
        writer = writers.submit(write)
        began = monotonic()
        try:
            report = _reflink(tool)
        finally:
            is_over.set()
        took = monotonic() - began
        writer.result()
    assert (report.unified, report.errors) == (2, [])
    assert max(waits) < took / 2


@both
def test_copies_that_share_already_give_their_blocks_back_once(site: Site, tool: Tool) -> None:
    """Given two pairs, each of which shares blocks, then one pair's are free, and counted once."""
    content = os.urandom(8 << 20)
    for name in ("one", "two"):
        site.add_guest(name, [File("file", content)])
    for copy, name in (("six", "one"), ("ten", "two")):
        site.add_copy(copy, site.root(name))
    _reflink(tool, "one")  # makes the pool, whose own size is not the guests'
    free = free_bytes(site.vdirbase)
    promised = _reflink(tool, "--all", "--dry-run")
    report = _reflink(tool)
    assert promised.reclaimed == report.reclaimed == len(content)
    assert abs(_settle(site, free, len(content)) - len(content)) <= len(content) / 50


@on("btrfs")
def test_files_inside_their_inode_are_left_alone(site: Site, tool: Tool) -> None:
    for name in ("web", "db"):
        site.add_guest(name, [File("small", b"a" * 500), File("large", b"b" * 9000)])
    report = _reflink(tool)
    assert (report.unified, report.skipped) == (2, {"inline": 2})


@on("xfs")
def test_a_file_of_less_than_a_block_shares_one(site: Site, tool: Tool) -> None:
    for name in ("web", "db"):
        site.add_guest(name, [File("small", b"a" * 500)])
    report = _reflink(tool)
    assert (report.unified, report.reclaimed) == (2, 4096)


@both
def test_names_of_one_inode_count_and_stay_together(site: Site, tool: Tool) -> None:
    content = os.urandom(9000)
    rows: list[Row] = [File("one", content), Link("two", to="one")]
    web = site.add_guest("web", rows)
    site.add_guest("db", [File("file", content)])
    before = snapshot(web)
    assert _reflink(tool).unified == 3
    assert differences(before, snapshot(web), ignoring=_UNTOUCHED) == []


@both
def test_files_whose_storage_somebody_chose_are_left_alone(site: Site, tool: Tool) -> None:
    for name in ("web", "db"):
        site.add_guest(name, [File("file", bytes(9000)), File("log", b"a" * 9000)])
        subprocess.run(["chattr", "+i", site.root(name) / "file"], check=True)
        subprocess.run(["chattr", "+a", site.root(name) / "log"], check=True)
    assert _reflink(tool).skipped == {"immutable": 2, "flags": 2}


@both
def test_exclude_list_and_size_limit_hold(site: Site, tool: Tool) -> None:
    for name in ("web", "db"):
        site.add_guest(name, [File("in", b"a" * 9000), File("out", b"b" * 9000), File("x", b"c")])
    report = _reflink(tool, "--all", "--exclude-from", write_list(site, "/out\n"))
    assert (report.unified, report.skipped) == (2, {"excluded": 2, "small": 2})


@both
def test_a_plain_tree_needs_no_promise(site: Site, tool: Tool) -> None:
    site.add_guest("web", _system())
    tree = grow(site.vdirbase / "tree", _system())
    assert _reflink(tool, "web", "--root", tree).unified == 8


@both
def test_no_time_is_said_for_every_file(site: Site, tool: Tool) -> None:
    for name in _NAMES:
        site.add_guest(name, _system())
    assert _reflink(tool, "--all", "--time-budget", "0").skipped == {"time-budget": 12}


@on("ext4")
def test_a_file_system_without_clones_is_refused(site: Site, tool: Tool) -> None:
    site.add_guest("web", _system())
    done = tool("vunify", "--link", "reflink", "web")
    assert done.returncode == NotPermitted.exit_code
    assert "cannot share blocks" in done.stderr
    assert "hint: " in done.stderr


@both
def test_a_file_system_that_lies_about_clones_is_refused(
    fs: Filesystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(fs.folder) as folder_fd:
        check_sharing(folder_fd, "here")
        monkeypatch.setattr(extents, "clone", lambda *_: True)  # an empty file is no clone
        with pytest.raises(NotPermitted, match="does not read as what was cloned"):
            check_sharing(folder_fd, "here")


# --- --link auto and subvolumes


def _add_subvolume(site: Site, name: str, rows: list[Row]) -> Path:
    root = site.root(name)
    subprocess.run(["btrfs", "-q", "subvolume", "create", root], check=True)
    site.register(name, root)
    return grow(root, rows)


@on("btrfs")
def test_subvolumes_share_blocks_where_inodes_cannot_be(site: Site, tool: Tool) -> None:
    for name in ("web", "db"):
        _add_subvolume(site, name, _system())
    done = tool("vunify", "web", "db")
    assert done.returncode == NotPermitted.exit_code
    assert "--link reflink" in done.stderr
    assert _reflink(tool, "web", "db").unified == 8
    assert _reflink(tool, "web", "db").already == 8


@on("btrfs")
def test_auto_shares_inodes_where_it_can_and_says_who_shares_what(site: Site, tool: Tool) -> None:
    site.add_guest("web", [*_system(), File("own", os.urandom(9000))])
    site.add_guest("db", _system())
    own = (site.root("web") / "own").read_bytes()
    mail = _add_subvolume(site, "mail", [*_system(), File("other", own, mode=0o600)])
    done = tool("vunify", "--link", "auto", "--all")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["sharing inodes: db web", "sharing blocks: mail"]
    assert len(set(inodes(site, "lib/one", "web", "db"))) == 1
    assert [path for path in ("lib/one", "lib/odd", "other") if not _shares(mail / path)] == []
    assert find_faults(site.pool) == []
    report = unify(tool, "--link", "auto", "--all")
    assert (report.seen, report.already, report.skipped) == (14, 13, {"unique": 1})


@both
def test_auto_shares_blocks_where_nothing_can_be_frozen(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("web", "db"):
        site.add_guest(name, _system())
    command = [
        *("setpriv", "--bounding-set", "-linux_immutable", "--inh-caps", "-linux_immutable"),
        *(os.fspath(Path(sys.executable).parent / "vunify"), "--link", "auto", "--all"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "sharing blocks: db web"
    assert _shares(site.root("web") / "lib/one")
