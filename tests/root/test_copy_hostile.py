"""A peer that lies, in both directions: refused, and nothing outside the copy's folder is touched.

Row 16 of what has gone wrong elsewhere. The honest side is the installed program on a pair of
sockets; the other side speaks the protocol by hand.
"""

import fcntl
import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fixtures.dialogues import DIR, FILE, ROOT, Tree, offer, refused, row, serving
from tests.fixtures.filesystems import Site
from tests.fixtures.probes import need, on
from tests.fixtures.runs import find_faults, list_objects
from tests.fixtures.sshd import PROGRAM
from tests.fixtures.trees import File, Folder, differences, snapshot
from vstore import lease
from vstore.copy import messages as m
from vstore.copy.manifest import Row, pack_parts
from vstore.errors import ToolError

pytestmark = [need("immutable", "lease"), on("ext4")]

_LINK = stat.S_IFLNK | 0o777


@pytest.fixture
def canary(site: Site) -> Iterator[Path]:
    """A folder beside everything, which stays as it is; the guest `new` never comes to be."""
    folder = site.filesystem.folder / "canary"
    folder.mkdir()
    (folder / "file").write_text("mine")
    before = snapshot(folder)
    outside = {path.name for path in site.filesystem.folder.iterdir()}
    yield folder
    assert differences(before, snapshot(folder)) == []
    assert {path.name for path in site.filesystem.folder.iterdir()} == outside
    assert not site.root("new").exists()
    assert not (site.confdir / "new").exists()


_CRAFTED: dict[str, list[tuple[bytes, list[Row]]]] = {
    "up": [ROOT, (b"", [row(b"..")])],
    "path up": [ROOT, (b"..", [row(b"f")])],
    "absolute": [ROOT, (b"/etc", [row(b"f")])],
    "name with slash": [ROOT, (b"", [row(b"../canary/file")])],
    "empty name": [ROOT, (b"", [row(b"")])],
    "nul": [ROOT, (b"", [row(b"a\0b")])],
    "below a symlink": [
        ROOT,
        (b"", [Row(b"out", _LINK, text=b"../../../canary")]),
        (b"out", [row(b"file")]),
    ],
    "folder over a symlink": [
        ROOT,
        (b"", [Row(b"out", _LINK, text=b"../../../canary")]),
        (b"out", [Row(b"", DIR)]),
    ],
    "twice": [ROOT, (b"", [row(b"f"), row(b"f")])],
    "symlink then file": [ROOT, (b"", [Row(b"f", _LINK, text=b"../../canary/file"), row(b"f")])],
    "link to what is not": [ROOT, (b"", [Row(b"f", FILE, link=5)])],
    "link to no group": [ROOT, (b"", [row(b"a"), Row(b"f", FILE, link=1)])],
    "link to a symlink as a file": [
        ROOT,
        (b"", [Row(b"a", _LINK, text=b"/etc/shadow"), Row(b"f", FILE, link=1)]),
    ],
    "no parent": [ROOT, (b"a/b", [row(b"f")])],
    "no root": [(b"", [row(b"f")]), ROOT],
    "huge": [ROOT, (b"", [Row(b"f", FILE, size=(1 << 63) - 1, digest=bytes(32))])],
    "foreign attribute": [
        ROOT,
        (b"", [Row(b"f", FILE, size=0, digest=bytes(32), xattrs=[(b"btrfs.compression", b"x")])]),
    ],
}


@pytest.mark.parametrize("name", sorted(_CRAFTED))
def test_crafted_manifests_end_the_copy(site: Site, canary: Path, name: str) -> None:
    with serving() as dialogue:
        offer(dialogue)
        tree = Tree(dialogue)
        with refused():
            _send_and_end(tree, _CRAFTED[name])


def _send_and_end(tree: Tree, parts: list[tuple[bytes, list[Row]]]) -> None:
    contents = [b"x" * 99] * 10
    tree.send(*parts, contents=tuple(contents))
    tree.end()


def test_the_same_by_hand_but_honest_arrives(site: Site) -> None:
    """The witness that the refusals above are for what was crafted."""
    with serving() as dialogue:
        offer(dialogue)
        tree = Tree(dialogue)
        tree.send(ROOT, (b"", [row(b"f"), Row(b"l", _LINK, text=b"f")]), contents=(b"x" * 99,))
        assert tree.end().files == 1
    assert (site.root("new") / "f").read_bytes() == b"x" * 99
    assert find_faults(site.pool) == []


