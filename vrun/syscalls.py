"""System calls of the runtime that Python does not offer, declared once; those for mounts are in
mountcalls.py, openat2 and renameat2 in vstore.syscalls.

Every function raises OSError with the call's errno, and takes away or adds nothing to what its
manual page says. Numbers from 424 on are the same on every machine; older ones are asked of the C
library by name, or stand below for x86_64 and aarch64.
"""

import ctypes
import errno
import os
from typing import Any, Final

from vstore.syscalls import check, declare, libc

_syscall_function: Any = libc["syscall"]
_syscall_function.restype = ctypes.c_long
_syscall_function.errcheck = check


def call(number: int, *arguments: Any) -> int:
    """syscall(2); numbers are passed as longs, so that no upper half of a register is stale."""
    passed = [ctypes.c_long(item) if isinstance(item, int) else item for item in arguments]
    result: int = _syscall_function(ctypes.c_long(number), *passed)
    return result


# --- namespaces: unshare(2), setns(2)

CLONE_NEWTIME: Final = 0x00000080  # linux/sched.h
CLONE_NEWNS: Final = 0x00020000
CLONE_NEWCGROUP: Final = 0x02000000
CLONE_NEWUTS: Final = 0x04000000
CLONE_NEWIPC: Final = 0x08000000
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWPID: Final = 0x20000000
CLONE_NEWNET: Final = 0x40000000

_unshare = declare("unshare", ctypes.c_int)
_setns = declare("setns", ctypes.c_int, ctypes.c_int)


class _CloneArgs(ctypes.Structure):
    """struct clone_args as of Linux 5.7."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            *("flags", "pidfd", "child_tid", "parent_tid", "exit_signal", "stack", "stack_size"),
            *("tls", "set_tid", "set_tid_size", "cgroup"),
        )
    )


_SYS_CLONE3: Final = 435
_CLONE_INTO_CGROUP: Final = 0x200000000
_SIGCHLD: Final = 17


def fork_into_cgroup(cgroup_fd: int, flags: int = 0) -> int:
    """As fork(2), with the child in the v2 group behind `cgroup_fd` from its first instruction on,
    and in new namespaces of `flags` (CLONE_NEW*).

    Moving a process between groups waits for every cpu, some 15 ms; this does not. A new cgroup
    namespace has the caller's group for its root. The caller has one thread, and nothing that is
    registered for forks is called. clone3(2), Linux 5.7. Raises OSError: ENOSYS, E2BIG or EINVAL on
    older kernels, EBUSY or EOPNOTSUPP where the group can have no processes, ENODEV where it is
    gone.
    """
    all_flags = _CLONE_INTO_CGROUP | flags
    wanted = _CloneArgs(flags=all_flags, exit_signal=_SIGCHLD, cgroup=cgroup_fd)
    return call(_SYS_CLONE3, ctypes.byref(wanted), ctypes.sizeof(wanted))


def unshare(flags: int) -> None:
    """Leave the namespaces of `flags` (CLONE_NEW*) for new ones; see unshare(2).

    CLONE_NEWPID and CLONE_NEWTIME take effect for children only. Needs CAP_SYS_ADMIN.
    """
    _unshare(flags)


def setns(fd: int, flags: int) -> None:
    """Enter the namespaces `flags` of the process behind a pidfd, or the one behind `fd`; setns(2).

    A pidfd takes several flags at once, and either all are entered or none (Linux 5.8). The pid
    namespace is entered by children only. Needs CAP_SYS_ADMIN, and CAP_SYS_CHROOT for CLONE_NEWNS,
    which also moves root and working directory to the root of that namespace.
    """
    _setns(fd, flags)


# --- capabilities: capget(2), linux/capability.h; prctl(2), linux/prctl.h, linux/securebits.h

_CAPABILITY_VERSION_3: Final = 0x20080522
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NAME: Final = 15
_PR_CAPBSET_READ: Final = 23
_PR_CAPBSET_DROP: Final = 24
_PR_GET_SECUREBITS: Final = 27
_PR_SET_SECUREBITS: Final = 28
_PR_SET_CHILD_SUBREAPER: Final = 36
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4


class _CapHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapData(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


_capget = declare("capget", ctypes.POINTER(_CapHeader), ctypes.POINTER(_CapData))
_capset = declare("capset", ctypes.POINTER(_CapHeader), ctypes.POINTER(_CapData))
_prctl = declare(
    "prctl", ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong
)


def capget() -> tuple[int, int, int]:
    """(effective, permitted, inheritable) of this thread, one bit per capability; capget(2)."""
    data = (_CapData * 2)()
    _capget(_CapHeader(_CAPABILITY_VERSION_3, 0), data)
    low, high = data
    return (
        high.effective << 32 | low.effective,
        high.permitted << 32 | low.permitted,
        high.inheritable << 32 | low.inheritable,
    )


def capset(*, effective: int, permitted: int, inheritable: int) -> None:
    """Set this thread's capability sets; EPERM for a bit of `permitted` that it lacks. capset(2)"""
    data = (_CapData * 2)()
    for shift, half in zip((0, 32), data, strict=True):
        half.effective = effective >> shift & 0xFFFFFFFF
        half.permitted = permitted >> shift & 0xFFFFFFFF
        half.inheritable = inheritable >> shift & 0xFFFFFFFF
    _capset(_CapHeader(_CAPABILITY_VERSION_3, 0), data)


