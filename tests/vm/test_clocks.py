"""What this kernel's clocks hide; where they do not, tests that rely on it would prove nothing."""

import os

from tests.fixtures.filesystems import Filesystem
from tests.vm.clocks import rewrite_unnoticed, times_of

_ROUNDS = 2000


def test_most_rewrites_of_one_size_keep_mtime_and_ctime(fs: Filesystem) -> None:
    unnoticed = 0
    with (fs.folder / "file").open("xb", buffering=0) as file:
        os.pwrite(file.fileno(), b"0000", 0)
        for number in range(_ROUNDS):
            before = times_of(file.fileno())
            os.pwrite(file.fileno(), b"%04d" % number, 0)
            unnoticed += times_of(file.fileno()) == before
    assert unnoticed > _ROUNDS / 2, f"{os.uname().release}: {unnoticed} of {_ROUNDS}"


def test_a_rewrite_after_a_reader_can_go_unnoticed(fs: Filesystem) -> None:
    path = fs.folder / "file"
    read: list[bytes] = []
    with path.open("xb", buffering=0) as file:
        rewrite_unnoticed(
            file.fileno(), b"old", b"new", between=lambda: read.append(path.read_bytes())
        )
    assert read[-1] == b"old"
    assert path.read_bytes() == b"new"
