"""Table B of attacks.md: for each of its rows one test or more, named by the row.

Guests are started by `vserver` as installed, with nothing configured that gives them more. What
each part does under attack is tried harder elsewhere: test_vrun_hostile_root.py and
test_vrun_sources.py (B3), test_vrun_enter_attacks.py (B1, B6), test_vrun_enter_terminal.py (B6),
test_vrun_seccomp.py (B8).
"""

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Final

import pytest

from tests.fixtures.intruders import (
    PYTHON,
    add_intruder,
    attack,
    attacking,
    canary_of_host,
    program,
)
from tests.fixtures.mountinfo import mounts_of
from tests.fixtures.persons import at_terminal
from tests.fixtures.probes import scaled
from tests.fixtures.swapper import swapping
from tests.fixtures.vservers import (
    SLEEPER,
    VSERVER,
    Host,
    host_for_guests,
    status_of,
)
from tests.fixtures.witness import link


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    yield from host_for_guests(tmp_path, monkeypatch)


@pytest.fixture
def web(host: Host) -> Host:
    """A host whose guest `web` runs, with an interpreter in it."""
    add_intruder(host, "web")
    host.vserver("web", "start")
    return host


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A folder of the host; it is as it was when the test ends, and nothing is mounted there."""
    yield from canary_of_host(tmp_path)


# --- B1: a program of the host overwritten by way of /proc/self/exe


def test_row_b1_no_program_of_the_host_can_be_written_from_a_guest(web: Host) -> None:
    programs = [Path(sys.executable).resolve(), Path(VSERVER), Path("/usr/bin/env")]
    before = [hashlib.sha256(program.read_bytes()).digest() for program in programs]
    root = web.etc.vdirbase / "web"
    watch = """
        seen, written = set(), []
        print("ready", flush=True)
        while True:
            for pid in filter(str.isdigit, os.listdir("/proc")):
                if int(pid) <= os.getpid():
                    continue
                path = f"/proc/{pid}/exe"
                try:
                    seen.add(os.readlink(path))
                    fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
                    os.write(fd, b"#!/attack/payload")
                    written.append(os.readlink(path))
                except OSError:
                    pass
            Path("/tmp/new").write_text(json.dumps([sorted(seen), written]))
            os.replace("/tmp/new", "/tmp/seen")
    """
    with attacking("web", watch):
        for _ in range(scaled(10, 300)):
            web.vserver("web", "exec", "true")
    seen, written = json.loads((root / "tmp/seen").read_text())
    assert written == []
    assert {name for name in seen if name} <= {
        "/memfd:init (deleted)",
        "/usr/bin/true",
        f"/usr/bin/{Path('/usr/bin/python3').resolve().name}",
    }
    assert [hashlib.sha256(program.read_bytes()).digest() for program in programs] == before


# --- B2: descriptors and working directories that leak


def test_row_b2_a_guest_gets_no_descriptor_and_no_folder_of_the_callers(
    host: Host, tmp_path: Path
) -> None:
    add_intruder(host, "web")
    folder_fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    root_fd = os.open("/", os.O_PATH)
    kept = (folder_fd, root_fd)
    command: list[str | Path] = [VSERVER, "web", "start"]
    subprocess.run(command, check=True, pass_fds=kept, cwd=tmp_path)
    look = "for f in /proc/self/fd/*; do readlink $f; done; pwd; readlink /proc/self/cwd; ls -d .."
    command = [VSERVER, "web", "exec", "/bin/sh", "-c", look]
    inside = subprocess.run(
        command, check=True, pass_fds=kept, cwd=tmp_path, capture_output=True, text=True
    ).stdout
    for fd in kept:
        os.close(fd)

    assert os.fspath(tmp_path.name) not in inside
    assert inside.split()[-3:] == ["/", "/", ".."]
    pid = host.init_pid("web")
    fds = {name: link(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")}  # noqa: PTH208
    assert set(fds) == {"0", "1", "2"}
    assert len(set(fds.values())) == 1
    assert link(f"/proc/{pid}/cwd") == link(f"/proc/{pid}/root")


# --- B3: targets of mounts exchanged for links (A19 above swaps what each guest has)


def test_row_b3_a_target_of_the_fstab_swapped_for_a_link(host: Host, canary: Path) -> None:
    share = canary.parent / "share"
    share.mkdir()
    root = host.add_busybox("web", {**SLEEPER, "fstab": f"{share} /srv/data none bind 0 0\n"})
    (root / "srv/data").mkdir(parents=True)
    (root / "srv/link").symlink_to(canary / "data")
    deadline = monotonic() + scaled(2, 60)
    with swapping(root / "srv", "data", "link"):
        while monotonic() < deadline:
            if host.try_vserver("web", "start").returncode == 0:
                targets = {line.target for line in mounts_of(host.init_pid("web"))}
                assert not {target for target in targets if "canary" in target}
                assert targets & {"/srv/data", "/srv/link"}
            host.vserver("web", "stop")


# --- B4: what is written to /proc goes somewhere else


def test_row_b4_settings_are_written_to_the_kernels_own_proc(host: Host, canary: Path) -> None:
    keys = {
        **SLEEPER,
        "sysctl/0/setting": "kernel.shmmax",
        "sysctl/0/value": "12345678",
        "badness": "50",
        "uts/nodename": "named",
    }
    root = host.add_busybox("web", keys)
    (root / "proc/sys").mkdir()
    (root / "proc/sys/kernel").symlink_to(canary / "sys/kernel")
    (root / "proc/self").symlink_to(canary)
    before = Path("/proc/sys/kernel/shmmax").read_text()

    host.vserver("web", "start")

    assert host.inside("web", "cat", "/proc/sys/kernel/shmmax") == "12345678\n"
    assert Path("/proc/sys/kernel/shmmax").read_text() == before
    assert host.inside("web", "cat", "/proc/self/oom_score_adj") == "50\n"
    assert host.inside("web", "hostname") == "named\n"
    assert Path("/proc/sys/kernel/hostname").read_text() != "named\n"
    types = {line.target: line.fstype for line in mounts_of(host.init_pid("web"))}
    assert types["/proc"] == "proc"


# --- B5: what covers the dangerous parts of /proc


@pytest.mark.parametrize("target", ["/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger"])
def test_row_b5_the_guests_dev_null_covers_nothing(host: Host, target: str) -> None:
    add_intruder(host, "web")
    root = host.etc.vdirbase / "web"
    (root / "dev/null").symlink_to(target)
    (root / "dev/pts").symlink_to("/proc/sys")
    (root / "dev/console").symlink_to(target)
    host.vserver("web", "start")

    told = attack(
        host,
        "web",
        """
        paths = ["/proc/sysrq-trigger", "/proc/sys/kernel/core_pattern", "/proc/timer_list",
                 "/proc/kallsyms", "/proc/keys", "/proc/sys/kernel/modprobe", "/proc/iomem",
                 "/proc/sys/vm/drop_caches", "/sys/kernel/mm/ksm/run", "/sys/power/state"]
        tell([{path: opens(path, os.O_WRONLY) for path in paths},
              {path: len(Path(path).read_bytes()) for path in paths[2:5]},
              os.major(os.stat("/dev/null").st_rdev), os.minor(os.stat("/dev/null").st_rdev)])
        """,
    )
    assert set(told[0].values()) <= {errno.EROFS, errno.ENOENT, errno.EACCES}
    assert set(told[1].values()) == {0}
    assert told[2:] == [1, 3]
    lines = mounts_of(host.init_pid("web"))
    covers = [line for line in lines if line.target.startswith("/proc/") and line.fstype == "tmpfs"]
    assert len(covers) > 5
    assert all("ro" in line.options for line in covers)


# --- B6: joining a hostile guest


_PUSH: Final = """
    import termios
    fds = [0, 1, 2]
    for path in ("/dev/tty", "/dev/console", "/dev/pts/0", "/dev/pts/1"):
        try:
            fds.append(os.open(path, os.O_RDWR | os.O_NONBLOCK))
        except OSError:
            pass
    errors = set()
    for fd in fds:
        for request, data in ((0x5412, b"!"), (0x541C, bytes([2, 1, 0, 1, 0, 9, 0, 0, 0, 0, 0]))):
            errors.add(errno_of(lambda: fcntl.ioctl(fd, request, data)))
    print("tried", sorted(errors), flush=True)
