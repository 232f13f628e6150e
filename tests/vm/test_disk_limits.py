"""dlimits/ of guests by project quota, which the kernel of this machine has."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.filesystems import mount_loop
from tests.fixtures.probes import need
from tests.fixtures.vservers import SLEEPER, Host, grow_busybox, host_for_guests
from vrun import diskquota
from vrun.diskquota import Quota

pytestmark = need("vm")

_MIB = 1 << 20
_MAKE = {
    "ext4": ["mkfs.ext4", "-q", "-O", "quota,project", "-E", "quotatype=prjquota"],
    "xfs": ["mkfs.xfs", "-q"],
}
_XID = 1234


@pytest.fixture(params=sorted(_MAKE))
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system that counts projects."""
    image, mount = tmp_path / "image", tmp_path / "disk"
    with image.open("xb") as file:
        file.truncate(400 * _MIB)
    subprocess.run([*_MAKE[request.param], image], check=True)
    mount.mkdir()
    mount_loop(image, mount, "prjquota")
    yield mount
    subprocess.run(["chattr", "-R", "-f", "-i", mount], check=False)
    subprocess.run(["umount", mount], check=True)


@pytest.fixture
def host(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    yield from host_for_guests(tmp_path, monkeypatch)


def _add(host: Host, base: Path, **limits: str) -> Path:
    """The guest `web` on that file system, and where it is."""
    wanted = {"directory": f"{base}", "space_total": "20480", "inodes_total": "2000"}
    keys = {f"dlimits/0/{key}": text for key, text in {**wanted, "reserved": "0", **limits}.items()}
    root = base / "web"
    root.mkdir()
    grow_busybox(root)
    host.add("web", root, {**SLEEPER, "context": f"{_XID}", "spaces/net": "", **keys})
    return root


def _write(host: Host, megabytes: int) -> str:
    """What dd says of writing a file of that size inside."""
    command = ["dd", "if=/dev/zero", "of=/srv/file", "bs=1M", f"count={megabytes}"]
    return host.try_vserver("web", "exec", *command).stderr


def test_a_guest_can_store_no_more_than_its_limit(host: Host, base: Path) -> None:
    root = _add(host, base)
    (root / "srv").mkdir(exist_ok=True)
    assert host.vserver("web", "start").stderr == ""
    assert "10+0 records out" in _write(host, 10)
    said = _write(host, 40)
    assert "No space left" in said or "quota exceeded" in said
    assert (root / "srv/file").stat().st_blocks * 512 < 20 * _MIB
    seen = os.statvfs(root)
    assert seen.f_blocks * seen.f_frsize == 20480 << 10
    host.vserver("web", "stop")


def test_a_guest_can_make_no_more_files_than_its_limit(host: Host, base: Path) -> None:
    _add(host, base, inodes_total="700")
    host.vserver("web", "start")
    script = "mkdir -p /srv/d; for n in $(seq 900); do : >/srv/d/$n || exit 9; done"
    assert host.try_vserver("web", "exec", "sh", "-c", script).returncode != 0
    assert len(list((base / "web/srv/d").iterdir())) < 700
    host.vserver("web", "stop")


def test_the_tree_is_given_to_the_project_once(host: Host, base: Path) -> None:
    root = _add(host, base)
    host.vserver("web", "start")
    host.vserver("web", "stop")
    listed = subprocess.run(
        ["lsattr", "-p", "-d", root], capture_output=True, text=True, check=True
    )
    assert listed.stdout.split()[0] == f"{_XID}"
    assert "P" in listed.stdout.split()[1]
    (root / "srv").mkdir(exist_ok=True)
    (root / "srv/later").write_bytes(bytes(_MIB))
    listed = subprocess.run(
        ["lsattr", "-p", root / "srv/later"], capture_output=True, text=True, check=True
    )
    assert listed.stdout.split()[0] == f"{_XID}"


def test_a_guest_that_shares_files_is_not_started_under_a_limit(host: Host, base: Path) -> None:
    root = _add(host, base)
    (root / "shared").write_text("shared" * 1000)
    (base / "object").hardlink_to(root / "shared")
    subprocess.run(["chattr", "+i", root / "shared"], check=True)
    failed = host.vserver("web", "start", code=1).stderr
    assert f"{root}/shared is shared with other guests" in failed
    assert "vunify --undo web" in failed
    assert "dlimits/0/disabled" in failed
    assert host.leftovers() == []


def test_without_quota_the_guest_starts_and_says_so(host: Host, base: Path, tmp_path: Path) -> None:
    subprocess.run(["umount", base], check=True)
    mount_loop(tmp_path / "image", base, "noquota")
    _add(host, base)
    said = host.vserver("web", "start").stderr
    assert (
        "is not limited to 20480 KiB and 2000 files: its file system has no project quota" in said
    )
    host.vserver("web", "stop")


def test_what_is_stored_and_loaded_is_the_same(base: Path) -> None:
    fd = os.open(base, os.O_RDONLY)
    try:
        assert diskquota.is_enforced(fd)
        diskquota.store(fd, 77, Quota(8 * _MIB, None))
        loaded = diskquota.load(fd, 77)
        assert loaded == Quota(8 * _MIB, None, 0, 0)
        diskquota.store(fd, 77, Quota(None, 5))
        assert diskquota.load(fd, 77) == Quota(None, 5, 0, 0)
    finally:
        os.close(fd)
