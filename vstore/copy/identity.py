"""What makes a machine of a guest, where it stands, and how a copy gets another: host name,
addresses, context number.

It stands in the configuration, and in the guest's own etc/hostname, etc/hosts and
etc/network/interfaces. Only values that are exactly the old ones are changed.
"""

import fcntl
import os
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import suppress
from ipaddress import ip_address, ip_interface
from pathlib import Path
from typing import Final

import msgspec

from vstore import inode
from vstore.copy.hostaddresses import load_host_addresses
from vstore.copy.messages import Identity, Setting
from vstore.errors import ConfigInvalid, ToolError, WrongUsage
from vstore.guest import LEFTOVER, confdir
from vstore.scan import open_below

GUEST_FILES: Final = (b"etc/hostname", b"etc/hosts", b"etc/network/interfaces")
_FIRST_CONTEXT: Final = 40000
_CONTEXTS: Final = range(2, 49152)
_LARGEST: Final = 1 << 18
_VARIABLE: Final = r"(?m)^[ \t]*(?:export[ \t]+)?{}=[\"']?([^\"'\n#]*)[\"']?[ \t]*(#.*)?$"
_HOSTNAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,63}")
_DEVICE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,14}")
_DIGITS: Final = frozenset("0123456789")
_BOUND: Final = ("nodev", "only_ip")
"""Keys of an address that exists already; the second is the older name of the first."""
_ENTRY: Final = re.compile(r"d/interfaces/([^/]+)/ip")


def identity_of(settings: Sequence[Setting]) -> Identity:
    """What these settings make of a guest."""
    texts = _texts(settings)
    if "conf" in texts:
        return _identity_of_old_style(texts["conf"])
    hostname = texts.get("d/uts/nodename", texts.get("d/hostname", "")).strip()
    addresses = [texts[path].strip() for path in _list_ips(settings)]
    context = texts.get("d/context", "").strip()
    return Identity(hostname, addresses, int(context) if context.isdecimal() else 0)


def _texts(settings: Sequence[Setting]) -> dict[str, str]:
    found = (item for item in settings if item.kind == "f")
    return {item.path: item.content.decode(errors="replace") for item in found}


def _list_ips(settings: Sequence[Setting]) -> list[str]:
    return sorted(item.path for item in settings if _ENTRY.fullmatch(item.path))


def _identity_of_old_style(text: str) -> Identity:
    context = _variable(text, "S_CONTEXT")
    addresses = [item.rpartition(":")[2] for item in _list_iproot(text)]
    return Identity(
        _variable(text, "S_HOSTNAME"), addresses, int(context) if context.isdecimal() else 0
    )


def _list_iproot(text: str) -> list[str]:
    items = _variable(text, "IPROOT").split()
    return [item for item in items if item[0] in _DIGITS or ":" in item]


def _variable(text: str, name: str) -> str:
    found = re.findall(_VARIABLE.format(name), text)
    return found[-1][0].strip() if found else ""


def plain(address: str) -> str:
    """An address without device and prefix."""
    return address.partition("/")[0]


def _canonical(address: str) -> str:
    """As every other spelling of the same address."""
    try:
        return f"{ip_address(plain(address))}"
    except ValueError:
        return plain(address)


# --- what a copy is to be


def wanted_identity(
    was: Identity, *, hostname: str, addresses: Sequence[str], context: int
) -> tuple[Identity, list[str]]:
    """The copy's identity, and the devices (or "") of its addresses, as they were asked for.

    The n-th address replaces the n-th; `DEV:` may stand before one. A context of 0 stays. Raises
    WrongUsage for what can be none.
    """
    if hostname and not _HOSTNAME.fullmatch(hostname):
        raise WrongUsage(f"{hostname!r} cannot be a host name")
    if context and context not in _CONTEXTS:
        raise WrongUsage(f"context {context}: is not in the range 2 to {_CONTEXTS[-1]}")
    found = list(was.addresses)
    devices = [""] * max(len(found), len(addresses))
    for place, asked in enumerate(addresses):
        before, colon, rest = asked.partition(":")
        has_device = bool(colon) and not re.fullmatch(r"[0-9a-fA-F]*", before)
        devices[place] = before if has_device else ""
        address = rest if has_device else asked
        _check_address(address, devices[place])
        found[place : place + 1] = [address]
    return Identity(hostname or was.hostname, found, context or was.context), devices


