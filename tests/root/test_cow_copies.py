"""Private copies of large files, many callers at once, and no room for any."""

import errno
import mmap
import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Timer

import pytest

from tests.fixtures.cow import Ran, in_guest, until
from tests.fixtures.filesystems import Filesystem, Site, is_immutable, make_site, mount_image
from tests.fixtures.filesystems import private_folder as private
from tests.fixtures.probes import need, on
from tests.fixtures.trees import acl, capability
from tests.fixtures.windows import CONTENT, Shared, attacked_once, broken_lease, shared_file
from vrun.cow import breaking, supervisor
from vrun.cow.keeping import Supervision
from vstore import inode, window

pytestmark = need("immutable", "lease")

_LARGE = os.urandom(1 << 20) * 12
_WRITERS = 6


def _errno(function: Callable[[], object]) -> int:
    try:
        function()
    except OSError as error:
        return error.errno or -1
    return 0


def _write_at_once() -> list[int]:
    """So many processes, each of which writes at a place of its own."""
    pids = []
    for number in range(_WRITERS):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                fd = os.open("/conf", os.O_WRONLY)
                os.pwrite(fd, b"%d" % number, number << 20)
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def _expected() -> bytes:
    wanted = bytearray(_LARGE)
    for number in range(_WRITERS):
        wanted[number << 20] = ord(str(number))
    return bytes(wanted)


def test_a_large_file_is_copied_once_for_all_who_write_at_the_same_time(site: Site) -> None:
    with shared_file(site, content=_LARGE) as shared:
        ran = Ran()
        assert in_guest(site.pool, site.root("web"), _write_at_once, ran=ran) == [0] * _WRITERS
        assert not ran.notes
        assert shared.web.read_bytes() == _expected()
        assert shared.object.read_bytes() == _LARGE
        assert is_immutable(shared.object)
        assert not list((site.pool / "stage").glob("*/*/*"))


@on("ext4")
def test_a_supervisor_killed_in_a_large_copy_leaves_the_calls_to_the_next(site: Site) -> None:
    killed: list[int] = []

    def kill(supervision: Supervision, guest: int) -> None:
        children = Path(f"/proc/{supervision.pid}/task/{supervision.pid}/children")
        if supervision.pid and not killed and children.exists() and children.read_text().split():
            os.kill(supervision.pid, signal.SIGKILL)
            killed.append(supervision.pid)

    with shared_file(site, content=_LARGE * 8) as shared:
        ran = Ran()
        answer = in_guest(site.pool, site.root("web"), _write_at_once, ran=ran, disturb=kill)
        assert answer == [0] * _WRITERS
        assert any("was killed" in note for note in ran.notes)
        assert shared.web.read_bytes() == _expected() + _LARGE * 7
        assert shared.object.read_bytes() == _LARGE * 8


@need("ext4")
def test_no_room_is_the_result_of_the_call() -> None:
    with private() as folder:
        mount = mount_image("ext4", folder, size=64 << 20)
        site = make_site(Filesystem("ext4", mount, mount))
        with shared_file(site, content=_LARGE * 2) as shared:
            filler = os.open(mount / "filler", os.O_WRONLY | os.O_CREAT)
            room = os.statvfs(mount)
            os.posix_fallocate(filler, 0, (room.f_bavail - 1024) * room.f_frsize)
            os.close(filler)
            answers = in_guest(
                site.pool,
                site.root("web"),
                lambda: [
                    _errno(lambda: os.open("/conf", os.O_WRONLY)),
                    _errno(lambda: os.chmod("/conf", 0o600)),
                    _errno(lambda: os.close(os.open("/conf", os.O_WRONLY | os.O_TRUNC))),
                ],
            )
            assert answers == [errno.ENOSPC, errno.ENOSPC, 0]
            assert shared.web.read_bytes() == b""
            assert shared.object.read_bytes() == _LARGE * 2


def _map() -> None:
    fd = os.open("/conf", os.O_RDWR)
    with mmap.mmap(fd, 0) as area:
        area[:4] = b"mine"


def _fallocate() -> None:
    fd = os.open("/conf", os.O_RDWR)
    os.posix_fallocate(fd, 0, len(CONTENT) + 10)


def _copy_range() -> None:
    source, target = os.open("/other", os.O_RDONLY), os.open("/conf", os.O_WRONLY)
    os.copy_file_range(source, target, 4)


def _set_acl() -> None:
    os.setxattr("/conf", "system.posix_acl_access", acl(owner=6, group=4, other=4, users={9: 6}))


def _bind() -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("/conf")


OTHER_WAYS: dict[str, tuple[Callable[[], object], int]] = {
    "mmap": (_map, 0),
    "fallocate": (_fallocate, 0),
    "copy_file_range": (_copy_range, 0),
    "setfacl": (_set_acl, 0),
    "setcap": (lambda: os.setxattr("/conf", "security.capability", capability(13)), 0),
    "bind": (_bind, errno.EADDRINUSE),
    "mknod": (lambda: os.mkfifo("/conf"), errno.EEXIST),
    "rmdir": (lambda: os.rmdir("/conf"), errno.EPERM),
}


