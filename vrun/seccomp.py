"""The system call filter of a guest: refuses what no guest needs, unless its settings name it.

It stands beside the capabilities, for what they do not stop: root with DAC_READ_SEARCH opens any
inode of a file system by handle, root with SYS_BOOT loads another kernel, a new user namespace
gives every capability back, keys and leases reach over the edge of a guest. libseccomp compiles the
rules (package pyseccomp); a few instructions of our own refuse what is newer than that library. The
filter is loaded by our own call, without no_new_privs: su, sudo and file capabilities work inside.
"""

import errno
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from vrun import libseccomp, syscalls
from vstore.record import dataclass

_LOW_WORD: Final = 0xFFFFFFFF
"""The kernel looks only at the low half of an int argument, so a filter must too."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Calls that fail unless the guest has one of the words `opened_by`."""

    calls: tuple[str, ...]
    error: int
    opened_by: tuple[str, ...] = ()
    """Capabilities as SYS_ADMIN, context capabilities as syslog, words of umask, LINUX32."""
    argument: int | None = None
    """Only calls whose argument of that index, after `bits`, is `value`."""
    bits: int = _LOW_WORD
    value: int = 0


def _namespace_rules() -> Iterator[Rule]:
    """New namespaces. Without SYS_ADMIN the kernel itself only allows the user namespace."""
    kinds = {
        "newns": syscalls.CLONE_NEWNS,
        "newuts": syscalls.CLONE_NEWUTS,
        "newipc": syscalls.CLONE_NEWIPC,
        "newuser": syscalls.CLONE_NEWUSER,
        "newpid": syscalls.CLONE_NEWPID,
        "newnet": syscalls.CLONE_NEWNET,
        "newcgroup": syscalls.CLONE_NEWCGROUP,
    }
    for word, flag in kinds.items():
        openers = ("SYS_ADMIN", word, *(("namespace",) if word == "newns" else ()))
        yield Rule(("clone", "unshare"), errno.EPERM, openers, argument=0, bits=flag, value=flag)
    time = syscalls.CLONE_NEWTIME  # in clone(2) that bit belongs to the exit signal
    yield Rule(("unshare",), errno.EPERM, ("SYS_ADMIN",), argument=0, bits=time, value=time)


_ADMIN: Final = ("SYS_ADMIN",)
_MOUNTS: Final = (*_ADMIN, "secure_mount", "secure_remount", "binary_mount", "dev_mount")
_TIOCSTI: Final = 0x5412  # asm-generic/ioctls.h
_TIOCLINUX: Final = 0x541C
_F_SETLEASE: Final = 1024  # linux/fcntl.h
_F_SETDELEG: Final = 1040  # Linux 6.19
_SYS_SOCKET: Final = 1  # linux/net.h, of socketcall(2)
LINUX32: Final = "linux32"
"""Opens what only 32-bit programs of x86 need; see personality_words()."""
_PER_LINUX32: Final = 8  # linux/personality.h
_PER_MASK: Final = 0xFF

RULES: Final = (
    # another kernel, modules, the machine's ports
    Rule(("kexec_load", "kexec_file_load"), errno.EPERM),
    Rule(("init_module", "finit_module", "delete_module"), errno.EPERM, ("SYS_MODULE",)),
    Rule(("create_module", "query_module", "get_kernel_syms"), errno.ENOSYS),
    Rule(("iopl", "ioperm"), errno.EPERM, ("SYS_RAWIO",)),
    # programs in the kernel, and looking into it
    Rule(("bpf",), errno.EPERM, (*_ADMIN, "BPF")),
    Rule(("perf_event_open",), errno.EPERM, (*_ADMIN, "PERFMON")),
    Rule(("lookup_dcookie",), errno.EPERM, _ADMIN),
    # what others do with a shared inode; before Linux 5.13 it was for SYS_ADMIN alone
    Rule(("fanotify_init",), errno.EPERM, _ADMIN),
    Rule(("syslog",), errno.EPERM, ("SYSLOG", "syslog")),
    # keys belong to user ids, and all guests have the same ones
    Rule(("add_key", "request_key", "keyctl"), errno.ENOSYS),
    # any inode of the file system, below the guest's root or not
    Rule(("open_by_handle_at",), errno.EPERM, _ADMIN),
    # programs fall back where these do not exist; they have been the way out too often
    Rule(("io_uring_setup", "io_uring_enter", "io_uring_register"), errno.ENOSYS),
    Rule(("userfaultfd",), errno.ENOSYS, ("SYS_PTRACE",)),
    Rule(("vm86", "vm86old", "uselib", "nfsservctl"), errno.ENOSYS),
    # namespaces; the flags of clone3 lie in memory, where no filter can read them
    *_namespace_rules(),
    Rule(("clone3",), errno.ENOSYS, _ADMIN),
    Rule(("setns",), errno.EPERM, _ADMIN),
    # mounts
    Rule(("mount", "umount", "umount2", "pivot_root"), errno.EPERM, _MOUNTS),
    Rule(("fsopen", "fsconfig", "fsmount", "fspick"), errno.EPERM, _MOUNTS),
    Rule(("open_tree", "move_mount", "mount_setattr"), errno.EPERM, _MOUNTS),
    Rule(("quotactl", "quotactl_fd"), errno.EPERM, (*_ADMIN, "quota_ctl")),
    Rule(("swapon", "swapoff"), errno.EPERM, _ADMIN),
    # accounting and the one clock
    Rule(("acct",), errno.EPERM, ("SYS_PACCT",)),
    Rule(("settimeofday", "stime"), errno.EPERM, ("SYS_TIME",)),
    Rule(("clock_settime", "clock_settime64"), errno.EPERM, ("SYS_TIME",)),
    # typing into a terminal for its reader; a console's selection does the same
    Rule(("ioctl",), errno.EPERM, ("tiocsti",), argument=1, value=_TIOCSTI),
    Rule(("ioctl",), errno.EPERM, ("tiocsti",), argument=1, value=_TIOCLINUX),
    # a lease on a shared inode holds up every other guest that wants to execute it
    Rule(("fcntl", "fcntl64"), errno.EINVAL, ("LEASE",), argument=1, value=_F_SETLEASE),
    Rule(("fcntl", "fcntl64"), errno.EINVAL, ("LEASE",), argument=1, value=_F_SETDELEG),
    # what kind of socket it is lies in memory, where no filter can read it; see _FAMILIES
    Rule(("socketcall",), errno.EAFNOSUPPORT, (LINUX32,), argument=0, value=_SYS_SOCKET),
)

