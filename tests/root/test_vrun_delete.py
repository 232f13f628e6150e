"""vrun.delete: what goes with a guest, and what stays whatever its configuration says."""

import logging
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Tool
from tests.fixtures.builds import build, left, system
from tests.fixtures.filesystems import Site, free_bytes
from tests.fixtures.hostile import deep_path
from tests.fixtures.probes import need, on
from tests.fixtures.running import IDLE, running
from tests.fixtures.runs import find_faults, unify
from tests.fixtures.trees import File, Folder, Row, Symlink, differences, grow, snapshot
from vrun.delete import delete_guest, load_doomed
from vrun.errors import GuestNotFound, WrongUsage
from vstore.errors import PoolBusy
from vstore.guest import Guest, load_guest

pytestmark = [need("immutable", "lease"), on("ext4")]


def _refused(guest: Guest | str, kind: type[Exception] = WrongUsage) -> str:
    with pytest.raises(kind) as caught:
        delete_guest(guest if isinstance(guest, Guest) else load_guest(guest))
    return f"{caught.value}"


@pytest.fixture
def canary(site: Site) -> Iterator[Path]:
    """A folder that no delete may touch."""
    folder = grow(site.filesystem.folder / "canary", [File("file", b"sings")])
    before = snapshot(folder)
    yield folder
    assert differences(before, snapshot(folder)) == []


def test_a_unified_guest_goes_and_the_others_keep_their_files(site: Site, tool: Tool) -> None:
    for name in ("web", "db"):
        site.add_guest(name, system())
    unify(tool)
    before = snapshot(site.root("db"))
    assert delete_guest(load_guest("web")) == []
    assert left(site) == {"conf/db", "guests/db"}
    assert differences(before, snapshot(site.root("db"))) == []
    assert find_faults(site.pool) == []
    assert tool("vpool", "verify").returncode == 0


def test_without_a_pool_names_are_simply_taken_off(site: Site) -> None:
    rows: list[Row] = [
        File(deep_path(300) + b"/end", b"deep"),
        Symlink("way", "/"),
        File(b"new\nline\xff"),
    ]
    build("web", "-m", "skeleton")
    grow(site.root("web") / "srv", rows)
    assert delete_guest(load_guest("web")) == []
    assert left(site) == set()
    assert [path.name for path in (site.rundir / "web").iterdir()] == ["lock"]


def test_a_guest_with_many_files_takes_its_space_along(site: Site) -> None:
    free = free_bytes(site.vdirbase)
    site.add_guest(
        "web", [File(f"{number % 9}/{number}", os.urandom(9000)) for number in range(900)]
    )
    assert delete_guest(load_guest("web")) == []
    assert free - free_bytes(site.vdirbase) < 1 << 20


def test_links_are_taken_off_and_never_followed(site: Site, canary: Path) -> None:
    root = site.add_guest("web", [Symlink("up", f"{canary}"), Symlink("etc", "../../canary")])
    (site.confdir / "web/scripts").symlink_to(canary)
    (root / "hard").hardlink_to(canary / "file")
    assert delete_guest(load_guest("web")) == []
    assert left(site) == set()
    assert (canary / "file").stat().st_nlink == 1


# --- what the configuration points at


def test_cache_and_package_data_of_the_guest_go_with_it(site: Site) -> None:
    caches = site.filesystem.folder / "caches"
    for top in (caches, site.vdirbase / ".pkg"):
        grow(top, [File("web/data", b"1"), File("db/data", b"1")])
    (site.confdir / ".defaults").mkdir()
    (site.confdir / ".defaults/cachebase").symlink_to(caches)
    build("web", "-m", "skeleton")
    assert (site.confdir / "web/cache").readlink() == caches / "web"
    assert delete_guest(load_guest("web")) == []
    for top in (caches, site.vdirbase / ".pkg"):
        assert [path.name for path in top.iterdir()] == ["db"]


@pytest.mark.parametrize("link", ["cache", "run"])
@pytest.mark.parametrize("target", ["canary", "caches/db", "caches/../canary", "caches/web"])
def test_what_cache_and_run_point_at_elsewhere_stays(
    site: Site, canary: Path, link: str, target: str, caplog: pytest.LogCaptureFixture
) -> None:
    caches = grow(site.filesystem.folder / "caches", [File("db/data", b"1")])
    (caches / "web").symlink_to(canary)
    (site.confdir / ".defaults").mkdir()
    (site.confdir / ".defaults/cachebase").symlink_to(caches)
    site.add_guest("web")
    (site.confdir / "web" / link).symlink_to(site.filesystem.folder / target)
    with caplog.at_level(logging.WARNING):
        assert delete_guest(load_guest("web")) == []
    assert "left alone" in caplog.text
    assert left(site) == set()
    assert (caches / "db/data").exists()
    assert (caches / "web").is_symlink()


