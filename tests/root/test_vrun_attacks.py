"""Rows 19 and 20 of table A of attacks.md, in guests that `vserver` starts; named by their rows.

Table B is test_vrun_escapes.py. Row 20 is also tests/e2e/test_vserver_cycles.py, with all ways to
end and, in its long form, 200 cycles.
"""

import errno
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Final

import pytest

from tests.fixtures.intruders import (
    CANARY,
    add_intruder,
    attack,
    canary_of_host,
)
from tests.fixtures.mountinfo import mounts_of
from tests.fixtures.probes import scaled
from tests.fixtures.swapper import swapping
from tests.fixtures.vservers import (
    SLEEPER,
    Host,
    host_for_guests,
    status_of,
    wait_until,
)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    yield from host_for_guests(tmp_path, monkeypatch)


@pytest.fixture
def web(host: Host) -> Host:
    """A host whose guest `web` runs, with an interpreter in it."""
    add_intruder(host, "web")
    host.vserver("web", "start")
    return host


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A folder of the host; it is as it was when the test ends, and nothing is mounted there."""
    yield from canary_of_host(tmp_path)


# --- A19: all of them at once


_HOSTILE: Final = {
    "dev/null": "null",
    "dev/pts": "pts",
    "dev/console": "null",
    "proc": "",
    "sys": "sys",
    "etc/hostname": "hostname",
    "etc/mtab": "hostname",
    "run/utmp": "utmp",
    "var/run": "",
    "srv": "data",
    "tmp": "data",
}
_FSTAB: Final = (
    "none /tmp tmpfs size=1m,mode=1777 0 0\n"
    "none /srv/below tmpfs size=1m 0 0\n"
    "none /dev/pts devpts gid=5,mode=620 0 0\n"
)


@pytest.mark.parametrize("upwards", [False, True], ids=["absolute", "upwards"])
@pytest.mark.parametrize("name", list(_HOSTILE))
def test_row_a19_a_link_in_a_hostile_root_leads_nowhere(
    host: Host, canary: Path, name: str, upwards: bool
) -> None:
    root = host.add_busybox("web", {**SLEEPER, "fstab": _FSTAB})
    (root / "srv/below").mkdir(parents=True)
    target = canary / _HOSTILE[name]
    _replace(root / name, Path("/", *[".."] * 20, *target.parts[1:]) if upwards else target)

    if host.try_vserver("web", "start").returncode:
        return  # a refusal is an answer, too
    _check_nothing_of_host(host, root)


@pytest.mark.parametrize("name", ["proc", "sys", "dev", "tmp", "srv", "etc", "var"])
def test_row_a19_a_folder_swapped_for_a_link_all_the_time(
    host: Host, canary: Path, name: str
) -> None:
    root = host.add_busybox("web", {**SLEEPER, "fstab": _FSTAB})
    (root / "srv/below").mkdir(parents=True)
    (root / "link").symlink_to(canary)
    deadline = monotonic() + scaled(2, 60)
    with swapping(root, name, "link"):
        while monotonic() < deadline:
            if host.try_vserver("web", "start").returncode == 0:
                _check_nothing_of_host(host, root)
                host.try_vserver("web", "exec", "true")
                host.try_vserver("web", "suexec", "root", "true")
            host.vserver("web", "stop")


def _replace(path: Path, target: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rename(path.with_name(f"{path.name}.old"))
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def _check_nothing_of_host(host: Host, root: Path) -> None:
    with suppress(KeyError, OSError):  # its init has ended meanwhile
        lines = mounts_of(host.init_pid("web"))
        assert lines[0].root.endswith(f"/{root.name}")
        assert not [line for line in lines if "canary" in line.root]
    seen = host.try_vserver("web", "exec", "sh", "-c", _SEARCH).stdout
    assert CANARY not in seen


_SEARCH: Final = """
for file in /dev/* /dev/pts/* /srv/* /tmp/* /etc/hostname /etc/mtab /run/utmp /sys/null \\
    /sys/kernel/shmmax /proc/null /proc/hostname; do
    test -f $file && cat $file
done
true
"""


def test_row_a19_a_guest_has_descriptors_0_to_2_and_no_program_to_write(web: Host) -> None:
    found = attack(
        web,
        "web",
        """
        found = {}
        for pid in filter(str.isdigit, os.listdir("/proc")):
            folder, fds = Path("/proc", pid), {}
            for name in os.listdir(folder / "fd"):
                try:
                    fds[name] = os.readlink(folder / "fd" / name)
                except FileNotFoundError:
                    pass  # of this very listing
            exe = [opens(folder / "exe", flags) for flags in (os.O_WRONLY, os.O_RDWR)]
            found[pid] = fds, os.readlink(folder / "exe"), exe
        tell(found)
        """,
    )
    assert len(found) >= 2
    for fds, exe, errors in found.values():
        assert set(fds) == {"0", "1", "2"}
        assert all(re.fullmatch(r"pipe:\[\d+\]|/dev/pts/\d+", target) for target in fds.values())
        assert set(errors) <= {errno.EROFS, errno.ETXTBSY}, exe


_REFUSED: Final = {
    **dict.fromkeys(("bpf", "open_by_handle_at", "perf_event_open", "mount", "setns"), errno.EPERM),
    **dict.fromkeys(("fsopen", "open_tree", "move_mount", "mount_setattr"), errno.EPERM),
    **dict.fromkeys(("pivot_root", "kexec_load", "init_module", "syslog"), errno.EPERM),
    **dict.fromkeys(("keyctl", "add_key", "request_key", "userfaultfd"), errno.ENOSYS),
    **dict.fromkeys(("io_uring_setup", "io_uring_enter", "clone3"), errno.ENOSYS),
}


def test_row_a19_calls_that_have_been_the_way_out_are_refused(web: Host) -> None:
    told = attack(
        web,
        "web",
        "tell({name: call(number_of(name), *[0] * 6)[1] for name in json.loads(sys.argv[1])})",
        json.dumps(list(_REFUSED)),
    )
    assert told == _REFUSED


def test_row_a19_no_namespace_in_which_proc_could_be_mounted_anew(web: Host) -> None:
    told = attack(
        web,
        "web",
        """
        flags = [0x10000000, 0x10000000 | 0x20000, 0x10000000 | 0x20000000, 0x20000, 0x20000000]
        found = [call(number_of("unshare"), flag)[1] for flag in flags]
        found += [call(number_of("clone"), flag | 17, 0, 0, 0, 0)[1] for flag in flags]
        libc = ctypes.CDLL(None, use_errno=True)
        os.mkdir("/tmp/proc")
        libc.mount(b"proc", b"/tmp/proc", b"proc", 0, None)
        tell([*found, ctypes.get_errno()])
        """,
    )
    assert told == [errno.EPERM] * 11


def test_row_a19_a_working_directory_does_not_lead_out(web: Host) -> None:
    told = attack(
        web,
        "web",
        """
        os.chdir("/tmp")
        before = os.open("/", os.O_PATH)
        os.mkdir("/tmp/jail")
        os.chroot("/tmp/jail")
        os.fchdir(before)
        for _ in range(50):
            os.chdir("..")
        os.chroot(".")
        tell([sorted(os.listdir("/")), os.path.exists("/attack/calls.py")])
        """,
    )
    assert told[1]
    assert "attack" in told[0]
    assert "srv" not in told[0]
    assert "boot" not in told[0]


# --- A20: nothing is left


def test_row_a20_kills_at_any_moment_leave_nothing(host: Host) -> None:
    """Codes too; the fixture sees that nothing is left. 200 cycles: test_vserver_cycles.py."""
    host.add_busybox("web")
    for delay_s in [0.0, 0.01, 0.02, 0.04, 0.08, *[0.005 * n for n in range(scaled(4, 100))]]:
        starter = host.begin("web", "start")
        with suppress(subprocess.TimeoutExpired):
            starter.wait(delay_s)
        starter.kill()
        starter.communicate()
        if state := host.state("web"):
            with suppress(FileNotFoundError, ProcessLookupError):
                os.kill(int(status_of(int(state["init_pid"]))["PPid"]), signal.SIGKILL)
        host.vserver("web", "stop")
        wait_until(lambda: not host.leftovers())
    host.vserver("web", "start")
    assert host.inside("web", "sh", "-c", "exit 7", code=7) == ""
    host.vserver("web", "stop")
    assert not host.leftovers()
