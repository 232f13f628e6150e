"""Namespaces, as /proc/PID/ns, mountinfo and uptime tell of them."""

import errno
import os
import select
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.inside import ALL, in_child, resident
from vrun import namespaces


def _of(pid: int | str) -> dict[str, str]:
    """What the links in /proc/PID/ns say."""
    return {link.name: os.fspath(link.readlink()) for link in Path(f"/proc/{pid}/ns").iterdir()}


def test_each_asked_for_is_new_and_the_others_are_the_hosts() -> None:
    host = _of("self")
    with resident(lambda: None, kinds=ALL) as (pid, _):
        guest = _of(pid)
    assert {kind for kind in namespaces.FLAGS if guest[kind] != host[kind]} == set(ALL)


def test_the_first_process_is_process_1() -> None:
    assert in_child(os.getpid, kinds=ALL) == 1


def test_an_unknown_kind_is_refused_before_anything_is_done() -> None:
    before = _of("self")
    with pytest.raises(KeyError):
        namespaces.enter_new(("mnt", "color"))
    assert _of("self") == before


def test_a_mount_inside_is_not_seen_on_the_host(tmp_path: Path) -> None:
    def mount() -> None:
        subprocess.run(["mount", "-t", "tmpfs", "inside", tmp_path], check=True)

    with resident(mount, kinds=("mnt",)) as (pid, _):
        assert os.fspath(tmp_path) in Path(f"/proc/{pid}/mountinfo").read_text()
        assert os.fspath(tmp_path) not in Path("/proc/self/mountinfo").read_text()


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A mount that shares what is mounted below it, as systemd makes the root of a host."""
    subprocess.run(["mount", "-t", "tmpfs", "host", tmp_path], check=True)
    subprocess.run(["mount", "--make-shared", tmp_path], check=True)
    (tmp_path / "below").mkdir()
    yield tmp_path
    subprocess.run(["umount", "--recursive", tmp_path], check=True)


def test_an_unmount_on_the_host_arrives_inside(shared: Path) -> None:
    below = os.fspath(shared / "below")
    subprocess.run(["mount", "-t", "tmpfs", "host", below], check=True)
    with resident(lambda: None, kinds=("mnt",)) as (pid, _):
        mounts = Path(f"/proc/{pid}/mountinfo")
        assert below in mounts.read_text()
        subprocess.run(["umount", below], check=True)
        assert below not in mounts.read_text()


def test_a_mount_inside_does_not_come_out_of_a_shared_one(shared: Path) -> None:
    below = os.fspath(shared / "below")

    def mount() -> None:
        subprocess.run(["mount", "-t", "tmpfs", "inside", below], check=True)

    with resident(mount, kinds=("mnt",)) as (pid, _):
        assert below in Path(f"/proc/{pid}/mountinfo").read_text()
        assert below not in Path("/proc/self/mountinfo").read_text()


@pytest.mark.skipif(not namespaces.has_time(), reason="no time namespaces")
def test_uptime_begins_with_the_guest() -> None:
    def look() -> list[float]:
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        clocks = (time.CLOCK_MONOTONIC, time.CLOCK_BOOTTIME)
        return [uptime, *(time.clock_gettime(clock) for clock in clocks)]

    host = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert host > 10
    assert max(in_child(look, kinds=("time", "pid", "mnt"))) < 5
    assert time.clock_gettime(time.CLOCK_BOOTTIME) >= host


def test_joining_takes_all_of_them() -> None:
    with resident(lambda: None, kinds=ALL) as (pid, _):
        pidfd = os.pidfd_open(pid)

        def join() -> dict[str, str]:
            """Inside, /proc is the guest's: ask by a descriptor from before."""
            own_fd = os.open("/proc/thread-self/ns", os.O_RDONLY | os.O_DIRECTORY)
            namespaces.join(pidfd, ALL)
            names = ("mnt", "uts", "ipc", "cgroup", "pid_for_children", "pid")
            return {name: os.readlink(name, dir_fd=own_fd) for name in names}

        found, guest, host = in_child(join), _of(pid), _of("self")
        os.close(pidfd)
    assert found["pid"] == host["pid"], "it is itself not visible inside"
    assert found.pop("pid_for_children") == guest["pid"]
    assert found.pop("pid") != guest["pid"]
    assert found == {kind: guest[kind] for kind in found}


def test_a_guest_that_has_ended_cannot_be_joined() -> None:
    with resident(lambda: None, kinds=ALL) as (pid, _):
        pidfd = os.pidfd_open(pid)
    select.select([pidfd], [], [])

    def join() -> int:
        try:
            namespaces.join(pidfd, ("mnt", "pid"))
        except OSError as error:
            return error.errno or 0
        return 0

    assert in_child(join) == errno.ESRCH
    os.close(pidfd)


def test_identities_tell_the_same_namespaces_from_others() -> None:
    own = namespaces.identities(os.getpid())
    assert own == namespaces.identities(os.getppid())
    with resident(lambda: None, kinds=ALL) as (pid, _):
        guest = namespaces.identities(pid)
    assert {kind for kind in guest if guest[kind] != own[kind]} == set(ALL)
    with pytest.raises(ProcessLookupError):
        namespaces.identities(2**22)  # past PID_MAX_LIMIT
