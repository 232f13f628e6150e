"""What cannot be done is said with its reason and the right exit code, and nothing is lost."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import pytest

from tests.conftest import Tool
from tests.fixtures.filesystems import (
    Site,
    free_bytes,
    is_immutable,
    mount_image,
    private_folder,
)
from tests.fixtures.probes import need, on
from tests.fixtures.runs import find_faults, inode_of, stamps, unify
from tests.fixtures.trees import File, Row, Snapshot, differences, grow, snapshot

pytestmark = need("immutable", "lease")

_SAME: Final = b"the very same content"


def _refuse(tool: Tool, code: int, *arguments: str | Path) -> str:
    """vunify must end with `code`, a message and no traceback; returns what it said."""
    done = tool("vunify", *arguments)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("vunify: ")
    assert "Traceback" not in done.stderr
    return done.stderr


@contextmanager
def _mounted(*options: str | Path) -> Iterator[Path]:
    point = Path(options[-1])
    point.mkdir(exist_ok=True)
    subprocess.run(["mount", *options], check=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", "--", point], check=True)


def _add_two(site: Site) -> list[Path]:
    return [site.add_guest(name, [File("file", _SAME)]) for name in ("web", "db")]


@on("ext4")
def test_a_guest_that_does_not_exist(site: Site, tool: Tool) -> None:
    _add_two(site)
    said = _refuse(tool, 3, "web", "nobody")
    assert "nobody" in said
    assert os.fspath(site.confdir) in said
    assert not site.pool.exists()


@on("ext4")
@pytest.mark.parametrize("name", ["../web", "web\n", "", ".pool", "a" * 65, "web.rpmsave"])
def test_what_cannot_be_a_guests_name(site: Site, tool: Tool, name: str) -> None:
    _add_two(site)
    _refuse(tool, 2, "web", name)
    assert not site.pool.exists()


@on("ext4")
def test_no_guest_is_named(site: Site, tool: Tool) -> None:
    _add_two(site)
    assert "--all" in _refuse(tool, 2)
    assert "web" not in _refuse(tool, 2, "--all", "web").partition("hint")[0]


@on("ext4")
def test_nothing_is_configured(site: Site, tool: Tool) -> None:
    _refuse(tool, 2, "--all")


@on("ext4")
def test_a_guest_whose_root_is_gone_is_left_out_and_the_others_are_done(
    site: Site, tool: Tool
) -> None:
    guests = _add_two(site)
    site.register("mail", site.root("mail"))
    done = tool("vunify", "--all")
    assert done.returncode in (0, 20)
    assert "mail" in done.stderr
    assert inode_of(guests[0] / "file") == inode_of(guests[1] / "file")
    _refuse(tool, 3, "mail")


@on("ext4")
def test_a_pool_on_another_file_system(site: Site, tool: Tool) -> None:
    guests = _add_two(site)
    before = [stamps(root) for root in guests]
    with _mounted("-t", "tmpfs", "tmpfs", site.filesystem.folder / "other") as other:
        said = _refuse(tool, 2, "web", "db", "--pool", other / "pool")
        assert "--pool" in said
        assert os.fspath(other) in said
    assert [stamps(root) for root in guests] == before


@on("ext4")
def test_a_pool_on_another_mount_of_the_same_file_system(site: Site, tool: Tool) -> None:
    """link(2) refuses to cross mounts, even of one file system."""
    _add_two(site)
    (site.filesystem.folder / "pools").mkdir()
    point = site.filesystem.folder / "bound"
    with _mounted("--bind", site.filesystem.folder / "pools", point) as bound:
        _refuse(tool, 2, "web", "db", "--pool", bound / "pool")


@on("ext4")
def test_a_guest_whose_tree_is_a_mount_of_its_own(site: Site, tool: Tool) -> None:
    guests = _add_two(site)
    mail = site.root("mail")
    with _mounted("-t", "tmpfs", "tmpfs", mail):
        grow(mail, [File("file", _SAME)])
        site.register("mail", mail)
        assert "mail" in _refuse(tool, 2, "web", "db", "mail")
        assert not is_immutable(guests[0] / "file")
        done = tool("vunify", "--all")
        assert done.returncode == 20
        assert "mail" in done.stderr
    assert inode_of(guests[0] / "file") == inode_of(guests[1] / "file")


@on("btrfs")
def test_a_guest_that_is_a_subvolume_of_its_own(site: Site, tool: Tool) -> None:
    guests = _add_two(site)
    mail = site.root("mail")
    subprocess.run(["btrfs", "-q", "subvolume", "create", mail], check=True)
    grow(mail, [File("file", _SAME)])
    site.register("mail", mail)
    assert "--link reflink" in _refuse(tool, 6, "web", "mail")
    done = tool("vunify", "--all")
    assert done.returncode == 20
    assert "mail" in done.stderr
    assert inode_of(guests[0] / "file") == inode_of(guests[1] / "file")
    assert not is_immutable(mail / "file")


@on("ext4")
def test_a_file_system_without_the_immutable_flag(site: Site, tool: Tool) -> None:
    with _mounted("-t", "ramfs", "ramfs", site.filesystem.folder / "memory") as memory:
        for name in ("web", "db"):
            site.register(name, grow(memory / name, [File("file", _SAME)]))
        said = _refuse(tool, 6, "--all", "--pool", memory / "pool")
        assert "immutable" in said
        assert len({inode_of(memory / name / "file") for name in ("web", "db")}) == 2
        assert list((memory / "pool").glob("**/*")) == []


@on("ext4")
def test_a_read_only_file_system(site: Site, tool: Tool) -> None:
    guests = _add_two(site)
    before = [stamps(root) for root in guests]
    with _mounted("--bind", "-o", "ro", site.vdirbase, site.filesystem.folder / "readonly") as base:
        trees = [argument for name in ("web", "db") for argument in ("--root", base / name)]
        done = tool("vunify", *trees, "--offline", "--pool", base / ".pool")
    assert done.returncode in (1, 2, 6)
    assert "Read-only file system" in done.stderr
    assert [stamps(root) for root in guests] == before


@on("ext4")
def test_a_pool_of_a_newer_format(site: Site, tool: Tool) -> None:
    guests = _add_two(site)
    unify(tool)
    (site.pool / "format").write_text("vserver-tools pool 2\n")
    mail = site.add_guest("mail", [File("file", _SAME)])
    before = [stamps(root) for root in (*guests, mail, site.pool / "objects")]
    said = _refuse(tool, 8, "--all")
    assert "pool 2" in said
    assert _refuse(tool, 8, "--all", "--dry-run")
    assert [stamps(root) for root in (*guests, mail, site.pool / "objects")] == before


@on("ext4")
@pytest.mark.parametrize("what", ["format", "objects"])
def test_a_pool_that_lacks_a_part(site: Site, tool: Tool, what: str) -> None:
    guests = _add_two(site)
    unify(tool)
    part = site.pool / what
    part.rename(site.filesystem.folder / "kept")
    done = tool("vunify", "--all")
    assert done.returncode in (0, 5), done.stderr
    assert "Traceback" not in done.stderr
    assert (guests[0] / "file").read_bytes() == _SAME
    if done.returncode:
        assert os.fspath(site.pool) in done.stderr


@on("ext4")
def test_a_pool_that_is_a_folder_of_somebody(site: Site, tool: Tool) -> None:
    _add_two(site)
    folder = grow(site.filesystem.folder / "documents", [File("letter", _SAME)])
    before = snapshot(folder)
    done = tool("vunify", "--all", "--pool", folder)
    after = snapshot(folder)
    assert after[b"letter"] == before[b"letter"]
    assert done.returncode in (0, 2)


@on("ext4")
def test_trees_that_overlap(site: Site, tool: Tool) -> None:
    guests = _add_two(site)
    grow(guests[0] / "inner", [File("file", _SAME)])
    before = [stamps(root) for root in guests]
    for tree in (site.root("web"), site.root("web") / "inner", site.vdirbase):
        _refuse(tool, 2, "web", "--root", tree, "--offline")
    link = site.filesystem.folder / "link"
    link.symlink_to(site.root("web"))
    _refuse(tool, 3, "web", "--root", link, "--offline")
    _refuse(tool, 2, "web", "--root", link / "inner", "--offline")
    assert [stamps(root) for root in guests] == before


@on("ext4")
def test_two_names_for_one_tree(site: Site, tool: Tool) -> None:
    _add_two(site)
    site.register("alias", site.root("web"))
    _refuse(tool, 2, "web", "alias")
    assert unify(tool, "web", "web", "db").unified == 2


@on("ext4")
def test_a_plain_tree_without_the_promise(site: Site, tool: Tool) -> None:
    guests = _add_two(site)
    shutil.rmtree(site.confdir / "db")
    assert "--offline" in _refuse(tool, 6, "web", "--root", guests[1])
    assert not any(is_immutable(root / "file") for root in guests)


@on("ext4")
def test_a_tree_that_is_none(site: Site, tool: Tool) -> None:
    _add_two(site)
    _refuse(tool, 3, "web", "--offline", "--root", site.root("web") / "file")
    _refuse(tool, 3, "web", "--offline", "--root", site.filesystem.folder / "nothing")


@on("ext4")
def test_an_exclude_list_that_is_none(site: Site, tool: Tool) -> None:
    guests = _add_two(site)
    binary = site.filesystem.folder / "binary"
    binary.write_bytes(b"/etc\0/usr")
    _refuse(tool, 7, "--all", "--exclude-from", binary)
    _refuse(tool, 7, "--all", "--exclude-from", site.filesystem.folder / "nothing")
    assert not any(is_immutable(root / "file") for root in guests)


@on("ext4")
@pytest.mark.parametrize(
    "options",
    [
        ("--min-size", "0"),
        ("--min-size", "many"),
        ("--jobs", "0"),
        ("--time-budget", "-1"),
        ("--link", "symlink"),
    ],
)
def test_options_that_say_nothing(site: Site, tool: Tool, options: tuple[str, ...]) -> None:
    _add_two(site)
    assert tool("vunify", "--all", *options).returncode == 2
    assert not site.pool.exists()


# --- a full disk --------------------------------------------------------------------------------


_FILES: Final = 60


def _rows() -> list[Row]:
    return [File(f"lib/{number}", b"%08d" % number * 1_000) for number in range(_FILES)]


@contextmanager
def _small(site: Site, kind: str, size: int, *guests: str) -> Iterator[tuple[Path, list[Path]]]:
    """A small file system with these guests; what the tools make of it is in the site's folders."""
    with private_folder() as folder:
        mount = mount_image(kind, folder, size=size)
        roots = [grow(mount / name, _rows()) for name in guests]
        for root in roots:
            site.register(root.name, root)
        yield mount, roots


