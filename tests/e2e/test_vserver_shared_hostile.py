"""Root in a guest that `vserver` has started attacks the files that it shares, with all that it
has, under the filters and with the capabilities that a guest has by itself.
"""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.conftest import Tool
from tests.fixtures import assault, calls
from tests.fixtures.filesystems import KINDS, Filesystem, thaw_below
from tests.fixtures.intruders import PYTHON, add_intruder
from tests.fixtures.probes import is_soak, need, on
from tests.fixtures.runs import find_faults, list_objects
from tests.fixtures.trees import differences, snapshot
from tests.fixtures.vservers import Host, host_for_guests, is_alive, wait_until
from vstore import lease

pytestmark = [
    need("immutable", "lease"),
    on(*(KINDS if is_soak() else ("ext4",))),
    pytest.mark.timeout(900),
]

_SECONDS: Final = 60 if is_soak() else 5
_FILES: Final = 60
_NAMES: Final = 400 if is_soak() else 100
_MAIN: Final = (
    "import sys; sys.path.insert(0, '/attack'); sys.dont_write_bytecode = True; "
    "from tests.fixtures.assault import main; main()"
)
_JUMPERS: Final = ("swap", "swap", *["open_slowly"] * 4)
_LONGEST_S: Final = 400
_ATTACK: Final = re.compile(r"attack: process (\d+) \(.*\) tried to open .*; killed")


@pytest.fixture
def host(fs: Filesystem, monkeypatch: pytest.MonkeyPatch, tool: Tool) -> Iterator[Host]:
    for host in host_for_guests(fs.folder, monkeypatch):
        for name in ("web", "db"):
            folder = add_intruder(host, name) / "shared"
            folder.mkdir()
            for number in range(_FILES):
                path = folder / f"file{number}"
                path.write_bytes(b"%04d is what all guests have\n" % number * 200)
                os.utime(path, (1_000_000_000, 1_000_000_000))
        done = tool("vunify", "--all")
        assert done.returncode == 0, done.stderr
        _add_names(host)
        fixtures = host.etc.vdirbase / "web/attack/tests/fixtures"
        fixtures.mkdir(parents=True)
        for module in (assault, calls):
            shutil.copy(str(module.__file__), fixtures)
        try:
            yield host
        finally:
            for name in host.names:
                host.try_vserver(name, "stop")
            thaw_below(fs.folder)


def _add_names(host: Host) -> None:
    """Give the guest many names of each shared file, for as many windows."""
    for path in list((host.etc.vdirbase / "web/shared").glob("file*")):
        subprocess.run(["chattr", "-i", path], check=True)
        for number in range(_NAMES):
            os.link(path, f"{path}-{number}")
        subprocess.run(["chattr", "+i", path], check=True)


def _assault(host: Host, seconds: float, *ways: str) -> dict[str, Any]:
    words = ("web", "exec", PYTHON, "-I", "-c", _MAIN, str(seconds), *ways)
    done = host.vserver(*words, timeout_s=seconds + 120)
    told: dict[str, Any] = json.loads(done.stdout)
    assert told["found"] == []
    assert {code for _, code in told["fallen"]} <= {-9}, "one that fell by itself"
    return told


def _status(host: Host) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(host.vserver("web", "status", "--json").stdout)
    return found


def _is_open_for_writing(path: Path) -> bool:
    fd = os.open(path, os.O_RDONLY)
    try:
        return not lease.take(fd)
    finally:
        os.close(fd)


def test_no_shared_file_changes_and_who_jumps_at_a_window_is_named(host: Host) -> None:
    before = snapshot(host.etc.vdirbase / "db")
    pool = host.etc.vdirbase / ".pool"
    host.vserver("web", "start")
    supervisor = _status(host)["supervisor"]
    told = _assault(host, _SECONDS)
    assert all(told["rounds"].values()), told
    fallen = told["fallen"]
    deadline = time.monotonic() + _LONGEST_S
    while not _status(host)["attacks"]:  # nobody was in the right place at the right time
        assert time.monotonic() < deadline, "no window was ever met"
        fallen += _assault(host, 2, *_JUMPERS)["fallen"]
    shown = _status(host)
    named = [int(number) for number in _ATTACK.findall(host.console("web"))]
    assert shown["attacks"] == len(named) >= len(fallen)
    assert {attacker["pid"] for attacker in shown["attackers"]} <= set(named)
    assert f"process {named[-1]} (" in host.vserver("web", "status").stdout
    said = [line for line in host.console("web").splitlines() if "vserver:" in line]
    assert [line for line in said if "attack" not in line] == []
    assert shown["supervisor"] == supervisor
    assert is_alive(supervisor)
    wait_until(lambda: not any(map(_is_open_for_writing, list_objects(pool))), 60)
    host.vserver("web", "stop")
    assert find_faults(pool) == []
    assert differences(before, snapshot(host.etc.vdirbase / "db")) == []
