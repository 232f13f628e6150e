"""build -m template with real inodes: archives that are whole, and archives of an enemy."""

import os
import stat
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from tests.fixtures.builds import (
    COMMON,
    INITTAB,
    added,
    build,
    changes,
    left,
    refused,
    system,
    tar,
)
from tests.fixtures.filesystems import Site, mount_image, private_folder
from tests.fixtures.probes import need, on
from tests.fixtures.tarballs import entry, pack
from tests.fixtures.trees import File, Special, Symlink, grow, snapshot
from vrun.errors import NoSpace, ToolError

pytestmark = need("acl")


@on("ext4", "btrfs")
@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_what_tar_packed_comes_out_as_it_was(site: Site, form: str) -> None:
    source = grow(site.filesystem.folder / "source", system())
    before = snapshot(source)
    archive = tar(source, site.filesystem.folder / "a.tar.gz", "--gzip", form=form)
    build("web", "-m", "template", "--", "-t", archive)
    found = changes(before, site.root("web"))
    if form == "gnu":  # which has neither attributes nor fractions of a second
        found = [line for line in found if ": mtime_ns" not in line and ": xattrs" not in line]
    assert found == []
    assert added(before, site.root("web")) == COMMON
    assert (site.root("web") / "holes").stat().st_blocks * 512 < 1 << 20


@on("ext4")
def test_archives_are_unpacked_one_over_the_other(site: Site) -> None:
    folder = site.filesystem.folder
    (folder / "1.tar").write_bytes(pack(entry("etc/a", b"1"), entry("etc/b", b"1")))
    (folder / "2.tar").write_bytes(pack(entry("etc/b", b"2"), entry("etc/c", b"2")))
    link = folder / "conf/.distributions/mine/template"
    link.parent.mkdir(parents=True)
    link.symlink_to(folder / "1.tar")
    build("web", "-m", "template", "--", "-d", "mine", "-t", folder / "2.tar")
    etc = site.root("web") / "etc"
    assert [(etc / name).read_text() for name in "abc"] == ["1", "2", "2"]


@on("ext4")
def test_devices_of_a_template_are_left_out_unless_asked_for(site: Site) -> None:
    rows = [Special("dev/null", stat.S_IFCHR, (7, 7)), Special("dev/own", stat.S_IFCHR, (5, 5))]
    archive = tar(grow(site.filesystem.folder / "source", rows), site.filesystem.folder / "a.tar")
    build("web", "-m", "template", "--", "-t", archive)
    assert (site.root("web") / "dev/null").stat().st_rdev == os.makedev(1, 3)
    assert not (site.root("web") / "dev/own").exists()
    build("db", "-m", "template", "--", "--nodevsanity", "-t", archive)
    assert (site.root("db") / "dev/null").stat().st_rdev == os.makedev(7, 7)
    assert (site.root("db") / "dev/own").stat().st_rdev == os.makedev(5, 5)


@on("ext4")
def test_a_hostile_template_leaves_nothing(site: Site) -> None:
    canary = grow(site.filesystem.folder / "canary", [File("file", b"sings")])
    before = snapshot(canary)
    archive = site.filesystem.folder / "bad.tar"
    for number, bad in enumerate(
        (
            [entry("up", kind=b"2", link=f"{canary}"), entry("up/file", b"!")],
            [entry(f"../../{canary.name}/file", b"!")],
            [entry("hard", kind=b"1", link=f"../../{canary.name}/file")],
            [entry("etc", kind=b"2", link=f"{canary}"), entry("etc/hostname", b"!")],
            [entry("disk", kind=b"4", device=(8, 0))],
        )
    ):
        archive.write_bytes(pack(entry("usr/", kind=b"5"), entry("usr/x", b"1"), *bad))
        assert f"{archive}: " in refused(f"guest{number}", "-m", "template", "--", "-t", archive)
    assert left(site) == set()
    assert snapshot(canary) == before


@on("ext4")
@pytest.mark.parametrize("method", ["template", "rsync"])
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("etc", ""),
        ("tmp", ""),
        ("dev", ""),
        ("etc/ssh", ""),
        ("etc/hostname", "/hostname"),
        ("etc/machine-id", "/machine-id"),
        ("etc/inittab", "/inittab"),
        ("etc/resolv.conf", "/resolv.conf"),
        ("dev/null", "/null"),
    ],
)
def test_links_of_a_source_never_lead_what_we_write_outside(
    site: Site, method: str, name: str, place: str
) -> None:
    rows = [File(f"{key}", b"") for key in ("hostname", "machine-id", "resolv.conf", "null")]
    rows += [File("inittab", INITTAB), File("ssh_host_ed25519_key", b"old"), File("sshd_config")]
    canary = grow(site.filesystem.folder / "canary", rows)
    before = snapshot(canary)
    source = grow(
        site.filesystem.folder / "source", [Symlink(name, f"{canary}{place}"), File("usr/x", b"1")]
    )
    archive = tar(source, site.filesystem.folder / "a.tar")
    words = ["-t", f"{archive}"] if method == "template" else ["-s", f"{source}"]
    with suppress(*([] if place else [ToolError])):  # a link to a folder may be refused
        build("web", "-m", method, "--", *words)
    assert snapshot(canary) == before
    up = "/".join([".."] * 20)
    archive.write_bytes(pack(entry(name, kind=b"2", link=f"{up}{canary}{place}")))
    with suppress(ToolError):
        build("db", "-m", "template", "--", "--nodevsanity", "-t", archive)
    assert snapshot(canary) == before