def _fill(mount: Path) -> list[Path]:
    """Take the last block, in few large pieces."""
    ballast = mount / "ballast"
    with ballast.open("wb") as file:
        for size in (1 << 23, 1 << 20, 1 << 16, 1 << 12):
            with suppress(OSError):
                while True:
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, size)
    return [ballast]


def _use_up_inodes(mount: Path) -> list[Path]:
    ballast = []
    try:
        for number in range(1 << 20):
            ballast.append(mount / f"ballast{number}")
            ballast[-1].touch()
    except OSError:
        ballast.pop()
    return ballast


def _check_kept(before: list[Snapshot], guests: list[Path], pool: Path) -> None:
    after = [snapshot(root) for root in guests]
    for old, new in zip(before, after, strict=True):
        assert differences(old, new) == []
    assert find_faults(pool) == []


@on("ext4", "btrfs")
def test_a_disk_without_a_free_byte_loses_nothing(site: Site, tool: Tool) -> None:
    kind, size = site.filesystem.kind, 128 << 20
    with _small(site, kind, size, "web", "db", "mail") as (mount, guests):
        pool = mount / "pool"
        before = [snapshot(root) for root in guests]
        unify(tool, "web", "db", "--pool", pool)
        ballast = _fill(mount)
        done = tool("vunify", "--all", "--pool", pool)
        assert done.returncode in (0, 9, 20), done.stderr
        assert "Traceback" not in done.stderr
        if done.returncode:
            assert "No space left on device" in done.stderr
        _check_kept(before, guests, pool)
        for path in ballast:
            path.unlink()
        free_bytes(mount)  # given back
        unify(tool, "--all", "--pool", pool)
        _check_kept(before, guests, pool)
        assert len({inode_of(root / "lib/7") for root in guests}) == 1


