"""Blocks of a file: what is said to differ, put over the base, gives the file."""

import os
import socket
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from vstore.copy import blocks
from vstore.copy.choice import Chooser
from vstore.copy.messages import Base, Dialogue
from vstore.copy.wire import Channel

_BLOCK = 4096


def _write(path: Path, content: bytes) -> int:
    path.write_bytes(content)
    return os.open(path, os.O_RDONLY)


_pieces = st.lists(st.sampled_from([b"a", b"b", b"\0"]), max_size=12).map(
    lambda letters: b"".join(letter * _BLOCK for letter in letters)
)
_tails = st.binary(max_size=50)


@settings(deadline=None, max_examples=200)
@given(base=st.tuples(_pieces, _tails), new=st.tuples(_pieces, _tails))
def test_what_differs_makes_the_file_of_its_base(
    tmp_path_factory: pytest.TempPathFactory,
    base: tuple[bytes, bytes],
    new: tuple[bytes, bytes],
) -> None:
    folder = tmp_path_factory.mktemp("blocks")
    was, now = b"".join(base), b"".join(new)
    base_fd, fd = _write(folder / "base", was), _write(folder / "new", now)
    try:
        digests = blocks.digest_blocks(base_fd, len(was), _BLOCK)
        whole, own = blocks.digest_both(fd, len(now), _BLOCK)
        assert whole == blake3(now).digest()
        assert own == blocks.digest_blocks(fd, len(now), _BLOCK)
        found = (
            list(blocks.differing(fd, len(now), _BLOCK, digests, len(was))),
            list(blocks.differing_known(fd, len(now), _BLOCK, own, digests, len(was))),
        )
    finally:
        os.close(base_fd)
        os.close(fd)
    for stretches in found:
        made = bytearray(was[: len(now)].ljust(len(now), b"\0"))
        for at, data in stretches:
            made[at : at + len(data)] = data
        assert bytes(made) == now
        equal = sum(
            was[at : at + _BLOCK] == now[at : at + _BLOCK]
            for at in range(0, min(len(was), len(now)) // _BLOCK * _BLOCK, _BLOCK)
        )
        assert sum(len(data) for _, data in stretches) <= len(now) - equal * _BLOCK


def test_all_of_many_huge_files_offer_blocks_in_bounded_room(tmp_path: Path) -> None:
    """The more is on its way, the coarser the blocks; what has come makes room again."""
    names = [b"%d" % number for number in range(60)]
    for name in names:
        with (tmp_path / os.fsdecode(name)).open("wb") as file:
            file.truncate(4 << 30)
    left, right = socket.socketpair()
    ends = [Channel(fd, fd, peer="other", level=0) for fd in (left.detach(), right.detach())]
    base_fd = os.open(tmp_path, os.O_RDONLY)
    chooser = Chooser(Dialogue(ends[0]), None, None, base_fd, None)
    try:
        for row, name in enumerate(names):
            chooser.offer_blocks((row, b"", name))
        assert len(chooser.deltas) == len(names)
        for row in range(len(names)):
            chooser.drop_delta(row)
        chooser.offer_blocks((60, b"", names[0]))
        found: dict[int, tuple[int, int]] = {}
        while 60 not in found or found[60][1] < 2 << 20:
            base = Dialogue(ends[1]).expect(Base)
            found[base.row] = (base.block, found.get(base.row, (0, 0))[1] + len(base.digests))
    finally:
        chooser.close()
        os.close(base_fd)
        for end in ends:
            end.close(wait_s=0)
    assert found[0] == found[60] == (16 << 10, 2 << 20)
    assert sum(count for row, (_, count) in found.items() if row < 60) <= 32 << 20
    assert all(count == blocks.count_blocks(4 << 30, block) * 8 for block, count in found.values())


def test_holes_are_not_read_and_have_the_digest_of_zeros(tmp_path: Path) -> None:
    path = tmp_path / "holes"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    fd = os.open(path, os.O_RDONLY)
    try:
        block = blocks.choose_block(1 << 40)
        digests = blocks.digest_blocks(fd, 1 << 40, block)
    finally:
        os.close(fd)
    assert len(digests) <= 2 << 20
    assert set(digests) == set(blocks.blank(block))
