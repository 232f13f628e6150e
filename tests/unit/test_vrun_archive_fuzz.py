"""vrun.archive against archives with arbitrary headers: an answer or a refusal, never more."""

import os
import shutil
import tarfile
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fixtures.probes import scaled
from tests.fixtures.tarballs import END, entry, pack, padded, pax
from vrun.archive import Rules, unpack
from vrun.errors import ConfigInvalid, NoSpace

_NAMES = [b"a", b"a/b", b"a/b/c", b"..", b"../x", b"/x", b".", b"", b"a/../b", b"b", b"a/", b"\xff"]
_KINDS = [bytes([number]) for number in b"\0001234567LKxgXVSMDQ"]

_WHOLE = pack(
    entry("a/", kind=tarfile.DIRTYPE),
    entry("a/file", b"content" * 99),
    entry("a/hard", kind=tarfile.LNKTYPE, link="a/file"),
    entry("a/soft", kind=tarfile.SYMTYPE, link="../.."),
    entry("long" * 40, b"1", pax={"SCHILY.xattr.user.key": "1"}),
    form=tarfile.PAX_FORMAT,
)


def _check(data: bytes) -> None:
    """Whatever the archive is, what stands beside the root stays, and no other error comes out."""
    top = Path(tempfile.mkdtemp(prefix="vtest-fuzz-"))
    try:
        (top / "root").mkdir()
        (top / "x").write_text("sings")
        archive = top / "archive"
        archive.write_bytes(data)
        root_fd = os.open(top / "root", os.O_RDONLY)
        try:
            unpack(archive, root_fd, Rules())
        except (ConfigInvalid, NoSpace):
            pass
        finally:
            os.close(root_fd)
        assert sorted(path.name for path in top.iterdir()) == ["archive", "root", "x"]
        assert (top / "x").read_text() == "sings"
        assert (top / "x").stat().st_nlink == 1
    finally:
        shutil.rmtree(top)


def _with_checksum(block: bytes) -> bytes:
    blank = block[:148] + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(blank) + block[156:]


_settings = settings(
    max_examples=scaled(150, 4_000),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


@_settings
@given(st.lists(st.tuples(st.integers(0, len(_WHOLE) - 1), st.integers(0, 255)), max_size=9))
def test_bytes_that_were_changed_anywhere(changed: list[tuple[int, int]]) -> None:
    data = bytearray(_WHOLE)
    for place, value in changed:
        data[place] = value
    _check(bytes(data))


@_settings
@given(
    st.lists(
        st.tuples(
            st.sampled_from(_NAMES),
            st.sampled_from(_KINDS),
            st.sampled_from(_NAMES),
            st.binary(max_size=12),
            st.lists(
                st.tuples(st.integers(100, 511), st.binary(min_size=1, max_size=12)), max_size=3
            ),
        ),
        max_size=6,
    )
)
def test_headers_of_any_kind_in_any_order(
    members: list[tuple[bytes, bytes, bytes, bytes, list[tuple[int, bytes]]]],
) -> None:
    data = b""
    for name, kind, link, content, changed in members:
        block = bytearray(512)
        block[: len(name)] = name
        block[100:108], block[124:136] = b"0000644\0", b"%011o\0" % len(content)
        block[156:157], block[157 : 157 + len(link)] = kind, link
        block[257:265] = b"ustar\00000"
        for place, value in changed:
            block[place : place + len(value)] = value[: 512 - place]
        data += _with_checksum(bytes(block)) + padded(content)
    _check(data + END)


_KEYS = [b"path", b"linkpath", b"size", b"uid", b"gid", b"mtime", b"SCHILY.acl.access"]
_KEYS += [b"SCHILY.xattr.user.x", b"SCHILY.xattr.", b"GNU.sparse.major", b"GNU.sparse.realsize"]
_KEYS += [b"GNU.sparse.size", b"GNU.sparse.map", b"GNU.sparse.offset", b"GNU.sparse.name"]
_VALUES = [*_NAMES, b"0", b"1", b"5", b"-1", b"1.5", b"1e9", b"99999999999999999999", b"1,2,3"]
_VALUES += [b"%d" % number for number in (2**31, 2**32, 2**53, 2**63 - 1, 2**64)]


@_settings
@given(
    st.lists(
        st.tuples(st.sampled_from(_KEYS), st.sampled_from(_VALUES) | st.binary(max_size=20)),
        max_size=5,
    )
)
def test_records_of_any_kind(records: list[tuple[bytes, bytes]]) -> None:
    _check(pax(records) + pack(entry("file", b"12345"), form=tarfile.USTAR_FORMAT))
