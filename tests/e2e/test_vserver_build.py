"""vserver NAME build and delete as installed: real systems, and what a person reads."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import Tool
from tests.fixtures import guests
from tests.fixtures.builds import OWN, changes, left
from tests.fixtures.filesystems import Site, has_tools, mounts_below
from tests.fixtures.mirrors import make_mirror, make_package, write_script
from tests.fixtures.probes import need, on
from tests.fixtures.runs import list_objects, unify
from tests.fixtures.trees import snapshot

pytestmark = [need("root", "immutable", "lease"), on("ext4")]

_SMALL = next(item for item in guests.SMALL if item.release == "bookworm")


def _build(tool: Tool, *words: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = tool("vserver", words[0], "build", *words[1:])
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def _chroot(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["chroot", root, *command], capture_output=True, text=True, check=False)


@pytest.fixture
def mirror(site: Site) -> list[str]:
    """The words with which debootstrap installs from a small mirror on this machine."""
    folder = site.filesystem.folder
    files = {"etc/debian_version": "12.0\n", "usr/bin/tool": "#!/bin/sh\n", "proc/.keep": ""}
    package = make_package(folder / "packages", "base", files, priority="required")
    address = make_mirror(folder / "mirror", "bookworm", [package])
    return [
        "-d",
        "bookworm",
        "-m",
        address,
        "-s",
        f"{write_script(folder)}",
        "--",
        "--no-check-gpg",
    ]


# --- what a person reads


def test_a_guest_is_built_and_deleted(site: Site, tool: Tool) -> None:
    site.vdirbase.chmod(0o700)
    words = ["-m", "skeleton", "--hostname", "web.example", "--interface", "nodev:10.0.0.5/24"]
    done = _build(tool, "web", *words)
    assert done.stderr.splitlines() == [
        f"vserver web build: {site.root('web')}: has no /etc/init.d/rc, which the init style sysv "
        "runs; it has to come before the guest can start"
    ]
    assert done.stdout.startswith("web: built by skeleton in ")
    assert f"root {site.root('web')}, context 40000, init style sysv\n" in done.stdout
    assert tool("vserver", "web", "status").returncode == 3
    asked = tool("vserver", "web", "delete", stdin=b"n\n")
    assert asked.returncode == 2
    assert left(site) == {"conf/web", "guests/web"}
    assert tool("vserver", "--silent", "web", "delete").returncode == 0
    assert left(site) == set()
    assert tool("vserver", "web", "delete").returncode == 5


def test_warnings_are_lines_of_the_program_and_harmless(site: Site, tool: Tool) -> None:
    site.vdirbase.chmod(0o755)
    odd = site.vdirbase / "odd\n\x1b[31m"
    odd.mkdir(mode=0o755)
    done = _build(tool, "web", "-m", "skeleton", "--rootdir", f"{odd}")
    assert all(line.startswith("vserver") for line in done.stderr.splitlines()), done.stderr
    assert "every user of the host can enter it" in done.stderr
    assert "\x1b" not in done.stderr + done.stdout
    assert done.stdout.count("\n") == 1


def test_notices_and_refusals_go_to_stderr(site: Site, tool: Tool) -> None:
    done = _build(tool, "web", "-m", "skeleton", "--interface", "10.0.0.5")
    assert "nodev" in done.stderr
    assert done.stdout.count("\n") == 1
    again = _build(tool, "web", "-m", "skeleton", code=1)
    assert f"vserver: {site.confdir}/web: is there already\nhint: --force" in again.stderr
    assert _build(tool, "db", "-m", "nothing", code=1).stdout == ""
    assert "--interface" in _build(tool, "db", "--help").stdout
    quiet = tool("vserver", "--silent", "db", "build", "-m", "skeleton")
    assert (quiet.returncode, quiet.stdout) == (0, "")


def test_default_options_come_before_those_of_the_command(site: Site, tool: Tool) -> None:
    site.configure(".defaults", "apps/build/options", "--context\n500\n--initstyle\nplain\n")
    _build(tool, "web", "-m", "skeleton")
    _build(tool, "db", "-m", "skeleton", "--context", "600")
    numbers = [(site.confdir / name / "context").read_text() for name in ("web", "db")]
    assert numbers == ["500\n", "600\n"]
    assert (site.confdir / "db/apps/init/style").read_text() == "plain\n"


# --- debootstrap


@pytest.mark.skipif(not has_tools("debootstrap"), reason="debootstrap is not installed")
def test_debootstrap_leaves_neither_mounts_nor_processes(
    site: Site, tool: Tool, mirror: list[str]
) -> None:
    _build(tool, "web", "-m", "debootstrap", "--hostname", "web", "--", *mirror)
    root = site.root("web")
    assert (root / "etc/debian_version").read_text() == "12.0\n"
    assert (root / "etc/hostname").read_text() == "web\n"
    assert mounts_below(site.filesystem.folder) == []
    word, number = (root / "etc/second-stage").read_text().split()
    assert (word, int(number) < 5000) == ("init", True)
    assert _processes_in(root) == []
    assert list((root / "var/cache/apt/archives").glob("*.deb")) == []
    assert (site.confdir / "web/apps/pkgmgmt/internal").exists()


@pytest.mark.skipif(not has_tools("debootstrap"), reason="debootstrap is not installed")
def test_a_debootstrap_that_fails_says_why_and_leaves_nothing(
    site: Site, tool: Tool, mirror: list[str]
) -> None:
    gone = [word.replace("/mirror", "/nowhere") for word in mirror]
    done = _build(tool, "web", "-m", "debootstrap", "--", *gone, code=1)
    assert "Failed getting release file" in done.stderr
    assert "/nowhere" in done.stderr.splitlines()[-1]
    packages = site.filesystem.folder / "mirror/pool"
    for package in packages.iterdir():
        package.write_bytes(b"not what the index says")
    done = _build(tool, "web", "-m", "debootstrap", "--", *mirror, code=1)
    assert "E: " in done.stderr
    assert left(site) == set()
    assert mounts_below(site.filesystem.folder) == []


def _processes_in(root: Path) -> list[str]:
    """Processes with their root or working directory in the tree."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        for link in ("root", "cwd"):
            try:
                if (place / link).readlink().is_relative_to(root):
                    found.append(place.name)
            except OSError:
                continue
    return found


