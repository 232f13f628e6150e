"""Lists of words: capabilities, context flags, network flags, namespaces.

A list is written as the original reads it: words in any case, a comma or blank between two of one
line, `~` or `!` in front of one that is taken away, a prefix (CAP_, VXF_, ...) or none, `^N` for
bit N, a number for a mask of bits, `all` and `any` for every word and `none` for no word (it takes
nothing away). Words apply from left to right to
what a guest has by default. The names and bits are those of capability.h (linux) and of the
original's context.h and network.h.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Final

from vrun.errors import ConfigInvalid
from vrun.keys import Line
from vstore.record import dataclass, field

_SEPARATOR: Final = r"[,\s]+"
_BIT: Final = r"\^(0[xX][0-9a-fA-F]+|[0-9]+)"
_NUMBER: Final = r"0[xX][0-9a-fA-F]+|[0-9]+"
_EVERYTHING: Final = frozenset({"all", "any"})


@dataclass(frozen=True, slots=True)
class Table:
    """The words of one kind of list."""

    kind: str
    """What one word is, for messages: "capability"."""
    bits: Mapping[str, int]
    """Word to the number of its bit."""
    prefixes: tuple[str, ...] = ()
    """What may stand in front of a word, in lower case."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other spellings of a word."""
    groups: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Words that stand for several."""


@dataclass(frozen=True, slots=True)
class Words:
    """What a list comes to."""

    words: frozenset[str]
    named: tuple[tuple[str, str], ...]
    """Each word that a file adds and nothing takes away again, with that file and line."""


def read_words(table: Table, lines: Iterable[Line], default: frozenset[str] = frozenset()) -> Words:
    """Apply the words of `lines` to `default`.

    Raises ConfigInvalid with file and line for a word that is none of the table's.
    """
    words = set(default)
    named: dict[str, str] = {}
    for line in lines:
        for item in filter(None, re.split(_SEPARATOR, line.text)):
            is_added, meant = _meant(table, item, line.where)
            if is_added:
                words |= meant
                named.update(dict.fromkeys(meant, line.where))
            else:
                words -= meant
                for word in meant:
                    named.pop(word, None)
    return Words(frozenset(words), tuple(sorted(named.items())))


def _meant(table: Table, item: str, where: str) -> tuple[bool, frozenset[str]]:
    """Whether `item` adds or takes away, and what."""
    word = item.lstrip("~!")
    is_added = (len(item) - len(word)) % 2 == 0
    return is_added, _words_of(table, word, where)


def _words_of(table: Table, word: str, where: str) -> frozenset[str]:
    if match := re.fullmatch(_BIT, word):
        bit = _number(match[1])
        return _of_mask(table, 1 << bit if 0 <= bit < 64 else -1, word, where)
    if re.fullmatch(_NUMBER, word):
        return _of_mask(table, _number(word), word, where)
    plain = _without_prefix(table, word.lower())
    if plain in _EVERYTHING:
        return frozenset(table.bits)
    if plain == "none":
        return frozenset()
    if plain in table.groups:
        return table.groups[plain]
    plain = table.aliases.get(plain, plain)
    if plain not in table.bits:
        raise ConfigInvalid(
            f"{where}: {word!r} is no {table.kind}", hint=f"known are {' '.join(table.bits)}"
        )
    return frozenset({plain})


def _number(text: str) -> int:
    """A number as C writes it: 0x1f, 017, 31; -1 for what looks octal and is not."""
    is_octal = text.startswith("0") and text.isdigit() and len(text) > 1
    try:
        return int(text, 8 if is_octal else 0)
    except ValueError:
        return -1


def _of_mask(table: Table, mask: int, word: str, where: str) -> frozenset[str]:
    """The words whose bits are set; bits without a word never meant anything."""
    found = frozenset(name for name, bit in table.bits.items() if mask >> bit & 1)
    if mask < 0 or (mask and not found):
        raise ConfigInvalid(f"{where}: {word!r} has no bit that is a {table.kind}")
    return found


def _without_prefix(table: Table, word: str) -> str:
    for prefix in table.prefixes:
        if word.startswith(prefix):
            return word.removeprefix(prefix)
    return word


def _numbered(words: str) -> dict[str, int]:
    return {word: bit for bit, word in enumerate(words.split())}


CAPABILITIES: Final = Table(
    "capability",
    _numbered(
        "chown dac_override dac_read_search fowner fsetid kill setgid setuid setpcap "
        "linux_immutable net_bind_service net_broadcast net_admin net_raw ipc_lock ipc_owner "
        "sys_module sys_rawio sys_chroot sys_ptrace sys_pacct sys_admin sys_boot sys_nice "
        "sys_resource sys_time sys_tty_config mknod lease audit_write audit_control setfcap "
        "mac_override mac_admin syslog wake_alarm block_suspend audit_read perfmon bpf "
        "checkpoint_restore"
    ),
    ("cap_",),
)

CCAPS: Final = Table(
    "context capability",
    {
        "set_utsname": 0,
        "set_rlimit": 1,
        "fs_security": 2,
        "fs_trusted": 3,
        "tiocsti": 4,
        "raw_icmp": 8,
        "syslog": 12,
        "oom_adjust": 13,
        "audit_control": 14,
        "secure_mount": 16,
        "secure_remount": 17,
        "binary_mount": 18,
        "dev_mount": 19,
        "quota_ctl": 20,
        "admin_mapper": 21,
        "admin_cloop": 22,
        "kthread": 24,
        "namespace": 25,
    },
    ("vxc_",),
    {
        "utsname": "set_utsname",
        "rlimit": "set_rlimit",
        "icmp": "raw_icmp",
        "ping": "raw_icmp",
        "mount": "secure_mount",
        "remount": "secure_remount",
    },
)

_FLAG_ALIASES: Final = {
    "info_lock": "lock",
    "info_nproc": "nproc",
    "info_private": "private",
    "info_init": "fakeinit",
    "info_hideinfo": "hideinfo",
    "info_ulimit": "ulimit",
    "info_namespace": "namespace",
    "info_nspace": "namespace",
}

CFLAGS: Final = Table(
    "context flag",
    {
        "lock": 0,
        "sched": 1,
        "nproc": 2,
        "private": 3,
        "fakeinit": 4,
        "hideinfo": 5,
        "ulimit": 6,
        "namespace": 7,
        "sched_hard": 8,
        "sched_prio": 9,
        "sched_pause": 10,
        "virt_mem": 16,
        "virt_uptime": 17,
        "virt_cpu": 18,
        "virt_load": 19,
        "virt_time": 20,
        "hide_mount": 24,
        "hide_netif": 25,
        "hide_vinfo": 26,
        "state_setup": 32,
        "state_init": 33,
        "state_admin": 34,
        "sc_helper": 36,
        "reboot_kill": 37,
        "persistent": 38,
        "fork_rss": 48,
        "prolific": 49,
        "igneg_nice": 52,
        "igneg_ionice": 53,
    },
    ("vxf_",),
    _FLAG_ALIASES,
    {
        "secure": frozenset({"hide_netif"}),
        "default": frozenset({"virt_uptime", "sc_helper"}),
    },
)

NFLAGS: Final = Table(
    "network flag",
    {
        "lock": 0,
        "private": 3,
        "single_ip": 8,
        "lback_remap": 9,
        "lback_allow": 10,
        "hide_netif": 25,
        "hide_lback": 26,
        "state_setup": 32,
        "state_admin": 34,
        "sc_helper": 36,
        "persistent": 38,
    },
    ("nxf_",),
    {"info_lock": "lock", "info_private": "private", "remap_lback": "lback_remap"},
)

NCAPS: Final = Table("network capability", {"tun_create": 0, "raw_icmp": 8}, ("nxc_",))

SPACES: Final = Table(
    "namespace",
    {
        "fs": 9,
        "newns": 17,
        "newuts": 26,
        "newipc": 27,
        "newuser": 28,
        "newpid": 29,
        "newnet": 30,
    },
    ("clone_",),
)
"""The bits are those of clone(2)."""

SECURE_CAPS: Final = frozenset(
    {
        "CHOWN",
        "DAC_OVERRIDE",
        "DAC_READ_SEARCH",
        "FOWNER",
        "FSETID",
        "KILL",
        "SETGID",
        "SETUID",
        "NET_BIND_SERVICE",
        "SYS_CHROOT",
        "SYS_TTY_CONFIG",
        "SETFCAP",
        "AUDIT_WRITE",
        "SYS_BOOT",
    }
)
"""What each guest may have: the original's secure set without SYS_PTRACE (a guest's root could
seize a process that joins it) and LEASE (it could hold up other guests at a shared inode)."""

DEFAULT_CCAPS: Final[frozenset[str]] = frozenset({"set_utsname", "raw_icmp"})
DEFAULT_FLAGS: Final[frozenset[str]] = frozenset({"hide_netif", "sc_helper", "virt_uptime"})
DEFAULT_NCAPS: Final[frozenset[str]] = frozenset({"raw_icmp"})
