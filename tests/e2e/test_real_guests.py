"""Guests that debootstrap built, of two releases and several package sets, on each file system."""

import subprocess
from pathlib import Path

import pytest

from tests.conftest import Tool
from tests.fixtures.filesystems import Site, free_bytes, freed
from tests.fixtures.guests import SMALL, install
from tests.fixtures.probes import need
from tests.fixtures.trees import differences, snapshot

pytestmark = need("immutable", "lease", "debootstrap")

_TIMEOUT_S = 600


def _verify_packages(root: Path) -> str:
    """What dpkg finds changed in the guest, from outside: it runs nothing of the guest's."""
    done = subprocess.run(
        ["dpkg", f"--root={root}", "--verify"], capture_output=True, text=True, check=False
    )
    return done.stdout


@pytest.mark.timeout(900)
def test_real_guests_are_unified_and_nothing_in_them_has_changed(site: Site, tool: Tool) -> None:
    roots = [
        install(recipe, site, f"{recipe.release}-{recipe.role}-{number}", number=number)
        for recipe in SMALL
        for number in (1, 2)
    ]
    before = [snapshot(root) for root in roots]
    verified = [_verify_packages(root) for root in roots]
    mount = site.filesystem.mount
    free = free_bytes(mount)
    done = tool("vunify", "--all", timeout_s=_TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    for was, root in zip(before, roots, strict=True):
        assert differences(was, snapshot(root)) == []
    assert [_verify_packages(root) for root in roots] == verified
    assert freed(mount, free, 110 << 20) > 100 << 20
    assert tool("vpool", "verify", timeout_s=_TIMEOUT_S).returncode == 0
