"""Abstract unix names on a network that guests share with the host: each guest has its own only."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.agent import Agent, agent_in
from tests.fixtures.bound import DB, WEB, bound_guest
from tests.fixtures.lab import Lab
from tests.fixtures.lab import lab as lab
from tests.fixtures.probes import need, own_cgroup
from vrun import abstracthooks, bpf, chbind, kerneltypes
from vrun.kerneltypes import TypesUnknown
from vstore.record import replace

pytestmark = need("abstract_hooks")

_KINDS = ("stream", "seqpacket", "datagram")
_LONGEST = 107
"""Bytes of a name after its NUL."""


@pytest.fixture
def group(lab: Lab) -> Iterator[Path]:
    with bound_guest(lab, WEB, "10.9.0.5") as made:
        yield made


@pytest.fixture
def web(lab: Lab, group: Path) -> Iterator[Agent]:
    with agent_in(lab, group) as agent:
        yield agent


@pytest.fixture
def host(lab: Lab) -> Iterator[Agent]:
    with agent_in(lab) as agent:
        yield agent


def _name(length: int = 8) -> str:
    """A name that nobody else has, as an agent is told it."""
    text = os.urandom(length).hex()[:length]
    return repr(f"\0{text}")


@pytest.mark.parametrize("kind", _KINDS)
def test_a_name_of_the_host_is_one_that_nobody_has(web: Agent, host: Agent, kind: str) -> None:
    name = _name()
    host(f"serve({name}, '{kind}')")
    assert host(f"call({name}, '{kind}')") == "connected"

    assert web(f"call({name}, '{kind}')") == "ECONNREFUSED"
    assert web(f"call({_name()}, '{kind}')") == "ECONNREFUSED"


def test_no_datagram_is_sent_to_a_name_of_the_host(web: Agent, host: Agent) -> None:
    name = _name()
    host(f"serve({name}, 'datagram')")

    assert web(f"mail({name})") == "ECONNREFUSED"
    assert host(f"mail({name})") == 1


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 62, _LONGEST - 1, _LONGEST])
def test_a_guest_reaches_its_own_names(
    lab: Lab, group: Path, web: Agent, kind: str, length: int
) -> None:
    name = _name(length)
    while web(f"serve({name}, '{kind}')") == "EADDRINUSE":
        name = _name(length)

    with agent_in(lab, group) as other:
        assert other(f"call({name}, '{kind}')") == "connected"
        if kind == "datagram":
            assert other(f"mail({name})") == 1


def test_groups_that_a_guest_makes_are_the_guests(lab: Lab, group: Path, web: Agent) -> None:
    (group / "a/b/c").mkdir(parents=True)
    upper, lower = _name(), _name()
    web(f"serve({upper})")
    with agent_in(lab, group / "a/b/c") as below:
        below(f"serve({lower})")
        assert below(f"call({upper})") == "connected"
        assert web(f"call({lower})") == "connected"


def test_where_the_level_of_a_group_is_not_known_it_is_looked_for(
    lab: Lab, host: Agent, tmp_path: Path
) -> None:
    with own_cgroup() as group, agent_in(lab) as early:
        (group / "a/b").mkdir(parents=True)
        group_fd = os.open(group / "a", os.O_RDONLY | os.O_DIRECTORY)
        found = abstracthooks.find_ancestor(group_fd)
        assert found.number == (group / "a").stat().st_ino
        assert found.level in (2, None)  # None: this host is a container itself
        places = kerneltypes.find_places(abstracthooks.MEMBERS, tmp_path)
        code = abstracthooks.guard(places, replace(found, level=None))
        for hook in abstracthooks.HOOKS:
            program_fd = bpf.load_program(code, hook)
            bpf.attach(group_fd, hook, program_fd)
            os.close(program_fd)
        os.close(group_fd)

        theirs, ours = _name(), _name()
        early(f"serve({theirs})")
        with agent_in(lab, group / "a/b") as below, agent_in(lab, group / "a") as guest:
            below(f"serve({ours})")
            assert guest(f"call({ours})") == "connected"
            assert guest(f"call({theirs})") == "ECONNREFUSED"
            assert below(f"call({ours})") == "connected"
            assert host(f"call({ours})") == "connected"


def test_no_guest_reaches_anothers_names(lab: Lab, web: Agent) -> None:
    with bound_guest(lab, DB, "10.9.0.7") as other, agent_in(lab, other) as db:
        name = _name()
        web(f"serve({name})")
        assert db(f"call({name})") == "ECONNREFUSED"
        name = _name()
        db(f"serve({name})")
        assert web(f"call({name})") == "ECONNREFUSED"


def test_names_of_one_bucket_are_told_apart(lab: Lab, group: Path, web: Agent, host: Agent) -> None:
    ours, theirs = [_name() for _ in range(300)], [_name() for _ in range(300)]
    for number, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        web(f"serve({our}, keep='{number}')")
        host(f"serve({their}, keep='{number}')")

    with agent_in(lab, group) as other:
        assert {other(f"call({name})") for name in ours} == {"connected"}
        assert {other(f"call({name})") for name in theirs} == {"ECONNREFUSED"}


def test_a_name_that_begins_as_one_of_the_guests_is_another(web: Agent, host: Agent) -> None:
    name = _name(20)
    web(f"serve({name})")
    host(f"serve({name} + 'x')")
    host(f"serve({name}[:-1], keep='shorter')")
    assert web(f"call({name} + 'x')") == "ECONNREFUSED"
    assert web(f"call({name}[:-1])") == "ECONNREFUSED"
    assert web(f"call({name})") == "connected"


def test_sockets_with_a_path_are_what_they_were(web: Agent, host: Agent, tmp_path: Path) -> None:
    for kind in _KINDS:
        path = os.fspath(tmp_path / kind)
        host(f"serve({path!r}, '{kind}', keep='{kind}')")
        assert web(f"call({path!r}, '{kind}')") == "connected"
    assert web(f"mail({os.fspath(tmp_path / 'datagram')!r})") == 1
    assert web("call('/nowhere')") == "ENOENT"


def test_the_host_can_call_a_guest(web: Agent, host: Agent) -> None:
    name = _name()
    web(f"serve({name})")
    assert host(f"call({name})") == "connected"


_GIVER = """
import os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.bind("\\0" + sys.argv[1])
server.listen()
print("ready", flush=True)
while True:
    socket.send_fds(server.accept()[0], [b"x"], [os.open("/", os.O_RDONLY)])
