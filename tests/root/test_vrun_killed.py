"""Builds and deletes that are killed at any moment: the next of the name clears that away."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import Tool
from tests.fixtures.builds import build, left, refused, system
from tests.fixtures.death import run_killed, turns
from tests.fixtures.filesystems import Site
from tests.fixtures.probes import need, on
from tests.fixtures.runs import find_faults, unify
from tests.fixtures.tarballs import entry, pack
from tests.fixtures.trees import File, Folder, Link, differences, grow, snapshot
from vrun.commands import vserver
from vrun.commands.build import build_command
from vrun.delete import delete_guest, load_doomed
from vrun.errors import GuestNotFound, WrongUsage

pytestmark = [need("immutable", "lease", "acl"), on("ext4")]

_CONFIGURED = {"conf/web", "guests/web"}


def _delete(name: str = "web") -> None:
    """`vserver NAME delete -y`, where there is anything of the guest."""
    try:
        doomed = load_doomed(name)
    except GuestNotFound:
        return
    assert delete_guest(doomed) == []


def _archive(site: Site) -> Path:
    """A small system with a folder, a link and a file."""
    archive = site.filesystem.folder / "a.tar"
    archive.write_bytes(pack(entry("etc/", kind=b"5"), entry("sbin/init", b"1"), entry("b", b"2")))
    return archive


def test_a_template_build_that_is_killed_can_be_done_again_or_deleted(site: Site) -> None:
    options = ["-m", "template", "--hostname", "web", "--", "-t", os.fspath(_archive(site))]
    words = ["web", "build", *options]
    steps = len(run_killed(0, vserver.main, *words).notes)
    assert steps > 20
    whole = snapshot(site.root("web"))
    _delete()
    for turn in turns(steps, site, of=5):
        run_killed(turn, vserver.main, *words)
        if turn % 2 and left(site) != _CONFIGURED:
            build("web", *words[2:])
            assert left(site) == _CONFIGURED
            assert snapshot(site.root("web")).keys() == whole.keys()
        _delete()
        assert left(site) == set(), turn


def test_a_clone_that_is_killed_can_be_done_again_or_deleted(site: Site, tool: Tool) -> None:
    rows = [row for row in system() if "etc/ssh" not in os.fsdecode(row.path)]
    for name in ("source", "other"):
        site.add_guest(name, rows)
    unify(tool)
    before = snapshot(site.root("source"))
    others = left(site)
    words = ["web", "build", "-m", "clone", "--", "-s", "source"]
    steps = len(run_killed(0, vserver.main, *words).notes)
    _delete()
    for turn in turns(steps, site, of=5):
        run_killed(turn, vserver.main, *words)
        if turn % 2 and not left(site) >= _CONFIGURED:
            build("web", *words[2:])
            assert left(site) == others | _CONFIGURED
        _delete()
        assert left(site) == others, turn
        assert differences(before, snapshot(site.root("source"))) == []
    assert find_faults(site.pool) == []


def test_a_delete_that_is_killed_can_be_done_again(site: Site) -> None:
    words = ["-m", "skeleton", "--interface", "lo:10.1.2.3"]
    build("web", *words)
    steps = len(run_killed(0, vserver.main, "web", "delete", "-y").notes)
    assert left(site) == set()
    for turn in turns(steps, site, of=5):
        build("web", *words)
        run_killed(turn, vserver.main, "web", "delete", "-y")
        if turn % 2 and "conf/web" not in left(site):
            build("web", *words)
        _delete()
        assert left(site) == set(), turn


def _kill_in_command(site: Site, *options: str) -> None:
    """Begin to build the guest `web`, and kill that while a command of the skeleton works."""
    script = (
        "import sys; from vrun.commands.build import build_command as b; b('web', sys.argv[1:])"
    )
    words = ["-m", "skeleton", *options, "--", "sh", "-c", "echo half >etc/half; kill -9 $PPID"]
    done = subprocess.run([sys.executable, "-c", script, *words], check=False)
    assert done.returncode == -signal.SIGKILL


def test_what_was_in_a_root_before_a_killed_build_is_never_deleted_with_it(site: Site) -> None:
    root = grow(site.root("web"), [File("etc/own", b"mine")])
    _kill_in_command(site, "--i-know-its-there")
    _delete()
    assert left(site) == {"guests/web"}
    assert (root / "etc/own").read_text() == "mine"


def test_a_copy_over_a_used_root_that_is_killed_leaves_nothing_odd_in_it(site: Site) -> None:
    source = grow(site.filesystem.folder / "source", [File("a", b"1"), Link("a too", "a")])
    grow(site.root("web"), [File("etc/own", b"mine")])
    options = ["--i-know-its-there", "--", "-s", os.fspath(source)]
    words = ["web", "build", "-m", "rsync", *options]
    steps = run_killed(0, vserver.main, *words).notes
    _delete()
    seen = set()
    for turn in range(1, len(steps) + 1):
        shutil.rmtree(site.root("web"), ignore_errors=True)
        grow(site.root("web"), [File("etc/own", b"mine")])
        run_killed(turn, vserver.main, *words)
        seen |= {path.name[:6] for path in site.root("web").iterdir()}
        if left(site) >= _CONFIGURED:
            break
        _delete()
        assert not list(site.root("web").glob(".vrun-*"))
    assert ".vrun-" in seen


def test_a_folder_that_was_there_before_a_killed_build_stays_and_is_empty(site: Site) -> None:
    site.root("web").mkdir()
    grow(site.root("web"), [Folder("lost+found")])
    _kill_in_command(site)
    assert (site.root("web") / "etc/half").exists()
    _delete()
    assert left(site) == {"guests/web"}
    assert [path.name for path in site.root("web").iterdir()] == ["lost+found"]


def test_the_tree_of_a_killed_build_can_be_kept(site: Site) -> None:
    _kill_in_command(site)
    assert delete_guest(load_doomed("web"), keep_root=True) == []
    assert left(site) == {"guests/web"}
    assert (site.root("web") / "etc/half").exists()


def test_a_killed_build_with_another_rootdir_is_found_by_the_next(site: Site) -> None:
    elsewhere = site.filesystem.folder / "elsewhere"
    _kill_in_command(site, "--rootdir", os.fspath(elsewhere))
    assert (elsewhere / "web/etc/half").exists()
    build("web", "-m", "skeleton")
    assert not (elsewhere / "web").exists()
    assert left(site) == _CONFIGURED


def test_what_cannot_be_cleared_away_is_named_and_found_again(site: Site) -> None:
    _kill_in_command(site)
    stuck = site.root("web") / "etc/half"
    subprocess.run(["chattr", "+i", stuck], check=True)
    try:
        for _ in range(2):
            message = refused("web", "-m", "skeleton")
            assert f"{stuck}: is left by a build that was killed" in message
    finally:
        subprocess.run(["chattr", "-i", stuck], check=True)
    build("web", "-m", "skeleton")
    assert left(site) == _CONFIGURED


def test_programs_of_a_build_end_with_it(site: Site) -> None:
    here = site.filesystem.folder / "pid"
    script = (
        "import sys; from vrun.commands.build import build_command as b; b('web', sys.argv[1:])"
    )
    words = [
        "-m",
        "skeleton",
        "--",
        "sh",
        "-c",
        f"echo $$ >{here}.new; mv {here}.new {here}; read x",
    ]
    command = [sys.executable, "-c", script, *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        while not here.exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        deadline = time.monotonic() + 60
        while Path(f"/proc/{here.read_text().strip()}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    _delete()
    assert left(site) == set()


def test_folders_that_a_failed_build_made_above_its_root_go_too(site: Site) -> None:
    above = site.filesystem.folder / "new"
    refused("web", "-m", "skeleton", "--rootdir", above / "er", "--", "false")
    assert not above.exists()
    assert build_command("web", ["-m", "skeleton", "--rootdir", f"{above}/er"]) == 0
    assert above.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("name", ["web", "db"])
def test_two_builds_that_end_at_once_never_have_one_number(site: Site, name: str) -> None:
    """The other guest takes the number while this one is built."""
    taker = "db" if name == "web" else "web"
    theirs = site.confdir / taker
    take = f"mkdir {theirs} && echo 77 >{theirs}/context"
    with pytest.raises(WrongUsage, match=f"belongs to guest {taker}"):
        build(name, "-m", "skeleton", "--context", "77", "--", "sh", "-c", take)
    site.configure(".defaults", "context.next", "78\n")
    take = f"echo 78 >{theirs}/context"
    with pytest.raises(WrongUsage, match=f"belongs to guest {taker}"):
        build(name, "-m", "skeleton", "--", "sh", "-c", take)
    assert left(site) == {f"conf/{taker}"}
