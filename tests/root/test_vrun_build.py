"""Builds with real inodes: what the methods make, and what none of them leaves behind."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Tool
from tests.fixtures.builds import (
    COMMON,
    INITTAB,
    OWN,
    QUIET_INITTAB,
    added,
    build,
    changes,
    left,
    refused,
    system,
)
from tests.fixtures.filesystems import Site
from tests.fixtures.probes import need, on
from tests.fixtures.running import IDLE, running
from tests.fixtures.runs import find_faults, inode_of, list_objects, unify
from tests.fixtures.tarballs import entry, pack
from tests.fixtures.trees import File, Folder, Row, Special, grow, snapshot
from vstore.errors import PoolBusy

pytestmark = [need("immutable", "lease", "acl")]


def _config(site: Site, name: str) -> dict[str, str]:
    """Each file of a configuration with its content, and each link with its target."""
    found = {}
    for path in sorted((site.confdir / name).rglob("*")):
        key = path.relative_to(site.confdir / name).as_posix()
        if path.is_symlink():
            found[key] = f"-> {path.readlink()}"
        elif path.is_file():
            found[key] = path.read_text()
    return found


# --- skeleton, and what all have in common


@on("ext4")
def test_the_configuration_has_what_the_options_say_and_no_more(site: Site) -> None:
    build("web", "-m", "skeleton")
    found = _config(site, "web")
    assert found.pop("fstab").count("\n") == 3
    assert found == {
        "name": "web\n",
        "context": "40000\n",
        "vdir": f"-> {site.root('web')}",
        "run": f"-> {site.rundir}/web",
        "cache": "-> /var/cache/vservers/web",
    }
    words = "--hostname web.example --context 77 --netdev eth0 --netprefix 24 --initstyle plain"
    words += " --interface 10.0.0.5 --interface up=eth1:10.1.0.5/255.255.0.0 --flags virt_mem,lock"
    words += " --interface nodev:10.2.0.5 --cpuset one --cpusetcpus 0:1 --cpusetvirt --cpusetmems 0"
    build("db", "-m", "skeleton", *words.split())
    found = _config(site, "db")
    expected = {
        "context": "77",
        "uts/nodename": "web.example",
        "interfaces/dev": "eth0",
        "interfaces/prefix": "24",
        "interfaces/0/ip": "10.0.0.5",
        "interfaces/1/ip": "10.1.0.5",
        "interfaces/1/dev": "eth1",
        "interfaces/1/name": "up",
        "interfaces/1/prefix": "16",
        "interfaces/2/ip": "10.2.0.5",
        "interfaces/2/nodev": "",
        "cflags": "virt_mem\nlock",
        "apps/init/style": "plain",
        "cpuset/name": "one",
        "cpuset/cpus": "0",
        "cpuset/mems": "0",
        "cpuset/virtualized": "1",
    }
    assert {key: found[key].strip() for key in expected} == expected
    assert (site.root("db") / "etc/hostname").read_text() == "web.example\n"


@on("ext4")
def test_a_root_has_the_devices_and_folders_that_every_guest_has(site: Site) -> None:
    build("web", "-m", "skeleton")
    root = site.root("web")
    status = (root / "dev/null").stat()
    assert (stat.S_ISCHR(status.st_mode), status.st_rdev) == (True, os.makedev(1, 3))
    assert stat.S_IMODE(status.st_mode) == 0o666
    assert (root / "dev/fd").readlink() == Path("/proc/self/fd")
    modes = {
        name: stat.S_IMODE((root / name).stat().st_mode) for name in ("proc", "tmp", "dev/shm")
    }
    assert modes == {"proc": 0o555, "tmp": 0o1777, "dev/shm": 0o1777}
    assert "localhost" in (root / "etc/hosts").read_text()


@on("ext4")
def test_files_that_the_administrator_laid_down_fill_gaps_only(site: Site) -> None:
    site.configure(".defaults", "files/hosts", "127.0.0.1 ours\n")
    site.configure(".distributions", "mine/files/nsswitch.conf", "hosts: files\n")
    site.configure(".distributions", "mine/devs", "zero c 1 5 600\n")
    source = grow(site.filesystem.folder / "source", [File("etc/nsswitch.conf", b"theirs")])
    build("web", "-m", "rsync", "--", "-s", source, "-d", "mine")
    etc = site.root("web") / "etc"
    assert (etc / "hosts").read_text() == "127.0.0.1 ours\n127.0.0.1\tweb\n"
    assert (etc / "nsswitch.conf").read_text() == "theirs"
    assert [path.name for path in (site.root("web") / "dev").iterdir()] == ["zero"]


@on("ext4")
def test_a_skeleton_is_filled_by_a_command_of_the_host(site: Site) -> None:
    script = (
        'pwd > etc/where; echo "$VSERVER_NAME $VSERVER_ROOT" > etc/who; ls "$VSERVER_CONFIG/vdir"'
    )
    build("web", "-m", "skeleton", "--", "--pkgmgmt", "sh", "-c", script)
    etc = site.root("web") / "etc"
    assert (etc / "where").read_text() == f"{site.root('web')}\n"
    assert (etc / "who").read_text() == f"web {site.root('web')}\n"
    assert (site.confdir / "web/apps/pkgmgmt/internal").exists()


@on("ext4")
def test_programs_of_a_distribution_run_before_and_after(site: Site) -> None:
    for key, line in (("initpre", "echo pre > $1/said"), ("initpost", "ls $1/vdir/etc >> $1/said")):
        site.configure(".distributions", f"mine/{key}", f"#!/bin/sh\n. $2\n{line}\n")
        (site.confdir / ".distributions/mine" / key).chmod(0o755)
    build("web", "-m", "skeleton", "--", "-d", "mine")
    said = (site.confdir / "web/said").read_text().split()
    assert said[0] == "pre"
    assert "hostname" in said


# --- clone


def _unified(site: Site, tool: Tool) -> Path:
    root = site.add_guest("source", system())
    site.add_guest("other", system())
    unify(tool)
    return root


def test_a_clone_shares_what_is_unified_and_has_an_identity_of_its_own(
    site: Site, tool: Tool
) -> None:
    source, target = _unified(site, tool), site.root("web")
    before, others = snapshot(source), snapshot(site.root("other"))
    build("web", "-m", "clone", "--hostname", "web", "--", "--source", "source")
    assert changes(before, target) == []
    assert added(before, target) == COMMON
    objects = {path.stat().st_ino for path in list_objects(site.pool)}
    after = snapshot(target)
    shared = {path for path, item in before.items() if item.inode in objects}
    assert {path for path in shared if after[path].inode != before[path].inode} <= OWN
    assert len(shared) > 10
    assert (target / "etc/hostname").read_text() == "web\n"
    assert (target / "etc/inittab").read_bytes() == QUIET_INITTAB
    number = (target / "etc/machine-id").read_text()
    assert (len(number), number) != (33, "0" * 32 + "\n")
    assert snapshot(source).keys() == before.keys()
    assert [(source / "etc" / name).read_bytes() for name in ("inittab", "hostname")] == [
        INITTAB,
        b"source\n",
    ]
    assert snapshot(site.root("other")).keys() == others.keys()
    assert find_faults(site.pool) == []
    assert tool("vpool", "verify").returncode == 0


@on("ext4")
def test_sources_of_a_clone_are_guests_trees_and_folders_of_roots(site: Site, tool: Tool) -> None:
    _unified(site, tool)
    grow(site.root("plain"), [File("etc/plain", b"1")])
    for name, source in (("a", "source"), ("b", f"{site.root('source')}/"), ("c", "plain")):
        build(name, "-m", "clone", "--", "-s", source)
    assert inode_of(site.root("b") / "usr/lib/1") == inode_of(site.root("a") / "usr/lib/1")
    assert (site.root("c") / "etc/plain").read_text() == "1"


@on("ext4")
def test_what_a_list_excludes_is_not_cloned(site: Site, tool: Tool) -> None:
    rows: list[Row] = [
        *system(),
        File("home/ann/.bashrc", b"own"),
        File("home/ann/deep/er/file", b"own"),
        File("srv/keep/file", b"kept"),
        File("srv/data/file", b"own"),
        File("usr/lib/shared", b"library 1 " * 99),
    ]
    source = site.add_guest("source", rows)
    site.add_guest("other", rows)
    unify(tool)
    before = snapshot(source)
    patterns = site.filesystem.folder / "patterns"
    patterns.write_text("# of each guest its own\n/home/*\n+/srv/keep\n/srv/*\n/usr/lib/shared")
    build("web", "-m", "clone", "--", "-s", "source", "--exclude-from", patterns)
    gone = {path for path in before if path.startswith((b"home/", b"srv/data"))}
    gone |= {b"usr/lib/shared", b"srv/keep/file"}
    root = snapshot(site.root("web"))
    assert before.keys() - root.keys() == gone
    kept = {path: item for path, item in before.items() if path not in gone}
    assert changes(kept, site.root("web")) == []
    assert {b"home", b"srv/keep", b"usr/lib/1"} <= root.keys()
    assert find_faults(site.pool) == []
    missing = site.filesystem.folder / "missing"
    assert f"{missing}: " in refused("db", "-m", "clone", "--", "-s", "source", "-X", missing)


@on("ext4")
def test_without_a_pool_a_clone_is_a_copy(site: Site) -> None:
    source = site.add_guest("source", system())
    before = snapshot(source)
    build("web", "-m", "clone", "--", "-s", "source")
    assert changes(before, site.root("web")) == []


# --- rsync


@on("ext4", "xfs")
def test_a_copy_is_as_the_tree_was(site: Site) -> None:
    rows = [*system(), Special("var/socket", stat.S_IFSOCK), Folder("mnt/there")]
    rows += [Special("var/null", stat.S_IFCHR, (1, 3), mode=0o666)]
    source = site.add_guest("source", rows)
    subprocess.run(["mount", "-t", "tmpfs", "none", source / "mnt/there"], check=True)
    try:
        (source / "mnt/there/file").write_text("of another file system")
        build("web", "-m", "rsync", "--", "--source", "source")
    finally:
        subprocess.run(["umount", source / "mnt/there"], check=True)
    before = snapshot(source)
    del before[b"var/socket"]
    there = {b"mnt", b"mnt/there"}
    assert changes(before, site.root("web"), apart=OWN | there) == []
    assert added(before, site.root("web")) == COMMON
    assert list((site.root("web") / "mnt/there").iterdir()) == []
    assert (site.root("web") / "holes").stat().st_blocks * 512 < 1 << 20


@on("ext4")
@need("cgroup_freezer")
def test_a_guest_that_runs_is_neither_copied_nor_built_over(site: Site, cgroup: Path) -> None:
    site.add_guest("source", system())
    with running(site, "source", cgroup, IDLE):
        for method in ("rsync", "clone"):
            assert "runs" in refused("web", "-m", method, "--", "-s", "source")
        assert "runs" in refused("source", "-m", "skeleton", "--force")
    assert left(site) == {"conf/source", "guests/source"}


# --- what is there already


@on("ext4")
def test_nothing_is_overwritten_without_force(site: Site) -> None:
    root = site.add_guest("web", system())
    before = snapshot(root)
    assert "is there already" in refused("web", "-m", "skeleton")
    (site.confdir / "web/vdir").unlink()
    (site.confdir / "web").rmdir()
    assert "not empty" in refused("web", "-m", "skeleton")
    (site.confdir / "web.conf").write_text("IPROOT=\n")
    assert "web.conf" in refused("web", "-m", "skeleton", "--i-know-its-there")
    assert snapshot(root) == before
    assert left(site) == {"conf/web.conf", "guests/web"}


@on("ext4")
def test_force_renames_what_is_there(site: Site) -> None:
    root = site.add_guest("web", system())
    before = snapshot(root)
    build("web", "-m", "skeleton", "--force")
    (aside,) = site.vdirbase.glob("web.~*~")
    assert snapshot(aside) == before
    (config,) = site.confdir.glob("web.~*~")
    assert (config / "vdir").is_symlink()
    assert not (root / "bin").exists()


@on("ext4")
def test_what_force_renamed_has_its_name_again_when_the_build_fails(site: Site) -> None:
    root = site.add_guest("web", system())
    before = snapshot(root)
    assert "ended with 3" in refused("web", "-m", "skeleton", "--force", "--", "sh", "-c", "exit 3")
    assert snapshot(root) == before
    assert left(site) == {"conf/web", "guests/web"}
    assert (site.confdir / "web/vdir").readlink() == root


@on("ext4")
def test_a_used_root_can_be_built_over_and_survives_a_failure(site: Site) -> None:
    root = grow(site.root("web"), [File("etc/own", b"mine"), File("etc/b", b"old")])
    canary = grow(site.filesystem.folder / "canary", [File("b", b"sings")])
    (root / "way").symlink_to(canary)
    before = snapshot(canary)
    archive = site.filesystem.folder / "a.tar"
    archive.write_bytes(pack(entry("etc/b", b"new"), entry("way/b", b"!")))
    words = ["-m", "template", "--i-know-its-there", "--", "-t", f"{archive}"]
    assert "way is no folder" in refused("web", *words)
    assert (root / "etc/own").read_text() == "mine"
    assert snapshot(canary) == before
    archive.write_bytes(pack(entry("etc/b", b"new")))
    build("web", *words)
    assert [(root / "etc" / name).read_text() for name in ("own", "b")] == ["mine", "new"]


@on("ext4")
def test_a_root_that_is_a_symlink_is_not_followed(site: Site) -> None:
    canary = grow(site.filesystem.folder / "canary", [File("b", b"sings")])
    site.root("web").symlink_to(canary)
    before = snapshot(canary)
    for words in ([], ["--i-know-its-there"]):
        refused("web", "-m", "skeleton", *words)
    build("web", "-m", "skeleton", "--force")
    assert snapshot(canary) == before
    assert not site.root("web").is_symlink()


@on("ext4")
def test_a_root_inside_another_guest_is_refused(site: Site) -> None:
    root = site.add_guest("other", [Folder("srv")])
    assert "root of guest other" in refused("web", "-m", "skeleton", "--rootdir", root / "srv")
    assert list((root / "srv").iterdir()) == []


@on("ext4")
def test_numbers_of_other_guests_are_refused(site: Site) -> None:
    build("web", "-m", "skeleton", "--context", "77")
    assert "guest web" in refused("db", "-m", "skeleton", "--context", "77")
    site.configure(".defaults", "context.next", "77\n")
    build("db", "-m", "skeleton")
    assert _config(site, "db")["context"] == "78\n"
    assert left(site) == {f"{top}/{name}" for top in ("conf", "guests") for name in ("web", "db")}


@on("ext4")
def test_settings_of_a_distribution_that_are_not_there_are_told_of(site: Site) -> None:
    assert "-d mine: there are no settings" in refused("web", "-m", "skeleton", "--", "-d", "mine")
    site.configure(".distributions", "mine/devs", "zero c 1 5 600\n")
    (site.confdir / ".distributions/mine/initpost").symlink_to("/nowhere")
    message = refused("web", "-m", "skeleton", "--", "-d", "mine")
    assert (
        message == f"{site.confdir}/.distributions/mine/initpost: is a symlink that leads nowhere"
    )
    assert left(site) == set()


@on("ext4")
def test_a_guest_is_never_built_where_it_would_be_in_the_way(site: Site, tool: Tool) -> None:
    other = site.add_guest("other", system())
    unify(tool)
    before = left(site)
    root, conf = site.root("web"), site.confdir
    for options, reason in (
        (("--rootdir", conf), "lie in each other"),
        (("--rootdir", conf / "web/below"), "lie in each other"),
        (("--rootdir", conf / "below"), "lies in the guests' configuration"),
        (("--rootdir", site.pool / "objects"), "lies in a pool"),
        (("--confdir", root / "conf"), "lie in each other"),
        (("--confdir", other / "conf"), "lies in the root of guest other"),
    ):
        assert reason in refused("web", "-m", "skeleton", *options), options
    assert left(site) == before


@on("ext4")
def test_options_that_do_not_go_together_are_refused_at_once(site: Site) -> None:
    words = ["--interface", "nodev:10.0.0.5", "--interface", "nodev:10.0.0.5/24"]
    message = refused("web", "-m", "skeleton", *words)
    assert message == f"{site.confdir}/web/interfaces/1/ip: entry 0 has 10.0.0.5 already"
    assert left(site) == set()


# --- failures


@on("ext4")
@pytest.mark.parametrize("where", ["initpre", "initpost", "command", "fill"])
def test_a_build_that_fails_leaves_nothing(site: Site, where: str) -> None:
    site.configure(".distributions", "mine/initpre", "#!/bin/sh\nexit 0\n")
    site.configure(".distributions", f"mine/{where}", "#!/bin/sh\ntouch $1/vdir/x\nexit 7\n")
    for path in (site.confdir / ".distributions/mine").iterdir():
        path.chmod(0o755)
    words = ["-m", "skeleton", "--", "-d", "mine"]
    if where == "fill":
        bad = site.filesystem.folder / "bad.tar"
        bad.write_bytes(pack(entry("usr/a", b"1"))[:1024])
        words = ["-m", "template", "--", "-t", f"{bad}"]
    refused("web", *words, *(["false"] if where == "command" else []))
    assert left(site) == set()
    site.root("web").mkdir()
    refused("web", *words, *(["false"] if where == "command" else []))
    assert left(site) == {"guests/web"}
    assert list(site.root("web").iterdir()) == []


@on("ext4")
def test_what_a_failed_build_made_can_be_kept(site: Site) -> None:
    refused("web", "-m", "skeleton", "--keep", "--", "false")
    assert left(site) == {"conf/web", "guests/web"}
    assert (site.confdir / "web/disabled").exists()
    assert (site.root("web") / "dev/null").exists()


_BUILD = """
import sys
from vrun.commands.build import build_command
build_command(sys.argv[1], sys.argv[2:])
"""


@on("ext4")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_build_that_is_killed_can_be_done_again(site: Site, number: signal.Signals) -> None:
    site.configure(
        ".distributions", "mine/initpost", f"#!/bin/sh\nkill -{int(number)} $PPID\nsleep 0.3"
    )
    (site.confdir / ".distributions/mine/initpost").chmod(0o755)
    command = [sys.executable, "-c", _BUILD, "web", "-m", "skeleton", "--"]
    done = subprocess.run([*command, "-d", "mine"], capture_output=True, check=False)
    assert done.returncode == -number, done.stderr
    expected = {"conf/.build-web", "guests/web"} if number == signal.SIGKILL else set()
    assert left(site) == expected
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert left(site) == {"conf/web", "guests/web"}


_SLOW_TO_FORK = """
import os, time
os.register_at_fork(after_in_parent=lambda: time.sleep(0.5))
"""


@on("ext4")
def test_a_build_is_interrupted_while_it_starts_a_program(site: Site) -> None:
    site.configure(".distributions", "mine/initpost", "#!/bin/sh\nkill -INT $PPID\nsleep 1")
    (site.confdir / ".distributions/mine/initpost").chmod(0o755)
    script = _SLOW_TO_FORK + _BUILD
    command = [sys.executable, "-c", script, "web", "-m", "skeleton", "--", "-d", "mine"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == -signal.SIGINT, done.stderr
    assert left(site) == set()


@on("ext4")
def test_what_was_there_before_a_killed_build_stays(site: Site) -> None:
    root = grow(site.root("web"), [File("etc/own", b"mine")])
    site.configure(".distributions", "mine/initpost", "#!/bin/sh\nkill -9 $PPID\nsleep 0.3")
    (site.confdir / ".distributions/mine/initpost").chmod(0o755)
    command = [sys.executable, "-c", _BUILD, "web", "-m", "skeleton", "--i-know-its-there", "--"]
    done = subprocess.run([*command, "-d", "mine"], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert "not empty" in refused("web", "-m", "skeleton")
    assert (root / "etc/own").read_text() == "mine"
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert (root / "etc/own").read_text() == "mine"
    assert left(site) == {"conf/web", "guests/web"}


@on("ext4")
def test_only_one_builds_a_guest(site: Site) -> None:
    script = f"touch {site.filesystem.folder}/here; read x"
    command = [sys.executable, "-c", _BUILD, "web", "-m", "skeleton", "--", "sh", "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        while not (site.filesystem.folder / "here").exists():
            assert process.poll() is None
        with pytest.raises(PoolBusy):
            build("web", "-m", "skeleton", "--force")
        process.communicate(b"go\n", timeout=60)
    assert process.returncode == 0
    assert left(site) == {"conf/web", "guests/web"}