"""
_TAKER = """
import os, socket, sys
made = socket.socket(socket.AF_UNIX)
try:
    made.connect("\\0" + sys.argv[1])
    fd, = socket.recv_fds(made, 1, 1)[1]
    print(os.listdir(fd))
except OSError as error:
    print("refused", error.errno)
"""


def test_a_service_of_the_host_gives_no_descriptor_to_a_guest(lab: Lab, group: Path) -> None:
    name = os.urandom(8).hex()
    join = 'echo $$ >"$0/cgroup.procs" && exec "$@"'
    take = lab.command(sys.executable, "-c", _TAKER, name)
    with subprocess.Popen(
        lab.command(sys.executable, "-c", _GIVER, name), stdout=subprocess.PIPE
    ) as giver:
        try:
            assert giver.stdout is not None
            giver.stdout.readline()
            outside = subprocess.run(take, capture_output=True, text=True, check=True).stdout
            inside = subprocess.run(
                ["sh", "-c", join, group, *take], capture_output=True, text=True, check=True
            ).stdout
        finally:
            giver.kill()
    assert "'etc'" in outside
    assert inside == "refused 111\n"


def test_where_members_lie_is_kept_and_read_again(tmp_path: Path) -> None:
    found = kerneltypes.find_places(abstracthooks.MEMBERS, tmp_path)
    (kept,) = tmp_path.iterdir()
    assert kerneltypes.find_places(abstracthooks.MEMBERS, tmp_path) == found

    kept.write_text("sock_common.skc_net x\n")
    assert kerneltypes.find_places(abstracthooks.MEMBERS, tmp_path) == found


def test_what_a_kernel_does_not_describe_is_said(tmp_path: Path) -> None:
    with pytest.raises(TypesUnknown, match=r"no unix_sock\.frob"):
        kerneltypes.read_places(("unix_sock.frob",))
    with pytest.raises(TypesUnknown, match="no structure frob"):
        kerneltypes.read_places(("frob.x",))
    with pytest.raises(TypesUnknown, match="No such file"):
        kerneltypes.read_places(abstracthooks.MEMBERS, tmp_path / "nothing")
    (tmp_path / "torn").write_bytes(Path("/sys/kernel/btf/vmlinux").read_bytes()[:100_000])
    with pytest.raises(TypesUnknown):
        kerneltypes.read_places(abstracthooks.MEMBERS, tmp_path / "torn")


def test_a_kernel_that_cannot_refuse_is_said(tmp_path: Path) -> None:
    with socket.socket() as no_group:
        assert chbind.keep_from_abstract_names(no_group.fileno(), tmp_path) != ""
