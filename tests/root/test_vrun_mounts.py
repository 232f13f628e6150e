"""The root of a guest, looked at from inside it and from the host."""

import errno
import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import pytest

from tests.fixtures.inside import ALL, FailedInside, in_child, resident
from tests.fixtures.mountinfo import Line, at, mounts_of, parse
from vrun import capabilities, mountcalls, mountfd, mounts
from vrun.mounts import RootOptions
from vrun.spec import Mount, Sysctl

Result = TypeVar("Result")

_KERNEL_ONLY = {"nosuid", "nodev", "noexec"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An empty guest: enter_root() makes the folders that it needs itself."""
    tree = tmp_path / "guest"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc" / "hostname").write_text("inside\n")
    return tree


def _inside(options: RootOptions, look: Callable[[], Result]) -> Result:
    """What `look` gives in the guest's root."""

    def enter() -> Result:
        mounts.enter_root(options)
        return look()

    kinds = (*ALL, "net") if options.owns_network else ALL
    return in_child(enter, kinds=kinds)


def _mounts(options: RootOptions) -> list[Line]:
    """The guest's mounts, as the host sees them."""
    with resident(lambda: bool(mounts.enter_root(options)), kinds=ALL) as (pid, _):
        return mounts_of(pid)


def _error_of(action: Callable[[], object]) -> int:
    try:
        action()
    except OSError as error:
        return error.errno or -1
    return 0


def _write(path: str, text: str = "0") -> int:
    """The errno of writing to `path`."""

    def write() -> None:
        fd = os.open(path, os.O_WRONLY)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)

    return _error_of(write)


# --- nothing of the host


def test_nothing_of_the_host_is_left_mounted(root: Path) -> None:
    lines = _mounts(RootOptions(root=root, run_tmpfs=True, console=True))
    assert lines[0].target == "/"
    assert lines[0].root.endswith("/guest")
    assert {line.fstype for line in lines[1:]} == {
        *("proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup2"),
    }


def test_the_tree_is_the_root_and_nothing_is_above(root: Path) -> None:
    def look() -> tuple[list[str], str, bool]:
        os.chdir("../../../..")
        return sorted(os.listdir(".")), os.getcwd(), os.path.samefile("/", "/..")  # noqa: PTH109, PTH121, PTH208

    names, folder, is_top = _inside(RootOptions(root=root), look)
    assert names == ["dev", "etc", "proc", "sys"]
    assert (folder, is_top) == ("/", True)


def test_chroot_twice_does_not_lead_out(root: Path) -> None:
    """The classic way out of chroot(2): a root below one's working directory."""

    def escape() -> list[str]:
        os.mkdir("/jail")  # noqa: PTH102
        os.chroot("/jail")
        for _ in range(64):
            os.chdir("..")
        os.chroot(".")
        return os.listdir("/")  # noqa: PTH208

    assert set(_inside(RootOptions(root=root), escape)) == {"dev", "etc", "jail", "proc", "sys"}


def test_no_descriptor_of_the_host_is_left(root: Path) -> None:
    def look() -> list[str]:
        links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]  # noqa: PTH208
        found = []
        for link in links:
            with suppress(FileNotFoundError):
                found.append(os.fspath(link.readlink()))
        return found

    before = in_child(look)
    inside = _inside(RootOptions(root=root), look)
    assert len(inside) <= len(before) + 1, "one pipe more, of the fixture"
    assert not [path for path in inside if "guest" in path and path not in before]


def test_nothing_of_it_is_seen_on_the_host(root: Path) -> None:
    """Of a host whose mounts are shared, as systemd has them, and on which nobody else mounts."""

    def look() -> tuple[list[Line], list[Line]]:
        for propagation in (mountcalls.MS_PRIVATE, mountcalls.MS_SHARED):
            mountcalls.set_propagation(b"/", propagation | mountcalls.MS_REC)
        before = mounts_of("self")
        with resident(lambda: bool(mounts.enter_root(RootOptions(root=root))), kinds=ALL):
            return before, mounts_of("self")

    before, after = in_child(look, kinds=("mnt",))
    assert after == before


def test_its_mounts_neither_send_nor_receive(root: Path) -> None:
    with resident(lambda: bool(mounts.enter_root(RootOptions(root=root))), kinds=ALL) as (pid, _):
        text = Path(f"/proc/{pid}/mountinfo").read_text()
    assert "shared:" not in text
    assert "master:" not in text


