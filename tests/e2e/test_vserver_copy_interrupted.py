"""A copy that is cut off, spoiled or killed: the old target stays, and the next run sends the rest.

Rows 14 and 15 of what has gone wrong elsewhere.
"""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
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

_NEW_AT_LEAST = 3 << 20
"""Bytes that no version shares with another."""


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
    machines.wait_until_idle()
    done = tool("vserver-copy", *_command(machines, "--json", *arguments)[1:])
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert _differences(machines) == []
    assert find_faults(machines.there.pool) == []
    assert _areas(machines) == set()
    return report


def _replace(machines: Machines, version: int, *, is_narrow: bool = False) -> None:
    """Another version of the guest is here; a narrow one differs in one folder."""
    (machines.here.root("web") / "var/log/big").write_bytes(os.urandom(3 << 20))
    if is_narrow:
        return
    for path in sorted((machines.here.root("web") / "own").iterdir()):
        path.rename(path.with_name(f"{version}-{path.name.partition('-')[2]}"))
        path.with_name(f"{version}-{path.name.partition('-')[2]}").write_bytes(os.urandom(20_000))
    (machines.here.root("web") / "v").write_text(f"{version}")


def _areas(machines: Machines) -> set[str]:
    """The folders beside targets in which copies grow, or grew until they were cut off."""
    return {path.name for path in machines.there.vdirbase.iterdir() if ".copy-" in path.name}


def _is_growing(machines: Machines) -> bool:
    """Whether a copy has begun to make entries: it has pinned the objects that it wants, or will
    before it lets the pool go.
    """
    return any(machines.there.vdirbase.glob("*.copy-*/tree/*"))


def _stop_at_start(machines: Machines, after_s: float, number: int) -> int:
    """Begin a copy and send it the signal so long after it was loaded; its exit code. Nobody works
    any more then.
    """
    return _stop(machines, _command(machines, "--refresh", "-q"), after_s, number, _is_loaded)[0]


