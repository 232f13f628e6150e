"""What a manifest may say: everything that a tree can have, nothing that leads out of it."""

import os
import stat

import msgspec
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from vstore.copy import messages
from vstore.copy.access import ProgramMissing
from vstore.copy.manifest import Row, can_be_object, digest_of_xattrs, pack_parts, unpack_parts
from vstore.copy.messages import Hostile, decode, encode, list_bits, set_bits
from vstore.errors import NoSpace, NotPermitted, PoolBusy, ToolError

_FILE = stat.S_IFREG | 0o644
_DIR = stat.S_IFDIR | 0o755
_D = bytes(32)

_names = st.binary(min_size=1, max_size=255).filter(
    lambda name: name not in (b".", b"..") and b"/" not in name and b"\0" not in name
)


def _parts(row: Row, path: bytes = b"etc") -> bytes:
    return pack_parts([(path, [row])])


@settings(deadline=None)
@given(
    name=_names,
    path=st.lists(_names, max_size=4).map(b"/".join),
    mode=st.integers(0, 0o7777),
    ids=st.tuples(st.integers(0, (1 << 32) - 2), st.integers(0, (1 << 32) - 2)),
    mtime=st.integers(-(1 << 63), (1 << 64) - 1),
    size=st.integers(0, (1 << 63) - 1),
    value=st.binary(max_size=100),
)
def test_rows_arrive_as_they_were_packed(
    name: bytes, path: bytes, mode: int, ids: tuple[int, int], mtime: int, size: int, value: bytes
) -> None:
    xattrs = [(b"user.x", value), (b"security.capability", value)]
    rows = [
        Row(name, stat.S_IFREG | mode, *ids, mtime, size, _D, xattrs),
        Row(name + b"", stat.S_IFLNK | 0o777, *ids, mtime, text=b"to/../there"),
        Row(name, stat.S_IFBLK | mode, *ids, mtime, rdev=os.makedev(7, 3)),
        Row(name, stat.S_IFREG | mode, link=1),
    ]
    parts = [(path, [Row(b"", _DIR)]), (path, rows)]
    assert unpack_parts(pack_parts(parts), 0) == parts


@pytest.mark.parametrize(
    "path",
    [b"/", b"/etc", b"etc/", b"a//b", b"..", b"a/../b", b".", b"a/./b", b"a\0b", b"x" * 256],
)
def test_paths_that_lead_elsewhere_are_refused(path: bytes) -> None:
    with pytest.raises(Hostile):
        unpack_parts(_parts(Row(b"f", _FILE, digest=_D), path), 0)


@pytest.mark.parametrize(
    "row",
    [
        Row(b"..", _FILE, digest=_D),
        Row(b".", _FILE, digest=_D),
        Row(b"", _FILE, digest=_D),
        Row(b"a/b", _FILE, digest=_D),
        Row(b"/etc", _FILE, digest=_D),
        Row(b"a\0", _FILE, digest=_D),
        Row(b"f", _FILE, digest=b"short"),
        Row(b"f", _FILE),
        Row(b"f", 0o644, digest=_D),
        Row(b"f", stat.S_IFSOCK | 0o644),
        Row(b"f", 0o170000 | 0o644),
        Row(b"named", _DIR),
        Row(b"l", stat.S_IFLNK | 0o777),
        Row(b"l", stat.S_IFLNK | 0o777, text=b"a\0b"),
        Row(b"f", _FILE, digest=_D, mtime_ns=-(1 << 63) - 1 + 1, xattrs=[(b"os2.x", b"")]),
        Row(b"f", _FILE, digest=_D, xattrs=[(b"user.x", b"1"), (b"user.x", b"2")]),
        Row(b"f", _FILE, digest=_D, xattrs=[(b"user.x\0", b"1")]),
        Row(b"f", _FILE, link=1),
        Row(b"f", _FILE, link=7),
        Row(b"", _DIR, link=1),
    ],
)
def test_rows_that_cannot_be_are_refused(row: Row) -> None:
    with pytest.raises(Hostile):
        unpack_parts(_parts(row), 0)


