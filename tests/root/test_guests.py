"""The guests of debootstrap are working Debians, and no two of them are the same."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.fixtures.filesystems import Site
from tests.fixtures.guests import SMALL, Recipe, install
from tests.fixtures.probes import need, on

pytestmark = need("debootstrap")


def _changed_files(root: Path) -> list[str]:
    """What dpkg finds changed in a guest, configuration files aside."""
    done = subprocess.run(
        ["chroot", root, "dpkg", "--verify"], capture_output=True, text=True, check=False
    )
    return [line for line in done.stdout.splitlines() if " c /" not in line]


@on("ext4")
@pytest.mark.parametrize("recipe", SMALL, ids=lambda recipe: f"{recipe.release}-{recipe.role}")
def test_a_built_guest_has_every_file_of_its_packages(site: Site, recipe: Recipe) -> None:
    root = install(recipe, site, "web")
    release = (root / "etc/os-release").read_text()
    assert f"VERSION_CODENAME={recipe.release}" in release
    assert _changed_files(root) == []


@on("ext4")
def test_file_capabilities_are_kept_in_the_archive(site: Site) -> None:
    root = install(SMALL[0], site, "web")
    assert "security.capability" in os.listxattr(root / "usr/bin/ping")


@on("ext4")
def test_guests_of_one_recipe_share_packages_but_nothing_that_names_them(site: Site) -> None:
    roots = [install(SMALL[0], site, f"web{number}", number=number) for number in (1, 2)]
    for own in ("etc/machine-id", "etc/hostname", "etc/ssh/ssh_host_rsa_key", "var/log/syslog"):
        assert len({(root / own).read_bytes() for root in roots}) == 2, own
    assert [_changed_files(root) for root in roots] == [[], []]
