"""Exclude lists: which paths of a guest's tree are left alone.

A list has one pattern a line, the first that matches a path decides, and a path that none matches
is included:

    # a comment, in column 0 only
    +/etc/termcap       included, whatever later lines say
    /etc/*              excluded; `-/etc/*` says the same
    ~/root/.ssh/id*     skipped: here the same as excluded

A pattern is a shell wildcard for the whole path, which begins with a slash; `*` and `?` match
slashes too. Blanks at a line's end are cut, and a line of one character says nothing. Matching is
bytewise, as in the C locale: paths need not be UTF-8.
"""

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Final, NamedTuple

from vstore import dpkg, wildcard
from vstore.errors import ConfigInvalid
from vstore.guest import Guest, confdir

log = logging.getLogger(__name__)

SHIPPED_LIST: Final = Path(__file__).parent / "data" / "exclude"


class _Rule(NamedTuple):
    """A pattern with a wildcard."""

    excludes: bool
    pattern: bytes
    prefix: bytes
    """What each path that matches begins with."""


class _Share(NamedTuple):
    """What the rules of a folder say of one of its folders alone."""

    literals: dict[bytes, bool]
    indexes: list[int]


class _ByChild(NamedTuple):
    """The rules of a folder, sorted by the names of its folders that they can match below."""

    named: dict[bytes, _Share]
    partial: list[tuple[bytes, int]]
    """The child's name begins with this; the rest of it is a wildcard's affair."""
    floating: tuple[int, ...]
    """The wildcard stands before the child's name: they match below every child."""


class Excludes:
    """The rules that can still match something below one folder.

    Patterns without a wildcard are a dict from path to verdict, settled when the list is read; the
    others are one regular expression. `below` passes a rule on only to the folders whose names it
    can still match, so that for most of a tree nothing is left to ask.
    """

    __slots__ = ("_by_child", "_elsewhere", "_expression", "_literals", "_prefix", "_rules")

    def __init__(
        self, prefix: bytes, literals: Mapping[bytes, bool], rules: tuple[_Rule, ...]
    ) -> None:
        self._prefix = prefix  # the folder's path with a slash at its end
        self._literals = literals
        self._rules = rules
        self._expression: re.Pattern[bytes] | None = None
        self._by_child: _ByChild | None = None
        self._elsewhere: Excludes | None = None

    def __bool__(self) -> bool:
        """Whether anything below the folder can be excluded."""
        return bool(self._literals or self._rules)

    def is_excluded(self, path: bytes) -> bool:
        """Whether `path` (relative to the guest's root, with a leading slash) is left alone.

        `path` is below the folder that these rules are for. An excluded folder takes all that is in
        it along: nobody asks for that.
        """
        verdict = self._literals.get(path)
        if verdict is not None:
            return verdict
        if not self._rules:
            return False
        if self._expression is None:
            self._expression = _compile(self._rules)
        match = self._expression.match(path)
        return match is not None and match.lastindex is None

    def below(self, directory: bytes) -> "Excludes":
        """The rules that can still match something below `directory`.

        The leading slash may be missing, so b"" and b"/" are the guest's root.
        False as a bool when nothing below can be excluded. Raises ValueError when `directory` is
        not below the folder of these rules.
        """
        if not self._rules and not self._literals:
            return self
        if not directory.startswith(self._prefix):
            if not directory.startswith(b"/"):
                return self.below(b"/" + directory)
            if directory + b"/" == self._prefix:
                return self
            raise ValueError(f"{directory!r} is not below {self._prefix!r}")
        narrowed = self
        for name in directory[len(self._prefix) :].split(b"/"):
            if name:
                narrowed = narrowed._below_child(name)
        return narrowed

    def _below_child(self, name: bytes) -> "Excludes":
        by_child = self._by_child
        if by_child is None:
            by_child = self._by_child = self._sort_by_child()
        share = by_child.named.get(name)
        partial = [index for rest, index in by_child.partial if name.startswith(rest)]
        if share is None and not partial:
            return self._below_other_child()
        literals, indexes = share or ({}, [])
        kept = sorted((*indexes, *partial, *by_child.floating))
        return _narrowed(
            self._prefix + name + b"/", literals, tuple(self._rules[index] for index in kept)
        )

    def _below_other_child(self) -> "Excludes":
        """The same for every child that no rule names."""
        if self._elsewhere is None:
            assert self._by_child is not None  # noqa: S101  (only _below_child calls this)
            floating = tuple(self._rules[index] for index in self._by_child.floating)
            self._elsewhere = _narrowed(b"", {}, floating, everywhere=True)
        return self._elsewhere

    def _sort_by_child(self) -> _ByChild:
        start = len(self._prefix)
        named: dict[bytes, _Share] = {}
        partial: list[tuple[bytes, int]] = []
        floating: list[int] = []
        for path, verdict in self._literals.items():
            name, slash, _ = path[start:].partition(b"/")
            if slash:
                named.setdefault(name, _Share({}, [])).literals[path] = verdict
        for index, rule in enumerate(self._rules):
            name, slash, _ = rule.prefix[start:].partition(b"/")
            if slash:
                named.setdefault(name, _Share({}, [])).indexes.append(index)
            elif name:
                partial.append((name, index))
            else:
                floating.append(index)
        return _ByChild(named, partial, tuple(floating))