@pytest.mark.parametrize("way", OTHER_WAYS)
def test_other_ways_to_change_a_file(site: Site, way: str) -> None:
    act, expected = OTHER_WAYS[way]
    with shared_file(site) as shared:
        (site.root("web") / "other").write_bytes(b"mine")
        before = shared.db.stat(), os.listxattr(shared.db)
        assert in_guest(site.pool, site.root("web"), lambda: _errno(act)) == expected
        assert shared.is_untouched()
        after = shared.db.stat(), os.listxattr(shared.db)
        assert before[1] == after[1]
        assert (before[0].st_mode, before[0].st_mtime_ns) == (
            *(after[0].st_mode, after[0].st_mtime_ns),
        )
        assert shared.web.samefile(shared.object) == bool(expected)


def test_a_copy_never_has_what_was_changed_in_the_window_of_another_program(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    with shared_file(site) as shared:
        monkeypatch.setattr(breaking, "fill", attacked_once(shared, breaking.fill))
        in_guest(site.pool, site.root("web"), lambda: Path("/conf").open("r+b").close())
        assert shared.web.read_bytes() == CONTENT
        assert not shared.web.samefile(shared.object)
        assert shared.web.stat().st_mode & 0o7777 == 0o644
        assert os.listxattr(shared.web) == []


# --- of a file that the guest has deleted and has open


def _look_after_touch() -> tuple[int, list[str], bytes]:
    fd = _open_and_delete()
    os.utime(fd)
    return os.fstat(fd).st_mode & 0o7777, os.listxattr(fd), os.read(fd, 1 << 20)


def _open_and_delete() -> int:
    fd = os.open("/conf", os.O_RDONLY)
    os.unlink("/conf")
    return fd


def test_nor_has_the_copy_of_a_deleted_file(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with shared_file(site) as shared:
        monkeypatch.setattr(breaking, "fill", attacked_once(shared, breaking.fill))
        found = in_guest(site.pool, site.root("web"), _look_after_touch)
        assert found == (0o644, [], CONTENT)
        assert shared.is_untouched()


def _chmod_later() -> tuple[int, int]:
    """The call's error, and the links of what the descriptor shows then."""
    fd = _open_and_delete()
    Path("/deleted").touch()
    until(Path("/go").exists)
    return _errno(lambda: os.fchmod(fd, 0o600)), os.fstat(fd).st_nlink


def _when_deleted(site: Site, act: Callable[[], object]) -> Callable[[Supervision, int], None]:
    root = site.root("web")

    def disturb(supervision: Supervision, guest: int) -> None:
        if (root / "deleted").exists() and not (root / "go").exists():
            act()
            (root / "go").touch()

    return disturb


def _thawed(shared: Shared, change: Callable[[], object]) -> None:
    with shared.object.open("rb") as file:
        window._clear_immutable(file.fileno())
        change()
        inode.set_immutable(file.fileno())


@on("ext4")
def test_a_deleted_file_that_somebody_has_open_for_writing_is_not_copied(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_HELD_S", 0.3)
    with shared_file(site) as shared:
        act = _when_deleted(site, lambda: _thawed(shared, lambda: os.open(shared.db, os.O_WRONLY)))
        answer = in_guest(site.pool, site.root("web"), _chmod_later, disturb=act)
        assert answer == (errno.EBUSY, 2)


@on("ext4")
def test_a_deleted_file_that_is_in_quarantine_is_not_copied(site: Site) -> None:
    with shared_file(site) as shared:
        name = site.pool / "quarantine" / shared.object.name
        name.parent.mkdir()
        act = _when_deleted(site, lambda: _thawed(shared, lambda: shared.object.rename(name)))
        answer = in_guest(site.pool, site.root("web"), _chmod_later, disturb=act)
        assert answer == (errno.EPERM, 2)


def test_a_deleted_file_that_was_reclaimed_is_copied(site: Site) -> None:
    def reclaim() -> None:
        shared.db.unlink()
        shared.object.unlink()

    with shared_file(site) as shared:
        act = _when_deleted(site, lambda: _thawed(shared, reclaim))
        answer = in_guest(site.pool, site.root("web"), _chmod_later, disturb=act)
        assert answer == (0, 0)


@on("ext4")
def test_who_waits_for_a_lease_to_empty_a_file_gets_one_descriptor(site: Site) -> None:
    def work() -> tuple[int, list[int]]:
        before = _open_numbers()
        fd = os.open("/conf", os.O_WRONLY | os.O_TRUNC)
        return fd, sorted(_open_numbers() - before)

    with shared_file(site) as shared, broken_lease(shared) as let_go:
        Timer(1, let_go).start()
        fd, new = in_guest(site.pool, site.root("web"), work)
        assert new == [fd]
        assert shared.web.read_bytes() == b""


def _open_numbers() -> set[int]:
    numbers = set()
    for number in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # that of the listing itself
            os.fstat(number)
            numbers.add(number)
    return numbers
