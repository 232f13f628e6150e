"""A guest's own /dev: a file system in memory with the nodes that each guest needs, and no more.

/dev/            null zero full random urandom tty, ptmx, links to descriptors, own devices
├── pts/         terminals of the guest's own; nothing of the host's is among them
├── shm/  mqueue/
├── console      one of those terminals, whose other side the monitor has
└── net/tun      where the guest may make tunnels
"""

import fcntl
import os
import stat
import struct
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import PurePosixPath
from typing import Final

from vrun import mountcalls, mountfd
from vrun.errors import ToolError
from vrun.sources import open_source
from vrun.spec import Device
from vstore.record import dataclass

_NODES: Final[Mapping[str, tuple[int, int]]] = {  # Documentation/admin-guide/devices.txt
    "null": (1, 3),
    "zero": (1, 5),
    "full": (1, 7),
    "random": (1, 8),
    "urandom": (1, 9),
    "tty": (5, 0),
}
_TUN: Final = (10, 200)
_LINKS: Final[Mapping[str, str]] = {
    "fd": "/proc/self/fd",
    "stdin": "fd/0",
    "stdout": "fd/1",
    "stderr": "fd/2",
    "ptmx": "pts/ptmx",
}
_TTY_GROUP: Final = 5
"""gid of `tty` in Debian, its children, and where else it matters."""

_DEV_WORDS: Final = ("mode=0755", "size=4m", "nr_inodes=65536")
_SHM_WORDS: Final = ("mode=1777", "size=10%", "nr_inodes=400000")
_PTS_WORDS: Final = ("newinstance", "ptmxmode=0666", "mode=0620", f"gid={_TTY_GROUP}", "max=1024")
_NO_SUID: Final = mountcalls.MOUNT_ATTR_NOSUID
_NO_EXEC: Final = mountcalls.MOUNT_ATTR_NOSUID | mountcalls.MOUNT_ATTR_NOEXEC
_TIOCSPTLCK: Final = 0x40045431  # asm-generic/ioctls.h
_TIOCGPTPEER: Final = 0x5441


@dataclass(frozen=True, slots=True)
class Console:
    """Both ends of the guest's console, a terminal of its own devpts."""

    master_fd: int
    """For the monitor; close-on-exec."""
    slave_fd: int
    """For descriptors 0, 1 and 2 of the guest's init; close-on-exec."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DevOptions:
    """What one guest's /dev has beside what all have."""

    devices: tuple[Device, ...] = ()
    tun: bool = False
    console: bool = False
    pts_words: tuple[str, ...] = ()
    """Options of devpts from the guest's fstab; they override ours."""
    shm_words: tuple[str, ...] = ()


def mount_dev(root_fd: int, options: DevOptions) -> Console | None:
    """Mount /dev with all that belongs in it; the guest's console if it is to have one.

    Raises ToolError.
    """
    with ExitStack() as stack:
        with mountfd.doing("tmpfs", "/dev"):
            dev_fd = mountfd.make("tmpfs", options=_DEV_WORDS, attributes=_NO_EXEC)
            stack.callback(os.close, dev_fd)
            _fill(dev_fd, options)
            mountfd.make_folder(root_fd, "dev")
            mountfd.attach(dev_fd, root_fd, "/dev", follow=False)
        pts_words = _merged(_PTS_WORDS, options.pts_words)
        pts_fd = _mount_in(dev_fd, "pts", "devpts", pts_words, _NO_EXEC)
        stack.callback(os.close, pts_fd)
        shm_words = _merged(_SHM_WORDS, options.shm_words)
        shm = _NO_SUID | mountcalls.MOUNT_ATTR_NODEV
        os.close(_mount_in(dev_fd, "shm", "tmpfs", shm_words, shm))
        os.close(_mount_in(dev_fd, "mqueue", "mqueue", (), mountfd.QUIET))
        return _open_console(dev_fd, pts_fd) if options.console else None


def is_in_dev(device: Device) -> bool:
    """Whether the guest's path of the device is one that its /dev can have."""
    path = PurePosixPath(os.path.normpath(device.path))
    return path.is_relative_to("/dev") and path != PurePosixPath("/dev")


def _fill(dev_fd: int, options: DevOptions) -> None:
    for name in ("pts", "shm", "mqueue", "net"):
        os.mkdir(name, 0o755, dir_fd=dev_fd)
    for name, (major, minor) in _NODES.items():
        _make_node(dev_fd, name, stat.S_IFCHR | 0o666, os.makedev(major, minor))
    if options.tun:
        _make_node(dev_fd, "net/tun", stat.S_IFCHR | 0o666, os.makedev(*_TUN))
    for device in filter(is_in_dev, options.devices):
        _copy_node(dev_fd, device)
    for name, target in _LINKS.items():
        os.symlink(target, name, dir_fd=dev_fd)


def _make_node(dev_fd: int, name: str, mode: int, number: int) -> None:
    os.mknod(name, mode, number, dir_fd=dev_fd)
    os.chmod(name, stat.S_IMODE(mode), dir_fd=dev_fd)  # mknod(2) takes the umask off


def _copy_node(dev_fd: int, device: Device) -> None:
    """Make the node that the guest is to have for one of the host's, mode and owner as there.

    `dev_fd` is a new file system of ours, in which no name is a symlink.
    """
    try:
        source = open_source(os.fspath(device.source))
        found = os.fstat(source.fd)
        os.close(source.fd)
    except OSError as error:
        raise ToolError(f"device {device.source} of the guest: {error.strerror}") from error
    if not stat.S_ISCHR(found.st_mode) and not stat.S_ISBLK(found.st_mode):
        raise ToolError(f"device {device.source} of the guest: is no device")
    name = os.path.normpath(device.path).removeprefix("/dev/")
    for folder in reversed(PurePosixPath(name).parents[:-1]):
        with suppress(FileExistsError):
            os.mkdir(folder, 0o755, dir_fd=dev_fd)
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=dev_fd)
    _make_node(dev_fd, name, found.st_mode, found.st_rdev)
    os.chown(name, found.st_uid, found.st_gid, dir_fd=dev_fd)


def _mount_in(dev_fd: int, name: str, fstype: str, words: Iterable[str], attributes: int) -> int:
    """Mount on a folder of our own /dev, of which no guest has seen anything yet."""
    with mountfd.doing(fstype, f"/dev/{name}"):
        mount_fd = mountfd.make(fstype, options=words, attributes=attributes)
        target_fd = os.open(name, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=dev_fd)
        try:
            mountcalls.move_mount(mount_fd, target_fd)
        finally:
            os.close(target_fd)
        return mount_fd


def _open_console(dev_fd: int, pts_fd: int) -> Console:
    """A new terminal of the guest's devpts, and its slave on /dev/console as well."""
    flags = os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC
    with mountfd.doing("a terminal", "/dev/console"):
        master_fd = os.open("ptmx", flags, dir_fd=pts_fd)
        fcntl.ioctl(master_fd, _TIOCSPTLCK, struct.pack("i", 0))
        slave_fd = fcntl.ioctl(master_fd, _TIOCGPTPEER, flags)
        create = os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        target_fd = os.open("console", create, 0o600, dir_fd=dev_fd)
        terminal_fd = mountfd.copy(slave_fd)
        mountcalls.move_mount(terminal_fd, target_fd)
        os.close(terminal_fd)
        os.close(target_fd)
    return Console(master_fd, slave_fd)


def _merged(ours: Iterable[str], others: Iterable[str]) -> list[str]:
    """Both, the later of two words with one key winning."""
    words = {word.partition("=")[0]: word for word in (*ours, *others)}
    return list(words.values())
