"""A command's end as a shell sees it: messages, exit codes, streams, completion."""

import errno
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete

from vstore import cli
from vstore.errors import GuestNotFound, PoolBusy, ToolError
from vstore.guest import rundir

Run = Callable[..., int]


@pytest.fixture(autouse=True)
def _quiet_again() -> Iterator[None]:
    yield
    for name in ("vstore", "vrun"):
        logging.getLogger(name).handlers = []
        logging.getLogger(name).setLevel(logging.NOTSET)


def exit_code(
    action: Callable[[], object], *arguments: str, monkeypatch: pytest.MonkeyPatch
) -> int:
    """The code with which a command `vtest` ends that does `action`."""

    @click.command("vtest")
    @cli.verbose_option
    def command() -> object:
        """Do it."""
        return action()

    monkeypatch.setattr(sys, "argv", ["vtest", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.run(command)
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    def with_monkeypatch(action: Callable[[], object], *arguments: str) -> int:
        return exit_code(action, *arguments, monkeypatch=monkeypatch)

    return with_monkeypatch


def raising(error: BaseException) -> Callable[[], object]:
    def action() -> object:
        raise error

    return action


# --- exit codes and messages


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (20, 20), (3, 3)])
def test_what_a_command_returns_is_its_code(run: Run, returned: int | None, code: int) -> None:
    assert run(lambda: returned) == code


@pytest.mark.parametrize(
    ("error", "code"),
    [(ToolError("x"), 1), (GuestNotFound("x"), 3), (PoolBusy("x"), 4)],
)
def test_each_error_has_its_code(run: Run, error: ToolError, code: int) -> None:
    assert run(raising(error)) == code


