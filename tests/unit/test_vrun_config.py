"""A guest's folder becomes a GuestSpec: every key counts, is warned of, or is a named mistake."""

import platform
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fixtures.guestconfig import MINIMAL, Configuration, Keys, configure
from vrun.config import load_spec
from vrun.errors import ConfigInvalid, WrongUsage
from vrun.spec import Device, GuestSpec, Mount, Sysctl
from vstore.guest import tree_guest
from vstore.record import names_of


@pytest.fixture
def etc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configuration:
    return configure(tmp_path, monkeypatch)


def differing(spec: GuestSpec, other: GuestSpec) -> set[str]:
    """The fields that are not equal."""
    return {name for name in names_of(GuestSpec) if getattr(spec, name) != getattr(other, name)}


# --- the whole of it


def test_a_folder_with_nothing_but_vdir_has_the_defaults_of_the_record(etc: Configuration) -> None:
    spec = etc.spec_of({})
    bare = GuestSpec(name="web", root=etc.vdirbase / "web")
    assert differing(spec, bare) == {"config", "display_name", "hostname"}
    assert (spec.config, spec.display_name, spec.hostname) == (etc.confdir / "web", "web", "web")


def test_the_minimal_guest_of_the_documentation(etc: Configuration) -> None:
    spec = etc.spec_of(MINIMAL)
    assert (spec.xid, spec.hostname, spec.network) == (1001, "web", "bound")
    [address] = spec.addresses
    assert (str(address.ip), address.prefix, address.device) == ("10.0.0.5", 24, "eth0")
    assert (spec.init.style, spec.init.pid_one) == ("plain", True)
    assert (spec.init.marks, spec.init.depends) == (("default",), ("db",))
    assert [mount.fstype for mount in spec.mounts] == ["proc", "tmpfs", "devpts"]
    assert spec.warnings == ()


