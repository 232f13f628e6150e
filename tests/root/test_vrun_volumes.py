"""The lines of a guest's fstab, as mountinfo and the files behind them tell."""

import errno
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from tests.fixtures.filesystems import Filesystem
from tests.fixtures.inside import ALL, FailedInside, in_child
from tests.fixtures.mountinfo import Line, at, parse
from tests.fixtures.probes import need, on
from vrun import mounts
from vrun.mounts import RootOptions
from vrun.spec import Mount

Result = TypeVar("Result")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tree = tmp_path / "guest"
    for name in ("cache", "srv/data", "var/lib", "home"):
        (tree / name).mkdir(parents=True)
    return tree


@pytest.fixture
def share(tmp_path: Path) -> Path:
    """A folder of the host that guests get a view of."""
    folder = tmp_path / "share"
    folder.mkdir()
    (folder / "file").write_text("shared\n")
    os.mknod(folder / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    return folder


def _line(
    source: str | Path, target: str, fstype: str, *options: str, where: str = "fstab:7"
) -> Mount:
    return Mount(os.fspath(source), target, fstype, options, 0, False, where)


def _inside(root: Path, lines: tuple[Mount, ...], look: Callable[[], Result]) -> Result:
    """What `look` gives in a guest with these lines."""

    def start() -> Result:
        mounts.mount_fstab(root, lines)
        mounts.enter_root(RootOptions(root=root, mounts=lines))
        return look()

    return in_child(start, kinds=ALL)


def _mounts(root: Path, *lines: Mount) -> list[Line]:
    return _inside(root, lines, lambda: parse(Path("/proc/self/mountinfo").read_text()))


def _refusal(root: Path, *lines: Mount) -> str:
    """The message of the error that mounting the lines ends in."""
    with pytest.raises(FailedInside) as caught:
        _mounts(root, *lines)
    return str(caught.value).rpartition("ToolError: ")[2].strip()


def test_a_tmpfs_has_what_its_line_says(root: Path) -> None:
    line = at(_mounts(root, _line("none", "/cache", "tmpfs", "size=16m", "mode=1777")), "/cache")
    assert line.fstype == "tmpfs"
    assert {"size=16384k"} <= line.words
    assert "nodev" in line.options
    assert "nosuid" not in line.options


def test_a_bind_mount_shows_the_hosts_folder_read_only(root: Path, share: Path) -> None:
    def look() -> tuple[str, int]:
        text = Path("/srv/data/file").read_text()
        try:
            os.open("/srv/data/file", os.O_WRONLY)
        except OSError as error:
            return text, error.errno or 0
        return text, 0

    lines = (_line(share, "/srv/data", "none", "bind", "ro"),)
    assert _inside(root, lines, look) == ("shared\n", errno.EROFS)


def test_a_file_can_be_bound_to_a_file(root: Path, share: Path) -> None:
    (root / "home/file").touch()
    lines = (_line(share / "file", "/home/file", "", "bind"),)
    assert _inside(root, lines, Path("/home/file").read_text) == "shared\n"


@pytest.mark.parametrize(("option", "expected"), [("defaults", errno.EACCES), ("dev", 0)])
def test_device_nodes_work_only_where_the_line_says_dev(
    root: Path, share: Path, option: str, expected: int
) -> None:
    def look() -> int:
        try:
            os.close(os.open("/srv/data/zero", os.O_RDONLY))
        except OSError as error:
            return error.errno or -1
        return 0

    lines = (_line(share, "/srv/data", "none", "bind", option),)
    assert _inside(root, lines, look) == expected


def test_bind_leaves_out_what_is_mounted_below_and_rbind_takes_it(root: Path, share: Path) -> None:
    (share / "below").mkdir()
    tmpfs = _line("inner", os.fspath(share / "below"), "tmpfs")

    def start(option: str) -> list[str]:
        mounts.mount_fstab(Path("/"), (tmpfs,))
        lines = (_line(share, "/srv/data", "none", option),)
        mounts.mount_fstab(root, lines)
        mounts.enter_root(RootOptions(root=root, mounts=lines))
        return [line.source for line in parse(Path("/proc/self/mountinfo").read_text())]

    assert "inner" not in in_child(lambda: start("bind"), kinds=ALL)
    assert "inner" in in_child(lambda: start("rbind"), kinds=ALL)


def test_lines_are_mounted_in_their_order(root: Path, share: Path) -> None:
    (share / "deep").mkdir()
    lines = (
        _line(share, "/srv/data", "none", "bind"),
        _line("deep", "/srv/data/deep", "tmpfs"),
    )
    targets = [line.target for line in _mounts(root, *lines)]
    assert targets.index("/srv/data") < targets.index("/srv/data/deep")


def test_a_remount_changes_what_is_there(root: Path) -> None:
    lines = (
        _line("none", "/cache", "tmpfs", "size=1m"),
        _line("none", "/cache", "tmpfs", "remount", "ro", "noexec"),
    )
    assert at(_mounts(root, *lines), "/cache").options >= {"ro", "noexec", "nodev"}


def test_a_line_for_the_root_is_the_root(root: Path, share: Path) -> None:
    (share / "srv").mkdir()
    lines = (
        _line("other", "/", "tmpfs", "size=2m"),
        _line("none", "/", "", "remount", "noatime"),
    )
    line = at(_mounts(root, *lines), "/")
    assert (line.source, line.fstype) == ("other", "tmpfs")
    assert "noatime" in line.options
    assert "nosuid" not in line.options


def test_lines_that_ask_for_what_each_guest_has_only_give_their_options(root: Path) -> None:
    lines = (
        _line("none", "/proc", "proc", "defaults"),
        _line("none", "/sys", "sysfs"),
        _line("none", "/dev/pts", "devpts", "gid=7", "mode=600"),
        _line("none", "/dev/shm", "tmpfs", "size=3m"),  # noqa: S108
    )
    found = _mounts(root, *lines)
    assert {"gid=7", "mode=600", "ptmxmode=666"} <= at(found, "/dev/pts").words
    assert {"size=3072k"} <= at(found, "/dev/shm").words  # noqa: S108
    assert [line.target for line in found if line.fstype == "devpts"] == ["/dev/pts"]


def test_a_second_proc_is_as_covered_as_the_first(root: Path) -> None:
    (root / "var/lib/proc").mkdir()
    lines = (_line("none", "/var/lib/proc", "proc"),)

    def look() -> tuple[list[str], int, bytes]:
        names = [name for name in os.listdir("/var/lib/proc") if name.isdecimal()]  # noqa: PTH208
        try:
            os.open("/var/lib/proc/sys/kernel/panic", os.O_WRONLY)
        except OSError as error:
            return names, error.errno or -1, Path("/var/lib/proc/timer_list").read_bytes()
        return names, 0, b"?"

    assert _inside(root, lines, look) == (["1"], errno.EROFS, b"")


def test_targets_in_dev_are_made(root: Path, share: Path) -> None:
    lines = (
        _line("huge", "/dev/deep/huge", "tmpfs", "size=1m"),
        _line(share / "file", "/dev/other/log", "", "bind"),
    )
    found = _mounts(root, *lines)
    assert at(found, "/dev/deep/huge").source == "huge"
    assert at(found, "/dev/other/log").root.endswith("/share/file")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            _line("none", "/no/folder", "tmpfs"),
            "fstab:7: cannot mount none on /no/folder of the guest: No such file or directory",
        ),
        (
            _line("none", "/cache", "tmpfs", "size=banana"),
            "fstab:7: cannot mount none on /cache of the guest: Invalid argument: tmpfs: Bad value",
        ),
        (
            _line("none", "/cache", "nosuchfs"),
            "fstab:7: cannot mount none on /cache of the guest: No such device",
        ),
        (
            _line("/no/such/source", "/cache", "none", "bind"),
            "fstab:7: cannot mount /no/such/source on /cache of the guest: No such file",
        ),
    ],
)
def test_a_line_that_cannot_be_mounted_is_named(root: Path, line: Mount, message: str) -> None:
    assert _refusal(root, line).startswith(message)


