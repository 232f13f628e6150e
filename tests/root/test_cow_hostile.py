"""Root inside a guest attacks the shared files with all that it has; for seconds, on purpose."""

import ctypes
import mmap
import os
import random
import select
import signal
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Thread

import pytest

from tests.fixtures.calls import IS_OURS_32, call, call32
from tests.fixtures.cow import Ran, in_guest
from tests.fixtures.filesystems import Site, is_immutable
from tests.fixtures.probes import is_soak, need
from tests.fixtures.windows import Shared, guest_cgroup, own_windows, shared_file
from vrun.cow.keeping import Supervision
from vrun.cow.numbers import ARCHITECTURES, TABLES
from vstore.keeper import Keeper
from vstore.syscalls import RENAME_EXCHANGE, renameat2
from vstore.window import Windows

pytestmark = need("immutable", "lease", "cgroup_freezer")

_OBJECTS = 150
_SECONDS = 60 if is_soak() else 5
_EVIL = b"EVIL"


def _content(number: int) -> bytes:
    return b"%04d is what all guests have\n" % number * 200


@contextmanager
def _many(site: Site) -> Iterator[list[Shared]]:
    with ExitStack() as stack:
        yield [
            stack.enter_context(shared_file(site, f"file{number}", _content(number)))
            for number in range(_OBJECTS)
        ]


def _names() -> list[str]:
    return [name for name in os.listdir("/") if name.startswith("file")]


_choose = random.SystemRandom().choice


def _swap_for_ever() -> None:
    """Exchange a private file with shared ones: each makes a window."""
    while True:
        with suppress(OSError):
            for name in [_choose(_names()) for _ in range(20)]:
                renameat2(-100, b"/bait", -100, f"/{name}".encode(), flags=RENAME_EXCHANGE)
                renameat2(-100, b"/bait", -100, f"/{name}".encode(), flags=RENAME_EXCHANGE)


def _open_for_ever() -> None:
    while True:
        with suppress(OSError):
            fd = os.open("/bait", os.O_WRONLY)
            os.write(fd, _EVIL)
            os.close(fd)


def _truncate_for_ever() -> None:
    while True:
        with suppress(OSError):
            os.truncate("/bait", 1)


def _change_for_ever() -> None:
    while True:
        with suppress(OSError):
            os.chmod("/bait", 0o777)
            os.chown("/bait", 7, 7)
            os.setxattr("/bait", "user.evil", b"1")
            os.utime("/bait", (1, 1))


def _through_descriptors_for_ever() -> None:
    while True:
        with suppress(OSError):
            name = _choose(_names())
            fd = os.open(f"/{name}", os.O_RDONLY)
            with suppress(OSError):
                os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDWR))
                os.fchmod(fd, 0o777)
            os.close(fd)


def _by_32_bit_calls_for_ever() -> None:
    bait = ctypes.create_string_buffer(b"/bait")
    table = TABLES[ARCHITECTURES[1]]
    while True:
        fd, _ = call32(table["open"], b"/bait", os.O_RDWR)
        if fd >= 0 and IS_OURS_32:
            with suppress(OSError):
                os.write(fd, _EVIL)
                os.close(fd)
        call32(table["truncate"], b"/bait", 1)
        call32(table["chmod"], b"/bait", 0o777)
        call(0x40000000 | 2, ctypes.addressof(bait), os.O_RDWR)  # x32
        call(425, 8, ctypes.addressof(bait))  # io_uring_setup


def _swap_memory_for_ever() -> None:
    """The path changes under the eyes of whoever reads it."""
    memory = mmap.mmap(-1, 4096)
    memory.write(b"/bait\0")
    place = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if os.fork() == 0:
        while True:
            for name in _names():
                memory[:16] = f"/{name}".encode().ljust(16, b"\0")
                memory[:16] = b"/bait".ljust(16, b"\0")
    number = TABLES[ARCHITECTURES[0]]["openat"]
    while True:
        fd, _ = call(number, -100, place, os.O_RDWR)
        if fd >= 0:
            with suppress(OSError):
                os.write(fd, _EVIL)
                os.close(fd)


def _lock_and_kill_for_ever() -> None:
    import fcntl

    while True:
        with suppress(OSError):
            fd = os.open(f"/{_choose(_names())}", os.O_RDONLY)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(OSError):
                fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            os.close(fd)
            for name in os.listdir("/proc"):
                if name.isdigit() and int(name) > 40:
                    os.kill(int(name), 0)
            os.symlink("/bait", "/link")
            os.unlink("/link")