EVERY_KEY: list[tuple[str, Keys]] = [
    ("name", {"name": "Web server"}),
    ("context", {"context": "1001"}),
    ("ncontext", {"ncontext": "1001"}),
    ("noncontext", {"noncontext": True}),
    ("tag", {"tag": "7"}),
    ("nice", {"nice": "5"}),
    ("ionice/class", {"ionice/class": "3"}),
    ("ionice/priority", {"ionice/priority": "7"}),
    ("personality", {"personality": "LINUX32\nUNAME26"}),
    ("shell", {"shell": "/bin/zsh -l"}),
    ("badness", {"badness": "100"}),
    ("bcapabilities", {"bcapabilities": "NET_RAW"}),
    ("ccapabilities", {"ccapabilities": "~utsname"}),
    ("cflags", {"cflags": "nproc"}),
    ("flags", {"flags": "nproc"}),
    ("nflags", {"nflags": "lback_allow"}),
    ("ncapabilities", {"ncapabilities": "tun_create"}),
    ("umask", {"umask": "newuser"}),
    ("capabilities", {"capabilities": "CAP_NET_RAW"}),
    ("nonamespace", {"nonamespace": True}),
    ("nonamespace-cleanup", {"nonamespace-cleanup": True}),
    ("namespace-cleanup-skip", {"namespace-cleanup-skip": "/srv"}),
    ("fstab", {"fstab": "/srv /srv none bind 0 0"}),
    ("fstab.local", {"fstab.local": "/srv /srv none bind 0 0"}),
    ("fstab.remote", {"fstab.remote": "nfs:/a /a nfs ro 0 0"}),
    ("schedule", {"schedule": "1\n4\n100\n10\n200\n0", "cflags": "sched_hard"}),
    ("noisy", {"noisy": True}),
    ("hostname", {"hostname": "web"}),
    ("domainname", {"domainname": "nis"}),
    ("keepfds", {"keepfds": True}),
    ("uts/sysname", {"uts/sysname": "Linus"}),
    ("uts/nodename", {"uts/nodename": "www"}),
    ("uts/release", {"uts/release": "2.6.32"}),
    ("uts/version", {"uts/version": "#1"}),
    ("uts/machine", {"uts/machine": "i686"}),
    ("uts/domainname", {"uts/domainname": "nis"}),
    ("uts/context", {"uts/context": "/etc/vservers/web"}),
    ("sysctl", {"sysctl/0/setting": "kernel.shmmax", "sysctl/0/value": "1000"}),
    ("style", {"apps/init/style": "plain"}),
    ("runlevel", {"apps/init/runlevel": "2"}),
    ("runlevel.start", {"apps/init/runlevel.start": "2"}),
    ("runlevel.stop", {"apps/init/runlevel.stop": "0"}),
    ("cmd.start", {"apps/init/cmd.start": "/sbin/go"}),
    ("cmd.stop", {"apps/init/cmd.stop": "/sbin/go"}),
    ("cmd.start-sync", {"apps/init/cmd.start-sync": "/sbin/go"}),
    ("cmd.stop-sync", {"apps/init/cmd.stop-sync": "/sbin/go"}),
    ("cmd.prepare", {"apps/init/cmd.prepare": "/sbin/go"}),
    ("sync", {"apps/init/sync": True}),
    ("killseq", {"apps/init/killseq": "15 30 9"}),
    ("mtab", {"apps/init/mtab": "/dev/root / ext4 rw 0 0"}),
    ("tty", {"apps/init/tty": Path("/dev/null")}),
    ("mark", {"apps/init/mark": "default"}),
    ("depends", {"apps/init/depends": "db"}),
    ("environment", {"apps/init/environment": "A=1"}),
    ("vdevmap", {"apps/vdevmap/0/open": True, "apps/vdevmap/0/device": "/dev/fuse"}),
    ("vshelper/sync-timeout", {"apps/vshelper/sync-timeout": "5"}),
    ("vshelper/action", {"apps/vshelper/action": "sync"}),
    ("vshelper/disabled", {"apps/vshelper/disabled": True}),
    ("vshelper/debug", {"apps/vshelper/debug": True}),
    ("vshelper/EVENT", {"apps/vshelper/restart": "not a program"}),
    ("pkgmgmt", {"apps/pkgmgmt/style": "debian"}),
    ("interfaces/N", {"interfaces/0/ip": "10.0.0.5", "interfaces/0/nodev": True}),
    ("interfaces/lback", {"interfaces/lback": "127.9.0.1"}),
    ("interfaces/extip", {"interfaces/extip": "192.0.2.1"}),
    ("ulimits", {"ulimits/nofile": "1024"}),
    ("rlimits", {"rlimits/rss": "1000"}),
    ("sched", {"sched/fill-rate": "1"}),
    ("dlimits", {"dlimits/0/directory": "/srv"}),
    ("cpuset", {"cpuset/name": "web", "cpuset/cpus": "0"}),
    ("cpuset/virtualized", {"cpuset/virtualized": "1"}),
    ("cgroup", {"cgroup/cpu.shares": "512"}),
    ("cgroup/name", {"cgroup/name": "webs"}),
    ("spaces/net", {"spaces/net": True}),
    ("spaces/pid", {"spaces/pid": "other"}),
    ("spaces/mask", {"spaces/mask": "0x40000000"}),
    ("netns", {"netns/name": "blue"}),
    ("scripts", {"scripts/pre-start.d/10-x": "true"}),
]


ALL_KEYS = {key for _, keys in EVERY_KEY for key in keys} | {
    f"{folder}/{key}"
    for folder, keys in {
        "interfaces": "dev prefix mask bcast scope gateway vlandev",
        "interfaces/0": "ip dev prefix mask bcast name scope peer gateway vlandev tun uid",
        "netns/interfaces/0": "host guest type",
        "spaces": "net pid mask",
        "sched": "fill-rate interval tokens-max priority-bias",
        "rlimits": "nproc rss.hard as.soft",
        "ulimits": "core.soft core.hard nproc",
        "cpuset": "cpus mems name cpu_exclusive",
        "dlimits/0": "directory space_total inodes_total reserved",
        "sysctl/0": "setting value",
        "apps/vdevmap/0": "device open remap target",
    }.items()
    for key in keys.split()
}


