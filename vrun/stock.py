"""What the words of a guest's configuration come to on a stock kernel, where that is not the same.

Each table gives for a word the reason that a person reads at start. A word that stands in none of
them does here what it did on the original's kernel.
"""

from typing import Final

from vrun import lxcfs
from vrun.spec import Network
from vrun.wordlist import Words

CFLAGS: Final = {
    "sched": "is a flag of kernel 2.4 and does nothing; use sched_hard",
    "private": "exec and enter are refused; root of the host has other ways into the guest",
    "ulimit": "the limits of ulimits/ hold for each process; for the whole guest use rlimits/",
    "sched_prio": "of the bucket only its priority-bias counts: it sets the guest's cpu weight",
    "sched_pause": "the guest is not started frozen",
    "virt_time": "the guest has the host's clock",
    "hide_netif": "the guest sees the host's network devices; spaces/net hides them",
    "persistent": "the guest ends with its last process",
    "fork_rss": "fork is not refused above the memory limit; processes are killed at rlimits/rss",
    "prolific": "the guest cannot make contexts",
    "igneg_nice": "a negative nice level is refused",
    "igneg_ionice": "an io priority above the guest's own is refused",
}

_OTHER_STACKS: Final = frozenset({"own", "join", "named"})
"""Networks that do not show the host's devices."""

CCAPS: Final = {
    "set_utsname": "sethostname(2) is refused inside; writing /proc/sys/kernel/hostname works",
    "set_rlimit": "limits cannot be raised inside; bcapabilities SYS_RESOURCE would allow it",
    "fs_security": "of the security.* attributes only file capabilities can be set inside",
    "fs_trusted": "trusted.* attributes need bcapabilities SYS_ADMIN",
    "syslog": "there is no kernel log of the guest's own; bcapabilities SYSLOG opens the host's",
    "oom_adjust": "an oom score cannot be lowered inside; badness sets it at start",
    "audit_control": "the audit system has no part for the guest alone",
    "secure_mount": "mounting inside needs bcapabilities SYS_ADMIN; fstab mounts at start",
    "secure_remount": "remounting inside needs bcapabilities SYS_ADMIN",
    "binary_mount": "mounting inside needs bcapabilities SYS_ADMIN; use fstab.remote",
    "dev_mount": "mounting block devices inside needs bcapabilities SYS_ADMIN; use fstab",
    "quota_ctl": "disk quota is set on the host; use dlimits/",
    "admin_mapper": "the device mapper has no part for the guest alone",
    "admin_cloop": "there are no cloop devices",
    "kthread": "there are no kernel threads of the guest's own",
    "namespace": "a mount namespace inside needs bcapabilities SYS_ADMIN",
}

_MOUNT_CCAPS: Final = frozenset(
    {
        "fs_security",
        "fs_trusted",
        "secure_mount",
        "secure_remount",
        "binary_mount",
        "dev_mount",
        "namespace",
        "set_utsname",
    }
)
"""What bcapabilities SYS_ADMIN allows too."""

NFLAGS: Final = {
    "private": "root of the host can still enter the guest's network",
    "hide_netif": "the guest sees the host's network devices; spaces/net hides them",
    "hide_lback": "the guest sees the host's loopback device; spaces/net gives it its own",
    "persistent": "the network restriction ends with the guest's last process",
}

NCAPS: Final = {
    "tun_create": "making tun devices inside needs spaces/net and bcapabilities NET_ADMIN",
}

SPACES: Final = {
    name: "needs newuser beside it, or bcapabilities SYS_ADMIN"
    for name in ("newns", "newuts", "newipc", "newpid", "newnet")
}

CAPABILITIES: Final = {
    "SYS_PTRACE": "no part of the default here: the guest's root can seize a process that joins it",
    "LEASE": "no part of the default here: the guest can hold up others that share a file with it",
    "LINUX_IMMUTABLE": "the guest's root can change files that it shares with other guests",
    "SYS_ADMIN": "the guest's root can leave the guest",
    "SYS_MODULE": "the guest's root can leave the guest by loading modules into the host's kernel",
    "SYS_RAWIO": "the guest's root can leave the guest through the memory and ports of the machine",
    "MKNOD": "the guest's root can reach disks of the host through nodes that it makes",
    "SYSLOG": "the guest's root can read and clear the host's kernel log",
    "WAKE_ALARM": "the guest's root can wake the machine",
    "BLOCK_SUSPEND": "the guest's root can keep the machine awake",
    "AUDIT_READ": "the guest's root can read the host's audit log",
    "PERFMON": "the guest's root can watch all that the machine does",
    "BPF": "the guest's root can load programs into the host's kernel",
    "CHECKPOINT_RESTORE": "the guest's root can choose process ids and read memory maps",
}
"""Words that are honoured, but that nobody should have without knowing what they give away."""


def cflags(words: Words, network: Network) -> list[str]:
    """The warnings for context flags that files name."""
    has_lxcfs = lxcfs.folder().is_dir()
    found = []
    for word, where in words.named:
        if word == "hide_netif" and network in _OTHER_STACKS:
            continue
        if word in CFLAGS:
            found.append(_line(where, word, CFLAGS[word]))
        elif word in lxcfs.FILES and not has_lxcfs:
            reason = f"needs lxcfs, which does not run ({lxcfs.folder()} is missing)"
            found.append(_line(where, word, reason))
    return found


def ccaps(words: Words, capabilities: frozenset[str]) -> list[str]:
    """The warnings for context capabilities that files name, with the system's ones beside them."""
    met = _MOUNT_CCAPS if "SYS_ADMIN" in capabilities else frozenset()
    if "SYS_RESOURCE" in capabilities:
        met |= {"set_rlimit", "oom_adjust"}
    return [
        _line(where, word, CCAPS[word])
        for word, where in words.named
        if word in CCAPS and word not in met
    ]


def nflags(words: Words, network: Network) -> list[str]:
    """The warnings for network flags that files name."""
    met = {"hide_netif", "hide_lback"} if network in _OTHER_STACKS else set()
    return [
        _line(where, word, NFLAGS[word])
        for word, where in words.named
        if word in NFLAGS and word not in met
    ]


def ncaps(words: Words, network: Network, capabilities: frozenset[str]) -> list[str]:
    """The warnings for network capabilities that files name."""
    is_met = network in _OTHER_STACKS and "NET_ADMIN" in capabilities
    return [
        _line(where, word, NCAPS[word])
        for word, where in words.named
        if word in NCAPS and not is_met
    ]


def spaces(words: Words, capabilities: frozenset[str]) -> list[str]:
    """The warnings for namespaces that the guest may make according to its umask file."""
    if "newuser" in words.words or "SYS_ADMIN" in capabilities:
        return []
    return [_line(where, word, SPACES[word]) for word, where in words.named if word in SPACES]


def capabilities(words: Words) -> list[str]:
    """The warnings for capabilities that files add and that give more away than they seem to."""
    return [
        _line(where, word.upper(), CAPABILITIES[word.upper()])
        for word, where in words.named
        if word.upper() in CAPABILITIES
    ]


def _line(where: str, word: str, reason: str) -> str:
    return f"{where}: {word}: {reason}"
