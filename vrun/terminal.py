"""Terminals of two sides: the caller's, put into raw mode for a while, and one made in a guest.

A guest never gets the caller's terminal: it could push input into it (TIOCSTI), and what it typed
there would run on the host. It gets a pty of its own devpts, of which we keep the other end.
"""

import errno
import fcntl
import os
import stat
import struct
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from vrun.errors import ToolError
from vrun.mountfd import open_inside
from vstore import syscalls
from vstore.record import dataclass

_PTMX_DEVICE: Final = os.makedev(5, 2)  # Documentation/admin-guide/devices.txt
_TIOCSPTLCK: Final = 0x40045431  # asm-generic/ioctls.h, as on x86_64 and aarch64
_TIOCGPTPEER: Final = 0x5441
_IN_DEVPTS: Final = (
    syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_XDEV
)
_NOT_ITS_OWN: Final = "it is no devpts of the guest's own"

# Indices of the list that termios.tcgetattr() gives
_IFLAG, _OFLAG, _CFLAG, _LFLAG, _CC = 0, 1, 2, 3, 6


@dataclass(frozen=True, slots=True)
class Pty:
    """Both ends of a terminal, close-on-exec."""

    master_fd: int
    """Ours; non-blocking."""
    slave_fd: int
    """The guest's."""


def open_pty(root_fd: int) -> Pty:
    """Make a terminal in the devpts of the guest whose root is behind `root_fd`.

    Whatever the guest has put in the place of /dev/pts or its ptmx, the terminal belongs to the
    file system mounted there, and that is not the host's. Raises ToolError, worded as what the
    guest is or has.
    """
    try:
        folder_fd = open_inside(root_fd, "dev/pts", os.O_PATH | os.O_DIRECTORY)
        try:
            return _open_pair(folder_fd)
        finally:
            os.close(folder_fd)
    except OSError as error:
        raise ToolError(
            f"cannot make a terminal in its /dev/pts: {error.strerror}",
            hint="a command whose input is not a terminal needs none: exec COMMAND </dev/null",
        ) from error


def _open_pair(folder_fd: int) -> Pty:
    master_fd = _open_master(folder_fd)
    try:
        fcntl.ioctl(master_fd, _TIOCSPTLCK, struct.pack("i", 0))
        slave_fd = fcntl.ioctl(master_fd, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        os.close(master_fd)
        raise
    device = os.fstat(slave_fd).st_dev
    if device != os.fstat(folder_fd).st_dev or device == _host_devpts():
        os.close(slave_fd)
        os.close(master_fd)
        raise OSError(errno.ENOTTY, _NOT_ITS_OWN)
    os.set_blocking(master_fd, False)
    return Pty(master_fd, slave_fd)


def _open_master(folder_fd: int) -> int:
    path_fd = syscalls.openat2(folder_fd, b"ptmx", flags=os.O_PATH, resolve=_IN_DEVPTS)
    try:
        status = os.fstat(path_fd)
        if not stat.S_ISCHR(status.st_mode) or status.st_rdev != _PTMX_DEVICE:
            raise OSError(errno.ENOTTY, _NOT_ITS_OWN)
        # The inode that was looked at: what the name leads to by now may be another one
        return os.open(f"/proc/self/fd/{path_fd}", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    finally:
        os.close(path_fd)


def _host_devpts() -> int | None:
    with suppress(OSError):
        return os.stat("/dev/pts").st_dev  # noqa: PTH116 (one call, no Path)
    return None


def copy_size(source_fd: int, target_fd: int) -> None:
    """Make the terminal `target_fd` as large as `source_fd`; what has no size changes nothing.

    The foreground process of the target is sent SIGWINCH.
    """
    with suppress(OSError):
        size = fcntl.ioctl(source_fd, termios.TIOCGWINSZ, bytes(8))
        fcntl.ioctl(target_fd, termios.TIOCSWINSZ, size)


def copy_modes(source_fd: int, target_fd: int) -> None:
    """Give the terminal `target_fd` the modes and control characters of `source_fd`."""
    with suppress(termios.error):
        termios.tcsetattr(target_fd, termios.TCSANOW, termios.tcgetattr(source_fd))


class Caller:
    """The terminal of the caller, on loan: raw while the guest's terminal is shown on it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._saved: list[Any] | None = None

    @property
    def is_ours(self) -> bool:
        """Whether this process may read and change it: from its background it would be stopped.

        A terminal that is not the one that controls our session has no background for us.
        """
        try:
            return os.tcgetpgrp(self.fd) == os.getpgrp()
        except OSError as error:
            return error.errno == errno.ENOTTY

    @property
    def takes_lines(self) -> bool:
        """Whether it gives whole lines: who has made it otherwise (a pager) reads it himself."""
        try:
            return bool(termios.tcgetattr(self.fd)[_LFLAG] & termios.ICANON)
        except termios.error:
            return False

    def make_raw(self) -> None:
        """Pass every byte through, both ways; does nothing in the background or when it is raw."""
        if self._saved is None and self.is_ours:
            with suppress(termios.error):
                saved = termios.tcgetattr(self.fd)
                termios.tcsetattr(self.fd, termios.TCSADRAIN, _raw(saved))
                self._saved = saved

    def restore(self) -> None:
        """As it was; what was typed for the guest and not read is dropped, the host's shell would
        run it."""
        saved, self._saved = self._saved, None
        if saved is not None:
            with suppress(termios.error):
                termios.tcsetattr(self.fd, termios.TCSAFLUSH, saved)


@contextmanager
def raw(fd: int) -> Iterator[Caller]:
    """The terminal `fd` raw while the block runs."""
    caller = Caller(fd)
    caller.make_raw()
    try:
        yield caller
    finally:
        caller.restore()


def _raw(attributes: list[Any]) -> list[Any]:
    """As cfmakeraw(3)."""
    made = [*attributes[:_CC], [*attributes[_CC]]]
    made[_IFLAG] &= ~(
        termios.IGNBRK
        | termios.BRKINT
        | termios.PARMRK
        | termios.ISTRIP
        | termios.INLCR
        | termios.IGNCR
        | termios.ICRNL
        | termios.IXON
    )
    made[_OFLAG] &= ~termios.OPOST
    made[_LFLAG] &= ~(
        termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN
    )
    made[_CFLAG] = made[_CFLAG] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
    made[_CC][termios.VMIN], made[_CC][termios.VTIME] = 1, 0
    return made
