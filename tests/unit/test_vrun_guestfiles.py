"""A new guest's configuration is written whole or not at all, with a number that nobody has."""

import os
import resource
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fixtures.guestconfig import Configuration, configure, write_keys
from vrun import xids
from vrun.errors import ConfigInvalid, NotPermitted, ToolError, WrongUsage
from vrun.guestfiles import FSTAB, Interface, NewGuest, parse_interface, write_guest
from vrun.xids import allocate_xid, check_xid, configured_xids


@pytest.fixture
def etc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configuration:
    return configure(tmp_path, monkeypatch)


@pytest.fixture
def root(etc: Configuration) -> Path:
    path = etc.vdirbase / "web"
    path.mkdir()
    return path


def content(folder: Path) -> dict[str, str]:
    """Files with their text, symlinks with their targets; empty folders with a slash."""
    found = {}
    for path in folder.rglob("*"):
        name = os.fspath(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file():
            found[name] = path.read_text()
        elif not any(path.iterdir()):
            found[f"{name}/"] = ""
    return found


# --- files


def test_without_options_there_are_links_a_name_and_an_fstab(
    etc: Configuration, root: Path
) -> None:
    assert write_guest(NewGuest(name="web", root=root)) == ()
    assert content(etc.confdir / "web") == {
        "name": "web\n",
        "fstab": FSTAB,
        "vdir": f"-> {root}",
        "run": f"-> {etc.rundir}/web",
        "cache": "-> /var/cache/vservers/web",
        "apps/init/": "",
        "cpuset/": "",
        "interfaces/": "",
        "uts/": "",
    }
    spec = etc.spec()
    assert (spec.xid, spec.addresses, spec.cpuset, spec.warnings) == (None, (), None, ())


def test_every_option_is_written_and_read_again(etc: Configuration, root: Path) -> None:
    notices = write_guest(
        NewGuest(
            name="web",
            root=root,
            xid=1001,
            hostname="web.example.org",
            net_device="eth0",
            net_mask="255.255.0.0",
            net_prefix="16",
            net_broadcast="10.0.255.255",
            interfaces=("lan=eth1:10.0.0.5/24", "10.0.0.6", "nodev:10.0.0.7/255.255.255.0"),
            flags=("lock,nproc", "virt_mem"),
            init_style="systemd",
            cpuset="webs",
            cpuset_cpus="0-3:1",
            cpuset_mems="0",
            cpuset_virtual=True,
            run_link=Path("/elsewhere/web"),
        )
    )
    assert notices == ()
    found = content(etc.confdir / "web")
    del found["fstab"], found["vdir"], found["cache"]
    assert found == {
        "name": "web\n",
        "context": "1001\n",
        "uts/nodename": "web.example.org\n",
        "interfaces/dev": "eth0\n",
        "interfaces/mask": "255.255.0.0\n",
        "interfaces/prefix": "16\n",
        "interfaces/bcast": "10.0.255.255\n",
        "interfaces/0/name": "lan\n",
        "interfaces/0/dev": "eth1\n",
        "interfaces/0/ip": "10.0.0.5\n",
        "interfaces/0/prefix": "24\n",
        "interfaces/1/ip": "10.0.0.6\n",
        "interfaces/2/ip": "10.0.0.7\n",
        "interfaces/2/prefix": "24\n",
        "interfaces/2/nodev": "",
        "cflags": "lock\nnproc\nvirt_mem\n",
        "apps/init/style": "systemd\n",
        "cpuset/name": "webs\n",
        "cpuset/cpus": "0-3\n",
        "cpuset/cpu_exclusive": "1\n",
        "cpuset/mems": "0\n",
        "cpuset/virtualized": "1\n",
        "run": "-> /elsewhere/web",
    }
    spec = etc.spec()
    assert [(str(made.ip), made.device) for made in spec.addresses] == [
        ("10.0.0.5", "eth1"),
        ("10.0.0.6", "eth0"),
        ("10.0.0.7", None),
    ]
    assert spec.init.style == "systemd"


_VALUES = st.one_of(
    st.text(max_size=12),
    st.text("aweb0179.:/-+=~,'\"\\$`\n\t\x1b\udcff", max_size=12),
    st.sampled_from(["web", "10.0.0.5/24", "eth0", "24", "0-3:1", "lock,nproc", "a=b:10.0.0.5"]),
)
_OPTIONS = (
    *("hostname", "net_device", "net_mask", "net_prefix", "net_broadcast", "init_style"),
    *("cpuset", "cpuset_cpus", "cpuset_mems"),
)


@settings(max_examples=300, deadline=None)
@given(
    given_=st.dictionaries(st.sampled_from(_OPTIONS), _VALUES, max_size=3),
    interfaces=st.lists(_VALUES, max_size=2, unique=True),
    flags=st.lists(_VALUES, max_size=1),
)
def test_whatever_an_option_holds_it_becomes_one_value_or_is_refused(
    given_: dict[str, str], interfaces: list[str], flags: list[str]
) -> None:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        etc = configure(Path(folder), monkeypatch)
        (etc.vdirbase / "web").mkdir()
        new = NewGuest(name="web", root=etc.vdirbase / "web", interfaces=tuple(interfaces))
        try:
            write_guest(replace(new, flags=tuple(flags), **given_))  # type: ignore[arg-type]
        except WrongUsage:
            assert list(etc.confdir.iterdir()) == []
            return
        for path, text in content(etc.confdir / "web").items():
            is_list = path in ("fstab", "cflags") or not text
            assert is_list or (text.strip() == text.removesuffix("\n") and "\n" not in text[:-1])
        with suppress(ConfigInvalid):  # two of them do not go together
            etc.spec()


def test_bytes_of_the_common_fstab_that_are_no_text_stay(etc: Configuration, root: Path) -> None:
    text = b"# f\xfcr alle\nnone /proc proc defaults 0 0\n"
    etc.set_defaults({"fstab": text})
    write_guest(NewGuest(name="web", root=root))
    assert (etc.confdir / "web/fstab").read_bytes() == text


@pytest.mark.parametrize("name", ["two\nlines", "two words", "x" * 15])
def test_the_name_of_an_address_is_one_word_whatever_its_device(
    etc: Configuration, root: Path, name: str
) -> None:
    for text, device in ((f"{name}=10.0.0.5", "eth0"), (f"{name}=nodev:10.0.0.5", None)):
        with pytest.raises(WrongUsage, match="--interface"):
            write_guest(NewGuest(name="web", root=root, interfaces=(text,), net_device=device))


def test_an_address_without_a_device_is_only_bound_and_that_is_said(
    etc: Configuration, root: Path
) -> None:
    [notice] = write_guest(NewGuest(name="web", root=root, interfaces=("10.0.0.5/24",)))
    assert notice.startswith("--interface 10.0.0.5/24: names no device")
    assert etc.spec().addresses[0].device is None


def test_the_common_fstab_and_cache_folder_are_used(
    etc: Configuration, root: Path, tmp_path: Path
) -> None:
    etc.set_defaults({"fstab": b"none /proc proc", "cachebase": tmp_path / "cache"})
    write_guest(NewGuest(name="web", root=root))
    found = content(etc.confdir / "web")
    assert (found["fstab"], found["cache"]) == ("none /proc proc", f"-> {tmp_path}/cache/web")


@pytest.mark.parametrize(
    ("text", "interface"),
    [
        ("10.0.0.5", Interface("10.0.0.5", None, None, False, None, None)),
        ("eth0:10.0.0.5", Interface("10.0.0.5", None, "eth0", False, None, None)),
        ("a=eth0:10.0.0.5/1", Interface("10.0.0.5", "a", "eth0", False, None, "1")),
        ("a=10.0.0.5/24", Interface("10.0.0.5", "a", None, False, None, "24")),
        (
            "eth0:10.0.0.5/255.255.248.0",
            Interface("10.0.0.5", None, "eth0", False, "255.255.248.0", None),
        ),
        ("nodev:10.0.0.5", Interface("10.0.0.5", None, None, True, None, None)),
        ("eth0:2001:db8::5/64", Interface("2001:db8::5", None, "eth0", False, None, "64")),
        ("nodev:2001:db8::5", Interface("2001:db8::5", None, None, True, None, None)),
        ("2001:db8::5/64", Interface("2001:db8::5", None, None, False, None, "64")),
    ],
)
def test_an_interface_option_has_up_to_four_parts(text: str, interface: Interface) -> None:
    assert parse_interface(text) == interface


@pytest.mark.parametrize(
    "text",
    [
        *("", "eth0", "eth0:", "eth0:10.0.0", "a/b:10.0.0.5", "10.0.0.5/33", "10.0.0.5/"),
        *("eth0:1.2.3.4/x", "a-long-name-x=eth0:10.0.0.5", "eth0:2001:db8::5/255.255.0.0"),
    ],
)
def test_an_interface_option_that_cannot_be_meant_is_named(text: str) -> None:
    with pytest.raises(ConfigInvalid, match=r"^--interface "):
        parse_interface(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"xid": 1}, r"--context: 1 is not in the range 2 to 49151"),
        ({"hostname": "a b"}, r"--hostname: 'a b' is no name"),
        ({"hostname": "a\nb"}, r"--hostname: "),
        ({"net_device": "eth0:1"}, r"--netdev: 'eth0:1' is no network device"),
        ({"net_mask": "255.0.255.0"}, r"--netmask: "),
        ({"net_prefix": "many"}, r"--netprefix: 'many' is no number"),
        ({"net_broadcast": "all"}, r"--netbcast: 'all' is no IP address"),
        ({"interfaces": ("eth0:x",)}, r"--interface eth0:x: 'x' is no IP address"),
        ({"flags": ("lock", "fast")}, r"--flags: 'fast' is no context flag"),
        ({"init_style": "upstart"}, r"--initstyle: 'upstart' is no init style"),
        ({"cpuset": "../x"}, r"--cpuset: '../x' cannot be"),
        ({"cpuset_cpus": "all"}, r"--cpusetcpus: 'all' is no list"),
        ({"cpuset_mems": "0:2"}, r"--cpusetmems: 2 is not in the range 0 to 1"),
        ({"name": "../etc"}, r"'../etc' cannot be a guest's name"),
    ],
)
def test_an_option_that_cannot_be_meant_leaves_nothing_behind(
    etc: Configuration, root: Path, options: dict[str, object], message: str
) -> None:
    given: dict[str, object] = {"name": "web", "root": root, **options}
    with pytest.raises(WrongUsage, match=message):
        write_guest(NewGuest(**given))  # type: ignore[arg-type]  # a table of single options
    assert list(etc.confdir.iterdir()) == []


