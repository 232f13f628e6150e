"""Nobody can do more by the supervisor than by himself, nor have links broken that he may not
write to.
"""

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fixtures.cow import Ran, become, in_guest
from tests.fixtures.filesystems import Site
from tests.fixtures.probes import need, on
from tests.fixtures.trees import acl
from tests.fixtures.windows import CONTENT, Shared, shared_file
from vrun.wordlist import SECURE_CAPS
from vstore.pool import digest_xattrs, parse_object

pytestmark = [need("immutable", "lease"), on("ext4")]

_USER = 1000


def _open(flags: int) -> None:
    os.close(os.open("/dir/conf", flags))


ATTEMPTS: dict[str, tuple[Callable[[], object], int]] = {
    "open": (lambda: _open(os.O_WRONLY), errno.EACCES),
    "open-rw": (lambda: _open(os.O_RDWR), errno.EACCES),
    "open-trunc": (lambda: _open(os.O_WRONLY | os.O_TRUNC), errno.EACCES),
    "read-trunc": (lambda: _open(os.O_RDONLY | os.O_TRUNC), errno.EACCES),
    "truncate": (lambda: os.truncate("/dir/conf", 0), errno.EACCES),
    "chmod": (lambda: os.chmod("/dir/conf", 0o777), errno.EPERM),
    "chown": (lambda: os.chown("/dir/conf", _USER, _USER), errno.EPERM),
    "utime": (lambda: os.utime("/dir/conf"), errno.EACCES),
    "utime-ns": (lambda: os.utime("/dir/conf", ns=(1, 1)), errno.EPERM),
    "setxattr": (lambda: os.setxattr("/dir/conf", "user.a", b"b"), errno.EACCES),
    "trusted": (lambda: os.setxattr("/dir/conf", "trusted.a", b"b"), errno.EPERM),
    "removexattr": (lambda: os.removexattr("/dir/conf", "user.a"), errno.EACCES),
    "unlink": (lambda: os.unlink("/dir/conf"), errno.EACCES),
    "rename": (lambda: os.rename("/dir/conf", "/open/conf"), errno.EACCES),
    "rename-over": (lambda: os.rename("/open/mine", "/dir/conf"), errno.EACCES),
    "link": (lambda: os.link("/dir/conf", "/open/conf"), errno.EPERM),
    "fchmod": (lambda: os.fchmod(os.open("/dir/conf", os.O_RDONLY), 0o777), errno.EPERM),
}


def _grow(site: Site, shared: Shared) -> Path:
    root = site.root("web")
    (root / "dir").mkdir()
    (root / "open").mkdir()
    (root / "open").chmod(0o1777)
    (root / "open/mine").write_bytes(b"mine")
    os.chown(root / "open/mine", _USER, _USER)
    with _thawed(shared):
        os.rename(shared.web, root / "dir/conf")
    return root


@contextmanager
def _thawed(shared: Shared) -> Iterator[None]:
    """What is changed inside the object's name states afterwards."""
    subprocess.run(["chattr", "-i", shared.object], check=True)
    yield
    status = shared.object.stat()
    fd = os.open(shared.object, os.O_RDONLY)
    identity, number = parse_object(shared.object.name)
    now = identity._replace(
        mode=status.st_mode, uid=status.st_uid, gid=status.st_gid, xattrs=digest_xattrs(fd)
    )
    os.close(fd)
    path = shared.pool.path / "objects" / now.name(number)
    shared.object.rename(path)
    subprocess.run(["chattr", "+i", path], check=True)


def _try(attempt: Callable[[], object], *groups: int) -> int:
    become(_USER, *groups)
    try:
        attempt()
    except OSError as error:
        return error.errno or -1
    return 0


@pytest.mark.parametrize("name", ATTEMPTS)
def test_a_user_gets_what_the_kernel_would_say_and_nothing_is_unshared(
    site: Site, name: str
) -> None:
    attempt, expected = ATTEMPTS[name]
    with shared_file(site) as shared:
        root = _grow(site, shared)
        (root / "plain").write_bytes(CONTENT)
        ran = Ran()
        found = in_guest(site.pool, root, lambda: _try(attempt), ran=ran)
        assert not ran.notes
        assert found == expected
        assert (root / "dir/conf").samefile(shared.db)
        assert shared.is_untouched()


def test_a_user_with_an_acl_may_write(site: Site) -> None:
    with shared_file(site) as shared:
        root = _grow(site, shared)
        access = acl(owner=6, group=4, other=4, users={_USER: 6})
        with _thawed(shared):
            os.setxattr(shared.object, "system.posix_acl_access", access)
        assert in_guest(site.pool, root, lambda: _try(lambda: _open(os.O_RDWR))) == 0
        assert not (root / "dir/conf").samefile(shared.db)
        assert os.getxattr(root / "dir/conf", "system.posix_acl_access") == access


def test_in_a_sticky_folder_only_the_owner_deletes(site: Site) -> None:
    with shared_file(site) as shared:
        root = _grow(site, shared)
        with _thawed(shared):
            os.rename(root / "dir/conf", root / "open/conf")
        found = in_guest(site.pool, root, lambda: _try(lambda: os.unlink("/open/conf")))
        assert found == errno.EPERM
        assert (root / "open/conf").samefile(shared.db)


def test_a_group_may_write_through_its_bits(site: Site) -> None:
    with shared_file(site) as shared:
        root = _grow(site, shared)
        with _thawed(shared):
            os.chown(shared.object, 0, 77)
            shared.object.chmod(0o660)
        assert in_guest(site.pool, root, lambda: _try(lambda: _open(os.O_RDWR))) == errno.EACCES
        assert in_guest(site.pool, root, lambda: _try(lambda: _open(os.O_RDWR), 77)) == 0


def test_root_without_capabilities_is_a_user(site: Site) -> None:
    keep = frozenset(SECURE_CAPS) - {"DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "CHOWN"}
    with shared_file(site) as shared:
        root = _grow(site, shared)
        with _thawed(shared):
            os.chown(shared.object, 5, 5)
            shared.object.chmod(0o644)

        def attempt() -> list[int]:
            return [_errno(lambda: _open(os.O_WRONLY)), _errno(lambda: os.chmod("/dir/conf", 0))]

        assert in_guest(site.pool, root, attempt, keep=keep) == [errno.EACCES, errno.EPERM]
        assert (root / "dir/conf").samefile(shared.db)


def _errno(function: Callable[[], object]) -> int:
    try:
        function()
    except OSError as error:
        return error.errno or -1
    return 0


def test_an_immutable_file_that_is_no_object_stays_so(site: Site) -> None:
    """The administrator wants it so."""
    with shared_file(site) as shared:
        root = site.root("web")
        (root / "own").write_bytes(CONTENT)
        os.link(root / "own", root / "second")
        subprocess.run(["chattr", "+i", root / "own"], check=True)
        errors = in_guest(
            site.pool,
            root,
            lambda: [
                _errno(lambda: os.open("/own", os.O_WRONLY)),
                _errno(lambda: os.unlink("/own")),
                _errno(lambda: os.chmod("/own", 0)),
            ],
        )
        assert errors == [errno.EPERM] * 3
        assert shared.is_untouched()
