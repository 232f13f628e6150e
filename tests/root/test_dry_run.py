"""What --dry-run prints is what the run does, and it changes nothing."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Tool
from tests.fixtures.filesystems import Site
from tests.fixtures.probes import need, on
from tests.fixtures.runs import Report, inode_of, list_objects, stamps, unify
from tests.fixtures.trees import EPOCH_NS, File, Link, Row

pytestmark = need("immutable", "lease")

_SAME = b"the very same content" * 999


def _guests(site: Site) -> list[Path]:
    """Guests with equals, twins, near equals, links, small files, and others of another mtime."""
    rows: list[Row] = [
        *(File(f"lib/{number}", b"%09d" % number * 700) for number in range(40)),
        *(File(f"twin{number}", _SAME) for number in range(3)),
        File("linked", b"a" * 5_000),
        Link("linked too", "linked"),
        File("small", b"a"),
        File("holes", b"data" * 2_048, at=1 << 20, size=1 << 22),
    ]
    guests = []
    for number, name in enumerate(("web", "db", "mail")):
        own: list[Row] = [
            File("own", b"%05d" % number * 3_000),
            File("dated", b"b" * 9_000, mtime_ns=EPOCH_NS + number),
        ]
        guests.append(site.add_guest(name, [*rows[number * 3 :], *own]))
    os.link(guests[0] / "dated", guests[1] / "shared")
    return guests


def _counts(report: Report) -> tuple[object, ...]:
    skipped = sorted(report.skipped.items())
    return (report.seen, report.unified, report.already, report.reclaimed, report.new, skipped)


@pytest.mark.parametrize("option", ["plain", "--ignore-mtime", "--link-twins", "--min-size=9999"])
def test_a_dry_run_prints_exactly_what_the_run_does(site: Site, tool: Tool, option: str) -> None:
    _guests(site)
    options = ["--all"] if option == "plain" else ["--all", option]
    told = unify(tool, *options, "--dry-run")
    done = unify(tool, *options)
    assert _counts(told) == _counts(done)
    assert done.reclaimed > 100_000 or option == "--min-size=9999"
    assert _counts(unify(tool, *options, "--dry-run")) == _counts(unify(tool, *options))


def test_a_dry_run_tells_what_a_guest_that_comes_later_will_share(site: Site, tool: Tool) -> None:
    rows: list[Row] = [File(f"{number}", b"%05d" % number * 3_000) for number in range(20)]
    for name in ("web", "db"):
        site.add_guest(name, rows[:15])
    unify(tool)
    site.add_guest("mail", [*rows, File("twin", b"%05d" % 0 * 3_000)])
    told = unify(tool, "mail", "-n")
    assert (told.unified, told.new) == (15, 0)
    assert _counts(told) == _counts(unify(tool, "mail"))


def test_a_dry_run_changes_nothing_and_makes_no_pool(site: Site, tool: Tool) -> None:
    guests = _guests(site)
    for root in guests:
        root.touch()
    before = [stamps(root) for root in guests]
    report = unify(tool, "--all", "--dry-run")
    assert report.unified > 0
    assert [stamps(root) for root in guests] == before
    assert not site.pool.exists()


def test_a_dry_run_changes_nothing_in_a_pool_that_is_there(site: Site, tool: Tool) -> None:
    guests = _guests(site)
    unify(tool, "web", "db")
    objects = list_objects(site.pool)
    watched = [*guests, site.pool / "objects"]
    before = [stamps(root) for root in watched]
    assert unify(tool, "--all", "--dry-run").unified > 0
    assert [stamps(root) for root in watched] == before
    assert list_objects(site.pool) == objects
    assert list((site.pool / "stage").iterdir()) == []


@on("ext4")
def test_a_dry_run_knows_the_pools_of_the_original_tools(site: Site, tool: Tool) -> None:
    guests = [site.add_guest("web", [File("a", _SAME)]), site.add_guest("db")]
    site.add_guest("mail", [File("b", _SAME)])
    member = site.filesystem.folder / "hashes/5f/5f0c1d"
    member.parent.mkdir(parents=True)
    for path in (member, guests[1] / "a"):
        os.link(guests[0] / "a", path)
    subprocess.run(["chattr", "+i", member], check=True)
    folder = site.confdir / ".defaults/apps/vunify/hash"
    folder.mkdir(parents=True)
    (folder / "root").symlink_to(member.parent.parent)
    told = unify(tool, "--all", "-n")
    assert inode_of(member) == inode_of(guests[0] / "a")
    assert _counts(told) == _counts(unify(tool))


@on("ext4")
def test_a_dry_run_says_so_in_its_table(site: Site, tool: Tool) -> None:
    _guests(site)
    done = tool("vunify", "--all", "--dry-run")
    assert done.returncode == 0
    assert "would be" in done.stdout
    assert "would be" not in tool("vunify", "--all").stdout
