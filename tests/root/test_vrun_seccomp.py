"""The default filter, asked by the calls themselves, and by programs that must go on working."""

import ctypes
import errno
import fcntl
import mmap
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from functools import partial
from itertools import takewhile
from pathlib import Path
from tempfile import gettempdir
from typing import TypeVar

import pytest

from tests.fixtures.calls import NUMBERS32, call, call32, number_of
from tests.fixtures.inside import in_child
from tests.fixtures.probes import need
from vrun import capabilities, seccomp
from vrun.wordlist import DEFAULT_CCAPS, SECURE_CAPS

Result = TypeVar("Result")

_MACHINE = os.uname().machine
_NEWUSER = 0x10000000
_NEWNS = 0x00020000
_CLONE_FILES = 0x400
_TIOCSTI = 0x5412
_SOCKETCALL = 102  # asm/unistd_32.h
_MAP_32BIT_ANONYMOUS = 0x62

_REFUSED = [
    *((name, errno.EPERM) for name in ("kexec_load", "kexec_file_load", "init_module")),
    *((name, errno.EPERM) for name in ("finit_module", "delete_module", "bpf", "setns")),
    *((name, errno.EPERM) for name in ("perf_event_open", "open_by_handle_at", "syslog")),
    *((name, errno.EPERM) for name in ("mount", "umount2", "pivot_root", "open_tree")),
    *((name, errno.EPERM) for name in ("move_mount", "fsopen", "fsconfig", "fsmount", "fspick")),
    *((name, errno.EPERM) for name in ("mount_setattr", "open_tree_attr", "quotactl")),
    *((name, errno.EPERM) for name in ("quotactl_fd", "swapon", "acct", "settimeofday")),
    *((name, errno.EPERM) for name in ("clock_settime", "fanotify_init")),
    *((name, errno.ENOSYS) for name in ("add_key", "request_key", "keyctl", "userfaultfd")),
    *((name, errno.ENOSYS) for name in ("io_uring_setup", "io_uring_enter")),
    *((name, errno.ENOSYS) for name in ("io_uring_register", "clone3")),
]


def _under(
    function: Callable[[], Result],
    capabilities_: Iterable[str] = SECURE_CAPS,
    ccaps: Iterable[str] = DEFAULT_CCAPS,
    umask: Iterable[str] = (),
) -> Result:
    """What `function` gives under the filter of a guest with these words.

    The process keeps every capability: only the filter can be what refuses.
    """
    program = seccomp.compile_program(capabilities_, ccaps, umask)

    def run() -> Result:
        seccomp.load(program)
        return function()

    return in_child(run)


@pytest.mark.parametrize(("name", "expected"), _REFUSED)
def test_what_no_guest_needs_is_refused(name: str, expected: int) -> None:
    assert _under(lambda: call(number_of(name), *[0] * 6)) == (-1, expected)


def test_calls_newer_than_the_list_do_not_exist() -> None:
    for number in (470, 500, 1023):
        assert _under(partial(call, number)) == (-1, errno.ENOSYS)


@pytest.mark.skipif(_MACHINE != "x86_64", reason="x32 is of x86_64")
def test_x32_does_not_exist() -> None:
    assert _under(lambda: call(0x40000000 | 39)) == (-1, errno.ENOSYS)


@need("programs_32bit")
@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        *((name, (), errno.EPERM) for name in ("mount", "init_module", "kexec_load", "bpf")),
        *((name, (), errno.EPERM) for name in ("setns", "open_by_handle_at")),
        *((name, (), errno.ENOSYS) for name in ("keyctl", "userfaultfd", "io_uring_setup")),
        ("clone3", (), errno.ENOSYS),
        ("unshare", (_NEWUSER,), errno.EPERM),
        ("ioctl", (0, _TIOCSTI), errno.EPERM),
        ("fcntl", (0, fcntl.F_SETLEASE), errno.EINVAL),
        ("fcntl64", (0, fcntl.F_SETLEASE), errno.EINVAL),
        ("socket", (40, 1, 0), errno.EAFNOSUPPORT),
    ],
)
def test_the_gate_of_32_bit_programs_is_no_way_around(
    name: str, arguments: tuple[int, ...], expected: int
) -> None:
    assert in_child(lambda: call32(NUMBERS32["getppid"])[0]) > 0, "the gate is open"
    assert _under(lambda: call32(NUMBERS32[name], *arguments)) == (-1, expected)


