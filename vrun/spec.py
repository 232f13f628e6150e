"""GuestSpec: all that a start needs to know of a guest, checked and with defaults filled in.

`config.load_spec` makes one from a guest's configuration, and nothing else reads those files. The
records hold what was asked for; whether the machine can do it is found out where it is done. What
no stock kernel can do is not in them: `GuestSpec.warnings` names it.

Everything has a default, the one of a guest whose directory holds nothing but `vdir`:
`GuestSpec(name="web", root=Path("/var/lib/vservers/web"))` is such a guest.
"""

import signal
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Final, Literal

from vrun.wordlist import DEFAULT_CCAPS, DEFAULT_FLAGS, DEFAULT_NCAPS, SECURE_CAPS
from vstore.record import dataclass

Network = Literal["bound", "free", "own", "join", "named"]
"""How a guest reaches the network.

bound  the host's stack, restricted to `GuestSpec.addresses` (the original's chbind); without an
       address only its own loopback is left
free   the host's stack, unrestricted (`noncontext`, or an old-style guest without addresses)
own    a network namespace of its own (`spaces/net`)
join   the network namespace of the running guest `GuestSpec.join_net`
named  the network namespace `GuestSpec.netns_name`, which `ip netns` shows (`netns/`): the guest's
       own as well, made at start and removed at stop unless `GuestSpec.netns_keep`
"""

Style = Literal["sysv", "plain", "systemd", "openrc", "rescue"]

ENVIRONMENT: Final = (("PATH", "/bin:/usr/bin:/sbin:/usr/sbin"),)
"""The whole environment of a guest's init where no file says otherwise."""

MTAB: Final = "/dev/hdv1 / ufs defaults 0 0\n"
"""What a guest's /etc/mtab starts with where no file says otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """One address of a guest: an entry of interfaces/, or an item of an old-style IPROOT."""

    entry: str
    """Its name in the configuration ("0"), for messages."""
    ip: IPv4Address | IPv6Address
    prefix: int
    """Length of the network's prefix; 32 or 128 where nothing says otherwise."""
    device: str | None
    """The device that it is added to at start (in the guest's namespace if it has its own); None:
    it is there already, and nothing is added or removed."""
    label: str | None = None
    """What ifconfig shows, `dev:name`, 15 bytes at most; only with a device and IPv4."""
    broadcast: IPv4Address | None = None
    """None: computed from the prefix."""
    scope: str | None = None
    """A word or number of ip-address(8): global, site, link, host, 0..255."""
    peer: IPv4Address | IPv6Address | None = None
    """The other end of a point-to-point link."""
    gateway: IPv4Address | IPv6Address | None = None
    """The default route by way of this address; only where the guest has its own network."""
    up: bool = True
    """Whether the device is set up after the address was added."""
    vlan: bool = False
    """Whether `device`, `PARENT.ID`, is made at start and removed at stop."""
    tuntap: Literal["tun", "tap"] | None = None
    """Make `device` a persistent tun or tap device at start and remove it at stop."""
    tuntap_uid: int | None = None
    tuntap_gid: int | None = None

    @property
    def is_ipv4(self) -> bool:
        return self.ip.version == 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One network device of a guest with its own network namespace: netns/interfaces/N."""

    entry: str
    kind: Literal["veth", "bridge", "macvlan", "ipvlan"] = "veth"
    """veth: a pair; bridge: a pair whose host end becomes a port of the bridge `host`; macvlan,
    ipvlan: a device on top of the host's device `host`."""
    host: str | None
    """The host's end, bridge or lower device; None (veth only): a name is made up."""
    guest: str
    """The device's name inside; `geth0`, `geth1`, ... for those that no file names."""


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of the guest's fstab; `noauto` and swap lines are left out."""

    source: str
    target: str
    """Where it goes inside the guest, absolute; "/" is the guest's root file system itself."""
    fstype: str
    options: tuple[str, ...]
    """As written; `nodev` is the default unless `dev` is among them (devpts is exempt)."""
    fsck_pass: int
    """Column six: 0 is never checked."""
    remote: bool
    """From fstab.remote: mounted while restricted to the guest's addresses."""
    where: str
    """`file:line`, for messages."""


