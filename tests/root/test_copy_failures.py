"""Single entries that cannot be made, and contents that are not to be trusted."""

import os
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from blake3 import blake3

from tests.fixtures.dialogues import DIR, FILE, ROOT, Tree, offer, row, serving
from tests.fixtures.filesystems import Site
from tests.fixtures.probes import need, on
from tests.fixtures.runs import find_faults
from tests.fixtures.windows import wait_for
from vstore import inode
from vstore.copy import messages as m
from vstore.copy.manifest import Row, pack_parts

pytestmark = need("immutable", "lease")

_GOOD = b"x" * 99
_OTHER = b"z" * 99
_TINY = b"y" * 5
_NO_ACL = [(b"system.posix_acl_access", b"x")]
_LARGE = [(b"user.large", b"v" * 10_000)]
_EMPTY = blake3().digest()


def _file(name: bytes, content: bytes, xattrs: list[tuple[bytes, bytes]]) -> Row:
    digest = blake3(content).digest()
    return Row(name, FILE, size=len(content), digest=digest, xattrs=xattrs)


_BAD: dict[str, tuple[list[Row], list[bytes]]] = {
    "empty": ([Row(b"e", FILE, digest=_EMPTY, xattrs=_NO_ACL)], []),
    "own": ([_file(b"e", _TINY, _NO_ACL)], [_TINY]),
    "copied": ([row(b"d", _TINY), _file(b"e", _TINY, _NO_ACL)], [_TINY]),
    "object": ([_file(b"e", _OTHER, _NO_ACL)], [_OTHER]),
    "object that others wait for": ([_file(b"e", _GOOD, _NO_ACL)], []),
    "fifo": ([Row(b"e", stat.S_IFIFO | 0o644, xattrs=_NO_ACL)], []),
    "symlink": ([Row(b"e", stat.S_IFLNK | 0o777, text=b"f", xattrs=[(b"user.x", b"x")])], []),
    "large attribute": ([_file(b"e", _OTHER, _LARGE)], [_OTHER]),
    "large attribute of a fifo": ([Row(b"e", stat.S_IFIFO | 0o644, xattrs=_LARGE)], []),
}


@on("ext4")
@pytest.mark.parametrize("what", sorted(_BAD))
def test_one_entry_that_cannot_be_made_is_left_out(site: Site, what: str) -> None:
    rows, contents = _BAD[what]
    with serving() as dialogue:
        offer(dialogue, keep_going=True)
        tree = Tree(dialogue)
        sent = [Row(b"", DIR), *rows, row(b"f", _GOOD)]
        tree.send((b"", sent), contents=[*contents, _GOOD])
        result = tree.end()
    assert [path for path, _ in result.errors] == [b"e"]
    assert "room" not in result.errors[0][1]
    assert (site.root("new") / "f").read_bytes() == _GOOD
    assert not os.path.lexists(site.root("new") / "e")
    assert find_faults(site.pool) == []


@on("ext4")
def test_a_folder_that_does_not_get_its_attributes_stands_all_the_same(site: Site) -> None:
    with serving() as dialogue:
        offer(dialogue, keep_going=True)
        tree = Tree(dialogue)
        folder = [Row(b"", DIR, xattrs=_NO_ACL), row(b"f", _GOOD)]
        tree.send(ROOT, (b"a", folder), contents=[_GOOD])
        result = tree.end()
    assert [path for path, _ in result.errors] == [b"a/"]
    assert (site.root("new") / "a/f").read_bytes() == _GOOD


# --- what an earlier copy left


def _leave_file(site: Site, content: bytes) -> Path:
    """In the tree of a copy to `new` that was killed."""
    area = site.vdirbase / "new.copy-0123abcd"
    area.mkdir(mode=0o700)
    for folder in ("arrived", "tree"):
        (area / folder).mkdir()
    path = area / "tree/f"
    path.write_bytes(content)
    return path


@on("ext4")
@pytest.mark.parametrize("content", [_TINY, _GOOD])
def test_what_somebody_may_still_write_to_is_not_taken_over(site: Site, content: bytes) -> None:
    path = _leave_file(site, content)
    with path.open("r+b", buffering=0) as held, serving() as dialogue:
        offer(dialogue)
        tree = Tree(dialogue)
        tree.send(ROOT)
        held.write(b"!" * len(content))
        tree.send((b"etc", [Row(b"", DIR), row(b"f", content)]), contents=[content])
        assert tree.end().errors == []
    assert (site.root("new") / "etc/f").read_bytes() == content
    assert find_faults(site.pool) == []


@on("xfs")
def test_what_counts_for_another_project_is_not_taken_over(site: Site) -> None:
    with _leave_file(site, _GOOD).open("r+b") as file:
        inode.put_project_id(file.fileno(), 42)
    with serving() as dialogue:
        offer(dialogue)
        tree = Tree(dialogue)
        tree.send(ROOT, (b"", [row(b"f", _GOOD)]), contents=[_GOOD])
        assert tree.end().errors == []
    with (site.root("new") / "f").open("rb") as file:
        assert inode.project_id(file.fileno()) == 0


# --- proofs


@on("ext4")
def test_no_proof_is_asked_for_what_came_in_this_run(site: Site) -> None:
    """The worker, which is to make the object, stands still meanwhile, as before a slow disk."""
    site.configure(".defaults", "apps/vserver-copy/policy", "prove\n")
    with serving() as dialogue:
        offer(dialogue)
        tree = Tree(dialogue)
        tree.send(ROOT)
        wait_for(lambda: bool(_workers()))
        with _standing_still(_workers()):
            tree.send((b"", [row(b"f", _GOOD)]), contents=[_GOOD])
            packed = pack_parts([(b"", [row(b"g", _GOOD)])])
            dialogue.send(m.Batch(2, 2, msgspec.Raw(packed), b"\1", b"\0"))
            want = dialogue.expect(m.Want)
        assert (want.wanted, want.proven) == (b"\0", b"")


def _workers() -> list[int]:
    """Of the serving program that we have started."""
    return [worker for child in _children(os.getpid()) for worker in _children(child)]


def _children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(word) for word in (task / "children").read_text().split()]
    return found


@contextmanager
def _standing_still(pids: list[int]) -> Iterator[None]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
