"""Writes the configuration of a new guest, and chooses its number.

    CONFDIR/web/
    ├── vdir -> VDIRBASE/web      ├── uts/nodename
    ├── run -> RUNDIR/web         ├── interfaces/{dev,mask,prefix,bcast}
    ├── cache -> CACHEBASE/web    ├── interfaces/N/{ip,dev,mask,prefix,name,nodev}
    ├── name, context, cflags     ├── apps/init/style
    └── fstab                     └── cpuset/{name,cpus,mems,...}

An option without a value makes no file. The folder is made under another name and renamed, so a
guest is there complete or not at all.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv6Address
from pathlib import Path
from typing import Final

from vrun.config_init import STYLES
from vrun.config_process import parse_uts_name
from vrun.config_sharing import parse_cpu_list, parse_group_path
from vrun.errors import ConfigInvalid, NotPermitted, WrongUsage
from vrun.keys import Keys, Line, parse_number
from vrun.netvalues import parse_device, parse_ip, parse_label, parse_prefix
from vrun.unfinished import choose_spare
from vrun.wordlist import CFLAGS, read_words
from vrun.xids import XIDS
from vstore.guest import confdir, parse_name, rundir

FSTAB: Final = """\
none	/proc		proc	defaults		0 0
none	/tmp		tmpfs	size=16m,mode=1777	0 0
none	/dev/pts	devpts	gid=5,mode=620		0 0
"""
"""The fstab of a new guest where .defaults has none."""

_FOLDERS: Final = ("interfaces", "apps/init", "uts", "cpuset")
"""They are there in each guest, empty or not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewGuest:
    """What the options of `vserver NAME build` say of the configuration; None is not given."""

    name: str
    root: Path
    xid: int | None = None
    """From `xids.allocate_xid` or an option; None: a dynamic one at each start."""
    hostname: str | None = None
    net_device: str | None = None
    net_mask: str | None = None
    net_prefix: str | None = None
    net_broadcast: str | None = None
    interfaces: tuple[str, ...] = ()
    """Each as `[NAME=][DEVICE:]IP[/MASK or /LENGTH]`; the device `nodev` adds no address."""
    flags: tuple[str, ...] = ()
    """Each a list of words with commas."""
    init_style: str | None = None
    cpuset: str | None = None
    cpuset_cpus: str | None = None
    """`LIST` or `LIST:0`, `LIST:1`: with 1 no other cpuset may have them."""
    cpuset_mems: str | None = None
    cpuset_virtual: bool = False
    config: Path | None = None
    """The folder to make; None: CONFDIR/NAME."""
    run_link: Path | None = None
    """Where the link `run` leads; None: RUNDIR/NAME."""

    def addresses(self) -> list[str]:
        """The addresses of `interfaces`, in their order. Raises ConfigInvalid."""
        return [parse_interface(text).ip for text in self.interfaces]


def write_guest(new: NewGuest) -> tuple[str, ...]:
    """Make the configuration folder; the notices that come back are for the person who asked.

    Raises WrongUsage for a value that cannot be meant and for a folder that exists, NotPermitted
    where it cannot be made. Either all of it is there afterwards or nothing.
    """
    folder = new.config or confdir() / parse_name(new.name)
    notices: list[str] = []
    with _usage_errors():
        files = dict(_files(new, notices))
        links = dict(_links(new))
    if os.path.lexists(folder):
        raise WrongUsage(
            f"{folder}: exists already", hint="--force moves it out of the way, with the tree"
        )
    spare = choose_spare(folder)
    try:
        _write(spare, files, links)
        spare.rename(folder)
    except OSError as error:
        shutil.rmtree(spare, ignore_errors=True)
        raise NotPermitted(f"{folder}: cannot be made: {error.strerror}") from error
    return tuple(notices)


def _write(folder: Path, files: dict[str, str], links: dict[str, Path]) -> None:
    for name in ("", *_FOLDERS):
        (folder / name).mkdir(mode=0o755, parents=True, exist_ok=True)
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(mode=0o755, exist_ok=True)
        path.write_bytes(os.fsencode(text))  # bytes that are no text stay what they are
    for name, target in links.items():
        (folder / name).symlink_to(target)


@contextmanager
def _usage_errors() -> Iterator[None]:
    """What the readers of files say of an option is wrong usage here."""
    try:
        yield
    except ConfigInvalid as error:
        raise WrongUsage(error.message, hint=error.hint) from error


def _links(new: NewGuest) -> Iterator[tuple[str, Path]]:
    yield "vdir", new.root
    yield "run", new.run_link or rundir() / new.name
    yield "cache", _cache_base() / new.name


def _cache_base() -> Path:
    link = confdir() / ".defaults" / "cachebase"
    return Path(os.path.realpath(link)) if os.path.lexists(link) else Path("/var/cache/vservers")


