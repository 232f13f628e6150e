"""vfiles as installed: what it prints, how it ends."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Tool
from tests.fixtures.filesystems import Site
from tests.fixtures.persons import read_to_end
from tests.fixtures.probes import need, on
from tests.fixtures.runs import unify
from tests.fixtures.trees import File, Folder, Row, Symlink, grow

pytestmark = [need("root", "immutable"), on("ext4")]

SHARED = b"shared by all " * 1_000
ODD = b"new\nline\x1b[31m\xff"


@pytest.fixture
def two(site: Site, tool: Tool) -> Site:
    """The unified guests web and db."""
    rows: list[Row] = [File("bin/a", SHARED), File("bin/b", b"other" * 99), Folder("mnt")]
    rows += [Symlink("bin/link", "a"), File(b"srv/" + ODD)]
    for name in ("web", "db"):
        site.add_guest(name, rows)
    unify(tool)
    return site


@pytest.fixture
def manifest(two: Site, tool: Tool) -> Path:
    """What `vfiles --save` wrote of the guest web."""
    file = two.filesystem.folder / "web.manifest"
    done = tool("vfiles", "--save", file, "web")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return file


# --- the list


def test_own_entries_a_line_each(two: Site, tool: Tool) -> None:
    done = tool("vfiles", "web")
    assert (done.returncode, done.stderr) == (0, "")
    wanted = b"./mnt\n./bin/link\n./srv/" + ODD + b"\n"
    assert sorted(os.fsencode(done.stdout).split(b"\n")) == sorted(wanted.split(b"\n"))


def test_own_entries_a_null_byte_each(two: Site, tool: Tool) -> None:
    done = tool("vfiles", "-0", "web")
    entries = os.fsencode(done.stdout).split(b"\0")
    assert sorted(entries) == [b"", b"./bin/link", b"./mnt", b"./srv/" + ODD]


def test_shared_entries(two: Site, tool: Tool) -> None:
    assert tool("vfiles", "--shared", "web").stdout == "./bin/a\n./bin/b\n"
    assert tool("vfiles", "--shared", "--null", "web").stdout == "./bin/a\0./bin/b\0"


def test_a_plain_tree_is_listed(two: Site, tool: Tool) -> None:
    tree = grow(two.filesystem.folder / "tree", [File("a", SHARED)])
    assert tool("vfiles", "--root", tree).stdout == "./a\n"
    assert tool("vfiles", "--shared", "--root", two.root("db")).stdout == "./bin/a\n./bin/b\n"


def test_a_terminal_gets_no_control_characters(two: Site) -> None:
    ours, theirs = pty.openpty()
    command: list[str | Path] = [Path(sys.executable).parent / "vfiles", "web"]
    done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, check=True)
    os.close(theirs)
    shown = read_to_end(ours)
    os.close(ours)
    assert b"./srv/new\\nline\\x1b[31m\\xff\r\n" in shown
    assert (b"\x1b" in shown, done.stderr) == (False, b"")


def test_a_reader_that_goes_away_is_no_error_of_ours(two: Site, tool: Tool) -> None:
    grow(two.root("web"), [File(f"many/{'x' * 200}-{number}") for number in range(3_000)])
    program = Path(sys.executable).parent / "vfiles"
    done = subprocess.run(
        ["sh", "-c", f"{program} web | head -n 1"], capture_output=True, text=True, check=True
    )
    assert (len(done.stdout.splitlines()), done.stderr) == (1, "")


def test_what_is_mounted_in_a_guest_is_named_and_left_out(two: Site, tool: Tool) -> None:
    other = grow(two.filesystem.folder / "other", [File("file", b"x")])
    subprocess.run(["mount", "--bind", other, two.root("web") / "mnt"], check=True)
    try:
        done = tool("vfiles", "web")
    finally:
        subprocess.run(["umount", two.root("web") / "mnt"], check=True)
    assert done.returncode == 0
    assert done.stderr == f"vfiles: {two.root('web')}/mnt: on another mount, left out\n"
    assert "mnt" not in done.stdout


# --- save and restore


def test_the_manifest_is_lines_of_json(two: Site, manifest: Path) -> None:
    records = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert records[0] == {"format": 1, "guest": "web"}
    assert [record["folder"] for record in records if "folder" in record] == [
        *("", "bin", "mnt", "srv"),
    ]
    assert [record["file"] for record in records if "file" in record] == ["bin/a", "bin/b"]
    assert records[-1] == {"end": 6}
    assert manifest.stat().st_mode & 0o777 == 0o600


def test_the_manifest_can_go_down_a_pipe(two: Site, tool: Tool, manifest: Path) -> None:
    done = tool("vfiles", "--save", "/dev/stdout", "web")
    assert (done.returncode, done.stdout) == (0, manifest.read_text())
    assert Path("/dev/stdout").is_symlink()


def test_restore_says_what_it_did(two: Site, tool: Tool, manifest: Path) -> None:
    two.add_guest("copy")
    done = tool("vfiles", "--restore", manifest, "copy")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "2 files linked, 0 copied, 0 there already; 3 folders made; 0 not restored\n"
    )
    done = tool("vfiles", "--restore", manifest, "--json", "copy")
    assert json.loads(done.stdout) == {
        "format": 1,
        "files_linked": 0,
        "files_copied": 0,
        "files_present": 2,
        "folders_made": 0,
        "errors": [],
    }


def test_restore_names_what_it_cannot(two: Site, tool: Tool, manifest: Path) -> None:
    root = two.add_guest("copy", [File("bin/a", b"mine"), File(b"srv", b"no folder")])
    done = tool("vfiles", "--restore", manifest, "copy")
    assert done.returncode == 20
    assert done.stderr == (
        f"vfiles: {root}/srv: cannot be made: File exists\n"
        f"vfiles: {root}/bin/a: another file is there, which was left as it is\n"
    )
    assert done.stdout.endswith("; 2 not restored\n")
    assert (root / "bin/a").read_bytes() == b"mine"


# --- what is refused


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "name one guest"),
        (["nobody"], 3, "nobody"),
        (["web", "db"], 2, "db"),
        (["web", "--root", "/"], 2, "--root"),
        (["../etc"], 2, "cannot be a guest's name"),
        (["-0", "--json", "web"], 2, "-0 and --json cannot be used together"),
        (["--shared", "--save", "x", "web"], 2, "--shared and --save"),
        (["--restore", "/nowhere/at/all", "web"], 2, "/nowhere/at/all"),
        (["--save", "/nowhere/at/all", "web"], 1, "/nowhere/at/"),
        (["--save", "/", "web"], 1, "Is a directory"),
        (["--pool", "/nowhere", "--save", "x", "web"], 2, "/nowhere"),
        (["--restore", "/dev/null", "web"], 7, "/dev/null"),
        (["--restore", "/etc/passwd", "web"], 7, "line 1"),
    ],
)
def test_exit_codes(two: Site, tool: Tool, arguments: list[str], code: int, words: str) -> None:
    done = tool("vfiles", *arguments)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_newer_manifest_and_a_newer_pool_are_refused(
    two: Site, tool: Tool, manifest: Path
) -> None:
    newer = two.filesystem.folder / "newer"
    newer.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    assert tool("vfiles", "--restore", newer, "web").returncode == 8
    (two.pool / "format").write_text("vserver-tools pool 99\n")
    assert tool("vfiles", "web").returncode == 8
    assert tool("vfiles", "--restore", manifest, "web").returncode == 8


def test_a_manifest_that_climbs_out_is_refused_whole(two: Site, tool: Tool, manifest: Path) -> None:
    for path in ("../escaped", "/escaped", "bin/../../escaped"):
        manifest_text = manifest.read_text().replace('"bin/a"', json.dumps(path))
        (two.filesystem.folder / "bad").write_text(manifest_text)
        root = two.add_guest(f"copy{len(path)}")
        done = tool("vfiles", "--restore", two.filesystem.folder / "bad", root.name)
        assert done.returncode == 7
        assert "is not one below a guest's root" in done.stderr
        assert list(root.iterdir()) == []
    assert not (two.vdirbase / "escaped").exists()


def test_a_guest_on_another_file_system_than_the_pool(
    two: Site, tool: Tool, manifest: Path, tmp_path: Path
) -> None:
    tree = grow(tmp_path / "tree", [File("a", SHARED)])
    done = tool("vfiles", "--root", tree)
    assert (done.returncode, done.stdout) == (0, "./a\n")
    assert "none shared" in done.stderr
    for option in ("--save", "--restore"):
        done = tool("vfiles", option, manifest, "--root", tree, "--offline")
        assert done.returncode == 2
        assert "on another mount than the pool" in done.stderr
    assert [path.name for path in tree.iterdir()] == ["a"]
