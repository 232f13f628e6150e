"""Files that change between the list of a guest and their turn to be sent."""

import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from tests.fixtures.dialogues import relay, serving
from tests.fixtures.filesystems import Site
from tests.fixtures.probes import need, on
from tests.fixtures.runs import find_faults, inode_of
from tests.fixtures.trees import File, Link, Row, differences, snapshot
from vstore import exclude
from vstore.copy import messages as m
from vstore.copy.listing import Firsts, Listing
from vstore.copy.messages import SMALL

pytestmark = need("immutable", "lease")
_EACH = on("ext4", "xfs", "btrfs")


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


@_EACH
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


@_EACH
def test_a_file_that_goes_on_changing_keeps_its_names(site: Site) -> None:
    result = _copy_while(site, _append, 4)
    assert (site.root("new") / "y/equal").samefile(site.root("new") / "z/more")
    names = [site.root("new") / name for name in ("a/first", "b/second", "b/third")]
    assert len({inode_of(path) for path in names}) == 1
    assert names[0].read_bytes() == (site.root("web") / "a/first").read_bytes()
    assert sorted(path for path, _ in result.torn) == [b"a/first", b"b/second", b"b/third"]
    assert result.errors == []


# --- other kinds, other inodes, many names


def _put_symlink(path: Path) -> None:
    path.unlink()
    path.symlink_to("where")


def _put_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _put_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _change_once(
    site: Site, rows: list[Row], change: Callable[[Path], None]
) -> tuple[m.Result, int]:
    """Copy a guest with a large file `a`, which is changed before it is sent; --keep-going. How
    often the other side was waited for comes too.
    """
    path = site.add_guest("web", [File("a", os.urandom(SMALL + 99)), *rows]) / "a"
    changes = [change]
    results: list[m.Result] = []
    wants = 0

    def see(message: msgspec.Struct) -> None:
        nonlocal wants
        wants += isinstance(message, m.Want)
        if isinstance(message, m.Want) and any(message.wanted) and changes:
            before = path.parent.stat()
            changes.pop()(path)
            os.utime(path.parent, ns=(before.st_atime_ns, before.st_mtime_ns))
        if isinstance(message, m.Result):
            results.append(message)

    with serving() as source, serving() as target:
        source.send(m.Request("send", "web", "new"))
        target.send(m.Request("receive", "web", "new", keep_going=True))
        relay(source, target, see)
    return results[0], wants


@_EACH
@pytest.mark.parametrize("change", [_put_symlink, _put_fifo])
@pytest.mark.parametrize("rows", [[File("b", b"x" * 99)], [Link("z", "a")]])
def test_what_becomes_another_kind_arrives_as_that(
    site: Site, change: Callable[[Path], None], rows: list[Row]
) -> None:
    result, _ = _change_once(site, rows, change)
    assert (result.errors, result.torn) == ([], [])
    assert differences(snapshot(site.root("web")), snapshot(site.root("new"))) == []


@_EACH
def test_what_becomes_a_folder_is_named(site: Site) -> None:
    result, _ = _change_once(site, [], _put_folder)
    assert result.errors == [(b"a", "was a file, and has become a folder meanwhile")]


@on("ext4")
def test_very_many_names_come_again_at_once(site: Site) -> None:
    """In some batches, not each in one of its own."""
    links: list[Row] = [Link(f"l{number}", "a") for number in range(2000)]

    def append(path: Path) -> None:
        with path.open("ab") as file:
            file.write(b"more")

    result, wants = _change_once(site, links, append)
    assert result.files == 2001
    assert len({inode_of(path) for path in site.root("new").iterdir()}) == 1
    assert wants < 20


@on("ext4")
def test_an_inode_number_that_is_used_again_is_another_file(site: Site) -> None:
    root = site.add_guest("web", [File("p1", b"one" * 99), File("p2", b"two" * 99)])
    for name in ("p1", "p2"):
        os.link(root / name, root / f"{name}b")
    fd = os.open(root, os.O_RDONLY)
    listing = Listing(fd, None, exclude.parse(b"", source=""), rewritten={}, is_still=False)
    try:
        assert [*listing.batches()]
        firsts: Firsts = {}
        assert [*listing.again(b"p1", firsts), *listing.packer.end()]
        was = inode_of(root / "p1")
        for name in ("p1", "p1b"):
            (root / name).unlink()
        for number in range(2000):
            (root / "p2").unlink()
            (root / "p2").write_bytes(b"three" * 99)
            if inode_of(root / "p2") == was:
                break
            (root / "p2").rename(root / f"another {number}")
            (root / "p2").touch()
        assert inode_of(root / "p2") == was
        os.link(root / "p2", root / "p2c")
        (batch,) = [*listing.again(b"p2", firsts), *listing.packer.end()]
        assert [row.link for _, row in batch.rows()] == [0]
    finally:
        listing.close()
        os.close(fd)