@need("debootstrap", "soak")
def test_a_release_is_installed_from_its_mirror(site: Site, tool: Tool) -> None:
    mirror = guests.find_mirror("bookworm")
    packages = guests.cache_folder() / "packages/bookworm"
    words = ["-d", "bookworm", *(["-m", mirror] if mirror else []), "--", "--variant=minbase"]
    done = tool(
        "vserver",
        "web",
        "build",
        "-m",
        "debootstrap",
        "--",
        *words,
        f"--cache-dir={packages}",
        timeout_s=900,
    )
    assert done.returncode == 0, done.stderr
    assert _chroot(site.root("web"), "dpkg", "--audit").stdout == ""
    assert _chroot(site.root("web"), "dpkg", "-V").stdout == ""


# --- a real system, by the other methods


@need("debootstrap")
def test_a_system_from_an_archive_is_whole_and_its_clone_too(site: Site, tool: Tool) -> None:
    archive = guests.build(_SMALL)
    _build(tool, "web", "-m", "template", "--", "-t", archive)
    witness = guests.unpack(_SMALL, site.root("witness"))
    before = snapshot(witness)
    shutil.rmtree(witness)
    kept = {path: entry for path, entry in before.items() if not path.startswith(b"dev/")}
    apart = OWN | {b"dev"} | {path for path in kept if path.startswith(b"etc/ssh/ssh_host_")}
    assert changes(kept, site.root("web"), apart=apart) == []
    assert _chroot(site.root("web"), "dpkg", "-V").stdout == ""
    unify(tool, "web")
    objects = len(list_objects(site.pool))
    with _before_all_others():
        began = time.monotonic()
        _build(tool, "copy", "-m", "clone", "--hostname", "copy", "--", "-s", "web")
        seconds = time.monotonic() - began
    assert _chroot(site.root("copy"), "dpkg", "-V").stdout == ""
    assert _chroot(site.root("copy"), "cat", "/etc/hostname").stdout == "copy\n"
    report = json.loads(tool("vdu", "--json", "copy").stdout.splitlines()[0])
    assert report
    assert len(list_objects(site.pool)) == objects
    assert seconds < 10
    for name in ("web", "copy"):
        assert tool("vserver", "--silent", name, "delete").returncode == 0
    assert left(site) == set()


@contextmanager
def _before_all_others() -> Iterator[None]:
    """What is run in the block has the processors first, whatever else the machine has to do."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, -20)
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, before)


@need("debootstrap")
def test_packages_of_a_host_work_in_a_guest(site: Site, tool: Tool) -> None:
    host = guests.unpack(_SMALL, site.filesystem.folder / "host")
    guests.personalise(host, "host", 7)
    (host / "etc/ssl/private").mkdir(parents=True, exist_ok=True)
    (host / "etc/ssl/private/host.key").write_text("PRIVATE")
    _build(tool, "web", "-m", "host", "--", "--source", host)
    root = site.root("web")
    assert _chroot(root, "sh", "-c", "dpkg -l openssh-server >/dev/null && echo fine").stdout == (
        "fine\n"
    )
    missing = [
        line for line in _chroot(root, "dpkg", "-V").stdout.splitlines() if "missing" in line
    ]
    assert missing == []
    checked = _chroot(root, "sh", "-c", "mkdir -p /run/sshd; /usr/sbin/sshd -t; nginx -v")
    assert checked.returncode == 0, checked.stderr
    for name in ("etc/ssl/private/host.key", "home/host", "var/log/auth.log"):
        assert (host / name).exists()
        assert not (root / name).exists()
    mine = (host / "etc/ssh/ssh_host_ed25519_key").read_bytes()
    assert (root / "etc/ssh/ssh_host_ed25519_key").read_bytes() != mine
    assert os.fsencode("host:x:1007") not in (root / "etc/passwd").read_bytes()
