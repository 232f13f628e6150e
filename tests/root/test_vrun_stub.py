"""The stub as the kernel runs it; /bin/sh, /proc and exit statuses are the witnesses."""

import errno
import fcntl
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fixtures.inside import in_child
from vrun import namespaces, stub
from vrun.stub import Ended, NotExecuted, Report, Started

_KINDS: tuple[stub.Kind, ...] = ("exec", "wait", "join")
_FORKING: tuple[stub.Kind, ...] = ("wait", "join")


@dataclass(frozen=True, slots=True)
class Run:
    pid: int
    code: int
    """As os.waitstatus_to_exitcode() gives it: negative for a signal."""
    output: str
    reports: list[Report]
    seconds: float


def _run(
    kind: stub.Kind,
    path: str,
    argv: tuple[str, ...],
    *,
    environment: dict[str, str] | None = None,
    before: Callable[[], object] = lambda: None,
    has_report: bool = True,
) -> Run:
    """Become the stub in a child of ours; its standard output is a pipe."""
    output_fd, write_fd = os.pipe()
    report_fd, tell_fd = os.pipe()
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            os.dup2(write_fd, 1)
            before()
            stub.execute(
                kind,
                path,
                argv,
                environment or {},
                name="vstub",
                report_fd=tell_fd if has_report else None,
            )
        os._exit(99)
    os.close(write_fd)
    os.close(tell_fd)
    output, reports = _read_all(output_fd), _read_all(report_fd)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    seconds = time.monotonic() - start
    return Run(pid, code, output.decode(), stub.parse_reports(reports), seconds)


def _read_all(fd: int) -> bytes:
    with os.fdopen(fd, "rb") as file:
        return file.read()


def _sh(kind: stub.Kind, script: str, *arguments: str, has_report: bool = True) -> Run:
    return _run(kind, "/bin/sh", ("sh", "-c", script, "sh", *arguments), has_report=has_report)


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("status", [0, 1, 7, 255])
def test_it_ends_with_the_status_of_the_command(kind: stub.Kind, status: int) -> None:
    assert _sh(kind, f"exit {status}").code == status


@pytest.mark.parametrize("kind", _FORKING)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, 34])
def test_a_signal_that_ends_the_command_becomes_128_and_its_number(
    kind: stub.Kind, number: int
) -> None:
    run = _sh(kind, f"ulimit -c 0; kill -{int(number)} $$")
    assert run.code == 128 + number
    (ended,) = (report for report in run.reports if isinstance(report, Ended))
    assert os.WTERMSIG(ended.wait_status) == number


def test_in_its_place_the_command_itself_is_what_ends() -> None:
    assert _sh("exec", "kill -9 $$").code == -9


@pytest.mark.parametrize("kind", _KINDS)
def test_arguments_and_environment_arrive_as_they_are(kind: stub.Kind) -> None:
    run = _run(
        kind,
        "/usr/bin/env",
        ("env", "sh", "-c", 'echo "$#:$1:$2:$A:$B"', "sh", "", "two words\n"),
        environment={"A": "1", "B": "x=y", "PATH": "/usr/bin:/bin"},
    )
    assert run.output == "2::two words\n:1:x=y\n"


@pytest.mark.parametrize("kind", _KINDS)
def test_a_command_that_is_missing_gives_127_and_is_reported(kind: stub.Kind) -> None:
    run = _run(kind, "/no/such/command", ("x",))
    assert run.code == 127
    assert NotExecuted(errno.ENOENT) in run.reports


@pytest.mark.parametrize("kind", _KINDS)
def test_a_file_that_cannot_be_executed_gives_126_and_is_reported(
    kind: stub.Kind, tmp_path: Path
) -> None:
    plain, empty = tmp_path / "plain", tmp_path / "empty"
    plain.write_text("#!/bin/sh\n")
    empty.write_text("")
    empty.chmod(0o755)
    for path, number in ((plain, errno.EACCES), (empty, errno.ENOEXEC), (tmp_path, errno.EACCES)):
        run = _run(kind, os.fspath(path), ("x",))
        assert run.code == 126
        assert NotExecuted(number) in run.reports