@dataclass(frozen=True, slots=True)
class Rlimit:
    """A limit of each process of the guest, from ulimits/; see setrlimit(2)."""

    resource: int
    """A number of the `resource` module: resource.RLIMIT_NOFILE."""
    name: str
    """`nofile`, for messages."""
    soft: int | None
    """In the unit of setrlimit(2); None leaves it as it is, lowered to `hard` where above;
    resource.RLIM_INFINITY is no limit."""
    hard: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextLimits:
    """What all processes of the guest together may use; None is no limit."""

    memory_max: int | None = None
    """Bytes; above it the guest's own processes are killed (rlimits/rss.hard)."""
    memory_high: int | None = None
    """Bytes; above it the guest is slowed and its memory reclaimed (rlimits/rss.soft)."""
    memory_low: int | None = None
    """Bytes that are reclaimed from others first (rlimits/rss.min)."""
    pids_max: int | None = None
    """Processes and threads (rlimits/nproc; ulimits/nproc with flag `nproc`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuLimit:
    """The token bucket of sched/ as far as the kernel has an equal."""

    fill_rate: int | None = None
    """With `interval`: the guest may use fill_rate / interval of EACH cpu; None is no limit. Only
    with flag `sched_hard`."""
    interval: int | None = None
    burst_ticks: int | None = None
    """How many ticks of 1 ms it may save up (tokens-max)."""
    weight_nice: int | None = None
    """-20..19, for cpu.weight.nice (priority-bias). Only with flag `sched_prio`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpuset:
    """The processors and memory nodes of the guest: cpuset/."""

    name: str | None
    """A group of the cpuset controller, shared by all guests that name it; None: the guest's."""
    cpus: str | None
    """As in cpuset(7), "0-3,6"; None: all."""
    mems: str | None
    cpu_exclusive: bool = False
    mem_exclusive: bool = False
    create: bool = True
    """Whether the group `name` is made where it is missing."""


@dataclass(frozen=True, slots=True)
class CgroupFile:
    """A control file of the guest's cgroup: a file of cgroup/ with its content."""

    name: str
    """`memory.limit_in_bytes`, `memory.max`: of v1 or v2, as the administrator wrote it."""
    text: str
    where: str
    """The configuration file, for messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupSettings:
    """Where the guest's cgroup is, and what is written into it: cgroup/ or .defaults/cgroup/."""

    name: str | None = None
    """The group's name; .defaults/cgroup/name puts all guests into one. None: one per guest."""
    base: str | None = None
    """Parent below each controller's mount point; None: the tool's own choice."""
    inherit: tuple[str, ...] = ("cpuset.cpus", "cpuset.mems")
    """Files whose content is copied from the parent group first (v1)."""
    files: tuple[CgroupFile, ...] = ()


@dataclass(frozen=True, slots=True)
class DiskLimit:
    """What the guest may store below `directory`: dlimits/N."""

    entry: str
    directory: Path
    space_total: int | None
    """Bytes; None is no limit."""
    inodes_total: int | None
    reserved_percent: int
    where: str = ""
    """The folder that says so."""

    @property
    def amounts(self) -> str:
        """What the limit allows, for a person; empty where it allows everything."""
        space, inodes = self.space_total, self.inodes_total
        parts = [f"{space >> 10} KiB" if space is not None else ""]
        parts.append(f"{inodes} files" if inodes is not None else "")
        return " and ".join(filter(None, parts))


@dataclass(frozen=True, slots=True)
class Device:
    """A device node that the guest may use: apps/vdevmap/N."""

    entry: str
    path: Path
    """Inside the guest: /dev/ttyS0."""
    source: Path
    """The host's node that it is: the same path, or what `remap` and `target` say."""


