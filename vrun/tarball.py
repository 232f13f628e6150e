"""The members of a tar archive, one after the other: ustar, GNU and pax headers.

This reads and checks; it writes nothing, and believes no more than it must. Memory is bounded
whatever the headers say: one header, extension headers of 1 MiB, a sparse map of 2^18
stretches. See tar(5) of libarchive, and "The pax Extended Header" in pax(1p).
"""

import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, NamedTuple

from vrun.compression import Source
from vstore.render import show_name

_BLOCK: Final = 512
_RECORD: Final = 20 * _BLOCK  # what tar(1) writes at a time, the last one filled up
_CHUNK: Final = 1 << 18
_EXTENSION_AT_MOST: Final = 1 << 20
_STRETCHES_AT_MOST: Final = 1 << 18
_LARGEST: Final = (1 << 63) - 1
_ID_AT_MOST: Final = (1 << 32) - 2  # one more means "leave it as it is" to chown(2)
_FARTHEST_S: Final = 1 << 53
_NUMBER_AT_MOST: Final = 1 << 20  # major and minor numbers of devices
_TAIL_AT_MOST: Final = 1 << 30

_HEADER: Final = struct.Struct("100s8s8s8s12s12s8sc100s6s2s32s32s8s8s155s12x")
_GNU: Final = b"ustar "
_OLD_SPARSE: Final = struct.Struct("12s12s")
_XATTR: Final = b"SCHILY.xattr."
_ACLS: Final = {b"SCHILY.acl.access": b"access", b"SCHILY.acl.default": b"default"}


class Kind(Enum):
    """What a member is."""

    FILE = "a file"
    HARD_LINK = "a hard link"
    SYMLINK = "a symlink"
    CHARACTER = "a character device"
    BLOCK = "a block device"
    FOLDER = "a folder"
    FIFO = "a FIFO"


_KINDS: Final = {
    b"\0": Kind.FILE,
    b"0": Kind.FILE,
    b"7": Kind.FILE,
    b"S": Kind.FILE,
    b"1": Kind.HARD_LINK,
    b"2": Kind.SYMLINK,
    b"3": Kind.CHARACTER,
    b"4": Kind.BLOCK,
    b"5": Kind.FOLDER,
    b"6": Kind.FIFO,
}
_UNREADABLE: Final = {
    b"M": "it continues a file of another volume",
    b"D": "it is of an incremental backup",
}
_MEMBERS_OWN: Final = (b"path", b"linkpath", b"size", b"uid", b"gid", b"mtime")
_MEMBERS_OWN_BEGIN: Final = (b"GNU.sparse.", _XATTR, b"SCHILY.acl.")
_OTHER_FORMATS: Final = (
    (0, b"0707", "a cpio archive"),
    (0, b"\xc7\x71", "a cpio archive"),
    (0, b"\x71\xc7", "a cpio archive"),
    (0, b"PK", "a zip archive"),
    (0, b"!<arch>", "an ar archive or a Debian package"),
    (0, b"hsqs", "an image of a file system"),
    (24, b"\x6c\xea\0\0", "a backup of dump(8)"),
    (24, b"\0\0\xea\x6c", "a backup of dump(8)"),
)
"""Where a format has its mark, the mark, and what a person calls it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One entry of an archive, as its headers tell: nothing in it is to be trusted."""

    name: bytes
    kind: Kind
    mode: int  # permission bits, with setuid, setgid and sticky
    uid: int
    gid: int
    mtime_ns: int
    size: int  # bytes of a file with its holes; 0 for all else
    link: bytes
    device: tuple[int, int]
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    acls: dict[bytes, bytes] = field(default_factory=dict)
    """`access` and `default`, as text; see acl(5)."""


class Piece(NamedTuple):
    """Bytes of a file and where they stand in it."""

    offset: int
    data: bytes


class _Raw(NamedTuple):
    """The fields of a header block."""

    name: bytes
    mode: bytes
    uid: bytes
    gid: bytes
    size: bytes
    mtime: bytes
    checksum: bytes
    kind: bytes
    link: bytes
    magic: bytes
    version: bytes
    user: bytes
    group: bytes
    major: bytes
    minor: bytes
    prefix: bytes


@dataclass(slots=True)
class _Extensions:
    """What the headers before a member's own say of it."""

    name: bytes | None = None
    link: bytes | None = None
    records: list[tuple[bytes, bytes]] = field(default_factory=list)

    def values(self) -> dict[bytes, bytes]:
        return dict(self.records)