def bounding_read(capability: int) -> bool:
    """Whether the bounding set has the capability; EINVAL for a number the kernel does not know."""
    return bool(_prctl(_PR_CAPBSET_READ, capability, 0, 0, 0))


def bounding_drop(capability: int) -> None:
    """Take a capability out of the bounding set for good; needs CAP_SETPCAP."""
    _prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)


def get_securebits() -> int:
    """The securebits flags of this thread; capabilities(7)."""
    bits: int = _prctl(_PR_GET_SECUREBITS, 0, 0, 0, 0)
    return bits


def set_securebits(bits: int) -> None:
    """Set the securebits flags; needs CAP_SETPCAP, EPERM for a locked one. capabilities(7)"""
    _prctl(_PR_SET_SECUREBITS, bits, 0, 0, 0)


def clear_ambient() -> None:
    """Empty the ambient capability set of this thread."""
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)


# --- this process: prctl(2), personality(2), ioprio_set(2), close_range(2), keyctl(2)

_NUMBERS: Final = {  # asm/unistd_64.h, asm-generic/unistd.h
    "x86_64": {"bpf": 321, "ioprio_set": 251, "keyctl": 250, "seccomp": 317, "set_mempolicy": 238},
    "aarch64": {"bpf": 280, "ioprio_set": 30, "keyctl": 219, "seccomp": 277, "set_mempolicy": 237},
}
_MACHINE: Final = _NUMBERS.get(os.uname().machine, {})
_SYS_CLOSE_RANGE: Final = 436
_CLOSE_RANGE_CLOEXEC: Final = 4
_KEYCTL_JOIN_SESSION_KEYRING: Final = 1
IOPRIO_WHO_PROCESS: Final = 1
IOPRIO_CLASS_SHIFT: Final = 13

_personality = declare("personality", ctypes.c_ulong)
_sethostname = declare("sethostname", ctypes.c_char_p, ctypes.c_size_t)
_setdomainname = declare("setdomainname", ctypes.c_char_p, ctypes.c_size_t)


def _number(name: str) -> int:
    """The number of a call older than 424; ENOSYS on a machine that is not listed."""
    try:
        return _MACHINE[name]
    except KeyError as error:
        raise OSError(errno.ENOSYS, f"{name}: no number known for {os.uname().machine}") from error


_reboot = declare("reboot", ctypes.c_int)

RB_AUTOBOOT: Final = 0x01234567  # sys/reboot.h
RB_POWER_OFF: Final = 0x4321FEDC


def reboot(command: int) -> None:
    """End this pid namespace with all in it, at once; of the first one, the machine: reboot(2)."""
    _reboot(command)


def set_child_subreaper() -> None:
    """Make this process the parent of all its descendants' orphans; prctl(2)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def set_parent_death_signal(number: int) -> None:
    """Have the kernel send this process `number` when the thread that forked it ends; prctl(2).

    Cleared by fork and by an exec that gains rights. The parent may be gone already: compare
    os.getppid() afterwards.
    """
    _prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def refuse_core_dumps() -> None:
    """Keep this process from leaving a core file, until its next exec; prctl(2), PR_SET_DUMPABLE.

    Its folder in /proc belongs to root until then.
    """
    _prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def set_name(name: bytes) -> None:
    """Set the thread's name as ps shows it; the kernel keeps 15 bytes."""
    text = ctypes.create_string_buffer(name)
    _prctl(_PR_SET_NAME, ctypes.addressof(text), 0, 0, 0)


