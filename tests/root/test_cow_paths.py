"""Calls reach the file that their caller means, by whatever way, and nothing else."""

import ctypes
import errno
import mmap
import os
import struct
from collections.abc import Callable
from functools import partial

import pytest

from tests.fixtures.calls import call, call32
from tests.fixtures.cow import Ran, in_guest
from tests.fixtures.filesystems import Site, is_immutable
from tests.fixtures.probes import need, on
from tests.fixtures.windows import CONTENT, shared_file
from vrun.cow.numbers import ARCHITECTURES, TABLES

pytestmark = [need("immutable", "lease"), on("ext4")]


def _write(path: str, flags: int = 0, dir_fd: int | None = None) -> None:
    fd = os.open(path, os.O_WRONLY | flags, dir_fd=dir_fd)
    os.write(fd, b"mine")
    os.close(fd)


def _by_self_fd() -> None:
    fd = os.open("/conf", os.O_RDONLY)
    _write(f"/proc/self/fd/{fd}")


def _by_folder_fd() -> None:
    folder_fd = os.open("/a/b", os.O_RDONLY)
    _write("../../conf", dir_fd=folder_fd)


def _by_path_folder_fd() -> None:
    folder_fd = os.open("/a", os.O_PATH)
    _write("b/up/conf", dir_fd=folder_fd)


def _by_cwd() -> None:
    os.chdir("/a/b")
    _write("../.././conf")


def _by_mere_name() -> None:
    os.chdir("/")
    _write("conf")


def _by_name_of_a_link(name: str) -> None:
    os.chdir("/a")
    _write(name)


def _by_name_in_folder_fd() -> None:
    _write("absolute", dir_fd=os.open("/a", os.O_PATH))


def _at_end_of_page() -> None:
    """Nothing can be read behind the path, and it is longer than what is read at first."""
    path = b"/" + b"./" * 200 + b"conf\0"
    size = mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * size)
    memory[size - len(path) : size] = path
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + size), size, 0) == 0  # PROT_NONE
    fd, error = call(TABLES_NATIVE["openat"], -100, start + size - len(path), os.O_WRONLY, 0)
    assert error == 0
    os.write(fd, b"mine")
    os.close(fd)


_PR_SET_TAGGED_ADDR_CTRL = 55  # linux/prctl.h


def _by_tagged_address() -> None:
    """The upper byte is the program's own, as Documentation/arm64/tagged-address-abi.rst has it."""
    text = ctypes.create_string_buffer(b"/conf")
    prctl = ctypes.CDLL(None).prctl
    assert prctl(_PR_SET_TAGGED_ADDR_CTRL, *map(ctypes.c_ulong, (1, 0, 0, 0))) == 0
    tagged = ctypes.addressof(text) | 0x5A << 56
    fd, error = call(TABLES_NATIVE["openat"], -100, tagged, os.O_WRONLY)
    assert error == 0
    os.write(fd, b"mine")
    os.close(fd)


def _over_two_pages() -> None:
    size = mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * size)
    memory[size - 3 : size + 3] = b"/conf\0"
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fd, error = call(TABLES_NATIVE["openat"], -100, start + size - 3, os.O_WRONLY, 0)
    assert error == 0
    os.write(fd, b"mine")
    os.close(fd)


def _by_proc_folder_fd() -> None:
    fd = os.open("/", os.O_RDONLY)
    _write(f"/proc/self/fd/{fd}/conf")


def _from_a_jail() -> None:
    """A daemon's root is a folder of the guest, and its links count from there."""
    os.mkdir("/jail")
    os.rename("/conf", "/jail/conf")
    os.symlink("/conf", "/jail/link")
    os.chroot("/jail")
    os.chdir("/")
    _write("../../link")
    os.chroot(".")


def _by_thread() -> None:
    """With a name of the thread's own."""
    fd = os.open("/conf", os.O_RDONLY)
    _write(f"/proc/thread-self/fd/{fd}")


WAYS: dict[str, Callable[[], None]] = {
    "plain": lambda: _write("/conf"),
    "dots": lambda: _write("/a/../a/./b/../../conf"),
    "above-root": lambda: _write("/../../../conf"),
    "absolute-link": lambda: _write("/a/absolute"),
    "relative-link": lambda: _write("/a/relative"),
    "link-to-link": lambda: _write("/a/chain"),
    "link-in-the-middle": lambda: _write("/a/b/up/conf"),
    "cwd": _by_cwd,
    "name": _by_mere_name,
    "name-of-absolute-link": lambda: _by_name_of_a_link("absolute"),
    "name-of-chain": lambda: _by_name_of_a_link("chain"),
    "name-in-folder-fd": _by_name_in_folder_fd,
    "end-of-page": _at_end_of_page,
    "two-pages": _over_two_pages,
    "folder-fd": _by_folder_fd,
    "path-folder-fd": _by_path_folder_fd,
    "self-fd": _by_self_fd,
    "self-fd-folder": _by_proc_folder_fd,
    "self-root": lambda: _write("/proc/self/root/conf"),
    "init-root": lambda: _write("/proc/1/root/conf"),
    "self-cwd": lambda: _write("/proc/self/cwd/conf"),
    "thread-self": _by_thread,
    "truncating": lambda: _write("/proc/self/root/a/chain", os.O_TRUNC),
}
if os.uname().machine == "aarch64":
    WAYS["tagged-address"] = _by_tagged_address