class TarReader:
    """Reads an archive. Every method raises ValueError, with the reason, for what is malformed."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._done = 0  # bytes of the archive
        self.stored = 0
        """Bytes of the present member's data that are not read yet."""
        self._padding = 0
        self._stretches = array("Q")  # offset and length in turn; of a sparse file
        self._is_sparse = False

    def members(self) -> Iterator[Member]:
        """Every member in its turn; the data of one that `pieces` did not read is passed over."""
        while True:
            extensions = _Extensions()
            while True:
                block = self._read_header()
                if block is None:
                    return
                raw = _Raw(*_HEADER.unpack(block))
                if not self._extend(raw, extensions):
                    break
            yield self._begin(raw, block, extensions)
            self._skip(self.stored + self._padding)
            self.stored = self._padding = 0

    def finish(self) -> bool:
        """Read on to the end, when `members` has given all: only there is it known that nothing of
        a compressed archive is damaged. Whether there is more, of which no member came.
        """
        is_more = False
        size, rest = 0, -self._done % _RECORD
        while data := self._source.read(_CHUNK):
            is_more = is_more or bool(data[max(0, rest - size) :].strip(b"\0"))
            size += len(data)
            if size > _TAIL_AT_MOST:
                raise ValueError("it goes on and on behind its end mark")
        return is_more

    def pieces(self) -> Iterator[Piece]:
        """The data of the member that `members` gave last, in order; holes are left out."""
        if not self._is_sparse:
            offset = 0
            while self.stored:
                data = self._read_stored(_CHUNK)
                yield Piece(offset, data)
                offset += len(data)
            return
        stretches = iter(self._stretches)
        for offset, length in zip(stretches, stretches, strict=True):
            end = offset + length
            while offset < end:
                data = self._read_stored(min(end - offset, _CHUNK))
                yield Piece(offset, data)
                offset += len(data)

    # --- reading

    def _read_exactly(self, size: int) -> bytes:
        parts = []
        while size:
            part = self._source.read(size)
            if not part:
                raise ValueError("it is cut short")
            parts.append(part)
            self._done += len(part)
            size -= len(part)
        return b"".join(parts)

    def _read_stored(self, size: int) -> bytes:
        data = self._read_exactly(min(size, self.stored))
        self.stored -= len(data)
        return data

    def _skip(self, size: int) -> None:
        while size:
            size -= len(self._read_exactly(min(size, _CHUNK)))

    def _read_header(self) -> bytes | None:
        """The next header; None at the end mark."""
        is_first = not self._done
        block = self._read_exactly(_BLOCK)
        if not any(block):
            return None
        try:
            _check_sum(block)
        except ValueError:
            if is_first:
                _check_format(block)
            raise
        return block

    def _read_extension(self, raw: _Raw) -> bytes:
        size = _number(raw.size, "size")
        if not 0 <= size <= _EXTENSION_AT_MOST:
            raise ValueError(f"it has an extension header of {size} bytes")
        data = self._read_exactly(size)
        self._skip(-size % _BLOCK)
        return data

    # --- headers

    def _extend(self, raw: _Raw, extensions: _Extensions) -> bool:
        """Note what an extension header says; False for the header of a member."""
        if raw.kind == b"L":
            extensions.name = self._read_extension(raw).rstrip(b"\0")
        elif raw.kind == b"K":
            extensions.link = self._read_extension(raw).rstrip(b"\0")
        elif raw.kind in (b"x", b"X"):
            extensions.records = list(_parse_records(self._read_extension(raw)))
        elif raw.kind == b"g":
            # For all members that follow: a comment of git-archive(1), a character set.
            for key, _ in _parse_records(self._read_extension(raw)):
                if key in _MEMBERS_OWN or key.startswith(_MEMBERS_OWN_BEGIN):
                    raise ValueError(f"it says for all members what {show_name(key)} is")
        elif raw.kind == b"V":
            pass  # the volume's label
        else:
            return False
        return True

    def _begin(self, raw: _Raw, block: bytes, extensions: _Extensions) -> Member:
        if raw.kind in _UNREADABLE:
            raise ValueError(_UNREADABLE[raw.kind])
        kind = _KINDS.get(raw.kind)
        if kind is None:
            raise ValueError(f"it has a member of the unknown type {raw.kind!r}")
        values = extensions.values()
        name = _find_name(raw, extensions, values)
        if raw.kind == b"\0" and name.endswith(b"/"):
            kind = Kind.FOLDER  # as archives before ustar have it
        stored = _decimal(values, b"size", _number(raw.size, "size"))
        if not 0 <= stored <= _LARGEST - _BLOCK:
            raise ValueError(f"a size of {stored} bytes")
        is_file = kind is Kind.FILE
        self.stored = stored if is_file else 0
        self._padding = -self.stored % _BLOCK
        size = self._map(raw, block, extensions, values) if is_file else 0
        return Member(
            name=name,
            kind=kind,
            mode=_number(raw.mode, "mode") & 0o7777,
            uid=_check_id(_decimal(values, b"uid", _number(raw.uid, "uid"))),
            gid=_check_id(_decimal(values, b"gid", _number(raw.gid, "gid"))),
            mtime_ns=_find_mtime(raw, values),
            size=size,
            link=_find_link(raw, extensions, values),
            device=_find_device(raw) if kind in (Kind.CHARACTER, Kind.BLOCK) else (0, 0),
            xattrs={
                key.removeprefix(_XATTR): value
                for key, value in values.items()
                if key.startswith(_XATTR)
            },
            acls={_ACLS[key]: value for key, value in values.items() if key in _ACLS},
        )

    # --- sparse files

    def _map(
        self, raw: _Raw, block: bytes, extensions: _Extensions, values: dict[bytes, bytes]
    ) -> int:
        """Find out where the stored data belong; returns the size of the file with its holes."""
        self._stretches = array("Q")
        self._is_sparse = True
        if raw.kind == b"S":
            size = self._read_old_map(block)
        elif values.get(b"GNU.sparse.major") == b"1":
            size = _decimal(values, b"GNU.sparse.realsize", -1)
            self._read_map()
        elif b"GNU.sparse.size" in values:
            size = _decimal(values, b"GNU.sparse.size", -1)
            for number in _listed_map(extensions, values):
                self._add(number)
        else:
            self._is_sparse = False
            return self.stored
        self._check_map(size)
        return size

    def _add(self, number: int) -> None:
        if len(self._stretches) >= 2 * _STRETCHES_AT_MOST:
            raise ValueError(f"a sparse file of more than {_STRETCHES_AT_MOST} stretches")
        if not 0 <= number <= _LARGEST:
            raise ValueError("a sparse file's map has a number out of range")
        self._stretches.append(number)

    def _read_old_map(self, block: bytes) -> int:
        """The map of GNU's own type S, in the header and the blocks after it."""
        self._add_old(block[386:482])
        is_more = block[482]
        size = _number(block[483:495], "size")
        while is_more:
            more = self._read_exactly(_BLOCK)
            self._add_old(more[:504])
            is_more = more[504]
        return size

    def _add_old(self, data: bytes) -> None:
        for offset, length in _OLD_SPARSE.iter_unpack(data):
            if offset[:1] != b"\0":
                self._add(_number(offset, "map"))
                self._add(_number(length, "map"))

    def _read_map(self) -> None:
        """The map of pax format 1.0: decimal numbers, a line each, in blocks before the data."""
        numbers = self._map_numbers()
        count = next(numbers)
        if count > _STRETCHES_AT_MOST:
            raise ValueError(f"a sparse file of {count} stretches")
        for _ in range(2 * count):
            self._add(next(numbers))

    def _map_numbers(self) -> Iterator[int]:
        ahead = b""
        while True:
            line, newline, rest = ahead.partition(b"\n")
            if newline:
                ahead = rest
                yield _parse_decimal(line)
            elif self.stored < _BLOCK or len(ahead) > _BLOCK:
                raise ValueError("a sparse file's map is cut short")
            else:
                ahead += self._read_stored(_BLOCK)

    def _check_map(self, size: int) -> None:
        if len(self._stretches) % 2:
            raise ValueError("a sparse file's map is cut short")
        end = total = 0
        for at in range(0, len(self._stretches), 2):
            offset, length = self._stretches[at], self._stretches[at + 1]
            if offset < end or offset + length > size:
                raise ValueError("a sparse file's map makes no sense")
            end = offset + length
            total += length
        if total != self.stored or not 0 <= size <= _LARGEST:
            raise ValueError("a sparse file's map does not fit its data")


