"""A command in a guest, and a person at a terminal of the host."""

import os
import re
import shlex
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import pytest

from tests.fixtures.contexts import Context, Wish, perl_calls, starting
from tests.fixtures.joins import PROGRAM, command_of
from tests.fixtures.persons import Person, at_terminal
from tests.fixtures.witness import children_of, link, state_of, wait_until

Start = Callable[[Wish], Context]
start = pytest.fixture(starting)

_JOIN = " ".join(PROGRAM)


@pytest.fixture
def web(start: Start) -> Context:
    """A guest that is configured with nothing."""
    return start(Wish())


def _joining(*arguments: str, size: tuple[int, int] = (24, 80)) -> AbstractContextManager[Person]:
    return at_terminal([*PROGRAM, *arguments], size=size)


def _in_shell(script: str) -> AbstractContextManager[Person]:
    """A person whose shell runs `script` and then waits for a line to be typed."""
    return at_terminal(["/bin/sh", "-c", f"{script}; echo over; read line"])


def _client_of(person: Person) -> int:
    """The program that a person's shell has started to join the guest."""

    wanted = os.fsencode("\0".join(PROGRAM))

    def command_line(pid: int) -> bytes:
        with suppress(OSError):  # it has ended meanwhile
            return Path(f"/proc/{pid}/cmdline").read_bytes()
        return b""

    def found() -> list[int]:
        return [pid for pid in children_of(person.pid) if command_line(pid).startswith(wanted)]

    wait_until(lambda: bool(found()))
    return found()[0]


# --- the terminal inside


def test_the_command_has_a_terminal_of_its_guest(web: Context) -> None:
    script = "tty; ls -l /dev/pts; readlink /proc/$$/fd/0; exec sleep 60"
    with _joining("exec", "web", "sh", "-c", script) as person:
        seen = person.wait_for("/dev/pts/0\r\n") + person.wait_for("/dev/pts/0\r\n")
        pid = command_of(person.pid, "sleep")

        assert "crw--w----" in seen
        of_host = Path("/dev/pts").stat().st_dev
        for fd in range(3):
            assert link(f"/proc/{pid}/fd/{fd}") == "/dev/pts/0"
            assert Path(f"/proc/{pid}/fd/{fd}").stat().st_dev != of_host
        assert not Path(f"/proc/{pid}/fd/3").exists()


def test_the_terminal_controls_the_commands_session(web: Context) -> None:
    with _joining("exec", "web", "sh", "-c", "echo seen >/dev/tty; cat /proc/self/stat") as person:
        person.wait_for("seen\r\n")
        person.wait_for(")")
        fields = person.wait_for("\n").split()

    group, session, _, foreground = (int(field) for field in fields[2:6])
    assert group == session == foreground


def test_a_users_terminal_is_the_users(web: Context) -> None:
    with _joining("suexec", "web", "bob", "sh", "-c", "ls -ln $(tty); echo x >$(tty)") as person:
        seen = person.wait_for("x\r\n")

    assert re.search(r"crw--w----\s+1 1000\s+5 ", seen)


def test_the_window_has_the_same_size_and_keeps_it(web: Context) -> None:
    script = "trap 'stty size; exit' WINCH; stty size; while :; do sleep 0.01; done"
    with _joining("exec", "web", "sh", "-c", script, size=(33, 99)) as person:
        person.wait_for("33 99\r\n")
        person.resize(44, 111)
        person.wait_for("44 111\r\n")


def test_what_is_typed_reaches_the_command_once(web: Context) -> None:
    with _joining("exec", "web", "sh", "-c", 'read word; echo "got $word"') as person:
        command_of(person.pid, "sh")
        wait_until(lambda: not person.shows_typing())
        person.type("hello\r")

        assert person.wait_for("got hello\r\n").count("hello") == 2  # its echo, and the answer


def test_an_interrupt_that_is_typed_is_the_commands(web: Context) -> None:
    script = "trap 'echo caught; exit 4' INT; echo on; while :; do sleep 0.01; done"
    with _joining("exec", "web", "sh", "-c", script) as person:
        person.wait_for("on\r\n")
        person.type("\x03")
        person.wait_for("caught\r\n")

        assert person.wait() == 4


def test_enter_is_a_shell_with_job_control(web: Context) -> None:
    with _joining("enter", "web") as person:
        person.type("echo $((6 * 7)) $0\r")
        seen = person.wait_for("42 /bin/sh\r\n")
        person.type("exit 3\r")

        assert person.wait() == 3
        assert "job control" not in seen + person.seen


