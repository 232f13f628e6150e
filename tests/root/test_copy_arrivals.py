"""Where a content goes that has arrived, and what becomes of it when the copy is not finished."""

import os
import subprocess
from pathlib import Path

import pytest
from blake3 import blake3

from tests.fixtures.dialogues import DIR, ROOT, Tree, offer, row, serving
from tests.fixtures.filesystems import Site
from tests.fixtures.probes import need, on
from tests.fixtures.runs import find_faults, inode_of, list_objects
from tests.fixtures.sshd import PROGRAM
from tests.fixtures.trees import File
from vstore.copy.manifest import Row

pytestmark = [need("immutable", "lease"), on("ext4", "xfs", "btrfs")]

_CONTENT = b"the same in both " * 9


def _leave_area(site: Site) -> Path:
    """As a copy to `new` leaves its folder that was killed: the tree in it."""
    area = site.vdirbase / "new.copy-0123abcd"
    area.mkdir(mode=0o700)
    for folder in ("arrived", "tree", "tree/etc"):
        (area / folder).mkdir()
    return area / "tree"


def test_an_object_that_somebody_makes_meanwhile_is_taken(site: Site) -> None:
    """The content has been asked for, and then another guest with the same file is unified."""
    with serving() as dialogue:
        offer(dialogue)
        tree = Tree(dialogue)
        wanted = tree.announce(ROOT, (b"", [row(b"f", _CONTENT)]))
        assert wanted == [1]
        root = site.add_guest("other", [File("f", _CONTENT, mode=0o644, mtime_ns=0)])
        subprocess.run([PROGRAM.with_name("vhashify"), "other"], check=True, capture_output=True)
        tree.serve(wanted, [_CONTENT])
        assert tree.end().linked == 1
    assert inode_of(site.root("new") / "f") == inode_of(root / "f")
    assert len(list_objects(site.pool)) == 1
    assert find_faults(site.pool) == []


def test_small_files_of_a_copy_that_was_killed_are_not_asked_for_again(site: Site) -> None:
    names = [b"alone", b"linked", b"chosen", b"half", b"empty"]
    contents = {name: name * 99 for name in names} | {b"empty": b""}
    tree = _leave_area(site)
    for name in names:
        (tree / "etc" / os.fsdecode(name)).write_bytes(contents[name])
    (tree / "etc/half").write_bytes(contents[b"half"][:50])
    os.link(tree / "etc/linked", site.filesystem.folder / "somebody's")
    subprocess.run(["chattr", "+d", tree / "etc/chosen"], check=True)
    with serving() as dialogue:
        offer(dialogue)
        sent = Tree(dialogue)
        rows = [Row(b"", DIR), *(row(name, contents[name]) for name in sorted(names))]
        wanted = sent.announce(ROOT, (b"etc", rows))
        asked = [rows[number - 1].name for number in wanted]
        assert asked == [b"chosen", b"half", b"linked"]
        sent.serve(wanted, [contents[name] for name in asked])
        assert sent.end().errors == []
    for name, content in contents.items():
        assert (site.root("new") / "etc" / os.fsdecode(name)).read_bytes() == content
    assert (site.filesystem.folder / "somebody's").stat().st_nlink == 1
    assert [path.name for path in site.vdirbase.iterdir() if ".copy-" in path.name] == []
    assert find_faults(site.pool) == []


@pytest.mark.parametrize("size", [1, 20, 4096])
def test_equal_files_of_one_guest_come_once_and_are_objects_of_their_own(
    site: Site, size: int
) -> None:
    """Below sixteen bytes they are the guest's."""
    content = os.urandom(size)
    is_object = size >= 16
    with serving() as dialogue:
        offer(dialogue)
        tree = Tree(dialogue)
        tree.send(ROOT, (b"", [row(b"f", content), row(b"g", content)]), contents=[content])
        assert tree.end().linked == 2 * is_object
    found = [site.root("new") / name for name in "fg"]
    assert [path.read_bytes() for path in found] == [content] * 2
    assert [path.stat().st_nlink for path in found] == [1 + is_object] * 2
    assert len(list_objects(site.pool)) == 2 * is_object
    assert find_faults(site.pool) == []


@pytest.mark.parametrize("place", ["arrived", "tree/etc"])
def test_what_another_sender_left_is_asked_for_where_proofs_are(site: Site, place: str) -> None:
    """Whoever knows a digest alone would have the content in its guest."""
    site.configure(".defaults", "apps/vserver-copy/policy", "prove\n")
    left = _leave_area(site).parent / place / blake3(_CONTENT).hexdigest()
    left.write_bytes(_CONTENT)
    with serving() as dialogue:
        offer(dialogue)
        assert Tree(dialogue).announce(ROOT, (b"", [row(b"f", _CONTENT)])) == [1]
