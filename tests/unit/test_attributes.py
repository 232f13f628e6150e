"""Attributes are shown without touching what is looked at, and asked for as the original did."""

import json
import os
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.fixtures.hostile import odd_tree
from tests.fixtures.trees import File, grow
from vstore.attributes import NONE, Attribute, Reach, parse_attributes, plan_immutable, show
from vstore.commands import setattr as setattr_command
from vstore.commands import showattr as showattr_command
from vstore.errors import NotPermitted, WrongUsage

BOTH = Attribute.IMMUTABLE | Attribute.IUNLINK
CONTENTS = Reach(contents=True)
ALL = Reach(contents=True, recursive=True)


def shown(start: Path, reach: Reach) -> dict[str, str]:
    """Path below `start` -> letters."""
    found = {os.fsdecode(item.path): item.letters for item in show(os.fsencode(start), reach)}
    return {os.path.relpath(path, start): letters for path, letters in found.items()}


# --- what is asked for


@pytest.mark.parametrize(
    ("wanted", "unwanted", "plan"),
    [
        (Attribute.IMMUTABLE, NONE, True),
        (BOTH, NONE, True),
        (NONE, Attribute.IMMUTABLE, False),
        (NONE, BOTH, False),
        (BOTH, Attribute.IMMUTABLE | Attribute.IUNLINK, False),
        (Attribute.IMMUTABLE, Attribute.BARRIER, True),
        (NONE, Attribute.BARRIER, None),
        (NONE, Attribute.IUNLINK, None),
        (Attribute.COW, Attribute.COW, None),
    ],
)
def test_what_names_come_to_here(wanted: Attribute, unwanted: Attribute, plan: bool | None) -> None:
    assert plan_immutable(wanted, unwanted) is plan


@pytest.mark.parametrize(
    ("wanted", "unwanted", "name"),
    [
        (Attribute.BARRIER, NONE, "barrier"),
        (Attribute.IUNLINK, NONE, "iunlink"),
        (BOTH, Attribute.IMMUTABLE, "iunlink"),
        (Attribute.IMMUTABLE | Attribute.ADMIN | Attribute.COW, NONE, "admin, cow"),
    ],
)
def test_what_a_stock_kernel_has_not_is_refused(
    wanted: Attribute, unwanted: Attribute, name: str
) -> None:
    with pytest.raises(NotPermitted, match=f"no attribute {name}$"):
        plan_immutable(wanted, unwanted)


@pytest.mark.parametrize("text", ["262144", "0x40000", "0o1000000"])
def test_numbers_of_attributes(text: str) -> None:
    assert parse_attributes(text) == Attribute.IMMUTABLE


@pytest.mark.parametrize("text", ["", "x", "-1", "0x10", "0x80000000"])
def test_what_is_no_number_of_attributes(text: str) -> None:
    with pytest.raises(WrongUsage):
        parse_attributes(text)


# --- showattr


def test_letters_by_kind(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(tmp_path / "socket"))
    letters = shown(tmp_path, CONTENTS)
    assert letters.pop("file") in ("------i--", "---------")
    assert letters.pop("folder") in ("------i--", "---------")
    assert letters == dict.fromkeys(("link", "fifo", "socket"), "---------")


def test_a_directory_stands_for_what_is_in_it(tmp_path: Path) -> None:
    grow(tmp_path / "tree", [File("b"), File("a"), File(".h"), File("sub/c"), File("sub/.d/e")])
    tree = tmp_path / "tree"
    assert list(shown(tree, Reach())) == ["."]
    assert list(shown(tree, CONTENTS)) == [".h", "a", "b", "sub"]
    assert list(shown(tree, ALL)) == [".h", "a", "b", "sub", "sub/.d", "sub/c", "sub/.d/e"]
    no_dots = Reach(contents=True, recursive=True, hidden=False)
    assert list(shown(tree, no_dots)) == ["a", "b", "sub", "sub/c"]
    assert list(shown(tree / "a", ALL)) == ["."]


