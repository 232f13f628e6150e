"""From a guest's configuration to its GuestSpec.

    CONFDIR/
    ├── .defaults/     what counts where a guest has no file of its own
    ├── web/           a guest: one file per key, read here and in the config_* modules
    └── mail.conf      an old-style guest, read in legacy.py

Every key is read at each start. What cannot be meant is a ConfigInvalid that names file and line;
what is meant but cannot be had on a stock kernel, and what is obsolete, is a warning of the spec.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from vrun.config_init import load_helper, load_init, load_scripts
from vrun.config_limits import load_context_limits, load_disk_limits, load_rlimits
from vrun.config_network import load_network
from vrun.config_process import (
    load_domain_name,
    load_host_name,
    load_ionice,
    load_oom_score,
    load_personality,
    load_shell,
)
from vrun.config_sharing import load_cgroup, load_cpu, load_cpuset
from vrun.errors import ConfigInvalid, WrongUsage
from vrun.fstab import load_mounts
from vrun.keys import Keys, Line, key_names
from vrun.spec import Device, GuestSpec, Network, Sysctl
from vrun.words import load_words
from vrun.xids import XIDS
from vstore.guest import Guest, confdir, rundir

_MOST_TAG: Final = 65534

_OWN_SYSCTLS: Final = (
    r"kernel/(shmmax|shmall|shmmni|shm_rmid_forced|msgmax|msgmnb|msgmni|auto_msgmni|sem"
    r"|msg_next_id|sem_next_id|shm_next_id|hostname|domainname)|fs/mqueue/[a-z_]+"
)
"""The settings that an ipc or uts namespace has for itself."""
_NETWORK_SYSCTLS: Final = r"net(/[A-Za-z0-9_@:-][A-Za-z0-9_.@:-]*)+"

_KEYS: Final = key_names(
    "apps badness bcapabilities cache capabilities ccapabilities cflags cgroup context cpuset "
    "disabled dlimits domainname flags fstab fstab.local fstab.remote hostname interfaces ionice "
    "keepfds legacy name namespace namespace-cleanup namespace-cleanup-skip ncapabilities ncontext "
    "netns nflags nice nocgroup noisy nonamespace nonamespace-cleanup noncontext nonetns "
    "personality rlimits run run.rev sched schedule scripts shell spaces sysctl tag ulimits umask "
    "uts vdir"
)
_APPS: Final = key_names("fence init pkgmgmt vdevmap vlogin vshelper vshelper-methods vunify")

_CLEANUP: Final = "nothing of the host is mounted in a guest; name what it needs in fstab"
_IMPOSSIBLE: Final = {
    "capabilities": "is of kernel 2.4 and not read; use bcapabilities",
    "keepfds": "the guest gets no descriptors of the host",
    "nonamespace-cleanup": _CLEANUP,
    "namespace-cleanup-skip": _CLEANUP,
    "nonamespace": "a guest always has a mount namespace of its own",
    "tag": "files have no tags on this kernel",
}
_FOR_ALL_GUESTS: Final = frozenset(_IMPOSSIBLE) - {"capabilities", "tag"}
"""Those that .defaults can have too."""


def load_spec(guest: Guest, *, profile: str | None = None) -> GuestSpec:
    """What the configuration of `guest` says; `profile` is PROFILE for an old-style file.

    An old-style file is run by a shell, as root. Raises ConfigInvalid with file, line and key for
    what cannot be meant, WrongUsage for a tree that is no configured guest.
    """
    if guest.config is None:
        raise WrongUsage(
            f"{guest.name} is a tree and no configured guest",
            hint=f"guests are configured in {confdir()}",
        )
    if guest.config.name == f"{guest.name}.conf":
        from vrun import legacy  # it needs subprocess, which takes longer than all the rest

        return legacy.load_legacy(guest.name, guest.root, guest.config, profile=profile)
    return _load_directory(guest.name, guest.root, guest.config)


def _load_directory(name: str, root: Path, config: Path) -> GuestSpec:
    warnings: list[str] = []
    keys, defaults = Keys(config, warnings), Keys(confdir() / ".defaults", warnings)
    network = load_network(keys, defaults, name=name)
    words = load_words(keys, network.network)
    rlimits, processes = load_rlimits(keys, is_per_context="nproc" in words.flags)
    xid = keys.number("context", least=XIDS[0], most=XIDS[-1])
    _warn_impossible(keys, defaults, name)
    keys.warn_misspelt(_KEYS)
    (keys / "apps").warn_misspelt(_APPS)
    return GuestSpec(
        name=name,
        root=root,
        config=config,
        display_name=keys.value("name") or name,
        xid=xid,
        nid=keys.number("ncontext", least=XIDS[0], most=_MOST_TAG),
        tag=keys.number("tag", least=0, most=_MOST_TAG),
        hostname=load_host_name(keys) or name,
        domainname=load_domain_name(keys),
        nice=keys.number("nice", least=-20, most=19) or 0,
        ionice=load_ionice(keys),
        personality=load_personality(keys),
        shell=load_shell(keys, defaults),
        oom_score_adj=load_oom_score(keys),
        capabilities=words.capabilities,
        ccaps=words.ccaps,
        flags=words.flags,
        nflags=words.nflags,
        ncaps=words.ncaps,
        umask=words.umask,
        network=network.network,
        join_net=network.join_net,
        netns_name=network.netns_name,
        netns_keep=network.netns_keep,
        addresses=network.addresses,
        loopback=network.loopback,
        links=network.links,
        mounts=load_mounts(keys),
        devices=tuple(_devices(keys / "apps" / "vdevmap")),
        rlimits=rlimits,
        limits=load_context_limits(keys, processes=processes),
        cpu=load_cpu(keys, words.flags),
        cpuset=load_cpuset(keys),
        cgroup=load_cgroup(keys, defaults),
        disk_limits=load_disk_limits(keys, is_static=xid is not None),
        sysctls=tuple(_sysctls(keys / "sysctl", network.network)),
        init=load_init(keys, defaults, is_fake_init=words.is_fake_init),
        scripts=load_scripts(keys, defaults),
        helper=load_helper(keys, defaults),
        noisy=keys.has("noisy"),
        warnings=tuple(dict.fromkeys(warnings)),  # the last: the others add to it
    )


def _warn_impossible(guest: Keys, defaults: Keys, name: str) -> None:
    for key, reason in _IMPOSSIBLE.items():
        if guest.has(key):
            guest.warn(key, reason)
        elif key in _FOR_ALL_GUESTS and not guest.has(key.removeprefix("no")) and defaults.has(key):
            defaults.warn(key, reason)
    login = defaults / "apps" / "vlogin"
    if login.has("disable"):
        login.warn("disable", "`enter` always has a terminal of its own")
    if (shown := guest.value("name")) not in (None, name):
        guest.warn("name", f"{shown}: the guest is called {name}, as its folder")
    network_id = guest.value("ncontext")
    if network_id and network_id != guest.value("context"):
        guest.warn("ncontext", "the network has no number of its own; the guest's is shown")
    packages = guest / "apps" / "pkgmgmt"
    if packages.exists and not packages.has("internal"):
        guest.warn(
            "apps/pkgmgmt", "packages are managed inside the guest; nothing is taken from it"
        )
    run = guest.path / "run"
    if run.exists() and not run.is_symlink():
        guest.warn("run", f"is no symlink and not used; the run state is in {rundir() / name}")


def _sysctls(folder: Keys, network: Network) -> Iterator[Sysctl]:
    """The settings that the guest's namespaces have for themselves; others are warned of.

    Set from a guest, those others would change the host.
    """
    for entry in folder.entries():
        keys = folder / entry
        setting, value = keys.scalar("setting"), keys.scalar("value")
        if setting is None or value is None:
            missing = "setting" if setting is None else "value"
            raise ConfigInvalid(f"{keys.path / missing}: is missing or empty")
        path = _sysctl_path(setting.text)
        has_stack = network in ("own", "named")
        if re.fullmatch(_OWN_SYSCTLS, path) or (has_stack and re.fullmatch(_NETWORK_SYSCTLS, path)):
            yield Sysctl(path, value.text, setting.where)
        else:
            keys.warn("setting", f"{path}: a guest has no value of its own; it is not set")


def _sysctl_path(name: str) -> str:
    """The path below /proc/sys; the first separator of `name` tells which of the two it uses."""
    dot, slash = name.find("."), name.find("/")
    is_dotted = dot >= 0 and (slash < 0 or dot < slash)
    return name.translate(str.maketrans("./", "/.")) if is_dotted else name


def _devices(folder: Keys) -> Iterator[Device]:
    """The nodes that apps/vdevmap lets the guest open."""
    for entry in folder.entries():
        keys = folder / entry
        device = keys.scalar("device")
        if device is None:
            raise ConfigInvalid(f"{keys.path / 'device'}: is missing or empty")
        if keys.has("create"):
            keys.warn("create", "nodes are made at start; mknod inside needs bcapabilities MKNOD")
        if keys.has("flags"):
            keys.warn("flags", "have no meaning here")
        path = _device_path(device)
        if not keys.has("open"):
            keys.warn("open", "is missing, so the guest does not get the device")
            continue
        yield Device(entry, path, _device_source(keys, path))


def _device_source(keys: Keys, path: Path) -> Path:
    if not keys.has("remap"):
        return path
    target = keys.scalar("target")
    if target is None:
        raise ConfigInvalid(f"{keys.path / 'target'}: is missing, and `remap` needs it")
    return _device_path(target)


def _device_path(line: Line) -> Path:
    if not line.text.startswith("/dev/") or ".." in line.text.split("/"):
        raise ConfigInvalid(f"{line.where}: {line.text!r} is no path below /dev")
    return Path(os.path.normpath(line.text))
