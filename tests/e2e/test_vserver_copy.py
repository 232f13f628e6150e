"""vserver-copy between two machines over a real sshd: what it copies, what it says, its codes."""

import itertools
import json
import mmap
import os
import re
import shlex
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Tool
from tests.fixtures.filesystems import Site, has_tools, is_immutable
from tests.fixtures.persons import at_terminal
from tests.fixtures.probes import need, on
from tests.fixtures.runs import find_faults, unify
from tests.fixtures.sshd import PROGRAM, Machines, two_machines
from tests.fixtures.trees import COPY_MAY_DIFFER, File, Row, differences, snapshot

pytestmark = [need("root", "immutable", "lease", "sshd"), on("ext4")]

_KEYS = {
    "format",
    "target",
    "path",
    "context",
    "dry_run",
    "same",
    "files",
    "files_sent",
    "bytes_total",
    "bytes_already_there",
    "bytes_lacking",
    "bytes_sent",
    "bytes_received",
    "linked",
    "changed",
    "errors",
    "seconds",
    "downtime_seconds",
}


def rows(seed: int = 0) -> list[Row]:
    shared: list[Row] = [
        File(f"usr/lib/{number}", b"shared %d " % number * 200) for number in range(40)
    ]
    own: list[Row] = [File(f"srv/{seed}-{n}", os.urandom(3000)) for n in range(5)]
    return [*shared, *own, File("etc/hostname", b"web\n"), File("var/log/syslog", b"line\n" * 99)]


@pytest.fixture
def machines(site: Site) -> Iterator[Machines]:
    with two_machines(site) as found:
        found.here.add_guest("web", rows())
        yield found


def copy(
    tool: Tool, machines: Machines, *arguments: str | Path, code: int = 0
) -> subprocess.CompletedProcess[str]:
    done = tool("vserver-copy", *machines.options(), *arguments)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def equal(machines: Machines, source: str, target: str) -> list[str]:
    return differences(
        snapshot(machines.here.root(source)),
        snapshot(machines.there.root(target)),
        ignoring=COPY_MAY_DIFFER,
    )


def test_a_guest_is_pushed_and_pulled_and_arrives_unified(machines: Machines, tool: Tool) -> None:
    report = json.loads(copy(tool, machines, "--json", "web", "root@127.0.0.1:").stdout)
    assert set(report) == _KEYS
    assert report["files"] == 47
    assert report["bytes_already_there"] + report["bytes_lacking"] == report["bytes_total"]
    assert equal(machines, "web", "web") == []
    assert is_immutable(machines.there.root("web") / "usr/lib/1")
    assert not is_immutable(machines.there.root("web") / "var/log/syslog")
    assert find_faults(machines.there.pool) == []
    assert (machines.there.confdir / "web/vdir").readlink() == machines.there.root("web")
    copy(tool, machines, "root@127.0.0.1:web", "back")
    assert equal(machines, "back", "web") == []
    assert find_faults(machines.here.pool) == []


def test_a_sibling_costs_its_own_files_alone(machines: Machines, tool: Tool) -> None:
    copy(tool, machines, "-q", "web", "127.0.0.1:web")
    machines.here.add_guest("db", rows(1))
    report = json.loads(copy(tool, machines, "--json", "db", "127.0.0.1:db").stdout)
    assert report["files_sent"] == 5 + 2  # of the others two are private: host name and log
    assert report["bytes_lacking"] == 15_000 + 4 + 495
    assert equal(machines, "db", "db") == []
    numbers = [(machines.there.root(name) / "usr/lib/7").stat().st_ino for name in ("web", "db")]
    assert numbers[0] == numbers[1]


def test_an_unchanged_copy_is_found_out_at_once(machines: Machines, tool: Tool) -> None:
    copy(tool, machines, "-q", "web", "127.0.0.1:web")
    before = machines.there.root("web").stat().st_ino
    done = copy(tool, machines, "--refresh", "web", "127.0.0.1:web")
    assert "nothing to do" in done.stdout
    report = json.loads(copy(tool, machines, "--refresh", "--json", "web", "127.0.0.1:").stdout)
    assert report["same"] is True
    assert report["bytes_sent"] < 3000
    assert machines.there.root("web").stat().st_ino == before