def test_symlinks_are_not_followed(tmp_path: Path) -> None:
    grow(tmp_path / "outside", [File("secret")])
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/link").symlink_to(tmp_path / "outside")
    assert list(shown(tmp_path / "tree", ALL)) == ["link"]
    assert list(shown(tmp_path / "tree/link", ALL)) == ["."]


def test_odd_names(tmp_path: Path) -> None:
    rows = odd_tree()
    grow(tmp_path / "odd", rows)
    assert len(shown(tmp_path / "odd", ALL)) == len(rows)


def test_what_is_missing_is_an_error(tmp_path: Path) -> None:
    (missing,) = show(os.fsencode(tmp_path / "gone"), ALL)
    assert missing.letters == "ERR"
    assert missing.error is not None
    assert "gone: No such file" in missing.error.message


def test_showattr_lines(tmp_path: Path) -> None:
    (tmp_path / "a\x1b").touch()
    done = CliRunner().invoke(showattr_command.command, [os.fspath(tmp_path)])
    (line,) = done.stdout.splitlines()
    assert line[:6] == "------"
    assert line[9:] == f" {tmp_path}/a\\x1b"


def test_showattr_without_files_shows_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").touch()
    (tmp_path / ".b").touch()
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(showattr_command.command, [])
    assert [line.split()[1] for line in done.stdout.splitlines()] == ["./a"]


def test_showattr_json(tmp_path: Path) -> None:
    (tmp_path / "\udcff").touch()
    done = CliRunner().invoke(
        showattr_command.command, ["--json", os.fspath(tmp_path), "/nowhere/at/all"]
    )
    first, second = map(json.loads, done.stdout.splitlines())
    assert first["path"] == f"{tmp_path}/\udcff"
    assert (first["format"], first["immutable"], "error" in first) == (1, False, False)
    assert second["letters"] == "ERR"
    assert "No such file" in second["error"]


@pytest.mark.parametrize(
    ("names", "code"), [(["a"], 0), (["a", "gone"], 20), (["gone"], 1), (["", "a"], 20)]
)
def test_showattr_exit_code(tmp_path: Path, names: list[str], code: int) -> None:
    (tmp_path / "a").touch()
    files = [os.fspath(tmp_path / name) if name else "" for name in names]
    result = showattr_command.command.main(["-d", *files], standalone_mode=False)
    assert result == code


# --- setattr


def test_setattr_wants_a_file() -> None:
    done = CliRunner().invoke(setattr_command.command, ["--immutable"])
    assert done.exit_code == 2
    assert "FILE" in done.stderr


@pytest.mark.parametrize("arguments", [[], ["-R"], ["-x"]])
def test_setattr_wants_an_attribute(tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(WrongUsage, match="no attribute is named"):
        setattr_command.command.main([*arguments, os.fspath(tmp_path)], standalone_mode=False)


@pytest.mark.parametrize("name", ["barrier", "admin", "watch", "hide", "write", "cow", "ixunlink"])
def test_setattr_refuses_what_is_not_there_and_clears_it(tmp_path: Path, name: str) -> None:
    command, path = setattr_command.command, os.fspath(tmp_path)
    with pytest.raises(NotPermitted):
        command.main([f"--{name}", path], standalone_mode=False)
    for prefix in "~!":
        assert command.main([f"--{prefix}{name}", path], standalone_mode=False) == 0


def test_setattr_adds_numbers_to_names(tmp_path: Path) -> None:
    command, path = setattr_command.command, os.fspath(tmp_path)
    with pytest.raises(NotPermitted, match=r"no attribute admin, watch$"):
        command.main(["--watch", "--flags", "1", path], standalone_mode=False)
    assert command.main(["--watch", "--flags=1", "--~flags", "3", path], standalone_mode=False) == 0
