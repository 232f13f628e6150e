"""The README's first session with a guest does what the README shows."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.fixtures.lab import Lab, empty_lab
from tests.fixtures.probes import need
from tests.fixtures.vservers import VSERVER, Host, free_number, host_for_guests

pytestmark = need("root")

_README: Final = Path(__file__).parents[2] / "README.md"
_TITLE: Final = "A guest, from build to stop"
_INDENT: Final = "    "
_PROMPT: Final = "# "
_VDIRBASE: Final = "/var/lib/vservers"
_NUMBER: Final = "40000"

_MASKS: Final = (
    (r"\bin \d+\.\d s:", "in S s:"),
    (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "DATE"),
    (r"^Number of processes: \d+$", "Number of processes: N"),
    (r"^Uptime: \d\d:\d\d$", "Uptime: HH:MM"),
    (r"^ +\d+ (0 +\w+)$", r"PID \1"),
    (r"^(PID 0 +init)(?:\n\1)+$", r"\1"),
    (r"^(LISTEN) +(\d+) +(\d+) +(\S+) +(\S+)$", r"\1 \2 \3 \4 \5"),  # wider in Debian 13
    (r"\s+$", ""),
)
"""What another run shows otherwise, and what stands for it."""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    yield from host_for_guests(tmp_path, monkeypatch)


@pytest.fixture
def network() -> Iterator[Lab]:
    """A network like that of the README's machine: eth0 in 192.0.2.0/24."""
    with empty_lab() as lab:
        lab.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "far")
        for device in ("lo", "eth0", "far"):
            lab.run("ip", "link", "set", device, "up")
        lab.run("ip", "address", "add", "192.0.2.1/24", "dev", "eth0")
        yield lab


def read_session() -> list[tuple[str, str]]:
    """The commands of the section's first block, each with what the README says it prints."""
    section = _README.read_text().partition(f"\n## {_TITLE}\n")[2]
    block = re.search(r"\n\n((?:    .*\n)+)", section)
    assert block, f"the README has no section {_TITLE!r} with a session"
    text = "\n".join(line.removeprefix(_INDENT) for line in block[1].splitlines())
    parts = re.split(rf"^{_PROMPT}", text, flags=re.M)
    assert parts[0] == ""
    session = []
    for part in parts[1:]:
        command, _, output = re.sub(r"\\\n\s*", "", part).partition("\n")
        session.append((command, output))
    return session


def masked(output: str) -> str:
    for pattern, shown in _MASKS:
        output = re.sub(pattern, shown, output, flags=re.M)
    return output


def run(network: Lab, host: Host, number: str, command: str) -> str:
    """What a shell prints for the command, on both of its outputs, in that network; with the
    places of the README, and its number for the guest's.
    """
    done = subprocess.run(
        network.command("sh", "-c", command),
        env={**os.environ, "PATH": f"{VSERVER.parent}:{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    shown = done.stdout.replace(os.fspath(host.etc.vdirbase), _VDIRBASE)
    return re.sub(rf"\b{number}\b", _NUMBER, shown)


def test_the_session_of_the_readme(host: Host, network: Lab) -> None:
    host.etc.vdirbase.rmdir()
    host.names.append("web")
    number = free_number()  # another guest on this machine may have that of the first build
    host.etc.set_defaults({"context.next": number})
    session = read_session()
    assert session[0][0].startswith("vserver web build ")
    assert "vserver web stop" in dict(session)
    seen = [(command, masked(run(network, host, number, command))) for command, _ in session]
    assert seen == [(command, masked(output)) for command, output in session]
    assert "192.0.2.7" not in network.run("ip", "-o", "address")