"""


def test_row_b6_nothing_is_typed_into_the_terminal_of_one_who_joins(web: Host) -> None:
    script = web.etc.vdirbase / "web/attack/push.py"
    script.write_text(program(_PUSH))
    with at_terminal(["/bin/bash", "--norc", "-i"]) as person:
        person.type(f"{VSERVER} web exec {PYTHON} -I /attack/push.py\r")
        person.wait_for(f"tried [{errno.EPERM}]\r\n")
        seen = person.wait_for("# ")
        person.type("echo cle''an\r")
        seen += person.wait_for("clean\r\n")
    assert "!" not in seen


def test_row_b6_who_joins_is_all_that_the_guests_init_is_and_no_more(web: Host) -> None:
    pid = web.init_pid("web")
    kinds = ("mnt", "pid", "uts", "ipc", "cgroup", "net", "user", "time")
    told = attack(
        web,
        "web",
        """
        lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
        words = {name: text.strip() for name, text in lines.items()}
        tell([{kind: os.readlink(f"/proc/self/ns/{kind}") for kind in json.loads(sys.argv[1])},
              words, open("/proc/self/cgroup").read()])
        """,
        json.dumps(kinds),
    )
    spaces, status, groups = told
    assert spaces == {kind: link(f"/proc/{pid}/ns/{kind}") for kind in kinds}
    init = status_of(pid)
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "Seccomp", "NoNewPrivs"):
        assert status[name] == init[name], name
    assert set(re.findall(r"^.*:(.*)$", groups, re.M)) == {"/"}


# --- B7: what the host writes for a guest


def test_row_b7_no_value_of_a_configuration_becomes_two(host: Host) -> None:
    """What could end a line is refused where a guest is built, or arrives as one value."""
    evil = "web\nnone / none bind"
    for words in (
        ("--hostname", evil),
        ("--netdev", evil),
        ("--interface", f"{evil}:10.0.0.9/24"),
        ("--flags", evil),
        ("--initstyle", evil),
    ):
        done = host.try_vserver("new", "build", "-m", "skeleton", *words)
        assert done.returncode in (1, 2), (words, done.stderr)
        assert not (host.etc.confdir / "new").exists()
    done = host.try_vserver(evil, "build", "-m", "skeleton")
    assert done.returncode != 0
    assert not [path for path in host.etc.confdir.iterdir() if "\n" in path.name]


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("uts/nodename", "one\ntwo"),
        ("context", "1001\n1002"),
        ("nice", "5\n0"),
        ("personality", "linux32\nfrob"),
    ],
)
def test_row_b7_a_second_line_is_no_second_value(host: Host, key: str, text: str) -> None:
    host.add_busybox("web")
    host.set_key("web", key, text)
    done = host.try_vserver("web", "start")
    if done.returncode == 0:
        assert "two" not in host.inside("web", "hostname")
        assert host.state("web")["xid"] != 1002
    else:
        assert key in done.stderr


def test_row_b7_the_folder_of_guests_is_for_root_alone(host: Host, tmp_path: Path) -> None:
    place = tmp_path / "place"
    environment = os.environ | {"VSERVER_VDIRBASE": os.fspath(place)}
    command: list[str | Path] = [VSERVER, "new", "build", "-m", "skeleton"]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    assert place.stat().st_mode & 0o777 == 0o700
    as_user = subprocess.run(
        ["setpriv", "--reuid=65534", "--clear-groups", "ls", place / "new"],
        check=False,
        capture_output=True,
    )
    assert as_user.returncode != 0


# --- B8: the kernel's surface


def test_row_b8_no_inode_is_opened_by_its_handle(web: Host) -> None:
    """The handles are real: of the host's root and of inode 2, as the exploit "shocker" made it."""
    told = attack(
        web,
        "web",
        """
        mount_fd = os.open("/", os.O_RDONLY)
        handle = ctypes.create_string_buffer(struct.pack("=IiII", 8, 1, 2, 0) + bytes(112))
        found = [call(number_of("open_by_handle_at"), mount_fd, ctypes.addressof(handle), 0)[1]]
        own = ctypes.create_string_buffer(struct.pack("=Ii", 112, 0) + bytes(112))
        where = ctypes.c_int()
        path = ctypes.create_string_buffer(b"/")
        named = call(number_of("name_to_handle_at"), mount_fd, ctypes.addressof(path),
                     ctypes.addressof(own), ctypes.addressof(where), 0)[1]
        found.append(call(number_of("open_by_handle_at"), mount_fd, ctypes.addressof(own), 0)[1])
        tell([named, found])
        """,
    )
    assert told == [0, [errno.EPERM] * 2]


