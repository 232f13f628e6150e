"""Who the other machine is: every form of known_hosts and ssh_config, against a real sshd."""

import base64
import hashlib
import hmac
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.wires import THERE, joined
from tests.conftest import Tool
from tests.fixtures.filesystems import Site
from tests.fixtures.probes import need, on
from tests.fixtures.sshd import (
    PROGRAM,
    Machines,
    Server,
    remote_command,
    run_sshd,
    two_machines,
)
from tests.fixtures.trees import COPY_MAY_DIFFER, File, differences, snapshot
from tests.fixtures.windows import wait_for

pytestmark = [need("root", "immutable", "lease", "sshd"), on("ext4")]

_NO_KEYS = 1
"""What ssh-add(1) -l ends with where an agent answers that has no key."""


@pytest.fixture
def machines(site: Site) -> Iterator[Machines]:
    with two_machines(site) as found:
        found.here.add_guest("web", [File("file", b"content " * 99)])
        yield found


@pytest.fixture
def home(site: Site, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A HOME with an empty .ssh, and no agent."""
    folder = site.filesystem.folder / "home"
    (folder / ".ssh").mkdir(mode=0o700, parents=True)
    monkeypatch.setenv("HOME", os.fspath(folder))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return folder


def _copy(
    tool: Tool, machines: Machines, *arguments: str | Path, host: str = "127.0.0.1"
) -> subprocess.CompletedProcess[str]:
    command = ["--remote-command", machines.command_there]
    done = tool("vserver-copy", "-q", *command, *arguments, "web", f"{host}:")
    assert "Traceback" not in done.stderr
    return done


def _by_hand(machines: Machines, known: Path) -> list[str | Path]:
    server = machines.server
    return [
        *("-p", f"{server.port}", "-i", server.key, "-F", os.devnull),
        *("--known-hosts", known),
    ]


def _has_come(machines: Machines) -> bool:
    before, after = (snapshot(site.root("web")) for site in (machines.here, machines.there))
    return differences(before, after, ignoring=COPY_MAY_DIFFER) == []


def _other_key(folder: Path) -> str:
    path = folder / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    return " ".join(path.with_suffix(".pub").read_text().split()[:2])


def _hashed(place: str) -> str:
    salt = os.urandom(20)
    digest = hmac.new(salt, place.encode(), hashlib.sha1).digest()
    return "|".join(["", "1", *(base64.b64encode(part).decode() for part in (salt, digest))])


def test_an_unknown_host_is_refused_with_its_fingerprint(machines: Machines, tool: Tool) -> None:
    known = machines.server.known_hosts("# nobody")
    done = _copy(tool, machines, *_by_hand(machines, known))
    assert done.returncode == 6
    assert machines.server.fingerprint in done.stderr
    assert "--accept-new" in done.stderr
    assert list(machines.there.vdirbase.iterdir()) == []
    assert known.read_text() == "# nobody\n"


@pytest.mark.timeout(120)
def test_a_refusal_does_not_wait_for_what_is_being_read(machines: Machines, tool: Tool) -> None:
    """The guest is listed while the other machine is called; this file takes minutes."""
    with (machines.here.root("web") / "disk").open("wb") as file:
        file.truncate(4 << 40)
    done = _copy(tool, machines, *_by_hand(machines, machines.server.known_hosts("# nobody")))
    assert done.returncode == 6
    assert list(machines.there.vdirbase.iterdir()) == []


def test_a_new_host_is_noted_only_when_asked_for(machines: Machines, tool: Tool) -> None:
    known = machines.server.folder / "fresh" / "known_hosts"
    done = _copy(tool, machines, *_by_hand(machines, known), "--accept-new")
    assert (done.returncode, done.stderr) == (0, "")
    assert known.read_text() == f"{machines.server.place} {machines.server.public_key}\n"
    assert _copy(tool, machines, *_by_hand(machines, known), "--refresh").returncode == 0


@pytest.mark.parametrize("accept", [[], ["--accept-new"]])
def test_a_changed_key_is_refused_with_both_fingerprints(
    machines: Machines, tool: Tool, accept: list[str]
) -> None:
    server = machines.server
    other = _other_key(server.folder)
    known = server.known_hosts(f"{server.place} {other}")
    done = _copy(tool, machines, *_by_hand(machines, known), *accept)
    assert done.returncode == 6
    digest = hashlib.sha256(base64.b64decode(other.split()[1])).digest()
    assert base64.b64encode(digest).decode().rstrip("=") in done.stderr
    assert server.fingerprint in done.stderr
    assert f"{known}:1" in done.stderr
    assert list(machines.there.vdirbase.iterdir()) == []


@pytest.mark.parametrize("form", ["hashed", "list", "wildcard", "negated"])
def test_forms_of_names_in_known_hosts(machines: Machines, tool: Tool, form: str) -> None:
    server = machines.server
    names = {
        "hashed": _hashed(server.place),
        "list": f"elsewhere,{server.place},10.0.0.9",
        "wildcard": f"*.0.0.1]:{server.port},other",
        "negated": f"!{server.place},*",
    }[form]
    known = server.known_hosts(f"{names} {server.public_key}")
    done = _copy(tool, machines, *_by_hand(machines, known))
    assert done.returncode == (6 if form == "negated" else 0), done.stderr


def test_the_plain_name_is_not_that_of_another_port(machines: Machines, tool: Tool) -> None:
    known = machines.server.known_hosts(f"127.0.0.1 {machines.server.public_key}")
    assert _copy(tool, machines, *_by_hand(machines, known)).returncode == 6


def test_a_revoked_key_is_refused_though_the_host_is_known(machines: Machines, tool: Tool) -> None:
    server = machines.server
    lines = f"{server.place} {server.public_key}\n@revoked * {server.public_key}"
    done = _copy(tool, machines, *_by_hand(machines, server.known_hosts(lines)), "--accept-new")
    assert done.returncode == 6
    assert "revoked" in done.stderr


def test_a_certificate_authority_alone_is_refused_with_what_to_do(
    machines: Machines, tool: Tool
) -> None:
    server = machines.server
    line = f"@cert-authority * {_other_key(server.folder)}"
    known = server.known_hosts(line)
    done = _copy(tool, machines, *_by_hand(machines, known), "--accept-new")
    assert done.returncode == 6
    assert "@cert-authority" in done.stderr
    assert f"ssh-keyscan -p {server.port} 127.0.0.1" in done.stderr
    known = server.known_hosts(f"{line}\n{server.place} {server.public_key}")
    assert _copy(tool, machines, *_by_hand(machines, known)).returncode == 0


def test_a_login_that_is_refused_is_said(machines: Machines, tool: Tool) -> None:
    server = machines.server
    _other_key(server.folder)
    arguments = _by_hand(machines, server.known_hosts())
    arguments[arguments.index(server.key)] = server.folder / "other"
    done = _copy(tool, machines, *arguments)
    assert done.returncode == 6
    assert "refuses the login" in done.stderr


def _write_config(home: Path, server: Server, text: str) -> None:
    (home / ".ssh" / "config").write_text(text)
    (home / ".ssh" / "known_hosts").write_text(f"{server.place} {server.public_key}\n")


def _block(server: Server, name: str) -> str:
    return (
        f"Host {name}\n  HostName 127.0.0.1\n  Port {server.port}\n  User root\n"
        f"  IdentityFile {server.key}\n"
    )


@pytest.mark.parametrize("form", ["plain", "included", "glob", "in a block", "quoted"])
def test_ssh_config_with_include(machines: Machines, tool: Tool, home: Path, form: str) -> None:
    block = _block(machines.server, "other")
    folder = home / ".ssh" / "conf.d"
    folder.mkdir()
    (folder / "one.conf").write_text(block)
    (folder / "two.conf").write_text("Host nobody\n  Port 1\n")
    inner = block.partition("\n")[2]
    (folder / "inner").write_text(inner)
    text = {
        "plain": block,
        "included": "Include conf.d/one.conf\n",
        "glob": "Include ~/.ssh/conf.d/*.conf\nHost *\n  Port 9\n",
        "in a block": "Host wrong\n  Include conf.d/two.conf\nHost other\n  Include conf.d/inner\n",
        "quoted": f'include "{folder}/one.conf"\n',
    }[form]
    _write_config(home, machines.server, text)
    done = _copy(tool, machines, host="other")
    assert (done.returncode, done.stderr) == (0, "")
    assert _has_come(machines)


@pytest.mark.parametrize(("command", "code"), [("test %h = other", 0), ("false", 1)])
def test_ssh_config_asks_a_command_whether_a_block_counts(
    machines: Machines, tool: Tool, home: Path, command: str, code: int
) -> None:
    settings = _block(machines.server, "other").partition("\n")[2]
    text = f'Match originalhost other exec "{command}"\n{settings}'
    _write_config(home, machines.server, text)
    assert _copy(tool, machines, host="other").returncode == code


def test_an_include_in_anothers_block_does_not_count(
    machines: Machines, tool: Tool, home: Path
) -> None:
    (home / ".ssh" / "wrong").write_text("Port 1\n")
    text = f"Host nobody\n  Include wrong\n{_block(machines.server, 'other')}"
    _write_config(home, machines.server, text)
    assert _copy(tool, machines, host="other").returncode == 0


def test_an_include_that_includes_itself_is_refused(
    machines: Machines, tool: Tool, home: Path
) -> None:
    _write_config(home, machines.server, "Include config\n")
    done = _copy(tool, machines, host="other")
    assert done.returncode == 7
    assert "by itself" in done.stderr


def test_what_the_command_line_says_counts_where_ssh_config_depends_on_it(
    machines: Machines, tool: Tool, home: Path
) -> None:
    """Port and user in a ProxyCommand, and the user whom a block is for."""
    server = machines.server
    said = home / "said"
    settings = _block(server, "other").partition("\n")[2].replace(f"{server.port}", "9")
    proxy = f"  ProxyCommand sh -c 'echo %p %r >{said}'\n"
    _write_config(home, server, f"Match originalhost other user root\n{settings}{proxy}")
    _copy(tool, machines, "-p", f"{server.port}", host="root@other")
    assert said.read_text() == f"{server.port} root\n"
    said.unlink()
    assert _copy(tool, machines, host="nobody@other").returncode == 1
    assert not said.exists()


@pytest.mark.parametrize("line", ["Port ssh", "Port 70000", "ProxyJump hop:x", "ProxyJump [::1]x"])
def test_a_port_that_is_none_is_named(
    machines: Machines, tool: Tool, home: Path, line: str
) -> None:
    _write_config(home, machines.server, f"Host other\n  {line}\n")
    done = _copy(tool, machines, host="other")
    assert done.returncode == 7, done.stderr
    assert "is no port" in done.stderr


def test_proxy_jump_goes_through_hosts_that_are_checked_too(
    machines: Machines, tool: Tool, home: Path
) -> None:
    server = machines.server
    with run_sshd(machines.here.filesystem.folder / "jump", "AllowTcpForwarding yes") as jump:
        text = _block(server, "other") + "  ProxyJump hop\n" + _block(jump, "hop")
        _write_config(home, server, text)
        refused = _copy(tool, machines, host="other")
        assert refused.returncode == 6
        assert jump.fingerprint in refused.stderr
        assert list(machines.there.vdirbase.iterdir()) == []
        known = home / ".ssh" / "known_hosts"
        known.write_text(f"{known.read_text()}{jump.place} {jump.public_key}\n")
        done = _copy(tool, machines, host="other")
        assert (done.returncode, done.stderr) == (0, "")
        assert _has_come(machines)
        log = (jump.folder / "log").read_text()
        assert "Accepted publickey for root" in log


@need("slow_line")
def test_proxy_jump_over_a_slow_line_to_what_only_the_hop_reaches(site: Site) -> None:
    """8 Mbit/s to the hop, on whose loopback address the other sshd listens."""
    folder = site.filesystem.folder / "wire"
    folder.mkdir()
    with joined(folder) as wire, run_sshd(folder / "far", namespace=wire.namespaces[1]) as far:
        wire.here.add_guest(
            "web", [File("file", os.urandom(4 << 20)), File("etc/small", b"x" * 99)]
        )
        wire.limit("8mbit")
        hop = f"Host hop\n  HostName {THERE}\n  User root\n  IdentityFile {wire.server.key}\n"
        config, known = folder / "config", folder / "known_hosts"
        config.write_text(f"{_block(far, 'other')}  ProxyJump hop\n{hop}")
        known.write_text(f"{far.place} {far.public_key}\n{THERE} {wire.server.public_key}\n")
        words: list[str | Path] = [PROGRAM, "-F", config, "--known-hosts", known]
        words += ["--remote-command", remote_command(wire.there)]

        def copy(*more: str) -> str:
            command = wire.command(*words, *more, "web", "other:")
            return subprocess.run(
                command, env=wire.environment(), check=True, capture_output=True, text=True
            ).stdout

        before = wire.count_bytes()
        report = json.loads(copy("--json"))
        assert wire.count_bytes() - before > 4 << 20
        assert report["seconds"] > 3.5
        found = (snapshot(place.root("web")) for place in (wire.here, wire.there))
        assert differences(*found, ignoring=COPY_MAY_DIFFER) == []
        assert "nothing to do" in copy("--refresh")
        for server in (wire.server, far):
            assert "Accepted publickey for root" in (server.folder / "log").read_text()


@pytest.mark.parametrize("place", ["alias", "[alias]:{port}"])
def test_an_alias_stands_in_known_hosts_without_a_port(
    machines: Machines, tool: Tool, home: Path, place: str
) -> None:
    """As ssh(1) has it, which is asked too."""
    server = machines.server
    _write_config(home, server, f"{_block(server, 'other')}  HostKeyAlias alias\n")
    known = home / ".ssh" / "known_hosts"
    known.write_text(f"{place.format(port=server.port)} {server.public_key}\n")
    words = ["-F", f"{home}/.ssh/config", "-o", f"UserKnownHostsFile={known}"]
    asked = subprocess.run(["ssh", "-o", "BatchMode=yes", *words, "other", "true"], check=False)
    done = _copy(tool, machines, host="other")
    assert (asked.returncode == 0, done.returncode) == (
        (True, 0) if place == "alias" else (False, 6)
    )


@pytest.fixture
def agent(machines: Machines, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An agent that has the client's key, of which the file has a passphrase then."""
    place, key = home / "agent", machines.server.key
    with subprocess.Popen(["ssh-agent", "-D", "-a", place], stdout=subprocess.DEVNULL) as process:
        try:
            monkeypatch.setenv("SSH_AUTH_SOCK", os.fspath(place))
            asking = ["ssh-add", "-l"]
            wait_for(
                lambda: (
                    subprocess.run(asking, capture_output=True, check=False).returncode == _NO_KEYS
                )
            )
            subprocess.run(["ssh-add", "-q", key], check=True)
            change = ["ssh-keygen", "-q", "-p", "-P", "", "-N", "secret", "-f", os.fspath(key)]
            subprocess.run(change, check=True, stdout=subprocess.DEVNULL)
            yield
        finally:
            process.terminate()


@pytest.mark.usefixtures("agent")
@pytest.mark.parametrize(
    ("lines", "code"),
    [
        ("", 0),
        ("IdentityFile {key}\n  IdentitiesOnly yes", 0),
        ("IdentityFile {key}.pub\n  IdentitiesOnly yes", 0),
        ("IdentityFile {other}\n  IdentitiesOnly yes", 6),
    ],
)
def test_an_agent_has_the_key(
    machines: Machines, tool: Tool, home: Path, lines: str, code: int
) -> None:
    """Where no others than the named ones are to be tried, that one counts if it is named."""
    server = machines.server
    _other_key(server.folder)
    block = _block(server, "other").rpartition("  IdentityFile")[0]
    wanted = lines.format(key=server.key, other=server.folder / "other")
    _write_config(home, server, f"{block}  {wanted}\n")
    done = _copy(tool, machines, host="other")
    assert done.returncode == code, done.stderr
    assert code or not done.stderr
