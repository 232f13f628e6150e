"""Read leases of this kernel, which guard every moment in which a shared inode is not immutable."""

import mmap
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

import pytest

from tests.fixtures.filesystems import Filesystem, is_immutable
from tests.fixtures.probes import need
from vstore import lease

pytestmark = need("lease", "immutable")


@pytest.fixture(autouse=True)
def _no_break_signals() -> None:
    lease.ignore_break_signals()


@pytest.fixture
def path(fs: Filesystem) -> Path:
    file = fs.folder / "file"
    file.write_bytes(bytes(4096))
    return file


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    file_fd = os.open(path, flags)
    try:
        yield file_fd
    finally:
        os.close(file_fd)


def test_no_lease_while_someone_has_the_file_open_for_writing(path: Path) -> None:
    with _opened(path, os.O_RDONLY) as reader_fd:
        with _opened(path, os.O_WRONLY):
            assert not lease.take(reader_fd)
        assert lease.take(reader_fd)


def test_no_lease_while_a_shared_mapping_can_write(path: Path) -> None:
    with _opened(path, os.O_RDWR) as writer_fd:
        mapping = mmap.mmap(writer_fd, 4096, mmap.MAP_SHARED)
    with _opened(path, os.O_RDONLY) as reader_fd:
        assert not lease.take(reader_fd)
        mapping.close()
        assert lease.take(reader_fd)


def test_an_open_for_writing_is_held_up_and_noticed(path: Path) -> None:
    with _opened(path, os.O_RDONLY) as reader_fd:
        assert lease.take(reader_fd)
        assert lease.is_unbroken(reader_fd)
        with pytest.raises(BlockingIOError):
            os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        assert not lease.is_unbroken(reader_fd)


def test_whoever_waits_for_a_lease_is_found_and_goes_on_after_it(path: Path) -> None:
    with _opened(path, os.O_RDONLY) as reader_fd:
        assert lease.take(reader_fd)
        writer = subprocess.Popen(["dd", "if=/dev/zero", f"of={path}", "count=1", "status=none"])
        try:
            deadline = monotonic() + 30
            while not (waiting := lease.find_waiters(reader_fd)) and monotonic() < deadline:
                sleep(0.02)
            assert waiting == [writer.pid]
            lease.release(reader_fd)
            assert writer.wait(timeout=30) == 0
        finally:
            writer.kill()
            writer.wait()


def test_a_frozen_file_can_be_leased(path: Path) -> None:
    subprocess.run(["chattr", "+i", path], check=True)
    assert is_immutable(path)
    with _opened(path, os.O_RDONLY) as reader_fd:
        assert lease.take(reader_fd)