def test_what_comes_before_a_failure_is_not_left_on_the_host(root: Path) -> None:
    lines = (_line("first", "/cache", "tmpfs"), _line("none", "/no/folder", "tmpfs"))
    _refusal(root, *lines)
    assert "first" not in {line.source for line in parse(Path("/proc/self/mountinfo").read_text())}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A small file system in a file, with one file in it."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "inside").write_text("in the image\n")
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(8 << 20)
    command = ["mkfs.ext4", "-q", "-F", "-d", os.fspath(tree), os.fspath(path)]
    subprocess.run(command, check=True)
    return path


@need("loop", "ext4")
def test_an_image_file_is_mounted_by_the_program(
    root: Path, image: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VSERVER_RUNDIR", os.fspath(tmp_path / "run"))
    lines = (_line(image, "/srv/data", "ext4", "loop", "ro"),)

    def look() -> tuple[str, str]:
        return Path("/srv/data/inside").read_text(), Path("/proc/self/mountinfo").read_text()

    text, mountinfo = _inside(root, lines, look)
    line = at(parse(mountinfo), "/srv/data")
    assert text == "in the image\n"
    assert line.options >= {"ro", "nodev"}
    assert line.source.startswith("/dev/loop")
    assert [line.target for line in parse(mountinfo)].count("/srv/data") == 1


@need("loop", "ext4")
def test_what_the_program_says_is_passed_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VSERVER_RUNDIR", os.fspath(tmp_path / "run"))
    image = tmp_path / "empty.img"
    image.write_bytes(bytes(1 << 20))
    text = _refusal(root, _line(image, "/srv/data", "ext4", "loop"))
    assert text.startswith(f"fstab:7: cannot mount {image}: mount: ")


@on("xfs")
def test_a_file_system_of_a_device_is_mounted_by_calls_alone(fs: Filesystem, root: Path) -> None:
    source = at(parse(Path("/proc/self/mountinfo").read_text()), os.fspath(fs.mount)).source
    lines = (_line(source, "/srv/data", "xfs", "noatime", "nouuid"),)
    line = at(_mounts(root, *lines), "/srv/data")
    assert (line.source, line.fstype) == (source, "xfs")
    assert line.options >= {"noatime", "nodev"}
