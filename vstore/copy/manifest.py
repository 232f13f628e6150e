"""The rows of a guest's manifest, as they travel, and what none of them may say.

A part is a folder's path and some of its rows; a row's number is its place among all rows. The
first row of a folder has no name and is the folder itself. Paths are relative to the guest's root,
which is b"". Which rows a folder has, in which order and in which batch follows from the tree
alone, so that equal trees have equal manifests.
"""

import stat
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Final

import msgspec
from blake3 import blake3
from msgspec import Meta

from vstore.copy.messages import ROWS_A_BATCH, Hostile
from vstore.pool import Identity

ID_LIMIT: Final = (1 << 32) - 2
"""The last one stands for none in chown(2)."""
PATH_LIMIT: Final = 1 << 20
_TIME_FIRST: Final = -(1 << 63)
_TIME_END: Final = 1 << 64
_NEAR: Final = 1 << 63  # ns; objects have times before the year 2262
_TEXT_LIMIT: Final = 4095
_XATTRS_LIMIT: Final = 1 << 20
_KINDS: Final = frozenset(
    (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO)
)
_XATTR_SPACES: Final = (b"user.", b"trusted.", b"security.", b"system.posix_acl_")
"""Others are a file system's own, such as btrfs.compression."""

_Xattr = tuple[
    Annotated[bytes, Meta(min_length=1, max_length=255)], Annotated[bytes, Meta(max_length=1 << 16)]
]


class Row(msgspec.Struct, array_like=True, gc=False):
    """One entry. Times in ns, sizes in bytes, `mode` as st_mode.

    `link`: so many rows back is the first name of this inode, which alone says what that is; 0 in
    the first name itself.
    """

    name: Annotated[bytes, Meta(max_length=255)]
    mode: Annotated[int, Meta(ge=0, le=0o177777)]
    uid: Annotated[int, Meta(ge=0, le=ID_LIMIT)] = 0
    gid: Annotated[int, Meta(ge=0, le=ID_LIMIT)] = 0
    mtime_ns: int = 0
    size: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0
    digest: Annotated[bytes, Meta(max_length=32)] = b""
    xattrs: Annotated[list[_Xattr], Meta(max_length=4096)] = []
    text: Annotated[bytes, Meta(max_length=_TEXT_LIMIT)] = b""
    rdev: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0
    link: Annotated[int, Meta(ge=0, le=1 << 26)] = 0

    @property
    def kind(self) -> int:
        return stat.S_IFMT(self.mode)

    @property
    def is_file(self) -> bool:
        """A regular file with content of its own to be made."""
        return stat.S_ISREG(self.mode) and not self.link

    def identity(self) -> Identity:
        """The object that the file of this row may be."""
        return Identity(
            self.digest,
            self.size,
            self.mode,
            self.uid,
            self.gid,
            self.mtime_ns,
            digest_of_xattrs(self.xattrs),
        )


Part = tuple[Annotated[bytes, Meta(max_length=PATH_LIMIT)], list[Row]]
"""A folder's path and some of its rows."""

_Parts = Annotated[list[Part], Meta(max_length=ROWS_A_BATCH)]
_decoder: Final = msgspec.msgpack.Decoder(_Parts)
_encoder: Final = msgspec.msgpack.Encoder()


def travelling(xattrs: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """Those xattrs that a row may have: what another file system could have too."""
    return {name: value for name, value in xattrs.items() if name.startswith(_XATTR_SPACES)}


def digest_of_xattrs(xattrs: Iterable[tuple[bytes, bytes]]) -> bytes:
    """As `pool.digest_xattrs` says of an inode that has these."""
    found = sorted(xattrs)
    if not found:
        return b""
    hasher = blake3()
    for pair in found:
        for part in pair:
            hasher.update(len(part).to_bytes(8, "little") + part)
    return hasher.digest()


def pack_rows(rows: Sequence[Row]) -> msgspec.Raw:
    """Rows as they are packed in a part."""
    return msgspec.Raw(_encoder.encode(rows))


def pack_parts(parts: Sequence[tuple[bytes, Sequence[Row] | msgspec.Raw]]) -> bytes:
    """The parts of a batch as they travel."""
    return _encoder.encode(parts)


def unpack_parts(packed: bytes, first: int) -> list[Part]:
    """The parts of a batch whose first row has the number `first`.

    Raises Hostile for whatever could be no part of a guest's tree.
    """
    try:
        parts: list[Part] = _decoder.decode(packed)
    except (msgspec.DecodeError, RecursionError) as error:
        raise Hostile(f"rows that are none: {error}") from error
    number = first
    for path, rows in parts:
        check_path(path)
        for row in rows:
            _check_row(path, row, number)
            number += 1
    if number - first > ROWS_A_BATCH:
        raise Hostile(f"{number - first} rows at once")
    return parts


def is_below(path: bytes, folder: bytes) -> bool:
    """Whether `path` is that of the folder, or of what is in its tree."""
    return not folder or path == folder or path.startswith(folder + b"/")


def cut(path: bytes, folder: bytes) -> bytes:
    """The path relative to the folder that it is below of."""
    return path[len(folder) + 1 :] if folder else path


def check_path(path: bytes) -> None:
    """A path below a guest's root. Raises Hostile."""
    if path:
        for name in path.split(b"/"):
            _check_name(name, path)


def _check_name(name: bytes, path: bytes) -> None:
    if name in (b"", b".", b"..") or len(name) > 255 or b"/" in name or b"\0" in name:
        raise Hostile(
            f"the name {name[:300]!r} in {path[:300]!r}, which leads out of a guest's tree"
        )


def _check_row(path: bytes, row: Row, number: int) -> None:
    if row.name or not stat.S_ISDIR(row.mode):
        _check_name(row.name, path)
    if row.kind not in _KINDS:
        raise Hostile(f"{row.name!r} in {path!r} with mode {row.mode:o}")
    if stat.S_ISDIR(row.mode) == bool(row.name):
        raise Hostile(f"{row.name!r} in {path!r}, a folder out of its place")
    if not _TIME_FIRST <= row.mtime_ns < _TIME_END:
        raise Hostile(f"{row.name!r} in {path!r} with time {row.mtime_ns}")
    if row.link:
        if row.link > number or stat.S_ISDIR(row.mode):
            raise Hostile(f"{row.name!r} in {path!r}, a link to {row.link} rows before it")
        return
    _check_content(path, row)
    _check_xattrs(path, row)


def _check_content(path: bytes, row: Row) -> None:
    if stat.S_ISREG(row.mode) and len(row.digest) != 32:
        raise Hostile(f"the file {row.name!r} in {path!r} without a digest")
    if stat.S_ISLNK(row.mode) and (not row.text or b"\0" in row.text):
        raise Hostile(f"the symlink {row.name!r} in {path!r} to nowhere")


def _check_xattrs(path: bytes, row: Row) -> None:
    total = 0
    names = set()
    for name, value in row.xattrs:
        if not name.startswith(_XATTR_SPACES) or b"\0" in name or name in names:
            raise Hostile(f"{row.name!r} in {path!r} with the attribute {name!r}")
        names.add(name)
        total += len(name) + len(value)
    if total > _XATTRS_LIMIT:
        raise Hostile(f"{row.name!r} in {path!r} with {total} bytes of attributes")


def can_be_object(row: Row, *, min_size: int) -> bool:
    """Whether the pool could hold the file: not tiny, of a time that it can note."""
    return row.is_file and row.size >= max(1, min_size) and -_NEAR <= row.mtime_ns < _NEAR
