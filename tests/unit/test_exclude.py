"""Exclude lists decide as the original's do, and narrowing them to a folder changes no verdict."""

import ctypes
import os
import posixpath
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vstore import exclude, wildcard
from vstore.errors import ConfigInvalid
from vstore.exclude import NOTHING, Excludes
from vstore.guest import Guest

_libc = ctypes.CDLL(None)
_libc.fnmatch.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int)

PATTERN = st.lists(
    st.sampled_from([b"/", b"a", b"b", b"-", b".", b"*", b"?", b"[ab]", b"[!a]", b"\\a", b"\xff"]),
    min_size=1,
    max_size=9,
).map(b"".join)
NAME = st.lists(st.sampled_from([b"a", b"b", b"-", b".", b"\xff"]), min_size=1, max_size=3).map(
    b"".join
)
PATH = st.lists(NAME, min_size=1, max_size=5).map(lambda names: b"/" + b"/".join(names))
RULE = st.tuples(st.sampled_from([b"", b"+", b"-", b"~"]), PATTERN).map(lambda rule: b"".join(rule))
LIST = st.lists(RULE.map(lambda rule: b"/" + rule if rule[:1].isalnum() else rule), max_size=8)


def rules(*lines: bytes | str, exact: Iterable[bytes] = ()) -> Excludes:
    text = b"\n".join(os.fsencode(line) for line in lines)
    return exclude.parse(text, source="test", exact=exact)


def fnmatch(pattern: bytes, path: bytes) -> bool:
    """What the C library says, in the C locale."""
    matched: int = _libc.fnmatch(pattern, path, 0)
    return matched == 0


def first_match(lines: Iterable[bytes], path: bytes) -> bool:
    """The reference's rule, spelled out: the first pattern that matches decides."""
    for line in lines:
        rule = line.rstrip()
        if len(rule) < 2 or rule.startswith(b"#"):
            continue
        pattern = rule[1:] if rule[:1] in (b"+", b"-", b"~") else rule
        if fnmatch(pattern, path):
            return not rule.startswith(b"+")
    return False


# --- the list's syntax


def test_prefixes() -> None:
    found = rules("+/a", "-/b", "~/c", "/d")
    assert [found.is_excluded(path) for path in (b"/a", b"/b", b"/c", b"/d", b"/e")] == [
        False,
        True,
        True,
        True,
        False,
    ]


def test_first_match_decides() -> None:
    found = rules(
        "+/etc/gconf", "/etc/*", "+/etc/passwd", "/usr/a*", "+/usr/ab", "/var/x", "+/var/*"
    )
    assert not found.is_excluded(b"/etc/gconf")
    assert found.is_excluded(b"/etc/gconf/schemas")
    assert found.is_excluded(b"/etc/passwd")
    assert found.is_excluded(b"/usr/ab")
    assert found.is_excluded(b"/var/x")
    assert not found.is_excluded(b"/var/y")


def test_the_whole_path_must_match() -> None:
    found = rules("/home", "/opt/*", "etc")
    assert found.is_excluded(b"/home")
    assert not found.is_excluded(b"/home/x")
    assert not found.is_excluded(b"/homes")
    assert not found.is_excluded(b"/a/home")
    assert not found.is_excluded(b"/opt")
    assert not found.is_excluded(b"/etc")


def test_wildcards_match_slashes_and_dots() -> None:
    found = rules("/a/*/z", "/b?c", "/d/[!x]")
    assert found.is_excluded(b"/a/1/2/.3/z")
    assert found.is_excluded(b"/b/c")
    assert found.is_excluded(b"/d//")
    assert not found.is_excluded(b"/a/z")


def test_comments_stand_in_column_0_only() -> None:
    found = rules("#/a", "/b # no comment")
    assert not found.is_excluded(b"/a")
    assert not found.is_excluded(b"/b")
    assert found.is_excluded(b"/b # no comment")
    assert not rules("#/a", "#")


