"""A guest on the host's network stack has its own addresses, and no other's."""

import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.fixtures.agent import Agent, agent_in
from tests.fixtures.bound import ANY, DB, WEB, bound_guest, bound_spec
from tests.fixtures.bound import db as db
from tests.fixtures.bound import host as host
from tests.fixtures.bound import web as web
from tests.fixtures.filesystems import has_tools
from tests.fixtures.lab import DEVICE, Lab
from tests.fixtures.lab import lab as lab
from tests.fixtures.probes import own_cgroup
from vrun import chbind, syscalls
from vrun.errors import NotPermitted

# --- servers that know nothing of it


def _serve(lab: Lab, group: Path, *command: str | Path) -> "subprocess.Popen[bytes]":
    join = 'echo $$ >"$0/cgroup.procs" && exec "$@"'
    return subprocess.Popen(
        ["sh", "-c", join, str(group), *lab.command(*command)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _http(folder: Path, bind: str) -> list[str | Path]:
    return [sys.executable, "-m", "http.server", "80", "--bind", bind, "--directory", folder]


def _fetch(lab: Lab, url: str) -> str:
    """The page, once the server answers."""

    def work() -> str:
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310
                    return str(answer.read().decode())
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    return str(lab.call(work))


@pytest.mark.parametrize("bind", [ANY, "::"])
def test_two_unmodified_web_servers_share_port_80(lab: Lab, tmp_path: Path, bind: str) -> None:
    for name in ("web", "db"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.html").write_text(f"this is {name}")
    with (
        bound_guest(lab, WEB, "10.9.0.5") as web_group,
        bound_guest(lab, DB, "10.9.0.7") as db_group,
        _serve(lab, web_group, *_http(tmp_path / "web", bind)) as web_server,
        _serve(lab, db_group, *_http(tmp_path / "db", bind)) as db_server,
    ):
        try:
            assert _fetch(lab, "http://10.9.0.5/") == "this is web"
            assert _fetch(lab, "http://10.9.0.7/") == "this is db"
            listening = lab.run("ss", "-Htln")
            assert listening.count(":80 ") == 2
            assert "0.0.0.0:80" not in listening
            assert "*:80" not in listening
        finally:
            web_server.kill()
            db_server.kill()


def test_a_program_that_asks_for_localhost_finds_a_server_on_all_addresses(
    lab: Lab, tmp_path: Path
) -> None:
    (tmp_path / "index.html").write_text("hello")
    with (
        bound_guest(lab, WEB, "10.9.0.5") as group,
        _serve(lab, group, *_http(tmp_path, ANY)) as server,
    ):
        try:
            assert _fetch(lab, "http://10.9.0.5/") == "hello"
            program = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1]).read())"
            for url in ("http://127.0.0.1/", "http://localhost/"):
                with _serve(lab, group, sys.executable, "-c", program, url) as client:
                    assert client.wait(60) == 0
        finally:
            server.kill()


# --- bind


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        (ANY, "10.9.0.5"),
        ("10.9.0.5", "10.9.0.5"),
        ("10.9.0.6", "10.9.0.6"),
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.53", "127.0.0.53"),
        ("127.0.1.1", "127.0.1.1"),
        ("::", "::ffff:10.9.0.5"),
        ("fd09::6", "fd09::6"),
        ("::ffff:10.9.0.6", "::ffff:10.9.0.6"),
        ("::ffff:0.0.0.0", "::ffff:10.9.0.5"),
        ("::ffff:127.0.0.1", "::ffff:127.0.0.1"),
        ("::1", "::1"),
    ],
)
def test_what_a_guest_may_bind_to(web: Agent, asked: str, given: str) -> None:
    for kind in ("tcp", "udp"):
        assert web(f"bind({asked!r}, 5000, {kind!r})") == given


@pytest.mark.parametrize(
    "asked",
    [
        "10.9.0.1",
        "10.9.0.7",
        "127.0.0.200",
        "127.3.234.1",  # another guest's loopback
        "127.200.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "fd09::1",
        "fd09::7",
        "::ffff:10.9.0.1",
        "::ffff:127.3.234.1",
        "fe80::1",
        "ff02::1",
    ],
)
def test_no_guest_binds_to_an_address_that_is_not_its_own(
    web: Agent, db: Agent, asked: str
) -> None:
    for kind in ("tcp", "udp"):
        assert web(f"bind({asked!r}, 5000, {kind!r})") == "EPERM"


def test_a_socket_for_ipv6_alone_gets_the_first_ipv6_address(web: Agent) -> None:
    assert web("bind('::', 5000, v6only=1, keep='alone')") == "fd09::5"
    assert web("kept['alone'].getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)") == 1
    assert web("bind('::', 5001, v6only=0, keep='both')") == "::ffff:10.9.0.5"
    assert web("kept['both'].getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)") == 0
    assert web("bind('::ffff:10.9.0.5', 5002, v6only=1)") == "EINVAL"
    assert web("bind('fd09::7', 5002, v6only=1)") == "EPERM"


