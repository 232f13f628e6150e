"""A kernel that stamps two rewrites with one time: what was read between them is never kept.

Before Linux 6.13 a file's times are those of the last timer tick. A digest of what was read between
two rewrites of one tick would stand in the index under the very key that the second one has.
"""

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from time import sleep

import pytest
from blake3 import blake3

from tests.conftest import Tool
from tests.fixtures.filesystems import Filesystem, Site
from tests.fixtures.probes import need, scaled
from tests.fixtures.runs import SETTLED_S, find_faults, unify
from tests.fixtures.trees import EPOCH_NS, MAY_DIFFER, File, Row, differences, snapshot
from vstore import reading
from vstore.exclude import NOTHING
from vstore.scan import Tree

pytestmark = need("lease", "immutable")

_TRIES = 500
_FILES = 600
_OLD = b"old content of the file " * 9
_NEW = b"new content of the file " * 9


def _write(path: Path, content: bytes) -> None:
    with path.open("r+b", buffering=0) as file:
        file.write(content)


def test_what_is_read_within_a_tick_of_a_change_is_marked_so(fs: Filesystem) -> None:
    path = fs.folder / "file"
    path.write_bytes(_OLD)
    root_fd = os.open(fs.folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        tree = Tree(root_fd, os.fstat(root_fd).st_dev, NOTHING, min_size=1, skip_ino=0)
        reader = reading.Reader([tree], ())
        for _ in range(_TRIES):
            _write(path, _OLD)
            key = reading.key_of(path.stat())
            ((outcome, _, _, fresh),) = reader.read([(0, b"", b"file", key)])
            _write(path, _NEW)
            assert outcome == reading.READ
            assert fresh
            if reading.key_of(path.stat()) == key:
                return
    finally:
        os.close(root_fd)
    pytest.skip(f"Linux {os.uname().release} gave each of {_TRIES} rewrites a time of its own")


_HAMMER = """
import random, sys, time
folder, old, new = sys.argv[1], sys.argv[2].encode(), sys.argv[3].encode()
print("ready", flush=True)
while True:
    path = f"{folder}/{random.randrange(%d)}"
    for content in random.choice(((old, new), (new, old))):
        with open(path, "r+b", buffering=0) as file:
            file.write(content)
        time.sleep(random.random() / 1000)
"""


@contextmanager
def _hammer(folder: Path) -> Iterator[None]:
    """Files of `folder` are rewritten twice within a tick, one after the other."""
    command = (sys.executable, "-c", _HAMMER % _FILES, folder, _OLD.decode(), _NEW.decode())
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield
            assert process.poll() is None
        finally:
            process.kill()


def _wrong_digests(site: Site, folder: Path) -> list[Path]:
    """The files of `folder` for whose content, as they are now, the index has another digest."""
    with closing(sqlite3.connect(site.pool / "index.sqlite")) as database:
        rows = database.execute("SELECT ino, size, mtime, ctime, digest FROM digests").fetchall()
    known = {tuple(row[:4]): row[4] for row in rows}
    digests = {path: known.get(reading.key_of(path.stat())) for path in folder.iterdir()}
    return [
        path
        for path, digest in digests.items()
        if digest is not None and digest != blake3(path.read_bytes()).digest()
    ]


@pytest.mark.timeout(900)
def test_content_that_changed_twice_in_a_tick_is_never_taken_for_what_it_was(
    site: Site, tool: Tool
) -> None:
    """All look equal and none is, but for twins: each run reads what the index does not know.

    So many are read one by one, not under leases that are held until they are linked.
    """
    rows: list[Row] = [
        File(f"{number}", (_OLD, _NEW)[number % 2], mtime_ns=EPOCH_NS + number)
        for number in range(_FILES)
    ]
    web, db = site.add_guest("web", rows), site.add_guest("db", [File("one", _OLD[::-1])])
    for _ in range(scaled(10, 100)):
        with _hammer(web):
            assert unify(tool, "web", "db", "--ignore-mtime").unified == 0
        assert _wrong_digests(site, web) == []
    siblings: list[Row] = [File("old", _OLD), File("new", _NEW)]
    mail = site.add_guest("mail", siblings)
    sleep(SETTLED_S)
    guests = [web, db, mail]
    before = [snapshot(root) for root in guests]
    unify(tool, "--all", "--ignore-mtime", "--link-twins")
    for root, old in zip(guests, before, strict=True):
        assert differences(old, snapshot(root), ignoring={*MAY_DIFFER, "mtime_ns", "group"}) == []
    assert find_faults(site.pool) == []
