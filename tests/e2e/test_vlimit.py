"""vlimit, vsched: limits of a guest that runs are shown, changed, and felt at once.

Runs where the controllers are in v1 hierarchies, and where they are in that of v2.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.probes import need
from tests.fixtures.vservers import SLEEPER, Host, host_for_guests, wait_until
from tests.fixtures.vservers import run_installed as run

pytestmark = need("root")

_PAGE = 4096
_MIB = 1 << 20
_FILL = ("dd", "if=/dev/zero", "of=/dev/null", "count=1")
"""dd(1) has a buffer of one block."""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A guest with limits, one without, one that does not run."""
    with pytest.MonkeyPatch.context() as patch:
        made = host_for_guests(tmp_path_factory.mktemp("limits"), patch)
        host = next(made)
        limits = {
            "rlimits/rss": str(256 * _MIB // _PAGE),
            "rlimits/nproc": "100",
            "cflags": "sched_hard",
            "sched/fill-rate": "1",
            "sched/interval": "2",
        }
        for name, keys in (("web", limits), ("free", {}), ("off", {})):
            host.add_busybox(name, {**SLEEPER, "spaces/net": "", **keys})
        for name in ("web", "free"):
            host.vserver(name, "start")
        yield host
        next(made, None)


def row(text: str, name: str) -> list[str]:
    """The cells of a row, which begin where they should."""
    line = next(line for line in text.splitlines() if line.startswith(f"{name} "))
    ends = (12, 32, 52, 72, 92, None)
    return [line[start:end].strip() for start, end in zip((0, *ends), ends, strict=False)]


def test_limits_use_and_hits_are_shown(host: Host) -> None:
    text = run("vlimit", "-c", "web", "--all", "-d").stdout
    name, low, soft, hard, used, hits = row(text, "rss")
    assert (name, hard, hits) == ("rss", str(256 * _MIB // _PAGE), "0")
    assert low in ("0", "N/A")
    assert soft == "inf"
    assert int(used) > 0
    assert row(text, "nproc")[3:] == ["100", "1", "0"]
    text = run("vlimit", "-c", str(host.state("web")["xid"]), "-a", "-n").stdout
    assert row(text, "5")[3] == hex(256 * _MIB // _PAGE)
    assert row(text, "6")[3] == "0x64"


def test_a_new_limit_of_processes_is_felt_and_counted(host: Host) -> None:
    run("vlimit", "-c", "web", "--nproc", "10")
    assert "can't fork" in _start_sleepers(host, 30)
    hard, _, hits = row(run("vlimit", "-c", "web", "-a", "-d").stdout, "nproc")[3:]
    assert hard == "10"
    assert int(hits) > 0
    run("vlimit", "-c", "web", "--nproc=inf")
    assert row(run("vlimit", "-c", "web", "-a", "-d").stdout, "nproc")[3] == "inf"
    assert "can't fork" not in _start_sleepers(host, 150)


def _start_sleepers(host: Host, count: int) -> str:
    """Have so many processes at once in the guest, and none afterwards; what the shell says."""
    script = f"for n in $(seq {count}); do sleep 1000 & done"
    said = host.try_vserver("web", "exec", "sh", "-c", script).stderr
    run("vkill", "-c", "web", "-s", "KILL", "--", "-1")
    return said


def test_a_new_limit_of_memory_is_felt_and_counted(host: Host) -> None:
    host.inside("web", *_FILL, "bs=128M")
    pages = 64 * _MIB // _PAGE
    run("vlimit", "-c", "web", "--rss", str(pages))
    host.vserver("web", "exec", *_FILL, "bs=128M", code=128 + signal.SIGKILL)
    run("vlimit", "-c", "web", "-S", "--rss", f"{pages // 1024 // 2}K")
    _, _, soft, hard, _, hits = row(run("vlimit", "-c", "web", "-a", "-d").stdout, "rss")
    assert (soft, hard) == (str(pages // 2), str(pages))
    assert int(hits) > 0
    run("vlimit", "-c", "web", "-S", "-H", "--rss", "inf")
    assert row(run("vlimit", "-c", "web", "-a").stdout, "rss")[2:4] == ["inf", "inf"]
    host.inside("web", *_FILL, "bs=128M")


def test_another_share_of_the_processors_holds_at_once(host: Host) -> None:
    cpus = len(os.sched_getaffinity(host.init_pid("web")))
    assert run("vsched", "-c", "web").stdout.startswith(f"50.0% of each of {cpus} cpus; ")
    share = ("--fill-rate", "1", "--interval", "20", "--prio-bias", "5")
    run("vsched", "-c", "web", *share, "--tokens-max", "3")
    shown = run("vsched", "-c", "web").stdout
    assert shown.startswith(f"5.0% of each of {cpus} cpus; ")
    before = int(shown.split()[-2])
    busy = "n=0; while [ $n -lt 100000 ]; do n=$((n + 1)); done"

    def is_held_back() -> bool:
        """Only what gets more than its share can be: others may have a busy machine."""
        host.inside("web", "sh", "-c", busy)
        return int(run("vsched", "-c", "web").stdout.split()[-2]) > before

    wait_until(is_held_back)
    run("vsched", "-c", "web", "--no-limit")
    assert run("vsched", "-c", "web").stdout == f"no limit on {cpus} cpus\n"


def test_what_cannot_be_had_is_said(host: Host) -> None:
    assert "off: does not run" in run("vlimit", "-c", "off", "-a", code=1).stderr
    assert "off: does not run" in run("vsched", "-c", "off", code=1).stderr
    assert "have no total for a guest" in run("vlimit", "-c", "web", "--openfd", "5", code=1).stderr
    assert "is no limit" in run("vlimit", "-c", "web", "--rss", "much", code=1).stderr
    assert "no min limit" in run("vlimit", "-c", "web", "-M", "--nproc", "5", code=1).stderr


def is_in_v1(controller: str) -> bool:
    """As the kernel shows it of every process; see cgroups(7)."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    return any(controller in line.split(":")[1].split(",") for line in lines)


@pytest.mark.parametrize(
    ("controller", "words", "key"),
    [
        ("memory", ["vlimit", "--rss", "16384"], "rlimits/rss"),
        ("memory", ["vlimit", "-S", "--rss", "16384"], "rlimits/rss"),
        ("pids", ["vlimit", "--nproc", "30"], "rlimits/nproc"),
        ("cpu", ["vsched", "--fill-rate", "1", "--interval", "2"], "sched/"),
        ("cpu", ["vsched", "--no-limit"], "sched/"),
    ],
)
def test_a_guest_without_limits_gets_them_where_it_has_control_groups(
    host: Host, controller: str, words: list[str], key: str
) -> None:
    command, *options = words
    if is_in_v1(controller):
        said = run(command, "-c", "free", *options, code=1).stderr
        assert f"started without a limit that the controller {controller} keeps" in said
        assert f"write the limit to {key} and restart the guest" in said
    else:
        run(command, "-c", "free", *options)
    shown = run("vlimit", "-c", "free", "-a", "-d").stdout
    rss, nproc = row(shown, "rss"), row(shown, "nproc")
    if is_in_v1(controller):
        assert (rss[1:], nproc[1:]) == (["N/A"] * 5, ["N/A"] * 5)
        assert run("vsched", "-c", "free").stdout.startswith("no limit on ")
    elif controller == "memory":
        assert rss[2 if "-S" in options else 3] == "16384"
    elif controller == "pids":
        assert nproc[3] == "30"
        script = "for n in $(seq 40); do sleep 20 & done; wait"
        assert "can't fork" in host.try_vserver("free", "exec", "sh", "-c", script).stderr
    else:
        starts = "no limit on " if "--no-limit" in options else "50.0% of each of "
        assert run("vsched", "-c", "free").stdout.startswith(starts)


@pytest.mark.parametrize(
    "words",
    [
        ["vlimit", "-a"],
        ["vlimit", "-c", "web"],
        ["vlimit", "-c", "web", "-S"],
        ["vlimit", "-c", "web", "--rss"],
        ["vsched", "-c", "web", "--fill-rate", "1"],
        ["vsched", "-c", "web", "--tokens-max", "5"],
        ["vsched", "-c", "web", "--no-limit", "--fill-rate", "1", "--interval", "2"],
    ],
)
def test_wrong_usage_changes_nothing(host: Host, words: list[str]) -> None:
    assert run(*words, code=1).stderr
