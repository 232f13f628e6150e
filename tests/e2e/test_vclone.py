"""vclone as installed: what it says, where, and with which exit code."""

import json
from pathlib import Path

import pytest

from tests.conftest import Tool
from tests.fixtures.filesystems import Site
from tests.fixtures.probes import need, on
from tests.fixtures.runs import unify
from tests.fixtures.trees import COPY_MAY_DIFFER, File, Link, differences, snapshot

pytestmark = [need("root", "immutable", "lease"), on("ext4")]


@pytest.fixture
def source(site: Site, tool: Tool) -> Path:
    """The tree of the guest `web`, which shares two files with another one."""
    rows = [File(f"lib/{number}", b"content %d " % number * 99) for number in range(2)]
    root = site.add_guest("web", [*rows, File("own", b"1" * 1000), Link("own too", "own")])
    site.add_guest("db", rows)
    unify(tool)
    return root


def test_it_says_what_it_made(site: Site, tool: Tool, source: Path) -> None:
    done = tool("vclone", "web", site.root("new"))
    assert (done.returncode, done.stderr) == (0, "")
    lines = dict(line.rsplit(maxsplit=1) for line in done.stdout.splitlines()[1:])
    assert lines.pop("seconds")
    assert lines["links to objects"] == "2"
    assert (lines["copies"], lines["folders"]) == ("2", "2")
    assert done.stdout.startswith(f"clone {site.root('new')}\n")


def test_json_has_the_documented_keys(site: Site, tool: Tool, source: Path) -> None:
    done = tool("vclone", "--json", "web", site.root("new"))
    report = json.loads(done.stdout)
    assert report.pop("seconds") >= 0
    assert report == {
        "format": 1,
        "target": f"{site.root('new')}",
        "linked": 2,
        "copied": 2,
        "copied_bytes": 1000,
        "folders": 2,
        "skipped": {},
        "errors": [],
    }


def test_quiet_says_nothing(site: Site, tool: Tool, source: Path) -> None:
    done = tool("vclone", "-q", "web", site.root("new"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_trees_and_pools_can_be_named(site: Site, tool: Tool, source: Path) -> None:
    pool = site.filesystem.folder / "elsewhere"
    site.pool.rename(pool)
    assert tool("vclone", "web", site.root("new")).returncode == 2
    done = tool("vclone", source, site.root("new"), "--pool", pool)
    assert done.returncode == 0, done.stderr
    found = differences(snapshot(source), snapshot(site.root("new")), ignoring=COPY_MAY_DIFFER)
    assert found == []


def test_a_second_clone_into_the_same_target_is_refused(
    site: Site, tool: Tool, source: Path
) -> None:
    assert tool("vclone", "web", site.root("new")).returncode == 0
    before = snapshot(site.root("new"))
    done = tool("vclone", "web", site.root("new"))
    assert done.returncode == 2
    assert "hint: " in done.stderr
    assert snapshot(site.root("new")) == before
