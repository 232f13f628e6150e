"""Guests whose tree was made to lead the host astray: links to the host, swapped while we mount."""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Final

import pytest

from tests.fixtures.inside import ALL, FailedInside, resident
from tests.fixtures.mountinfo import mounts_of
from tests.fixtures.probes import scaled
from tests.fixtures.swapper import swapping
from tests.fixtures.trees import File, Folder, grow, snapshot
from vrun import mounts
from vrun.mounts import RootOptions
from vrun.spec import Mount

_SECRET: Final = b"of the host"

_NAMES: Final = ("proc", "dev", "sys", "run", "tmp", "etc", "srv")
_BELOW: Final = ("dev/null", "dev/pts", "dev/shm", "dev/console", "sys/fs", "etc/hostname")

_FSTAB: Final = (
    Mount("for-tmp", "/tmp", "tmpfs", ("size=1m",), 0, False, "fstab:1"),  # noqa: S108
    Mount("/dev/shm", "/srv/data", "", ("bind", "ro"), 0, False, "fstab:2"),  # noqa: S108
    Mount("for-etc", "/etc/private", "tmpfs", ("size=1m",), 0, False, "fstab:3"),
    Mount("none", "/dev/pts", "devpts", ("gid=5", "mode=620"), 0, False, "fstab:4"),
    Mount("for-dev", "/dev/hugepages", "tmpfs", (), 0, False, "fstab:5"),
)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Path]:
    """A folder of the host beside the guest's root; it must be as it was when the test ends."""
    canary = tmp_path / "canary"
    canary.mkdir()
    rows = [Folder(name) for name in ("proc", "dev", "data", "pts", "private", "fs", "cgroup")]
    grow(canary, [*rows, File("secret", _SECRET), File("null", _SECRET), File("hostname", _SECRET)])
    before = snapshot(canary)
    yield canary
    assert snapshot(canary) == before
    assert os.fspath(tmp_path) not in Path("/proc/self/mountinfo").read_text()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tree = tmp_path / "guest"
    for name in (*_NAMES, "srv/data", "etc/private"):
        (tree / name).mkdir(parents=True, exist_ok=True)
    return tree


def _enter(root: Path, *, fstab: tuple[Mount, ...] = _FSTAB) -> None:
    """Start a guest as far as its root, and search that for anything of the host."""
    options = RootOptions(root=root, run_tmpfs=True, console=True, mounts=fstab)

    device = root.stat().st_dev

    def start() -> list[bytes]:
        mounts.mount_fstab(root, fstab, run_tmpfs=True)
        mounts.enter_root(options)
        return list(_contents("/", device))

    with resident(start, kinds=ALL) as (pid, contents):
        lines = mounts_of(pid)
    assert [content for content in contents if _SECRET in content] == []
    assert [line for line in lines if "canary" in line.root] == []
    assert lines[0].root.endswith("/guest")
    assert {line.fstype for line in lines} >= {"proc", "sysfs", "devpts", "mqueue", "cgroup2"}
    assert {line.source for line in lines} >= {"for-tmp", "for-etc", "for-dev"}, "inside, all of it"


def _contents(folder: str, device: int) -> Iterator[bytes]:
    """The beginnings of all files that can be reached and are on the host's file system `device`.

    The tree may be renamed meanwhile.
    """
    with suppress(OSError):
        for name in os.listdir(folder):  # noqa: PTH208
            with suppress(OSError):
                path = os.path.join(folder, name)  # noqa: PTH118
                status = os.stat(path)  # noqa: PTH116
                if status.st_dev == device and stat.S_ISREG(status.st_mode):
                    with open(path, "rb", buffering=0) as file:  # noqa: PTH123
                        yield file.read(100)
                elif stat.S_ISDIR(os.lstat(path).st_mode) and path not in ("/proc", "/sys"):
                    yield from _contents(path, device)


def _try(root: Path) -> str:
    """What the start of the guest said: nothing, or why it was refused."""
    try:
        _enter(root)
    except FailedInside as error:
        text = str(error)
        assert "vrun.errors.ToolError" in text or "vstore.errors.ToolError" in text, text
        return text
    return ""


_LINKS: Final[dict[str, Callable[[Path], str]]] = {
    "absolute": os.fspath,
    "upwards": lambda _: "../canary",
    "far upwards": lambda canary: "../" * 40 + os.fspath(canary).lstrip("/"),
    "by way of proc": lambda canary: f"/proc/self/root{canary}",
    "by way of a descriptor": lambda _: "/proc/self/fd/3",
    "to itself": lambda _: "proc",
    "to the host's root": lambda _: "/../../..",
}


@pytest.mark.parametrize("kind", list(_LINKS))
@pytest.mark.parametrize("name", _NAMES)
def test_a_link_in_the_place_of_a_folder_leads_nowhere(
    host: Path, root: Path, name: str, kind: str
) -> None:
    _replace(root / name, _LINKS[kind](host))
    _try(root)


@pytest.mark.parametrize("name", ["proc", "sys", "dev"])
def test_kernel_file_systems_are_not_mounted_by_way_of_a_link(root: Path, name: str) -> None:
    (root / "elsewhere").mkdir()
    _replace(root / name, "elsewhere")
    text = _try(root)
    assert f"on /{name} of the guest: Too many levels of symbolic links" in text


@pytest.mark.parametrize("kind", ["absolute", "upwards"])
@pytest.mark.parametrize("name", _BELOW)
def test_a_link_below_what_we_mount_is_no_danger(
    host: Path, root: Path, name: str, kind: str
) -> None:
    path = root / name
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(_LINKS[kind](host))
    assert _try(root) == ""


def test_links_that_stay_inside_are_followed(host: Path, root: Path) -> None:
    """An old guest may have /tmp in /var/tmp, and mean it: by its own root."""
    (root / "var" / "tmp").mkdir(parents=True)
    _replace(root / "tmp", "/var/tmp")  # noqa: S108
    assert _try(root) == ""


@pytest.mark.parametrize("name", _NAMES)
def test_a_fifo_or_a_file_in_the_place_of_a_folder_is_refused(root: Path, name: str) -> None:
    for make in (Path.touch, os.mkfifo):
        _remove(root / name)
        make(root / name)
        assert "ToolError" in _try(root)


@pytest.mark.parametrize("name", ["proc", "dev", "sys", "run", "tmp", "srv", "etc"])
def test_a_link_swapped_in_while_we_mount_leads_nowhere(host: Path, root: Path, name: str) -> None:
    (root / "link").symlink_to("../canary")
    outcomes = set()
    with swapping(root, name, "link"):
        deadline = monotonic() + scaled(5, 600) / 10
        while monotonic() < deadline:
            outcomes.add(_try(root).rpartition("ToolError: ")[2].partition("\n")[0])
    allowed = ("Too many levels", "No such file", "Not a directory", "moved away", "renamed all")
    assert not [said for said in outcomes if said and not any(word in said for word in allowed)]


def test_a_folder_swapped_with_another_does_not_get_the_mount_out(host: Path, root: Path) -> None:
    """What is renamed after it was found takes the mount along; the start notices."""
    (root / "other" / "data").mkdir(parents=True)
    with swapping(root, "srv", "other"):
        deadline = monotonic() + scaled(5, 300) / 10
        while monotonic() < deadline:
            _try(root)


def _replace(path: Path, target: str) -> None:
    _remove(path)
    path.symlink_to(target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        for below in path.iterdir():
            _remove(below)
        path.rmdir()
    else:
        path.unlink()
