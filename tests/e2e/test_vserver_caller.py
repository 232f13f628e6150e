"""What a start has from its caller, and what it writes and says beside the guest."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest

from tests.fixtures.guestconfig import write_program
from tests.fixtures.probes import need
from tests.fixtures.vservers import (
    SLEEPER,
    VSERVER,
    Host,
    host_for_guests,
    status_of,
    wait_until,
)

pytestmark = need("root")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    yield from host_for_guests(tmp_path, monkeypatch)


_SPOILED: Final = """
import os, resource, signal, sys
os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
os.nice(7)
os.umask(0o077)
open("/proc/self/oom_score_adj", "w").write("300")
ctypes = __import__("ctypes").CDLL(None)
ctypes.personality(0x0020000)  # UNAME26
resource.setrlimit(resource.RLIMIT_STACK, (1 << 20, resource.RLIM_INFINITY))
hard = resource.getrlimit(resource.RLIMIT_MSGQUEUE)[1]
resource.setrlimit(resource.RLIMIT_MSGQUEUE, (1000, hard))
resource.setrlimit(resource.RLIMIT_AS, (1 << 34, resource.RLIM_INFINITY))
resource.setrlimit(resource.RLIMIT_CORE, (4096, resource.RLIM_INFINITY))
resource.setrlimit(resource.RLIMIT_NOFILE, (200, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD):
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR2, signal.SIGCHLD})
os.execvp("ionice", ["ionice", "-c", "3", *sys.argv[1:]])
"""


def _traits(pid: int) -> dict[str, str]:
    """What a process could have from whoever started it."""
    folder = Path(f"/proc/{pid}")
    words = ["Umask", "SigBlk", "SigIgn", "Cpus_allowed_list", "Seccomp"]
    found = {word: status_of(pid)[word] for word in words}
    for name in ("limits", "oom_score_adj", "personality"):
        found[name] = (folder / name).read_text()
    for command in ("chrt --pid", "ionice --pid"):
        said = subprocess.check_output([*command.split(), str(pid)], text=True)
        found[command] = re.sub(rf"\b{pid}\b", "PID", said)
    found["nice"] = str(os.getpriority(os.PRIO_PROCESS, pid))
    return found


def test_a_guest_is_the_same_whoever_starts_it(host: Host) -> None:
    """As from a job of little importance, below nohup(1), in a shell with limits of its own."""
    host.add_busybox("web")
    host.vserver("web", "start")
    plain = _traits(host.init_pid("web"))
    host.vserver("web", "stop")
    command = [sys.executable, "-c", _SPOILED, os.fspath(VSERVER), "web", "start"]
    subprocess.run(command, check=True, timeout=60)
    spoiled = _traits(host.init_pid("web"))
    assert {key: (spoiled[key], plain[key]) for key in plain if spoiled[key] != plain[key]} == {}
    assert (plain["nice"], plain["Umask"], plain["personality"]) == ("0", "0022", "00000000\n")


def test_a_guest_without_a_host_name_has_its_own(host: Host) -> None:
    root = host.add_busybox("web", {**SLEEPER, "uts/nodename": ""})
    (host.etc.confdir / "web/uts/nodename").unlink()
    host.vserver("web", "start")
    assert root.is_dir()
    assert host.inside("web", "hostname") == "web\n"


def test_a_root_that_is_swapped_during_the_start_is_not_taken(host: Host) -> None:
    root = host.add_busybox("web")
    write_program(
        host.etc.confdir / "web/scripts/pre-start", 'mv "$VDIR" "$VDIR.kept" && mkdir "$VDIR"'
    )
    host.vserver("web", "start")
    inside = Path(f"/proc/{host.init_pid('web')}/root").stat()
    kept = root.with_name("web.kept").stat()
    assert (inside.st_dev, inside.st_ino) == (kept.st_dev, kept.st_ino)
    root.rmdir()
    root.with_name("web.kept").rename(root)


def test_signals_while_a_start_is_undone_do_not_disturb_it(host: Host) -> None:
    """The first ends the start, the others come while all is taken back."""
    host.add_busybox("web", {**SLEEPER, "interfaces/0/ip": "127.9.9.9", "interfaces/0/dev": "lo"})
    write_program(host.etc.confdir / "web/scripts/post-start", "sleep 100")
    with host.begin("web", "start") as start:
        wait_until(lambda: bool(host.state("web")))
        monitor = host.monitor_pid("web")
        for _ in range(50):
            with suppress(ProcessLookupError):
                os.kill(monitor, signal.SIGTERM)
                start.send_signal(signal.SIGTERM)
            time.sleep(0.002)
        assert start.wait(60) != 0
    wait_until(lambda: not host.is_locked("web"))
    assert host.leftovers() == []
    assert "127.9.9.9" not in subprocess.check_output(["ip", "address", "show", "lo"], text=True)


# --- what is written and said beside


def test_the_guests_mtab_says_what_its_fstab_mounts(host: Host) -> None:
    fstab = "none /srv tmpfs size=1m 0 0\nnone /opt tmpfs nomtab,size=1m 0 0"
    root = host.add_busybox("web", {**SLEEPER, "fstab": fstab, "apps/init/mtab": "/dev/hdv1 / ufs"})
    for folder in ("srv", "opt"):
        (root / folder).mkdir()
    (root / "etc/mtab").write_text("of the last run")
    host.vserver("web", "start")
    assert (root / "etc/mtab").read_text() == "/dev/hdv1 / ufs\nnone /srv tmpfs size=1m 0 0\n"
    host.vserver("web", "stop")
    (root / "etc/mtab").unlink()
    (root / "etc/mtab").symlink_to("/proc/self/mounts")
    host.vserver("web", "start")
    assert os.readlink(root / "etc/mtab") == "/proc/self/mounts"  # noqa: PTH115 (its text)


def test_an_mtab_that_leads_out_of_the_guest_is_not_followed(host: Host, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    canary.write_text("whole")
    root = host.add_busybox("web", {**SLEEPER, "fstab": "none /srv tmpfs size=1m 0 0"})
    (root / "srv").mkdir()
    (root / "etc/mtab").symlink_to(canary)
    host.vserver("web", "start")
    assert canary.read_text() == "whole"


def test_how_a_guest_ends_goes_to_its_log_file_too(host: Host, tmp_path: Path) -> None:
    log = tmp_path / "vshelper.log"
    host.etc.set_defaults({"apps/vshelper/logfile": os.fspath(log)})
    host.add_busybox("web")
    host.vserver("web", "start")
    os.kill(host.init_pid("web"), signal.SIGKILL)
    host.wait_stopped("web")
    assert "guest web: its init was killed by SIGKILL" in log.read_text()


@pytest.mark.parametrize("how", ["key", "option"])
def test_a_noisy_start_shows_number_and_addresses(host: Host, how: str) -> None:
    host.add_busybox("web", {**SLEEPER, **({"noisy": ""} if how == "key" else {})})
    said = host.vserver(*(["--verbose"] if how == "option" else []), "web", "start").stdout
    assert said == f"web: context {host.state('web')['xid']}, addresses: none\n"


def test_rc_scripts_are_traced_where_that_is_asked_for(host: Host) -> None:
    root = host.add_busybox("web", {"apps/init/style": "sysv"})
    write_program(root / "etc/init.d/rc", "test $1 = 6 && exec kill -9 -1; sleep 1000 & true")
    assert "+ true\n" in host.vserver("--debug-sysv", "web", "start").stdout
    host.vserver("web", "stop")
    assert "+ true" not in host.vserver("web", "start").stdout


@pytest.mark.parametrize("program", ["vps", "vpstree", "vserver-stat"])
def test_who_closed_the_output_is_shown_nothing(program: str) -> None:
    command = ["sh", "-c", 'exec "$1" >&-', "sh", f"{VSERVER.parent / program}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