def test_other_content_than_was_announced_is_not_taken(site: Site, canary: Path) -> None:
    with serving() as dialogue:
        offer(dialogue)
        tree = Tree(dialogue)
        tree.send(ROOT, (b"", [row(b"f")]), contents=(b"y" * 99,))
        with refused("its digest is another one"):
            tree.end()
    assert list_objects(site.pool) == []


def test_contents_that_nobody_asked_for_end_the_copy(site: Site, canary: Path) -> None:
    for message in (
        m.Contents([(77, b"x")]),
        m.Piece(0, 0, b"x"),
        m.Piece(1, (1 << 62), b"x", last=True),
        m.Gone(9, "x", is_error=False),
        m.Proofs(0, []),
        m.Served(3),
        m.Same(same=True),
        m.End(0, 0, bytes(32)),
        m.End(1, 2, bytes(32)),
    ):
        with serving() as dialogue:
            offer(dialogue)
            packed = pack_parts([ROOT, (b"", [row(b"f")])])
            dialogue.send(m.Batch(0, 0, msgspec.Raw(packed), b"\0", b"\0"))
            dialogue.expect(m.Want)
            dialogue.send(message)
            with refused():
                dialogue.expect(m.Result)


def test_less_than_was_asked_for_ends_the_copy(site: Site, canary: Path) -> None:
    with serving() as dialogue:
        offer(dialogue)
        tree = Tree(dialogue)
        tree.send(ROOT, (b"", [row(b"f")]))
        with refused("less than was asked for"):
            tree.end()


def test_a_manifest_without_contents_cannot_fill_the_memory(site: Site, canary: Path) -> None:
    with serving() as dialogue:
        offer(dialogue)
        with refused("more of a manifest than it serves"):
            _send_batches(dialogue, 200)


def _send_batches(dialogue: m.Dialogue, count: int) -> None:
    for number in range(count):
        new = row(b"%d" % number, os.urandom(50)) if number else Row(b"", DIR)
        packed = pack_parts([(b"", [new])])
        dialogue.send(m.Batch(number, number, msgspec.Raw(packed), b"\0", b"\0"))
        dialogue.expect(m.Want)


@pytest.mark.parametrize(
    "path", ["d/../../escape", "d//x", "/etc/passwd", "d/vdir", "x", "d/a\nb", "conf/x", "d/.."]
)
def test_settings_that_lead_elsewhere_end_the_copy(site: Site, canary: Path, path: str) -> None:
    with serving() as dialogue, refused():
        offer(dialogue, settings=[m.Setting(path, "f", 0o644, b"x")])


def test_scripts_and_symlinks_out_of_the_configuration_stay_behind(site: Site) -> None:
    items = [
        m.Setting("d/", "d", 0o755),
        m.Setting("d/scripts", "d", 0o755),
        m.Setting("d/scripts/pre-start", "f", 0o755, b"#!/bin/sh\n"),
        m.Setting("d/out", "l", 0o777, b"/etc/shadow"),
        m.Setting("d/context", "f", 0o644, b"1234\n"),
    ]
    with serving() as dialogue:
        offer(dialogue, settings=items)
        tree = Tree(dialogue)
        tree.send(ROOT)
        result = tree.end()
    assert len(result.warnings) == 2
    assert sorted(path.name for path in (site.confdir / "new").iterdir()) == ["context", "vdir"]


def test_whoever_knows_a_digest_alone_gets_nothing_where_proofs_are_asked(site: Site) -> None:
    secret = b"the secret of another guest " * 99
    site.configure(".defaults", "apps/vserver-copy/policy", "prove\n")
    root = site.add_guest("victim", [File("secret", secret)])
    subprocess.run([PROGRAM.with_name("vhashify"), "victim"], check=True, capture_output=True)
    assert (root / "secret").stat().st_nlink == 2
    for proof in (bytes(32), blake3(secret).digest()):
        with serving() as dialogue:
            offer(dialogue)
            packed = pack_parts([ROOT, (b"", [row(b"f", secret)])])
            dialogue.send(m.Batch(0, 0, msgspec.Raw(packed), b"\x03", b"\0"))
            want = dialogue.expect(m.Want)
            assert want.wanted == b"\0"
            assert m.list_bits(want.proven, 2) == [1]
            dialogue.send(m.Proofs(0, [proof]))
            dialogue.send(m.Served(0))
            dialogue.send(m.End(1, 2, blake3(packed).digest()))
            with refused("without having its content"):
                dialogue.expect(m.Result)
        assert not site.root("new").exists()
    with serving() as dialogue:
        offer(dialogue)
        dialogue.send(m.Batch(0, 0, msgspec.Raw(packed), b"\x03", b"\0"))
        nonce = dialogue.expect(m.Want).nonce
        dialogue.send(m.Proofs(0, [blake3(secret, key=nonce).digest()]))
        dialogue.send(m.Served(0))
        dialogue.send(m.End(1, 2, blake3(packed).digest()))
        assert dialogue.expect(m.Result).files == 1
    assert (site.root("new") / "f").read_bytes() == secret