def test_a_folder_that_is_there_is_not_touched(etc: Configuration, root: Path) -> None:
    folder = etc.confdir / "web"
    write_keys(folder, {"context": "7"})
    with pytest.raises(WrongUsage, match=r"conf/web: exists already"):
        write_guest(NewGuest(name="web", root=root))
    assert content(folder) == {"context": "7\n"}
    assert list(etc.confdir.iterdir()) == [folder]


def test_a_folder_that_cannot_be_made_is_named(etc: Configuration, root: Path) -> None:
    (etc.confdir / "file").touch()
    with pytest.raises(NotPermitted, match=r"conf/file/web: cannot be made: Not a directory"):
        write_guest(NewGuest(name="web", root=root, config=etc.confdir / "file/web"))


def test_a_disk_that_is_full_leaves_nothing_behind(etc: Configuration, root: Path) -> None:
    hostname = "x" * 64
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (32, limit[1]))  # writing the 33rd byte fails
    try:
        with pytest.raises(NotPermitted, match=r"conf/web: cannot be made: File too large"):
            write_guest(NewGuest(name="web", root=root, hostname=hostname))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert list(etc.confdir.iterdir()) == []


# --- numbers


def test_numbers_begin_at_40000_and_go_on(etc: Configuration) -> None:
    assert [allocate_xid() for _ in range(3)] == [40000, 40001, 40002]
    assert (etc.confdir / ".defaults/context.next").read_text() == "40003\n"


