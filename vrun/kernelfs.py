"""The kernel's own file systems as a guest sees them: /proc, /sys and its part of the cgroups.

A guest's root is user id 0, so whatever may be written with that id alone must be read-only, and
whatever tells of the machine or of other guests is covered. Of /proc the entries that are known to
be harmless stay; all others, of kernels to come too, are covered by an empty file or folder.
"""

import os
import re
import stat
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final, Literal

from vrun import mountcalls, mountfd
from vrun.errors import ToolError
from vrun.spec import Sysctl
from vstore.record import dataclass
from vstore.syscalls import RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, RESOLVE_NO_XDEV, openat2

_HARMLESS: Final = frozenset(
    (
        *("buddyinfo", "cgroups", "consoles", "cpuinfo", "crypto"),
        *("devices", "diskstats", "execdomains", "filesystems", "kmsg", "loadavg", "mdstat"),
        *("meminfo", "misc", "modules", "mounts", "net", "partitions", "self", "softirqs", "stat"),
        *("swaps", "sysvipc", "thread-self", "tty", "uptime", "version", "vmstat", "zoneinfo"),
    )
)
"""Entries of /proc that stay as they are. kmsg asks for CAP_SYSLOG when it is opened."""

_READ_ONLY: Final = frozenset({"driver", "pressure", "sys"})
"""Entries of /proc that can be read, and could be written by user id 0."""

_COVERED_IN_SYS: Final = (
    *("firmware", "devices/virtual/dmi", "kernel/boot_params", "kernel/notes", "kernel/vmcoreinfo"),
    *("kernel/irq", "devices/virtual/powercap"),
)
"""Tables of the machine, its serial number and where its kernel lies; meters of interrupts and of
energy, fine enough to guess what others type and their keys from."""

_UTS: Final = ("sys/kernel/hostname", "sys/kernel/domainname")
_NET: Final = "sys/net"

_OF_A_NAMESPACE: Final = (
    r"kernel/(auto_msgmni|domainname|hostname|msg[a-z_]+|sem|sem_next_id|shm[a-z_]+)|fs/mqueue/.+"
)
"""Settings that each guest has for itself: those of its ipc and uts namespaces."""


class Blank:
    """An empty file and an empty folder to cover things with, in a small file system of their own.

    It must be mounted somewhere in this namespace while it is used; what it covered stays covered
    after it is gone.
    """

    def __init__(self) -> None:
        words = ("mode=0700", "size=0")  # no limit, and so no line in df(1)
        self.mount_fd = mountfd.make("tmpfs", options=words, attributes=mountfd.QUIET)
        os.mkdir("folder", 0o555, dir_fd=self.mount_fd)
        os.close(os.open("file", os.O_CREAT | os.O_CLOEXEC, 0o444, dir_fd=self.mount_fd))

    def cover(self, target_fd: int) -> None:
        """Cover the file or folder behind `target_fd`. Raises OSError."""
        name = "folder" if stat.S_ISDIR(os.fstat(target_fd).st_mode) else "file"
        copy_fd = mountfd.copy(self.mount_fd, name)
        try:
            mountcalls.mount_setattr(copy_fd, attr_set=mountcalls.MOUNT_ATTR_RDONLY)
            mountcalls.move_mount(copy_fd, target_fd)
        finally:
            os.close(copy_fd)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcOptions:
    """What of /proc a guest may change, and what is set in it before."""

    words: tuple[str, ...] = ()
    """Options of the file system: hidepid=2."""
    owns_network: bool = False
    sets_hostname: bool = False
    sysctls: tuple[Sysctl, ...] = ()
    figures: tuple[Path, ...] = ()
    """Files of the host that are mounted over those of the same names."""


def is_own(setting: Sysctl, *, owns_network: bool) -> bool:
    """Whether the setting is the guest's own; else it is the whole machine's, and is not made."""
    path = _path_of(setting)
    return bool(re.fullmatch(_OF_A_NAMESPACE, path)) or (owns_network and path.startswith("net/"))


def mount_proc(root_fd: int, blank: Blank, options: ProcOptions) -> None:
    """Mount /proc of this process's pid namespace, and cover what a guest has no business with.

    Makes the settings of `options` that are the guest's own. Raises ToolError.
    """
    with mountfd.doing("proc", "/proc"), ExitStack() as stack:
        proc_fd = mountfd.make("proc", options=options.words, attributes=mountfd.QUIET)
        stack.callback(os.close, proc_fd)
        mountfd.make_folder(root_fd, "proc", 0o555)
        mountfd.attach(proc_fd, root_fd, "/proc", follow=False)
        for setting in options.sysctls:
            if is_own(setting, owns_network=options.owns_network):
                _set(proc_fd, setting)
        writable = _writable(proc_fd, options)
        for _, fd in writable:
            stack.callback(os.close, fd)
        _restrict(proc_fd, blank)
        for name, fd in writable:
            _attach_below(proc_fd, name, fd)
    for path in options.figures:
        with mountfd.doing(f"{path}", f"/proc/{path.name}"):
            _mount_figure(root_fd, path)


