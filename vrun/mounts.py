"""The root of a guest: its tree, /proc, /sys, /dev and the rest, and nothing of the host.

Everything below the guest's root is reached by openat2(2) with RESOLVE_IN_ROOT and mounted through
descriptors: whatever symlinks the tree holds, and whoever swaps them meanwhile, all stays inside.
"""

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final, Literal

from vrun import devices, kernelfs, mountcalls, mountfd, namespaces, volumes
from vrun.devices import Console
from vrun.errors import ToolError
from vrun.spec import Device, Mount, Sysctl
from vstore.record import dataclass

_OURS: Final = frozenset(
    {
        ("/proc", "proc"),
        ("/sys", "sysfs"),
        ("/sys/fs/cgroup", "cgroup"),
        ("/sys/fs/cgroup", "cgroup2"),
        ("/sys/fs/cgroup", "tmpfs"),
        ("/dev", "devtmpfs"),
        ("/dev", "tmpfs"),
        ("/dev/pts", "devpts"),
        ("/dev/shm", "tmpfs"),  # noqa: S108 # inside the guest
        ("/dev/mqueue", "mqueue"),
    }
)
"""Lines of an fstab that ask for what each guest has: they only give their options."""

_OF_NAMESPACES: Final = frozenset({"proc", "sysfs", "mqueue", "cgroup", "cgroup2"})
"""File systems that show who mounts them: not mounted before the guest's namespaces are there."""

_DATA_ONLY: Final = mountcalls.MOUNT_ATTR_NOSUID | mountcalls.MOUNT_ATTR_NODEV
_RUN_WORDS: Final = ("mode=0755", "size=20%", "nr_inodes=800000")
_LOCK_WORDS: Final = ("mode=1777", "size=5m", "nr_inodes=4096")
_TMP_WORDS: Final = ("mode=1777", "size=50%", "nr_inodes=1m")  # tmp.mount of systemd