def test_row_b8_no_release_agent_can_be_written(web: Host) -> None:
    told = attack(
        web,
        "web",
        """
        found = [os.path.join(base, name) for base, _, names in os.walk("/sys/fs/cgroup")
                 for name in names if "release" in name or not opens(os.path.join(base, name), 1)]
        libc = ctypes.CDLL(None, use_errno=True)
        os.mkdir("/tmp/v1")
        errors = []
        for words in (b"memory", b"rdma", b"none,name=x"):
            libc.mount(b"x", b"/tmp/v1", b"cgroup", 0, words)
            errors.append(ctypes.get_errno())
        tell([found, errors, errno_of(lambda: os.mkdir("/sys/fs/cgroup/x"))])
        """,
    )
    assert told == [[], [errno.EPERM] * 3, errno.EROFS]


def test_row_b8_no_device_of_the_machine_can_be_had(web: Host) -> None:
    disk = next(path for path in Path("/sys/block").iterdir()).joinpath("dev").read_text()
    told = attack(
        web,
        "web",
        """
        major, minor = map(int, sys.argv[1].split(":"))
        kinds = [(stat.S_IFBLK, (major, minor)), (stat.S_IFCHR, (1, 1)), (stat.S_IFCHR, (1, 11)),
                 (stat.S_IFCHR, (10, 200)), (stat.S_IFCHR, (4, 0))]
        made = [errno_of(lambda: os.mknod(f"{folder}/x", kind | 0o600, os.makedev(*number)))
                for folder in ("/tmp", "/dev", "/dev/shm", "/run") for kind, number in kinds]
        nodes = sorted(str(path) for path in Path("/dev").iterdir()
                       if path.is_char_device() or path.is_block_device())
        tell([made, nodes])
        """,
        disk,
    )
    assert set(told[0]) == {errno.EPERM}
    names = ("console", "full", "null", "ptmx", "random", "tty", "urandom", "zero")
    assert told[1] == [f"/dev/{name}" for name in names if name != "stdin"]


