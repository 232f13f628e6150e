"""The ceiling, as /proc/self/status tells of the programs that a guest executes."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fixtures.inside import in_child
from tests.fixtures.probes import need
from vrun import capabilities
from vrun.capabilities import Identity
from vrun.wordlist import SECURE_CAPS

_NOBODY = 65534

_SECURE = {  # reference 5.1 less SYS_PTRACE and LEASE, by the numbers of linux/capability.h
    *(0, 1, 2, 3, 4, 5, 6, 7),
    *(10, 18, 22, 26, 29, 31),
}
_LAST = int(Path("/proc/sys/kernel/cap_last_cap").read_text())


def _bits(status: str, field: str) -> set[int]:
    (line,) = (line for line in status.splitlines() if line.startswith(f"{field}:"))
    value = int(line.split()[1], 16)
    return {number for number in range(64) if value >> number & 1}


def _executed(*command: str | Path) -> str:
    """The output of a program that this process executes; what it was refused, if it was."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.stdout


def _status_after(limit: Callable[[], None], *command: str | Path) -> str:
    def look() -> str:
        limit()
        return _executed(*command, "/proc/self/status")

    return in_child(look)


def _secure() -> None:
    capabilities.limit(SECURE_CAPS)


def test_the_numbers_are_the_kernels() -> None:
    header = Path("/usr/include/linux/capability.h")
    if not header.exists():
        pytest.skip("no headers of the kernel installed")
    known = {
        words[1].removeprefix("CAP_"): int(words[2])
        for words in map(str.split, header.read_text().splitlines())
        if len(words) == 3 and words[1].startswith("CAP_") and words[2].isdecimal()
    }
    assert known
    assert {name: capabilities.NUMBERS.get(name) for name in known} == known


def test_root_executes_with_the_ceiling_and_no_more() -> None:
    status = _status_after(_secure, "cat")
    for field in ("CapBnd", "CapPrm", "CapEff"):
        assert _bits(status, field) == _SECURE, field
    assert _bits(status, "CapInh") == _bits(status, "CapAmb") == set()


def test_newer_capabilities_than_the_table_are_dropped() -> None:
    kept = frozenset(capabilities.NUMBERS) - {"SYSLOG", "BPF", "PERFMON", "CHECKPOINT_RESTORE"}
    status = _status_after(lambda: capabilities.limit(kept), "cat")
    assert _bits(status, "CapBnd") & {34, 38, 39, 40} == set()
    assert max(_bits(status, "CapBnd")) <= _LAST


def test_no_new_privs_is_never_set() -> None:
    assert "NoNewPrivs:\t0" in _status_after(_secure, "cat")


def test_nothing_that_was_inheritable_or_ambient_is_left() -> None:
    script = (
        "from vrun import capabilities; import os;"
        "before = open('/proc/self/status').read();"
        "assert 'CapAmb:\\t0000000000000001' in before, before;"
        "capabilities.limit({'CHOWN', 'SETPCAP'});"
        "os.execvp('cat', ['cat', '/proc/self/status'])"
    )
    status = subprocess.run(
        [
            "setpriv",
            "--inh-caps",
            "+chown",
            "--ambient-caps",
            "+chown",
            sys.executable,
            "-c",
            script,
        ],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.fspath(Path.cwd())},
    ).stdout
    assert _bits(status, "CapInh") == _bits(status, "CapAmb") == set()
    assert _bits(status, "CapPrm") == {0, 8}


def test_odd_securebits_of_the_caller_are_undone() -> None:
    """With noroot a guest's root would execute without any capability."""

    def look() -> str:
        from vrun import syscalls

        syscalls.set_securebits(0b0101)  # SECBIT_NOROOT, SECBIT_NO_SETUID_FIXUP
        _secure()
        return _executed("cat", "/proc/self/status")

    assert _bits(in_child(look), "CapEff") == _SECURE


def test_a_capability_given_up_does_not_come_back() -> None:
    def look() -> str:
        _secure()
        return _executed("mount", "-t", "tmpfs", "none", "/mnt")

    assert "permission denied" in in_child(look)


def test_a_setuid_program_reaches_the_ceiling(tmp_path: Path) -> None:
    program = _copy(tmp_path, "cat")
    program.chmod(0o4755)

    def look() -> str:
        capabilities.limit(SECURE_CAPS, become=Identity(_NOBODY, _NOBODY))
        return _executed(program, "/proc/self/status")

    status = in_child(look)
    assert "Uid:\t65534\t0\t0\t0" in status
    assert _bits(status, "CapEff") == _SECURE


@need("acl")
def test_file_capabilities_work_up_to_the_ceiling(tmp_path: Path) -> None:
    program = _copy(tmp_path, "cat")
    subprocess.run(["setcap", "cap_chown,cap_kill=ep", program], check=True)

    def look() -> str:
        capabilities.limit(SECURE_CAPS, become=Identity(_NOBODY, _NOBODY))
        return _executed(program, "/proc/self/status")

    assert _bits(in_child(look), "CapEff") == {0, 5}


@need("acl")
def test_file_capabilities_beyond_the_ceiling_are_not_given(tmp_path: Path) -> None:
    program = _copy(tmp_path, "cat")
    subprocess.run(["setcap", "cap_sys_admin=p", program], check=True)

    def look() -> str:
        capabilities.limit(SECURE_CAPS, become=Identity(_NOBODY, _NOBODY))
        return _executed(program, "/proc/self/status")

    assert _bits(in_child(look), "CapPrm") == set()


def test_su_works_inside() -> None:
    def look() -> str:
        _secure()
        return _executed("su", "-s", "/bin/sh", "nobody", "-c", "id -u; grep Cap /proc/self/status")

    output = in_child(look)
    assert output.splitlines()[0] == str(_NOBODY)
    assert _bits(output, "CapEff") == set()


@pytest.mark.parametrize("kept", [SECURE_CAPS, SECURE_CAPS - {"SETUID", "SETGID"}])
def test_a_user_is_taken_even_when_the_right_to_do_so_goes(kept: frozenset[str]) -> None:
    def look() -> str:
        capabilities.limit(kept, become=Identity(1234, 2345, (3456, 4567)))
        return _executed("cat", "/proc/self/status")

    status = in_child(look)
    assert "Uid:\t1234\t1234\t1234\t1234" in status
    assert "Gid:\t2345\t2345\t2345\t2345" in status
    assert "Groups:\t3456 4567" in status
    assert _bits(status, "CapEff") == _bits(status, "CapPrm") == set()


def test_what_this_process_lacks_is_named() -> None:
    def look() -> frozenset[str]:
        capabilities.limit({"CHOWN", "SETPCAP"})
        return capabilities.missing({"CHOWN", "KILL", "SYS_BOOT"})

    assert in_child(look) == {"KILL", "SYS_BOOT"}


def test_a_kept_capability_that_this_process_lacks_is_no_failure() -> None:
    def look() -> str:
        capabilities.limit({"CHOWN", "SETPCAP"})
        capabilities.limit({"CHOWN", "KILL"})
        return _executed("cat", "/proc/self/status")

    assert _bits(in_child(look), "CapPrm") == {0}


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(KeyError):
        capabilities.mask({"FLY"})


def _copy(folder: Path, name: str) -> Path:
    """A copy of a program that a stranger can reach."""
    folder.chmod(0o755)
    for above in folder.parents:
        if above.stat().st_uid == 0 and os.fspath(above).startswith("/tmp/"):  # noqa: S108
            above.chmod(0o755)
    found = shutil.which(name)
    assert found
    return Path(shutil.copy(found, folder / name))
