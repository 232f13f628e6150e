"""The ssh channel by itself: how it keeps up with a limited line, near and 100 ms away, and with
ssh(1).
"""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import channels
from tests.fixtures.filesystems import private_folder
from tests.fixtures.probes import need, scaled
from tests.fixtures.sshd import Server, run_sshd

pytestmark = [need("root", "sshd"), pytest.mark.timeout(300)]

_RATE = 8e6  # bytes a second
_TRIES = 5


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with private_folder() as folder, run_sshd(folder / "sshd") as found:
        yield found


def _send(server: Server, **what: float) -> channels.Carried:
    folder = os.fspath(Path(__file__).parents[2])
    way = channels.Way("127.0.0.1", server.port, os.fspath(server.key), folder, **what)  # type: ignore[arg-type]
    return channels.send(way, server.folder / "known")


def test_a_long_way_takes_no_more_than_a_fifth_of_a_limited_line(server: Server) -> None:
    """100 ms there and back: the window does not run dry. The best of some tries counts."""
    mib = scaled(6, 60)
    parts = []
    for _ in range(_TRIES):
        near = _send(server, mib=mib, rate=_RATE)
        far = _send(server, mib=mib, rate=_RATE, delay_s=0.05)
        assert near.bytes == far.bytes == mib << 20
        parts.append((near.seconds + 0.1) / far.seconds)  # the last word is 100 ms under way
        if parts[-1] >= 0.8:
            break
    assert max(parts) >= 0.8


def test_bytes_and_objects_go_about_as_fast_as_with_ssh(server: Server) -> None:
    """Beside `ssh host cat` on the same machine, in turn; the best of some tries counts."""
    mib = scaled(48, 400)
    ssh = ["ssh", "-F", "none", "-p", f"{server.port}", "-i", os.fspath(server.key)]
    known = ["-o", f"UserKnownHostsFile={server.known_hosts()}"]
    parts, objects = [], []
    for _ in range(_TRIES):
        began = time.perf_counter()
        with subprocess.Popen(
            [*ssh, *known, "root@127.0.0.1", "cat >/dev/null"], stdin=subprocess.PIPE
        ) as process:
            assert process.stdin is not None
            for _ in range(mib):
                process.stdin.write(bytes(1 << 20))
        theirs = (mib << 20) / (time.perf_counter() - began) / 1e6
        ours = _send(server, mib=mib)
        parts.append(ours.mb_per_s / theirs)
        objects.append(_send(server, objects=scaled(40_000, 400_000)).objects_per_s)
        if parts[-1] >= 0.5 and objects[-1] >= 20_000:
            break
    assert max(parts) >= 0.5
    assert max(objects) >= 20_000
