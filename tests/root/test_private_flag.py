"""The immutable flag of files that are nobody else's."""

import os
import subprocess
from collections.abc import Iterator

import pytest

from tests.fixtures.filesystems import Site, is_immutable
from tests.fixtures.probes import need, on
from tests.fixtures.trees import EPOCH_NS, File
from tests.fixtures.windows import (
    Shared,
    shared_file,
)
from vstore.errors import NotPermitted
from vstore.window import thaw_private

pytestmark = need("immutable", "lease")

_one = on("ext4")
"""Where the file system makes no difference."""


@pytest.fixture
def shared(site: Site) -> Iterator[Shared]:
    with shared_file(site) as made:
        yield made


def test_the_flag_of_a_shared_inode_is_not_lifted_outside_a_window(shared: Shared) -> None:
    fd = shared.open()
    with pytest.raises(NotPermitted):
        thaw_private(fd)
    assert is_immutable(shared.object)
    os.close(fd)


def test_the_flag_of_a_private_file_can_be_lifted(site: Site) -> None:
    path = site.add_guest("web", [File("conf", b"private")]) / "conf"
    subprocess.run(["chattr", "+i", path], check=True)
    with path.open("rb") as file:
        thaw_private(file.fileno())
    assert not is_immutable(path)
    assert path.stat().st_mtime_ns == EPOCH_NS
