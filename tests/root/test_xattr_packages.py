"""Both packages that are called `xattr` serve: pyxattr, and xattr, put before it on the path."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.conftest import Tool
from tests.fixtures.filesystems import Site
from tests.fixtures.probes import need, on
from tests.fixtures.runs import find_faults, inode_of, undo, unify
from tests.fixtures.trees import File, Row, acl, capability, differences, snapshot

pytestmark = need("immutable", "lease")

_OTHER: Final = Path(sys.prefix) / "other-xattr"
"""Where bench/setup.sh puts the package that does not stand beside pyxattr."""

_XATTRS: Final = {
    "security.capability": capability(13),
    "system.posix_acl_access": acl(owner=7, group=5, other=5, users={1000: 7}),
    "trusted.key": b"\x00\xff",
    "user.empty": b"",
    "user.key": b"value",
}


@pytest.fixture(params=["pyxattr", "xattr"], autouse=True)
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The package that programs started by the test will use."""
    if request.param == "xattr":
        assert _OTHER.is_dir(), f"{_OTHER} is missing; bench/setup.sh test installs it"
        before = os.environ.get("PYTHONPATH")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (os.fspath(_OTHER), before))))
    name: str = request.param
    return name


def _rows(**more: bytes) -> list[Row]:
    named = {f"user.{key}": value for key, value in more.items()}
    return [
        File("bin/ping", b"ELF" * 99, mode=0o755, xattrs=_XATTRS),
        File("plain", b"no attributes\n" * 99),
        File("other", b"attributes differ\n" * 99, xattrs=named),
    ]


def test_the_package_is_the_one_that_is_asked_for(package: str) -> None:
    program = "from vstore import inode; print(inode._xattr.__name__)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == {"pyxattr": "xattr", "xattr": "xattr.pyxattr_compat"}[package]


@on("ext4")
def test_attributes_are_compared_and_kept_with_either(site: Site, tool: Tool) -> None:
    web, db = site.add_guest("web", _rows(key=b"1")), site.add_guest("db", _rows(key=b"2"))
    before = snapshot(web), snapshot(db)
    assert unify(tool).unified == 4
    assert inode_of(web / "bin/ping") == inode_of(db / "bin/ping")
    assert inode_of(web / "other") != inode_of(db / "other")
    assert find_faults(site.pool) == []
    undo(tool)
    for old, new in zip(before, (snapshot(web), snapshot(db)), strict=True):
        assert differences(old, new, ignoring={"inode"}) == []
