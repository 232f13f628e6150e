"""Sources of mounts that lie in the tree of another guest, whose root is hostile."""

import os
import stat
from pathlib import Path
from time import monotonic

import pytest

from tests.fixtures.inside import ALL, FailedInside, in_child
from tests.fixtures.probes import scaled
from tests.fixtures.swapper import swapping
from vrun import mounts, sources
from vrun.mounts import RootOptions
from vrun.spec import Device, Mount

_OF_HOST = "of the host\n"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the host beside the guests; it has what each guest's tree has."""
    monkeypatch.setenv("VSERVER_VDIRBASE", os.fspath(tmp_path / "guests"))
    monkeypatch.setenv("VSERVER_CONFDIR", os.fspath(tmp_path / "conf"))
    monkeypatch.setenv("VSERVER_RUNDIR", os.fspath(tmp_path / "run"))
    (tmp_path / "conf").mkdir()
    canary = tmp_path / "canary"
    canary.mkdir()
    (canary / "file").write_text(_OF_HOST)
    return canary


@pytest.fixture
def other(host: Path) -> Path:
    """The tree of a guest that shares its folder `shared`."""
    tree = host.parent / "guests/other"
    (tree / "shared/deep").mkdir(parents=True)
    (tree / "shared/file").write_text("of the other guest\n")
    (tree / "link").symlink_to("../../canary")
    return tree


@pytest.fixture
def web(host: Path) -> Path:
    tree = host.parent / "guests/web"
    for name in ("cache", "srv/data"):
        (tree / name).mkdir(parents=True)
    return tree


def _line(source: Path, target: str = "/srv/data", fstype: str = "", *options: str) -> Mount:
    return Mount(os.fspath(source), target, fstype, options or ("bind",), 0, False, "fstab:7")


def _see(web: Path, line: Mount) -> str:
    """What the guest has below the target of the line; the message where it is refused."""

    def start() -> str:
        mounts.mount_fstab(web, (line,))
        mounts.enter_root(RootOptions(root=web, mounts=(line,)))
        place = Path(line.target)
        return (place / "file" if place.is_dir() else place).read_text()

    try:
        return in_child(start, kinds=ALL)
    except FailedInside as error:
        return str(error).rpartition("Error: ")[2].strip()


def test_what_another_guest_shares_is_bound(web: Path, other: Path) -> None:
    assert _see(web, _line(other / "shared")) == "of the other guest\n"


@pytest.mark.parametrize(
    "target", ["{canary}", "../../canary", "/../../../../../..{canary}", "/proc/self/root{canary}"]
)
def test_a_link_of_another_guest_does_not_lead_to_the_host(
    web: Path, other: Path, host: Path, target: str
) -> None:
    (other / "evil").symlink_to(target.format(canary=host))
    assert "No such file" in _see(web, _line(other / "evil"))
    (other / "evil").unlink()
    (other / "evil").symlink_to(target.format(canary=host.parent))
    assert "No such file" in _see(web, _line(other / "evil/canary"))


def test_a_link_of_another_guest_means_what_it_means_there(web: Path, other: Path) -> None:
    (other / "lib").symlink_to("/shared")
    assert _see(web, _line(other / "lib")) == "of the other guest\n"
    assert _see(web, _line(other / "shared/deep/../../../../shared")) == "of the other guest\n"


@pytest.mark.parametrize("below", ["shared", "shared/file"])
def test_a_folder_swapped_for_a_link_while_we_mount_shows_nothing_of_the_host(
    web: Path, other: Path, host: Path, below: str
) -> None:
    (web / "cache/file").touch()
    target = "/srv/data" if below == "shared" else "/cache/file"
    seen = set()
    with swapping(other, "shared", "link"):
        deadline = monotonic() + scaled(8, 600) / 4
        while monotonic() < deadline or "of the other guest\n" not in seen:
            seen.add(_see(web, _line(other / below, target)).partition(":")[0])
    assert "of the other guest\n" in seen
    assert _OF_HOST not in seen


