"""Guests that the original's tools have unified: the steps of vserver-migration(7)."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Tool
from tests.fixtures import manpages
from tests.fixtures.filesystems import Site, is_immutable
from tests.fixtures.probes import need, on
from tests.fixtures.runs import inode_of, list_objects, unify

pytestmark = [need("root", "immutable", "lease"), on("ext4", "xfs", "btrfs")]

_PAGE = Path(__file__).parents[2] / "vrun/man/vserver-migration.7"
_FILES = [f"usr/file{number}" for number in range(4)]


@pytest.fixture
def roots(site: Site) -> list[Path]:
    """Three guests; two of them share files with each other and an old pool, one has its own."""
    pool = site.vdirbase / ".hash"
    pool.mkdir()
    roots = [site.add_guest(name) for name in ("web", "db", "mail")]
    for root in roots:
        (root / "usr").mkdir()
    for number, file in enumerate(_FILES):
        (roots[0] / file).write_text(file * 1000)
        (roots[1] / file).hardlink_to(roots[0] / file)
        (pool / str(number)).hardlink_to(roots[0] / file)
        subprocess.run(["cp", "-p", roots[0] / file, roots[2] / file], check=True)
        subprocess.run(["chattr", "+i", roots[0] / file], check=True)
    return roots


def _assert_shared(site: Site, roots: list[Path]) -> None:
    assert len(list_objects(site.pool)) == len(_FILES)
    for file in _FILES:
        assert len({inode_of(root / file) for root in roots}) == 1
        assert is_immutable(roots[0] / file)
        assert (roots[0] / file).read_text() == file * 1000


def test_a_pool_that_the_configuration_names_is_taken_over(
    site: Site, roots: list[Path], tool: Tool
) -> None:
    named = site.confdir / ".defaults/apps/vunify/hash"
    named.mkdir(parents=True)
    (named / "root").symlink_to(site.vdirbase / ".hash")
    assert unify(tool, "--all").unified == len(_FILES) * 3
    _assert_shared(site, roots)
    assert tool("vpool", "rm", site.vdirbase / ".hash").returncode == 0
    _assert_shared(site, roots)
    assert tool("vpool", "verify").returncode == 0


def test_a_pool_that_nothing_names_is_given_up_first(
    site: Site, roots: list[Path], tool: Tool
) -> None:
    assert unify(tool, "--all").unified == 0
    step = re.search(r"chattr.*\n.*rm -rf.*", manpages.plain(_PAGE))
    assert step
    subprocess.run(["sh", "-ec", step[0].replace("VDIRBASE", f"{site.vdirbase}")], check=True)
    assert unify(tool, "--all").unified == len(_FILES) * 3
    _assert_shared(site, roots)


def test_the_way_back_gives_every_guest_files_of_its_own(
    site: Site, roots: list[Path], tool: Tool
) -> None:
    named = site.confdir / ".defaults/apps/vunify/hash"
    named.mkdir(parents=True)
    (named / "root").symlink_to(site.vdirbase / ".hash")
    unify(tool, "--all")
    assert tool("vunify", "--undo", "--all").returncode == 0
    for file in _FILES:
        assert len({inode_of(root / file) for root in roots}) == len(roots)
        assert [root / file for root in roots if is_immutable(root / file)] == []
