"""The law: unify, then undo, gives every tree back, and in between no guest sees a difference.

Hypothesis makes the trees: a few contents, names and attributes, so that equals, near equals and
twins abound, as do the odd ones: holes, ACLs, capabilities, times before 1970 and after 2106.
"""

import os
import stat
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.conftest import Tool
from tests.fixtures.filesystems import Filesystem, Site, make_site, remove
from tests.fixtures.hostile import NAMES
from tests.fixtures.probes import is_soak, need, scaled
from tests.fixtures.runs import find_faults, undo, unify, unshared, write_list
from tests.fixtures.trees import (
    EPOCH_NS,
    MAY_DIFFER,
    File,
    Folder,
    Link,
    Row,
    Snapshot,
    Special,
    Symlink,
    acl,
    capability,
    differences,
    snapshot,
)

pytestmark = need("immutable", "lease")


class _Content(bytes):
    """Bytes that are shown short, as hypothesis asks for."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes, {self[:3]!r} to {self[-3:]!r}>"


_CONTENTS: Final = tuple(
    map(
        _Content,
        (
            b"",
            b"fifteen bytes..",
            b"sixteen bytes...",
            b"sixteen bytes..x",
            b"a" * 4096,
            b"a" * 4095 + b"b",
            b"b" + b"a" * 4095,
            b"a" * 4097,
            bytes(4096),
            bytes(100_000),
            b"c" * 70_000,
        ),
    )
)
_HOLES: Final = ((0, None), (0, 200_000), (4096, None), (65_536, 300_000), (1, None))
_MTIMES: Final = (
    EPOCH_NS,
    EPOCH_NS + 1,
    0,
    -1,
    -(10**18) - 1,
    2**31 * 10**9 + 5,
    2**32 * 10**9 + 5,
    9 * 10**18,
    9_300_000_000 * 10**9,  # beyond 63 bits of nanoseconds
)
_XATTRS: Final[Sequence[dict[str, bytes]]] = (
    {},
    {},
    {"user.a": b"1"},
    {"user.a": b"2", "user.b": _Content(bytes(1000))},
    {"system.posix_acl_access": acl(owner=6, group=4, other=4, users={1000: 6})},
    {"security.capability": capability(13)},
    {"trusted.a": b"\xff\0"},
)
_FOLDERS: Final = (b"", b"etc", b"usr/lib", b"new\nline", b"\xff", b"-rf", b"x" * 255)
_NAMES: Final = (b"a", b"b", b"c", b"d", b"e", *NAMES[:6], NAMES[-1])


@dataclass(frozen=True, slots=True)
class _Plan:
    """The rows of each guest, and which of the first one's files another has a name of too."""

    guests: list[list[Row]]
    shared: list[tuple[int, int]]


_path = st.builds(
    lambda folder, name: folder + b"/" + name if folder else name,
    st.sampled_from(_FOLDERS),
    st.sampled_from(_NAMES),
)


@st.composite
def _files(draw: st.DrawFn) -> File:
    at, size = draw(st.sampled_from(_HOLES[:1] * 6 + _HOLES))
    content = draw(st.sampled_from(_CONTENTS))
    return File(
        draw(_path),
        content,
        at=at,
        size=None if size is None else max(size, at + len(content)),
        mode=draw(st.sampled_from((0o644, 0o644, 0o644, 0o755, 0o4755, 0o600, 0o000))),
        uid=draw(st.sampled_from((0, 0, 0, 1000))),
        gid=draw(st.sampled_from((0, 0, 0, 4_000_000_000))),
        mtime_ns=draw(st.sampled_from(_MTIMES[:1] * 8 + _MTIMES)),
        xattrs=draw(st.sampled_from(_XATTRS)),
    )


_others: st.SearchStrategy[Row] = st.one_of(
    st.builds(Symlink, path=_path, target=st.sampled_from((b"a", b"/etc", b"../..", b"\xff\n"))),
    st.builds(
        lambda path, kind: Special(path, kind),
        _path,
        st.sampled_from((stat.S_IFIFO, stat.S_IFCHR)),
    ),
    st.builds(
        lambda path, mode, mtime: Folder(path, mode=mode, mtime_ns=mtime),
        _path,
        st.sampled_from((0o700, 0o1777, 0o2755)),
        st.sampled_from(_MTIMES[:-1]),
    ),
)