# --- a hostile side while a copy is brought up to date


_TWO_FOLDERS = [File("etc/f", b"x" * 99), File("var/f", b"x" * 99)]


def _fetch_folders(dialogue: m.Dialogue) -> list[m.FolderSum]:
    """Ask for `web` again, of which the copy differs: what its folders have."""
    dialogue.send(m.Request("send", "web", "x", refresh=True))
    dialogue.expect(m.Source)
    dialogue.send(m.Target(m.Identity(), "x", False))
    dialogue.expect(m.Sum)
    dialogue.send(m.Same(same=False, compares=True))
    return dialogue.expect(m.Folders).folders


def _honest_sums() -> list[m.FolderSum]:
    """Of the root and of etc, as the program itself says them."""
    with serving() as dialogue:
        found = _fetch_folders(dialogue)
    return [folder for folder in found if folder[0] != b"var"]


@contextmanager
def _refreshed(site: Site) -> Iterator[m.Dialogue]:
    """The honest side has a copy `web` that differs, and waits for what the folders have."""
    if not site.root("web").exists():
        site.add_guest("web", _TWO_FOLDERS)
    before = snapshot(site.root("web"))
    with serving() as dialogue:
        dialogue.send(m.Request("receive", "web", "web", refresh=True))
        dialogue.send(m.Source("web", os.uname().machine, False, False, m.Identity(), 9, 999, []))
        dialogue.expect(m.Target)
        dialogue.send(m.Sum(bytes(32), 5, 198))
        assert dialogue.expect(m.Same) == m.Same(same=False, compares=True)
        yield dialogue
    assert differences(before, snapshot(site.root("web"))) == []


def _sums(*paths: bytes, reach: int = 1 << 30) -> m.Folders:
    return m.Folders([(path, bytes(16), reach) for path in paths], last=True)


@pytest.mark.parametrize(
    "message",
    [
        _sums(b"", b"../canary"),
        _sums(b"", b"/etc"),
        _sums(b"", b"etc", b"etc"),
        _sums(b"", b"etc/./f"),
        m.Below(b""),
        m.Batch(0, 0, msgspec.Raw(pack_parts([ROOT])), b"\0", b"\0"),
    ],
)
def test_folders_that_cannot_be_end_the_copy(site: Site, message: m.Folders) -> None:
    with _refreshed(site) as dialogue:
        dialogue.send(message)
        with refused():
            dialogue.expect(m.Below)


@pytest.mark.parametrize("name", ["up", "path up", "no root", "twice", "link to what is not"])
def test_crafted_manifests_of_one_folder_end_the_copy(site: Site, canary: Path, name: str) -> None:
    """What is sent lies below the folder that was asked for, whatever is said of its paths."""
    site.add_guest("web", _TWO_FOLDERS)
    sums = [*_honest_sums(), (b"var", bytes(16), 1)]
    with _refreshed(site) as dialogue:
        dialogue.send(m.Folders(sums, last=True))
        assert dialogue.expect(m.Below) == m.Below(b"var")
        with refused():
            _send_and_end(Tree(dialogue), _CRAFTED[name])


