"""Conffiles are read from a stranger's tree without running it or leaving it."""

import os
from pathlib import Path

import pytest

from vstore import dpkg

SUM = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A guest with an empty dpkg database, in a folder with something outside of it."""
    (tmp_path / "guest/var/lib/dpkg/info").mkdir(parents=True)
    (tmp_path / "outside").write_text(f"Package: x\nConffiles:\n /etc/outside {SUM}\n")
    return tmp_path / "guest"


def write_status(root: Path, text: str) -> None:
    (root / "var/lib/dpkg/status").write_bytes(os.fsencode(text))


def test_status_names_the_conffiles_of_every_package(root: Path) -> None:
    write_status(
        root,
        f"""Package: bash
Status: install ok installed
Conffiles:
 /etc/bash.bashrc {SUM}
 /etc/skel/.bashrc {SUM}
Description: shell
 /etc/not-a-conffile {SUM}

Package: gone
Status: deinstall ok config-files
Conffiles:
 /etc/gone.conf {SUM} obsolete
 /etc/removed {SUM} remove-on-upgrade
 /etc/new newconffile
Version: 1

Package: cron
CONFFILES:
 /etc/crontab {SUM}""",
    )
    assert dpkg.conffiles(root) == {
        b"/etc/bash.bashrc",
        b"/etc/skel/.bashrc",
        b"/etc/gone.conf",
        b"/etc/removed",
        b"/etc/new",
        b"/etc/crontab",
    }


def test_names_may_hold_blanks_and_bytes(root: Path) -> None:
    write_status(root, f"Conffiles:\n /etc/a b obsolete c {SUM} obsolete\n /etc/\udcff {SUM}\n")
    assert dpkg.conffiles(root) == {b"/etc/a b obsolete c", b"/etc/\xff"}


def test_lists_of_packages_count_too(root: Path) -> None:
    info = root / "var/lib/dpkg/info"
    (info / "bash.conffiles").write_text("/etc/bash.bashrc\nremove-on-upgrade /etc/old \n/etc/x")
    (info / "bash.list").write_text("/bin/bash\n")
    assert dpkg.conffiles(root) == {b"/etc/bash.bashrc", b"/etc/old", b"/etc/x"}


def test_a_guest_without_dpkg_has_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert dpkg.conffiles(tmp_path) == frozenset()
    assert caplog.text == ""


def test_a_descriptor_does_as_well_and_stays_open(root: Path) -> None:
    write_status(root, f"Conffiles:\n /etc/a {SUM}\n")
    root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert dpkg.conffiles(root_fd) == {b"/etc/a"}
        assert os.fstat(root_fd).st_ino == root.stat().st_ino
    finally:
        os.close(root_fd)


@pytest.mark.parametrize("target", ["{}/outside", "../../../../outside"])
def test_no_symlink_leads_out_of_the_tree(root: Path, target: str) -> None:
    (root / "var/lib/dpkg/status").symlink_to(target.format(root.parent))
    (root / "var/lib/dpkg/info").rmdir()
    (root / "var/lib/dpkg/info").symlink_to(target.format(root.parent))
    assert dpkg.conffiles(root) == frozenset()


def test_symlinks_inside_mean_what_they_mean_to_the_guest(root: Path) -> None:
    write_status(root, f"Conffiles:\n /etc/a {SUM}\n")
    (root / "var/lib/dpkg").rename(root / "database")
    (root / "var/lib/dpkg").symlink_to("/database")
    assert dpkg.conffiles(root) == {b"/etc/a"}


def test_a_fifo_does_not_hang_the_run(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.mkfifo(root / "var/lib/dpkg/status")
    (root / "var/lib/dpkg/info/x.conffiles").mkdir()
    assert dpkg.conffiles(root) == frozenset()
    assert caplog.text.count("taken as missing") == 2


def test_a_monstrous_file_is_not_read(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_status(root, "")
    os.truncate(root / "var/lib/dpkg/status", 1 << 40)
    assert dpkg.conffiles(root) == frozenset()
    assert f"{root}/var/lib/dpkg/status: taken as missing: File too large" in caplog.text


def test_a_loop_of_symlinks_is_told(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "var/lib/dpkg/status").symlink_to("status")
    assert dpkg.conffiles(root) == frozenset()
    assert "symbolic links" in caplog.text


@pytest.mark.parametrize("text", [" " * 100_000 + "x", "/" + " x" * 50_000, " /" * 50_000])
def test_hostile_data_take_no_time(root: Path, text: str) -> None:
    write_status(root, f"Conffiles:\n {text}\n /etc/a{' ' * 100_000}x\n /etc/b {SUM}\n")
    (root / "var/lib/dpkg/info/x.conffiles").write_text(f"/etc/c{' ' * 100_000}x\n{text}\n")
    assert b"/etc/b" in dpkg.conffiles(root)