@pytest.mark.parametrize("keys", [pytest.param(keys, id=name) for name, keys in EVERY_KEY])
def test_no_key_is_ignored_in_silence(etc: Configuration, keys: Keys) -> None:
    bare = GuestSpec(
        name="web",
        root=etc.vdirbase / "web",
        config=etc.confdir / "web",
        display_name="web",
        hostname="web",
    )
    assert etc.spec_of(keys) != bare


@pytest.mark.parametrize(
    "key",
    ["namespace", "namespace-cleanup", "disabled", "nocgroup", "nonetns", "apps/vunify/exclude"],
)
def test_a_key_that_asks_for_what_is_so_anyway_is_no_reason_to_warn(
    etc: Configuration, key: str
) -> None:
    assert etc.spec_of({key: True}).warnings == ()


def test_a_tree_that_is_no_guest_has_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(WrongUsage, match="no configured guest"):
        load_spec(tree_guest(tmp_path))


# --- values that cannot be meant: file, line and key are named


MISTAKES: list[tuple[Keys, str]] = [
    ({"context": "abc"}, r"/web/context:1: 'abc' is no number"),
    ({"context": "1"}, r"/web/context:1: 1 is not in the range 2 to 49151"),
    ({"context": "49152"}, r"/web/context:1: 49152 is not in the range"),
    ({"ncontext": "-3"}, r"/web/ncontext:1: -3 is not in the range"),
    ({"tag": "65535"}, r"/web/tag:1"),
    ({"nice": "20"}, r"/web/nice:1: 20 is not in the range -20 to 19"),
    ({"ionice/class": "4"}, r"/web/ionice/class:1: 4 is not in the range 0 to 3"),
    ({"ionice/class": "fast"}, r"/web/ionice/class:1: 'fast' is no number"),
    ({"ionice/priority": "8"}, r"/web/ionice/priority:1"),
    ({"personality": "PER_DOS"}, r"/web/personality:1: 'PER_DOS' is no type"),
    ({"personality": "LINUX\n# ok\nFAST"}, r"/web/personality:3: 'fast' is no flag"),
    ({"badness": "lots"}, r"/web/badness:1: 'lots' is no number"),
    ({"shell": "/bin/sh 'x"}, r"/web/shell:1: .* is no command"),
    ({"uts/nodename": "two words"}, r"/web/uts/nodename:1: 'two words' is no name"),
    ({"uts/nodename": "x" * 65}, r"/web/uts/nodename:1: the name is longer than 64 bytes"),
    ({"uts/nodename": "a\x1b[m"}, r"/web/uts/nodename:1"),
    ({"bcapabilities": "NET_RAW\n\nFLY"}, r"/web/bcapabilities:3: 'FLY' is no capability"),
    ({"ccapabilities": "x"}, r"/web/ccapabilities:1: 'x' is no context capability"),
    ({"cflags": "# a\nlock,fast"}, r"/web/cflags:2: 'fast' is no context flag"),
    ({"nflags": "x"}, r"/web/nflags:1: 'x' is no network flag"),
    ({"ncapabilities": "x"}, r"/web/ncapabilities:1: 'x' is no network capability"),
    ({"umask": "x"}, r"/web/umask:1: 'x' is no namespace"),
    ({"fstab": "proc /proc"}, r"/web/fstab:1: has 2 fields"),
    ({"fstab": "\nproc proc proc"}, r"/web/fstab:2: 'proc' is no place inside the guest"),
    ({"fstab": "/a /b/../../etc none bind"}, r"/web/fstab:1: '/b/../../etc' is no place"),
    ({"fstab": "/a /b none bind 0 x"}, r"/web/fstab:1: the sixth field"),
    ({"sysctl/0/setting": "kernel.sem"}, r"/web/sysctl/0/value: is missing"),
    ({"sysctl/0/value": "1"}, r"/web/sysctl/0/setting: is missing"),
    ({"apps/vdevmap/0/open": True}, r"/web/apps/vdevmap/0/device: is missing"),
    ({"apps/vdevmap/0/device": "/etc/passwd"}, r"/device:1: '/etc/passwd' is no path below /dev"),
    ({"apps/vdevmap/0/device": "/dev/../etc"}, r"/device:1: '/dev/../etc' is no path below /dev"),
    (
        {
            "apps/vdevmap/0/device": "/dev/a",
            "apps/vdevmap/0/open": True,
            "apps/vdevmap/0/remap": True,
        },
        r"/web/apps/vdevmap/0/target: is missing",
    ),
    ({"name": False}, r"/web/name: is no file"),
    ({"uts": "web"}, r"/web/uts: is no directory"),
    ({"context": b"10\x0001"}, r"/web/context: holds a NUL byte"),
]


