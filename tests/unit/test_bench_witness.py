"""The witness of the demo sees every change that a guest could see, and no other."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.witness import digest_trees

_CHANGES: dict[str, Callable[[Path], object]] = {
    "content": lambda root: _rewrite(root / "etc/conf"),
    "mode": lambda root: (root / "etc/conf").chmod(0o600),
    "time": lambda root: os.utime(root / "etc/conf", ns=(1, 2)),
    "name": lambda root: (root / "etc/conf").rename(root / "etc/other"),
    "target": lambda root: _relink(root / "link"),
    "new": lambda root: (root / "new").touch(),
    "kind": lambda root: _make_folder(root / "etc/conf"),
    "gone": lambda root: (root / "link").unlink(),
}


def _rewrite(path: Path) -> None:
    """Other bytes under the same size and time."""
    before = path.stat()
    path.write_bytes(b"other")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _relink(path: Path) -> None:
    path.unlink()
    path.symlink_to("etc/none")


def _make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _grow(root: Path) -> Path:
    (root / "etc").mkdir(parents=True)
    (root / "etc/conf").write_bytes(b"bytes")
    (root / "link").symlink_to("etc/conf")
    for path in (root / "etc/conf", root / "etc", root):
        os.utime(path, ns=(0, 0))
    return root


@pytest.mark.parametrize("change", _CHANGES)
def test_what_a_guest_can_see_changes_the_digest(tmp_path: Path, change: str) -> None:
    root = _grow(tmp_path / "web")
    before = digest_trees([root])
    assert digest_trees([root]) == before
    _CHANGES[change](root)
    assert digest_trees([root]) != before


def test_inode_numbers_and_links_do_not_count(tmp_path: Path) -> None:
    root = _grow(tmp_path / "web")
    before = digest_trees([root])
    spare = tmp_path / "spare"
    shutil.copy2(root / "etc/conf", spare)
    (tmp_path / "second").hardlink_to(spare)
    spare.rename(root / "etc/conf")
    os.utime(root / "etc", ns=(5, 0))
    assert digest_trees([root]) == before


def test_each_tree_counts(tmp_path: Path) -> None:
    roots = [_grow(tmp_path / name) for name in ("web", "db")]
    before = digest_trees(roots)
    (roots[1] / "etc/conf").write_bytes(b"later")
    assert digest_trees(roots) != before
