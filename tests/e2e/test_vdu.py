"""vdu as installed: tables, JSON, exit codes."""

import json
import re
from pathlib import Path

import pytest

from tests.conftest import Tool
from tests.fixtures.filesystems import Site
from tests.fixtures.probes import need, on
from tests.fixtures.runs import list_objects, unify
from tests.fixtures.trees import File, Folder, Row, grow

pytestmark = [need("root", "immutable"), on("ext4")]

SHARED = b"shared by all " * 1_000
ODD = "escape\x1b[31m"


@pytest.fixture
def two(site: Site, tool: Tool) -> Site:
    """The unified guests web and db."""
    rows: list[Row] = [File("a", SHARED), File("b", b"other " * 2_000), Folder("etc")]
    for name in ("web", "db"):
        site.add_guest(name, [*rows, File("etc/hostname", name.encode())])
    unify(tool)
    return site


def report(tool: Tool, *arguments: str | Path) -> dict[str, object]:
    done = tool("vdu", "--json", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, object] = json.loads(done.stdout)
    return found


def names(tool: Tool, *arguments: str | Path) -> list[str]:
    guests = report(tool, *arguments)["guests"]
    assert isinstance(guests, list)
    return [guest["name"] for guest in guests]


# --- JSON


def test_json_has_these_keys_and_no_others(two: Site, tool: Tool) -> None:
    found = report(tool)
    on_disk = sum(path.stat().st_blocks * 512 for path in list_objects(two.pool))
    own = 4096 * 3
    assert found == {
        "format": 1,
        "guests": [
            {
                "name": name,
                "apparent_bytes": len(SHARED) + 12_000 + len(name),
                "own_bytes": own,
                "shared_bytes": on_disk,
                "files": 3,
            }
            for name in ("db", "web")
        ],
        "pool": {"objects": 2, "bytes": on_disk, "saved_bytes": on_disk},
    }


def test_json_counts_inodes_on_demand(two: Site, tool: Tool) -> None:
    guests = report(tool, "--inodes", "web")["guests"]
    assert isinstance(guests, list)
    assert (guests[0]["own_inodes"], guests[0]["shared_inodes"]) == (3, 2)


def test_without_a_pool_there_are_the_guests_figures_alone(site: Site, tool: Tool) -> None:
    site.add_guest("web", [File("a", SHARED)])
    assert report(tool)["pool"] is None
    done = tool("vdu")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 2
    assert not site.pool.exists()


# --- tables


def test_the_tables_show_rounded_sizes(two: Site, tool: Tool) -> None:
    done = tool("vdu", "web")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "guest  files  apparent       own    shared\n"
        "web        3  25.4 KiB  12.0 KiB  28.0 KiB\n"
        "\n"
        f"{'pool':{len(str(two.pool))}}  objects   on disk     saved  unused\n"
        f"{two.pool}        2  28.0 KiB  28.0 KiB     0 B\n"
    )


def test_the_tables_show_bytes_and_inodes_on_demand(two: Site, tool: Tool) -> None:
    lines = tool("vdu", "--bytes", "--inodes", "db").stdout.splitlines()
    assert re.split(r"  +", lines[0])[-2:] == ["own inodes", "shared inodes"]
    assert lines[1].split() == ["db", "3", "26002", "12288", "28672", "3", "2"]
    assert lines[-1].split()[1:] == ["2", "28672", "28672", "0"]


# --- which guests


def test_all_are_meant_when_none_is_named_disabled_ones_too(two: Site, tool: Tool) -> None:
    (two.confdir / "web" / "disabled").touch()
    assert names(tool) == names(tool, "--all") == ["db", "web"]
    assert names(tool, "web") == ["web"]


def test_a_plain_tree_is_measured(two: Site, tool: Tool) -> None:
    tree = grow(two.filesystem.folder / "tree", [File("a", SHARED)])
    assert names(tool, "--root", tree) == [str(tree)]
    assert names(tool, "db", "--root", tree) == ["db", str(tree)]


def test_a_guest_whose_root_is_missing_does_not_hide_the_others(two: Site, tool: Tool) -> None:
    two.register("gone", two.root("gone"))
    done = tool("vdu", "--json")
    assert done.returncode == 0
    assert "gone" in done.stderr
    assert [guest["name"] for guest in json.loads(done.stdout)["guests"]] == ["db", "web"]
    assert tool("vdu", "gone").returncode == 3


def test_the_name_of_a_tree_is_shown_harmless(site: Site, tool: Tool) -> None:
    tree = grow(site.filesystem.folder / ODD, [File("a", SHARED)])
    done = tool("vdu", "--root", tree)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert "escape\\x1b[31m" in done.stdout


# --- what is refused


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nobody"], 3, "nobody"),
        (["../etc"], 2, "cannot be a guest's name"),
        (["--all", "web"], 2, "--all"),
        (["--pool", "/nowhere"], 2, "/nowhere"),
        (["--no-such-option"], 2, "--no-such-option"),
        (["--root", "/nowhere"], 3, "/nowhere"),
    ],
)
def test_exit_codes(two: Site, tool: Tool, arguments: list[str], code: int, words: str) -> None:
    done = tool("vdu", *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_no_guest_at_all(site: Site, tool: Tool) -> None:
    done = tool("vdu")
    assert done.returncode == 2
    assert "no guest is configured" in done.stderr


def test_a_newer_pool_is_refused(two: Site, tool: Tool) -> None:
    (two.pool / "format").write_text("vserver-tools pool 99\n")
    done = tool("vdu")
    assert done.returncode == 8
    assert "pool 99" in done.stderr