@pytest.mark.parametrize(("keys", "message"), MISTAKES)
def test_a_mistake_is_named_with_its_file_and_line(
    etc: Configuration, keys: Keys, message: str
) -> None:
    etc.add_guest("web", keys)
    with pytest.raises(ConfigInvalid, match=message):
        etc.spec()


# --- whatever is in them


TEXTS = st.one_of(
    st.binary(max_size=40),
    st.text("09afx-+~!^,:./= \n\r#kM\t", max_size=20).map(str.encode),
    st.sampled_from(["1", "0", "inf", "10.0.0.5", "::1", "all", "eth0.7", "/dev/x", "web"]).map(
        str.encode
    ),
)


@settings(max_examples=300, deadline=None)
@given(chosen=st.dictionaries(st.sampled_from(sorted(ALL_KEYS)), TEXTS, min_size=1, max_size=4))
def test_whatever_a_file_holds_is_a_spec_or_a_named_mistake(chosen: dict[str, bytes]) -> None:
    complete: Keys = {"interfaces/0/ip": "10.0.0.5", "interfaces/dev": "eth0", **chosen}
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        etc = configure(Path(folder), monkeypatch)
        said = message_or_spec(etc, complete)
        assert isinstance(said, GuestSpec) or said.startswith(f"{etc.confdir}/web/")


def message_or_spec(etc: Configuration, keys: Keys) -> str | GuestSpec:
    try:
        return etc.spec_of(keys)
    except ConfigInvalid as error:
        return error.message


# --- single keys


@pytest.mark.parametrize(
    ("text", "value"), [("31", 31), ("0x1f", 31), ("037", 31), ("+7", 7), ("  9  ", 9)]
)
def test_numbers_are_written_as_in_c(etc: Configuration, text: str, value: int) -> None:
    assert etc.spec_of({"context": text}).xid == value


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"ionice/class": "1", "ionice/priority": "2"}, (1, 2)),
        ({"ionice/class": "2"}, (2, 4)),
        ({"ionice/class": "idle", "ionice/priority": "2"}, (3, 0)),
        ({"ionice/priority": "0"}, (2, 0)),
        ({"ionice": False}, None),
    ],
)
def test_a_priority_alone_means_best_effort(
    etc: Configuration, keys: Keys, expected: tuple[int, int] | None
) -> None:
    assert etc.spec_of(keys).ionice == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("LINUX", 0),
        ("PER_LINUX32", 0x8),
        ("linux_32bit", 0x0800000),
        ("LINUX32_3GB", 0x8000008),
        ("LINUX\nUNAME26,ADDR_LIMIT_3GB", 0x8020000),
        ("LINUX32\nUNAME26\n# no\nSHORT_INODE", 0x1020008),
    ],
)
def test_personality_is_a_type_and_flags(etc: Configuration, text: str, value: int) -> None:
    spec = etc.spec_of({"personality": text})
    assert (spec.personality, spec.warnings) == (value, ())


def test_a_personality_of_another_system_is_named(etc: Configuration) -> None:
    spec = etc.spec_of({"personality": "SVR4\nMMAP_PAGE_ZERO"})
    assert spec.personality == 0x0100000
    assert spec.warnings == (f"{etc.confdir}/web/personality: SVR4: means nothing to this kernel",)