def test_an_error_is_two_lines_on_stderr(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run(raising(GuestNotFound("there is no guest web", hint="look elsewhere")))
    captured = capsys.readouterr()
    assert captured.err == "vtest: there is no guest web\nhint: look elsewhere\n"
    assert captured.out == ""


def test_an_error_without_hint_is_one_line(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run(raising(ToolError("it is full")))
    assert capsys.readouterr().err == "vtest: it is full\n"


def test_a_message_cannot_command_the_terminal(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run(raising(ToolError("\x1b]0;owned\x07\nhint: run rm", hint="a\nb\udcff")))
    assert capsys.readouterr().err.splitlines() == [
        "vtest: \\x1b]0;owned\\x07\\nhint: run rm",
        "hint: a\\nb\\xff",
    ]


def test_a_traceback_only_with_vv(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run(raising(ToolError("x")), "-v")
    assert "Traceback" not in capsys.readouterr().err
    run(raising(ToolError("x")), "-vv")
    assert "Traceback" in capsys.readouterr().err


def test_what_the_kernel_refused_is_a_message(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(raising(OSError(errno.EIO, "Input/output error", b"/a\xff"))) == 1
    assert capsys.readouterr().err == "vtest: /a\\xff: Input/output error\n"
    assert run(raising(OSError(errno.EIO, "Input/output error"))) == 1
    assert capsys.readouterr().err == "vtest: Input/output error\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_has_its_code(run: Run, number: int) -> None:
    assert run(raising(OSError(number, "full", "/a"))) == 9


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command("vtest")
    def command() -> None:
        raise KeyError("bug")

    monkeypatch.setattr(sys, "argv", ["vtest"])
    with pytest.raises(KeyError, match="bug"):
        cli.run(command)


def test_an_interrupt_has_the_code_of_a_shell(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err.split("\n")[-2:] == ["vtest: interrupted", ""]


def test_wrong_usage_goes_to_stderr(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda: None, "--nonsense") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "--nonsense" in captured.err


def test_help_goes_to_stdout(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda: None, "--help") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.startswith("Usage: vtest [OPTIONS]")


@pytest.mark.parametrize(
    ("done", "failed", "error", "code"),
    [
        (3, 0, None, 0),
        (0, 0, None, 0),
        (3, 1, GuestNotFound("x"), 20),
        (0, 1, GuestNotFound("x"), 3),
        (0, 2, None, 1),
    ],
)
def test_code_of_work_on_many(done: int, failed: int, error: ToolError | None, code: int) -> None:
    assert cli.exit_code(done=done, failed=failed, error=error) == code


# --- as processes of their own

PROGRAM = """
import sys, time, click
from vstore import cli
@click.command("vtest")
def command():
    "Print."
    {body}
cli.run(command)
"""


def start(body: str, *, stdout: int) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(body=body)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.fspath(Path(cli.__file__).parents[1])},
    )


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES])
@pytest.mark.parametrize(("user", "hint"), [(0, ""), (1000, "hint: run as root\n")])
def test_what_the_kernel_does_not_permit_has_its_code(
    run: Run,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    user: int,
    hint: str,
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    assert run(raising(OSError(number, "not you", "/a"))) == 6
    assert capsys.readouterr().err == f"vtest: /a: not you\n{hint}"


def test_a_reader_that_went_away_is_no_news() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with start("[click.echo('x' * 100) for _ in range(10000)]", stdout=writer) as process:
        os.close(writer)
        _, complaints = process.communicate(timeout=60)
    assert (process.returncode, complaints) == (1, "")


def test_a_reader_that_went_away_before_the_last_flush_is_no_news() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with start("sys.stdout.write('x')", stdout=writer) as process:
        os.close(writer)
        _, complaints = process.communicate(timeout=60)
    assert (process.returncode, complaints) == (1, "")


def test_results_that_cannot_be_written_are_no_success() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    with start("sys.stdout.write('x')", stdout=full) as process:
        os.close(full)
        _, complaints = process.communicate(timeout=60)
    assert process.returncode == 9
    assert complaints.startswith("vtest: No space left on device\n")
    assert "Traceback" not in complaints


CLOSED = ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"]


@pytest.mark.parametrize("closed", CLOSED)
def test_a_caller_that_closes_a_stream_finds_nothing_of_it_in_a_file(
    closed: str, tmp_path: Path
) -> None:
    body = f"""
    import subprocess
    with open({os.fspath(tmp_path / "file")!r}, "w") as file:
        assert file.fileno() > 2
        click.echo("out")
        click.echo("err", err=True)
        subprocess.run(["sh", "-c", "cat; echo out; echo err >&2"], check=True)
        sys.stdin.isatty()
    """
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", PROGRAM.format(body=body)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.fspath(Path(cli.__file__).parents[1])},
    )
    assert done.returncode == 0
    assert done.stdout == ("" if ">&-" in closed.split() else "out\nout\n")
    assert done.stderr == ("" if "2>&-" in closed else "err\nerr\n")
    assert (tmp_path / "file").read_bytes() == b""


def test_sigint_ends_a_command_with_130() -> None:
    with start("click.echo('ready'); time.sleep(30)", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, complaints = process.communicate(timeout=60)
    assert process.returncode == 130
    assert complaints.strip() == "vtest: interrupted"


def test_heavy_modules_wait_until_they_are_needed() -> None:
    heavy = {"tqdm", "json", "blake3", "sqlite3", "paramiko", "pyroute2"}
    body = f"click.echo(sorted({heavy!r} & sys.modules.keys()))"
    with start(body, stdout=subprocess.PIPE) as process:
        shown, _ = process.communicate(timeout=60)
    assert shown == "[]\n"


# --- logging


@pytest.mark.parametrize(
    ("arguments", "levels"),
    [
        ([], ["warning"]),
        (["-v"], ["warning", "info"]),
        (["-vv"], ["warning", "info", "debug"]),
        (["-vvv"], ["warning", "info", "debug"]),
    ],
)
def test_each_v_says_more(
    run: Run, capsys: pytest.CaptureFixture[str], arguments: list[str], levels: list[str]
) -> None:
    log = logging.getLogger("vstore.somewhere")

    def action() -> None:
        for level in ("warning", "info", "debug"):
            getattr(log, level)("%s of %s", level, "a\x1bb")

    run(action, *arguments)
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [f"vtest: {level} of a\\x1bb" for level in levels]
    assert captured.out == ""


def test_verbosity_of_a_group_holds_for_its_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.group("vtest")
    @cli.verbose_option
    def group() -> None:
        """Many."""

    @group.command("one")
    @cli.verbose_option
    def one() -> None:
        """One."""
        logging.getLogger("vstore.somewhere").info("said")

    for arguments, said in ((["-v", "one"], True), (["one", "-v"], True), (["one"], False)):
        monkeypatch.setattr(sys, "argv", ["vtest", *arguments])
        with pytest.raises(SystemExit):
            cli.run(group)
        assert ("vtest: said" in capsys.readouterr().err) == said


# --- options


def test_shared_options_reach_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[object] = []

    @click.command("vtest")
    @cli.guest_arguments
    @cli.pool_option
    @cli.json_option
    @cli.verbose_option
    @cli.version_option
    def command(*, guests: tuple[str, ...], pool_path: Path | None, as_json: bool) -> None:
        """Take."""
        got.extend((guests, pool_path, as_json))

    monkeypatch.setattr(sys, "argv", ["vtest", "a", "b", "--pool", "/p", "--json"])
    with pytest.raises(SystemExit):
        cli.run(command)
    assert got == [("a", "b"), Path("/p"), True]


# --- completion


@pytest.fixture
def guests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VSERVER_CONFDIR", os.fspath(tmp_path))
    for name in ("web", "web2", "db"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vdir").symlink_to(tmp_path)
    (tmp_path / "web3").mkdir()
    (tmp_path / "web3/vdir").symlink_to("/nowhere")


@click.command("vtest")
@cli.guest_arguments
def many(guests: tuple[str, ...]) -> None:
    """Many guests."""


@click.command("vtest")
@cli.guest_argument
def single(guest_name: str) -> None:
    """One guest."""


def completed(command: click.Command, arguments: list[str], incomplete: str) -> list[str]:
    shell = ShellComplete(command, {}, "vtest", "_VTEST_COMPLETE")
    return [item.value for item in shell.get_completions(arguments, incomplete)]


@pytest.mark.usefixtures("guests")
def test_guest_names_complete(capsys: pytest.CaptureFixture[str]) -> None:
    assert completed(many, [], "") == ["db", "web", "web2"]
    assert completed(many, [], "we") == ["web", "web2"]
    assert completed(many, ["web"], "we") == ["web2"]
    assert completed(single, [], "d") == ["db"]
    assert capsys.readouterr().err == ""


def test_completion_survives_what_it_cannot_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("VSERVER_CONFDIR", os.fspath(tmp_path / "file"))
    assert completed(many, [], "") == []
    assert rundir().is_absolute()


def test_who_interrupts_a_command_while_it_loads_is_shown_no_traceback() -> None:
    script = """
import os, signal, sys
def interrupt(event, arguments):
    if event == "import" and arguments[0] == "vstore.copy.access":
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(interrupt)
from vstore.commands import vserver_copy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")