@dataclass(frozen=True, slots=True)
class Sysctl:
    """A kernel setting made in the guest's namespaces before its init runs: sysctl/N."""

    setting: str
    """Its path below /proc/sys: `kernel/shmmax`. Only what the guest's namespaces have for
    themselves."""
    value: str
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InitSpec:
    """How the guest is started and stopped: apps/init/. Commands are argument vectors."""

    style: Style = "sysv"
    runlevel_start: str | None = None
    """None: the style's default."""
    runlevel_stop: str | None = None
    cmd_start: tuple[str, ...] | None = None
    """Replaces the style's command; None: the style's."""
    cmd_stop: tuple[str, ...] | None = None
    cmd_start_sync: tuple[str, ...] | None = None
    """Waits until the guest is up; only run if `sync` or the option --sync says so."""
    cmd_stop_sync: tuple[str, ...] | None = None
    cmd_prepare: tuple[str, ...] | None = None
    """Runs before the guest; None: the style's (a runlevel record in the guest's utmp)."""
    kill_signals: tuple[tuple[int, int], ...] = ((0, signal.SIGTERM), (5, signal.SIGKILL))
    """What is sent to a guest that does not end: (seconds to wait before, signal) in order."""
    environment: tuple[tuple[str, str], ...] = ENVIRONMENT
    """All of it: nothing of the caller's is handed on."""
    tty: Path | None = None
    """Where output of a start at boot goes; None: /dev/null."""
    sync: bool = False
    marks: tuple[str, ...] = ()
    """The groups that boot scripts start it with."""
    depends: tuple[str, ...] = ()
    """Guests that are started before it and stopped after it."""
    priority: int = 100
    """Old-style guests are started in this order at boot and stopped in the reverse (PRIORITY)."""
    mtab: str = MTAB
    """The content of the guest's /etc/mtab before its mounts."""
    pid_one: bool = False
    """Flag `fakeinit` or a style with a real init: the command is the guest's process 1, detached,
    and is stopped by a signal; else rc scripts run below an init of ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scripts:
    """Where the host's programs for the phases of a start and stop are; see scripts/ in 3.9."""

    folder: Path | None = None
    """The guest's scripts/."""
    fallback: Path | None = None
    """.defaults/scripts, used in phases for which the guest has none."""
    hook: Path | None = None
    """CONFDIR/NAME.sh of an old-style guest, called with (phase, name) in pre-start, post-start,
    pre-stop and post-stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Helper:
    """What is done when the guest reboots, halts or ends by itself: apps/vshelper/."""

    programs: tuple[tuple[str, Path], ...] = ()
    """(event, program): called with (event, xid) in the place of our own answer to it; events are
    restart halt poweroff swsusp restart2 oom startup shutdown netup netdown."""
    action: str = "restart"
    """`restart`: start it again after reboot(2), clean up after halt; `sync`, `async`: only end it;
    else the name of `method`."""
    method: Path | None = None
    """apps/vshelper-methods/ACTION, a program, for an action that is none of ours."""
    disabled: bool = False
    """The guest ends and is not started again."""
    stop_timeout_s: int = 30
    """How long a stop waits for the guest's own shutdown (sync-timeout)."""
    logfile: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestSpec:
    """One guest as it is to be started."""

    name: str
    root: Path
    """Absolute, without symlinks; a directory when it was looked up."""
    config: Path | None = None
    """CONFDIR/NAME, or CONFDIR/NAME.conf of an old-style guest."""
    profile: str | None = None
    """What an old-style file saw as PROFILE."""
    display_name: str = ""
    xid: int | None = None
    """2..49151; None: a free one from 49152 up is taken at start."""
    nid: int | None = None
    """Shown only; None: the xid."""
    tag: int | None = None
    """What the original marked the guest's files with; None: the xid, where that is static."""

    hostname: str | None = None
    """None: the host's, which only an old-style guest can ask for."""
    domainname: str | None = None

    nice: int = 0
    """-20..19, and that is what the guest gets, whatever the caller's level is..."""
    nice_is_relative: bool = False
    """...unless this is set: an old-style S_NICE is added to that of the monitor, which is 0."""
    ionice: tuple[int, int] | None = None
    """(class 0..3, level 0..7) of ioprio_set(2)."""
    personality: int | None = None
    """For personality(2)."""
    shell: tuple[str, ...] | None = None
    """For `enter`; None: the first present of /bin/bash -login, /bin/sh -l, /bin/csh."""
    oom_score_adj: int | None = None
    """-1000..1000 (badness)."""

    capabilities: frozenset[str] = SECURE_CAPS
    """All that the guest may ever have, names of capabilities(7) without CAP_."""
    ccaps: frozenset[str] = DEFAULT_CCAPS
    """Names of 5.2; `set_utsname` and `raw_icmp` are on unless a file says `~name`."""
    flags: frozenset[str] = DEFAULT_FLAGS
    """Names of 5.3 (cflags): virt_uptime, nproc, sched_hard, ..."""
    nflags: frozenset[str] = frozenset()
    """Names of 5.4: single_ip, lback_remap, lback_allow, ..."""
    ncaps: frozenset[str] = DEFAULT_NCAPS
    umask: frozenset[str] = frozenset()
    """Namespaces that the guest may make: newuser, newns, ..."""

    network: Network = "bound"
    join_net: str | None = None
    """The guest whose network namespace it shares."""
    netns_name: str | None = None
    """The file below /run/netns; for `named`."""
    netns_keep: bool = False
    """The named namespace exists already and stays, its links too (netns/shared)."""
    addresses: tuple[Address, ...] = ()
    loopback: IPv4Address | None = None
    """The address that 127.0.0.1 means inside (interfaces/lback); None: chosen by the xid."""
    links: tuple[Link, ...] = ()

    mounts: tuple[Mount, ...] = ()
    devices: tuple[Device, ...] = ()
    rlimits: tuple[Rlimit, ...] = ()
    limits: ContextLimits = ContextLimits()
    cpu: CpuLimit = CpuLimit()
    cpuset: Cpuset | None = None
    cgroup: CgroupSettings = CgroupSettings()
    disk_limits: tuple[DiskLimit, ...] = ()
    sysctls: tuple[Sysctl, ...] = ()

    init: InitSpec = InitSpec()
    scripts: Scripts = Scripts()
    helper: Helper = Helper()
    noisy: bool = False
    """Whether the number and the addresses are shown at start."""
    warnings: tuple[str, ...] = ()
    """One line each: a file and what of it a stock kernel cannot do, or an obsolete key."""

    @property
    def has_own_network(self) -> bool:
        """Whether it runs in another network namespace than the host's."""
        return self.network in ("own", "join", "named")