def test_servers_may_bind_to_both_families_one_by_one(web: Agent, host: Agent) -> None:
    """As those of nginx and sshd do."""
    assert web("listen('0.0.0.0', 5000, keep='four')") == "10.9.0.5"
    assert web("listen('::', 5000, keep='six', v6only=1)") == "fd09::5"
    assert web("listen('127.0.0.1', 5001, keep='own four')") == "127.0.0.1"
    assert web("listen('::1', 5001, keep='own six', v6only=1)") == "::1"
    assert host("connect('10.9.0.5', 5000)")[1] == "10.9.0.5"
    assert host("connect('fd09::5', 5000)")[1] == "fd09::5"
    assert web("connect('127.0.0.1', 5001)") == ["127.0.0.1", "127.0.0.1"]
    assert web("accept('own four')") == ["127.0.0.1"] * 3
    assert web("connect('::1', 5001)") == ["::1", "::1"]
    assert web("accept('own six')") == ["::1"] * 3


def test_where_new_sockets_are_for_ipv6_alone_that_is_known(lab: Lab) -> None:
    def set_default() -> None:
        Path("/proc/sys/net/ipv6/bindv6only").write_text("1")

    lab.call(set_default)
    with own_cgroup() as group:
        lab.call(lambda: chbind.restrict(group, bound_spec("10.9.0.1", "fd09::1"), WEB) and None)
        with agent_in(lab, group) as guest:
            assert guest("bind('::', 5000)") == "fd09::1"
            assert guest("bind('::', 5001, v6only=0)") == "::ffff:10.9.0.1"
            assert guest("bind('::1', 5000)") == "EADDRNOTAVAIL"


def test_all_addresses_of_a_family_that_the_guest_lacks_are_its_loopback(lab: Lab) -> None:
    with bound_guest(lab, WEB, "10.9.0.5") as group, agent_in(lab, group) as guest:
        assert guest("listen('::', 5000, v6only=1)") == "::1"
        assert guest("listen('0.0.0.0', 5000, keep='four')") == "10.9.0.5"
        assert guest("connect('::1', 5000)") == ["::1", "::1"]
        assert guest("connect('fd09::1', 5000)") == "ENETUNREACH"
        assert guest("send('fd09::1', 5000)") == "ENETUNREACH"
    with bound_guest(lab, DB, "fd09::7") as group, agent_in(lab, group) as guest:
        assert guest("listen('0.0.0.0', 5000)") == "127.0.0.1"
        assert guest("bind('::', 5000)") == "fd09::7"
        assert guest("connect('127.0.0.1', 5000)") == ["127.0.0.1", "127.0.0.1"]
        assert guest("connect('10.9.0.1', 5000)") == "ENETUNREACH"
        assert guest("send('10.9.0.1', 5000, keep='s')") == "ENETUNREACH"


def test_a_guest_without_addresses_has_its_loopback(lab: Lab) -> None:
    with bound_guest(lab, WEB) as group, agent_in(lab, group) as guest:
        assert guest("bind('0.0.0.0', 5000)") == "127.0.0.1"
        assert guest("bind('::', 5001)") == "::1"
        assert guest("listen('127.0.0.1', 5002)") == "127.0.0.1"
        assert guest("connect('127.0.0.1', 5002)") == ["127.0.0.1", "127.0.0.1"]
        assert guest("connect('10.9.0.1', 5000)") == "ENETUNREACH"


# --- connect


@pytest.mark.parametrize(
    ("to", "source"), [("10.9.0.1", "10.9.0.5"), ("fd09::1", "fd09::5"), ("::ffff:10.9.0.1", None)]
)
def test_the_source_of_a_connection_is_the_guests_address(
    web: Agent, host: Agent, to: str, source: str | None
) -> None:
    assert host(f"listen({to!r}, 5000)") == to
    assert web(f"connect({to!r}, 5000)") == [source or "::ffff:10.9.0.5", to]
    assert host("accept()")[1] == (source or "::ffff:10.9.0.5")


@pytest.mark.parametrize(("to", "source"), [("10.9.0.1", "10.9.0.5"), ("fd09::1", "fd09::5")])
def test_the_source_of_datagrams_is_the_guests_address(
    web: Agent, host: Agent, to: str, source: str
) -> None:
    assert host(f"bind({to!r}, 5000, 'udp', keep='server')") == to
    assert web(f"connect({to!r}, 5000, 'udp')") == [source, to]
    assert web("send(None, None, keep='client')") == 1
    assert host("receive('server')") == source
    assert web(f"send({to!r}, 5000, keep='unbound')") == 1
    assert host("receive('server')") == source
    assert host("reply('server')") == 1
    assert web("receive('unbound')") == to


