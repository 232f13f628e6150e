"""Limits of processes, as /proc and other programs see them."""

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vrun import limits
from vrun.errors import NotPermitted
from vrun.spec import GuestSpec, Rlimit


def _spec(**fields: Any) -> GuestSpec:
    return GuestSpec(name="web", root=Path("/"), **fields)


def _after(spec: GuestSpec, *command: str) -> str:
    """What a command prints that a process executes which took the guest's limits."""
    done = subprocess.run(
        command,
        preexec_fn=lambda: limits.apply(spec),
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def _limit(spec: GuestSpec, name: str) -> list[str]:
    """Soft and hard limit as /proc shows them."""
    lines = _after(spec, "cat", "/proc/self/limits").splitlines()
    (line,) = (line for line in lines if line.startswith(name))
    return line.removeprefix(name).split()[:2]


def test_limits_are_those_of_the_guest() -> None:
    spec = _spec(
        rlimits=(
            Rlimit(resource.RLIMIT_NOFILE, "nofile", 100, 200),
            Rlimit(resource.RLIMIT_CORE, "core", 0, 0),
            Rlimit(resource.RLIMIT_NPROC, "nproc", None, 500),
        )
    )
    assert _limit(spec, "Max open files") == ["100", "200"]
    assert _limit(spec, "Max core file size") == ["0", "0"]
    assert _limit(spec, "Max processes") == ["500", "500"]


def test_a_soft_limit_ends_at_the_hard_one() -> None:
    spec = _spec(rlimits=(Rlimit(resource.RLIMIT_NOFILE, "nofile", 300, 200),))
    assert _limit(spec, "Max open files") == ["200", "200"]


def test_a_hard_limit_that_no_file_names_is_raised_or_stays() -> None:
    def lower_then_apply() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (50, 90))
        limits.apply(_spec())

    shown = subprocess.run(
        ["cat", "/proc/self/limits"], preexec_fn=lower_then_apply, capture_output=True, check=True
    ).stdout.decode()
    (line,) = (line for line in shown.splitlines() if line.startswith("Max open files"))
    may_raise = int(Path("/proc/self/status").read_text().split("CapEff:\t")[1][:16], 16) >> 24 & 1
    assert line.split()[3:5] == (["1024", "1048576"] if may_raise else ["90", "90"])


def test_soft_limits_of_the_caller_are_not_handed_on() -> None:
    def lower_then_apply() -> None:
        resource.setrlimit(resource.RLIMIT_STACK, (1 << 20, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CORE, (1, resource.RLIM_INFINITY))
        limits.apply(_spec())

    shown = subprocess.run(
        ["cat", "/proc/self/limits"], preexec_fn=lower_then_apply, capture_output=True, check=True
    ).stdout.decode()
    lines = {line[:26].strip(): line[26:].split()[0] for line in shown.splitlines()}
    assert lines["Max stack size"] == str(8 << 20)
    assert lines["Max core file size"] == "0"


def test_a_limit_above_the_callers_is_named() -> None:
    def lower_then_apply() -> None:
        resource.setrlimit(resource.RLIMIT_NPROC, (50, 90))
        status = Path("/proc/self/status").read_text()
        if int(status.split("CapEff:\t")[1][:16], 16) >> 24 & 1:
            os.setuid(65534)
        with pytest.raises(NotPermitted, match="ulimits/nproc: cannot set 500") as caught:
            limits.apply(_spec(rlimits=(Rlimit(resource.RLIMIT_NPROC, "nproc", 500, 500),)))
        assert "CAP_SYS_RESOURCE" in str(caught.value.hint)

    subprocess.run(["true"], preexec_fn=lower_then_apply, check=True)


def test_nice_is_absolute_and_an_old_styles_relative() -> None:
    assert _after(_spec(nice=5), "nice") == "5\n"
    outer = ["nice", "-n", "3", sys.executable, "-c"]
    program = """
import os, sys
from pathlib import Path
from vrun import limits
from vrun.spec import GuestSpec
for relative in (False, True):
    if not os.fork():
        limits.apply(GuestSpec(name="web", root=Path("/"), nice=5, nice_is_relative=relative))
        os.execvp("nice", ["nice"])
    os.wait()
"""
    said = subprocess.check_output([*outer, program], text=True)
    assert said == f"5\n{min(os.nice(0) + 3 + 5, 19)}\n"  # the tests may run at any


def test_the_class_of_disk_access() -> None:
    assert _after(_spec(ionice=(2, 6)), "ionice") == "best-effort: prio 6\n"
    assert _after(_spec(ionice=(3, 0)), "ionice") == "idle\n"


def test_the_bias_of_the_oom_killer() -> None:
    assert _after(_spec(oom_score_adj=300), "cat", "/proc/self/oom_score_adj") == "300\n"


def test_personality_changes_what_uname_says() -> None:
    per_linux32 = 0x0008
    if os.uname().machine != "x86_64":
        pytest.skip("PER_LINUX32 has another effect on this machine")
    assert _after(_spec(personality=per_linux32), "uname", "-m") == "i686\n"


def test_what_an_unprivileged_caller_cannot_have_is_named() -> None:
    def apply_as_nobody() -> None:
        os.setpriority(os.PRIO_PROCESS, 0, 10)
        os.setuid(65534)
        with pytest.raises(NotPermitted, match="nice: cannot take level -5"):
            limits.apply(_spec(nice=-5))
        limits.apply(_spec(nice=-5, flags=frozenset({"igneg_nice"})))
        with pytest.raises(NotPermitted, match="ionice: cannot take class 1, level 0"):
            limits.apply(_spec(ionice=(1, 0), flags=frozenset({"igneg_nice"})))
        with pytest.raises(NotPermitted, match="badness: cannot take -500"):
            limits.apply(_spec(oom_score_adj=-500, flags=frozenset({"igneg_nice"})))

    subprocess.run(["true"], preexec_fn=apply_as_nobody, check=True)
