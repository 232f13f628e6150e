"""Ways in that a person has: passwords, passphrases, questions of PAM, ProxyCommand, against a real
sshd.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.conftest import Tool
from tests.fixtures.filesystems import Site
from tests.fixtures.persons import Person, at_terminal
from tests.fixtures.probes import need, on
from tests.fixtures.sshd import PROGRAM, Machines, Server, run_sshd, two_machines
from tests.fixtures.trees import COPY_MAY_DIFFER, File, differences, snapshot
from tests.fixtures.windows import wait_for

pytestmark = [need("root", "immutable", "lease", "sshd"), on("ext4"), pytest.mark.timeout(300)]

_PASSWORD = "correct horse"  # noqa: S105 - of an sshd that nobody else reaches
_CODE = "271828"
_WAIT_S = 60.0


@pytest.fixture
def machines(site: Site) -> Iterator[Machines]:
    with two_machines(site) as found:
        found.here.add_guest("web", [File("file", b"content " * 99)])
        yield found


def _has_come(machines: Machines, name: str = "web") -> bool:
    before, after = snapshot(machines.here.root("web")), snapshot(machines.there.root(name))
    return differences(before, after, ignoring=COPY_MAY_DIFFER) == []


def _command(machines: Machines, port: int, known: Path, *more: str | Path) -> list[str | Path]:
    reach: list[str | Path] = ["-p", f"{port}", "-F", os.devnull, "--known-hosts", known]
    return [PROGRAM, *reach, *more, "--remote-command", machines.command_there]


def _type(person: Person, question: str, answer: str) -> None:
    person.wait_for(question, timeout_s=_WAIT_S)
    person.type(f"{answer}\n")


def test_a_password_is_asked_for_and_never_shown(machines: Machines, site: Site) -> None:
    folder = site.filesystem.folder / "by-password"
    with run_sshd(folder, password=_PASSWORD) as server:
        command = _command(machines, server.port, server.known_hosts())
        with at_terminal([*command, "web", "root@127.0.0.1:"]) as person:
            person.wait_for("root@127.0.0.1's password: ", timeout_s=_WAIT_S)
            person.type(f"{_PASSWORD}\n")
            said = person.wait_for("copy root@127.0.0.1:web", timeout_s=_WAIT_S)
            assert person.wait(timeout_s=_WAIT_S) == 0
        assert _PASSWORD not in said + person.seen
        assert _has_come(machines)
        with at_terminal([*command, "web", "root@127.0.0.1:two"]) as person:
            _type(person, "password: ", "wrong")
            said = person.wait_for("refuses the login of root", timeout_s=_WAIT_S)
            assert person.wait(timeout_s=_WAIT_S) == 6
        _check_refused(command, "password")
        assert not machines.there.root("two").exists()


def _check_refused(command: list[str | Path], way: str) -> None:
    """Nobody is there to be asked: the way in that remains is named."""
    quiet: list[str | Path] = [*command, "-q", "web", "root@127.0.0.1:two"]
    done = subprocess.run(
        quiet, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 6
    assert f"it takes: {way}" in done.stderr


def _asking(folder: Path, *settings: str) -> AbstractContextManager[Server]:
    """An sshd whose PAM shows a notice, then asks for the password, then for a code."""
    folder.mkdir()
    (folder / "notice").write_text("Only for friends\033[2J of the house\n")
    script = 'use DB_File; tie %h, "DB_File", $ARGV[0] or die; $h{root} = $ARGV[1]; untie %h'
    subprocess.run(["perl", "-e", script, folder / "codes.db", _CODE], check=True)
    lines = [
        f"auth required pam_echo.so file={folder / 'notice'}",
        "auth required pam_unix.so",
        f"auth required pam_userdb.so db={folder / 'codes'} crypt=none",
        "account required pam_permit.so",
        "session required pam_permit.so",
    ]
    pam = "\n".join([*lines, ""])
    return run_sshd(folder, *settings, password=_PASSWORD, pam=pam)


def _answer_both(person: Person, code: str) -> str:
    said = person.wait_for("(root@127.0.0.1) Password: ", timeout_s=_WAIT_S)
    person.type(f"{_PASSWORD}\n")
    said += person.wait_for("(root@127.0.0.1) Password: ", timeout_s=_WAIT_S)
    person.type(f"{code}\n")
    return said


def test_each_question_of_the_other_machine_is_put_to_the_person(
    machines: Machines, site: Site
) -> None:
    """Keyboard-interactive: two questions, with a notice whose escape sequence does nothing."""
    with _asking(site.filesystem.folder / "asking") as server:
        command = _command(machines, server.port, server.known_hosts())
        with at_terminal([*command, "web", "root@127.0.0.1:"]) as person:
            said = _answer_both(person, _CODE)
            said += person.wait_for("copy root@127.0.0.1:web", timeout_s=_WAIT_S)
            assert person.wait(timeout_s=_WAIT_S) == 0
        assert "(root@127.0.0.1) Only for friends [2J of the house" in said
        assert "\033[2J" not in said
        assert _PASSWORD not in said + person.seen
        assert _CODE not in said + person.seen
        assert _has_come(machines)
        with at_terminal([*command, "web", "root@127.0.0.1:two"]) as person:
            _answer_both(person, "000000")
            person.wait_for("refuses the login of root", timeout_s=_WAIT_S)
            assert person.wait(timeout_s=_WAIT_S) == 6
        assert not machines.there.root("two").exists()


def test_a_key_and_then_the_questions_where_both_are_wanted(machines: Machines, site: Site) -> None:
    both = ["PubkeyAuthentication yes", "AuthenticationMethods publickey,keyboard-interactive"]
    both += ["LogLevel VERBOSE"]
    with _asking(site.filesystem.folder / "asking", *both) as server:
        command = _command(machines, server.port, server.known_hosts(), "-i", server.key)
        with at_terminal([*command, "web", "root@127.0.0.1:"]) as person:
            _answer_both(person, _CODE)
            person.wait_for("copy root@127.0.0.1:web", timeout_s=_WAIT_S)
            assert person.wait(timeout_s=_WAIT_S) == 0
        assert _has_come(machines)
        log = (server.folder / "log").read_text()
        assert "Partial publickey for root" in log
        assert "Accepted keyboard-interactive/pam for root" in log
        _check_refused(command, "keyboard-interactive")


def test_who_gives_up_at_a_question_finds_the_terminal_as_it_was(
    machines: Machines, site: Site
) -> None:
    with _asking(site.filesystem.folder / "asking") as server:
        command = _command(machines, server.port, server.known_hosts())
        with at_terminal([*command, "web", "root@127.0.0.1:"]) as person:
            person.wait_for("(root@127.0.0.1) Password: ", timeout_s=_WAIT_S)
            assert not person.shows_typing()
            person.type("\3")
            wait_for(person.shows_typing)
            assert person.wait(timeout_s=_WAIT_S) != 0
    assert not machines.there.root("web").exists()


def test_a_passphrase_is_asked_for_and_never_by_a_quiet_run(machines: Machines) -> None:
    server = machines.server
    change = ["ssh-keygen", "-q", "-p", "-P", "", "-N", _PASSWORD, "-f", os.fspath(server.key)]
    subprocess.run(change, check=True)
    command = _command(machines, server.port, server.known_hosts(), "-i", server.key)
    with at_terminal([*command, "web", "127.0.0.1:"]) as person:
        _type(person, f"Passphrase of {server.key}: ", _PASSWORD)
        person.wait_for("copy 127.0.0.1:web", timeout_s=_WAIT_S)
        assert person.wait(timeout_s=_WAIT_S) == 0
    assert _has_come(machines)
    with at_terminal([*command, "-q", "web", "127.0.0.1:two"]) as person:
        person.wait_for("refuses the login", timeout_s=_WAIT_S)
        assert person.wait(timeout_s=_WAIT_S) == 6


def test_a_proxy_command_carries_the_connection(
    machines: Machines, tool: Tool, tmp_path: Path
) -> None:
    """Through a program that carries stdin and stdout, whose words ssh_config expands."""
    server = machines.server
    script = tmp_path / "carry.py"
    script.write_text(_CARRIER)
    text = (
        f"Host other\n  HostName 127.0.0.1\n  Port {server.port}\n  User root\n"
        f"  IdentityFile {server.key}\n  ProxyCommand {sys.executable} {script} %h %p\n"
    )
    config = tmp_path / "config"
    config.write_text(text)
    (machines.here.root("web") / "large").write_bytes(os.urandom(3 << 20))
    command: list[str | Path] = ["-q", "-F", config, "--known-hosts", server.known_hosts()]
    command += ["--remote-command", machines.command_there]
    done = tool("vserver-copy", *command, "web", "other:")
    assert (done.returncode, done.stderr) == (0, "")
    assert _has_come(machines)
    assert (tmp_path / "carried").read_text() == f"127.0.0.1 {server.port}"
    assert tool("vserver-copy", *command, "--refresh", "web", "other:").returncode == 0
    config.write_text(text.replace(f"{script}", "/nowhere/at/all"))
    done = tool("vserver-copy", *command, "web", "other:two")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "other: " in done.stderr
    assert not machines.there.root("two").exists()


_CARRIER = """
import contextlib, os, pathlib, socket, sys, threading
pathlib.Path(__file__).with_name("carried").write_text(" ".join(sys.argv[1:]))
there = socket.create_connection((sys.argv[1], int(sys.argv[2])))
def back():
    with contextlib.suppress(ConnectionError):
        while data := there.recv(65536):
            os.write(1, data)
    os._exit(0)
threading.Thread(target=back, daemon=True).start()
with contextlib.suppress(ConnectionError):  # who is through need not have read all
    while data := os.read(0, 65536):
        there.sendall(data)
there.shutdown(socket.SHUT_WR)
threading.Event().wait(60)
"""
