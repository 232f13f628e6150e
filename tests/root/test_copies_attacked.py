"""Private copies that commands make have nothing of an attack on the object that they are of, and
take the place of nothing but that.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.filesystems import Site, is_immutable
from tests.fixtures.probes import need
from tests.fixtures.trees import opened
from tests.fixtures.windows import CONTENT, Shared, attacked_once, own_windows, shared_file
from vstore import breaklink, restore
from vstore.breaklink import BROKEN, CHANGED, Breaker

pytestmark = need("immutable", "lease")


@pytest.fixture
def shared(site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shared]:
    """The first copy of it is made while somebody attacks it in another program's window."""
    with shared_file(site) as made:
        copy = attacked_once(made, breaklink.make_private_copy)
        for module in (breaklink, restore):
            monkeypatch.setattr(module, "make_private_copy", copy)
        yield made


def _check(path: Path, shared: Shared) -> None:
    assert path.read_bytes() == CONTENT
    assert not path.samefile(shared.object)
    status, wanted = path.stat(), shared.object.stat()
    assert (status.st_mode, status.st_mtime_ns) == (wanted.st_mode, wanted.st_mtime_ns)
    assert os.listxattr(path) == []


def test_a_broken_link(shared: Shared) -> None:
    with own_windows(shared.pool) as (windows, _, stage_fd), opened(shared.web.parent) as folder_fd:
        breaker = Breaker(shared.pool, windows, stage_fd)
        assert breaker.break_names(folder_fd, [(b"conf", shared.number)]) == [BROKEN]
    _check(shared.web, shared)


def test_a_file_that_is_made_of_an_object(shared: Shared) -> None:
    name = os.fspath(shared.object.relative_to(shared.pool.path / "objects"))
    job = [(b"copied", name, shared.number, True)]
    with own_windows(shared.pool) as (windows, _, _), opened(shared.web.parent) as folder_fd:
        made = restore._Maker(shared.pool, windows).serve((folder_fd, b"", job))
        assert list(made) == [[restore.COPIED]]
    _check(shared.web.with_name("copied"), shared)


def test_what_was_thawed_and_written_while_it_was_copied_is_not_replaced(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the host's root; or its guest, where both who had a window on it were killed at once."""
    make_copy = breaklink.make_private_copy

    def make_copy_and_write(source_fd: int, folder_fd: int) -> int:
        fd = make_copy(source_fd, folder_fd)
        subprocess.run(["chattr", "-i", made.web], check=True)
        made.web.write_bytes(b"mine")
        return fd

    monkeypatch.setattr(breaklink, "make_private_copy", make_copy_and_write)
    with (
        shared_file(site) as made,
        own_windows(made.pool) as (windows, _, stage_fd),
        opened(made.web.parent) as folder_fd,
    ):
        breaker = Breaker(made.pool, windows, stage_fd)
        assert breaker.break_names(folder_fd, [(b"conf", made.number)]) == [CHANGED]
        assert made.web.read_bytes() == b"mine"
        assert not is_immutable(made.web)
