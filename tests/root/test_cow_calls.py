"""Each call that changes a file, inside a guest whose files are shared: it works, and the shared
inode stays what it is.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fixtures.cow import Ran, in_guest
from tests.fixtures.filesystems import Site, is_immutable
from tests.fixtures.probes import need
from tests.fixtures.windows import CONTENT, shared_file

pytestmark = need("immutable", "lease")


def _write(path: str, flags: int = 0) -> None:
    fd = os.open(path, os.O_WRONLY | flags)
    os.write(fd, b"mine")
    os.close(fd)


def _rename_over(path: str) -> None:
    Path("/new").write_bytes(b"n")
    os.rename("/new", path)


WRITES: dict[str, tuple[Callable[[], object], bytes | None]] = {
    "open": (lambda: _write("/conf"), b"mine" + CONTENT[4:]),
    "open-append": (lambda: _write("/conf", os.O_APPEND), CONTENT + b"mine"),
    "open-creat": (lambda: _write("/conf", os.O_CREAT), b"mine" + CONTENT[4:]),
    "open-trunc": (lambda: _write("/conf", os.O_TRUNC), b"mine"),
    "open-creat-trunc": (lambda: _write("/conf", os.O_CREAT | os.O_TRUNC), b"mine"),
    "truncate": (lambda: os.truncate("/conf", 3), CONTENT[:3]),
    "truncate-0": (lambda: os.truncate("/conf", 0), b""),
    "chmod": (lambda: os.chmod("/conf", 0o600), CONTENT),
    "chown": (lambda: os.chown("/conf", 5, 6), CONTENT),
    "lchown": (lambda: os.lchown("/conf", 5, 6), CONTENT),
    "utime": (lambda: os.utime("/conf"), CONTENT),
    "utime-ns": (lambda: os.utime("/conf", ns=(5, 7)), CONTENT),
    "setxattr": (lambda: os.setxattr("/conf", "user.a", b"b"), CONTENT),
    "unlink": (lambda: os.unlink("/conf"), None),
    "rename-away": (lambda: os.rename("/conf", "/gone"), None),
    "rename-over": (lambda: _rename_over("/conf"), b"n"),
    "link": (lambda: os.link("/conf", "/second"), CONTENT),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_call_works_and_the_shared_inode_stays(site: Site, name: str) -> None:
    call, expected = WRITES[name]
    with shared_file(site) as shared:
        before = _stamp(shared.db)
        ran = Ran()
        in_guest(site.pool, site.root("web"), call, ran=ran)
        assert not ran.notes
        if expected is None:
            assert not shared.web.exists()
        else:
            assert shared.web.read_bytes() == expected
        assert shared.is_untouched()
        assert _stamp(shared.db) == before
        assert is_immutable(shared.db)
        assert not list((site.pool / "stage").glob("*/*/*"))


def _stamp(path: Path) -> tuple[int, ...]:
    status = path.lstat()
    return (
        *(status.st_ino, status.st_mode, status.st_uid, status.st_gid, status.st_size),
        *(status.st_mtime_ns, len(os.listxattr(path))),
    )