def test_what_a_login_says_is_acknowledged_at_once_and_a_content_is_not(
    machines: Machines, tool: Tool
) -> None:
    """As strace(1) shows: an acknowledgement for each read would be too many for a guest.

    Only those are counted that something was read after: a slow machine asks again while it waits.
    """
    if not has_tools("strace"):
        pytest.skip("strace is not installed")
    (machines.here.root("web") / "big").write_bytes(os.urandom(16 << 20))
    copy(tool, machines, "-q", "web", "127.0.0.1:web")
    trace = machines.here.filesystem.folder / "trace"
    calls = "trace=setsockopt,recvfrom"
    command: list[str | Path] = ["strace", "-f", "-qq", "-e", calls, "-o", trace]
    command += [PROGRAM, *machines.options(), "-q", "127.0.0.1:web", "back"]
    subprocess.run(command, check=True, timeout=100)
    lines = [line for line in trace.read_text().splitlines() if "resumed>" not in line]
    by_thread = itertools.pairwise(sorted(lines, key=lambda line: line.split()[0]))
    reads = ["TCP_QUICKACK, [1]" in before for before, line in by_thread if "recvfrom(" in line]
    assert 5 < sum(reads) < 60


def test_a_refresh_brings_what_changed_and_takes_what_went(machines: Machines, tool: Tool) -> None:
    unify(tool)
    copy(tool, machines, "-q", "web", "127.0.0.1:web")
    root = machines.here.root("web")
    (root / "srv/0-1").write_bytes(b"new content " * 99)
    (root / "srv/0-2").unlink()
    (root / "srv/fresh").write_bytes(b"fresh " * 99)
    (root / "var/log").chmod(0o700)
    assert equal(machines, "web", "web") != []
    report = json.loads(copy(tool, machines, "--refresh", "--json", "web", "127.0.0.1:").stdout)
    assert report["files_sent"] == 2
    assert equal(machines, "web", "web") == []
    assert find_faults(machines.there.pool) == []
    assert [path.name for path in machines.there.vdirbase.iterdir() if ".copy-" in path.name] == []


def test_a_dry_run_changes_nothing_and_says_what_would_be_sent(
    machines: Machines, tool: Tool
) -> None:
    report = json.loads(copy(tool, machines, "-n", "--json", "web", "127.0.0.1:").stdout)
    assert report["dry_run"] is True
    assert report["files_sent"] == 47
    assert list(machines.there.vdirbase.iterdir()) == []
    assert list(machines.there.confdir.iterdir()) == []
    told = report["bytes_lacking"]
    report = json.loads(copy(tool, machines, "--json", "web", "127.0.0.1:").stdout)
    assert report["bytes_lacking"] == told


@pytest.mark.parametrize("options", [["--verify"], ["--compress", "none"], ["--compress", "9"]])
def test_options_that_change_the_way_not_the_copy(
    machines: Machines, tool: Tool, options: list[str]
) -> None:
    copy(tool, machines, "-q", *options, "web", "127.0.0.1:")
    assert equal(machines, "web", "web") == []


def test_it_says_what_it_did(machines: Machines, tool: Tool) -> None:
    done = copy(tool, machines, "web", "127.0.0.1:new")
    lines = dict(line.rsplit(maxsplit=1) for line in done.stdout.splitlines()[1:])
    assert done.stdout.startswith("copy 127.0.0.1:new\n")
    assert lines["files"] == "47"
    assert done.stderr == ""
    assert copy(tool, machines, "-q", "web", "127.0.0.1:two").stdout == ""


@pytest.mark.parametrize("way", ["push", "pull"])
def test_the_rate_is_kept_in_both_directions(machines: Machines, tool: Tool, way: str) -> None:
    """Whoever sends keeps it: bytes that do not compress take at least their time."""
    site = machines.here if way == "push" else machines.there
    site.add_guest("fat", [File("data", os.urandom(3 << 20))])
    places = ["fat", "127.0.0.1:new"] if way == "push" else ["127.0.0.1:fat", "new"]
    report = json.loads(copy(tool, machines, "--json", "--bwlimit", "1M", *places).stdout)
    assert max(report["bytes_sent"], report["bytes_received"]) > 3 << 20
    assert report["seconds"] > 2.5


def test_progress_shows_bytes_files_and_what_is_saved(machines: Machines, tool: Tool) -> None:
    copy(tool, machines, "-q", "web", "127.0.0.1:")
    command: list[str | Path] = [PROGRAM, *machines.options(), "web", "127.0.0.1:two"]
    with at_terminal(command, size=(24, 160)) as person:
        said = person.wait_for("copy 127.0.0.1:two", timeout_s=60)
        assert person.wait(timeout_s=60) == 0
    assert "47 files" in said
    assert re.search(r"[0-9.]+ [KM]?i?B saved", said), said
    assert "B/s" in said