@pytest.mark.parametrize("flags", [_NEWUSER, _NEWUSER | _NEWNS, _NEWUSER | _CLONE_FILES, _NEWNS])
def test_new_namespaces_are_refused(flags: int) -> None:
    assert _under(lambda: call(number_of("unshare"), flags)) == (-1, errno.EPERM)
    assert _under(lambda: call(number_of("clone"), flags | 17, 0, 0, 0, 0)) == (-1, errno.EPERM)


def test_unshare_of_what_is_no_namespace_works() -> None:
    assert _under(lambda: call(number_of("unshare"), _CLONE_FILES)) == (0, 0)


def test_any_inode_by_its_handle_is_refused() -> None:
    """The attack itself: with DAC_READ_SEARCH the host's root is inode 2 of the file system."""

    def attack() -> tuple[tuple[int, int], tuple[int, int]]:
        capabilities.limit(SECURE_CAPS)
        handle = ctypes.create_string_buffer(b"\x80\0\0\0", 136)
        mount_id = ctypes.c_int()
        address = ctypes.addressof(handle)
        path = ctypes.create_string_buffer(b"/etc")
        root_fd = os.open("/etc", os.O_RDONLY)
        made = call(
            number_of("name_to_handle_at"),
            *(-100, ctypes.addressof(path), address, ctypes.addressof(mount_id), 0),
        )
        opened = call(number_of("open_by_handle_at"), root_fd, address, os.O_RDONLY)
        return made, opened

    made, opened = in_child(attack)
    assert made == (0, 0)
    assert opened[1] == 0, "without the filter it works"
    assert _under(attack) == ((0, 0), (-1, errno.EPERM))


@pytest.mark.parametrize("upper", [0, 1 << 32, 0x7FFF << 32])
def test_typing_into_a_terminal_is_refused_whatever_the_upper_half_says(upper: int) -> None:
    def attack() -> tuple[int, int]:
        master_fd, slave_fd = os.openpty()
        byte = ctypes.create_string_buffer(b"x")
        pushed = call(number_of("ioctl"), slave_fd, _TIOCSTI | upper, ctypes.addressof(byte))
        os.set_blocking(slave_fd, False)
        os.close(master_fd)
        return pushed

    assert _under(attack) == (-1, errno.EPERM)
    assert _under(attack, ccaps={"tiocsti"})[1] != errno.EPERM or not _has_tiocsti()


def _has_tiocsti() -> bool:
    try:
        return Path("/proc/sys/dev/tty/legacy_tiocsti").read_text() == "1\n"
    except FileNotFoundError:
        return True