@on("ext4")
def test_a_link_in_the_place_of_a_file_of_ours_is_replaced(site: Site) -> None:
    archive = site.filesystem.folder / "a.tar"
    links = [entry(f"etc/{name}", kind=b"2", link=f"/etc/{name}") for name in ("hostname", "hosts")]
    archive.write_bytes(pack(*links))
    host = Path("/etc/hostname").read_bytes()
    build("web", "-m", "template", "--hostname", "canary-test", "--", "-t", archive)
    assert Path("/etc/hostname").read_bytes() == host
    assert (site.root("web") / "etc/hostname").read_text() == "canary-test\n"
    assert not (site.root("web") / "etc/hosts").is_symlink()


@on("ext4")
def test_a_narrow_umask_keeps_no_user_out_of_the_guest(site: Site) -> None:
    archive = site.filesystem.folder / "a.tar"
    archive.write_bytes(pack(entry("usr/share/x", b"1")))
    old = os.umask(0o077)
    try:
        build("web", "-m", "template", "--", "-t", archive)
        build("db", "-m", "skeleton")
    finally:
        os.umask(old)
    paths = [
        site.root("db"),
        *(site.root("web") / name for name in (".", "usr/share", "etc", "dev")),
    ]
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o755}


@on("ext4")
@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("etc/hostname/", b"5", "is a folder in the place of a file"),
        ("etc/machine-id/", b"5", "is a folder in the place of a file"),
        ("etc/ssh/ssh_host_rsa_key/", b"5", "is a folder in the place of a file"),
        ("etc", b"0", "is no folder"),
        ("dev", b"0", "is no folder"),
        ("proc", b"0", "is no folder"),
        ("sys", b"2", "is no folder"),
    ],
)
def test_a_tree_in_which_files_and_folders_are_mixed_up_is_refused_with_the_name(
    site: Site, name: str, kind: bytes, reason: str
) -> None:
    archive = site.filesystem.folder / "a.tar"
    archive.write_bytes(pack(entry(name, kind=kind, link="/nowhere"), entry("own", b"1")))
    message = refused("web", "-m", "template", "--", "-t", archive)
    assert message.startswith(f"{site.root('web')}/{name.removesuffix('/')}: {reason}")
    assert left(site) == set()


@on("ext4")
def test_folders_in_the_place_of_files_that_are_only_looked_at_do_no_harm(site: Site) -> None:
    archive = site.filesystem.folder / "a.tar"
    names = ("etc/inittab/", "etc/ssh/", "sbin/init/")
    archive.write_bytes(pack(*(entry(name, kind=b"5") for name in names)))
    build("web", "-m", "template", "--", "-t", archive)


@on("ext4")
@need("immutable")
def test_a_frozen_file_is_never_replaced(site: Site) -> None:
    root = grow(site.root("web"), [File("etc/shared", b"of all")])
    archive = site.filesystem.folder / "a.tar"
    archive.write_bytes(pack(entry("etc/shared", b"!")))
    subprocess.run(["chattr", "+i", root / "etc/shared"], check=True)
    try:
        words = ["-m", "template", "--i-know-its-there", "--", "-t", os.fspath(archive)]
        assert "etc/shared: cannot take the place of a file that is frozen" in refused(
            "web", *words
        )
        assert (root / "etc/shared").read_bytes() == b"of all"
    finally:
        subprocess.run(["chattr", "-i", root / "etc/shared"], check=True)


@on("ext4")
def test_a_fifo_is_no_archive(site: Site) -> None:
    os.mkfifo(site.filesystem.folder / "pipe")
    words = ["-t", f"{site.filesystem.folder}/pipe"]
    assert "is no file" in refused("web", "-m", "template", "--", *words)


@on("ext4")
def test_a_full_disk_ends_a_build_and_nothing_is_left(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = site.filesystem.folder / "a.tar"
    files = [entry(f"usr/{number}", os.urandom(4 << 20)) for number in range(6)]
    archive.write_bytes(pack(*files))
    with private_folder() as folder:
        mount = mount_image("ext4", folder, size=16 << 20)
        monkeypatch.setenv("VSERVER_VDIRBASE", f"{mount}/guests")
        free = os.statvfs(mount).f_bfree
        with pytest.raises(NoSpace):
            build("web", "-m", "template", "--", "-t", archive)
        assert not (mount / "guests").exists()
        assert os.statvfs(mount).f_bfree == pytest.approx(free, abs=8)
    assert left(site) == set()
