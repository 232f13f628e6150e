"""Which loopback a guest gets, and what is said of its addresses."""

from ipaddress import IPv4Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrun import addresshooks, chbind, packethooks
from vrun.errors import ConfigInvalid
from vrun.sockcode import Rules


def test_loopbacks_are_made_from_numbers() -> None:
    assert chbind.default_loopback(1001) == IPv4Address("127.3.233.1")
    assert chbind.default_loopback(2) == IPv4Address("127.0.2.1")
    assert chbind.default_loopback(65534) == IPv4Address("127.255.254.1")


@given(st.integers(2, 65534), st.integers(2, 65534))
def test_no_two_guests_share_a_loopback_network(one: int, other: int) -> None:
    networks = {int(chbind.default_loopback(xid)) >> 8 for xid in (one, other)}
    assert len(networks) == len({one, other})
    assert networks.isdisjoint({0x7F0000, 0x7F0001})  # what guests say, and the host's own


def test_a_loopback_of_another_network_is_refused() -> None:
    with pytest.raises(ConfigInvalid, match=r"10\.0\.0\.1: cannot be a guest's loopback address"):
        chbind.attach(-1, (), loopback=IPv4Address("10.0.0.1"))


@pytest.mark.parametrize(
    ("addresses", "said"),
    [
        ((), ()),
        (("10.0.0.1",), ()),
        (("10.0.0.1", "10.0.0.2"), ("IPv4 addresses are bound to 10.0.0.1 alone",)),
        (("10.0.0.1", "fd00::1"), ("for both families are bound to IPv4 alone",)),
        (("fd00::1", "fd00::2"), ("IPv6 addresses are bound to fd00::1 alone",)),
    ],
)
def test_what_a_guest_with_several_addresses_cannot_do_is_said(
    addresses: tuple[str, ...], said: tuple[str, ...]
) -> None:
    lines = chbind.limits([ip_address(text) for text in addresses])
    assert len(lines) == len(said)
    assert all(line.endswith(end) for line, end in zip(lines, said, strict=True))


_WORDS = st.tuples(*[st.integers(0, 2**32 - 1)] * 4)


@given(
    st.lists(st.integers(0, 2**32 - 1), max_size=5).map(tuple),
    st.lists(_WORDS, max_size=5).map(tuple),
    st.one_of(st.none(), st.integers(0x7F000200, 0x7FFFFFFE)),
)
def test_every_program_can_be_written_for_every_guest(
    ipv4: tuple[int, ...],
    ipv6: tuple[tuple[int, int, int, int], ...],
    loopback: int | None,
) -> None:
    rules = Rules(ipv4=ipv4, ipv6=ipv6, loopback=loopback, sockets_fd=3)
    hooks = [*packethooks.HOOKS, *addresshooks.HOOKS]
    if loopback is not None:
        hooks += addresshooks.NAME_HOOKS
    for _, write in hooks:
        assert len(write(rules).assemble()) % 8 == 0


def test_hooks_are_named_once_each() -> None:
    hooks = [*packethooks.HOOKS, *addresshooks.HOOKS, *addresshooks.NAME_HOOKS]
    assert len({hook.name for hook, _ in hooks}) == len(hooks) == 17
    assert len({hook.attach_type for hook, _ in hooks}) == 17
    assert all(len(hook.name) < 16 for hook, _ in hooks)