def test_leases_are_refused_unless_the_guest_has_the_capability(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()

    def take() -> int:
        fd = os.open(file, os.O_RDONLY)
        try:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except OSError as error:
            return error.errno or -1
        return 0

    assert _under(take) == errno.EINVAL
    assert _under(take, SECURE_CAPS | {"LEASE"}) == 0


def test_sockets_to_the_machines_host_are_refused() -> None:
    def open_all() -> list[int]:
        families = (socket.AF_VSOCK, socket.AF_ALG, socket.AF_INET, socket.AF_UNIX)
        return [call(number_of("socket"), family, 2, 0)[1] for family in families]

    assert _under(open_all) == [errno.EAFNOSUPPORT, errno.EAFNOSUPPORT, 0, 0]


_KNOWN = {socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET}


def _families(kind: str = "socket", gate: Callable[..., tuple[int, int]] = call) -> set[int]:
    """Families that the kernel does not say it lacks."""
    number = number_of(kind) if gate is call else NUMBERS32[kind]
    kinds = (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET)
    return {
        family
        for family in (*range(64), 1 << 16, 1 << 31)
        if any(gate(number, family, kind, 0)[1] != errno.EAFNOSUPPORT for kind in kinds)
    }


def test_sockets_of_unknown_families_cannot_be_made() -> None:
    without = in_child(_families)
    assert without - _KNOWN, "this kernel has no other family: the test shows nothing"
    assert _under(_families) == _KNOWN
    upper = [socket.AF_ALG | half << 32 for half in (1, 0x7FFFFFFF)]
    raised = _under(lambda: [call(number_of("socket"), family, 5, 0) for family in upper])
    assert raised == [(-1, errno.EAFNOSUPPORT)] * 2


def test_netlink_is_for_what_guests_need() -> None:
    def protocols() -> list[int]:
        number = number_of("socket")
        return [kind for kind in range(32) if not call(number, socket.AF_NETLINK, 3, kind)[1]]

    without = in_child(protocols)
    assert 11 in without, "this kernel has no connector: the test shows little"
    assert _under(protocols) == [kind for kind in without if kind in {0, 2, 4, 6, 9, 12, 15, 16}]
    assert _under(protocols, SECURE_CAPS | {"SYS_ADMIN"}) == without


@need("programs_32bit")
def test_the_gate_of_32_bit_programs_makes_no_others() -> None:
    assert _under(lambda: _families(gate=call32)) <= _KNOWN


@pytest.mark.skipif(_MACHINE != "x86_64", reason="only there are 32-bit programs of x86")
def test_socketcall_makes_sockets_only_for_guests_of_32_bit_programs() -> None:
    def open_all() -> list[int]:
        memory = ctypes.CDLL(None, use_errno=True)["mmap"]
        memory.restype = ctypes.c_void_p
        low = memory(None, ctypes.c_size_t(mmap.PAGESIZE), 3, _MAP_32BIT_ANONYMOUS, -1, 0)
        errors = []
        for family in (socket.AF_INET, socket.AF_ALG):
            ctypes.memmove(low, struct.pack("3I", family, 5 if family == 38 else 1, 0), 12)
            errors.append(call32(_SOCKETCALL, 1, low)[1])
        return errors

    without = in_child(open_all)
    assert without[0] == 0
    assert _under(open_all) == [errno.EAFNOSUPPORT] * 2
    words = seccomp.personality_words(0x0008)
    assert _under(open_all, umask=words) == without
    assert not seccomp.personality_words(None) | seccomp.personality_words(0x0020000)


def test_what_opens_a_family_opens_just_that() -> None:
    without = in_child(_families)
    opened = _under(_families, SECURE_CAPS | {"NET_ADMIN"})
    assert opened - _KNOWN == without & {15, 24}
    vsock_and_ciphers = {40, 38}
    assert _under(_families, SECURE_CAPS | {"SYS_ADMIN"}) == without - vsock_and_ciphers


@pytest.mark.parametrize(
    ("word", "name", "arguments"),
    [
        ("SYS_ADMIN", "mount", ()),
        ("SYS_ADMIN", "setns", ()),
        ("SYS_ADMIN", "open_tree_attr", ()),
        ("SYS_ADMIN", "unshare", (_NEWNS,)),
        ("BPF", "bpf", ()),
        ("PERFMON", "perf_event_open", ()),
        ("SYS_PACCT", "acct", (1,)),
        ("SYS_TIME", "clock_settime", (0, 0)),
        ("SYS_PTRACE", "userfaultfd", (-1,)),
    ],
)
def test_a_capability_opens_what_it_names(word: str, name: str, arguments: tuple[int, ...]) -> None:
    number = number_of(name)
    refused = _under(lambda: call(number, *arguments))
    assert refused[1] in (errno.EPERM, errno.ENOSYS)
    without = in_child(lambda: call(number, *arguments))
    if without == (-1, errno.ENOSYS):
        pytest.skip(f"this kernel has no {name}")
    opened = _under(lambda: call(number, *arguments), SECURE_CAPS | {word})
    assert opened == without
    assert opened[1] not in (errno.EPERM, errno.ENOSYS)


def test_a_context_capability_opens_what_it_names() -> None:
    size = partial(call, number_of("syslog"), 10, 0, 0)
    assert _under(size) == (-1, errno.EPERM)
    assert _under(size, ccaps={"syslog"})[1] == 0


def test_a_word_of_umask_opens_its_namespace_only() -> None:
    def try_both() -> tuple[int, int]:
        unshare = number_of("unshare")
        return call(unshare, _NEWNS)[1], call(unshare, _NEWUSER)[1]

    assert _under(try_both, umask={"newuser"}) == (errno.EPERM, 0)
    assert _under(try_both, umask={"newns"}) == (0, errno.EPERM)


def test_nothing_opens_another_kernel() -> None:
    everything = frozenset(capabilities.NUMBERS)
    for name in ("kexec_load", "kexec_file_load"):
        assert _under(partial(call, number_of(name)), everything) == (-1, errno.EPERM)


def test_it_is_loaded_without_no_new_privs() -> None:
    status = _under(lambda: Path("/proc/self/status").read_text())
    assert "NoNewPrivs:\t0" in status
    assert "Seccomp:\t2" in status


def test_it_stays_over_exec() -> None:
    def execute() -> str:
        done = subprocess.run(
            ["unshare", "-U", "true"], capture_output=True, text=True, check=False
        )
        return done.stderr

    assert "Operation not permitted" in _under(execute)


def test_setuid_programs_work_under_it(tmp_path: Path) -> None:
    for folder in takewhile(lambda path: path != Path(gettempdir()), (tmp_path, *tmp_path.parents)):
        folder.chmod(0o755)
    found = shutil.which("id")
    assert found
    program = Path(shutil.copy(found, tmp_path / "id"))
    program.chmod(0o4755)

    def execute() -> str:
        capabilities.limit(SECURE_CAPS, become=capabilities.Identity(65534, 65534))
        return subprocess.run([program], capture_output=True, text=True, check=True).stdout

    assert "euid=0(root)" in _under(execute)


def test_programs_of_every_day_work_under_it() -> None:
    def work() -> list[str]:
        capabilities.limit(SECURE_CAPS)
        results: list[str] = []
        thread = threading.Thread(target=lambda: results.append("thread"))
        thread.start()
        thread.join()
        commands = (
            "ls -l / | sort | head -n 1 >/dev/null && echo pipe",
            "su -s /bin/sh nobody -c 'echo su'",
            f'{sys.executable} -c \'import subprocess; subprocess.run(["echo", "python"])\'',
            "touch $TMP/a && chown 1:1 $TMP/a && chmod 600 $TMP/a && rm $TMP/a && echo files",
            "perl -e 'fork or exit 3; wait; print $? >> 8, \"\\n\"'",
            "dd if=/dev/zero bs=1k count=1 2>/dev/null | gzip | gzip -d | wc -c",
        )
        for command in commands:
            done = subprocess.run(
                ["sh", "-c", command], capture_output=True, text=True, check=False, env=environment
            )
            results.append(done.stdout.strip() or done.stderr)
        return results

    environment = {**os.environ, "TMP": os.fspath(Path("/var/tmp"))}  # noqa: S108
    expected = ["thread", "pipe", "su", "python", "files", "3", "1024"]
    assert _under(work) == expected


def test_without_the_right_to_load_it_the_failure_is_said() -> None:
    program = seccomp.compile_program(SECURE_CAPS)

    def load() -> int:
        capabilities.limit(SECURE_CAPS)
        try:
            seccomp.load(program)
        except OSError as error:
            return error.errno or -1
        return 0

    assert in_child(load) == errno.EACCES