def _mount_figure(root_fd: int, path: Path) -> None:
    folder_fd = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        copy_fd = mountfd.copy(folder_fd, path.name)
    finally:
        os.close(folder_fd)
    try:
        quiet = mountfd.QUIET | mountcalls.MOUNT_ATTR_RDONLY
        mountcalls.mount_setattr(copy_fd, attr_set=quiet)
        mountfd.attach(copy_fd, root_fd, f"/proc/{path.name}", follow=False)
    finally:
        os.close(copy_fd)


def mount_sys(root_fd: int, blank: Blank, cgroup: Literal["none", "ro", "rw"]) -> None:
    """Mount /sys, read-only, and this process's part of the v2 cgroups on /sys/fs/cgroup.

    Raises ToolError.
    """
    read_only = mountfd.QUIET | mountcalls.MOUNT_ATTR_RDONLY
    with mountfd.doing("sysfs", "/sys"):
        sys_fd = mountfd.make("sysfs", attributes=read_only)
        try:
            mountfd.make_folder(root_fd, "sys", 0o555)
            mountfd.attach(sys_fd, root_fd, "/sys", follow=False)
            for name in _COVERED_IN_SYS:
                with suppress(FileNotFoundError):
                    _cover(sys_fd, name, blank)
            if cgroup != "none":
                attributes = mountfd.QUIET if cgroup == "rw" else read_only
                _mount_cgroup(sys_fd, attributes)
        finally:
            os.close(sys_fd)


def _mount_cgroup(sys_fd: int, attributes: int) -> None:
    with mountfd.doing("cgroup2", "/sys/fs/cgroup"):
        cgroup_fd = mountfd.make("cgroup2", attributes=attributes)
        try:
            _attach_below(sys_fd, "fs/cgroup", cgroup_fd)
        finally:
            os.close(cgroup_fd)


def _open_below(mount_fd: int, name: str, flags: int = os.O_PATH, *, resolve: int = 0) -> int:
    """Open what the kernel itself has at `name` below the root of one of its file systems."""
    wanted = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | resolve
    return openat2(mount_fd, os.fsencode(name), flags=flags, resolve=wanted)


def _attach_below(mount_fd: int, name: str, new_fd: int) -> None:
    target_fd = _open_below(mount_fd, name)
    try:
        mountcalls.move_mount(new_fd, target_fd)
    finally:
        os.close(target_fd)


def _cover(mount_fd: int, name: str, blank: Blank) -> None:
    target_fd = _open_below(mount_fd, name, resolve=RESOLVE_NO_XDEV)
    try:
        blank.cover(target_fd)
    finally:
        os.close(target_fd)


def _restrict(proc_fd: int, blank: Blank) -> None:
    """Cover or write-protect every entry of /proc that is not a process or harmless."""
    for name in _entries(proc_fd):
        if name in _READ_ONLY:
            copy_fd = mountfd.copy(proc_fd, name)
            try:
                mountcalls.mount_setattr(copy_fd, attr_set=mountcalls.MOUNT_ATTR_RDONLY)
                _attach_below(proc_fd, name, copy_fd)
            finally:
                os.close(copy_fd)
        else:
            _cover(proc_fd, name, blank)


def _entries(proc_fd: int) -> Iterable[str]:
    """The names in /proc that need something done; a symlink leads to another one of them."""
    folder_fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=proc_fd)
    try:
        with os.scandir(folder_fd) as entries:
            names = [entry.name for entry in entries if not entry.is_symlink()]
    finally:
        os.close(folder_fd)
    return [name for name in names if not name.isdecimal() and name not in _HARMLESS]


def _writable(proc_fd: int, options: ProcOptions) -> list[tuple[str, int]]:
    """Mounts of the parts of /proc/sys that stay writable, made before it is not any more."""
    names = (*(_UTS if options.sets_hostname else ()), *((_NET,) if options.owns_network else ()))
    return [(name, mountfd.copy(proc_fd, name)) for name in names]


def _path_of(setting: Sysctl) -> str:
    """`kernel.shmmax` or `kernel/shmmax` as a path below /proc/sys; see sysctl(8).

    Whichever of the two comes first separates; the other is part of a name (net.ipv4.conf.eth0/1).
    """
    text = setting.setting
    first = re.search(r"[./]", text)
    if first and first[0] == ".":
        text = text.translate(str.maketrans("./", "/."))
    return text


def _set(proc_fd: int, setting: Sysctl) -> None:
    path = _path_of(setting)
    try:
        fd = _open_below(proc_fd, f"sys/{path}", os.O_WRONLY, resolve=RESOLVE_NO_XDEV)
        with open(fd, "wb", buffering=0) as file:  # noqa: PTH123 # a descriptor
            file.write(os.fsencode(setting.value) + b"\n")
    except OSError as error:
        raise ToolError(
            f"{setting.where}: cannot set {setting.setting} to {setting.value!r}: {error.strerror}",
            hint="see sysctl(8) for what the setting takes",
        ) from error