def _grow_ways(site: Site) -> None:
    root = site.root("web")
    (root / "a/b").mkdir(parents=True)
    (root / "a/absolute").symlink_to("/conf")
    (root / "a/relative").symlink_to("../conf")
    (root / "a/chain").symlink_to("/a/relative")
    (root / "a/b/up").symlink_to("/a/..")


@pytest.mark.parametrize("way", WAYS)
def test_each_way_leads_to_the_file(site: Site, way: str) -> None:
    with shared_file(site) as shared:
        _grow_ways(site)
        ran = Ran()
        in_guest(site.pool, site.root("web"), WAYS[way], ran=ran)
        assert not ran.notes
        expected = b"mine" if way == "truncating" else b"mine" + CONTENT[4:]
        assert shared.web.read_bytes() == expected
        assert shared.is_untouched()
        assert is_immutable(shared.object)


def _from_a_jail_by_name() -> None:
    """Outside, the link would lead to a file that is its guest's own."""
    os.mkdir("/jail")
    os.rename("/conf", "/jail/conf")
    _write("/conf", os.O_CREAT)
    os.symlink("/conf", "/jail/link")
    os.chroot("/jail")
    os.chdir("/")
    _write("link")


@pytest.mark.parametrize("act", [_from_a_jail, _from_a_jail_by_name])
def test_a_daemon_in_a_root_of_its_own(site: Site, act: Callable[[], None]) -> None:
    with shared_file(site) as shared:
        in_guest(site.pool, site.root("web"), act)
        assert (site.root("web") / "jail/conf").read_bytes() == b"mine" + CONTENT[4:]
        assert shared.is_untouched()


def _errno_of(function: Callable[[], object]) -> int:
    try:
        function()
    except OSError as error:
        return error.errno or -1
    return 0


def _answers() -> dict[str, int]:
    tmp_fd = os.open("/", os.O_TMPFILE | os.O_RDWR)
    os.write(tmp_fd, b"x")
    return {
        "excl": _errno_of(lambda: _write("/conf", os.O_CREAT | os.O_EXCL)),
        "nofollow": _errno_of(lambda: _write("/link", os.O_NOFOLLOW)),
        "directory": _errno_of(lambda: _write("/conf", os.O_DIRECTORY)),
        "slash": _errno_of(lambda: _write("/conf/")),
        "below": _errno_of(lambda: _write("/conf/x")),
        "path": _errno_of(lambda: os.open("/conf", os.O_PATH | os.O_WRONLY)),
        "link-there": _errno_of(lambda: os.link("/conf", "/link")),
        "rename-noreplace": _errno_of(lambda: _noreplace("/link", "/conf")),
        "unlink-slash": _errno_of(lambda: os.unlink("/conf/")),
        "rmdir": _errno_of(lambda: os.rmdir("/conf")),
        "fifo": _errno_of(lambda: os.open("/fifo", os.O_WRONLY | os.O_NONBLOCK)),
        "loop": _errno_of(lambda: _write("/loop")),
        "openat2": _openat2(),
        "bad-pointer": call(TABLES_NATIVE["openat"], -100, 1, os.O_WRONLY)[1],
        "long": _errno_of(lambda: _write("/" + "x/" * 3000)),
        "empty": _errno_of(lambda: _write("")),
    }


TABLES_NATIVE = TABLES[ARCHITECTURES[0]]


def _openat2() -> int:
    text = ctypes.create_string_buffer(b"/conf")
    how = ctypes.create_string_buffer(24)
    return call(437, -100, ctypes.addressof(text), ctypes.addressof(how), 24)[1]


def _noreplace(old: str, new: str) -> None:
    from vstore.syscalls import RENAME_NOREPLACE, renameat2

    renameat2(-100, old.encode(), -100, new.encode(), flags=RENAME_NOREPLACE)