def test_the_file_creation_mask_is_put_back(root: Path) -> None:
    def look() -> int:
        os.umask(0o027)
        mounts.enter_root(RootOptions(root=root))
        return os.umask(0)

    assert in_child(look, kinds=ALL) == 0o027


# --- the tree


def test_nosuid_is_never_set_on_the_tree_and_nodev_is(root: Path) -> None:
    line = at(_mounts(RootOptions(root=root)), "/")
    assert "nosuid" not in line.options
    assert "noexec" not in line.options
    assert "nodev" in line.options


def test_setuid_works_inside_though_the_host_has_its_guests_on_a_nosuid_mount(
    tmp_path: Path,
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    options = RootOptions(root=base / "guest")

    def enter() -> list[Line]:
        mounts.mount_fstab(
            Path("/"), (Mount("vs", os.fspath(base), "tmpfs", ("nosuid",), 0, False, "fstab:1"),)
        )
        options.root.mkdir()
        mounts.enter_root(options)
        return parse(Path("/proc/self/mountinfo").read_text())

    line = at(in_child(enter, kinds=ALL), "/")
    assert line.source == "vs"
    assert line.options & {"nosuid", "nodev"} == {"nodev"}


def test_a_device_node_in_the_tree_does_not_work(root: Path) -> None:
    os.mknod(root / "disk", stat.S_IFCHR | 0o666, os.makedev(1, 5))

    def look() -> int:
        return _error_of(lambda: os.close(os.open("/disk", os.O_RDONLY)))

    assert _inside(RootOptions(root=root), look) == errno.EACCES
    assert _inside(RootOptions(root=root, nodev=False), look) == 0


def test_what_is_mounted_in_the_tree_comes_along(root: Path) -> None:
    (root / "srv").mkdir()

    def enter() -> list[str]:
        fd = mountfd.make("tmpfs", source="volume")
        target_fd = os.open(root / "srv", os.O_PATH)
        mountcalls.move_mount(fd, target_fd)
        os.close(fd)
        os.close(target_fd)
        mounts.enter_root(RootOptions(root=root))
        return [line.source for line in parse(Path("/proc/self/mountinfo").read_text())]

    assert "volume" in in_child(enter, kinds=ALL)


@pytest.mark.parametrize("kind", ["missing", "file", "symlink"])
def test_a_root_that_is_no_folder_is_refused(root: Path, kind: str) -> None:
    path = root.with_name(kind)
    if kind == "file":
        path.touch()
    elif kind == "symlink":
        path.symlink_to(root)
    with pytest.raises(FailedInside, match=f"{kind}: cannot be a guest's root: "):
        _inside(RootOptions(root=path), lambda: None)


# --- /proc


def test_proc_is_the_guests_own(root: Path) -> None:
    def look() -> tuple[list[str], str]:
        numbers = [name for name in os.listdir("/proc") if name.isdecimal()]  # noqa: PTH208
        return numbers, os.fspath(Path("/proc/self").readlink())

    assert _inside(RootOptions(root=root), look) == (["1"], "1")
    assert at(_mounts(RootOptions(root=root)), "/proc").options >= _KERNEL_ONLY


_DANGEROUS = (
    *("kcore", "keys", "key-users", "kallsyms", "sysrq-trigger", "timer_list", "iomem", "ioports"),
    *("slabinfo", "vmallocinfo", "pagetypeinfo", "kpagecount", "kpageflags", "kpagecgroup", "mtrr"),
    *("interrupts", "locks", "sched_debug", "latency_stats", "acpi", "asound", "bus", "fs", "irq"),
    *("scsi", "dynamic_debug", "profile", "cmdline", "config.gz"),
)


def test_dangerous_entries_of_proc_are_empty_and_cannot_be_written(root: Path) -> None:
    present = [name for name in _DANGEROUS if Path("/proc", name).exists()]
    assert len(present) > 10

    def look() -> dict[str, tuple[bytes, int]]:
        found = {}
        for name in present:
            path = f"/proc/{name}"
            if stat.S_ISDIR(os.stat(path).st_mode):  # noqa: PTH116
                content = "".join(os.listdir(path)).encode()  # noqa: PTH208
                denied = _error_of(lambda path=path: os.mkdir(f"{path}/x"))  # type: ignore[misc] # noqa: PTH102
            else:
                content, denied = Path(path).read_bytes(), _write(path)
            found[name] = content, denied
        return found

    found = _inside(RootOptions(root=root), look)
    assert found == dict.fromkeys(present, (b"", errno.EROFS))


def test_entries_of_proc_that_are_not_known_are_covered(root: Path) -> None:
    """Whatever the kernel has, each entry is harmless, read-only or empty."""
    known = {
        *("buddyinfo", "cgroups", "consoles", "cpuinfo", "crypto"),
        *("devices", "diskstats", "execdomains", "filesystems", "kmsg", "loadavg", "mdstat"),
        *("meminfo", "misc", "modules", "mounts", "net", "partitions", "self", "softirqs", "stat"),
        *("swaps", "sysvipc", "thread-self", "tty", "uptime", "version", "vmstat", "zoneinfo"),
    }

    def look() -> tuple[list[str], str]:
        names = [name for name in os.listdir("/proc") if not name.isdecimal()]  # noqa: PTH208
        return names, Path("/proc/self/mountinfo").read_text()

    names, text = _inside(RootOptions(root=root), look)
    covered = {line.target for line in parse(text) if "ro" in line.options}
    assert {name for name in names if f"/proc/{name}" not in covered} <= known


def test_programs_find_what_they_need_in_proc(root: Path) -> None:
    def look() -> dict[str, bool]:
        paths = (
            "meminfo",
            "stat",
            "uptime",
            "loadavg",
            "cpuinfo",
            "mounts",
            "net/dev",
            "tty/drivers",
        )
        return {path: bool(Path("/proc", path).read_bytes()) for path in paths}

    assert set(_inside(RootOptions(root=root), look).values()) == {True}


def test_the_kernel_log_needs_its_capability(root: Path) -> None:
    def look() -> int:
        capabilities.limit(frozenset({"CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH"}))
        return _error_of(lambda: os.close(os.open("/proc/kmsg", os.O_RDONLY)))

    assert _inside(RootOptions(root=root), look) == errno.EPERM


def test_settings_of_the_machine_cannot_be_written(root: Path) -> None:
    def look() -> list[int]:
        paths = ("kernel/panic", "kernel/core_pattern", "vm/swappiness", "net/ipv4/ip_forward")
        return [_write(f"/proc/sys/{path}", "1") for path in (*paths, "kernel/hostname")]

    assert _inside(RootOptions(root=root), look) == [errno.EROFS] * 5


def test_its_own_network_and_host_name_can_be_set_where_that_is_allowed(root: Path) -> None:
    def look() -> tuple[int, int, str]:
        forward = _write("/proc/sys/net/ipv4/ip_forward", "1")
        return forward, _write("/proc/sys/kernel/hostname", "web\n"), socket.gethostname()

    options = RootOptions(root=root, owns_network=True, sets_hostname=True)
    assert _inside(options, look) == (0, 0, "web")
    assert _inside(options, lambda: _write("/proc/sys/kernel/panic", "1")) == errno.EROFS
    assert socket.gethostname() != "web"


def test_settings_of_the_guest_are_made_and_others_are_not(root: Path) -> None:
    host = Path("/proc/sys/kernel/panic").read_text()
    options = RootOptions(
        root=root,
        sysctls=(
            Sysctl("kernel.shmmax", "7654321", "sysctl/0"),
            Sysctl("kernel/msgmax", "12345", "sysctl/1"),
            Sysctl("kernel.panic", "77", "sysctl/2"),
            Sysctl("net.ipv4.ip_forward", "1", "sysctl/3"),
        ),
    )

    def look() -> tuple[str, str]:
        folder = Path("/proc/sys/kernel")
        return (folder / "shmmax").read_text(), (folder / "msgmax").read_text()

    assert _inside(options, look) == ("7654321\n", "12345\n")
    assert Path("/proc/sys/kernel/panic").read_text() == host
    assert [line.partition(":")[0] for line in mounts.warnings(options)] == ["sysctl/2", "sysctl/3"]


def test_a_setting_that_the_kernel_refuses_names_its_file(root: Path) -> None:
    options = RootOptions(root=root, sysctls=(Sysctl("kernel.sem", "many", "sysctl/0/value"),))
    with pytest.raises(FailedInside, match=r"sysctl/0/value: cannot set kernel\.sem to 'many'"):
        _inside(options, lambda: None)


# --- /sys and the cgroups


def test_sys_is_read_only(root: Path) -> None:
    lines = _mounts(RootOptions(root=root))
    assert {"ro", *_KERNEL_ONLY} <= at(lines, "/sys").options
    kernel = _inside(RootOptions(root=root), lambda: _write("/sys/kernel/uevent_helper", "/x"))
    assert kernel in (errno.EROFS, errno.ENOENT)


def test_what_tells_of_the_machine_in_sys_is_covered(root: Path) -> None:
    wanted = (
        *("firmware", "devices/virtual/dmi", "devices/virtual/powercap", "kernel/boot_params"),
        *("kernel/irq", "kernel/notes", "kernel/vmcoreinfo"),
    )
    present = [name for name in wanted if Path("/sys", name).exists()]
    assert len(present) > 2

    def look() -> list[int]:
        paths = [Path("/sys", name) for name in present]
        return [len(os.listdir(path) if path.is_dir() else path.read_bytes()) for path in paths]  # noqa: PTH208

    assert _inside(RootOptions(root=root), look) == [0] * len(present)


@pytest.mark.parametrize(("mode", "expected"), [("ro", errno.EROFS), ("rw", 0)])
def test_its_own_cgroups_are_all_it_sees(
    root: Path, cgroup: Path, mode: str, expected: int
) -> None:
    options = RootOptions(root=root, cgroup="rw" if mode == "rw" else "ro")

    def look() -> tuple[list[str], str, int]:
        folders = [entry.name for entry in os.scandir("/sys/fs/cgroup") if entry.is_dir()]
        own = Path("/proc/self/cgroup").read_text()
        made = _error_of(lambda: os.mkdir("/sys/fs/cgroup/below"))  # noqa: PTH102
        return folders, own, made

    def join() -> tuple[list[str], str, int]:
        (cgroup / "cgroup.procs").write_text("0")
        return _inside(options, look)

    (cgroup / "only").mkdir()
    folders, own, made = in_child(join)
    assert folders == ["only"]
    assert "0::/\n" in own
    assert made == expected


def test_the_cgroups_can_be_left_out(root: Path) -> None:
    lines = _mounts(RootOptions(root=root, cgroup="none"))
    assert "cgroup2" not in {line.fstype for line in lines}


# --- /run and /tmp


def test_run_is_an_empty_tmpfs_where_it_is_asked_for(root: Path) -> None:
    (root / "run").mkdir()
    (root / "run" / "old.pid").touch()

    def look() -> list[str]:
        return os.listdir("/run")  # noqa: PTH208

    assert _inside(RootOptions(root=root, run_tmpfs=True), look) == ["lock"]
    assert _inside(RootOptions(root=root), look) == ["old.pid"]


def test_a_line_of_the_fstab_for_run_wins(root: Path) -> None:
    line = Mount("none", "/run", "tmpfs", ("size=1m",), 0, False, "fstab:1")
    (root / "run").mkdir()
    options = RootOptions(root=root, run_tmpfs=True, mounts=(line,))
    assert "/run" not in {mount.target for mount in _mounts(options)}


@pytest.mark.parametrize(
    ("links", "expected"),
    [
        ({"usr/lib/systemd/system/local-fs.target.wants/tmp.mount": "../tmp.mount"}, True),
        ({"etc/systemd/system/local-fs.target.wants/tmp.mount": "/usr/share/tmp.mount"}, True),
        ({}, False),
        (
            {
                "usr/lib/systemd/system/local-fs.target.wants/tmp.mount": "../tmp.mount",
                "etc/systemd/system/tmp.mount": "/dev/null",
            },
            False,
        ),
    ],
    ids=["by default", "by the administrator", "not", "masked"],
)
def test_tmp_is_in_memory_where_the_guests_systemd_would_mount_it(
    root: Path, links: dict[str, str], expected: bool
) -> None:
    for unit in ("usr/lib/systemd/system/tmp.mount", "usr/share/tmp.mount"):
        (root / unit).parent.mkdir(parents=True, exist_ok=True)
        (root / unit).touch()
    for path, target in links.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).symlink_to(target)
    lines = _mounts(RootOptions(root=root, run_tmpfs=True))
    found = [line for line in lines if line.target == "/tmp"]  # noqa: S108
    assert [line.fstype for line in found] == (["tmpfs"] if expected else [])


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path) -> Iterator[None]:
    yield
    assert os.fspath(tmp_path) not in Path("/proc/self/mountinfo").read_text()
