"""Blocks of a file: what is said to differ, put over the base, gives the file."""

import os
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from vstore.copy import blocks

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