def test_all_that_comes_is_put_where_it_belongs_after_a_part_was_asked_for(site: Site) -> None:
    """Little disk space: first it is found out how much is to come. Then a file of the target is
    somebody's who lets nobody read it, and all is to come.
    """
    site.add_guest("web", _TWO_FOLDERS)
    sums = [*_honest_sums(), (b"var", bytes(16), 1)]
    lease.ignore_break_signals()
    with serving() as dialogue:
        dialogue.send(m.Request("receive", "web", "web", refresh=True))
        machine = os.uname().machine
        dialogue.send(m.Source("web", machine, False, False, m.Identity(), 9, 1 << 60, []))
        assert dialogue.expect(m.Target).is_tight
        dialogue.send(m.Sum(bytes(32), 5, 198))
        assert dialogue.expect(m.Same) == m.Same(same=False, compares=True)
        dialogue.send(m.Folders(sums, last=True))
        assert dialogue.expect(m.Below) == m.Below(b"var")
        file = site.root("web") / "var/f"
        file.touch()
        with file.open("r+b") as holder:
            fcntl.fcntl(holder, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            tree = Tree(dialogue)
            tree.send(ROOT)
            assert not tree.end().same
            dialogue.send(m.Sum(bytes(32), 5, 198))
            assert dialogue.expect(m.Same) == m.Same(same=False, compares=False)
        tree = Tree(dialogue)
        tree.send(ROOT, (b"new", [Row(b"", DIR), row(b"f", b"new")]), contents=(b"new",))
        assert tree.end().errors == []
    found = snapshot(site.root("web"))
    assert sorted(found) == [b"", b"new", b"new/f"]


@pytest.mark.parametrize("path", [b"..", b"/etc", b"none", b"etc/f", b"et", b"var/../etc"])
def test_wishes_for_folders_that_cannot_be_end_the_copy(site: Site, path: bytes) -> None:
    site.add_guest("web", [File("etc/f", b"x" * 99)])
    with serving() as dialogue:
        _fetch_folders(dialogue)
        dialogue.send(m.Below(path))
        with refused("a folder that is not there"):
            dialogue.expect(m.Batch)


def test_a_wish_to_compare_a_first_copy_ends_it(site: Site) -> None:
    site.add_guest("web", [File("etc/f", b"x" * 99)])
    with serving() as dialogue:
        _fetch(dialogue, "web")
        dialogue.send(m.Same(same=False, compares=True))
        with refused():
            dialogue.expect(m.Folders)


# --- a hostile receiver


def _fetch(dialogue: m.Dialogue, name: str) -> tuple[m.Source, m.Batch]:
    dialogue.send(m.Request("send", name, "x"))
    source = dialogue.expect(m.Source)
    dialogue.send(m.Target(m.Identity(), "x", False))
    return source, dialogue.expect(m.Batch)


@pytest.mark.parametrize("name", ["../up", "/etc", "", "none", ".defaults"])
def test_a_receiver_gets_configured_guests_alone(site: Site, name: str) -> None:
    site.add_guest("web", [File("f", b"x" * 99)])
    with serving() as dialogue, refused():
        _fetch(dialogue, name)


@pytest.mark.parametrize(
    "answers",
    [
        [m.Want(0, b"\xff")],
        [m.Want(1, b"\0")],
        [m.Want(0, b"\x01")],
        [m.Want(0, b"\0", b"\x02", b"short")],
        [m.Base(1, 4096, b"x" * 8, 1 << 40), m.Want(0, b"\x02")],
        [m.Base(1, 1 << 30, b"", 5), m.Base(1, 4096, b"", 5)],
        [m.Base(number, 4096, bytes(1 << 20), 1) for number in range(80)],
        [m.Served(0)],
        [m.Result()],
    ],
)
def test_wishes_that_cannot_be_end_the_copy(site: Site, answers: list[Any]) -> None:
    site.add_guest("web", [Folder(""), File("f", os.urandom(2 << 20))])
    with serving() as dialogue:
        _fetch(dialogue, "web")
        with refused():
            _answer_all(dialogue, answers)


def _answer_all(dialogue: m.Dialogue, answers: list[Any]) -> None:
    for answer in answers:
        dialogue.send(answer)
    while not isinstance(dialogue.receive(), m.End):
        pass


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    frames=st.lists(st.tuples(st.integers(0, 22), st.binary(max_size=200)), min_size=1, max_size=6)
)
def test_frames_of_anything_never_bring_a_side_down(
    site: Site, frames: list[tuple[int, bytes]]
) -> None:
    """`serving` sees to it that the program ends by itself and without a traceback."""
    with serving() as dialogue:
        offer(dialogue)
        with suppress(ToolError):
            for kind, body in frames:
                dialogue.channel.send(kind, body)
            dialogue.channel.flush()
    assert not site.root("new").exists()
