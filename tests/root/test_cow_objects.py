"""A supervisor's list of the pool's objects: right while they come and go, and small."""

import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fixtures.filesystems import Site
from tests.fixtures.probes import need, on
from tests.fixtures.trees import EPOCH_NS
from vrun.cow.objects import Objects
from vstore.pool import Identity, Pool, digest_xattrs

pytestmark = need("root", "immutable")

_STEPS = 400
_TICKS_S = 0.1
"""A folder that changed longer ago than this is read once only."""
_DIGESTS = 6
"""First bytes of digests: as many folders."""


@pytest.fixture
def pool(site: Site) -> Iterator[Pool]:
    with Pool.create(site.pool) as pool:
        yield pool


def _add(pool: Pool, path: Path, number: int = 0, *, digest: bytes = bytes(32)) -> Path:
    """The file under the name of an object that looks like it; that name's path."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        xattrs = digest_xattrs(file.fileno())
    facts = (status.st_size, status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns)
    name = pool.path / "objects" / Identity(digest, *facts, xattrs).name(number)
    name.parent.mkdir(exist_ok=True)
    name.hardlink_to(path)
    return name


def _make(path: Path) -> Path:
    path.write_bytes(b"content")
    os.utime(path, ns=(EPOCH_NS, EPOCH_NS))
    return path


def test_the_list_is_always_what_the_folders_hold(site: Site, pool: Pool) -> None:
    chance = random.Random(8)  # noqa: S311
    objects = Objects(pool)
    names: dict[int, Path] = {}
    gone: set[int] = set()
    for step in range(_STEPS):
        if not names or chance.random() < 0.6:
            path = _make(site.vdirbase / f"file{step}")
            digest = bytes([chance.randrange(_DIGESTS)]) + chance.randbytes(31)
            number = path.stat().st_ino
            names[number] = _add(pool, path, digest=digest)
            gone.discard(number)
        else:
            number = chance.choice(list(names))
            names.pop(number).unlink()
            gone.add(number)
        asked = chance.sample(list(names), min(len(names), 3)) + list(gone)[:1]
        assert [number in objects for number in asked] == [number in names for number in asked]
    assert all(number in objects for number in names)
    assert not any(number in objects for number in gone)


def test_a_new_object_may_have_the_number_of_one_that_is_gone(site: Site, pool: Pool) -> None:
    path = _make(site.vdirbase / "file")
    first = _add(pool, path, digest=b"\xff" * 32)
    objects = Objects(pool)
    objects.load()
    first.unlink()
    _add(pool, path, digest=bytes(32))  # its folder is read before that of the first
    time.sleep(_TICKS_S)
    objects.load()
    assert path.stat().st_ino in objects


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.chmod(0o600),
        lambda path: os.chown(path, 0, 12),
        lambda path: os.chown(path, 12, 0),
        lambda path: os.utime(path, ns=(EPOCH_NS, EPOCH_NS + 1)),
        lambda path: os.setxattr(path, "user.more", b"x"),
        lambda path: os.truncate(path, 3),
    ],
    ids=["mode", "group", "owner", "mtime", "xattrs", "size"],
)
@on("ext4")
def test_an_object_that_looks_other_than_its_name_says_is_not_sound(
    site: Site, pool: Pool, change: Callable[[Path], None]
) -> None:
    path = _make(site.vdirbase / "file")
    os.setxattr(path, "user.one", b"1")
    os.utime(path, ns=(EPOCH_NS, EPOCH_NS))
    _add(pool, path)
    objects = Objects(pool)
    with path.open("rb") as file:
        assert objects.is_sound(file.fileno())
        change(path)
        assert not objects.is_sound(file.fileno())
        assert path.stat().st_ino in objects


@on("ext4")
def test_what_is_no_object_is_not_sound(site: Site, pool: Pool) -> None:
    alone, stray = _make(site.vdirbase / "alone"), _make(site.vdirbase / "stray")
    folder = _add(pool, _make(site.vdirbase / "file")).parent
    (folder / "notes").hardlink_to(stray)
    objects = Objects(pool)
    for path in (alone, stray):
        with path.open("rb") as file:
            assert not objects.is_sound(file.fileno())
