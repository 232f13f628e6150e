"""A digest is BLAKE3 of every byte, however the file is read and wherever it has holes."""

import os
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vstore.digest import SMALL, digest_content


def digest(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return digest_content(fd, os.fstat(fd))
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    "size", [0, 1, 4096, SMALL - 1, SMALL, SMALL + 1, 3 * SMALL, (16 << 20) + 5]
)
def test_every_byte_counts(tmp_path: Path, size: int) -> None:
    content = bytearray(os.urandom(1024) * (size // 1024 + 1))[:size]
    path = tmp_path / "file"
    path.write_bytes(content)
    assert digest(path) == blake3(content).digest()
    if size:
        content[-1] ^= 1
        path.write_bytes(content)
        assert digest(path) == blake3(content).digest()


_stretches = st.lists(
    st.tuples(st.integers(0, 3 << 20), st.binary(min_size=1, max_size=5_000)), max_size=5
)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(_stretches, st.integers(SMALL, 4 << 20))
def test_holes_are_zeros(tmp_path: Path, parts: list[tuple[int, bytes]], size: int) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(size)
        for position, content in parts:
            file.seek(position)
            file.write(content)
    assert digest(path) == blake3(path.read_bytes()).digest()


def test_a_file_of_holes_alone_is_read_quickly(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(64 << 20)
    assert digest(path) == blake3(bytes(64 << 20)).digest()


def test_a_file_that_became_shorter_is_no_endless_loop(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * (SMALL * 2))
    fd = os.open(path, os.O_RDONLY)
    try:
        before = os.fstat(fd)
        os.truncate(path, SMALL + 7)
        found = digest_content(fd, before)
    finally:
        os.close(fd)
    assert found != blake3(b"x" * (SMALL * 2)).digest()


def test_reading_ends_when_it_is_no_longer_wanted(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(40 << 20))
    asked = []

    def wanted() -> bool:
        asked.append(True)
        return len(asked) < 2

    fd = os.open(path, os.O_RDONLY)
    try:
        found = digest_content(fd, os.fstat(fd), wanted=wanted)
    finally:
        os.close(fd)
    assert len(asked) == 2
    assert found != blake3(bytes(40 << 20)).digest()
