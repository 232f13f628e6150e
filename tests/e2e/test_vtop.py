"""vtop in a terminal of 80 columns and 24 lines, which tmux(1) is."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.fixtures.probes import need
from tests.fixtures.vservers import SLEEPER, Host, host_for_guests, is_alive, wait_until

pytestmark = need("root", "tmux")

VTOP = Path(sys.executable).parent / "vtop"
HEADER = "  CTX NAME                 TASKS  %CPU    RSS    MEM   IO/s   CPUTIME    UPTIME"
_WAIT_S = 60
_SCRIPT = """\
printf 'a\\033[2Jb' >/proc/$$/comm
i=0
while :; do i=$((i+1)); [ $((i % 1000)) = 0 ] && sleep 0.01; done
"""
"""Busy, but not so much that others get nothing; with a name that would clear a screen."""


@dataclass(frozen=True, slots=True)
class Terminal:
    """A session of tmux, with a server of its own."""

    server: str

    def tmux(self, *words: str) -> str:
        command = ["tmux", "-f", "/dev/null", "-S", self.server, *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_WAIT_S, check=True)
        return done.stdout

    def press(self, *keys: str) -> None:
        self.tmux("send-keys", *keys)

    def lines(self) -> list[str]:
        """What the screen shows."""
        return self.tmux("capture-pane", "-p").split("\n")[:-1]

    def wait_for(self, condition: Callable[[list[str]], bool]) -> list[str]:
        """The screen as soon as it is so; it is shown where it never is."""
        seen: list[str] = []

        def look() -> bool:
            seen[:] = self.lines()
            return condition(seen)

        try:
            wait_until(look, _WAIT_S)
        except AssertionError:
            raise AssertionError("\n".join(seen)) from None
        return seen

    def row_of(self, word: str) -> list[str]:
        """The words of the list's line that has this one."""
        lines = self.wait_for(lambda lines: any(word in line.split() for line in lines[2:-1]))
        return next(line.split() for line in lines[2:-1] if word in line.split())


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """`busy` has a busy process, `idle` has none."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for host in host_for_guests(tmp_path_factory.mktemp("site"), monkeypatch):
            for name in ("busy", "idle"):
                host.add_busybox(name, SLEEPER)
                host.vserver(name, "start")
            (host.etc.vdirbase / "busy/busy.sh").write_text(_SCRIPT)
            host.inside("busy", "sh", "-c", "setsid sh /busy.sh </dev/null >/dev/null 2>&1 &")
            yield host


@pytest.fixture
def terminal(host: Host, tmp_path: Path) -> Iterator[Terminal]:
    """vtop runs in it, and says how it ended."""
    terminal = Terminal(os.fspath(tmp_path / "tmux"))
    shell = f"env LC_ALL=C.UTF-8 {VTOP} --delay 0.5; echo ended with $?; read x"
    terminal.tmux("new-session", "-d", "-x", "80", "-y", "24", shell)
    yield terminal
    terminal.tmux("kill-server")


def is_list(lines: list[str]) -> bool:
    return HEADER.startswith(lines[1]) and lines[1].startswith("  CTX NAME")


def fills(width: int, height: int, lines: list[str]) -> bool:
    """The list takes all of a screen of that size, or says that it cannot."""
    if width < 40:
        return lines[0] == "vtop: too small"
    is_wide = is_list(lines) and len(lines[1]) == len(HEADER[: width - 1].rstrip())
    return len(lines) == height and is_wide and lines[-1].startswith("sorted by")


def chosen(name: str) -> Callable[[list[str]], bool]:
    """The list is that of the processes of this guest."""
    return lambda lines: f" {name};" in lines[0] and "COMMAND" in lines[1]


def test_a_session(host: Host, terminal: Terminal) -> None:
    lines = terminal.wait_for(is_list)
    assert len(lines) == 24
    assert max(map(len, lines)) <= 80
    assert terminal.row_of("idle")[0] == str(host.state("idle")["xid"])
    terminal.wait_for(lambda _: terminal.row_of("busy")[3] not in ("-", "0.0"))
    terminal.press("n")
    terminal.wait_for(lambda lines: "sorted by name" in lines[-1])
    names = [["busy"], ["idle"], ["root"]]
    terminal.wait_for(lambda lines: [line.split()[1:2] for line in lines[2:5]] == names)
    terminal.press("h")
    terminal.wait_for(lambda lines: any("any key goes on" in line for line in lines))
    terminal.press("z")
    terminal.wait_for(is_list)

    terminal.press("Home")
    terminal.press("Enter")
    terminal.wait_for(chosen("busy"))
    row = terminal.row_of("a\\x1b[2Jb")
    pid = int(row[0])
    assert (Path(f"/proc/{pid}/comm")).read_text() == "a\x1b[2Jb\n"
    assert terminal.row_of(str(host.init_pid("busy")))[-1] == "sleep"
    terminal.press("c")
    terminal.wait_for(lambda lines: lines[2].split()[:1] == [str(pid)])
    terminal.press("n")  # who is busiest may change before the next key
    terminal.press("Home")
    terminal.press("k")
    terminal.wait_for(lambda lines: f"signal for process {pid} " in lines[-1])
    terminal.press("Escape")
    terminal.wait_for(lambda lines: "nothing was sent" in lines[-1])
    assert is_alive(pid)
    terminal.press("k")
    terminal.wait_for(lambda lines: f"signal for process {pid} " in lines[-1])
    terminal.press("kill", "Enter")
    wait_until(lambda: not is_alive(pid), _WAIT_S)
    terminal.wait_for(lambda lines: not any(line.split()[:2] == [str(pid), "R"] for line in lines))
    terminal.press("Left")
    terminal.wait_for(is_list)
    terminal.press("q")
    terminal.wait_for(lambda lines: any("ended with 0" in line for line in lines))


def test_a_guest_can_be_ended_and_the_terminal_resized(host: Host, terminal: Terminal) -> None:
    terminal.wait_for(is_list)
    terminal.tmux("set-option", "-g", "window-size", "manual")
    for width, height in ((60, 8), (20, 3), (200, 50), (80, 24)):
        terminal.tmux("resize-window", "-x", str(width), "-y", str(height))
        terminal.wait_for(partial(fills, width, height))
    terminal.press("n")
    terminal.wait_for(lambda lines: "sorted by name" in lines[-1])
    terminal.press("Home", "Down", "k")
    xid = host.state("idle")["xid"]
    terminal.wait_for(lambda lines: f"signal for all of context {xid} idle" in lines[-1])
    terminal.press("KILL", "Enter")
    host.wait_stopped("idle", _WAIT_S)
    terminal.wait_for(lambda lines: not any("idle" in line.split() for line in lines[2:-1]))
    terminal.press("C-c")
    terminal.wait_for(lambda lines: any("ended with 0" in line for line in lines))


def test_without_a_terminal_it_says_so(host: Host) -> None:
    done = subprocess.run([VTOP], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert "terminal" in done.stderr
    shell = f"TERM=no-such-terminal {VTOP}"
    command = ["script", "-qec", shell, "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_WAIT_S)
    assert done.returncode == 1
    assert "TERM=no-such-terminal" in done.stdout
    assert "Traceback" not in done.stdout