def test_blanks_are_cut_at_the_end_only() -> None:
    assert rules("/a  \t\r", "/b").is_excluded(b"/a")
    assert not rules(" /a").is_excluded(b"/a")


def test_lines_of_one_character_say_nothing() -> None:
    assert not rules("/", "+", "*", "?", "* ", "")
    assert rules("**").is_excluded(b"/a")


@pytest.mark.parametrize("text", [b"/a\n/b\n", b"/a\n/b", b"/a\r\n/b"])
def test_the_last_line_counts_without_a_newline(text: bytes) -> None:
    assert exclude.parse(text, source="test").is_excluded(b"/b")


def test_paths_need_not_be_utf8() -> None:
    found = rules(b"/\xff\n*", b"/x?y", b"/\xc3\xa9")
    assert found.is_excluded(b"/\xff")
    assert found.is_excluded(b"/x\xfey")
    assert not found.is_excluded("/x\N{LATIN SMALL LETTER E WITH ACUTE}y".encode())  # two bytes
    assert found.is_excluded(b"/\xc3\xa9")


def test_newlines_in_paths_are_like_any_other_byte() -> None:
    assert rules("/a*z").is_excluded(b"/a\n\nz")
    assert not rules("/a").is_excluded(b"/a\n")
    assert not rules("/a*z").is_excluded(b"/a\nz\n")


def test_a_list_with_a_nul_is_none() -> None:
    with pytest.raises(ConfigInvalid, match="/x/list: is no exclude list"):
        exclude.parse(b"\x7fELF\0", source="/x/list")


def test_a_pattern_that_can_match_nothing_is_named(caplog: pytest.LogCaptureFixture) -> None:
    rules("/ok", "# a comment", "etc/passwd", "/home/", "*/ok")
    assert "test:3: 'etc/passwd'" in caplog.text
    assert "test:4: '/home/'" in caplog.text
    assert "ok" not in caplog.text


# --- wildcards


@given(PATTERN, st.one_of(PATH, PATTERN))
def test_wildcards_are_those_of_the_c_library(pattern: bytes, path: bytes) -> None:
    assert exclude.parse(b"/" + pattern, source="t").is_excluded(path) == first_match(
        [b"/" + pattern], path
    )


@pytest.mark.parametrize(
    "pattern",
    [
        b"/[",
        b"/[a",
        b"/[]a]",
        b"/[!]a]",
        b"/[^a]",
        b"/[a-c]",
        b"/[c-a]",
        b"/[a-]",
        b"/[--0]",
        b"/[[:digit:]]",
        b"/[![:alpha:]_]",
        b"/[[:space:][:punct:]]",
        b"/[\\]]",
        b"/[a\\-c]",
        b"/[*?]",
        b"/\\*",
        b"/\\\\",
        b"/a\\",
        b"/[\xf0-\xff]",
        b"/**a**b",
        b"/*a*a*a",
        b"/[a-cx-z]?[[:upper:]]*",
    ],
)
def test_odd_patterns_are_those_of_the_c_library(pattern: bytes) -> None:
    found = exclude.parse(pattern, source="t")
    tails = [bytes([code]) for code in range(1, 256)]
    tails += [b"", b"[", b"[a", b"]a", b"a\\", b"xaab", b"aaa", b"ayZz", b"a/b", b"*", b"\\"]
    wrong = [t for t in tails if found.is_excluded(b"/" + t) != fnmatch(pattern, b"/" + t)]
    assert wrong == []


def test_many_stars_on_a_hostile_name_take_no_time() -> None:
    found = rules("/" + "*a" * 30 + "*b")
    assert not found.is_excluded(b"/" + b"a" * 4000)


@pytest.mark.parametrize(
    ("pattern", "prefix", "literal"),
    [
        (b"/a/b", b"/a/b", True),
        (b"/a\\*b", b"/a*b", True),
        (b"/a/b*", b"/a/b", False),
        (b"*", b"", False),
        (b"/a\\", b"/a", False),
        (b"/\\[a[b", b"/[a", False),
    ],
)
def test_literal_prefix(pattern: bytes, prefix: bytes, literal: bool) -> None:
    assert wildcard.literal_prefix(pattern) == (prefix, literal)


