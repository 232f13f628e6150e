"""A copy that is cut off, spoiled or killed: the old target stays, and the next run sends the rest.

Rows 14 and 15 of what has gone wrong elsewhere.
"""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Tool
from tests.fixtures.filesystems import Site, mount_image, private_folder
from tests.fixtures.probes import is_soak, need, on, scaled
from tests.fixtures.runs import find_faults
from tests.fixtures.sshd import PROGRAM, Machines, remote_command, two_machines
from tests.fixtures.tampering import KINDS, tampering
from tests.fixtures.trees import COPY_MAY_DIFFER, File, Row, differences, snapshot
from tests.fixtures.windows import wait_for

pytestmark = [need("root", "immutable", "lease", "sshd"), on("ext4")]


def _rows(version: int) -> list[Row]:
    """Files that do not compress; some are of one version alone."""
    chance = random.Random(7)  # noqa: S311 - no secret
    common: list[Row] = [File(f"lib/{n}", chance.randbytes(9000)) for n in range(300)]
    common += [File(f"log/{n}", chance.randbytes(9000)) for n in range(20)]
    own = [File(f"own/{version}-{n}", os.urandom(20_000)) for n in range(40)]
    return [*common, *own, File("var/log/big", os.urandom(3 << 20)), File("v", b"%d" % version)]


@pytest.fixture
def machines(site: Site) -> Iterator[Machines]:
    """An old version of the guest is there; a new one, different in some MiB, is here."""
    with two_machines(site) as found:
        found.here.add_guest("web", _rows(1))
        yield found


def _differences(machines: Machines) -> list[str]:
    before, after = (snapshot(site.root("web")) for site in (machines.here, machines.there))
    return differences(before, after, ignoring=COPY_MAY_DIFFER)


def _command(machines: Machines, *arguments: str | Path, port: int = 0) -> list[str | Path]:
    options = machines.options()
    if port:
        options[1] = f"{port}"
    return [PROGRAM, *options, *arguments, "web", "127.0.0.1:"]


def _finish(tool: Tool, machines: Machines, *arguments: str) -> dict[str, Any]:
    done = tool("vserver-copy", *_command(machines, "--json", *arguments)[1:])
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert _differences(machines) == []
    assert find_faults(machines.there.pool) == []
    assert [path for path in machines.there.vdirbase.iterdir() if ".copy-" in path.name] == []
    return report


def _replace(machines: Machines, version: int) -> None:
    """Another version of the guest is here."""
    for path in sorted((machines.here.root("web") / "own").iterdir()):
        path.rename(path.with_name(f"{version}-{path.name.partition('-')[2]}"))
        path.with_name(f"{version}-{path.name.partition('-')[2]}").write_bytes(os.urandom(20_000))
    (machines.here.root("web") / "v").write_text(f"{version}")


def _stop_somewhere(command: list[str | Path], after_s: float, number: int) -> int:
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            process.wait(after_s)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert b"Traceback" not in said, said.decode()
    return process.returncode


@pytest.mark.timeout(1800 if is_soak() else 300)
def test_interrupted_at_random_points_the_old_target_stays_whole(
    machines: Machines, tool: Tool
) -> None:
    """SIGINT, SIGTERM and SIGKILL in turn; the target is at each moment one version, whole."""
    _finish(tool, machines)
    chance = random.Random(1)  # noqa: S311
    began = time.monotonic()
    _finish(tool, machines, "--refresh")
    longest = time.monotonic() - began
    old = snapshot(machines.there.root("web"))
    _replace(machines, 2)
    for turn in range(scaled(9, 200)):
        number = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)[turn % 3]
        after_s = chance.uniform(0.1, 2 * longest)
        code = _stop_somewhere(_command(machines, "--refresh", "-q"), after_s, number)
        now = snapshot(machines.there.root("web"))
        if _differences(machines) == []:
            assert code in (0, -number, 128 + number)
            old = now
            _replace(machines, 3 + turn)
        else:
            assert code != 0
            assert differences(old, now) == []
    _finish(tool, machines, "--refresh")


@pytest.mark.timeout(300)
def test_what_arrived_is_not_sent_again(machines: Machines, tool: Tool) -> None:
    """A line that is cut at three quarters: the next run sends the last quarter.

    What was under way, some MiB in buffers, is lost.
    """
    for number in range(40):
        (machines.here.root("web") / f"more-{number}").write_bytes(os.urandom(1 << 20))
    total = json.loads(tool("vserver-copy", *_command(machines, "-n", "--json")[1:]).stdout)[
        "bytes_lacking"
    ]
    with tampering(machines.server.port, "cut", int(total * 0.75)) as proxy:
        known = machines.server.folder / "known_hosts"
        command = _command(machines, "-q", "--accept-new", port=proxy.port)
        done = subprocess.run(command, capture_output=True, check=False, text=True)
        assert proxy.was_done
        assert done.returncode == 1, done.stderr
        assert "run the command again" in done.stderr
        assert known.exists()
    assert not machines.there.root("web").exists()
    report = _finish(tool, machines)
    assert report["bytes_lacking"] < total * 0.25 + (6 << 20)


