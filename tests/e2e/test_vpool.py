"""vpool as installed: what it says, where, and with which exit code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Tool
from tests.fixtures.death import add_orphan, spoil, thawed_by_force
from tests.fixtures.filesystems import Site
from tests.fixtures.probes import need, on
from tests.fixtures.runs import list_objects, unify
from tests.fixtures.stepper import Scene, Step, command, run_traced
from tests.fixtures.trees import File, Row
from vstore.commands import vunify

pytestmark = [need("root", "immutable", "lease"), on("ext4")]


def _rows(count: int = 4) -> list[Row]:
    return [File(f"lib/{number}", b"content %d " % number * 999) for number in range(count)]


def _add_unified(site: Site, tool: Tool) -> Path:
    roots = [site.add_guest(name, _rows()) for name in ("web", "db", "mail")]
    unify(tool)
    return roots[0]


def _status(tool: Tool, *arguments: str | Path) -> dict[str, object]:
    done = tool("vpool", "status", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    report: dict[str, object] = json.loads(done.stdout)
    return report


def test_status_counts_what_is_there(site: Site, tool: Tool) -> None:
    web = _add_unified(site, tool)
    size = list_objects(site.pool)[0].stat().st_blocks * 512
    spoil(list_objects(site.pool)[0])
    assert tool("vpool", "verify", "--repair").returncode == 5
    add_orphan(site, b"nobody's " * 99)
    found = _status(tool)
    assert found.pop("index_bytes")
    assert found == {
        "format": 1,
        "pool": os.fspath(site.pool),
        "objects": 4,
        "bytes": 3 * size + 4096,
        "links": 9,
        "saved_bytes": 6 * size,
        "unused_objects": 1,
        "unused_bytes": 4096,
        "quarantined": 1,
        "quarantined_bytes": size,
        "programs": 0,
        "leftovers": 0,
        "index_digests": found["index_digests"],
    }
    said = tool("vpool", "status").stdout
    for line in ("objects", "links", "saved", "unused objects", "in quarantine", "index: "):
        assert f"\n{line}" in said
    assert tool("vpool", "rm", web).returncode == 0
    assert _status(tool)["links"] == 6


def _kill_at_first_link(step: Step, scene: Scene) -> None:
    if step.call == "linkat":
        scene.kill(*scene.pids)


def test_status_names_what_a_killed_program_left_and_the_next_run_settles_it(
    site: Site, tool: Tool
) -> None:
    _add_unified(site, tool)
    site.add_guest("new", _rows())
    assert run_traced(command(vunify.main, "--all"), _kill_at_first_link).code < 0
    assert _status(tool)["leftovers"] == 1
    assert tool("vpool", "verify").returncode == 0
    assert _status(tool)["leftovers"] == 0


def test_the_index_is_forgotten_and_made_anew(site: Site, tool: Tool) -> None:
    _add_unified(site, tool)
    assert tool("vpool", "forget-index").returncode == 0
    assert not list(site.pool.glob("index.sqlite*"))
    assert (_status(tool)["index_bytes"], _status(tool)["index_digests"]) == (0, 0)
    assert tool("vpool", "status").stdout.endswith("index: none\n")
    assert unify(tool).already == 12
    (site.pool / "index.sqlite").write_bytes(b"no database at all" * 999)
    assert _status(tool)["index_digests"] is None
    assert tool("vpool", "verify").returncode == 0


def test_the_pool_can_be_named(site: Site, tool: Tool) -> None:
    web = _add_unified(site, tool)
    pool = site.filesystem.folder / "elsewhere"
    site.pool.rename(pool)
    for words in (["status"], ["verify"], ["reclaim", "-n"], ["forget-index"]):
        assert tool("vpool", *words, "--pool", pool).returncode == 0
        done = tool("vpool", *words)
        assert done.returncode == 2
        assert f"vpool: {site.pool}: no pool here" in done.stderr
    path = web / "lib/0"
    assert tool("vpool", "break", path).returncode == 2
    assert tool("vpool", "break", path, "--pool", pool).stdout == f"{path}: broken\n"
    assert tool("vpool", "rm", web, "--pool", pool).returncode == 0


def test_a_pool_of_a_newer_format_is_refused(site: Site, tool: Tool) -> None:
    web = _add_unified(site, tool)
    (site.pool / "format").write_text("vserver-tools pool 2\n")
    words = [["status"], ["verify"], ["reclaim"], ["forget-index"]]
    for arguments in [*words, ["break", f"{web}/lib/0"], ["rm", f"{web}"]]:
        done = tool("vpool", *arguments)
        assert done.returncode == 8, arguments
        assert "vserver-tools pool 2" in done.stderr


@pytest.mark.parametrize("word", ["break", "rm"])
def test_without_a_path_the_command_line_is_wrong(site: Site, tool: Tool, word: str) -> None:
    done = tool("vpool", word)
    assert (done.returncode, done.stdout) == (2, "")


def test_verify_ends_with_5_until_all_is_good(site: Site, tool: Tool) -> None:
    web = _add_unified(site, tool)
    with thawed_by_force(web / "lib/1"):
        (web / "lib/1").chmod(0o4755)
    done = tool("vpool", "verify")
    assert done.returncode == 5
    assert done.stdout.endswith(": 1 wrong\n")
    done = tool("vpool", "verify", "--repair")
    assert done.returncode == 0, done.stdout  # its own content is good
    assert "all good, 1 repaired" in done.stdout
    assert tool("vpool", "verify").returncode == 0


def test_a_reader_that_goes_away_ends_it_quietly(site: Site, tool: Tool) -> None:
    web = _add_unified(site, tool)
    spoil(web / "lib/0")
    shell = f"{Path(sys.executable).parent}/vpool verify | true"
    done = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True)
    assert "Traceback" not in done.stderr