# --- narrowing


@given(LIST, st.lists(PATH, max_size=3), st.lists(PATH, min_size=1, max_size=6))
def test_narrowing_changes_no_verdict(
    lines: list[bytes], exact: list[bytes], paths: list[bytes]
) -> None:
    whole = rules(*lines, exact=exact)
    for path in paths:
        expected = path in exact or first_match(lines, path)
        assert whole.is_excluded(path) == expected
        folder = posixpath.dirname(path)
        at_once = whole.below(folder)
        step_by_step = whole
        for end in (i for i, byte in enumerate(path) if byte == 0x2F and i):
            step_by_step = step_by_step.below(path[:end])
        for narrowed in (at_once, step_by_step):
            assert narrowed.is_excluded(path) == expected
            assert narrowed or not expected


def test_nothing_is_left_where_nothing_can_match() -> None:
    found = rules("/etc/ssh/ssh_host_*", "/var/cache/*", "/home", "+/usr/*", exact=[b"/opt/a/conf"])
    assert not found.below(b"/usr")
    assert not found.below(b"/usr/share/doc")
    assert not found.below(b"/home")
    assert not found.below(b"/opt/b")
    assert not found.below(b"/etc/apt")
    assert found.below(b"/etc/ssh")
    assert not found.below(b"/etc/ssh/sshd_config.d")
    assert found.below(b"/etc/ssh/ssh_host_keys").is_excluded(b"/etc/ssh/ssh_host_keys/x")
    assert found.below(b"/var/cache/apt/archives")
    assert found.below(b"/opt/a").is_excluded(b"/opt/a/conf")


def test_a_list_that_only_includes_leaves_nothing() -> None:
    assert not rules("+/etc", "+/usr/*")
    assert rules("+/etc", "+/usr/*") is NOTHING


@pytest.mark.parametrize("root", [b"", b"/"])
def test_the_root_is_itself(root: bytes) -> None:
    found = rules("/a", "/b*")
    assert found.below(root) is found


def test_the_leading_slash_of_a_folder_may_be_missing() -> None:
    found = rules("/a/b", "/c/*/d")
    assert found.below(b"a").is_excluded(b"/a/b")
    assert found.below(b"c/x").is_excluded(b"/c/x/d")
    assert not found.below(b"x/a")


def test_a_folder_elsewhere_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="is not below"):
        rules("/a/b", "/a/c/d").below(b"/a").below(b"/b")


def test_a_wildcard_at_the_start_goes_everywhere() -> None:
    found = rules("*/ls-R", "+/keep/*")
    deep = found.below(b"/usr").below(b"/usr/share").below(b"/usr/share/texmf")
    assert deep.is_excluded(b"/usr/share/texmf/ls-R")
    assert not deep.is_excluded(b"/usr/share/texmf/ls")


def test_nothing_excludes_nothing() -> None:
    assert not NOTHING
    assert not NOTHING.is_excluded(b"/etc/passwd")
    assert NOTHING.below(b"/etc") is NOTHING


# --- which list


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Guest:
    """A configured guest with one conffile, /etc/conffile."""
    monkeypatch.setenv("VSERVER_CONFDIR", os.fspath(tmp_path / "conf"))
    root = tmp_path / "root"
    (root / "var/lib/dpkg").mkdir(parents=True)
    status = f"Package: x\nConffiles:\n /etc/conffile {'0' * 32}\n"
    (root / "var/lib/dpkg/status").write_text(status)
    (tmp_path / "conf/web/apps/vunify").mkdir(parents=True)
    (tmp_path / "conf/.defaults/apps/vunify").mkdir(parents=True)
    return Guest("web", root, tmp_path / "conf/web")