def _check_address(address: str, device: str) -> None:
    try:
        ip_interface(address)
    except ValueError as error:
        raise WrongUsage(f"{address!r} is no address: {error}") from error
    if device and not _DEVICE.fullmatch(device):
        raise WrongUsage(f"{device!r} cannot be a device")


def check_free(
    name: str,
    wanted: Identity,
    *,
    settings: Sequence[Setting] = (),
    devices: Sequence[str] = (),
) -> None:
    """Refuse a context or address that another guest of this machine has, or the machine itself.

    `settings`, and the devices that were asked for: of an address that they say exists already
    (`nodev`) only another guest is looked for. Raises WrongUsage, ToolError.
    """
    for other, identity in list_identities():
        if other == name:
            continue
        if wanted.context and identity.context == wanted.context:
            raise WrongUsage(
                f"context {wanted.context} belongs to guest {other} on this machine",
                hint="give the copy another with --context N, or --context auto",
            )
        taken = {_canonical(address) for address in identity.addresses}
        for address in wanted.addresses:
            if _canonical(address) in taken and not _is_everybodys(address):
                raise WrongUsage(
                    f"address {plain(address)} belongs to guest {other} on this machine",
                    hint="give the copy another with --ip A/P or --interface DEV:A/P",
                )
    _check_free_on_host(wanted, _list_bound(settings, devices, len(wanted.addresses)))


def _check_free_on_host(wanted: Identity, bound: Set[int]) -> None:
    asked = [
        address
        for place, address in enumerate(wanted.addresses)
        if place not in bound and not _is_everybodys(address)
    ]
    if not asked:
        return
    taken = {found.address: found for found in load_host_addresses()}
    for address in asked:
        found = taken.get(_canonical(address))
        if found is not None:
            raise WrongUsage(
                f"address {plain(address)} is this machine's own, on {found.device}",
                hint="give the copy another with --ip A/P or --interface DEV:A/P, or take it from "
                f"the machine: ip address del {found.address}/{found.prefix} dev {found.device}",
            )


def _is_everybodys(address: str) -> bool:
    """Whether it belongs to nobody alone: a loopback of every machine, or all addresses."""
    try:
        found = ip_address(plain(address))
    except ValueError:
        return False
    return found.is_loopback or found.is_unspecified


def _list_bound(settings: Sequence[Setting], devices: Sequence[str], count: int) -> set[int]:
    """Which of `count` addresses, by place, the host has already: no start adds them."""
    paths = {item.path for item in settings}
    is_added = True  # what stands in no entry yet
    if "conf" in paths:
        text = _texts(settings)["conf"]
        is_added = bool(_variable(text, "IPROOTDEV"))
        added = [is_added or ":" in item for item in _list_iproot(text)]
    else:
        folders = [path.removesuffix("/ip") for path in _list_ips(settings)]
        added = [not paths & {f"{folder}/{key}" for key in _BOUND} for folder in folders]
    added += [is_added] * (count - len(added))
    return {
        place for place in range(count) if not added[place] and not any(devices[place : place + 1])
    }


def list_identities() -> Iterator[tuple[str, Identity]]:
    """Every guest of this machine that has a configuration, with what that makes of it."""
    try:
        entries = sorted(entry for entry in confdir().iterdir() if not LEFTOVER.search(entry.name))
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        with suppress(OSError):
            if entry.suffix == ".conf" and entry.is_file():
                text = entry.read_bytes().decode(errors="replace")
                yield entry.stem, _identity_of_old_style(text)
            elif entry.is_dir():
                yield entry.name, identity_of(list(_read_few(entry)))