def test_a_source_that_the_guest_chose_itself_is_kept(web: Agent, host: Agent) -> None:
    host("listen('10.9.0.1', 5000)")
    assert web("bind('10.9.0.6', 0, keep='c')") == "10.9.0.6"
    assert web("kept['c'].connect(('10.9.0.1', 5000))") is None
    assert host("accept()")[1] == "10.9.0.6"


def test_no_datagram_leaves_with_another_source(web: Agent, host: Agent) -> None:
    for own, other, to in (("10.9.0.6", "10.9.0.1", "10.9.0.1"), ("fd09::6", "fd09::1", "fd09::1")):
        host(f"bind({to!r}, 5000, 'udp', keep='server')")
        assert web(f"send({to!r}, 5000, keep='a{own}', source={own!r})") == 1
        assert host("receive('server')") == own
        assert web(f"send({to!r}, 5000, keep='a{own}', source={other!r})") == "EPERM"
        web(f"connect({to!r}, 5000, 'udp', keep='c{own}')")
        assert web(f"send(None, None, keep='c{own}', source={other!r})") == "EPERM"


def test_a_socket_that_the_kernel_gave_a_port_gets_no_source_of_the_hosts(web: Agent) -> None:
    assert web("send('10.9.0.1', 5000, keep='u')") == 1
    assert web("kept['u'].connect(('10.9.0.1', 5000))") == "EPERM"


def test_a_socket_that_listens_unbound_hears_only_what_is_for_the_guest(
    web: Agent, host: Agent
) -> None:
    port = web("autobind()")
    host("kept.update(x=make('10.9.0.1')) or kept['x'].settimeout(0.3)")
    assert host(f"kept['x'].connect(('10.9.0.1', {port}))") == "timed out"
    assert web("refuses()") is True
    assert host(f"connect('10.9.0.5', {port})") == ["10.9.0.1", "10.9.0.5"]


def test_transports_without_a_hook_are_refused(web: Agent) -> None:
    assert web("make('10.9.0.5', protocol=132)") == "EPROTONOSUPPORT"  # SCTP
    assert web("make('10.9.0.5', 'udp', protocol=136)") == "EPROTONOSUPPORT"  # UDP-Lite
    assert web("bind('10.9.0.1', protocol=262)") in ("EPERM", "EPROTONOSUPPORT")  # MPTCP


@pytest.mark.skipif(not has_tools("iptables"), reason="no iptables installed")
def test_files_of_the_host_that_the_guests_root_can_write_are_said(lab: Lab) -> None:
    rule = "iptables -A INPUT -m recent --name vtest --set"

    def look() -> list[str]:
        return list(chbind.writable_files())

    assert lab.call(look) == []
    lab.run(*rule.split())
    assert lab.call(look) == ["/proc/net/xt_recent/vtest"]


# --- the programs themselves


def test_groups_that_a_guest_makes_are_restricted_too(lab: Lab) -> None:
    with bound_guest(lab, WEB, "10.9.0.5") as group:
        (group / "guest" / "own").mkdir(parents=True)
        with agent_in(lab, group / "guest" / "own") as guest:
            assert guest("bind('10.9.0.1', 5000)") == "EPERM"
            assert guest("bind('0.0.0.0', 5000)") == "10.9.0.5"


def test_a_guest_can_have_hundreds_of_addresses(lab: Lab) -> None:
    addresses = [f"10.9.{number // 200 + 1}.{number % 200 + 1}" for number in range(600)]
    addresses += [f"fd09::{number:x}" for number in range(0x1000, 0x1000 + 200)]
    with own_cgroup() as group:
        chbind.restrict(group, bound_spec(*addresses), WEB)
        lab.run("ip", "address", "add", f"{addresses[599]}/32", "dev", DEVICE)
        with agent_in(lab, group) as guest:
            assert guest(f"bind({addresses[599]!r}, 5000)") == addresses[599]
            assert guest("bind('10.9.0.1', 5000)") == "EPERM"


def test_without_the_right_to_load_programs_the_message_says_what_to_do(lab: Lab) -> None:
    def attach_without() -> str:
        for number in (12, 21, 38, 39):  # NET_ADMIN, SYS_ADMIN, PERFMON, BPF
            syscalls.bounding_drop(number)
        keep = ~(1 << 12 | 1 << 21 | 1 << 38 | 1 << 39) & syscalls.capget()[1]
        syscalls.capset(effective=keep, permitted=keep, inheritable=0)
        try:
            chbind.restrict(group, bound_spec("10.9.0.5"), WEB)
        except NotPermitted as error:
            return f"{error.message} {error.hint}"
        return "nothing"

    with own_cgroup() as group:
        said = lab.call(attach_without)
    assert "cannot restrict the guest to its addresses: Operation not permitted" in said
    assert "CAP_BPF" in said
    assert "spaces/net" in said