def test_what_the_kernel_refuses_stays_shared(site: Site) -> None:
    with shared_file(site) as shared:
        root = site.root("web")
        (root / "link").symlink_to("conf")
        (root / "loop").symlink_to("loop")
        os.mkfifo(root / "fifo")
        ran = Ran()
        found = in_guest(site.pool, root, _answers, ran=ran)
        assert found == {
            "excl": errno.EEXIST,
            "nofollow": errno.ELOOP,
            "directory": errno.ENOTDIR,
            "slash": errno.ENOTDIR,
            "below": errno.ENOTDIR,
            "path": 0,
            "link-there": errno.EEXIST,
            "rename-noreplace": errno.EEXIST,
            "unlink-slash": errno.ENOTDIR,
            "rmdir": errno.EPERM,  # of a private file it is ENOTDIR
            "fifo": errno.ENXIO,
            "loop": errno.ELOOP,
            "openat2": errno.ENOSYS,
            "bad-pointer": errno.EFAULT,
            "long": errno.ENAMETOOLONG,
            "empty": errno.ENOENT,
        }
        assert shared.web.samefile(shared.object)
        assert not ran.notes


@need("programs_32bit")
@pytest.mark.parametrize("name", ["open", "openat", "chmod", "chown", "chown32", "truncate64"])
def test_calls_of_32_bit_programs(site: Site, name: str) -> None:
    path, padding = b"/conf", (0,) * (os.uname().machine == "aarch64")
    arguments: dict[str, tuple[int | bytes, ...]] = {
        "open": (path, os.O_WRONLY),
        "openat": (-100, path, os.O_RDWR),
        "chmod": (path, 0o600),
        "chown": (path, 7, 0xFFFF),
        "chown32": (path, 7, 0xFFFFFFFF),
        "truncate64": (path, *padding, 5, 0),  # where pairs of registers begin with an even one
    }
    number = TABLES[ARCHITECTURES[1]][name]

    def act() -> tuple[int, int]:
        return call32(number, *arguments[name])

    with shared_file(site) as shared:
        value, error = in_guest(site.pool, site.root("web"), act)
        assert (value >= 0, error) == (True, 0)
        status = shared.web.stat()
        assert not shared.web.samefile(shared.object)
        assert shared.is_untouched()
        if name == "chown":
            assert (status.st_uid, status.st_gid) == (7, 0)
        if name == "truncate64":
            assert status.st_size == 5


@need("programs_32bit")
@pytest.mark.parametrize("name", ["truncate", "truncate64"])
def test_a_32_bit_program_cuts_a_file_by_its_descriptor(site: Site, name: str) -> None:
    """The supervisor does it itself, to the length that the call says, whatever stands in registers
    that the call has no use for.
    """
    rest = (3, 3, 3)
    lengths = {"truncate": (5,), "truncate64": (5, 0)}
    if os.uname().machine == "aarch64":
        lengths["truncate64"] = (3, 5, 0)
    words = (*lengths[name], *rest)[:4]

    def act() -> tuple[int, int]:
        fd = os.open("/conf", os.O_RDONLY)
        os.set_inheritable(fd, True)
        return call32(TABLES[ARCHITECTURES[1]][name], b"/proc/self/fd/%d" % fd, *words)

    with shared_file(site) as shared:
        assert in_guest(site.pool, site.root("web"), act) == (0, 0)
        assert shared.web.read_bytes() == CONTENT[:5]
        assert shared.is_untouched()


_TIMES = {
    64: {
        "utime": struct.pack("=2q", 500, 600),
        "utimes": struct.pack("=4q", 500, 0, 600, 7),
        "futimesat": struct.pack("=4q", 500, 0, 600, 7),
        "utimensat": struct.pack("=4q", 500, 0, 600, 7000),
    },
    32: {
        "utime": struct.pack("=2i", 500, 600),
        "utimes": struct.pack("=4i", 500, 0, 600, 7),
        "futimesat": struct.pack("=4i", 500, 0, 600, 7),
        "utimensat": struct.pack("=4i", 500, 0, 600, 7000),
        "utimensat_time64": struct.pack("=qIIqII", 500, 0, 9, 600, 7000, 9),  # no call looks at 9
    },
}
_ARCHITECTURE = dict(zip(_TIMES, ARCHITECTURES, strict=True))


def _set_times(width: int, name: str, times: bytes) -> tuple[int, int]:
    """By the path of a descriptor."""
    fd = os.open("/conf", os.O_RDONLY)
    os.set_inheritable(fd, True)
    folder = () if name in ("utime", "utimes") else (-100,)
    words = (*folder, b"/proc/self/fd/%d" % fd, times, 0)
    number = TABLES[_ARCHITECTURE[width]][name]
    if width == 32:
        return call32(number, *words)
    texts = [ctypes.create_string_buffer(word) for word in words if isinstance(word, bytes)]
    addresses = iter(texts)
    values = (
        ctypes.addressof(next(addresses)) if isinstance(word, bytes) else word for word in words
    )
    return call(number, *values)


