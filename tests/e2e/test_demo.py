"""`make demo` shows what it promises, and leaves nothing however it ends."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest

from bench import demo
from tests.fixtures.filesystems import mounts_below
from tests.fixtures.probes import need, scaled
from tests.fixtures.witness import wait_until

pytestmark = need("root", "loop", "immutable", "lease", "debootstrap")

_TREE: Final = Path(__file__).parents[2]
_INSIDE: Final = ("\n1 root /sbin/init\n", " root nginx: master process ")
"""Of what ps(1) shows there."""


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Iterator[subprocess.Popen[str]]":
    """The demo at work below `tmp_path`, as a person's terminal has it: a group of its own."""
    monkeypatch.setenv("VTEST_TMP", os.fspath(tmp_path))
    command = [sys.executable, "-m", "bench.demo"]
    with subprocess.Popen(
        command,
        cwd=_TREE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        yield process
        process.kill()


def _read_until(process: "subprocess.Popen[str]", words: str) -> list[str]:
    """The lines up to the first with these words, blanks made one."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(" ".join(line.split()))
        if words in line:
            return lines
    raise AssertionError("\n".join(lines))


def _find_leftovers(folder: Path, settings: dict[str, str]) -> list[str]:
    """What the demo has left of a guest with these settings, and of all below `folder`."""
    found = [os.fspath(path) for path in (*folder.iterdir(), *mounts_below(folder))]
    for place in (f"vservers/{settings['context']}", f"*/vservers/{settings['context']}"):
        found += [os.fspath(path) for path in Path("/sys/fs/cgroup").glob(place)]
    here = f"VSERVER_RUNDIR={folder}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if here in (process / "environ").read_bytes():
                found.append(f"{process}: {(process / 'comm').read_text()}")
        except OSError:
            continue
    for command in (["ip", "-o", "address"], ["losetup", "--list", "--output", "BACK-FILE"]):
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        words = (f" {settings['interfaces/0/ip']}/", os.fspath(folder))
        found += [line for line in shown.splitlines() if any(word in line for word in words)]
    return found


_WAYS: Final = [("stop", signal.SIGINT)]
_MORE_WAYS: Final = [
    ("start", signal.SIGTERM),
    ("exec curl", signal.SIGINT),
    ("exec env", signal.SIGHUP),
    ("stop", 0),
]
"""At which word to `vserver` the demo gets which signal; 0 is none."""


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("moment", "number"), [*_WAYS, *scaled(0, 1) * _MORE_WAYS])
def test_the_demo_boots_a_unified_guest_and_leaves_nothing_however_it_ends(
    running: "subprocess.Popen[str]", tmp_path: Path, moment: str, number: int
) -> None:
    lines = _read_until(running, f"$ vserver {demo.BOOTED} {moment}")
    os.killpg(running.pid, number)
    lines += _read_until(running, "everything is cleaned up")
    assert running.wait(60) == (130 if number else 0)
    shown = "\n".join(lines)
    settings = dict(re.findall(r"^(\S+) (\S+)$", shown, re.M))
    with suppress(AssertionError):  # a device goes when the last that saw it mounted has let go
        wait_until(lambda: not _find_leftovers(tmp_path, settings))
    assert _find_leftovers(tmp_path, settings) == []
    assert "\nunified now 1" in shown  # more than 100,000 files
    if moment != "start":
        assert f"Vserver '{demo.BOOTED}' is running" in shown
        assert all(words in shown for words in _INSIDE)
        assert re.search(rf"LISTEN .* {settings['interfaces/0/ip']}:80 ", shown)
    if moment == "stop":
        assert "HTTP/1.1 200 OK" in lines
        assert re.search(r"^git \S+\+newer1$", shown, re.M)
        _check_the_end(shown)
    if not number:
        assert f"Vserver '{demo.BOOTED}' is stopped; " in shown
        assert ": all good\n" in shown


def _check_the_end(shown: str) -> None:
    """The others are as they were, and what the upgrade took is free again."""
    taken = re.search(r"SHA-256 of nine trees.*: (\w{16})\.\.\.", shown)
    assert taken
    assert f"The nine others: {taken[1]}... as before, unchanged." in shown
    uses = re.search(r"Disk use by statvfs: ([\d,]+) MB after the upgrade, ([\d,]+) MB", shown)
    assert uses
    upgraded, again = (int(use.replace(",", "")) for use in uses.groups())
    assert again < upgraded