@st.composite
def _variants(draw: st.DrawFn, row: Row) -> Row | None:
    """The same row in another guest: mostly just so, sometimes nearly, sometimes not at all."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return None
    if kind > 3 or not isinstance(row, File):
        return row
    other = draw(_files())
    change: Callable[[], File] = draw(
        st.sampled_from(
            (
                lambda: replace(row, mtime_ns=row.mtime_ns + 1),
                lambda: replace(row, mode=other.mode),
                lambda: replace(row, uid=other.uid, gid=other.gid),
                lambda: replace(row, xattrs=other.xattrs),
                lambda: replace(row, content=other.content, size=None),
                lambda: replace(row, path=other.path),
            )
        )
    )
    return change()


@st.composite
def _plans(draw: st.DrawFn) -> _Plan:
    rows: list[Row] = [*draw(st.lists(_files(), max_size=12)), *draw(st.lists(_others, max_size=4))]
    guests = [_fitting(rows)]
    for _ in range(draw(st.integers(1, 3))):
        changed = [draw(_variants(row)) for row in rows]
        guests.append(_fitting([row for row in changed if row is not None]))
    guests = [draw(_with_links(guest)) for guest in guests]
    count = sum(isinstance(row, File) for row in guests[0])
    pairs = st.tuples(st.integers(1, len(guests) - 1), st.integers(0, max(0, count - 1)))
    return _Plan(guests, draw(st.lists(pairs, max_size=2)) if count else [])


def _fitting(rows: Sequence[Row]) -> list[Row]:
    """Less those whose path is taken, or leads through what is no folder."""
    taken: dict[bytes, bool] = {}
    kept = []
    for row in rows:
        path = os.fsencode(row.path)
        parents = [path[:place] for place, byte in enumerate(path) if byte == ord("/")]
        if path in taken or not all(taken.get(parent, True) for parent in parents):
            continue
        taken |= dict.fromkeys(parents, True) | {path: isinstance(row, Folder)}
        kept.append(row)
    return kept


@st.composite
def _with_links(draw: st.DrawFn, rows: list[Row]) -> list[Row]:
    """Further names for some of the guest's files, made when all else is."""
    files = [row for row in rows if isinstance(row, File)]
    taken = {os.fsencode(row.path) for row in rows}
    linked = list(rows)
    for number in range(draw(st.integers(0, 2)) if files else 0):
        path = b"link%d" % number
        if path not in taken:
            linked.append(Link(path, draw(st.sampled_from(files)).path))
    return linked


def _grow(site: Site, plan: _Plan) -> list[Path]:
    guests = [site.add_guest(f"guest{number}", rows) for number, rows in enumerate(plan.guests)]
    files = [row for row in plan.guests[0] if isinstance(row, File)]
    for place, (guest, number) in enumerate(plan.shared):
        source = os.fsencode(guests[0]) + b"/" + os.fsencode(files[number].path)
        os.link(source, os.fsencode(guests[guest]) + b"/shared%d" % place)
    return guests


def _differences(
    before: list[Snapshot], guests: list[Path], *, ignoring: frozenset[str] = MAY_DIFFER
) -> list[str]:
    after = [snapshot(root) for root in guests]
    pairs = zip(before, after, strict=True)
    return [line for pair in pairs for line in differences(*pair, ignoring=ignoring)]


@pytest.mark.timeout(600)
def test_unify_changes_nothing_that_a_guest_sees_and_undo_gives_every_tree_back(
    fs: Filesystem, tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    @settings(
        max_examples=scaled(7, 500),
        deadline=None,
        derandomize=not is_soak(),
        phases=tuple(Phase) if is_soak() else (Phase.generate,),  # shrinking takes minutes
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(_plans())
    def check(plan: _Plan) -> None:
        site = make_site(replace(fs, folder=Path(tempfile.mkdtemp(dir=fs.folder))))
        for name in ("confdir", "vdirbase", "rundir"):
            monkeypatch.setenv(f"VSERVER_{name.upper()}", os.fspath(getattr(site, name)))
        try:
            _check_law(site, plan, tool)
        finally:
            remove(site.filesystem.folder)

    check()


def _check_law(site: Site, plan: _Plan, tool: Tool) -> None:
    guests = _grow(site, plan)
    before = [snapshot(root) for root in guests]
    options = ("--all", "--exclude-from", write_list(site))
    told = unify(tool, *options, "--dry-run")
    done = unify(tool, *options)
    assert _differences(before, guests) == []
    assert find_faults(site.pool) == []
    assert (told.unified, told.new, told.reclaimed) == (done.unified, done.new, done.reclaimed)
    if not plan.shared:
        assert unshared(before, [snapshot(root) for root in guests]) == []
    again = unify(tool, *options)
    assert (again.unified, again.new, again.reclaimed) == (0, 0, 0)
    undo(tool)
    assert _differences(before, guests, ignoring=frozenset({"inode", "links"})) == []
    assert find_faults(site.pool) == []
