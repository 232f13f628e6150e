"""Memory does not grow with the guest: many entries, and one file of holes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.fixtures.filesystems import (
    Filesystem,
    Site,
    make_site,
    mount_image,
    private_folder,
    remove,
)
from tests.fixtures.probes import is_soak, need, on, scaled
from tests.fixtures.trees import File

pytestmark = [need("immutable", "lease"), on("xfs")]

_LIMIT_KIB = 300 << 10
_ROOM = 20 << 30
_APART = '"$@"; exit $?'
"""A shell between: a process that is forked from a large one begins with that one's peak."""
_RUN = """
import resource, sys
from vstore.commands import vserver_copy
try:
    vserver_copy.command.main(sys.argv[1:], standalone_mode=False)
finally:
    own, others = (resource.getrusage(who).ru_maxrss for who in (0, -1))
    print(own, others, file=sys.stderr)
"""


@pytest.fixture
def site(fs: Filesystem, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """Under make soak it has room for two million files, in an image of its own."""
    with ExitStack() as stack:
        if is_soak():
            folder = stack.enter_context(private_folder())
            mount = mount_image("xfs", folder, size=_ROOM)
            stack.callback(remove, mount)
            fs = Filesystem("xfs", mount, mount)
        made = make_site(fs)
        for name in ("confdir", "vdirbase", "rundir"):
            monkeypatch.setenv(f"VSERVER_{name.upper()}", os.fspath(getattr(made, name)))
        yield made


def _peaks(*arguments: str) -> tuple[int, int]:
    """KiB at most of the sending side, and of the largest of the receiving side's processes."""
    command = ["sh", "-c", _APART, "sh", sys.executable, "-c", _RUN, "-q", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    own, others = done.stderr.split()[-2:]
    return int(own), int(others)


@pytest.mark.timeout(1800 if is_soak() else 120)
def test_memory_is_bounded_with_many_entries(site: Site) -> None:
    """Few of the files are equal; the rest are of many sizes, as in a spool."""
    root = site.add_guest("web")
    for folder in range(scaled(10, 400)):
        place = root / f"{folder}"
        place.mkdir()
        for number in range(2500):
            (place / f"{number}").write_bytes(b"%d of %d " % (number, folder) * 3)
    own, others = _peaks("web", "copy")
    assert own < _LIMIT_KIB
    assert others < _LIMIT_KIB
    for changed in ("7/7", "new"):  # in one folder, and in the root: all is made anew
        (root / changed).write_text("changed")
        assert max(_peaks("--refresh", "web", "copy")) < _LIMIT_KIB
        assert (site.root("copy") / changed).read_text() == "changed"
    names = [sum(len(files) for _, _, files in os.walk(tree)) for tree in _trees(site)]
    assert names[0] == names[1]


@pytest.mark.timeout(1800 if is_soak() else 120)
def test_memory_is_bounded_with_many_folders(site: Site) -> None:
    """Each with one name of a file that has another in the next one."""
    root = site.add_guest("web")
    for number in range(scaled(3000, 200_000)):
        place = root / f"{number // 1000}/{number}"
        place.mkdir(parents=True)
        if number % 2:
            (place / "link").hardlink_to(root / f"{number // 1000}/{number - 1}/file")
        else:
            (place / "file").write_bytes(b"%d " % number * 9)
    assert max(_peaks("web", "copy")) < _LIMIT_KIB
    (root / "2/2345/link").write_text("changed by both of its names")
    before = [(site.root("copy") / name).stat().st_ino for name in ("1", "2", "2/2000", "2/2345")]
    assert max(_peaks("--refresh", "web", "copy")) < _LIMIT_KIB
    after = [(site.root("copy") / name).stat().st_ino for name in ("1", "2", "2/2000", "2/2345")]
    assert [was == now for was, now in zip(before, after, strict=True)] == [
        True,
        False,
        False,
        False,
    ]
    assert (site.root("copy") / "2/2344/file").read_text() == "changed by both of its names"


def _trees(site: Site) -> tuple[Path, Path]:
    return site.root("web"), site.root("copy")


@pytest.mark.timeout(1800 if is_soak() else 120)
def test_a_large_file_of_holes_stays_one(site: Site) -> None:
    size = scaled(7 << 30, 50 << 30)  # more than the disk has
    site.add_guest("web", [File("disk", b"data" * 5000, at=1 << 30, size=size)])
    own, others = _peaks("web", "copy")
    assert own < _LIMIT_KIB
    assert others < _LIMIT_KIB
    before, after = ((tree / "disk").stat() for tree in _trees(site))
    assert (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    assert after.st_blocks * 512 < 1 << 20
