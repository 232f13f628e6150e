"""vunify as installed: what it says, where, and with which exit code."""

import json
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.conftest import Tool
from tests.fixtures.filesystems import Site, is_immutable, mount_image, private_folder
from tests.fixtures.persons import read_to_end
from tests.fixtures.probes import need, on
from tests.fixtures.runs import inode_of, list_objects, unify
from tests.fixtures.trees import File, Link, Row, grow

pytestmark = [need("root", "immutable", "lease"), on("ext4")]


def _rows(number: int) -> list[Row]:
    return [
        File("usr/bin/tool", b"ELF" * 5_000, mode=0o755),
        File("usr/share/text", b"text" * 5_000),
        File("etc/own", b"%d" % number * 100),
        File("etc/empty"),
        File("etc/small", b"12"),
        File("srv/linked", b"linked" * 99),
        Link("srv/linked too", "srv/linked"),
        File("var/log/syslog", b"the same" * 99),
    ]


def _add_two(site: Site) -> list[Path]:
    return [site.add_guest(name, _rows(number)) for number, name in enumerate(("web", "db"))]


def _table(text: str) -> dict[str, str]:
    """The rows of a printed table: what stands before the last run of blanks, and what after."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    return {row[0]: row[-1] for row in rows if len(row) > 1}


def test_the_table_says_what_became_of_every_file(site: Site, tool: Tool) -> None:
    _add_two(site)
    done = tool("vunify", "web", "db")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0].rstrip() == f"pool {site.pool}"
    seconds = _table(done.stdout).pop("seconds")
    assert float(seconds) < 60
    assert _table(done.stdout) == {
        "files seen": "14",
        "unified now": "4",
        "already unified": "0",
        "skipped: empty": "2",
        "skipped: excluded-folder": "2",
        "skipped: linked": "4",
        "skipped: small": "2",
        "skipped: unique": "2",
        "new objects": "2",
        "reclaimed": "36.0 KiB",
        "seconds": seconds,
    }


def test_a_second_table_says_that_all_is_done(site: Site, tool: Tool) -> None:
    _add_two(site)
    tool("vunify", "--all")
    shown = _table(tool("vunify", "--all").stdout)
    assert (shown["unified now"], shown["already unified"], shown["reclaimed"]) == ("0", "4", "0 B")


def test_a_dry_run_says_what_would_be(site: Site, tool: Tool) -> None:
    guests = _add_two(site)
    shown = _table(tool("vunify", "--all", "-n").stdout)
    assert shown["would be unified"] == "4"
    assert shown["objects to be made"] == "2"
    assert shown["would be reclaimed"] == "36.0 KiB"
    assert not is_immutable(guests[0] / "usr/bin/tool")


def test_json_is_one_object_on_one_line(site: Site, tool: Tool) -> None:
    _add_two(site)
    done = tool("vunify", "--all", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    report = json.loads(done.stdout)
    assert report["format"] == 1
    assert report["pool"] == os.fspath(site.pool)
    assert report["bytes_reclaimed"] == 36 << 10
    assert report["skipped"]["linked"] == 4
    assert report["errors"] == []
    assert report["seconds"] >= 0


def test_quiet_says_nothing(site: Site, tool: Tool) -> None:
    guests = _add_two(site)
    done = tool("vunify", "--all", "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert inode_of(guests[0] / "usr/bin/tool") == inode_of(guests[1] / "usr/bin/tool")


def test_verbose_says_more_on_stderr_alone(site: Site, tool: Tool) -> None:
    _add_two(site)
    done = tool("vunify", "--all", "-vv", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["files_unified"] == 4
    assert all(line.startswith("vunify: ") for line in done.stderr.splitlines())


def test_a_guest_that_cannot_take_part_is_named_and_the_code_says_so(
    site: Site, tool: Tool
) -> None:
    guests = _add_two(site)
    with private_folder() as folder:
        mount = mount_image("ext4", folder, size=32 << 20)
        site.register("far", grow(mount / "far", _rows(2)))
        done = tool("vunify", "--all", "--json")
        report = json.loads(done.stdout)
        assert done.returncode == 20
        assert [name for name, _ in report["errors"]] == ["far"]
        assert "far" in done.stderr
        assert report["files_unified"] == 4
        assert not is_immutable(mount / "far/usr/bin/tool")
    assert inode_of(guests[0] / "usr/bin/tool") == inode_of(guests[1] / "usr/bin/tool")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ((), 2),
        (("--nonsense",), 2),
        (("--all", "web"), 2),
        (("nobody",), 3),
        (("web", "--root", "/etc"), 6),
        (("web", "--exclude-from", "/nowhere/list"), 7),
    ],
)
def test_refusals_go_to_stderr_with_their_codes(
    site: Site, tool: Tool, arguments: tuple[str, ...], code: int
) -> None:
    guests = _add_two(site)
    done = tool("vunify", *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr
    assert "Traceback" not in done.stderr
    assert not is_immutable(guests[0] / "usr/bin/tool")


def test_a_refusal_is_a_message_and_a_hint(site: Site, tool: Tool) -> None:
    _add_two(site)
    lines = tool("vunify", "nobody").stderr.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["vunify", "hint"]


def test_without_root_nothing_is_done_and_the_reason_is_said(site: Site) -> None:
    guests = _add_two(site)
    program = Path(sys.executable).parent / "vunify"
    if _as_nobody("test", "-x", program).returncode == 0:
        done = _as_nobody(program, "--all")
    else:  # a checkout below /root
        reading = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
        done = _as_nobody(*reading, program, "--all")
    assert done.returncode in (1, 2, 4, 6)
    assert "ermission denied" in done.stderr or "not permitted" in done.stderr
    assert "Traceback" not in done.stderr
    assert not is_immutable(guests[0] / "usr/bin/tool")


def _as_nobody(*command: str | Path) -> "subprocess.CompletedProcess[str]":
    """Run a command, which options of setpriv(1) may precede."""
    become: list[str | Path] = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    return subprocess.run([*become, *command], capture_output=True, text=True, check=False)


def test_progress_is_shown_on_a_terminal_alone(site: Site) -> None:
    _add_two(site)
    command = (Path(sys.executable).parent / "vunify", "--all")
    main_fd, terminal_fd = pty.openpty()
    termios.tcsetwinsize(terminal_fd, (24, 80))
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=terminal_fd, text=True, check=True
        )
        os.close(terminal_fd)
        shown = read_to_end(main_fd)
    finally:
        os.close(main_fd)
    assert b"files" in shown
    assert "\r" not in done.stdout
    assert _table(done.stdout)["unified now"] == "4"


def test_undo_says_what_was_copied(site: Site, tool: Tool) -> None:
    guests = _add_two(site)
    tool("vunify", "--all")
    done = tool("vunify", "--undo", "web")
    assert (done.returncode, done.stderr) == (0, "")
    assert _table(done.stdout)["private copies"] == "2"
    assert not is_immutable(guests[0] / "usr/bin/tool")
    assert is_immutable(guests[1] / "usr/bin/tool")


def test_undo_without_a_pool_is_refused(site: Site, tool: Tool) -> None:
    _add_two(site)
    done = tool("vunify", "--undo", "--all")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert not site.pool.exists()


def test_undo_of_a_dry_run_says_what_it_needs(site: Site, tool: Tool) -> None:
    guests = _add_two(site)
    tool("vunify", "--all")
    done = tool("vunify", "--undo", "--dry-run", "--all")
    assert done.returncode == 0
    assert _table(done.stdout)["files to be copied"] == "4"
    assert is_immutable(guests[0] / "usr/bin/tool")


def test_several_runs_at_once_are_safe_and_all_come_to_an_end(site: Site, tool: Tool) -> None:
    for number in range(6):
        site.add_guest(f"guest{number}", _rows(number))
    vunify = Path(sys.executable).parent / "vunify"
    runs = [
        subprocess.Popen([vunify, f"guest{first}", f"guest{first + 1}", "-q"])
        for first in (0, 2, 4)
    ]
    assert [run.wait(60) for run in runs] == [0, 0, 0]
    assert unify(tool).unified == 0
    assert len(list_objects(site.pool)) == 2


def test_the_environment_names_the_places(
    site: Site, tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without VSERVER_VDIRBASE the original's link tells where the guests are."""
    _add_two(site)
    monkeypatch.delenv("VSERVER_VDIRBASE")
    (site.confdir / ".defaults").mkdir()
    (site.confdir / ".defaults/vdirbase").symlink_to(site.vdirbase)
    assert json.loads(tool("vunify", "--all", "--json").stdout)["pool"] == os.fspath(site.pool)
