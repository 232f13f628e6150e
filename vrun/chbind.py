"""chbind: keep the sockets of a cgroup to a guest's addresses, by cgroup BPF.

A guest without a network namespace of its own shares the host's addresses and ports. Programs in
its cgroup run where a socket names an address, and put in what the guest means:

    it says               bind                              connect, send to
    0.0.0.0               its first IPv4 address            as 127.0.0.1
    127.0.0.n, 127.0.1.n  the same of its own block         that; or its first address, where one of
                                                            its own sockets has the port only there
    ::                    its first IPv4 address, mapped;   as ::1
                          its first IPv6 one for a socket
                          that is IPV6_V6ONLY
    ::1                   one of its block, mapped          that, or its first address as above
    an address of its     that                              that
    another's             EPERM                             that, from its own first address

With no address of a family, all addresses of it are the loopback. The block is 127.x.y.0/24, each
half for n below 128. What the kernel says of names and peers is turned back: the guest sees
127.0.0.1 and ::1. Ports that only the host or another guest listens on for 0.0.0.0 are closed on
the guest's loopback. A datagram to ::1 from a socket that is not connected is refused
(ENETUNREACH). An ICMP socket has no hook: a ping leaves with the source that the route has, the
host's. Abstract unix names that others have are names that nobody has (abstracthooks.py).
"""

import errno
import os
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Final

from vrun import abstracthooks, addresshooks, bpf, kerneltypes, packethooks
from vrun.errors import ConfigInvalid, NotPermitted
from vrun.sockcode import Rules
from vrun.spec import GuestSpec
from vstore.guest import rundir
from vstore.record import replace

_OPEN_NAMES: Final = (
    "can reach abstract unix sockets of the host and of other bound guests: this kernel cannot "
    "refuse them ({reason}); Linux 6.7 can, and spaces/net ends it"
)
_OPEN_FILE: Final = (
    "its root can write {path}, which is the host's, as user id 0 may without any capability; "
    "spaces/net ends it"
)
_WRITTEN: Final = ("xt_recent", "rpc", "ipt_CLUSTERIP", "pktgen")
"""Folders of /proc/net with files that ask for no capability."""
_BINDV6ONLY: Final = Path("/proc/sys/net/ipv6/bindv6only")


def attach(
    cgroup_fd: int,
    addresses: Sequence[IPv4Address | IPv6Address],
    *,
    loopback: IPv4Address | None,
) -> None:
    """Restrict every socket that is made in the cgroup from now on, and in all below it.

    `cgroup_fd` is a descriptor of its folder in the v2 hierarchy. The first address of a family is
    what a wildcard means; without any only the loopback is left. `loopback` is what 127.0.0.1
    means; None leaves the host's loopback network as it is. Holds until the cgroup is removed, and
    nothing in it can take it off. Raises NotPermitted where the kernel refuses.
    """
    rules = _rules(addresses, loopback)
    with ExitStack() as stack:
        try:
            storage_fd = bpf.make_socket_storage("vs_sockets")
            stack.callback(os.close, storage_fd)
            rules = replace(rules, sockets_fd=storage_fd)
            for hook, write in _hooks(rules):
                program_fd = bpf.load_program(write(rules), hook)
                stack.callback(os.close, program_fd)
                bpf.attach(cgroup_fd, hook, program_fd)
        except OSError as error:
            raise _refusal(error) from error


def keep_from_abstract_names(cgroup_fd: int, folder: Path) -> str:
    """Keep sockets made in the cgroup, and below it, from abstract unix names of others.

    Where members of the kernel's structures lie is kept in `folder`. Returns why this kernel cannot
    do it, "" where it is done.
    """
    try:
        places = kerneltypes.find_places(abstracthooks.MEMBERS, folder)
        program = abstracthooks.guard(places, abstracthooks.find_ancestor(cgroup_fd))
        for hook in abstracthooks.HOOKS:
            program_fd = bpf.load_program(program, hook)
            try:
                bpf.attach(cgroup_fd, hook, program_fd)
            finally:
                os.close(program_fd)
    except kerneltypes.TypesUnknown as error:
        return f"{error}"
    except OSError as error:
        return os.strerror(error.errno or 0)  # what the verifier says is of no use to a person
    return ""