def test_a_number_that_a_guest_has_is_passed_over(etc: Configuration) -> None:
    etc.set_defaults({"context.next": b"100"})
    etc.add_guest("web", {"context": "100"})
    etc.add_guest("off", {"context": "101", "disabled": True})
    etc.add_old_guest("old", "case $PROFILE in\nprod)\n  S_CONTEXT='102'\n;;\nesac")
    etc.add_guest("odd", {"context": "nonsense"})
    etc.add_guest("dynamic")
    (etc.confdir / "README").write_text("hello")
    assert sorted(configured_xids()) == [("off", 101), ("old", 102), ("web", 100)]
    assert [allocate_xid() for _ in range(2)] == [103, 104]


def test_after_the_last_number_free_ones_are_looked_for(etc: Configuration) -> None:
    etc.set_defaults({"context.next": "49151"})
    etc.add_guest("web", {"context": "40000"})
    assert [allocate_xid() for _ in range(2)] == [49151, 40001]


def test_when_all_numbers_are_taken_there_is_none(
    etc: Configuration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xids, "XIDS", range(40000, 40002))
    etc.add_guest("web", {"context": "40000"})
    assert allocate_xid() == 40001
    etc.add_guest("mail", {"context": "40001"})
    with pytest.raises(ToolError, match="all numbers from 40000 to 40001"):
        allocate_xid()


def test_new_guests_may_be_left_without_a_number(etc: Configuration) -> None:
    etc.set_defaults({"context.dynamic": True})
    assert allocate_xid() is None
    assert not (etc.confdir / ".defaults/context.next").exists()


def test_a_next_number_that_is_none_is_named(etc: Configuration) -> None:
    etc.set_defaults({"context.next": "soon"})
    with pytest.raises(ConfigInvalid, match=r"\.defaults/context\.next:1: 'soon' is no number"):
        allocate_xid()


def test_a_number_of_another_guest_is_refused_with_its_name(etc: Configuration) -> None:
    etc.add_guest("web", {"context": "100"})
    check_xid(100, name="web")
    check_xid(101, name="mail")
    with pytest.raises(WrongUsage, match="context 100: belongs to guest web"):
        check_xid(100, name="mail")
    with pytest.raises(WrongUsage, match="context 49152: is not in the range"):
        check_xid(49152, name="mail")


def test_builds_at_the_same_time_get_different_numbers(etc: Configuration) -> None:
    program = "from vrun.xids import allocate_xid\nfor _ in range(25): print(allocate_xid())"
    environment = {**os.environ, **etc.environment}
    running = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment)
        for _ in range(4)
    ]
    numbers = [int(word) for each in running for word in each.communicate()[0].split()]
    assert [each.returncode for each in running] == [0, 0, 0, 0]
    assert sorted(numbers) == list(range(40000, 40100))