@pytest.mark.parametrize("kind", _KINDS)
def test_a_command_that_runs_is_told_apart_from_one_that_does_not(kind: stub.Kind) -> None:
    run = _sh(kind, "exit 127")
    assert run.code == 127
    assert not [report for report in run.reports if isinstance(report, NotExecuted)]


@pytest.mark.parametrize("kind", _FORKING)
def test_the_child_and_its_end_are_reported(kind: stub.Kind) -> None:
    run = _sh(kind, "echo $$; exit 3")
    started, ended = run.reports
    assert started == Started(int(run.output))
    assert ended == Ended(3 << 8)


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("has_report", [True, False])
def test_the_command_gets_no_descriptor_above_2(kind: stub.Kind, has_report: bool) -> None:
    secret_fd = os.open("/etc/hostname", os.O_RDONLY)
    os.set_inheritable(secret_fd, True)
    try:
        run = _sh(kind, "echo /proc/self/fd/*", has_report=has_report)
    finally:
        os.close(secret_fd)
    numbers = {int(path.rpartition("/")[2]) for path in run.output.split()}
    assert numbers - {3} == {0, 1, 2}, "3 is the shell's own, of the folder it lists"


_OF_LIBC = 0b11 << 31
"""Signals 32 and 33, which the C library keeps for itself and lets nobody set."""


@pytest.mark.parametrize("kind", _KINDS)
def test_signals_are_as_a_new_program_expects_them(kind: stub.Kind) -> None:
    def ignore() -> None:
        for number in (signal.SIGHUP, signal.SIGPIPE, signal.SIGCHLD, signal.SIGRTMIN + 3):
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGRTMAX})

    run = _run(kind, "/bin/grep", ("grep", "^Sig[BI]", "/proc/self/status"), before=ignore)
    sets = [int(line.split()[1], 16) for line in run.output.splitlines()]
    assert [held & ~_OF_LIBC for held in sets] == [0, 0]


def test_a_shell_that_joins_has_a_session_of_its_own() -> None:
    run = _sh("join", "echo $$; cut -d' ' -f6 /proc/self/stat")
    shell, session = map(int, run.output.split())
    assert shell == session


def test_nobody_reading_the_reports_is_no_trouble() -> None:
    report_fd, tell_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            os.close(report_fd)
            stub.execute("wait", "/bin/sh", ("sh", "-c", "exit 5"), {}, report_fd=tell_fd)
        os._exit(99)
    os.close(report_fd)
    os.close(tell_fd)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5


def _stub_that_waits() -> tuple[int, int]:
    """A stub that runs `sleep`: (its pid, its child's)."""
    report_fd, tell_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            stub.execute(
                "wait", "/bin/sleep", ("sleep", "60"), {}, name="web-init", report_fd=tell_fd
            )
        os._exit(99)
    os.close(tell_fd)
    with os.fdopen(report_fd, "rb", buffering=0) as reports:
        (started,) = stub.parse_reports(reports.read(8))
    assert isinstance(started, Started)
    return pid, started.pid


def test_what_a_guest_sees_of_it_is_a_sealed_file_in_memory() -> None:
    pid, child = _stub_that_waits()
    try:
        program = Path(f"/proc/{pid}/exe")
        assert os.fspath(program.readlink()).startswith("/memfd:")
        with pytest.raises(OSError, match="Text file busy"):
            os.open(program, os.O_RDWR)
        fd = os.open(program, os.O_RDONLY)
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        os.close(fd)
        assert seals & 0xF == fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | (
            fcntl.F_SEAL_WRITE
        )
        mapped = Path(f"/proc/{pid}/maps").read_text()
        files = {line.split(maxsplit=5)[5] for line in mapped.splitlines() if "/" in line}
        assert files == {"/memfd:init (deleted)"}
        assert Path(f"/proc/{pid}/comm").read_text() == "web-init\n"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_it_cannot_be_written_even_when_it_no_longer_runs() -> None:
    pid, child = _stub_that_waits()
    program_fd = os.open(f"/proc/{pid}/exe", os.O_PATH)
    os.kill(child, signal.SIGKILL)
    os.waitpid(pid, 0)
    try:
        fd = os.open(f"/proc/self/fd/{program_fd}", os.O_RDWR)
        with pytest.raises(PermissionError):
            os.write(fd, b"#!/bin/sh")
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
        os.close(fd)
    finally:
        os.close(program_fd)


