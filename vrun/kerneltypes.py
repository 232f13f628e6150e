"""Where the members of the kernel's own structures lie, by the kernel's description of its types.

That is /sys/kernel/btf/vmlinux (bpf/btf.rst): it changes with every kernel and its options, and a
program for the kernel that reads its memory needs it. A tenth of a second of reading, so what was
found is kept in a file until another kernel runs.
"""

import os
import struct
import zlib
from array import array
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from vrun import cachefile
from vstore.record import dataclass

_TYPES: Final = Path("/sys/kernel/btf/vmlinux")
_HEADER: Final = struct.Struct("=HBBIIIII")
_TYPE: Final = struct.Struct("=III")
_MEMBER: Final = struct.Struct("=III")
_MAGIC: Final = 0xEB9F
_STRUCT, _UNION = 4, 5  # linux/btf.h: BTF_KIND_
_ALIASES: Final = frozenset({8, 9, 10, 11, 18})
"""typedef, volatile, const, restrict and type tags, which stand for another type."""
_FIXED_TAIL: Final[Mapping[int, int]] = {1: 4, 3: 12, 14: 4, 17: 4}
_ITEM_TAIL: Final[Mapping[int, int]] = {4: 12, 5: 12, 6: 8, 13: 8, 15: 12, 19: 12}
"""The bytes after a type, by kind: of each, and of each of its items."""

Places = Mapping[str, int]
"""Bytes from the start of a structure, by `structure.member.member`."""


class TypesUnknown(Exception):
    """This kernel does not describe its types, or not the wanted ones."""


def find_places(wanted: Iterable[str], folder: Path) -> Places:
    """Where each of `wanted` lies, `structure.member.member`; kept below `folder`.

    Raises TypesUnknown.
    """
    names = tuple(wanted)
    path = folder / _cache_name(names)
    with suppress(OSError, ValueError):
        lines = [line.split() for line in path.read_text().splitlines()]
        found = {name: int(place) for name, place in lines}
        if found.keys() == set(names):
            return found
    places = read_places(names)
    cachefile.keep(path, "".join(f"{name} {place}\n" for name, place in places.items()).encode())
    return places


def read_places(wanted: Iterable[str], source: Path = _TYPES) -> Places:
    """As find_places(), from the kernel's description itself."""
    try:
        types = _Types(source.read_bytes())
        return {name: types.place_of(name) for name in wanted}
    except OSError as error:
        raise TypesUnknown(f"{source}: {error.strerror}") from error
    except (struct.error, IndexError) as error:
        raise TypesUnknown(f"{source}: is no description of types: {error}") from error


@dataclass(frozen=True, slots=True)
class _Member:
    name: int
    type_id: int
    place: int


class _Types:
    """The types of a kernel in their binary form."""

    def __init__(self, data: bytes) -> None:
        magic, _, _, length, type_at, type_length, text_at, text_length = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise TypesUnknown("the description of types is of another byte order")
        self._data = data
        self._text_at = length + text_at
        self._text_end = self._text_at + text_length
        self._starts = array("I", (0,))  # of each type; the first one has the number 1
        at, end = length + type_at, length + type_at + type_length
        while at < end:
            self._starts.append(at)
            _, info, _ = _TYPE.unpack_from(data, at)
            kind = info >> 24 & 0x1F
            at += _TYPE.size + _FIXED_TAIL.get(kind, 0) + _ITEM_TAIL.get(kind, 0) * (info & 0xFFFF)

    def place_of(self, path: str) -> int:
        structure, *members = path.split(".")
        place, type_id = 0, self._find_structure(structure)
        for name in members:
            found = self._find_member(type_id, name)
            if found is None:
                raise TypesUnknown(f"this kernel has no {path}")
            place, type_id = place + found.place, found.type_id
        return place

    def _find_structure(self, name: str) -> int:
        wanted = self._name_at(name)
        for number, at in enumerate(self._starts):
            if number:
                found, info, _ = _TYPE.unpack_from(self._data, at)
                if found == wanted and info >> 24 & 0x1F == _STRUCT and info & 0xFFFF:
                    return number
        raise TypesUnknown(f"this kernel has no structure {name}")

    def _name_at(self, name: str) -> int:
        found = self._data.find(f"\0{name}\0".encode(), self._text_at, self._text_end)
        if found < 0:
            raise TypesUnknown(f"this kernel has no structure {name}")
        return int(found + 1 - self._text_at)

    def _find_member(self, type_id: int, name: str) -> _Member | None:
        """The member, one of an unnamed structure in it too."""
        for member in self._members(type_id):
            if self._text(member.name) == name:
                return member
            if not member.name and (inner := self._find_member(member.type_id, name)):
                return _Member(inner.name, inner.type_id, member.place + inner.place)
        return None

    def _members(self, type_id: int) -> Iterable[_Member]:
        _, info, other = _TYPE.unpack_from(self._data, self._starts[type_id])
        while info >> 24 & 0x1F in _ALIASES:
            type_id = other
            _, info, other = _TYPE.unpack_from(self._data, self._starts[type_id])
        if info >> 24 & 0x1F not in (_STRUCT, _UNION):
            return
        first = self._starts[type_id] + _TYPE.size
        has_widths = info >> 31  # then the upper byte tells how wide a bit field is
        for index in range(info & 0xFFFF):
            item = _MEMBER.unpack_from(self._data, first + index * _MEMBER.size)
            bits = item[2] & 0xFFFFFF if has_widths else item[2]
            yield _Member(item[0], item[1], bits // 8)

    def _text(self, at: int) -> str:
        start = self._text_at + at
        return self._data[start : self._data.index(b"\0", start)].decode(errors="replace")


# --- the cache


def _cache_name(wanted: tuple[str, ...]) -> str:
    """Changes with the kernel and with what is asked for."""
    system = os.uname()
    kernel = zlib.crc32(repr((system.release, system.version, system.machine)).encode())
    return f"places-{kernel:08x}-{zlib.crc32(repr(wanted).encode()):08x}"