def _read_few(folder: Path) -> Iterator[Setting]:
    """The settings of which an identity consists."""
    paths = [folder / "context", folder / "uts" / "nodename", folder / "hostname"]
    paths += sorted(folder.glob("interfaces/*/ip"))
    for path in paths:
        with suppress(OSError):
            if path.stat().st_size <= _LARGEST:
                yield Setting(f"d/{path.relative_to(folder)}", "f", 0, path.read_bytes())


def choose_context() -> int:
    """A number that no guest of this machine has, and never the same twice.

    Writes CONFDIR/.defaults/context.next under context.lock, as `vserver build` does. Raises
    ToolError.
    """
    defaults = confdir() / ".defaults"
    try:
        defaults.mkdir(mode=0o755, parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(defaults / "context.lock", flags, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            taken = {identity.context for _, identity in list_identities()}
            first = _load_next(defaults / "context.next")
            order = (*range(first, _CONTEXTS.stop), *range(_FIRST_CONTEXT, first))
            chosen: int = next(number for number in order if number not in taken)
            spare = defaults / ".context.next.new"
            spare.write_text(f"{chosen + 1}\n")
            spare.replace(defaults / "context.next")
        finally:
            os.close(fd)
    except OSError as error:
        raise ToolError(f"{defaults}: no context can be chosen: {error.strerror}") from error
    except StopIteration:
        raise ToolError(f"all contexts up to {_CONTEXTS[-1]} belong to guests") from None
    return chosen


def _load_next(path: Path) -> int:
    try:
        number = int(path.read_text())
    except FileNotFoundError:
        return _FIRST_CONTEXT
    except ValueError as error:
        raise ConfigInvalid(f"{path}: holds no number") from error
    return number if number in _CONTEXTS else _FIRST_CONTEXT


# --- changing the configuration


def change_settings(
    settings: Sequence[Setting],
    was: Identity,
    wanted: Identity,
    devices: Sequence[str],
    *,
    mark_off: bool,
    name: str,
) -> list[Setting]:
    """The settings of a new-style guest with the wanted identity."""
    found = {item.path: item for item in settings}

    def put(path: str, text: str) -> None:
        mode = found[path].mode if path in found else 0o644
        found[path] = Setting(path, "f", mode, os.fsencode(f"{text}\n"))

    if "d/name" in found:
        put("d/name", name)
    if wanted.hostname != was.hostname:
        put("d/uts/nodename", wanted.hostname)
        found.pop("d/hostname", None)
    if wanted.context != was.context:
        put("d/context", f"{wanted.context}")
    entries = [path.removesuffix("/ip") for path in _list_ips(settings)]
    for place, address in enumerate(wanted.addresses):
        entry = entries[place] if place < len(entries) else _free_entry(found, place)
        if place >= len(was.addresses) or address != was.addresses[place]:
            text, _, prefix = address.partition("/")
            put(f"{entry}/ip", text)
            if prefix:
                put(f"{entry}/prefix", prefix)
                found.pop(f"{entry}/mask", None)
        if devices[place]:
            put(f"{entry}/dev", devices[place])
            found.pop(f"{entry}/nodev", None)
            found.pop(f"{entry}/only_ip", None)
    if mark_off:
        found.pop("d/apps/init/mark", None)
    return [found[path] for path in sorted(found)]


def _free_entry(found: Mapping[str, Setting], place: int) -> str:
    number = place
    while any(path.startswith(f"d/interfaces/{number}/") for path in found):
        number += 1
    return f"d/interfaces/{number}"


def change_old_style(
    settings: Sequence[Setting],
    was: Identity,
    wanted: Identity,
    devices: Sequence[str],
    *,
    mark_off: bool,
    name: str,
) -> list[Setting]:
    """The settings of an old-style guest with the wanted identity."""
    changed = []
    for item in settings:
        if item.path == "conf":
            text = os.fsdecode(item.content)
            if wanted.hostname != was.hostname:
                text = _set_variable(text, "S_HOSTNAME", wanted.hostname)
            if wanted.context != was.context:
                text = _set_variable(text, "S_CONTEXT", f"{wanted.context}")
            if wanted.addresses != was.addresses or any(devices):
                iproot = _change_iproot(_variable(text, "IPROOT"), wanted.addresses, devices)
                text = _set_variable(text, "IPROOT", iproot)
            if mark_off:
                text = _set_variable(text, "ONBOOT", "no")
            item = Setting(item.path, item.kind, item.mode, os.fsencode(text))
        changed.append(item)
    return changed


def _set_variable(text: str, name: str, value: str) -> str:
    line = f'{name}="{value}"'
    expression = re.compile(_VARIABLE.format(name))
    changed, count = expression.subn(lambda found: f"{line} {found[2] or ''}".rstrip(), text)
    return changed if count else f"{text.rstrip()}\n{line}\n"


def _change_iproot(iproot: str, addresses: Sequence[str], devices: Sequence[str]) -> str:
    items = iproot.split()
    for place, address in enumerate(addresses):
        old = items[place] if place < len(items) else ""
        before, colon, rest = old.rpartition(":")
        _, slash, mask = rest.partition("/")
        device = f"{devices[place]}:" if devices[place] else f"{before}{colon}"
        suffix = "" if "/" in address else f"{slash}{mask}"
        items[place : place + 1] = [f"{device}{address}{suffix}"]
    return " ".join(items)


# --- changing the guest's own files


def rewrite_files(root_fd: int, was: Identity, wanted: Identity) -> dict[bytes, bytes]:
    """What those files of the guest say with the wanted identity; only those that change.

    The old host name is what the guest calls itself where its configuration has none.
    """
    if wanted.hostname and not was.hostname:
        was = msgspec.structs.replace(was, hostname=_own_hostname(root_fd))
    values = _values(was, wanted)
    if not values:
        return {}
    words = b"|".join(re.escape(old) for old in sorted(values, key=len, reverse=True))
    expression = re.compile(rb"(?<![\w.:-])(?:%s)(?![\w:-]|\.\w)" % words)
    changed: dict[bytes, bytes] = {}
    for path in GUEST_FILES:
        content = _read_guest_file(root_fd, path)
        new = expression.sub(lambda found: values[found[0]], content)
        if new != content:
            changed[path] = new
    return changed


def _own_hostname(root_fd: int) -> str:
    """What the guest's etc/hostname says; "" where that is no host name of its own."""
    lines = _read_guest_file(root_fd, b"etc/hostname").decode(errors="replace").splitlines()
    words = [word for line in lines if not line.lstrip().startswith("#") for word in line.split()]
    is_name = len(words) == 1 and _HOSTNAME.fullmatch(words[0]) is not None
    return words[0] if is_name and words[0].partition(".")[0] != "localhost" else ""


def _values(was: Identity, wanted: Identity) -> dict[bytes, bytes]:
    """Old and new values, each old one once."""
    found: dict[str, str] = {}
    if was.hostname and wanted.hostname:
        found[was.hostname] = wanted.hostname
        found.setdefault(was.hostname.partition(".")[0], wanted.hostname.partition(".")[0])
    for old, new in zip(was.addresses, wanted.addresses, strict=False):
        found.setdefault(plain(old), plain(new))
    pairs = found.items()
    return {os.fsencode(old): os.fsencode(new) for old, new in pairs if old and old != new}


def _read_guest_file(root_fd: int, path: bytes) -> bytes:
    """A small file of the guest; b"" where it is none."""
    with suppress(OSError):
        fd = open_below(root_fd, path, flags=inode.OPEN_TO_READ)
        try:
            status = os.fstat(fd)
            if status.st_size <= _LARGEST:
                return os.pread(fd, status.st_size, 0)
        finally:
            os.close(fd)
    return b""