def _files(new: NewGuest, notices: list[str]) -> Iterator[tuple[str, str]]:
    """The files with their content."""
    yield "name", f"{new.name}\n"
    yield "fstab", _fstab()
    if new.xid is not None:
        xid = parse_number(Line("--context", f"{new.xid}"), least=XIDS[0], most=XIDS[-1])
        yield "context", f"{xid}\n"
    if new.hostname:
        yield "uts/nodename", parse_uts_name(Line("--hostname", new.hostname)) + "\n"
    if new.init_style:
        yield "apps/init/style", _init_style(new.init_style) + "\n"
    if new.flags:
        yield "cflags", "".join(f"{word}\n" for word in _flags(new.flags))
    yield from _cpuset_files(new)
    yield from _network_files(new, notices)


def _fstab() -> str:
    source = Keys(confdir() / ".defaults", [])
    return (source.text("fstab") if source.has("fstab") else None) or FSTAB


def _init_style(text: str) -> str:
    if text not in STYLES:
        raise WrongUsage(
            f"--initstyle: {text!r} is no init style", hint=f"known are {', '.join(STYLES)}"
        )
    return text


def _flags(lists: tuple[str, ...]) -> list[str]:
    words = [word for text in lists for word in text.replace(",", " ").split()]
    read_words(CFLAGS, [Line("--flags", word) for word in words])
    return words


def _cpuset_files(new: NewGuest) -> Iterator[tuple[str, str]]:
    if new.cpuset:
        yield "cpuset/name", parse_group_path(Line("--cpuset", new.cpuset)) + "\n"
    if new.cpuset_virtual:
        yield "cpuset/virtualized", "1\n"
    for option, text, key, exclusive in (
        ("--cpusetcpus", new.cpuset_cpus, "cpus", "cpu_exclusive"),
        ("--cpusetmems", new.cpuset_mems, "mems", "mem_exclusive"),
    ):
        if text:
            numbers, _, flag = text.partition(":")
            yield f"cpuset/{key}", parse_cpu_list(Line(option, numbers)) + "\n"
            if flag:
                is_on = parse_number(Line(option, flag), least=0, most=1)
                yield f"cpuset/{exclusive}", f"{is_on}\n"


# --- interfaces/


def _network_files(new: NewGuest, notices: list[str]) -> Iterator[tuple[str, str]]:
    if new.net_device:
        yield "interfaces/dev", parse_device(Line("--netdev", new.net_device)) + "\n"
    if new.net_mask:
        any_ip = parse_ip(Line("", "127.0.0.1"))
        parse_prefix(Line("--netmask", new.net_mask), any_ip)
        yield "interfaces/mask", f"{new.net_mask}\n"
    if new.net_prefix:
        prefix = parse_number(Line("--netprefix", new.net_prefix), least=0, most=128)
        yield "interfaces/prefix", f"{prefix}\n"
    if new.net_broadcast:
        yield "interfaces/bcast", f"{parse_ip(Line('--netbcast', new.net_broadcast))}\n"
    for number, text in enumerate(new.interfaces):
        interface = parse_interface(text, new.net_device)
        for key, value in interface.files():
            if key == "mask" and new.net_prefix:  # which would count instead of it
                key, value = "prefix", _prefix_of_mask(value)
            yield f"interfaces/{number}/{key}", f"{value}\n"
        if interface.is_bound_only or not (interface.device or new.net_device):
            yield f"interfaces/{number}/nodev", ""
            if not interface.is_bound_only:
                notices.append(
                    f"--interface {text}: names no device and there is no --netdev; "
                    "the address has to exist already (nodev)"
                )


def _prefix_of_mask(mask: str) -> str:
    return f"{parse_prefix(Line('--interface', mask), parse_ip(Line('', '127.0.0.1')))}"


@dataclass(frozen=True, slots=True)
class Interface:
    """One --interface option."""

    ip: str
    name: str | None
    device: str | None
    is_bound_only: bool
    """The device word is `nodev`."""
    mask: str | None
    prefix: str | None

    def files(self) -> Iterator[tuple[str, str]]:
        """The keys of interfaces/N that have a value."""
        for key, value in (
            ("ip", self.ip),
            ("name", self.name),
            ("dev", self.device),
            ("mask", self.mask),
            ("prefix", self.prefix),
        ):
            if value is not None:
                yield key, value


def parse_interface(text: str, net_device: str | None = None) -> Interface:
    """`[NAME=][DEVICE:]IP[/MASK or /LENGTH]`; a whole IPv6 address needs no device before it.

    `net_device` is the one of all that name none, for a name that is too long with it.
    Raises ConfigInvalid naming the option.
    """
    where = f"--interface {text}"
    name, equals, rest = text.partition("=")
    if not equals:
        name, rest = "", text
    address, slash, network = rest.partition("/")
    device, colon, after = address.partition(":")
    if not colon or _is_ipv6(address):
        device, after = "", address
    ip = parse_ip(Line(where, after))
    if slash:
        parse_prefix(Line(where, network), ip)
    on = parse_device(Line(where, device)) if device and device != "nodev" else None
    if name:
        parse_label(Line(where, name), on or net_device or "")
    is_length = network.isdigit()
    return Interface(
        ip=f"{ip}",
        name=name or None,
        device=on,
        is_bound_only=device == "nodev",
        mask=network if slash and not is_length else None,
        prefix=network if is_length else None,
    )


def _is_ipv6(text: str) -> bool:
    try:
        IPv6Address(text)
    except ValueError:
        return False
    return True
