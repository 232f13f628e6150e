"""A guest's own /dev, as it finds it."""

import errno
import os
import stat
import termios
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from tests.fixtures.inside import ALL, FailedInside, in_child
from vrun import mounts
from vrun.mounts import RootOptions
from vrun.spec import Device

Result = TypeVar("Result")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tree = tmp_path / "guest"
    tree.mkdir()
    return tree


def _inside(options: RootOptions, look: Callable[[], Result]) -> Result:
    """What `look` gives in the guest's root."""

    def enter() -> Result:
        mounts.enter_root(options)
        return look()

    return in_child(enter, kinds=ALL)


def _write(path: str) -> int:
    """The errno of writing a byte to `path`."""
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, b"0")
    except OSError as error:
        return error.errno or -1
    finally:
        os.close(fd)
    return 0


def test_dev_has_the_nodes_that_each_guest_needs_and_no_more(root: Path) -> None:
    def look() -> dict[str, tuple[int, int, int]]:
        found = {}
        for entry in os.scandir("/dev"):
            info = entry.stat(follow_symlinks=False)
            if stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode):
                number = os.major(info.st_rdev), os.minor(info.st_rdev)
                found[entry.name] = *number, stat.S_IMODE(info.st_mode)
        return found

    assert _inside(RootOptions(root=root), look) == {
        "null": (1, 3, 0o666),
        "zero": (1, 5, 0o666),
        "full": (1, 7, 0o666),
        "random": (1, 8, 0o666),
        "urandom": (1, 9, 0o666),
        "tty": (5, 0, 0o666),
    }


def test_its_nodes_work(root: Path) -> None:
    def look() -> tuple[bytes, int, int]:
        with open("/dev/zero", "rb", buffering=0) as zero:  # noqa: PTH123
            return zero.read(2), _write("/dev/null"), _write("/dev/full")

    assert _inside(RootOptions(root=root), look) == (b"\0\0", 0, errno.ENOSPC)


def test_links_lead_to_descriptors(root: Path) -> None:
    def look() -> list[str]:
        names = ("fd", "stdin", "stdout", "stderr", "ptmx")
        return [os.fspath(Path("/dev", name).readlink()) for name in names]

    expected = ["/proc/self/fd", "fd/0", "fd/1", "fd/2", "pts/ptmx"]
    assert _inside(RootOptions(root=root), look) == expected


def test_no_terminal_of_the_host_is_in_its_devpts(root: Path) -> None:
    master_fd, slave_fd = os.openpty()

    def look() -> tuple[list[str], str]:
        before = sorted(os.listdir("/dev/pts"))  # noqa: PTH208
        _, own_fd = os.openpty()
        return before, os.ttyname(own_fd)

    assert _inside(RootOptions(root=root), look) == (["ptmx"], "/dev/pts/0")
    os.close(master_fd)
    os.close(slave_fd)


def test_the_console_is_a_terminal_of_the_guest(root: Path) -> None:
    def look() -> tuple[bytes, str, bool, int]:
        console = mounts.enter_root(RootOptions(root=root, console=True))
        assert console is not None
        os.setsid()
        fd = os.open("/dev/console", os.O_RDWR)
        os.write(fd, b"hello\n")
        said = os.read(console.master_fd, 100)
        name = os.ttyname(console.slave_fd)
        termios.tcgetattr(fd)
        return said, name, os.get_inheritable(console.master_fd), os.stat("/dev/pts/0").st_gid  # noqa: PTH116

    assert in_child(look, kinds=ALL) == (b"hello\r\n", "/dev/pts/0", False, 5)


def test_without_a_console_there_is_no_node(root: Path) -> None:
    assert not _inside(RootOptions(root=root), lambda: Path("/dev/console").exists())


def test_devices_of_the_configuration_are_made(root: Path) -> None:
    devices = (
        Device("0", Path("/dev/fuse"), Path("/dev/null")),
        Device("1", Path("/dev/mapper/disk"), Path("/dev/zero")),
        Device("2", Path("/srv/null"), Path("/dev/null")),
    )
    options = RootOptions(root=root, devices=devices, tun=True)

    def look() -> list[int]:
        paths = ("/dev/fuse", "/dev/mapper/disk", "/dev/net/tun")
        return [os.stat(path).st_rdev for path in paths]  # noqa: PTH116

    expected = [os.makedev(1, 3), os.makedev(1, 5), os.makedev(10, 200)]
    assert _inside(options, look) == expected
    assert [line for line in mounts.warnings(options) if "/srv/null" in line]


@pytest.mark.parametrize("source", ["/etc/hostname", "/dev/no-such-device"])
def test_a_device_that_is_none_is_named(root: Path, source: str) -> None:
    options = RootOptions(root=root, devices=(Device("0", Path("/dev/x"), Path(source)),))
    with pytest.raises(FailedInside, match=f"device {source} of the guest: "):
        _inside(options, lambda: None)
