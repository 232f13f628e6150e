"""vhalt, vreboot, vmount: from the host by name, and inside of a guest."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.mountinfo import at, mounts_of
from tests.fixtures.probes import need
from tests.fixtures.vservers import (
    BUSYBOX_INIT,
    SLEEPER,
    VSERVER,
    Host,
    host_for_guests,
    is_alive,
    wait_until,
)
from tests.fixtures.vservers import (
    run_installed as run,
)

pytestmark = need("root")

_BIN = VSERVER.parent
_TOP = Path(__file__).parents[2]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    yield from host_for_guests(tmp_path, monkeypatch)


# --- vhalt and vreboot


def test_by_name_guests_that_run_are_restarted_and_stopped(host: Host) -> None:
    for name in ("web", "db", "off"):
        host.add_busybox(name)
    for name in ("web", "db"):
        host.vserver(name, "start")
    before = host.init_pid("web")
    done = run("vreboot", "web", "off", code=2)
    assert done.stdout == "web: restarted\n"
    assert done.stderr.startswith("vreboot: guest off: does not run\n")
    assert host.init_pid("web") != before
    assert host.state("off") == {}
    assert run("vhalt", "web", "db").stdout.endswith("2 guests: 2 stopped\n")
    assert host.leftovers() == []
    assert run("vhalt", "web", code=1).stderr == "vhalt: guest web: does not run\n"
    assert "--force is for the inside" in run("vhalt", "-f", "web", code=1).stderr


def test_the_host_itself_is_never_meant(host: Host) -> None:
    for name in ("vhalt", "vreboot"):
        for words in ([], ["-f"]):
            assert "this is the host" in run(name, *words, code=1).stderr


def add_python(host: Host, name: str) -> None:
    """A guest that can run our commands: it has the host's Python, bound into its tree."""
    lines = ["none /proc proc defaults 0 0"]
    root = host.add_busybox(name, {**BUSYBOX_INIT, "fstab": ""})
    places = {Path("/usr"), _TOP, _BIN.parent, Path(sys.base_prefix)}
    for place in sorted(places):
        if any(place != other and place.is_relative_to(other) for other in places):
            continue
        (root / place.relative_to("/")).mkdir(parents=True, exist_ok=True)
        lines.append(f"{place} {place} none bind,ro 0 0")
    for link in ("lib", "lib64", "lib32"):
        if Path("/", link).is_symlink():
            (root / link).symlink_to(f"usr/{link}")
    host.set_key(name, "fstab", "\n".join(lines))


@need("soak")
def test_inside_of_a_guest_that_one_is_meant(host: Host) -> None:
    if not Path("/lib").is_symlink():
        pytest.skip("the host's /lib is no part of /usr")
    add_python(host, "web")
    host.vserver("web", "start")
    for words in ([], ["-f"]):
        before = host.init_pid("web")
        host.try_vserver("web", "exec", os.fspath(_BIN / "vreboot"), *words)
        wait_until(lambda before=before: host.state("web").get("init_pid", before) != before, 60)
    pid = host.init_pid("web")
    host.try_vserver("web", "exec", os.fspath(_BIN / "vhalt"), "-f")
    wait_until(lambda: not is_alive(pid), 60)
    host.wait_stopped("web", 60)
    assert "is stopped" in host.vserver("web", "status", code=3).stdout


# --- vmount


def test_a_folder_of_the_host_is_mounted_and_unmounted(host: Host, tmp_path: Path) -> None:
    share = tmp_path / "share"
    share.mkdir()
    (share / "file").write_text("shared\n")
    for name in ("web", "off"):
        (host.add_busybox(name) / "mnt").mkdir()
    host.vserver("web", "start")
    done = run("vmount", "web", "off", "-s", share, "--target", "/mnt", "-o", "ro", code=2)
    assert done.stderr.startswith("vmount: guest off: does not run\n")
    assert host.inside("web", "cat", "/mnt/file") == "shared\n"
    line = at(mounts_of(host.init_pid("web")), "/mnt")
    assert {"ro", "nodev"} <= line.options
    assert not (host.etc.vdirbase / "web/mnt/file").exists()
    assert not [one for one in mounts_of("self") if one.target.endswith("/web/mnt")]
    run("vmount", "-u", "web", "--target", "/mnt")
    assert host.inside("web", "ls", "/mnt") == ""
    assert (
        "nothing is mounted on /mnt"
        in run("vmount", "-u", "web", "--target", "/mnt", code=1).stderr
    )
    run("vmount", "web", "-t", "tmpfs", "-s", "none", "--target", "/mnt", "-o", "size=1m")
    assert at(mounts_of(host.init_pid("web")), "/mnt").fstype == "tmpfs"


def test_links_of_the_guest_lead_nowhere_else(host: Host, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    root = host.add_busybox("web")
    (root / "mnt").symlink_to(outside)
    host.vserver("web", "start")
    done = run("vmount", "web", "-t", "tmpfs", "-s", "none", "--target", "/mnt", code=1)
    assert "No such file" in done.stderr
    (root / outside.relative_to("/")).mkdir(parents=True)
    run("vmount", "web", "-t", "tmpfs", "-s", "none", "--target", "/mnt")
    assert at(mounts_of(host.init_pid("web")), os.fspath(outside)).fstype == "tmpfs"
    assert os.fspath(outside) not in {line.target for line in mounts_of("self")}


def test_what_the_fstab_names_by_now_is_mounted(host: Host, tmp_path: Path) -> None:
    share = tmp_path / "share"
    share.mkdir()
    host.add_busybox("web", {**SLEEPER, "fstab": "none /proc proc defaults 0 0"})
    host.vserver("web", "start")
    host.set_key(
        "web",
        "fstab",
        f"none /proc proc defaults 0 0\n{share} /tmp none bind 0 0\nnone /srv mqueue\n",
    )
    done = run("vmount", "web")
    assert done.stdout == f"web: {share} on /tmp\n"
    assert "/srv is mounted at a start only" in done.stderr
    assert run("vmount", "web").stdout == ""


@pytest.mark.parametrize(
    "words", [[], ["web", "-s", "/srv"], ["web", "--target", "/mnt"], ["web", "-u"]]
)
def test_wrong_usage_mounts_nothing(host: Host, words: list[str]) -> None:
    assert run("vmount", *words, code=1).stderr
