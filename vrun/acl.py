"""ACLs as text, as tar(1) writes them, into what the kernel keeps in an extended attribute.

See acl(5) for the text and linux/posix_acl_xattr.h for the attribute.
"""

import re
import struct
from typing import Final, NamedTuple

ACCESS: Final = b"system.posix_acl_access"
DEFAULT: Final = b"system.posix_acl_default"

_VERSION: Final = struct.pack("<I", 2)
_ENTRY: Final = struct.Struct("<HHI")
_NOBODY: Final = 0xFFFFFFFF
_TAGS: Final = {  # tag of one with a name, and of the file's own; in the order that the kernel asks
    b"user": (0x02, 0x01),
    b"group": (0x08, 0x04),
    b"mask": (0, 0x10),
    b"other": (0, 0x20),
}
_LINE: Final = re.compile(
    rb"(u(?:ser)?|g(?:roup)?|m(?:ask)?|o(?:ther)?):([^:]*):([r-][w-][x-])(?::(\d+))?", re.ASCII
)


class _Entry(NamedTuple):
    tag: int
    name: int
    bits: int


def pack_acl(text: bytes) -> bytes | None:
    """The attribute's value for this text; None where it names somebody by a word, not a number:
    whom a word means only the guest knows.

    Raises ValueError for what is no ACL.
    """
    lines = [line.partition(b"#")[0].strip() for line in re.split(rb"[,\n]", text)]
    entries = [_parse(line) for line in lines if line]
    if None in entries:
        return None
    known = sorted(entry for entry in entries if entry is not None)
    return _VERSION + b"".join(_ENTRY.pack(tag, bits, name) for tag, name, bits in known)


def _parse(line: bytes) -> _Entry | None:
    match = _LINE.fullmatch(line)
    if match is None:
        raise ValueError(f"{line[:80]!r} is no entry of an ACL")
    word, name, letters, number = match.groups()
    named, own = next(tags for key, tags in _TAGS.items() if key.startswith(word))
    bits = sum(value for value, letter in zip((4, 2, 1), letters, strict=True) if letter != 0x2D)
    if not name:
        return _Entry(own, _NOBODY, bits)
    digits = number or name
    if not named or not digits.isdigit() or len(digits) > 10 or int(digits) >= _NOBODY:
        return None
    return _Entry(named, int(digits), bits)
