"""A guest on the host's network stack has a loopback of its own."""

from ipaddress import ip_address
from pathlib import Path

import pytest

from tests.fixtures.agent import Agent, agent_in
from tests.fixtures.bound import ANY, WEB, bound_guest
from tests.fixtures.bound import db as db
from tests.fixtures.bound import host as host
from tests.fixtures.bound import web as web
from tests.fixtures.lab import Lab
from tests.fixtures.lab import lab as lab
from tests.fixtures.probes import own_cgroup
from vrun import chbind
from vrun.spec import GuestSpec

# --- the loopback


@pytest.mark.parametrize("asked", ["127.0.0.1", "127.0.0.9", "127.0.1.1"])
def test_each_guest_has_a_loopback_of_its_own(
    lab: Lab, web: Agent, db: Agent, host: Agent, asked: str
) -> None:
    for agent in (web, db, host):
        assert agent(f"listen({asked!r}, 5000)") == asked
    for agent, others in ((web, (db, host)), (db, (web, host)), (host, (web, db))):
        assert agent(f"connect({asked!r}, 5000)")[1] == asked
        name, peer, told = agent("accept()")
        assert (name, peer) == (asked, told)
        assert peer == "127.0.0.1"
        for other in others:
            assert other("refuses()") is True
            other("kept['server'].settimeout(60)")


def test_loopback_addresses_on_the_wire_are_those_of_the_number(lab: Lab, web: Agent) -> None:
    web("listen('127.0.0.1', 5000)")
    web("listen('127.0.1.5', 5000, keep='other')")
    listening = lab.run("ss", "-Htln")
    assert "127.3.233.1:5000" in listening
    assert "127.3.233.133:5000" in listening


def test_ipv6_programs_reach_the_loopback_of_ipv4(web: Agent) -> None:
    web("listen('127.0.0.1', 5000)")
    mapped = "::ffff:127.0.0.1"
    assert web(f"connect({mapped!r}, 5000)") == [mapped, mapped]
    assert web("accept()") == ["127.0.0.1"] * 3
    assert web("connect('::1', 5000)") == "ECONNREFUSED"


def test_each_name_of_the_loopback_leads_to_a_server_on_all_addresses(web: Agent) -> None:
    web("listen('0.0.0.0', 5000)")
    for name, said in (
        (ANY, "127.0.0.1"),
        ("127.0.0.1", "127.0.0.1"),
        ("::", "::ffff:127.0.0.1"),
        ("::1", "::ffff:127.0.0.1"),
        ("::ffff:127.0.0.1", "::ffff:127.0.0.1"),
    ):
        assert web(f"connect({name!r}, 5000)") == [said, said]
        assert web("accept()") == ["10.9.0.5", "127.0.0.1", "127.0.0.1"]


def test_the_resolver_asks_for_the_source_of_one_destination_after_the_other(web: Agent) -> None:
    """getaddrinfo(3) connects one socket to addresses of both families, and ends a program that it
    thinks got a wrong answer.
    """
    for to in (None, "'10.9.0.1'", "'localhost'"):
        assert web(f"len(socket.getaddrinfo({to}, 80, flags=socket.AI_PASSIVE))") >= 1
    for first, second, source in (
        ("127.0.0.1", "10.9.0.1", "10.9.0.5"),
        ("::1", "fd09::1", "fd09::5"),
        ("::ffff:10.9.0.1", "fd09::1", "fd09::5"),
        ("::1", "::ffff:127.0.0.1", "::ffff:127.0.0.1"),
    ):
        web(f"connect({first!r}, 5000, 'udp', keep='u')")
        assert web("disconnect('u')") is None
        assert web(f"kept['u'].connect(({second!r}, 5000))") is None
        assert web("kept['u'].getsockname()[0]") == source


def test_no_guest_reaches_the_loopback_of_another_or_of_the_host(
    web: Agent, db: Agent, host: Agent
) -> None:
    db("listen('127.0.0.1', 5000)")
    host("listen('127.0.0.1', 5000)")
    assert web("connect('127.0.0.1', 5000)") == "ECONNREFUSED"
    assert web("connect('127.3.234.1', 5000)") == "EPERM"
    assert web("connect('127.0.0.200', 5000)") == "EPERM"
    assert web("connect('::ffff:127.3.234.1', 5000)") == "EPERM"
    assert web("send('127.3.234.1', 5000)") == "EPERM"


@pytest.mark.parametrize("bound", [ANY, "::"])
def test_localhost_of_a_guest_is_no_server_of_the_host(web: Agent, host: Agent, bound: str) -> None:
    host(f"listen({bound!r}, 5000)")
    host(f"bind({bound!r}, 5000, 'udp', keep='datagrams')")
    assert web("connect('127.0.0.1', 5000)") == "ECONNREFUSED"
    for name in ("::1", "::ffff:127.0.0.1", "127.0.0.53", ANY):
        assert web(f"connect({name!r}, 5000)") == "ECONNREFUSED"
    assert web("send('127.0.0.1', 5000)") == "ECONNREFUSED"
    assert web("connect('10.9.0.5', 5000)")[1] == "10.9.0.5"  # the port is the host's there


def test_datagrams_on_the_loopback_go_both_ways(web: Agent) -> None:
    assert web("bind('127.0.0.1', 5000, 'udp', keep='s')") == "127.0.0.1"
    assert web("send('127.0.0.1', 5000, keep='c')") == 1
    assert web("receive('s')") == "127.0.0.1"
    assert web("reply('s')") == 1
    assert web("receive('c')") == "127.0.0.1"


def test_a_connected_client_on_the_loopback_hears_a_server_on_all_addresses(web: Agent) -> None:
    assert web("bind('0.0.0.0', 5000, 'udp', keep='s')") == "10.9.0.5"
    assert web("connect('127.0.0.1', 5000, 'udp', keep='c')") == ["127.0.0.1", "127.0.0.1"]
    assert web("send(None, None, keep='c')") == 1
    assert web("receive('s')") == "127.0.0.1"
    assert web("reply('s')") == 1
    assert web("receive('c')") == "127.0.0.1"


def test_the_loopback_may_be_named(lab: Lab) -> None:
    spec = GuestSpec(name="web", root=Path("/"), loopback=ip_address("127.77.0.9"))  # type: ignore[arg-type]
    with own_cgroup() as group:
        chbind.restrict(group, spec, WEB)
        with agent_in(lab, group) as guest:
            assert guest("listen('127.0.0.1', 5000)") == "127.0.0.1"
            assert "127.77.0.9:5000" in lab.run("ss", "-Htln")


def test_a_guest_may_have_the_hosts_loopback(lab: Lab, host: Agent) -> None:
    host("listen('127.0.0.1', 5000)")
    host("listen('::1', 5000, keep='six')")
    allowed = frozenset({"lback_allow"})
    with (
        bound_guest(lab, WEB, "10.9.0.5", "fd09::5", nflags=allowed) as group,
        agent_in(lab, group) as guest,
    ):
        assert guest("connect('127.0.0.1', 5000)") == ["127.0.0.1", "127.0.0.1"]
        assert guest("connect('::1', 5000)") == ["::1", "::1"]
        assert guest("bind('127.0.0.9', 5001)") == "127.0.0.9"
        assert guest("bind('10.9.0.1', 5001)") == "EPERM"
        assert guest("connect('10.9.0.1', 5001)") == "ECONNREFUSED"