# --- fields


def _check_format(block: bytes) -> None:
    for offset, mark, what in _OTHER_FORMATS:
        if block.startswith(mark, offset):
            raise ValueError(f"it is {what}, and no tar archive")


def _check_sum(block: bytes) -> None:
    stated = _number(block[148:156], "checksum")
    seen = sum(block[:148]) + 8 * ord(" ") + sum(block[156:])
    signed = seen - 256 * sum(byte > 127 for byte in block[:148] + block[156:])
    if stated not in (seen, signed):  # some old programs added up signed bytes
        raise ValueError("it is no tar archive, or damaged: a header's checksum is wrong")


def _number(field_: bytes, what: str) -> int:
    """A number as tar writes it: octal text, or binary where the first bit is set."""
    if field_[0] & 0x80:
        value = int.from_bytes(field_, "big")
        bits = 8 * len(field_)
        return value - (1 << bits) if field_[0] & 0x40 else value - (1 << (bits - 1))
    text = field_.partition(b"\0")[0].strip()
    try:
        return int(text or b"0", 8)
    except ValueError:
        raise ValueError(f"a header's {what} is no number: {field_!r}") from None


def _parse_decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > 20:
        raise ValueError(f"a header has {text[:40]!r} where a number belongs")
    return int(text)


def _decimal(values: dict[bytes, bytes], key: bytes, otherwise: int) -> int:
    return _parse_decimal(values[key]) if key in values else otherwise