@need("programs_32bit")
@pytest.mark.parametrize(
    ("width", "name"),
    [
        (width, name)
        for width, times in _TIMES.items()
        for name in times
        if name in TABLES[_ARCHITECTURE[width]]
    ],
)
def test_times_by_the_path_of_a_descriptor_are_those_that_the_call_says(
    site: Site, width: int, name: str
) -> None:
    with shared_file(site) as shared:
        ran = Ran()
        act = partial(_set_times, width, name, _TIMES[width][name])
        assert in_guest(site.pool, site.root("web"), act, ran=ran) == (0, 0)
        assert not ran.notes
        status = shared.web.stat()
        assert (status.st_atime_ns // 10**9, status.st_mtime_ns // 10**9) == (500, 600)
        assert status.st_mtime_ns % 10**9 == (0 if name == "utime" else 7000)
        assert not shared.web.samefile(shared.object)


@pytest.mark.parametrize("ns", [-1, 10**9])
def test_times_that_do_not_exist_are_refused(site: Site, ns: int) -> None:
    times = struct.pack("=4q", 500, 0, 600, ns)
    act = partial(_set_times, 64, "utimensat", times)
    with shared_file(site) as shared:
        assert in_guest(site.pool, site.root("web"), act) == (-1, errno.EINVAL)
        assert shared.web.samefile(shared.object)


@pytest.mark.parametrize("is_by_descriptor", [True, False])
def test_a_negative_length_is_refused(site: Site, is_by_descriptor: bool) -> None:
    def act() -> tuple[int, int]:
        fd = os.open("/conf", os.O_RDONLY)
        path = b"/proc/self/fd/%d" % fd if is_by_descriptor else b"/conf"
        text = ctypes.create_string_buffer(path)
        return call(TABLES_NATIVE["truncate"], ctypes.addressof(text), -1)

    with shared_file(site) as shared:
        ran = Ran()
        assert in_guest(site.pool, site.root("web"), act, ran=ran) == (-1, errno.EINVAL)
        assert shared.web.samefile(shared.object)
        assert not ran.notes


def _through_descriptors() -> dict[str, object]:
    fd = os.open("/conf", os.O_RDONLY | os.O_APPEND)
    os.read(fd, 10)
    before = os.fstat(fd).st_ino
    os.fchmod(fd, 0o640)
    os.fchown(fd, 3, 4)
    os.utime(fd, ns=(1, 2))
    os.setxattr(fd, "user.k", b"v")
    status = os.fstat(fd)
    return {
        "swapped": before != status.st_ino,
        "mode": status.st_mode & 0o7777,
        "owner": (status.st_uid, status.st_gid),
        "mtime": status.st_mtime_ns,
        "xattr": os.getxattr("/conf", "user.k"),
        "position": os.lseek(fd, 0, os.SEEK_CUR),
        "append": bool(_flags_of(fd) & os.O_APPEND),
        "cloexec": not os.get_inheritable(fd),
        "name": os.readlink(f"/proc/self/fd/{fd}"),
        "rest": os.read(fd, 5),
    }


def _flags_of(fd: int) -> int:
    with open(f"/proc/self/fdinfo/{fd}") as info:
        return int(next(line for line in info if line.startswith("flags")).split()[1], 8)


def test_a_descriptor_shows_the_private_copy_afterwards(site: Site) -> None:
    with shared_file(site) as shared:
        found = in_guest(site.pool, site.root("web"), _through_descriptors)
        assert found == {
            "swapped": True,
            "mode": 0o640,
            "owner": (3, 4),
            "mtime": 2,
            "xattr": b"v",
            "position": 10,
            "append": True,
            "cloexec": True,
            "name": "/conf",
            "rest": CONTENT[10:15],
        }
        assert shared.is_untouched()
        assert shared.object.stat().st_mode & 0o7777 == 0o644


def _after_unlink() -> tuple[int, int, bytes]:
    fd = os.open("/conf", os.O_RDONLY)
    os.unlink("/conf")
    os.fchmod(fd, 0o600)
    status = os.fstat(fd)
    return status.st_mode & 0o7777, status.st_nlink, os.read(fd, 4)


def test_a_descriptor_of_a_deleted_file(site: Site) -> None:
    with shared_file(site) as shared:
        assert in_guest(site.pool, site.root("web"), _after_unlink) == (0o600, 0, CONTENT[:4])
        assert shared.is_untouched()
        assert shared.object.stat().st_mode & 0o7777 == 0o644


def _with_no_descriptor_left() -> int:
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    os.closerange(3, 100)
    return _errno_of(lambda: os.open("/conf", os.O_WRONLY | os.O_TRUNC))


def test_a_file_is_not_cut_where_no_descriptor_can_be_had(site: Site) -> None:
    with shared_file(site) as shared:
        root = site.root("web")

        def act() -> int:
            pid = os.fork()
            if pid == 0:
                os._exit(_with_no_descriptor_left())
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

        assert in_guest(site.pool, root, act) == errno.EMFILE
        assert shared.web.samefile(shared.object)