@pytest.mark.parametrize(
    "field",
    [("uid", (1 << 32) - 1), ("gid", -1), ("size", 1 << 63), ("mode", 1 << 16), ("rdev", -1)],
)
def test_numbers_that_cannot_be_are_refused(field: tuple[str, int]) -> None:
    row = Row(b"f", _FILE, digest=_D)
    setattr(row, *field)
    with pytest.raises(Hostile):
        unpack_parts(_parts(row), 0)


def test_more_rows_than_a_batch_has_are_refused() -> None:
    rows = [Row(b"%d" % number, _FILE, digest=_D) for number in range(messages.ROWS_A_BATCH + 1)]
    with pytest.raises(Hostile):
        unpack_parts(pack_parts([(b"", rows)]), 0)


@settings(deadline=None, max_examples=300)
@given(packed=st.binary(max_size=200))
def test_bytes_that_are_no_rows_are_refused_or_read(packed: bytes) -> None:
    try:
        parts = unpack_parts(packed, 0)
    except Hostile:
        return
    for path, rows in parts:
        assert not path.startswith(b"/")
        assert all(row.name not in (b".", b"..") and b"/" not in row.name for row in rows)


@settings(deadline=None, max_examples=400)
@given(kind=st.integers(0, 40), body=st.binary(max_size=120))
def test_bytes_that_are_no_message_are_refused_or_read(kind: int, body: bytes) -> None:
    try:
        message = decode(kind, body)
    except Hostile:
        return
    assert decode(*encode(message)) == message


@settings(deadline=None, max_examples=200)
@given(
    data=st.recursive(
        st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.binary(max_size=40),
        lambda inner: st.lists(inner, max_size=8),
        max_leaves=20,
    ),
    kind=st.integers(1, 18),
)
def test_values_of_the_wrong_shape_are_refused_or_read(data: object, kind: int) -> None:
    try:
        decode(kind, msgspec.msgpack.encode(data))
    except Hostile:
        return


def test_a_failure_is_raised_with_the_code_of_the_other_side() -> None:
    for kind in (NoSpace, PoolBusy, NotPermitted):
        failure = messages.Failure(kind.__name__, "said", "do")
        error = messages.revive(failure, "other")
        assert (type(error), error.message, error.hint) == (kind, "other: said", "do")


@pytest.mark.parametrize("name", ["SystemExit", "Hostile", ProgramMissing.__name__, ""])
def test_a_failure_of_another_kind_is_a_plain_one(name: str) -> None:
    assert type(messages.revive(messages.Failure(name, "x"), "o")) is ToolError


@settings(deadline=None)
@given(numbers=st.sets(st.integers(0, 499)))
def test_bits_come_back_as_numbers(numbers: set[int]) -> None:
    bits = set_bits(sorted(numbers), 500)
    assert list_bits(bits, 500) == sorted(numbers)
    if numbers:
        with pytest.raises(Hostile):
            list_bits(bits, max(numbers))


def test_xattrs_have_the_digest_that_the_pool_gives_them() -> None:
    assert digest_of_xattrs([]) == b""
    hasher = blake3()
    for part in (b"a", b"1", b"b", b"22"):
        hasher.update(len(part).to_bytes(8, "little") + part)
    assert digest_of_xattrs([(b"b", b"22"), (b"a", b"1")]) == hasher.digest()


def test_what_the_pool_cannot_hold_stays_private() -> None:
    good = Row(b"f", _FILE, digest=_D, size=16)
    assert can_be_object(good, min_size=16)
    for field, value in (("size", 15), ("mtime_ns", 1 << 63), ("link", 1)):
        row = msgspec.structs.replace(good, **{field: value})
        assert not can_be_object(row, min_size=16)