@pytest.mark.parametrize("kind", _KINDS)
def test_a_guests_init_that_points_to_the_running_program_gets_no_file_of_the_host(
    kind: stub.Kind, tmp_path: Path
) -> None:
    init = tmp_path / "init"
    init.symlink_to("/proc/self/exe")
    run = _run(kind, os.fspath(init), ("init", "/no/such/command"))
    assert run.code == 127, "the stub ran once more; an interpreter would have said 2"


def test_as_process_1_it_stays_until_the_last_orphan_is_gone() -> None:
    script = "for n in 1 2 3; do (sleep 0.$n; kill -0 1 && echo $n) & done; exit 5"
    run = in_child(lambda: _first_process(script), kinds=("pid", "mnt"))
    assert sorted(run.output.split()) == ["1", "2", "3"]
    assert run.code == 5
    assert run.seconds > 0.25


def _first_process(script: str) -> Run:
    """Run the stub as process 1 of yet another pid namespace."""
    namespaces.enter_new(("pid",))
    return _sh("wait", script)


def test_as_process_1_it_leaves_no_zombie() -> None:
    script = """
    mount -t proc proc /proc
    for n in 1 2 3 4 5; do (sleep 0.05 &) ; done
    n=0
    while set -- /proc/[0-9]*; [ $# -gt 2 ] && [ $n -lt 600 ]; do sleep 0.05; n=$((n + 1)); done
    grep -l '^State:.Z' /proc/[0-9]*/status
    set -- /proc/[0-9]*
    echo $#
    """
    run = in_child(lambda: _first_process(script), kinds=("pid", "mnt"))
    assert run.output.split() == ["2"], "the stub and the shell"


def test_the_end_of_the_first_child_is_reported_while_others_run() -> None:
    report_fd, tell_fd = os.pipe()
    held_fd, hold_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            namespaces.enter_new(("pid",))
            if os.fork() == 0:
                os.dup2(held_fd, 0)
                argv = ("sh", "-c", "exec 3<&0; cat <&3 & exit 4")
                stub.execute("wait", "/bin/sh", argv, {}, report_fd=tell_fd)
            os.close(hold_fd)
            os.wait()
        os._exit(0)
    os.close(tell_fd)
    os.close(held_fd)
    with os.fdopen(report_fd, "rb", buffering=0) as file:
        reports = stub.parse_reports(file.read(8) + file.read(8))
    assert reports[-1] == Ended(4 << 8)
    time.sleep(0.3)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    os.close(hold_fd)  # the other one reads its end
    os.waitpid(pid, 0)


@pytest.mark.parametrize("kind", ["exec", "wait"])
def test_nothing_is_executed_before_the_word(kind: stub.Kind, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    pid, near = _waiting(kind, f": >{mark}")
    time.sleep(0.05)
    assert (mark.exists(), near.send(b"\n")) == (False, 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert mark.exists()
    near.close()


@pytest.mark.parametrize("kind", ["exec", "wait"])
def test_it_ends_where_nobody_is_left_to_give_the_word(kind: stub.Kind, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    pid, near = _waiting(kind, f": >{mark}")
    near.close()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    assert not mark.exists()


def _waiting(kind: stub.Kind, line: str) -> tuple[int, socket.socket]:
    """The stub with a line of a shell to execute, and the other end of its socket."""
    near, far = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            stub.execute(kind, "/bin/sh", ("sh", "-c", line), {}, report_fd=far.fileno())
        os._exit(99)
    far.close()
    return pid, near
