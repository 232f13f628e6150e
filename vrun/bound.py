"""chbind: one command whose sockets are kept to some addresses, in a control group of its own.

    <own group>/chbind-4711/     4711: the chbind that made it, and waits for the command

The group is below that of the caller: the command stays in the context it is in. What it leaves
running stays bound too, and the group with it; a later chbind removes groups that are empty.
"""

import fcntl
import os
import re
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Final, NoReturn

from vrun import chbind, foreground, syscalls
from vrun.cgroup import BASE
from vrun.errors import NotPermitted, ToolError, WrongUsage
from vrun.hierarchy import find_hierarchies, own_cgroup
from vrun.membership import SPECTATOR

IpAddress = IPv4Address | IPv6Address
Started = Callable[[], None]
MOST: Final = 16
"""Addresses of one command, as with the original."""
_GROUP: Final = re.compile(r"chbind-([0-9]+)")
_SIOCGIFADDR: Final = 0x8915  # linux/sockios.h
_DEVICE: Final = re.compile(r"[^\s/]{1,15}")
_TRIES: Final = 10


def parse_address(text: str) -> IpAddress:
    """`10.0.0.5`, `10.0.0.5/24`, or the name of a device, for its first IPv4 address.

    Raises WrongUsage.
    """
    try:
        ip = ip_address(text.partition("/")[0])
    except ValueError:
        return _address_of(text)
    if ip.is_unspecified:
        raise WrongUsage(f"{text}: is no address to be bound to: it means all of them")
    return ip


def _address_of(device: str) -> IPv4Address:
    if not _DEVICE.fullmatch(device):
        raise WrongUsage(f"{device!r} is neither an address nor a device")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        try:
            request = struct.pack("256s", os.fsencode(device))
            answer = fcntl.ioctl(asker, _SIOCGIFADDR, request)
        except OSError as error:
            raise WrongUsage(
                f"{device!r} is neither an address nor a device with one: {error.strerror}"
            ) from None
    return IPv4Address(answer[20:24])


def own_bound_group() -> Path | None:
    """The group that this process's sockets are kept to addresses by; None: they are not."""
    own = own_cgroup(find_hierarchies())
    for folder in (own, *own.parents):
        if _GROUP.fullmatch(folder.name):
            return own
    return None


def run(
    argv: Sequence[str],
    addresses: Sequence[IpAddress],
    *,
    loopback: IPv4Address | None,
    started: Started = foreground.ignore,
) -> int:
    """Run a command that is bound to the addresses; its exit code, once it has ended.

    `started` is called when it runs. Raises NotPermitted where the kernel refuses, CommandNotFound,
    CannotExecute.
    """
    with _new_group() as group:
        fd = os.open(group, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            chbind.attach(fd, addresses, loopback=loopback)
            return run_in(fd, argv, started=started)
        finally:
            os.close(fd)


def run_as_spectator(
    argv: Sequence[str], before: Callable[[], None], started: Started = foreground.ignore
) -> int:
    """Run a command on the host in the group of context 1, after `before`; its exit code."""
    group = find_hierarchies().v2 / BASE / str(SPECTATOR)
    fd = _open_shared(group)
    try:
        return run_in(fd, argv, before=before, started=started)
    finally:
        os.close(fd)
        with suppress(OSError):  # another spectator is in it
            group.rmdir()
            group.parent.rmdir()


def _open_shared(group: Path) -> int:
    """Another spectator that ends may remove it in that moment."""
    for _ in range(_TRIES):
        with suppress(FileNotFoundError):
            group.mkdir(parents=True, exist_ok=True)
            return os.open(group, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    raise ToolError(f"{group}: cannot be made: others remove it again and again")


def run_in(
    group_fd: int,
    argv: Sequence[str],
    *,
    before: Callable[[], None] | None = None,
    started: Started = foreground.ignore,
) -> int:
    """Run a command in the v2 group; the child calls `before` first. The exit code."""
    foreground.find_program(argv[0])

    def become() -> NoReturn:
        if before:
            before()
        foreground.execute(argv)

    return foreground.run(lambda: syscalls.fork_into_cgroup(group_fd), become, started)


@contextmanager
def _new_group() -> Iterator[Path]:
    """A group below our own, removed if nothing is left in it."""
    own = own_cgroup(find_hierarchies())
    _sweep(own)
    group = own / f"chbind-{os.getpid()}"
    try:
        group.mkdir(exist_ok=True)
    except OSError as error:
        raise NotPermitted(
            f"{group}: cannot be made: {error.strerror}",
            hint="run as root, where the cgroup v2 hierarchy is mounted for writing",
        ) from error
    try:
        yield group
    finally:
        with suppress(OSError):  # what the command has left runs on
            group.rmdir()


def _sweep(own: Path) -> None:
    """Remove groups that earlier calls left because something still ran there."""
    for folder in own.glob("chbind-*"):
        found = _GROUP.fullmatch(folder.name)
        if found and not Path(f"/proc/{found[1]}").exists():
            with suppress(OSError):
                folder.rmdir()
