"""Shell wildcards for whole paths, as fnmatch(3) without flags in the C locale knows them.

`*`, `?` and `[...]` match slashes and leading dots too, `\\` takes the next byte literally.
Python's own fnmatch knows neither the backslash nor the named classes.
"""

import re
import string
from collections.abc import Iterator
from typing import Final

_LITERAL: Final = re.compile(rb"(?:[^*?\[\\]|\\.)*", re.DOTALL)
_ESCAPED: Final = re.compile(rb"\\(.)", re.DOTALL)
_BRACKET: Final = re.compile(
    rb"\[(?P<negated>[!^]?)(?P<members>\]?(?:\[:[a-z]+:\]|\\.|[^\]\\])*)\]", re.DOTALL
)
_MEMBER: Final = re.compile(
    rb"\[:(?P<class>[a-z]+):\]|\\?(?P<low>.)(?:-\\?(?P<high>[^\]]))?", re.DOTALL
)
_TOKEN: Final = re.compile(rb"\*+|\?|\\.?|" + _BRACKET.pattern + rb"|\[|[^*?\[\\]+", re.DOTALL)
_NEVER: Final = rb"(?!)"
_CLASSES: Final = {
    b"alnum": string.ascii_letters + string.digits,
    b"alpha": string.ascii_letters,
    b"blank": " \t",
    b"cntrl": "".join(map(chr, (*range(32), 127))),
    b"digit": string.digits,
    b"graph": string.ascii_letters + string.digits + string.punctuation,
    b"lower": string.ascii_lowercase,
    b"print": string.ascii_letters + string.digits + string.punctuation + " ",
    b"punct": string.punctuation,
    b"space": string.whitespace,
    b"upper": string.ascii_uppercase,
    b"xdigit": string.hexdigits,
}


def literal_prefix(pattern: bytes) -> tuple[bytes, bool]:
    """What each path that matches begins with, and whether the pattern is no more than that."""
    part = _LITERAL.match(pattern)
    text = part[0] if part else b""
    return _ESCAPED.sub(rb"\1", text), text == pattern


def translate(pattern: bytes) -> bytes:
    """The regular expression (for re.DOTALL) for what `pattern` matches; not anchored at its end.

    What follows a `*` is searched for once and never again: the time is linear in the path's
    length, whatever the number of stars.
    """
    segments = [b""]
    for token in _TOKEN.finditer(pattern):
        if token[0].startswith(b"*"):
            segments.append(b"")
        else:
            segments[-1] += _translate_token(token)
    first, *others = segments
    if not others:
        return first
    middle = b"".join(rb"(?>.*?" + segment + rb")" for segment in others[:-1])
    return first + middle + rb".*" + others[-1]


def _translate_token(token: re.Match[bytes]) -> bytes:
    text = token[0]
    if text == b"?":
        return rb"."
    if text == b"\\":  # nothing follows it
        return _NEVER
    if text.startswith(b"\\"):
        return re.escape(text[1:])
    if token["members"] is not None:
        return _translate_bracket(token["members"], negated=bool(token["negated"]))
    return re.escape(text)


def _translate_bracket(members: bytes, *, negated: bool) -> bytes:
    accepted = {code for member in _MEMBER.finditer(members) for code in _codes(member)}
    if negated:
        accepted = set(range(256)) - accepted
    if not accepted:
        return _NEVER
    return b"[" + b"".join(b"\\x%02x" % code for code in sorted(accepted)) + b"]"


def _codes(member: re.Match[bytes]) -> Iterator[int]:
    if member["class"] is not None:
        yield from _CLASSES.get(member["class"], "").encode()
    else:
        low = member["low"][0]
        high = member["high"][0] if member["high"] else low
        yield from range(low, high + 1)
