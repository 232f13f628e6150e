"""What a guest writes while it is unified is never lost, and never seen by another guest."""

import json
from pathlib import Path

import pytest

from tests.conftest import Tool
from tests.fixtures import scribbler
from tests.fixtures.filesystems import Site, is_immutable
from tests.fixtures.hostile import mapped, store, writer
from tests.fixtures.probes import need, on, scaled
from tests.fixtures.running import hear, running
from tests.fixtures.runs import find_faults, inodes, unify
from tests.fixtures.trees import EPOCH_NS, MAY_DIFFER, File, Row, differences, snapshot

pytestmark = need("immutable", "lease")

_SAME = b"the very same content"


def _every_state() -> list[Row]:
    return [
        File(f"{kind}/{number}", content, mtime_ns=EPOCH_NS + number)
        for kind in scribbler.KINDS
        for number, content in enumerate(scribbler.states(kind))
    ]


@need("cgroup_freezer")
@pytest.mark.timeout(3600)
def test_no_write_of_a_running_guest_is_lost_over_many_rounds(
    site: Site, cgroup: Path, tool: Tool
) -> None:
    """20 rounds on three file systems together; 200 on each in the long form."""
    web, db = site.add_guest("web"), site.add_guest("db", _every_state())
    before = snapshot(db)
    program = Path(scribbler.__file__).read_text()
    with running(site, "web", cgroup, program, web) as process:
        assert hear(process) == "ready"
        for _ in range(scaled(7, 200)):
            unify(tool, "--all", "--ignore-mtime", "--link-twins")
            assert process.poll() is None
        process.terminate()
        report = json.loads(hear(process))
    assert report["faults"] == []
    assert report["writes"] > 50
    assert report["taken"] > 0
    assert differences(before, snapshot(db), ignoring={*MAY_DIFFER, "mtime_ns"}) == []
    assert find_faults(site.pool) == []


def test_a_file_open_for_writing_is_left_alone(site: Site, tool: Tool) -> None:
    guests = [site.add_guest(name, [File("log", _SAME)]) for name in ("web", "db", "mail")]
    with writer(guests[0] / "log"):
        report = unify(tool)
        assert report.skipped == {"busy": 1}
        assert report.unified == 2
        assert not is_immutable(guests[0] / "log")
    assert unify(tool).unified == 1
    assert len(set(inodes(site, "log", "web", "db", "mail"))) == 1


def test_a_file_mapped_for_writing_is_left_alone(site: Site, tool: Tool) -> None:
    guests = [site.add_guest(name, [File("data", _SAME * 9)]) for name in ("web", "db", "mail")]
    before = snapshot(guests[1])
    with mapped(guests[0] / "data") as process:
        assert unify(tool).skipped == {"busy": 1}
        store(process, "changed")
    assert (guests[0] / "data").read_bytes().startswith(b"changed")
    assert differences(before, snapshot(guests[1])) == []
    assert unify(tool).unified == 0
    assert find_faults(site.pool) == []


@on("ext4")
def test_all_being_busy_makes_no_object(site: Site, tool: Tool) -> None:
    guests = [site.add_guest(name, [File("log", _SAME)]) for name in ("web", "db")]
    with writer(guests[0] / "log"), writer(guests[1] / "log"):
        report = unify(tool)
    assert (report.unified, report.new, report.skipped) == (0, 0, {"busy": 2})
    assert not any(is_immutable(root / "log") for root in guests)


@on("ext4")
def test_one_of_two_being_busy_makes_no_object(site: Site, tool: Tool) -> None:
    guests = [site.add_guest(name, [File("log", _SAME)]) for name in ("web", "db")]
    with writer(guests[0] / "log"):
        report = unify(tool)
    assert (report.unified, report.new) == (0, 0)
    assert report.skipped == {"busy": 1, "unique": 1}
    assert not any(is_immutable(root / "log") for root in guests)


@on("ext4")
def test_a_reader_in_a_guest_makes_nothing_busy_and_keeps_its_file(site: Site, tool: Tool) -> None:
    guests = [site.add_guest(name, [File("data", _SAME)]) for name in ("web", "db")]
    files = [(root / "data").open("rb") for root in guests]
    assert unify(tool).unified == 2
    assert [file.read() for file in files] == [_SAME, _SAME]
    for file in files:
        file.close()
