"""Make a tree that somebody filled the tree of this guest: what is missing, and who it is.

What the tree has of its own stays. What says which machine it is does not: the name, the machine
id, the host keys of ssh. A tree that was copied, unpacked or cloned has those of another one.
"""

import logging
import os
import re
import secrets
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from vrun.build.distribution import Device, Distribution, existing
from vrun.build.inside import GuestTree
from vrun.errors import ToolError

log = logging.getLogger(__name__)

_FOLDERS: Final = (
    ("dev", 0o755),
    ("proc", 0o555),
    ("sys", 0o555),
    ("run", 0o755),
    ("tmp", 0o1777),
    ("etc", 0o755),
)
_MOUNTED_ON: Final = frozenset({"dev", "proc", "sys"})
"""Folders without which no guest starts: what else has such a name ends the build."""
_FILES: Final = (
    "hosts",
    "nsswitch.conf",
    "krb5.conf",
    "krb.conf",
    "krb.realms",
    "ldap.conf",
    "localtime",
    "resolv.conf",
)
"""What the administrator can lay down for guests whose /etc lacks it."""

_HOSTS: Final = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
_MACHINE_ID: Final = "etc/machine-id"
_MACHINE_ID_COPY: Final = "var/lib/dbus/machine-id"
_SSH_KEY: Final = re.compile(r"ssh_host_(rsa|ecdsa|ed25519|dsa)_key")
_RC: Final = ("etc/init.d/rc", "etc/rc.d/rc")
_GETTY: Final = re.compile(rb"^([^#\n][^\n]*(?:getty|:askfirst:)[^\n]*)$", re.MULTILINE)


def complete(tree: GuestTree, distribution: Distribution) -> None:
    """Add the folders, devices and files that every guest has, where the tree lacks them.

    Raises ToolError, OSError.
    """
    for path, mode in _FOLDERS:
        if path in _MOUNTED_ON or not tree.has(path):
            tree.make_folder(path, mode)
    for device in distribution.devices():
        if not tree.has(f"dev/{device.name}"):
            _make_device(tree, device)
    for name in _FILES:
        if tree.is_blank(f"etc/{name}"):
            _lay_down(tree, name, distribution)
    if tree.is_blank("etc/hosts"):
        tree.put("etc/hosts", _HOSTS.encode())


def _make_device(tree: GuestTree, device: Device) -> None:
    path = f"dev/{device.name}"
    if device.kind == stat.S_IFDIR:
        tree.make_folder(path, device.mode)
    elif device.kind == stat.S_IFLNK:
        tree.put_link(path, device.target)
    elif device.kind == stat.S_IFREG:
        tree.put(path, b"", mode=device.mode)
    else:
        tree.put_node(path, device.kind, device.mode, device.device)


def _lay_down(tree: GuestTree, name: str, distribution: Distribution) -> None:
    source = distribution.find_file(name)
    if name == "resolv.conf":
        source = source or existing(Path("/etc/resolv.conf"))
    if source:
        tree.put(f"etc/{name}", source.read_bytes())


def make_own(tree: GuestTree, hostname: str, *, address: str, is_fresh: bool) -> None:
    """Give the tree the guest's name, which it finds at `address`, and an identity that no other
    machine has.

    `is_fresh` says that nobody was there before: it was installed, not copied. Keys of ssh are made
    of the kinds that there were, of all where a server has none. Raises ToolError, OSError.
    """
    tree.put("etc/hostname", f"{hostname}\n".encode())
    _make_name_known(tree, hostname, address)
    _quiet_terminals(tree)
    if is_fresh:
        return
    if tree.has(_MACHINE_ID):  # not emptied: systemd would take the next start for its first
        tree.put(_MACHINE_ID, f"{secrets.token_hex(16)}\n".encode(), mode=0o444)
        if tree.load(_MACHINE_ID_COPY):
            tree.put(_MACHINE_ID_COPY, tree.load(_MACHINE_ID) or b"", mode=0o444)
    _renew_ssh_keys(tree, hostname)


def find_style(tree: GuestTree) -> str | None:
    """The init style that fits the tree; None where there is nothing that could start it.

    Where an init stands in the tree but no rc script, the init has to be started itself.
    """
    has_init = tree.has("sbin/init")
    if has_init and any(tree.has(f"{folder}/systemd/systemd") for folder in ("usr/lib", "lib")):
        return "systemd"
    if any(tree.has(path) for path in _RC):
        return "sysv"
    return "plain" if has_init else None


def find_missing_init(tree: GuestTree, style: str) -> str | None:
    """What a guest of that style runs first and the tree does not have; None where it has it."""
    wanted = {"sysv": _RC, "openrc": ("sbin/openrc", "lib/rc/sh/init-vserver.sh")}
    paths = wanted.get(style, ("sbin/init",))
    return None if any(tree.leads_to_file(path) for path in paths) else f"/{paths[0]}"


def _make_name_known(tree: GuestTree, hostname: str, address: str) -> None:
    """See that the guest can resolve its own name: sudo(8) and mail servers ask for it."""
    text = tree.load("etc/hosts")
    if text is None:
        return  # too large, or no file: left as it is
    rows = [row.partition(b"#")[0].split() for row in text.splitlines()]
    if any(hostname.encode() in row[1:] for row in rows):
        return
    names = dict.fromkeys((hostname, hostname.partition(".")[0]))
    row = f"{address}\t{' '.join(names)}\n".encode()
    end = b"" if text.endswith(b"\n") or not text else b"\n"
    tree.put("etc/hosts", text + end + row)


def _quiet_terminals(tree: GuestTree) -> None:
    """Switch off what waits for terminals in inittab(5): a guest has none."""
    text = tree.load("etc/inittab")
    if text is None:
        return
    quiet = _GETTY.sub(rb"#\1", text)
    if quiet != text:
        tree.put("etc/inittab", quiet)


def _renew_ssh_keys(tree: GuestTree, hostname: str) -> None:
    names = tree.list("etc/ssh")
    kinds = [match[1] for name in names if (match := _SSH_KEY.fullmatch(name))]
    if not kinds and "sshd_config" in names:
        kinds = ["rsa", "ecdsa", "ed25519"]
    if not kinds:
        return
    if not shutil.which("ssh-keygen"):
        log.warning(
            "%s: its ssh host keys are those of the tree that it was made from: "
            "ssh-keygen is not installed, so no new ones were made",
            tree.root,
        )
        return
    with tempfile.TemporaryDirectory(prefix="vserver-keys-") as folder:
        for kind in kinds:
            _renew_ssh_key(tree, Path(folder), kind, hostname)


def _renew_ssh_key(tree: GuestTree, folder: Path, kind: str, hostname: str) -> None:
    name = f"ssh_host_{kind}_key"
    if kind == "dsa":  # OpenSSH makes and takes none any more
        tree.remove(f"etc/ssh/{name}")
        tree.remove(f"etc/ssh/{name}.pub")
        return
    command = ["ssh-keygen", "-q", "-t", kind, "-N", "", "-C", f"root@{hostname}"]
    done = subprocess.run(  # noqa: S603 - kinds are those of the expression above
        [*command, "-f", os.fspath(folder / name)], capture_output=True, check=False
    )
    if done.returncode:
        said = os.fsdecode(done.stderr).strip()
        raise ToolError(f"{tree.root}: no new ssh host key of the kind {kind}: {said}")
    tree.put(f"etc/ssh/{name}", (folder / name).read_bytes(), mode=0o600)
    tree.put(f"etc/ssh/{name}.pub", (folder / f"{name}.pub").read_bytes())
