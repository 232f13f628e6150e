"""The caller's terminal on loan, and what a guest cannot pass off as its own devpts."""

import fcntl
import os
import pty
import select
import struct
import tempfile
import termios
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NoReturn

import pytest

from vrun.errors import ToolError
from vrun.terminal import Caller, copy_modes, copy_size, open_pty, raw


@pytest.fixture
def ends() -> Iterator[tuple[int, int]]:
    """A terminal: what a person sees, and what a program has."""
    master_fd, slave_fd = pty.openpty()
    yield master_fd, slave_fd
    os.close(master_fd)
    os.close(slave_fd)


def _size(fd: int) -> tuple[int, int]:
    rows, columns, _, _ = struct.unpack("4H", fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8)))
    return rows, columns


def _at(slave_fd: int, body: Callable[[], None], *, in_background: bool = False) -> None:
    """Run `body` in a process whose terminal is `slave_fd`, as a shell runs a job."""
    with tempfile.TemporaryFile("w+") as told:
        pid = os.fork()
        if pid == 0:
            _be_job(slave_fd, body, told, in_background=in_background)
        os.waitpid(pid, 0)
        told.seek(0)
        assert told.read() == "done"


def _be_job(
    slave_fd: int, body: Callable[[], None], told: IO[str], *, in_background: bool
) -> NoReturn:
    try:
        os.setsid()
        fcntl.ioctl(slave_fd, termios.TIOCSCTTY, 0)
        if in_background and (pid := os.fork()):
            os.waitpid(pid, 0)  # the session lasts as long as the job
            os._exit(0)
        if in_background:
            os.setpgid(0, 0)
        body()
        told.write("done")
    except BaseException:  # noqa: BLE001 (the test shall show it)
        told.write(traceback.format_exc())
    finally:
        told.flush()
        os._exit(0)


def test_a_terminal_takes_the_size_of_another(ends: tuple[int, int]) -> None:
    master_fd, _ = ends
    other_fd, its_slave_fd = pty.openpty()
    fcntl.ioctl(master_fd, termios.TIOCSWINSZ, struct.pack("4H", 55, 132, 0, 0))

    copy_size(master_fd, other_fd)

    assert _size(its_slave_fd) == (55, 132)
    os.close(other_fd)
    os.close(its_slave_fd)


def test_what_is_no_terminal_has_no_size_and_no_modes(ends: tuple[int, int]) -> None:
    master_fd, slave_fd = ends
    before = _size(master_fd), termios.tcgetattr(slave_fd)
    with Path(os.devnull).open() as nothing:
        copy_size(nothing.fileno(), master_fd)
        copy_modes(nothing.fileno(), slave_fd)

    assert (_size(master_fd), termios.tcgetattr(slave_fd)) == before


def test_modes_are_copied(ends: tuple[int, int]) -> None:
    _, slave_fd = ends
    other_fd, its_slave_fd = pty.openpty()
    modes = termios.tcgetattr(slave_fd)
    modes[6][termios.VERASE] = b"\x08"
    termios.tcsetattr(slave_fd, termios.TCSANOW, modes)

    copy_modes(slave_fd, its_slave_fd)

    assert termios.tcgetattr(its_slave_fd) == modes
    os.close(other_fd)
    os.close(its_slave_fd)


def test_raw_passes_every_byte_and_ends_with_the_block(ends: tuple[int, int]) -> None:
    master_fd, slave_fd = ends
    before = termios.tcgetattr(slave_fd)

    def job() -> None:
        with raw(slave_fd) as caller:
            os.write(master_fd, b"\x03\x04\r\x1a\x7f")
            assert os.read(slave_fd, 100) == b"\x03\x04\r\x1a\x7f"
            os.write(slave_fd, b"\n")
            assert os.read(master_fd, 100) == b"\n"
            assert not caller.takes_lines
        assert caller.takes_lines

    _at(slave_fd, job)

    assert termios.tcgetattr(slave_fd) == before


def test_what_was_typed_for_the_guest_is_not_left_for_the_shell(ends: tuple[int, int]) -> None:
    master_fd, slave_fd = ends

    def job() -> None:
        with raw(slave_fd):
            os.write(master_fd, b"rm -rf /\n")
            assert select.select([slave_fd], [], [], 5)[0]
        os.set_blocking(slave_fd, False)
        with pytest.raises(BlockingIOError):
            os.read(slave_fd, 100)

    _at(slave_fd, job)


def test_a_terminal_in_whose_background_we_are_stays_as_it_is(ends: tuple[int, int]) -> None:
    _, slave_fd = ends
    before = termios.tcgetattr(slave_fd)

    def job() -> None:
        with raw(slave_fd) as caller:
            assert not caller.is_ours
            assert termios.tcgetattr(slave_fd) == before

    _at(slave_fd, job, in_background=True)


def test_a_terminal_that_does_not_control_our_session_may_be_read(ends: tuple[int, int]) -> None:
    _, slave_fd = ends

    with raw(slave_fd) as caller:
        assert caller.is_ours
        assert not caller.takes_lines


def test_a_terminal_that_has_been_hung_up_does_no_harm() -> None:
    master_fd, slave_fd = pty.openpty()
    os.close(master_fd)
    caller = Caller(slave_fd)

    caller.make_raw()
    caller.restore()

    assert not caller.takes_lines
    os.close(slave_fd)


class Root:
    """The root of a guest, with what it has in the place of /dev/pts."""

    def __init__(self, path: Path) -> None:
        self.pts = path / "dev/pts"
        self.pts.mkdir(parents=True)
        self._fd = os.open(path, os.O_PATH)

    def refusal(self) -> str:
        with pytest.raises(ToolError) as caught:
            open_pty(self._fd)
        os.close(self._fd)
        return caught.value.message


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path)


def test_a_guest_without_ptmx_is_told_of(root: Root) -> None:
    assert root.refusal() == "cannot make a terminal in its /dev/pts: No such file or directory"


def test_a_guest_without_dev_pts_is_told_of(root: Root) -> None:
    root.pts.rmdir()

    assert "No such file or directory" in root.refusal()


def test_a_link_to_the_hosts_ptmx_is_not_followed(root: Root) -> None:
    (root.pts / "ptmx").symlink_to("/dev/ptmx")

    assert "Too many levels of symbolic links" in root.refusal()


def test_dev_pts_as_a_link_leads_to_a_folder_of_the_guest(root: Root, tmp_path: Path) -> None:
    root.pts.rmdir()
    root.pts.symlink_to("/../../../../../dev/pts")

    assert "Too many levels of symbolic links" in root.refusal()


@pytest.mark.parametrize("kind", ["file", "fifo", "folder"])
def test_what_is_no_ptmx_is_not_opened(root: Root, kind: str) -> None:
    ptmx = root.pts / "ptmx"
    {"file": ptmx.touch, "fifo": lambda: os.mkfifo(ptmx), "folder": ptmx.mkdir}[kind]()

    assert "it is no devpts of the guest's own" in root.refusal()


def test_the_hosts_own_devpts_is_refused() -> None:
    root_fd = os.open("/", os.O_PATH)

    with pytest.raises(ToolError, match=r"no devpts of the guest's own|Permission denied"):
        open_pty(root_fd)

    os.close(root_fd)