def _check_id(number: int) -> int:
    if not 0 <= number <= _ID_AT_MOST:
        raise ValueError(f"an owner or group of the number {number}")
    return number


def _text(field_: bytes) -> bytes:
    return field_.partition(b"\0")[0]


def _find_name(raw: _Raw, extensions: _Extensions, values: dict[bytes, bytes]) -> bytes:
    name = values.get(b"GNU.sparse.name", values.get(b"path", extensions.name))
    if name is None:
        name = _text(raw.name)
        prefix = _text(raw.prefix) if raw.magic != _GNU else b""  # GNU keeps other things there
        name = prefix + b"/" + name if prefix else name
    return _without_nul(name)


def _find_link(raw: _Raw, extensions: _Extensions, values: dict[bytes, bytes]) -> bytes:
    link = values.get(b"linkpath", extensions.link)
    return _text(raw.link) if link is None else _without_nul(link)


def _without_nul(name: bytes) -> bytes:
    if b"\0" in name:
        raise ValueError("a name with a NUL in it")
    return name


def _find_mtime(raw: _Raw, values: dict[bytes, bytes]) -> int:
    text = values.get(b"mtime")
    if text is None:
        seconds, nanoseconds = _number(raw.mtime, "mtime"), 0
    else:
        whole, _, fraction = text.partition(b".")
        sign = -1 if whole.startswith(b"-") else 1
        seconds = sign * _parse_decimal(whole.removeprefix(b"-"))
        nanoseconds = sign * _parse_decimal(fraction[:9].ljust(9, b"0"))
    if abs(seconds) > _FARTHEST_S:
        raise ValueError(f"a time of {seconds} seconds")
    return seconds * 10**9 + nanoseconds


def _find_device(raw: _Raw) -> tuple[int, int]:
    numbers = _number(raw.major, "device"), _number(raw.minor, "device")
    if not all(0 <= number < _NUMBER_AT_MOST for number in numbers):
        raise ValueError(f"a device of the numbers {numbers}")
    return numbers


def _parse_records(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The records of a pax header: `LENGTH KEY=VALUE` and a newline, all of it counted."""
    at = 0
    while at < len(data):
        length_text, blank, _ = data[at : at + 21].partition(b" ")
        length = _parse_decimal(length_text) if blank else 0
        record = data[at + len(length_text) + 1 : at + length]
        key, equals, value = record.partition(b"=")
        if at + length > len(data) or not equals or not value.endswith(b"\n"):
            raise ValueError("a pax header is malformed")
        yield key, value[:-1]
        at += length


def _listed_map(extensions: _Extensions, values: dict[bytes, bytes]) -> Iterator[int]:
    """The map of pax formats 0.0 (records that repeat) and 0.1 (one record)."""
    if b"GNU.sparse.map" in values:
        for text in values[b"GNU.sparse.map"].split(b","):
            yield _parse_decimal(text)
        return
    for key, value in extensions.records:
        if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            yield _parse_decimal(value)
