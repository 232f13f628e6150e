"""What a guest that was built is called, how it starts, and what no other machine has."""

import shlex
import stat
import subprocess
import sys

import pytest

from tests.conftest import Tool
from tests.fixtures.builds import KEY_KINDS, build, system
from tests.fixtures.filesystems import Site
from tests.fixtures.probes import need, on
from tests.fixtures.runs import unify
from tests.fixtures.trees import File, Folder, Row, Special, Symlink, grow
from vrun.build.inside import GuestTree

pytestmark = [need("immutable", "lease", "acl")]


def _style(site: Site, name: str) -> str:
    """What apps/init/style of the guest says; nothing where it is missing."""
    path = site.confdir / name / "apps/init/style"
    return path.read_text().strip() if path.exists() else ""


@on("ext4")
def test_the_init_style_is_found_out_from_the_tree(site: Site) -> None:
    trees: dict[str, list[Row]] = {
        "systemd": [File("usr/lib/systemd/systemd"), Symlink("sbin/init", "/lib/systemd/systemd")],
        "plain": [File("sbin/init", b"ELF")],
        "sysv": [File("sbin/init", b"ELF"), File("etc/init.d/rc")],
        "": [Folder("sbin")],
    }
    for number, (style, rows) in enumerate(trees.items()):
        source = grow(site.filesystem.folder / f"source{number}", rows)
        build(f"guest{number}", "-m", "rsync", "--", "-s", source)
        assert _style(site, f"guest{number}") == style


@on("ext4")
def test_the_init_style_may_come_with_what_a_program_installs(site: Site) -> None:
    install = "mkdir sbin && touch sbin/init"
    build("web", "-m", "skeleton", "--", "sh", "-c", install)
    assert _style(site, "web") == "plain"
    choose = f"{install} && echo openrc >$VSERVER_CONFIG/apps/init/style"
    build("db", "-m", "skeleton", "--", "sh", "-c", choose)
    assert _style(site, "db") == "openrc"


@on("ext4")
@pytest.mark.parametrize(
    ("words", "missing"),
    [
        ("", "/etc/init.d/rc, which the init style sysv runs"),
        ("--initstyle plain", "/sbin/init, which the init style plain runs"),
        ("--initstyle openrc", "/sbin/openrc, which the init style openrc runs"),
        ("-- ln -s /nowhere init", "/etc/init.d/rc, which the init style sysv runs"),
        ("-- ln -s ../etc/hosts sbin/init", ""),
        ("-- sh -c 'echo /bin/true >$VSERVER_CONFIG/apps/init/cmd.start'", ""),
    ],
)
def test_a_tree_without_an_init_is_told_of(
    site: Site, capsys: pytest.CaptureFixture[str], words: str, missing: str
) -> None:
    site.configure(".distributions", "mine/initpre", "#!/bin/sh\nmkdir $1/vdir/sbin\n")
    (site.confdir / ".distributions/mine/initpre").chmod(0o755)
    shared, _, command = words.partition("-- ")
    build("web", "-m", "skeleton", *shlex.split(shared), "--", "-d", "mine", *shlex.split(command))
    said = capsys.readouterr().err
    assert f"{site.root('web')}: has no {missing}" in said if missing else "has no" not in said


@on("ext4")
def test_a_guest_knows_its_own_name(site: Site) -> None:
    old = "# of a machine\n127.0.0.1 localhost\n10.0.0.1 web.example.org # webshop"
    source = grow(site.filesystem.folder / "source", [File("etc/hosts", old.encode())])
    words = ["--hostname", "web.example", "--interface", "nodev:10.0.0.7/24"]
    build("web", "-m", "rsync", *words, "--", "-s", source)
    hosts = site.root("web") / "etc/hosts"
    assert hosts.read_text() == f"{old}\n10.0.0.7\tweb.example web\n"
    build("webshop", "-m", "rsync", "--", "-s", site.root("web"))
    shop = (site.root("webshop") / "etc/hosts").read_text()
    assert shop == f"{hosts.read_text()}127.0.0.1\twebshop\n"
    build("db", "-m", "rsync", "--hostname", "web", "--", "-s", site.root("web"))
    assert (site.root("db") / "etc/hosts").read_bytes() == hosts.read_bytes()


@on("ext4")
def test_keys_of_ssh_are_made_anew(site: Site, tool: Tool) -> None:
    for name in ("source", "other"):
        site.add_guest(name, system())
    unify(tool)
    for name in ("web", "db"):
        build(name, "-m", "clone", "--", "-s", "source")
    seen = set()
    for root in (site.root("web"), site.root("db")):
        for kind in KEY_KINDS:
            key = root / f"etc/ssh/ssh_host_{kind}_key"
            assert stat.S_IMODE(key.stat().st_mode) == 0o600
            shown = subprocess.run(["ssh-keygen", "-lf", key], capture_output=True, check=True)
            seen.add(shown.stdout.split()[1])
    assert len(seen) == 2 * len(KEY_KINDS)


@on("ext4")
def test_links_with_dots_are_read_while_the_machine_renames_files(site: Site) -> None:
    link = Symlink("etc/resolv.conf", "../run/x/resolv.conf")
    root = grow(site.root("web"), [File("run/x/resolv.conf", b"1"), link])
    files = [site.filesystem.folder / "a", site.filesystem.folder / "b"]
    loop = (
        "import os,sys\na,b=sys.argv[1:]\nopen(a,'w')\nwhile True: os.rename(a,b); os.rename(b,a)"
    )
    with subprocess.Popen([sys.executable, "-c", loop, *files]) as renamer, GuestTree(root) as tree:
        try:
            assert {tree.load("etc/resolv.conf") for _ in range(20_000)} == {b"1"}
        finally:
            renamer.kill()


@on("ext4")
def test_files_that_we_cannot_look_through_stay_as_they_are(site: Site) -> None:
    hosts = b"0.0.0.0 tracker.example\n" * 100_000
    rows: list[Row] = [File("etc/hosts", hosts), Special("etc/resolv.conf", stat.S_IFIFO)]
    rows.append(File("etc/inittab", b"1:2345:respawn:/sbin/getty tty1\n" * 100_000))
    source = grow(site.filesystem.folder / "source", rows)
    build("web", "-m", "rsync", "--", "-s", source)
    etc = site.root("web") / "etc"
    assert (etc / "hosts").read_bytes() == hosts
    assert (etc / "inittab").stat().st_size == (source / "etc/inittab").stat().st_size
    assert stat.S_ISFIFO((etc / "resolv.conf").stat().st_mode)