@on("ext4")
def test_a_disk_without_a_free_inode_loses_nothing(site: Site, tool: Tool) -> None:
    with _small(site, "ext4", 32 << 20, "web", "db", "mail") as (mount, guests):
        pool = mount / "pool"
        before = [snapshot(root) for root in guests]
        unify(tool, "web", "db", "--pool", pool)
        for spared in range(8):  # the last of them are needed by turns for stage, locks and intents
            ballast = _use_up_inodes(mount)
            for path in ballast[len(ballast) - spared :]:
                path.unlink()
            done = tool("vunify", "--all", "--pool", pool)
            assert done.returncode in (0, 9, 20), done.stderr
            assert "Traceback" not in done.stderr
            _check_kept(before, guests, pool)
            if not done.returncode:
                break
        for path in mount.glob("ballast*"):
            path.unlink()
        unify(tool, "--all", "--pool", pool)
        _check_kept(before, guests, pool)
        assert len({inode_of(root / "lib/7") for root in guests}) == 1


@on("ext4")
def test_a_disk_too_full_for_a_pool(site: Site, tool: Tool) -> None:
    with _small(site, "ext4", 32 << 20, "web", "db") as (mount, guests):
        before = [snapshot(root) for root in guests]
        ballast = _fill(mount)
        said = _refuse(tool, 9, "--all", "--pool", mount / "pool")
        assert "No space left on device" in said
        assert [differences(*pair) for pair in zip(before, map(snapshot, guests), strict=True)] == [
            [],
            [],
        ]
        for path in ballast:
            path.unlink()
        assert unify(tool, "--all", "--pool", mount / "pool").unified == 2 * _FILES


@on("ext4")
def test_json_of_a_failure_is_no_half_report(site: Site, tool: Tool) -> None:
    done = tool("vunify", "nobody", "--json")
    assert done.returncode == 3
    assert done.stdout == ""


@on("ext4")
def test_names_in_messages_are_harmless(site: Site, tool: Tool) -> None:
    done = tool("vunify", "web\x1b[31m\nroot", "--root", "/no\x1b]0;title\x07where")
    assert done.returncode in (2, 3)
    assert "\x1b" not in done.stderr
    assert "\x07" not in done.stderr