# --- files that change though no time of them says so


def test_a_store_through_a_mapping_never_arrives_in_halves(machines: Machines, tool: Tool) -> None:
    """A dirty page stays dirty: no store to it changes the file's times, before and while it is
    read. What arrives is one state of the file, or the file is named.
    """
    path = machines.here.root("web") / "srv/mapped"
    path.write_bytes(bytes(24 << 20))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        view[:8] = view[-8:] = bytes(8)
        before = path.stat()
        writing = threading.Event()

        def write() -> None:
            for number in itertools.count():
                if writing.is_set():
                    return
                view[:8] = view[-8:] = number.to_bytes(8, "big")

        thread = threading.Thread(target=write)
        thread.start()
        try:
            done = tool("vserver-copy", *machines.options(), "-q", "web", "127.0.0.1:")
        finally:
            writing.set()
            thread.join()
        assert done.returncode in (0, 20), done.stderr
        if done.returncode:
            assert "srv/mapped: changed while it was read" in done.stderr
        copied = machines.there.root("web") / "srv/mapped"
        assert copied.stat().st_size == before.st_size
        if not done.returncode:  # the first number is written before the last one
            numbers = copied.read_bytes()
            first, last = (int.from_bytes(part, "big") for part in (numbers[:8], numbers[-8:]))
            assert first - last in (0, 1)
        assert find_faults(machines.there.pool) == []
        view.flush()
    copy(tool, machines, "-q", "--refresh", "web", "127.0.0.1:")
    assert equal(machines, "web", "web") == []


# --- what is refused


def test_a_name_that_is_taken_is_refused(machines: Machines, tool: Tool) -> None:
    machines.there.add_guest("web", [File("mine", b"mine")])
    before = snapshot(machines.there.root("web"))
    done = copy(tool, machines, "web", "127.0.0.1:", code=2)
    assert "--refresh" in done.stderr
    assert differences(before, snapshot(machines.there.root("web"))) == []
    (machines.there.root("other") / "x").mkdir(parents=True)
    assert "not empty" in copy(tool, machines, "web", "127.0.0.1:other", code=2).stderr


def test_guests_that_are_not_there_and_names_that_cannot_be(machines: Machines, tool: Tool) -> None:
    copy(tool, machines, "none", "127.0.0.1:", code=3)
    copy(tool, machines, "127.0.0.1:none", "here", code=3)
    copy(tool, machines, "web", "127.0.0.1:../up", code=2)
    copy(tool, machines, "web", "web", code=2)
    copy(tool, machines, "127.0.0.1:a", "127.0.0.1:b", code=2)
    assert list(machines.there.vdirbase.iterdir()) == []


def test_a_program_that_is_missing_there_is_said_with_two_lines(
    machines: Machines, tool: Tool
) -> None:
    arguments = [*machines.options()[:-1], "/nowhere/vserver-copy"]
    done = tool("vserver-copy", *arguments, "web", "root@127.0.0.1:")
    assert done.returncode == 1
    assert "/nowhere/vserver-copy" in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("    ")]
    assert len(lines) == 2
    for line in lines:
        *ssh, _ = shlex.split(line.strip().removeprefix("tar -c --exclude=.venv . | "))
        assert ssh[-1] == "root@127.0.0.1"
        reached = subprocess.run([*ssh, "echo", "here"], capture_output=True, check=True)
        assert reached.stdout == b"here\n"


def test_a_machine_that_does_not_answer_is_said(machines: Machines, tool: Tool) -> None:
    done = tool("vserver-copy", "-F", os.devnull, "-p", "1", "web", "127.0.0.1:")
    assert done.returncode == 1
    assert "127.0.0.1 port 1: Connection refused" in done.stderr


def test_a_connection_that_ends_at_once_is_said(
    machines: Machines, tool: Tool, tmp_path: Path
) -> None:
    config = tmp_path / "config"
    config.write_text("Host other\n  ProxyCommand false\n")
    done = tool("vserver-copy", "-F", config, "web", "other:")
    assert done.returncode == 1
    assert "other: the connection ended before anybody could log in" in done.stderr
