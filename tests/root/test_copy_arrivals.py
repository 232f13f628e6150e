"""Where a content goes that has arrived, and what becomes of it when the copy is not finished."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from blake3 import blake3

from tests.fixtures.dialogues import DIR, ROOT, Tree, offer, relay, row, serving
from tests.fixtures.filesystems import Site
from tests.fixtures.probes import need, on
from tests.fixtures.runs import find_faults, inode_of, list_objects
from tests.fixtures.sshd import PROGRAM
from tests.fixtures.trees import File, Link, differences, snapshot
from vstore.copy import messages as m
from vstore.copy.manifest import Row
from vstore.copy.messages import SMALL

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


# --- a file with several names that changes between the list and its turn


def _append(names: list[Path]) -> None:
    with names[0].open("ab") as file:
        file.write(b"more")


def _replace(names: list[Path]) -> None:
    other = names[0].with_name("other")
    other.write_bytes(b"another file")
    other.rename(names[0])


def _unlink(names: list[Path]) -> None:
    names[0].unlink()


def _chmod(names: list[Path]) -> None:
    names[0].chmod(0o600)


def _leave_one(names: list[Path]) -> None:
    for name in names[1:]:
        name.unlink()


def _copy_while(site: Site, change: Callable[[list[Path]], None], most: int) -> m.Result:
    """Copy a guest, of which a file with three names is changed before it is sent, so often at
    most. Another one, with two names, is equal to it: its content comes with that.
    """
    names = [site.root("web") / name for name in ("a/first", "b/second", "b/third")]
    content = os.urandom(SMALL + 99)
    rows = [File("a/first", content), File("a/still", b"x" * 99), File("y/equal", content)]
    site.add_guest("web", [*rows, Link("z/more", "y/equal")])
    names[1].parent.mkdir()
    for name in names[1:]:
        os.link(names[0], name)
    results: list[m.Result] = []
    changes = 0

    def see(message: msgspec.Struct) -> None:
        nonlocal changes
        if isinstance(message, m.Want) and any(message.wanted) and changes < most:
            folders = {name.parent: name.parent.stat() for name in names}
            change(names)
            for folder, before in folders.items():  # these were listed, and are not listed again
                os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))
            changes += 1
        if isinstance(message, m.Result):
            results.append(message)

    with serving() as source, serving() as target:
        source.send(m.Request("send", "web", "new"))
        target.send(m.Request("receive", "web", "new"))
        relay(source, target, see)
    assert changes == most
    return results[0]


@pytest.mark.parametrize("change", [_append, _replace, _unlink, _chmod, _leave_one])
def test_all_names_of_a_file_that_changes_are_listed_again(
    site: Site, change: Callable[[list[Path]], None]
) -> None:
    result = _copy_while(site, change, 1)
    source, copy = (snapshot(site.root(name)) for name in ("web", "new"))
    assert differences(source, copy) == []
    assert (result.errors, result.torn) == ([], [])
    files = [path for path in site.root("new").rglob("*") if path.is_file()]
    assert result.files == len(files)
    assert result.bytes_total == sum(
        {inode_of(path): path.stat().st_size for path in files}.values()
    )
    assert find_faults(site.pool) == []


def test_a_file_that_goes_on_changing_keeps_its_names(site: Site) -> None:
    result = _copy_while(site, _append, 5)
    assert (site.root("new") / "y/equal").samefile(site.root("new") / "z/more")
    names = [site.root("new") / name for name in ("a/first", "b/second", "b/third")]
    assert len({inode_of(path) for path in names}) == 1
    assert names[0].read_bytes() == (site.root("web") / "a/first").read_bytes()
    assert sorted(path for path, _ in result.torn) == [b"a/first", b"b/second", b"b/third"]
    assert result.errors == []
