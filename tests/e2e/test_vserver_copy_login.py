"""Ways in that a person has: passwords, passphrases, ProxyCommand, against a real sshd."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Tool
from tests.fixtures.filesystems import Site
from tests.fixtures.persons import Person, at_terminal
from tests.fixtures.probes import need, on
from tests.fixtures.sshd import PROGRAM, Machines, run_sshd, two_machines
from tests.fixtures.trees import COPY_MAY_DIFFER, File, differences, snapshot

pytestmark = [need("root", "immutable", "lease", "sshd"), on("ext4"), pytest.mark.timeout(300)]

_PASSWORD = "correct horse"  # noqa: S105 - of an sshd that nobody else reaches
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
        quiet: list[str | Path] = [*command, "-q", "web", "root@127.0.0.1:two"]
        done = subprocess.run(
            quiet,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 6
        assert "it takes: password" in done.stderr
        assert not machines.there.root("two").exists()


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