def test_a_closed_window_hangs_the_command_up(web: Context) -> None:
    with _joining("exec", "web", "sleep", "60") as person:
        pid = command_of(person.pid, "sleep")
        person.hang_up()

        assert person.wait() == 128 + signal.SIGHUP
        wait_until(lambda: not Path(f"/proc/{pid}").exists())


# --- the caller's terminal


def test_the_callers_terminal_is_raw_meanwhile_and_then_as_before(web: Context) -> None:
    script = f"stty -g; {_JOIN} exec web sh -c 'echo inside; read line'; stty -g"
    with _in_shell(script) as person:
        before = person.wait_for("\r\n")
        person.wait_for("inside\r\n")
        assert not person.shows_typing()

        person.type("\r")

        assert person.wait_for("over\r\n").endswith(f"{before}over\r\n")
        assert person.shows_typing()


def test_the_callers_terminal_is_as_before_when_we_are_killed_softly(web: Context) -> None:
    with _in_shell(f"stty -g; {_JOIN} exec web sleep 60; stty -g") as person:
        before = person.wait_for("\r\n")
        client = _client_of(person)
        command_of(client, "sleep")

        os.kill(client, signal.SIGTERM)

        assert person.wait_for("over\r\n").endswith(f"{before}over\r\n")


def test_stopped_we_leave_the_terminal_as_it_was(web: Context) -> None:
    with at_terminal(["/bin/bash", "--norc", "-i"]) as person:
        person.type("PS1='> '\r")
        person.type(f"{_JOIN} exec web sleep 60\r")
        client = _client_of(person)
        inside = command_of(client, "sleep")
        wait_until(lambda: not person.shows_typing())

        os.kill(client, signal.SIGTSTP)
        person.wait_for("Stopped")
        wait_until(lambda: state_of(inside) == "T")

        person.type("fg\r")
        wait_until(lambda: state_of(inside) == "S")
        person.type("\x03")
        person.wait_for("> ")


def test_in_the_background_the_terminal_is_left_alone(web: Context) -> None:
    with at_terminal(["/bin/bash", "--norc", "-i"]) as person:
        person.type("PS1='> '\r")
        person.type(f"{_JOIN} exec web sh -c 'sleep 0.3; echo from behind' &\r")
        person.wait_for("from behind")
        person.type("jobs; echo fine\r")

        assert "Stopped" not in person.wait_for("fine\r\n")


def test_output_to_a_file_is_no_terminals(web: Context, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with _in_shell(f"{_JOIN} exec web sh -c 'read word; echo $word' >{out}") as person:
        command_of(_client_of(person), "sh")
        person.type("word\r")
        person.wait_for("over\r\n")

    assert out.read_text() == "word\n"


def test_in_a_pipeline_lines_that_are_typed_arrive(web: Context) -> None:
    with _in_shell(f"{_JOIN} exec web sh -c 'tty; read answer; echo $answer!' | cat") as person:
        person.wait_for("not a tty\r\n")
        person.type("yes\n")
        person.wait_for("yes!\r\n")
        person.wait_for("over\r\n")


# --- attacks


_TIOCSTI = r"""
    my %call = (CALLS);
    $| = 1;
    open my $tty, "+<", "/dev/tty";
    for my $fd (0, 1, 2, defined $tty ? fileno $tty : ()) {
        for my $byte (split //, "echo pwn\$((40 + 2))ed\n") {
            my $copy = $byte;
            syscall($call{ioctl}, $fd, 0x5412, $copy);
        }
    }
    print "tried\n";
"""


def _tiocsti() -> str:
    return _TIOCSTI.replace("CALLS", perl_calls())


@pytest.mark.parametrize("redirected", ["", "</dev/null", "2>/dev/null | cat"])
def test_nothing_can_be_typed_into_the_callers_terminal(start: Start, redirected: str) -> None:
    start(Wish(files={"push.pl": _tiocsti()}))
    with at_terminal(["/bin/bash", "--norc", "-i"]) as person:
        person.type(f"{_JOIN} exec web perl /push.pl {redirected}\r")
        seen = person.wait_for("tried\r\n") + person.wait_for("# ")
        person.type("echo cle''an\r")
        seen += person.wait_for("clean\r\n")

    assert "pwn42ed" not in seen


@pytest.mark.skipif(
    Path("/proc/sys/dev/tty/legacy_tiocsti").read_text() == "0\n",
    reason="the kernel refuses TIOCSTI altogether",
)
def test_the_attack_works_on_a_terminal_that_is_handed_on(start: Start) -> None:
    web = start(Wish(files={"push.pl": _tiocsti()}))
    with at_terminal(["/bin/bash", "--norc", "-i"]) as person:
        person.type(f"perl {shlex.quote(str(web.root / 'push.pl'))}\r")
        person.wait_for("tried\r\n")

        person.wait_for("pwn42ed\r\n")