def restrict(group: Path, spec: GuestSpec, xid: int) -> tuple[str, ...]:
    """Restrict a guest's cgroup, a folder of the v2 hierarchy, to the guest's addresses.

    Before anything of the guest is in it. Returns what the guest cannot do, or what it cannot be
    kept from, a line each. Raises NotPermitted, ConfigInvalid.
    """
    addresses = [address.ip for address in spec.addresses]
    loopback = spec.loopback or default_loopback(xid)
    fd = os.open(group, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        attach(fd, addresses, loopback=None if "lback_allow" in spec.nflags else loopback)
        reason = keep_from_abstract_names(fd, rundir() / ".filters")
    finally:
        os.close(fd)
    return (
        *limits(addresses),
        *((_OPEN_NAMES.format(reason=reason),) if reason else ()),
        *(_OPEN_FILE.format(path=path) for path in writable_files()),
    )


def writable_files(folder: Path = Path("/proc/self/net")) -> Iterator[str]:
    """Files of modules that user id 0 may write in this network namespace, one for each folder.

    The guest has the same ones in its own /proc, and no mount can cover them: the processes'
    folders come and go.
    """
    for name in _WRITTEN:
        for path in sorted((folder / name).glob("**/*")):
            if path.is_file() and path.stat().st_mode & stat.S_IWUSR:
                yield f"/proc/net/{path.relative_to(folder)}"
                break


def default_loopback(xid: int) -> IPv4Address:
    """The loopback address of the guest with that number, 127.x.y.1; no two share a network."""
    return IPv4Address(0x7F000001 | xid << 8)


def limits(addresses: Sequence[IPv4Address | IPv6Address]) -> tuple[str, ...]:
    """What a guest with these addresses cannot do, a line each; for a warning at its start."""
    lines = []
    for version in (4, 6):
        family = [address for address in addresses if address.version == version]
        if len(family) > 1:
            lines.append(
                f"servers that listen on all IPv{version} addresses are bound to {family[0]} alone"
            )
    if {address.version for address in addresses} == {4, 6}:
        lines.append("servers that listen on :: for both families are bound to IPv4 alone")
    return tuple(lines)


def _rules(addresses: Sequence[IPv4Address | IPv6Address], loopback: IPv4Address | None) -> Rules:
    ipv4 = tuple(int(address) for address in addresses if address.version == 4)
    words = (struct.unpack("=4I", address.packed) for address in addresses if address.version == 6)
    return Rules(
        ipv4=ipv4,
        ipv6=tuple((first, second, third, last) for first, second, third, last in words),
        loopback=_checked_loopback(loopback),
        v6only=_is_v6only(),
    )


def _checked_loopback(loopback: IPv4Address | None) -> int | None:
    if loopback is None or int(loopback) >> 9 == 0x7F0000 >> 1:  # 127.0.0.n, 127.0.1.n
        return None
    if not loopback.is_loopback:
        raise ConfigInvalid(
            f"{loopback}: cannot be a guest's loopback address",
            hint="choose one of 127.0.2.1 to 127.255.255.254, or none",
        )
    return int(loopback)


def _is_v6only() -> bool:
    with suppress(OSError):  # a kernel without IPv6
        return _BINDV6ONLY.read_text().strip() == "1"
    return False


def _hooks(rules: Rules) -> tuple[tuple[bpf.Hook, Callable[[Rules], bpf.Code]], ...]:
    hooks = (*packethooks.HOOKS, *addresshooks.HOOKS)
    return hooks if rules.loopback is None else (*hooks, *addresshooks.NAME_HOOKS)


def _refusal(error: OSError) -> NotPermitted:
    if error.errno == errno.EPERM:
        hint = "CAP_BPF and CAP_NET_ADMIN in the first user namespace are needed; "
    else:
        hint = "Linux 6.1 or newer with cgroup BPF (CONFIG_CGROUP_BPF) is needed; "
    return NotPermitted(
        f"cannot restrict the guest to its addresses: {error.strerror}",
        hint=f"{hint}or give the guest a network of its own (spaces/net)",
    )