def test_a_configuration_that_is_a_symlink_is_only_taken_off(site: Site, canary: Path) -> None:
    site.root("web").mkdir()
    elsewhere = site.filesystem.folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "vdir").symlink_to(site.root("web"))
    (site.confdir / "web").symlink_to(elsewhere)
    assert delete_guest(load_guest("web")) == []
    assert left(site) == set()
    assert (elsewhere / "vdir").is_symlink()


# --- what is refused


def test_nothing_goes_while_something_is_mounted_below_the_root(site: Site) -> None:
    root = site.add_guest("web", [File("etc/a", b"1"), Folder("mnt")])
    subprocess.run(["mount", "-t", "tmpfs", "none", root / "mnt"], check=True)
    (root / "mnt/file").write_text("of another file system")
    try:
        assert f"{root}/mnt" in _refused("web")
        assert (root / "mnt/file").exists()
    finally:
        subprocess.run(["umount", root / "mnt"], check=True)
    assert (root / "etc/a").exists()
    assert left(site) == {"conf/web", "guests/web"}


def test_a_root_that_is_a_mount_is_refused(site: Site) -> None:
    root = site.add_guest("web")
    subprocess.run(["mount", "-t", "tmpfs", "none", root], check=True)
    try:
        assert "mounted" in _refused("web")
    finally:
        subprocess.run(["umount", root], check=True)


@pytest.mark.parametrize("other", ["guests", "conf", "run", "."])
def test_folders_that_the_tools_need_are_never_a_guest_to_delete(site: Site, other: str) -> None:
    site.register("web", site.filesystem.folder / other)
    assert "never deleted" in _refused("web")
    assert site.rundir.is_dir()
    assert left(site) == {"conf/web"}


@pytest.mark.parametrize("place", ["web", "web/below", "."])
def test_a_tree_that_another_guest_has_a_part_in_is_refused(site: Site, place: str) -> None:
    root = site.root("all/web")
    grow(root, [Folder("below")])
    site.register("web", root)
    site.register("other", site.root("all") / place)
    assert "guest other" in _refused("web")
    assert root.is_dir()


@need("cgroup_freezer")
def test_a_guest_that_runs_or_is_worked_on_is_refused(
    site: Site, cgroup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = site.add_guest("web", [File("a", b"1")])
    with running(site, "web", cgroup, IDLE):
        monkeypatch.setattr("vrun.delete._WAIT_S", 0.1)
        assert "runs" in _refused("web", PoolBusy)
        (site.rundir / "web/state.json").unlink()
        assert "another program" in _refused("web", PoolBusy)
    assert (root / "a").exists()


def test_what_the_last_run_left_on_the_host_has_to_be_cleaned_first(site: Site) -> None:
    site.add_guest("web")
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    (site.rundir / "web").mkdir()
    text = f'{{"format": 1, "boot": "{boot}", "xid": 5, "cgroup": {{}}, "network": {{}}}}'
    (site.rundir / "web/resources.json").write_text(text)
    assert "last run" in _refused("web", PoolBusy)


# --- half a guest


def test_a_guest_without_its_tree_can_be_deleted(site: Site) -> None:
    site.register("web", site.root("web"))
    assert delete_guest(load_doomed("web")) == []
    assert left(site) == set()
    with pytest.raises(GuestNotFound):
        load_doomed("web")


def test_an_old_style_guest_goes_with_all_its_files(site: Site) -> None:
    grow(site.root("web"), [File("a", b"1")])
    for name in ("web.conf", "web.sh", "web/apps/vunify/exclude", "webserver.conf"):
        site.configure(".", name, "")
    assert delete_guest(load_guest("web")) == []
    assert left(site) == {"conf/webserver.conf"}


def test_the_tree_can_be_kept(site: Site) -> None:
    root = site.add_guest("web", [File("a", b"1")])
    assert delete_guest(load_guest("web"), keep_root=True) == []
    assert left(site) == {"guests/web"}
    assert (root / "a").exists()


def test_what_cannot_be_deleted_is_named_and_the_guest_stays(site: Site) -> None:
    root = site.add_guest(
        "web", [File("etc/fixed", b"1"), File("etc/other", b"1"), File("x/y", b"1")]
    )
    subprocess.run(["chattr", "+i", root / "etc/fixed"], check=True)
    try:
        kept = delete_guest(load_guest("web"))
        assert [path for path, _ in kept] == [f"{root}/etc/fixed"]
        assert left(site) == {"conf/web", "guests/web"}
        assert [path.name for path in root.rglob("*")] == ["etc", "fixed"]
    finally:
        subprocess.run(["chattr", "-i", root / "etc/fixed"], check=True)
    assert delete_guest(load_guest("web")) == []
    assert left(site) == set()