def _is_loaded(pid: int) -> bool:
    """Whether the program has taken signals into its own hands."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


def _stop_in_the_middle(machines: Machines, after_s: float, number: int) -> tuple[int, bool]:
    """As `_stop_at_start`, of a slow copy whose tree has begun to grow that long ago; and whether
    the signal came before its end.
    """
    before = _areas(machines)
    command = _command(machines, "--refresh", "-q", "--bwlimit", "1M")
    return _stop(machines, command, after_s, number, lambda _: _areas(machines) > before)


def _stop(
    machines: Machines,
    command: list[str | Path],
    after_s: float,
    number: int,
    is_due: Callable[[int], bool],
) -> tuple[int, bool]:
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        wait_for(lambda: process.poll() is not None or is_due(process.pid))
        was_sent = False
        try:
            process.wait(after_s)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            was_sent = True
        _, said = process.communicate(timeout=60)
    assert b"Traceback" not in said, said.decode()
    machines.wait_until_idle()
    return process.returncode, was_sent


@pytest.mark.timeout(1800 if is_soak() else 300)
@pytest.mark.parametrize("is_narrow", [False, True], ids=["all", "one folder"])
def test_interrupted_at_random_points_the_old_target_stays_whole(
    machines: Machines, tool: Tool, *, is_narrow: bool
) -> None:
    """SIGINT, SIGTERM and SIGKILL in turn; the target is at each moment one version, whole.

    One folder's tree changes places in the folder around it, whose time is put back right then.
    """
    passing = "b'var': mtime_ns" if is_narrow else "none"
    _finish(tool, machines)
    chance = random.Random(1)  # noqa: S311
    began = time.monotonic()
    _finish(tool, machines, "--refresh")
    longest = time.monotonic() - began
    old = snapshot(machines.there.root("web"))
    _replace(machines, 2, is_narrow=is_narrow)
    cut_in_the_middle = 0
    for turn in range(scaled(9, 200)):
        number = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)[turn % 3]
        if turn % 2:
            code, was_cut = _stop_in_the_middle(machines, chance.uniform(0, 0.5), number)
            cut_in_the_middle += was_cut
        else:
            code = _stop_at_start(machines, chance.uniform(0, 2 * longest), number)
        now = snapshot(machines.there.root("web"))
        if all(line.startswith(passing) for line in _differences(machines)):
            assert code in (0, -number, 128 + number)
            old = now
            _replace(machines, 3 + turn, is_narrow=is_narrow)
        else:
            assert code != 0
            assert differences(old, now) == []
    assert cut_in_the_middle
    _finish(tool, machines, "--refresh")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("size", [32 << 10, 1 << 20])
def test_what_arrived_is_not_sent_again(machines: Machines, tool: Tool, size: int) -> None:
    """A line that is cut at three quarters: the next run sends the last quarter.

    What was under way, some MiB in buffers, is lost.
    """
    for number in range((40 << 20) // size):
        (machines.here.root("web") / f"more-{number}").write_bytes(os.urandom(size))
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


@pytest.mark.timeout(1800 if is_soak() else 300)
@pytest.mark.parametrize("kind", KINDS[:4])
def test_a_spoiled_line_never_ends_well_with_another_tree(
    machines: Machines, tool: Tool, kind: str
) -> None:
    """Somewhere in what each time is new; first there is no target, then there is an old one."""
    chance = random.Random(kind)  # noqa: S311
    turns = scaled(4, 40)
    for turn in range(turns):
        if turn == turns // 2:
            _finish(tool, machines)
        old = snapshot(machines.there.root("web")) if turn >= turns // 2 else None
        _replace(machines, 100 + turn)
        with tampering(machines.server.port, kind, chance.randrange(4000, _NEW_AT_LEAST)) as proxy:
            command = _command(machines, "-q", "--refresh", "--accept-new", port=proxy.port)
            done = subprocess.run(command, capture_output=True, check=False, text=True, timeout=200)
            assert proxy.was_done
        assert done.returncode != 0
        assert "Traceback" not in done.stderr
        machines.wait_until_idle()
        root = machines.there.root("web")
        assert root.exists() == (old is not None)
        assert old is None or differences(old, snapshot(root)) == []
    _finish(tool, machines, "--refresh")


@pytest.mark.timeout(1800 if is_soak() else 300)
def test_a_side_that_is_stopped_ends_the_other_in_time(machines: Machines, tool: Tool) -> None:
    chance = random.Random(3)  # noqa: S311
    for at in (2 << 20, *(chance.randrange(4000, _NEW_AT_LEAST) for _ in range(scaled(0, 8)))):
        with tampering(machines.server.port, "stall", at) as proxy:
            command = _command(machines, "-q", "--accept-new", port=proxy.port)
            began = time.monotonic()
            done = subprocess.run(command, capture_output=True, check=False, text=True, timeout=200)
            assert proxy.was_done
            assert done.returncode == 1, done.stderr
            assert time.monotonic() - began < 120
            if at == 2 << 20:
                assert "run the command again" in done.stderr
        machines.wait_until_idle()
        assert not machines.there.root("web").exists()
        _replace(machines, at)


def test_two_copies_into_one_target_do_not_meet(machines: Machines, tool: Tool) -> None:
    """The first one stands still, with its target held, until the second has been refused."""
    slow = _command(machines, "-q", "--bwlimit", "1M")
    with subprocess.Popen(slow, stderr=subprocess.PIPE) as first:
        wait_for(lambda: bool(_areas(machines)) or first.poll() is not None)
        first.send_signal(signal.SIGSTOP)
        assert _areas(machines)
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
        copying = _command(machines, "--json", "--bwlimit", "2M")
        with subprocess.Popen(copying, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            wait_for(lambda: _is_growing(machines) or process.poll() is not None)
            turns = 0
            while process.poll() is None:
                subprocess.run([vpool, "reclaim"], env=environment, check=True, capture_output=True)
                turns += 1
            told, said = process.communicate()
        assert process.returncode == 0, said.decode()
        assert turns
        assert json.loads(told)["bytes_already_there"] > 2 << 20
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
        for order in ("-qn", "-q"):
            done = tool("vserver-copy", *arguments, order, "web", "127.0.0.1:")
            assert done.returncode == 9, done.stderr
            assert "free" in done.stderr
        assert [path.name for path in (mount / "guests").iterdir()] == [".pool"]
        (machines.here.root("web") / "huge").unlink()
        done = tool("vserver-copy", *arguments, "-q", "web", "127.0.0.1:")
        assert done.returncode == 0, done.stderr


@pytest.mark.timeout(200)
def test_a_source_that_changes_all_the_time_is_named(machines: Machines, tool: Tool) -> None:
    """Each time that it is sent takes so long that the writer gets its turn meanwhile."""
    size = 40 << 20
    big = machines.here.root("web") / "var/log/big"
    big.write_bytes(os.urandom(size))
    script = 'while :; do printf x >>"$0"; done'
    with subprocess.Popen(["sh", "-c", script, big]) as writing:
        try:
            wait_for(lambda: big.stat().st_size > size)
            done = tool("vserver-copy", *_command(machines, "-q", "--bwlimit", "16M")[1:])
        finally:
            writing.kill()
    assert done.returncode == 20, done.stderr
    assert "var/log/big: changed while it was read" in done.stderr
    assert (machines.there.root("web") / "var/log/big").stat().st_size >= size
    _finish(tool, machines, "--refresh")


@pytest.mark.timeout(200)
def test_holes_of_a_file_that_changes_all_the_time_stay_holes(
    machines: Machines, tool: Tool
) -> None:
    big = machines.here.root("web") / "var/log/big"
    with big.open("r+b") as file:
        file.write(os.urandom(20 << 20))
        file.truncate(2 << 30)
    script = 'while :; do printf x | dd of="$0" bs=1 conv=notrunc status=none; done'
    with subprocess.Popen(["sh", "-c", script, big]) as writing:
        try:
            done = tool("vserver-copy", *_command(machines, "-q", "--bwlimit", "16M")[1:])
        finally:
            writing.kill()
    assert done.returncode == 20, done.stderr
    status = (machines.there.root("web") / "var/log/big").stat()
    assert status.st_size == 2 << 30
    assert status.st_blocks * 512 < 30 << 20