def test_row_b8_settings_of_the_machine_cannot_be_written(web: Host) -> None:
    told = attack(
        web,
        "web",
        """
        def writable(top, skip=()):
            return [os.path.join(base, name) for base, _, names in os.walk(top) for name in names
                    if not opens(os.path.join(base, name), os.O_WRONLY)]
        tell([writable("/proc/sys"), writable("/sys"), writable("/proc/driver"),
              writable("/proc/pressure")])
        """,
    )
    names = ["/proc/sys/kernel/domainname", "/proc/sys/kernel/hostname"]
    assert [sorted(told[0]), *told[1:]] == [names, [], [], []]


def test_row_b8_nobody_hears_of_the_hosts_processes(web: Host) -> None:
    """The connector of netlink tells each listener of a network namespace, whoever turned it on."""
    told = attack(
        web,
        "web",
        """
        found = []
        for protocol in (11, 18, 20, 7, 10):
            found.append(errno_of(lambda: socket.socket(16, socket.SOCK_DGRAM, protocol)))
        tell(found)
        """,
    )
    assert set(told) == {errno.EPROTONOSUPPORT}


# --- B9: who has more than that is not safe, and it is said


@pytest.mark.parametrize("word", ["SYS_ADMIN", "SYS_MODULE", "SYS_RAWIO", "MKNOD", "SYS_PTRACE"])
def test_row_b9_rights_over_the_host_are_said_at_each_start(host: Host, word: str) -> None:
    host.add_busybox("web", {**SLEEPER, "bcapabilities": word})
    assert word in host.vserver("web", "start").stderr


def test_row_b9_the_readme_says_that_root_in_a_guest_is_root_for_the_kernel() -> None:
    text = (Path(__file__).parent.parent.parent / "README.md").read_text()
    assert "Root in a guest is root for the kernel" in text
