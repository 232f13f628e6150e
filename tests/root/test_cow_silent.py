"""A path that leads to a file system which does not answer: who goes there waits, the others do
not.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.fixtures.cow import Ran, in_guest
from tests.fixtures.filesystems import Site
from tests.fixtures.probes import need, on
from tests.fixtures.windows import CONTENT, Shared, shared_file
from vrun.cow.patience import LONGEST_S

pytestmark = [need("immutable", "lease", "fuse"), on("ext4")]

_WITHIN_S = 30


@pytest.fixture
def shared(site: Site) -> Iterator[Shared]:
    with shared_file(site) as made:
        yield made


@pytest.fixture
def silent(site: Site) -> Iterator[Path]:
    """A mount in the first guest's tree whose server never says a word."""
    place = site.root("web") / "silent"
    place.mkdir()
    server_fd = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={server_fd},rootmode=40000,user_id=0,group_id=0"
    words = ("mount", "-i", "-t", "fuse", "-o", options, "silent", os.fspath(place))
    subprocess.run(words, check=True, pass_fds=[server_fd])
    try:
        yield place
    finally:
        os.close(server_fd)  # all who wait there are told that it is gone
        subprocess.run(["umount", "-l", place], check=True)
        place.rmdir()


def _go_there() -> int:
    """A process that opens a file there, for writing."""
    pid = os.fork()
    if pid == 0:
        with suppress(OSError):
            os.open("/silent/file", os.O_WRONLY)
        os._exit(0)
    return pid


def _write_beside() -> str:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_WITHIN_S)  # whoever waits for the supervisor dies of it
    pid = _go_there()
    while _wchan(pid) == "0":
        time.sleep(0.01)
    time.sleep(0.1)
    with open("/conf", "r+b") as file:
        file.write(b"mine")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return Path("/conf").read_text()


def _wchan(pid: int) -> str:
    return Path(f"/proc/{pid}/wchan").read_text()


def test_a_guest_writes_on_while_one_of_its_processes_waits_for_it(
    site: Site, shared: Shared, silent: Path
) -> None:
    ran = Ran()
    content = in_guest(site.pool, site.root("web"), _write_beside, ran=ran)
    assert content.encode() == b"mine" + CONTENT[4:]
    assert any("does not answer" in note for note in ran.notes), ran.notes


def _write_now_and_then() -> int:
    for pause_s in (LONGEST_S + 1.5, 0):
        with open("/own", "wb") as file:
            file.write(b"own")
        time.sleep(pause_s)
    return Path("/own").stat().st_size


def test_a_supervisor_with_nothing_to_do_lives_on(site: Site, shared: Shared) -> None:
    ran = Ran()
    assert in_guest(site.pool, site.root("web"), _write_now_and_then, ran=ran) == 3
    assert not ran.notes
