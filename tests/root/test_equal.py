"""Files are equal when content and every attribute are: what differs in one never becomes one."""

import os
from collections.abc import Iterable
from typing import Final

import pytest

from tests.conftest import Tool
from tests.fixtures.filesystems import Filesystem, Site, is_immutable
from tests.fixtures.probes import need, on
from tests.fixtures.runs import find_faults, inodes, list_objects, unify
from tests.fixtures.trees import (
    EPOCH_NS,
    File,
    Meta,
    Row,
    acl,
    capability,
    differences,
    snapshot,
)
from vstore import inode

pytestmark = need("immutable", "lease")

_ACL: Final = "system.posix_acl_access"
_ALL_OF_IT: Final = acl(owner=6, group=4, other=4, users={1000: 6})

_PAIRS: Final[dict[str, tuple[Meta, Meta]]] = {
    "mode": (Meta(mode=0o644), Meta(mode=0o640)),
    "setuid": (Meta(mode=0o755), Meta(mode=0o4755)),
    "sticky": (Meta(mode=0o755), Meta(mode=0o1755)),
    "uid": (Meta(uid=0), Meta(uid=1)),
    "gid": (Meta(gid=0), Meta(gid=1)),
    "mtime": (Meta(mtime_ns=EPOCH_NS), Meta(mtime_ns=EPOCH_NS + 1)),
    "acl": (Meta(xattrs={_ACL: _ALL_OF_IT}), Meta(mode=0o674)),  # the mask shows as the group's
    "acl user": (
        Meta(xattrs={_ACL: _ALL_OF_IT}),
        Meta(xattrs={_ACL: acl(owner=6, group=4, other=4, users={1001: 6})}),
    ),
    "capability": (Meta(xattrs={"security.capability": capability(13)}), Meta()),
    "other capability": (
        Meta(xattrs={"security.capability": capability(13)}),
        Meta(xattrs={"security.capability": capability(13, 21)}),
    ),
    "xattr": (Meta(xattrs={"user.key": b"value"}), Meta()),
    "xattr name": (Meta(xattrs={"user.key": b"value"}), Meta(xattrs={"user.kez": b"value"})),
    "xattr value": (Meta(xattrs={"user.key": b"value"}), Meta(xattrs={"user.key": b"valuf"})),
    "xattr cut": (
        Meta(xattrs={"user.a": b"bc", "user.d": b""}),
        Meta(xattrs={"user.a": b"b", "user.d": b"c"}),
    ),
    "trusted": (Meta(xattrs={"trusted.key": b"value"}), Meta()),
}
"""By what differs: the metadata of two files of equal content."""


def _content(name: str) -> bytes:
    """Another one for each pair, always as long."""
    return name.encode().ljust(100, b".")


def _files(which: int) -> Iterable[Row]:
    for name, pair in _PAIRS.items():
        meta = pair[which]
        yield File(
            name,
            _content(name),
            mode=meta.mode,
            uid=meta.uid,
            gid=meta.gid,
            mtime_ns=meta.mtime_ns,
            xattrs=meta.xattrs,
        )
    yield File("nothing", _content("nothing"))


@pytest.mark.parametrize("option", ["plain", "--ignore-mtime", "--link-twins"])
def test_files_that_differ_in_one_attribute_never_become_one_inode(
    site: Site, tool: Tool, option: str
) -> None:
    guests = [site.add_guest("web", _files(0)), site.add_guest("db", _files(1))]
    before = [snapshot(root) for root in guests]
    unify(tool, "--all", *([] if option == "plain" else [option]))
    wanted = {"nothing"} | ({"mtime"} if option == "--ignore-mtime" else set())
    one = {name for name in (*_PAIRS, "nothing") if len(set(inodes(site, name, "web", "db"))) == 1}
    assert one == wanted
    after = [snapshot(root) for root in guests]
    found = [differences(*pair) for pair in zip(before, after, strict=True)]
    if option == "--ignore-mtime":
        assert found == [[], [f"b'mtime': mtime_ns was {EPOCH_NS + 1}, is {EPOCH_NS}"]]
    else:
        assert found == [[], []]
    assert find_faults(site.pool) == []


def test_files_that_differ_in_one_byte_never_become_one_inode(site: Site, tool: Tool) -> None:
    sizes = (16, 4096, 4097, 1 << 20, (1 << 20) + 1, 3 << 20)
    rows: list[Row] = [File(f"{size}", bytes(size - 1) + b"a") for size in sizes]
    others: list[Row] = [File(f"{size}", bytes(size - 1) + b"b") for size in sizes]
    rows += [File(f"start{size}", b"a" + bytes(size - 1)) for size in sizes]
    others += [File(f"start{size}", b"b" + bytes(size - 1)) for size in sizes]
    site.add_guest("web", rows)
    site.add_guest("db", others)
    assert unify(tool).unified == 0