def test_the_attack_works_on_one_who_walks_by_name(other: Path, host: Path) -> None:
    seen = set()
    with swapping(other, "shared", "link"):
        deadline = monotonic() + 60
        while _OF_HOST not in seen and monotonic() < deadline:
            seen.add((other / "shared/file").read_text())
    assert _OF_HOST in seen


def test_links_of_the_host_up_to_a_guest_count(web: Path, other: Path, host: Path) -> None:
    (host.parent / "to guests").symlink_to("guests")
    (host.parent / "to shared").symlink_to(other / "shared")
    (host / "relative").symlink_to("../canary/./../guests/other")
    assert _see(web, _line(host.parent / "to guests/other/shared")) == "of the other guest\n"
    assert _see(web, _line(host.parent / "to shared")) == "of the other guest\n"
    assert _see(web, _line(host / "relative/shared")) == "of the other guest\n"
    (other / "evil").symlink_to(host)
    assert "No such file" in _see(web, _line(host / "relative/evil"))


def test_a_guest_whose_root_is_elsewhere_is_known_by_its_configuration(
    web: Path, host: Path
) -> None:
    tree = host.parent / "elsewhere"
    tree.mkdir()
    (tree / "evil").symlink_to(host)
    assert _see(web, _line(tree / "evil")) == _OF_HOST
    (host.parent / "conf/third").mkdir()
    (host.parent / "conf/third/vdir").symlink_to(tree)
    assert "No such file" in _see(web, _line(tree / "evil"))


@pytest.mark.parametrize("fstype", ["ext4", "auto"])
def test_a_device_or_image_in_a_guests_tree_is_refused(web: Path, other: Path, fstype: str) -> None:
    os.mknod(other / "disk", stat.S_IFBLK | 0o600, os.makedev(7, 0))
    (other / "image").write_bytes(bytes(4096))
    for name in ("disk", "image"):
        said = _see(web, _line(other / name, "/srv/data", fstype, "ro"))
        assert said.startswith(f"fstab:7: {other / name} lies in a guest's tree")


@pytest.mark.parametrize("key", ["lowerdir", "upperdir", "workdir"])
def test_an_overlay_of_what_lies_in_a_guests_tree_is_refused(
    web: Path, other: Path, host: Path, key: str
) -> None:
    folders = {name: host.parent / name for name in ("lowerdir", "upperdir", "workdir")}
    for folder in folders.values():
        folder.mkdir()
    (folders["lowerdir"] / "file").write_text("below\n")
    words = tuple(f"{name}={folder}" for name, folder in folders.items())
    assert _see(web, _line(Path("x"), "/srv/data", "overlay", *words)) == "below\n"

    folders[key] = other / "shared"
    words = tuple(f"{name}={folder}" for name, folder in folders.items())
    said = _see(web, _line(Path("x"), "/srv/data", "overlay", *words))
    assert said.startswith(f"fstab:7: {other / 'shared'} lies in a guest's tree")


def test_a_device_by_way_of_another_guest_is_what_that_guest_has(web: Path, other: Path) -> None:
    (other / "evil").symlink_to("/dev/kmsg")
    device = Device(entry="0", path=Path("/dev/x"), source=other / "evil")
    options = RootOptions(root=web, devices=(device,))
    with pytest.raises(FailedInside, match="No such file"):
        in_child(lambda: mounts.enter_root(options), kinds=ALL)


def test_files_of_the_kernel_are_reached_by_its_own_links(host: Path) -> None:
    found = sources.open_source(f"/proc/{os.getpid()}/root/{host}")
    try:
        assert os.path.sameopenfile(found.fd, os.open(host, os.O_PATH))
        assert not found.is_in_guest
    finally:
        os.close(found.fd)


def test_links_that_lead_to_themselves_are_an_error(host: Path) -> None:
    (host / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="Too many levels"):
        sources.open_source(os.fspath(host / "loop/x"))