ATTACKS: tuple[Callable[[], None], ...] = (
    _swap_for_ever,
    _swap_for_ever,
    _open_for_ever,
    _truncate_for_ever,
    _change_for_ever,
    _through_descriptors_for_ever,
    _by_32_bit_calls_for_ever,
    _swap_memory_for_ever,
    _lock_and_kill_for_ever,
)


def _attack() -> int:
    """Everything at once; who is killed begins anew."""
    end = time.monotonic() + _SECONDS
    fallen = 0
    running: dict[int, Callable[[], None]] = {}
    waiting = list(ATTACKS)
    while time.monotonic() < end:
        for attack in waiting:
            pid = os.fork()
            if pid == 0:
                with suppress(BaseException):
                    attack()
                os._exit(0)
            running[pid] = attack
        waiting.clear()
        time.sleep(0.01)
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] in running:
                fallen += 1
                waiting.append(running.pop(ended[0]))
    os.kill(-1, signal.SIGKILL)
    return fallen


def _check(all_shared: list[Shared], site: Site) -> None:
    for number, shared in enumerate(all_shared):
        status = shared.object.lstat()
        assert shared.object.read_bytes() == _content(number), number
        assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o644, 0, 0)
        assert not [name for name in os.listxattr(shared.object) if name.startswith("user.")]
        assert is_immutable(shared.object)
        assert shared.db.samefile(shared.object)
    assert not list((site.pool / "stage").glob("*/*/*"))


@contextmanager
def _shared_again(all_shared: list[Shared]) -> Iterator[None]:
    """Meanwhile a process of the host shares again what the guest has made its own, as vunify does:
    in windows.
    """
    stop_fd, go_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(go_fd)
        code = 1
        try:
            with own_windows(all_shared[0].pool, linger_s=0.05) as (windows, keeper, _):
                Thread(target=_drain, args=(keeper,), daemon=True).start()
                while not select.select([stop_fd], [], [], 0.001)[0]:
                    for shared in all_shared:
                        with suppress(OSError):
                            _share(windows, shared)
            code = 0
        finally:
            os._exit(code)
    os.close(stop_fd)
    try:
        yield
    finally:
        os.close(go_fd)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _drain(keeper: Keeper) -> None:
    """As another process would."""
    while select.select([keeper], [], [])[0]:
        keeper.drain()


def _share(windows: Windows, shared: Shared) -> None:
    if shared.web.exists() and shared.web.samefile(shared.object):
        return
    spare = shared.web.with_name(f"spare-{shared.web.name}")
    fd = shared.open()
    with windows.guard([fd]) as refused:
        if not refused:
            with windows.thawed(fd):
                os.link(shared.object, spare)
                os.rename(spare, shared.web)


def test_no_shared_file_changes(site: Site, cgroup: Path) -> None:
    with _many(site) as all_shared:
        (site.root("web") / "bait").write_bytes(b"bait")
        ran, group = Ran(), guest_cgroup(cgroup)
        with _shared_again(all_shared):
            in_guest(site.pool, site.root("web"), _attack, ran=ran, cgroup=group)
        _check(all_shared, site)
        assert ran.attacks == sum("attack: process" in note for note in ran.notes)
        assert not [note for note in ran.notes if "attack" not in note]


@pytest.mark.parametrize("longest_s", [0.02, 0.5])
def test_no_shared_file_changes_while_supervisors_die(
    site: Site, cgroup: Path, longest_s: float
) -> None:
    last = time.monotonic()

    def kill(supervision: Supervision, guest: int) -> None:
        nonlocal last
        if not supervision.is_serving:
            last = time.monotonic() + longest_s * _choose(range(1, 11)) / 10
        elif time.monotonic() > last:
            with suppress(ProcessLookupError):
                os.kill(supervision.pid, signal.SIGKILL)

    with _many(site) as all_shared:
        (site.root("web") / "bait").write_bytes(b"bait")
        ran, group = Ran(), guest_cgroup(cgroup)
        with _shared_again(all_shared):
            in_guest(site.pool, site.root("web"), _attack, ran=ran, cgroup=group, disturb=kill)
        _check(all_shared, site)
        assert any("supervisor was killed" in note for note in ran.notes)