def personality(persona: int) -> None:
    """Set the execution domain, PER_ and its flags, of this process and its children to come."""
    _personality(persona)


def ioprio_set(which: int, who: int, ioprio: int) -> None:
    """Set the I/O class and level: class << IOPRIO_CLASS_SHIFT | level. See ioprio_set(2)."""
    call(_number("ioprio_set"), which, who, ioprio)


def reset_memory_policy() -> None:
    """Take memory from the nodes that are nearest; set_mempolicy(2) with MPOL_DEFAULT, which is 0.

    Raises OSError: ENOSYS where the kernel knows no nodes.
    """
    call(_number("set_mempolicy"), 0, 0, 0)


def sethostname(name: bytes) -> None:
    """Set the host name of this uts namespace; at most 64 bytes. Needs CAP_SYS_ADMIN."""
    _sethostname(name, len(name))


def setdomainname(name: bytes) -> None:
    """Set the NIS domain name of this uts namespace; at most 64 bytes. Needs CAP_SYS_ADMIN."""
    _setdomainname(name, len(name))


def close_range_on_exec(first: int) -> None:
    """Mark every descriptor from `first` up close-on-exec, whoever opened it (Linux 5.11)."""
    call(_SYS_CLOSE_RANGE, first, 0xFFFFFFFF, _CLOSE_RANGE_CLOEXEC)


def join_session_keyring() -> None:
    """Leave the session keyring for a new, empty one; keyctl(2). ENOSYS where there are no keys."""
    call(_number("keyctl"), _KEYCTL_JOIN_SESSION_KEYRING, 0, 0, 0, 0)


# --- pipes: tee(2)

_SPLICE_F_NONBLOCK: Final = 2  # fcntl.h

_tee = declare("tee", ctypes.c_int, ctypes.c_int, ctypes.c_size_t, ctypes.c_uint)


def tee(source_fd: int, target_fd: int, count: int) -> int:
    """Copy up to `count` bytes from one pipe to another and leave them in the first.

    Gives how many; 0 where the first is empty and nobody can write to it. Raises OSError: EAGAIN
    where it is empty or the other full, EPIPE where nobody can read the other. See tee(2).
    """
    copied: int = _tee(source_fd, target_fd, count, _SPLICE_F_NONBLOCK)
    return copied


# --- quotactl_fd(2)

_SYS_QUOTACTL_FD: Final = 443  # the same on every machine; Linux 5.14


def quotactl_fd(fd: int, command: int, kind: int, number: int, content: bytes) -> bytes:
    """A quota command on the file system of `fd`; `content` as the kernel has left it.

    Raises OSError: ENOSYS without quota in the kernel, ESRCH where it is not on. See quotactl(2).
    """
    memory = ctypes.create_string_buffer(content, len(content))
    call(_SYS_QUOTACTL_FD, fd, command << 8 | kind, number, memory)
    return memory.raw


# --- seccomp(2)

SECCOMP_FILTER_FLAG_LOG: Final = 1 << 1
SECCOMP_FILTER_FLAG_NEW_LISTENER: Final = 1 << 3
SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV: Final = 1 << 5
_SECCOMP_SET_MODE_FILTER: Final = 1
_BPF_INSTRUCTION_SIZE: Final = 8


class _SockFprog(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def seccomp_load(program: bytes, flags: int = 0) -> int:
    """Add a filter to this thread, from struct sock_filter items; 0, or the listener's descriptor.

    Does not set no_new_privs, so it needs CAP_SYS_ADMIN (EACCES without). A filter stays over exec
    and cannot be taken off. EINVAL for a program that the kernel refuses. See seccomp(2).
    """
    wanted = _SockFprog(len(program) // _BPF_INSTRUCTION_SIZE, program)
    number = _number("seccomp")
    return call(number, _SECCOMP_SET_MODE_FILTER, flags, ctypes.byref(wanted))


# --- bpf(2)


class Buffer:
    """Bytes that stay where they are, for structures that hold their address."""

    def __init__(self, content: bytes) -> None:
        self._memory = ctypes.create_string_buffer(content, len(content))
        self.address = ctypes.addressof(self._memory)

    @property
    def text(self) -> bytes:
        """What is there now, up to the first NUL."""
        return self._memory.value


def bpf(command: int, attributes: bytes) -> int:
    """Carry out a BPF_ command with the union bpf_attr in `attributes`; see bpf(2), bpfcalls.py."""
    memory = ctypes.create_string_buffer(attributes, len(attributes))
    return call(_number("bpf"), command, memory, len(attributes))