class _Everywhere(Excludes):
    """Rules that can match at any depth: below a folder they are what they were."""

    __slots__ = ()

    def below(self, directory: bytes) -> Excludes:
        return self

    def _below_child(self, name: bytes) -> Excludes:
        return self


NOTHING: Final = Excludes(b"/", {}, ())
"""Excludes nothing."""


def parse(text: bytes, *, source: str, exact: Iterable[bytes] = ()) -> Excludes:
    """The rules of the list `text`, after those that exclude each path of `exact`.

    `source` names the list in messages. A pattern that can match nothing is named in a warning.
    Raises ConfigInvalid for a list with a NUL, which is no text.
    """
    if b"\0" in text:
        raise ConfigInvalid(f"{source}: is no exclude list: it contains a NUL byte")
    rules: list[_Rule] = []
    literals: dict[bytes, bool] = {}
    for excludes, pattern in _parse_lines(text, source):
        prefix, is_literal = wildcard.literal_prefix(pattern)
        if not is_literal:
            rules.append(_Rule(excludes, pattern, prefix))
        elif prefix not in literals:
            decided = _first_verdict(rules, prefix)
            literals[prefix] = excludes if decided is None else decided
    literals.update(dict.fromkeys(exact, True))
    return _narrowed(b"/", literals, tuple(rules))


def load_for(guest: Guest, exclude_from: Path | None = None) -> Excludes:
    """The rules for a guest: those of `exclude_from` alone, or of its chain.

    The chain is apps/vunify/exclude of the guest, else of CONFDIR/.defaults, else the shipped list;
    before it come the configuration files that the guest's dpkg knows, unless `pkgmgmt-ignore`
    switches that off. Raises ConfigInvalid for a list that is there and cannot be read.
    """
    if exclude_from is not None:
        text = _read_list(exclude_from)
        if text is None:
            raise ConfigInvalid(f"{exclude_from}: cannot read the exclude list: no such file")
        return parse(text, source=os.fspath(exclude_from))
    conffiles = dpkg.conffiles(guest.root) if _wants_conffiles(guest) else ()
    for path in _chain(guest, "exclude"):
        if (text := _read_list(path)) is not None:
            return parse(text, source=os.fspath(path), exact=conffiles)
    return parse(SHIPPED_LIST.read_bytes(), source=os.fspath(SHIPPED_LIST), exact=conffiles)


def _parse_lines(text: bytes, source: str) -> Iterator[tuple[bool, bytes]]:
    """Each rule of a list as (excludes, pattern)."""
    for number, line in enumerate(text.split(b"\n"), start=1):
        rule = line.rstrip()
        if len(rule) < 2 or rule.startswith(b"#"):
            continue
        pattern = rule[1:] if rule[:1] in b"+-~" else rule
        if pattern[:1] not in (b"/", b"*", b"?", b"[", b"\\") or pattern.endswith(b"/"):
            log.warning(
                "%s:%d: %r can match nothing: a path begins with a slash and ends without one",
                source,
                number,
                pattern.decode(errors="backslashreplace"),
            )
        yield not rule.startswith(b"+"), pattern


def _first_verdict(rules: Iterable[_Rule], path: bytes) -> bool | None:
    for rule in rules:
        if path.startswith(rule.prefix) and _compile((rule,)).match(path):
            return rule.excludes
    return None


def _narrowed(
    prefix: bytes,
    literals: dict[bytes, bool],
    rules: tuple[_Rule, ...],
    *,
    everywhere: bool = False,
) -> Excludes:
    """The rules as an object; NOTHING where none of them excludes."""
    while rules and not rules[-1].excludes:  # an include after the last exclude decides nothing
        rules = rules[:-1]
    if not rules and True not in literals.values():
        return NOTHING
    return _Everywhere(prefix, literals, rules) if everywhere else Excludes(prefix, literals, rules)


@lru_cache(maxsize=512)
def _compile(rules: tuple[_Rule, ...]) -> re.Pattern[bytes]:
    """One expression for all rules in order; a match has a group only where an include decides."""
    alternatives = (
        wildcard.translate(rule.pattern) + (rb"\Z" if rule.excludes else rb"\Z()") for rule in rules
    )
    return re.compile(b"|".join(alternatives), re.DOTALL)


def _wants_conffiles(guest: Guest) -> bool:
    for folder in _setting_dirs(guest):
        if (folder / "pkgmgmt-ignore").exists():
            return False
        if (folder / "pkgmgmt-force").exists():
            return True
    return True


def _chain(guest: Guest, name: str) -> list[Path]:
    return [folder / name for folder in _setting_dirs(guest)]


def _setting_dirs(guest: Guest) -> list[Path]:
    """The guest's own folder of settings and the one for all guests."""
    own = guest.app_dir("vunify")
    default = confdir() / ".defaults" / "apps" / "vunify"
    return [default] if own is None else [own, default]


def _read_list(path: Path) -> bytes | None:
    """None where there is no such file: the next of the chain counts."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigInvalid(f"{path}: cannot read the exclude list: {error.strerror}") from error