@pytest.mark.parametrize(("text", "value"), [("5000", 1000), ("-2000", -1000), ("17", 17)])
def test_badness_is_brought_into_the_kernels_range(
    etc: Configuration, text: str, value: int
) -> None:
    spec = etc.spec_of({"badness": text})
    assert spec.oom_score_adj == value
    assert bool(spec.warnings) == (text != "17")


def test_the_old_host_name_counts_where_the_new_one_is_missing(etc: Configuration) -> None:
    spec = etc.spec_of({"hostname": "old", "domainname": "old", "uts/domainname": "new"})
    assert (spec.hostname, spec.domainname) == ("old", "new")
    assert [line.rpartition("/")[2] for line in spec.warnings] == [
        "nodename",
        "domainname",
    ]


def test_a_32_bit_machine_is_a_personality(etc: Configuration) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("not an x86_64 machine")
    spec = etc.spec_of({"uts/machine": "i686", "personality": "LINUX\nUNAME26"})
    assert (spec.personality, spec.warnings) == (0x20008, ())


@pytest.mark.parametrize(
    ("keys", "shell"),
    [
        ({"shell": "/bin/zsh -l"}, ("/bin/zsh", "-l")),
        ({"shell": "'/opt/my shell' -x"}, ("/opt/my shell", "-x")),
        ({}, ("/bin/ash",)),
    ],
)
def test_the_shell_is_the_guests_else_the_common_one(
    etc: Configuration, keys: Keys, shell: tuple[str, ...]
) -> None:
    etc.set_defaults({"shell": "/bin/ash"})
    assert etc.spec_of(keys).shell == shell


def test_a_line_of_the_fstab_may_hold_blanks_and_leave_fields_out(etc: Configuration) -> None:
    spec = etc.spec_of(
        {
            "fstab": "# comment\n"
            "/srv/my\\040files\t/mnt//a\\040b/ none  bind,dev 0 2\n"
            "tmpfs /run tmpfs\n"
            "/dev/sda2 none swap sw 0 0\n"
            "/dev/cdrom /cdrom iso9660 ro,noauto 0 0\n"
            "/dev/sdb1 / ext4 noatime 0 1",
            "fstab.local": "x /x proc",
            "fstab.remote": "nfs:/home /home nfs ro",
        }
    )
    where = f"{etc.confdir}/web/fstab"
    assert spec.mounts == (
        Mount("/srv/my files", "/mnt/a b", "none", ("bind", "dev"), 2, False, f"{where}:2"),
        Mount("tmpfs", "/run", "tmpfs", ("defaults",), 0, False, f"{where}:3"),
        Mount("/dev/sdb1", "/", "ext4", ("noatime",), 1, False, f"{where}:6"),
        Mount("x", "/x", "proc", ("defaults",), 0, False, f"{where}.local:1"),
        Mount("nfs:/home", "/home", "nfs", ("ro",), 0, True, f"{where}.remote:1"),
    )
    assert spec.warnings == (f"{where}.local: is obsolete; its lines belong into fstab",)


@pytest.mark.parametrize(
    ("setting", "path"),
    [
        ("kernel.shmmax", "kernel/shmmax"),
        ("kernel/sem", "kernel/sem"),
        ("fs.mqueue.msg_max", "fs/mqueue/msg_max"),
    ],
)
def test_a_setting_that_the_guest_has_for_itself_is_made(
    etc: Configuration, setting: str, path: str
) -> None:
    spec = etc.spec_of({"sysctl/0/setting": setting, "sysctl/0/value": "1 2 3 4"})
    assert spec.sysctls == (Sysctl(path, "1 2 3 4", f"{etc.confdir}/web/sysctl/0/setting:1"),)
    assert spec.warnings == ()