_FAMILIES: Final[tuple[tuple[int, tuple[str, ...]], ...]] = (
    (1, ()),  # AF_UNIX
    (2, ()),  # AF_INET
    (10, ()),  # AF_INET6
    (17, ()),  # AF_PACKET; the kernel asks for CAP_NET_RAW
    (15, ("NET_ADMIN",)),  # AF_KEY, for IPsec
    (24, ("NET_ADMIN",)),  # AF_PPPOX
)
"""The families of sockets that a guest can make, with the words that open those that not all have;
linux/socket.h. The code of all others, old and rarely used, is loaded by whoever asks for it."""
_AF_NETLINK: Final = 16
_NETLINK: Final = (0, 2, 4, 6, 9, 12, 15, 16)
"""Of linux/netlink.h: ROUTE, USERSOCK, SOCK_DIAG, XFRM, AUDIT, NETFILTER, KOBJECT_UEVENT, GENERIC.
By CONNECTOR a guest on the host's network would hear of every process of the host."""
_NEVER: Final = (38, 40)
"""AF_ALG, the kernel's ciphers, and AF_VSOCK, to the machine's own host: no word opens them."""
_SOCKET_CALLS: Final = {
    "x86_64": ((0xC000003E, (41, 53)), (0x40000003, (359, 360))),
    "aarch64": ((0xC00000B7, (198, 199)), (0x40000028, (281, 288))),
}
"""By machine, for each architecture of linux/audit.h, the numbers of socket and socketpair."""
_NEWEST: Final = 469
"""The number of the newest call looked at here (file_setattr, Linux 6.17). What is newer does not
exist for a guest; from 424 on the numbers are the same on every machine."""
_PRIVATE: Final = 0xF0000
"""32-bit ARM has calls of its own from here on; x32 has its bit above."""
_OPEN_TREE_ATTR: Final = 467
"""A mount call that libseccomp does not know yet (Linux 6.15)."""


def compile_program(
    capabilities: Iterable[str], ccaps: Iterable[str] = (), umask: Iterable[str] = ()
) -> bytes:
    """The filter of a guest that has these words, as struct sock_filter items for this machine.

    32-bit calls of the same family are filtered too; those of other families, x32 among them, do
    not exist. Takes 30 ms: cached_program() is for starts. Raises NotPermitted without libseccomp.
    """
    opened = frozenset((*capabilities, *ccaps, *umask))
    return _prelude(opened) + _compile(_closed(opened))


def personality_words(personality: int | None) -> frozenset[str]:
    """What a guest's personality(2) opens; for one of 32-bit programs, LINUX32."""
    is_32bit = personality is not None and personality & _PER_MASK == _PER_LINUX32
    return frozenset({LINUX32} if is_32bit else ())


def cached_program(
    folder: Path,
    capabilities: Iterable[str],
    ccaps: Iterable[str] = (),
    umask: Iterable[str] = (),
) -> bytes:
    """compile_program(), kept as a file of `folder` (made 0700) that is named by what is closed."""
    words = tuple(capabilities), tuple(ccaps), tuple(umask)
    path = folder / _cache_name(frozenset(word for kind in words for word in kind))
    return libseccomp.kept(path, lambda: compile_program(*words))