@pytest.mark.timeout(900 if is_soak() else 300)
@pytest.mark.parametrize("kind", KINDS[:4])
def test_a_spoiled_line_never_ends_well_with_another_tree(
    machines: Machines, tool: Tool, kind: str
) -> None:
    chance = random.Random(kind)  # noqa: S311
    for turn in range(scaled(3, 40)):
        at = chance.randrange(4000, 5 << 20)
        with tampering(machines.server.port, kind, at) as proxy:
            command = _command(machines, "-q", "--refresh", "--accept-new", port=proxy.port)
            done = subprocess.run(command, capture_output=True, check=False, text=True, timeout=100)
            assert "Traceback" not in done.stderr
            if done.returncode == 0:
                assert _differences(machines) == []
            elif machines.there.root("web").exists():
                assert turn
            _replace(machines, 100 + turn)
    _finish(tool, machines, "--refresh")


@pytest.mark.timeout(200)
def test_a_side_that_is_stopped_ends_the_other_in_time(machines: Machines, tool: Tool) -> None:
    with tampering(machines.server.port, "stall", 2 << 20) as proxy:
        command = _command(machines, "-q", "--accept-new", port=proxy.port)
        began = time.monotonic()
        done = subprocess.run(command, capture_output=True, check=False, text=True, timeout=150)
        assert done.returncode == 1
        assert "run the command again" in done.stderr
        assert time.monotonic() - began < 120
    assert not machines.there.root("web").exists()


def test_two_copies_into_one_target_do_not_meet(machines: Machines, tool: Tool) -> None:
    """The first one stands still, with its target held, until the second has been refused."""
    slow = _command(machines, "-q", "--bwlimit", "1M")
    with subprocess.Popen(slow, stderr=subprocess.PIPE) as first:
        while not [path for path in machines.there.vdirbase.iterdir() if ".copy-" in path.name]:
            assert first.poll() is None
            time.sleep(0.02)
        first.send_signal(signal.SIGSTOP)
        second = tool("vserver-copy", *_command(machines, "-q")[1:])
        first.send_signal(signal.SIGCONT)
        assert second.returncode == 4
        assert "another program copies to it" in second.stderr
        _, said = first.communicate(timeout=60)
    assert first.returncode == 0, said.decode()
    assert _differences(machines) == []


@pytest.mark.timeout(200)
def test_reclaim_in_a_loop_takes_nothing_that_is_needed(machines: Machines, tool: Tool) -> None:
    """Objects that nobody uses are there when the copy begins: it wants just these."""
    _finish(tool, machines)
    places = dict(
        part.partition("=")[::2] for part in remote_command(machines.there).split() if "=" in part
    )
    environment = {**os.environ, **places}
    vpool = PROGRAM.with_name("vpool")
    for _ in range(3):
        subprocess.run([vpool, "rm", machines.there.root("web")], env=environment, check=True)
        (machines.there.confdir / "web" / "vdir").unlink()
        (machines.there.confdir / "web").rmdir()
        copying = _command(machines, "-q", "--bwlimit", "20M")
        with subprocess.Popen(copying, stderr=subprocess.PIPE) as process:
            while process.poll() is None:
                subprocess.run([vpool, "reclaim"], env=environment, check=True, capture_output=True)
            _, said = process.communicate()
        assert process.returncode == 0, said.decode()
        assert _differences(machines) == []
        assert find_faults(machines.there.pool) == []


@pytest.mark.timeout(200)
def test_a_full_disk_there_leaves_the_target_and_keeps_what_arrived(
    machines: Machines, tool: Tool
) -> None:
    with private_folder() as folder:
        mount = mount_image("ext4", folder, size=64 << 20)
        (mount / "guests").mkdir()
        command = machines.command_there.replace(
            f"VSERVER_VDIRBASE={machines.there.vdirbase}", f"VSERVER_VDIRBASE={mount}/guests"
        )
        (machines.here.root("web") / "huge").write_bytes(os.urandom(70 << 20))
        arguments = [*machines.options()[:-1], command]
        done = tool("vserver-copy", *arguments, "-q", "web", "127.0.0.1:")
        assert done.returncode == 9, done.stderr
        assert "free" in done.stderr
        assert [path.name for path in (mount / "guests").iterdir()] == [".pool"]
        (machines.here.root("web") / "huge").unlink()
        done = tool("vserver-copy", *arguments, "-q", "web", "127.0.0.1:")
        assert done.returncode == 0, done.stderr


@pytest.mark.timeout(120)
def test_a_source_that_changes_all_the_time_is_named(machines: Machines, tool: Tool) -> None:
    """It takes longer to read than a busy machine keeps the writer from its turn."""
    big = machines.here.root("web") / "var/log/big"
    big.write_bytes(os.urandom(64 << 20))
    script = 'while :; do printf x >>"$0"; done'
    with subprocess.Popen(["sh", "-c", script, big]) as writing:
        try:
            wait_for(lambda: big.stat().st_size > 64 << 20)
            done = tool("vserver-copy", *_command(machines, "-q")[1:])
        finally:
            writing.kill()
    assert done.returncode == 20, done.stderr
    assert "var/log/big: changed while it was read" in done.stderr
    assert (machines.there.root("web") / "var/log/big").stat().st_size >= 64 << 20
    _finish(tool, machines, "--refresh")