_TMP_UNIT: Final = "system/local-fs.target.wants/tmp.mount"
_TMP_WANTED: Final = (f"/usr/lib/systemd/{_TMP_UNIT}", f"/etc/systemd/{_TMP_UNIT}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RootOptions:
    """What the root of one guest is to be like."""

    root: Path
    """Absolute and without symlinks, on the host; "." where the working directory is the root."""
    nodev: bool = True
    """Device nodes in the guest's tree do not work (those of its own /dev do), unless the line of
    its fstab says `dev`."""
    owns_network: bool = False
    """It may write /proc/sys/net: the network namespace is its own."""
    sets_hostname: bool = False
    """It may write /proc/sys/kernel/hostname and domainname (ccapability set_utsname)."""
    cgroup: Literal["none", "ro", "rw"] = "ro"
    """Its own part of the v2 hierarchy on /sys/fs/cgroup; systemd needs rw."""
    run_tmpfs: bool = False
    """An empty /run in memory unless `mounts` has one, and /tmp where the guest's systemd would
    mount it: systemd needs the first and may not do the second itself."""
    tun: bool = False
    """/dev/net/tun (ncapability tun_create)."""
    console: bool = False
    """A terminal on /dev/console, whose other end enter_root() returns."""
    figures: tuple[Path, ...] = ()
    """Files of the host that stand in /proc for the kernel's of the same names: lxcfs's."""
    devices: tuple[Device, ...] = ()
    sysctls: tuple[Sysctl, ...] = ()
    mounts: tuple[Mount, ...] = ()
    """All lines of the fstab: enter_root() takes what mount_fstab() cannot do."""

    @property
    def makes_run(self) -> bool:
        return self.run_tmpfs and all(volumes.target_of(line) != "/run" for line in self.mounts)


def warnings(options: RootOptions) -> tuple[str, ...]:
    """What of `options` enter_root() leaves out, a line each, for the administrator."""
    foreign = (
        f"{setting.where}: {setting.setting} is the whole machine's, not the guest's; not set"
        for setting in options.sysctls
        if not kernelfs.is_own(setting, owns_network=options.owns_network)
    )
    outside = (
        f"device {device.path} of the guest: not below its /dev; not made"
        for device in options.devices
        if not devices.is_in_dev(device)
    )
    return (*foreign, *outside)


def mount_fstab(root: Path, mounts: Iterable[Mount], *, run_tmpfs: bool = False) -> None:
    """Mount the lines of the fstab that the host can mount, below `root`, in this mount namespace.

    Called by the monitor, in a mount namespace of its own, before the scripts of pre-start. A line
    for "/" mounts on `root` itself, and the lines after it below that. Leaves out what enter_root()
    mounts, which must get the same lines and `run_tmpfs`. Raises ToolError naming the line; what
    was mounted before it stays until the namespace goes.
    """
    options = RootOptions(root=root, mounts=tuple(mounts), run_tmpfs=run_tmpfs)
    for line in options.mounts:
        if not _is_ours(line) and not _is_late(line, options):
            with _folder(root) as root_fd:
                volumes.mount_line(root_fd, line)


def enter_root(options: RootOptions) -> Console | None:
    """Build the guest's root and make it the root of this process; the host's mounts are gone.

    Called by the first process of the new namespaces (mnt, pid, ipc, cgroup, uts; all of them the
    guest's own) while it has every capability. Leaves the working directory at "/". Raises
    ToolError or OSError with what was to be mounted where; the process is of no use then.
    """
    umask = os.umask(0)
    try:
        namespaces.receive_only()
        with ExitStack() as stack:
            blank = kernelfs.Blank()
            stack.callback(os.close, blank.mount_fd)
            tree_fd = _mount_tree(options.root, blank)
            stack.callback(os.close, tree_fd)
            _restrict_tree(tree_fd, options)
            console = _mount_kernel(tree_fd, blank, options)
            _mount_late(tree_fd, options)
            _pivot(tree_fd)
        return console
    finally:
        os.umask(umask)


@contextmanager
def _folder(path: Path) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise ToolError(
            f"{path}: cannot be a guest's root: {error.strerror}",
            hint="it must be a directory, and no symlink",
        ) from error
    try:
        yield fd
    finally:
        os.close(fd)


def _mount_tree(root: Path, blank: kernelfs.Blank) -> int:
    """Mount a copy of the guest's tree, with all that is mounted in it, where nobody else looks.

    That is a folder of our own small file system, which lies on the guest's root itself: it goes
    away with the host's mounts.
    """
    with _folder(root) as root_fd:
        tree_fd = mountfd.copy(root_fd, recursive=True)
        os.mkdir("root", 0o700, dir_fd=blank.mount_fd)
        mountcalls.move_mount(blank.mount_fd, root_fd)
        mountfd.attach(tree_fd, blank.mount_fd, "root")
        return tree_fd


def _restrict_tree(tree_fd: int, options: RootOptions) -> None:
    """No mounts to or from the host any more; no device nodes but where the fstab allows them.

    su and file capabilities work inside, up to the guest's ceiling, also where the host has its
    guests on a file system that is mounted nosuid; only the guest's own fstab can take them away.
    """
    mountcalls.mount_setattr(tree_fd, propagation=mountcalls.MS_PRIVATE, recursive=True)
    is_nosuid = any(
        volumes.target_of(line) == "/" and "nosuid" in line.options for line in options.mounts
    )
    if not is_nosuid:
        mountcalls.mount_setattr(tree_fd, attr_clr=mountcalls.MOUNT_ATTR_NOSUID)
    if not options.nodev:
        return
    nodev = mountcalls.MOUNT_ATTR_NODEV
    mountcalls.mount_setattr(tree_fd, attr_set=nodev, recursive=True)
    for line in options.mounts:
        if "dev" in line.options and not _is_ours(line) and not _is_late(line, options):
            with mountfd.doing(line.source, line.target):
                volume_fd = mountfd.open_inside(tree_fd, volumes.target_of(line))
                try:
                    mountcalls.mount_setattr(volume_fd, attr_clr=nodev)
                finally:
                    os.close(volume_fd)


def _mount_kernel(tree_fd: int, blank: kernelfs.Blank, options: RootOptions) -> Console | None:
    """What every guest has: /proc, /sys, /dev, and /run where its init needs one."""
    proc = kernelfs.ProcOptions(
        words=_words_of("/proc", options),
        owns_network=options.owns_network,
        sets_hostname=options.sets_hostname,
        sysctls=options.sysctls,
        figures=options.figures,
    )
    kernelfs.mount_proc(tree_fd, blank, proc)
    kernelfs.mount_sys(tree_fd, blank, options.cgroup)
    dev = devices.DevOptions(
        devices=options.devices,
        tun=options.tun,
        console=options.console,
        pts_words=_words_of("/dev/pts", options),
        shm_words=_words_of("/dev/shm", options),  # noqa: S108 # inside the guest
    )
    console = devices.mount_dev(tree_fd, dev)
    if options.makes_run:
        _mount_run(tree_fd)
    has_tmp = any(volumes.target_of(line) == "/tmp" for line in options.mounts)  # noqa: S108
    if options.run_tmpfs and not has_tmp and _wants_tmp(tree_fd):
        _mount_tmp(tree_fd)
    return console


def _wants_tmp(tree_fd: int) -> bool:
    """Whether the guest's systemd has /tmp in memory: by default since Debian 13, unless masked."""
    with suppress(OSError):
        folder_fd = mountfd.open_inside(tree_fd, "/etc/systemd/system")
        try:
            if os.readlink("tmp.mount", dir_fd=folder_fd) == os.devnull:
                return False
        finally:
            os.close(folder_fd)
    for path in _TMP_WANTED:
        with suppress(OSError):
            os.close(mountfd.open_inside(tree_fd, path))
            return True
    return False


def _mount_tmp(tree_fd: int) -> None:
    with mountfd.doing("tmpfs", "/tmp"):  # noqa: S108
        tmp_fd = mountfd.make("tmpfs", options=_TMP_WORDS, attributes=_DATA_ONLY)
        try:
            mountfd.make_folder(tree_fd, "tmp", 0o1777)
            mountfd.attach(tmp_fd, tree_fd, "/tmp")  # noqa: S108
        finally:
            os.close(tmp_fd)


def _mount_run(tree_fd: int) -> None:
    with mountfd.doing("tmpfs", "/run"):
        run_fd = mountfd.make("tmpfs", options=_RUN_WORDS, attributes=_DATA_ONLY)
        try:
            mountfd.make_folder(tree_fd, "run")
            mountfd.attach(run_fd, tree_fd, "/run")
            _mount_lock(run_fd, _DATA_ONLY | mountcalls.MOUNT_ATTR_NOEXEC)
        finally:
            os.close(run_fd)


def _mount_lock(run_fd: int, attributes: int) -> None:
    """Debian's systemd does not start without it, and is not allowed to mount it."""
    lock_fd = mountfd.make("tmpfs", options=_LOCK_WORDS, attributes=attributes)
    try:
        mountfd.make_folder(run_fd, "lock")
        mountfd.attach(lock_fd, run_fd, "lock")
    finally:
        os.close(lock_fd)


def _mount_late(tree_fd: int, options: RootOptions) -> None:
    for line in options.mounts:
        if not _is_ours(line) and _is_late(line, options):
            if line.fstype in ("proc", "sysfs"):
                _repeat(tree_fd, line)
            else:
                if volumes.target_of(line).startswith("/dev/"):
                    _make_in_dev(tree_fd, line)
                volumes.mount_line(tree_fd, line)


def _make_in_dev(tree_fd: int, line: Mount) -> None:
    """Make the line's target: our own /dev is new, and has nothing that was in the tree's.

    A file where one is to be bound to it. There is nothing of the guest's in /dev yet.
    """
    target = volumes.target_of(line)
    is_file = "bind" in line.options and volumes.kind_of(line.source) != stat.S_IFDIR
    with mountfd.doing(line.source, target), ExitStack() as stack:
        folder_fd = mountfd.open_inside(tree_fd, "/dev", follow=False)
        stack.callback(os.close, folder_fd)
        *folders, name = target.removeprefix("/dev/").split("/")
        for folder in (*folders, *(() if is_file else (name,))):
            mountfd.make_folder(folder_fd, folder)
            folder_fd = mountfd.open_inside(folder_fd, folder, follow=False)
            stack.callback(os.close, folder_fd)
        if is_file:
            with suppress(FileExistsError):
                os.mknod(name, 0o600, dir_fd=folder_fd)


def _repeat(tree_fd: int, line: Mount) -> None:
    """A second /proc or /sys, as covered and write-protected as the first."""
    with mountfd.doing(line.fstype, line.target):
        first = "/proc" if line.fstype == "proc" else "/sys"
        first_fd = mountfd.open_inside(tree_fd, first)
        try:
            copy_fd = mountfd.copy(first_fd, recursive=True)
        finally:
            os.close(first_fd)
        try:
            mountfd.attach(copy_fd, tree_fd, volumes.target_of(line))
        finally:
            os.close(copy_fd)


def _pivot(tree_fd: int) -> None:
    """Make the guest's tree the root of this namespace, and take the host's away; pivot_root(2)."""
    os.fchdir(tree_fd)
    mountcalls.pivot_root(b".", b".")
    mountcalls.umount2(b".", mountcalls.MNT_DETACH)
    os.chdir("/")


def is_made_at_start(line: Mount) -> bool:
    """Whether the line can only be mounted by the guest's first process, or asks for what it has
    anyway.
    """
    return _is_ours(line) or line.fstype in _OF_NAMESPACES


def _is_ours(line: Mount) -> bool:
    return (volumes.target_of(line), line.fstype) in _OURS


def _is_late(line: Mount, options: RootOptions) -> bool:
    """Whether the line can only be mounted inside: in what enter_root() mounts, or by its user."""
    folders = ("/dev/", "/proc/", "/sys/", *(("/run/",) if options.makes_run else ()))
    return line.fstype in _OF_NAMESPACES or volumes.target_of(line).startswith(folders)


def _words_of(target: str, options: RootOptions) -> tuple[str, ...]:
    """The file system's options of the line that asks for one of ours."""
    for line in options.mounts:
        if _is_ours(line) and volumes.target_of(line) == target:
            return volumes.parse_words(line).for_filesystem
    return ()
