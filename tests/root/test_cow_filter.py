"""Which calls wait for the supervisor, counted at the listener itself."""

import errno
import os
import select
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fixtures.calls import call
from tests.fixtures.inside import in_child
from tests.fixtures.probes import need
from vrun.cow import notifyfilter
from vrun.cow.notifications import Listener, Page
from vrun.cow.numbers import ARCHITECTURES, TABLES

pytestmark = need("root")

_NUMBERS = TABLES[ARCHITECTURES[0]]
_NAMES = {number: name for name, number in _NUMBERS.items()}


def _notified(function: Callable[[], object]) -> list[str]:
    """The calls of `function` that are notified; each is let go on."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    program = notifyfilter.compile_program()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            listener_fd = notifyfilter.load(program)
            socket.send_fds(far, [b"l"], [listener_fd])
            far.recv(1)
            os.close(listener_fd)
            function()
            code = 0
        finally:
            os._exit(code)
    _, fds, _, _ = socket.recv_fds(near, 1, 1)
    listener = Listener(fds[0], Page())
    near.send(b"g")
    names = _let_all_go_on(listener, pid)
    listener.close()
    near.close()
    far.close()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return names


def _let_all_go_on(listener: Listener, pid: int) -> list[str]:
    """Until the process has ended, which has then no call that waits. The listener itself says so
    late: before Linux 6.11 when the process is reaped.
    """
    names = []
    end_fd = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(listener.fd, select.POLLIN)
    poll.register(end_fd, select.POLLIN)
    while dict(poll.poll()).get(listener.fd, 0) & select.POLLIN:
        found = listener.receive()
        if found is not None:
            names.append(_NAMES[found.number])
            listener.go_on(found.id)
    os.close(end_fd)
    return names


def _read_only(folder: Path) -> None:
    path = folder / "file"
    for _ in range(100):
        fd = os.open(path, os.O_RDONLY)
        os.read(fd, 10)
        os.fstat(fd)
        os.close(fd)
        os.stat(path)
        os.access(path, os.W_OK)
        os.listdir(folder)
        os.readlink(folder / "link")
        os.listxattr(path)


def _make_new(folder: Path) -> None:
    for number in range(100):
        os.close(os.open(folder / "file", os.O_PATH | os.O_RDWR))
        os.close(os.open(folder, os.O_TMPFILE | os.O_RDWR))
        fd = os.open(folder / f"{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        os.write(fd, b"x")
        os.ftruncate(fd, 0)
        os.close(fd)
        os.mkdir(folder / f"{number}d")
        os.rmdir(folder / f"{number}d")
        os.symlink("x", folder / f"{number}l")
        os.mkfifo(folder / f"{number}f")


@pytest.mark.parametrize("function", [_read_only, _make_new])
def test_what_changes_no_file_that_is_there_is_not_notified(
    tmp_path: Path, function: Callable[[Path], None]
) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("file")
    assert _notified(lambda: function(tmp_path)) == []


def _write(folder: Path) -> None:
    path = folder / "file"
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_WRONLY | os.O_CREAT):
        os.close(os.open(path, flags))
    os.truncate(path, 1)
    os.rename(path, folder / "other")
    os.link(folder / "other", path)
    os.chmod(path, 0o600)
    os.chown(path, 0, 0)
    os.utime(path)
    os.unlink(path)


def test_each_call_that_changes_one_is_notified_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    names = _notified(lambda: _write(tmp_path))
    assert len(names) == 11
    assert names[:4] == ["openat"] * 4


@pytest.mark.parametrize("number", [437, 463, 466, 469])
def test_calls_whose_meaning_lies_in_memory_do_not_exist(number: int) -> None:
    program = notifyfilter.compile_program()

    def run() -> tuple[int, int]:
        notifyfilter.load(program)
        return call(number, *[0] * 6)

    assert in_child(run) == (-1, errno.ENOSYS)


def test_numbers_are_those_that_libseccomp_knows() -> None:
    seccomp = pytest.importorskip("pyseccomp")
    kinds = {
        0xC000003E: seccomp.Arch.X86_64,
        0x40000003: seccomp.Arch.X86,
        0xC00000B7: seccomp.Arch.AARCH64,
        0x40000028: seccomp.Arch.ARM,
    }
    for arch, table in TABLES.items():
        for name, number in table.items():
            assert seccomp.resolve_syscall(kinds[arch], name) == number, (name, hex(arch))
