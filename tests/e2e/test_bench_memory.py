"""What the benchmark says of memory: guests that share inodes share the page cache too."""

import pytest

from bench import cowmemory
from bench.cowmemory import PRIVATE, REFLINK, UNIFIED
from tests.fixtures.filesystems import private_folder
from tests.fixtures.probes import need

pytestmark = [
    need("root", "loop", "immutable", "lease", "debootstrap", "soak"),
    pytest.mark.timeout(600),
]


def test_only_shared_inodes_are_in_memory_once() -> None:
    with private_folder() as folder:
        folder.chmod(0o755)
        found = {one.state: one for one in cowmemory.measure(folder, count=3)}
    assert list(found) == [PRIVATE, REFLINK, UNIFIED]
    assert [one.protection for one in found.values()] == ["none", "none", "copy-on-write"]
    private, reflink, unified = (one.further for one in found.values())
    assert private.cache > 4 << 20  # libraries and the server itself
    assert reflink.cache > private.cache * 0.9
    assert unified.cache < private.cache * 0.1
    assert unified.pss < private.pss * 0.5
    assert unified.runtime > private.runtime  # that has a supervisor more