def is_cached(
    folder: Path,
    capabilities: Iterable[str],
    ccaps: Iterable[str] = (),
    umask: Iterable[str] = (),
) -> bool:
    """Whether cached_program() finds the program there, and need not load a library to make it."""
    return (folder / _cache_name(frozenset((*capabilities, *ccaps, *umask)))).exists()


def load(program: bytes) -> None:
    """Put this process and all its children under the filter, for good.

    To be done before capabilities are given up and after namespaces were entered and mounts made.
    Raises OSError: EACCES without CAP_SYS_ADMIN.
    """
    syscalls.seccomp_load(program)


def _closed(opened: frozenset[str]) -> tuple[Rule, ...]:
    return tuple(rule for rule in RULES if opened.isdisjoint(rule.opened_by))


# --- what libseccomp does
def _compile(rules: Iterable[Rule]) -> bytes:
    library, program = libseccomp.begin()
    for rule in rules:
        conditions = () if rule.argument is None else (_condition(library, rule),)
        for call in rule.calls:
            program.add_rule(library.ERRNO(rule.error), call, *conditions)
    return libseccomp.export(program)


def _condition(library: Any, rule: Rule) -> Any:
    return library.Arg(rule.argument, library.MASKED_EQ, rule.bits, rule.value)


# --- instructions of our own: linux/filter.h, linux/seccomp.h
_INSTRUCTION: Final = struct.Struct("=HBBI")
_LOAD_NUMBER: Final = _INSTRUCTION.pack(0x20, 0, 0, 0)  # ld [offsetof(struct seccomp_data, nr)]
_LOAD_ARCH: Final = _INSTRUCTION.pack(0x20, 0, 0, 4)
_LOAD_FAMILY: Final = _INSTRUCTION.pack(0x20, 0, 0, 16)  # the low half of args[0]
_LOAD_PROTOCOL: Final = _INSTRUCTION.pack(0x20, 0, 0, 32)  # of args[2]
_RETURN_ERRNO: Final = 0x00050000


def _family_check(opened: frozenset[str]) -> bytes:
    """Lets sockets be made of known families alone; falls through to what follows for all others.

    With SYS_ADMIN of all families but the worst.
    """
    refusal = _return(errno.EAFNOSUPPORT)
    if "SYS_ADMIN" in opened:
        listed = [_INSTRUCTION.pack(0x15, 0, 1, number) + refusal for number in _NEVER]
        check = _LOAD_FAMILY + b"".join(listed)
    else:
        allowed = [number for number, openers in _FAMILIES if not openers or opened & {*openers}]
        netlink = _LOAD_PROTOCOL + _allow_only(_NETLINK) + _return(errno.EPROTONOSUPPORT)
        check = _allow_only(allowed, more=len(netlink) // _INSTRUCTION.size) + refusal
        over = len(check) // _INSTRUCTION.size
        check = _LOAD_FAMILY + _INSTRUCTION.pack(0x15, over, 0, _AF_NETLINK) + check + netlink
    length = len(check) // _INSTRUCTION.size
    code = b""
    for arch, (first, second) in _SOCKET_CALLS.get(os.uname().machine, ()):
        code += _LOAD_ARCH
        code += _INSTRUCTION.pack(0x15, 0, length + 3, arch)  # another one: over all of this
        code += _LOAD_NUMBER
        code += _INSTRUCTION.pack(0x15, 1, 0, first)
        code += _INSTRUCTION.pack(0x15, 0, length, second)
        code += check
    return code


def _allow_only(numbers: Sequence[int], *, more: int = 0) -> bytes:
    """Jumps over a refusal, and `more` after it, where what was loaded is one of the numbers."""
    return b"".join(
        _INSTRUCTION.pack(0x15, len(numbers) - index + more, 0, number)
        for index, number in enumerate(numbers)
    )


def _prelude(opened: frozenset[str]) -> bytes:
    """Refuses calls that libseccomp does not know; falls through to what follows for all others."""
    code = _family_check(opened) + _LOAD_NUMBER
    if opened.isdisjoint(_MOUNTS):
        code += _INSTRUCTION.pack(0x15, 0, 1, _OPEN_TREE_ATTR) + _return(errno.EPERM)  # jeq
    code += _INSTRUCTION.pack(0x25, 0, 2, _NEWEST)  # jgt, else over the next two
    code += _INSTRUCTION.pack(0x35, 1, 0, _PRIVATE)  # jge, then over the next
    return code + _return(errno.ENOSYS)


def _return(number: int) -> bytes:
    return _INSTRUCTION.pack(0x06, 0, 0, _RETURN_ERRNO | number)


# --- the cache
def _cache_name(opened: frozenset[str]) -> str:
    """Changes with the rules, so that a file of another version of this module is never used."""
    closed = zlib.crc32(repr(_closed(opened)).encode())
    own = zlib.crc32(_prelude(opened))
    return f"{os.uname().machine}-{closed:08x}-{own:08x}"