def test_holes_are_zeros(site: Site, tool: Tool) -> None:
    """A file with holes and one with written zeros are equal; a guest sees only other blocks."""
    holes: list[Row] = [
        File("end", b"data" * 2048, size=1 << 21),
        File("start", b"data" * 2048, at=1 << 21),
        File("middle", b"data" * 2048, at=1 << 16, size=1 << 21),
        File("only", b"", size=1 << 21),
        File("moved", b"data" * 2048, at=1 << 16, size=1 << 21),
    ]
    full: list[Row] = [
        File("end", b"data" * 2048 + bytes((1 << 21) - 8192)),
        File("start", bytes(1 << 21) + b"data" * 2048),
        File("middle", bytes(1 << 16) + b"data" * 2048 + bytes((1 << 21) - (1 << 16) - 8192)),
        File("only", bytes(1 << 21)),
        File("moved", b"data" * 2048, at=1 << 17, size=1 << 21),
    ]
    guests = [site.add_guest("web", holes), site.add_guest("db", full)]
    before = [snapshot(root) for root in guests]
    unify(tool)
    same = {row.path for row in holes if len(set(inodes(site, row.path, "web", "db"))) == 1}
    assert same == {"end", "start", "middle", "only"}
    after = [snapshot(root) for root in guests]
    assert [differences(*pair) for pair in zip(before, after, strict=True)] == [[], []]


def test_xattrs_are_equal_in_whatever_order_they_were_set(site: Site, tool: Tool) -> None:
    xattrs = {f"user.{letter}": letter.encode() * 9 for letter in "abcdefgh"}
    backwards = dict(reversed(xattrs.items()))
    site.add_guest("web", [File("file", _content("x"), xattrs=xattrs)])
    site.add_guest("db", [File("file", _content("x"), xattrs=backwards)])
    assert unify(tool).unified == 2
    assert len(set(inodes(site, "file", "web", "db"))) == 1


def test_times_are_kept_to_the_nanosecond_and_beyond_32_bits(site: Site, tool: Tool) -> None:
    times = (-1, -(10**18), 0, 1, 2**31 * 10**9 + 7, 2**32 * 10**9 + 999_999_999)
    rows: list[Row] = [File(str(time), b"x" * 50, mtime_ns=time) for time in times]
    guests = [site.add_guest(name, rows) for name in ("web", "db")]
    before = [snapshot(root) for root in guests]
    assert unify(tool).unified == 2 * len(times)
    for root, wanted in zip(guests, before, strict=True):
        assert differences(wanted, snapshot(root)) == []
    assert find_faults(site.pool) == []


@on("ext4")
def test_without_mtime_the_oldest_wins(site: Site, tool: Tool) -> None:
    for number, name in enumerate(("web", "db", "mail")):
        mtime = EPOCH_NS + (7, 3, 5)[number]
        site.add_guest(name, [File("file", _content("x"), mtime_ns=mtime)])
    report = unify(tool, "--all", "--ignore-mtime")
    assert (report.unified, report.new) == (3, 1)
    for name in ("web", "db", "mail"):
        assert (site.root(name) / "file").stat().st_mtime_ns == EPOCH_NS + 3
    assert find_faults(site.pool) == []
    assert unify(tool, "--all", "--ignore-mtime").already == 3


@on("ext4")
def test_an_object_has_the_mtime_that_its_name_says_when_the_oldest_cannot_be_one(
    site: Site, tool: Tool
) -> None:
    """The oldest of the second twins has another name among the first ones, so it is no source."""
    old, young = EPOCH_NS, EPOCH_NS + 9
    web = site.add_guest("web", [File("one", _content("x"), mtime_ns=young)])
    db = site.add_guest("db")
    mail = site.add_guest("mail", [File("two", _content("x"), mtime_ns=old)])
    os.link(web / "one", db / "one")
    os.link(mail / "two", db / "two")
    more: list[Row] = [File(name, _content("x"), mtime_ns=young + 1) for name in ("one", "two")]
    site.add_guest("news", more)
    unify(tool, "--all", "--ignore-mtime")
    assert find_faults(site.pool) == []
    assert list_objects(site.pool)


def test_files_with_flags_of_their_own_stay_as_they_are(site: Site, tool: Tool) -> None:
    for name in ("web", "db"):
        root = site.add_guest(name, [File("frozen", _content("x")), File("appended", b"y" * 99)])
        for letter, path in (("+i", "frozen"), ("+a", "appended")):
            _change_flag(letter, root / path)
    report = unify(tool)
    assert report.unified == 0
    assert report.skipped == {"immutable": 2, "flags": 2}
    assert is_immutable(site.root("web") / "frozen")


def _change_flag(letter: str, path: os.PathLike[str]) -> None:
    import subprocess

    subprocess.run(["chattr", letter, "--", path], check=True)


def test_an_acl_is_one_attribute_on_every_file_system(fs: Filesystem) -> None:
    """Given the attributes of a file somewhere, storing them again and again gives just them."""
    place = fs.folder / "file"
    place.write_bytes(b"")
    with place.open("r+b") as file:
        fd = file.fileno()
        for wanted in ({os.fsencode(_ACL): _ALL_OF_IT}, {}, {os.fsencode(_ACL): _ALL_OF_IT}):
            for _ in range(2):
                inode.store_xattrs(fd, wanted)
                assert inode.load_xattrs(fd) == wanted