def settings(guest: Guest, name: str) -> Path:
    assert guest.config is not None
    return guest.config.parent / name / "apps/vunify"


def test_the_shipped_list_is_the_last_of_the_chain(guest: Guest) -> None:
    found = exclude.load_for(guest)
    assert found.is_excluded(b"/etc/machine-id")
    assert found.is_excluded(b"/etc/conffile")
    assert not found.is_excluded(b"/etc/debian_version")


def test_the_first_list_that_exists_is_the_only_one(guest: Guest) -> None:
    (settings(guest, ".defaults") / "exclude").write_text("/default\n")
    found = exclude.load_for(guest)
    assert found.is_excluded(b"/default")
    assert not found.is_excluded(b"/etc/machine-id")
    (settings(guest, "web") / "exclude").write_text("/own\n")
    found = exclude.load_for(guest)
    assert found.is_excluded(b"/own")
    assert not found.is_excluded(b"/default")
    assert found.is_excluded(b"/etc/conffile")


def test_an_empty_list_ends_the_chain(guest: Guest) -> None:
    (settings(guest, "web") / "exclude").touch()
    found = exclude.load_for(guest)
    assert not found.is_excluded(b"/dev")
    assert found.is_excluded(b"/etc/conffile")


def test_conffiles_come_before_the_patterns(guest: Guest) -> None:
    (settings(guest, "web") / "exclude").write_text("+/etc/*\n+/etc/conffile\n")
    assert exclude.load_for(guest).is_excluded(b"/etc/conffile")


@pytest.mark.parametrize(
    ("present", "excluded"),
    [
        ([], True),
        ([".defaults/pkgmgmt-ignore"], False),
        ([".defaults/pkgmgmt-force", ".defaults/pkgmgmt-ignore"], False),
        (["web/pkgmgmt-force", ".defaults/pkgmgmt-ignore"], True),
        (["web/pkgmgmt-ignore", "web/pkgmgmt-force"], False),
        (["web/pkgmgmt-ignore", ".defaults/pkgmgmt-force"], False),
    ],
)
def test_switches_of_the_conffiles(guest: Guest, present: list[str], excluded: bool) -> None:
    for switch in present:
        owner, _, name = switch.partition("/")
        (settings(guest, owner) / name).touch()
    assert exclude.load_for(guest).is_excluded(b"/etc/conffile") == excluded


def test_a_list_of_the_callers_is_alone(guest: Guest, tmp_path: Path) -> None:
    (tmp_path / "list").write_text("/only\n")
    found = exclude.load_for(guest, tmp_path / "list")
    assert found.is_excluded(b"/only")
    assert not found.is_excluded(b"/dev")
    assert not found.is_excluded(b"/etc/conffile")


def test_an_empty_list_of_the_callers_excludes_nothing(guest: Guest, tmp_path: Path) -> None:
    (tmp_path / "list").touch()
    assert not exclude.load_for(guest, tmp_path / "list")


@pytest.mark.parametrize("name", ["missing", ""])
def test_a_list_that_cannot_be_read_is_named(guest: Guest, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigInvalid, match="cannot read the exclude list"):
        exclude.load_for(guest, tmp_path / name)


def test_a_folder_in_place_of_the_guests_list_is_no_reason_to_use_another(guest: Guest) -> None:
    (settings(guest, "web") / "exclude").mkdir()
    with pytest.raises(ConfigInvalid, match="web/apps/vunify/exclude"):
        exclude.load_for(guest)


def test_a_tree_has_the_default_chain(guest: Guest) -> None:
    tree = Guest("/tree", guest.root, None)
    assert exclude.load_for(tree).is_excluded(b"/etc/conffile")
    (settings(guest, ".defaults") / "exclude").write_text("/default\n")
    assert exclude.load_for(tree).is_excluded(b"/default")
    (settings(guest, ".defaults") / "pkgmgmt-ignore").touch()
    assert not exclude.load_for(tree).is_excluded(b"/etc/conffile")