@pytest.mark.parametrize(
    "setting", ["kernel.panic", "vm.swappiness", "net.ipv4.ip_forward", "kernel/../vm/x", "kernel"]
)
def test_a_setting_that_would_change_the_host_is_not_made(etc: Configuration, setting: str) -> None:
    spec = etc.spec_of({"sysctl/0/setting": setting, "sysctl/0/value": "1"})
    assert spec.sysctls == ()
    assert "a guest has no value of its own" in spec.warnings[0]


@pytest.mark.parametrize(
    ("setting", "path"),
    [
        ("net.ipv4.ip_forward", "net/ipv4/ip_forward"),
        ("net.ipv4.conf.eth0/100.forwarding", "net/ipv4/conf/eth0.100/forwarding"),
        ("net/ipv4/conf/eth0.100/forwarding", "net/ipv4/conf/eth0.100/forwarding"),
    ],
)
def test_a_network_of_its_own_has_settings_of_its_own(
    etc: Configuration, setting: str, path: str
) -> None:
    keys: Keys = {"spaces/net": True, "sysctl/0/setting": setting, "sysctl/0/value": "1"}
    assert [made.setting for made in etc.spec_of(keys).sysctls] == [path]


def test_a_path_out_of_the_settings_is_refused_even_there(etc: Configuration) -> None:
    keys: Keys = {"spaces/net": True, "sysctl/0/setting": "net/../vm/x", "sysctl/0/value": "1"}
    assert etc.spec_of(keys).sysctls == ()


def test_a_device_is_the_hosts_or_another_in_its_place(etc: Configuration) -> None:
    spec = etc.spec_of(
        {
            "apps/vdevmap/fuse/device": "/dev/fuse",
            "apps/vdevmap/fuse/open": True,
            "apps/vdevmap/disk/device": "/dev/hdv1",
            "apps/vdevmap/disk/open": True,
            "apps/vdevmap/disk/create": True,
            "apps/vdevmap/disk/remap": True,
            "apps/vdevmap/disk/target": "/dev/vda3",
            "apps/vdevmap/seen/device": "/dev/null",
            "apps/vdevmap/seen/flags": "1",
        }
    )
    assert spec.devices == (
        Device("disk", Path("/dev/hdv1"), Path("/dev/vda3")),
        Device("fuse", Path("/dev/fuse"), Path("/dev/fuse")),
    )
    assert [line.split(": ")[0].rpartition("/web/")[2] for line in spec.warnings] == [
        "apps/vdevmap/disk/create",
        "apps/vdevmap/seen/flags",
        "apps/vdevmap/seen/open",
    ]


@pytest.mark.parametrize(("text", "count"), [("1001", 0), ("1002", 1)])
def test_a_network_number_is_named_where_it_is_another(
    etc: Configuration, text: str, count: int
) -> None:
    spec = etc.spec_of({"context": "1001", "ncontext": text})
    assert (spec.nid, len(spec.warnings)) == (int(text), count)


# --- .defaults


def test_a_wish_for_all_guests_that_cannot_be_had_is_named_unless_one_takes_it_back(
    etc: Configuration,
) -> None:
    defaults = etc.set_defaults({"nonamespace": True, "keepfds": True, "capabilities": "x"})
    etc.add_guest("one")
    etc.add_guest("other", {"namespace": True})
    assert [line.split(": ")[0] for line in etc.spec("one").warnings] == [
        f"{defaults}/keepfds",
        f"{defaults}/nonamespace",
    ]
    assert [line.split(": ")[0] for line in etc.spec("other").warnings] == [f"{defaults}/keepfds"]


def test_run_state_at_an_own_place_is_named(etc: Configuration) -> None:
    folder = etc.add_guest("web")
    (folder / "run").unlink()
    (folder / "run").write_text("1001\n")
    [warning] = etc.spec().warnings
    assert f"{folder}/run: is no symlink and not used" in warning


def test_the_record_cannot_be_changed(etc: Configuration) -> None:
    spec = etc.spec_of({})
    with pytest.raises(AttributeError, match="xid cannot be changed"):
        spec.xid = 5  # type: ignore[misc]  # that is what is tried
    assert hash(spec) == hash(etc.spec())
