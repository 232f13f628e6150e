"""An old-style NAME.conf is run by a shell, and its variables become the same GuestSpec."""

import resource
from ipaddress import IPv4Address, ip_address
from pathlib import Path

import pytest

from tests.fixtures.guestconfig import Configuration, configure
from tests.fixtures.vservers import is_alive, wait_until
from vrun import legacy
from vrun.errors import ConfigInvalid
from vrun.spec import Address, Network, Rlimit

INFINITE = resource.RLIM_INFINITY

GENERATED = """\
if [ "$PROFILE" = "" ] ; then
\tPROFILE=prod
fi
# Select the IP number assigned to the virtual server
case $PROFILE in
prod)
\tIPROOT=10.0.0.5
\t#IPROOTDEV=eth0
\tS_HOSTNAME=
\t;;
backup)
\tIPROOT=10.0.0.6
\tS_HOSTNAME=spare
\t;;
esac
#ONBOOT=yes
S_DOMAINNAME=
S_NICE=
S_FLAGS="lock nproc"
ULIMIT="-HS -u 1000"
S_CAPS=""
#S_CONTEXT=
"""
"""As the original's `build` wrote it."""


@pytest.fixture
def etc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configuration:
    monkeypatch.delenv("PROFILE", raising=False)
    return configure(tmp_path, monkeypatch)


# --- how the file is run


def test_a_file_as_the_original_made_it(etc: Configuration) -> None:
    config = etc.add_old_guest("web", GENERATED)
    spec = etc.spec()
    assert (spec.name, spec.config, spec.root) == ("web", config, etc.vdirbase / "web")
    assert (spec.xid, spec.hostname, spec.domainname) == (None, None, None)
    assert (spec.nice, spec.nice_is_relative) == (0, True)
    assert {"lock", "nproc"} < spec.flags
    assert (spec.rlimits, spec.limits.pids_max) == ((), 1000)
    [address] = spec.addresses
    assert (str(address.ip), address.device, address.label) == ("10.0.0.5", None, None)
    assert (spec.init.style, spec.init.marks, spec.init.priority) == ("sysv", (), 100)
    assert [mount.fstype for mount in spec.mounts] == ["proc", "devpts"]
    assert spec.warnings == ()


@pytest.mark.parametrize(
    ("given", "inherited", "seen", "host"),
    [
        (None, None, "prod", None),
        ("backup", None, "backup", "spare"),
        (None, "backup", "backup", "spare"),
        ("", "backup", "prod", None),
        ("other", None, "other", None),
    ],
)
def test_the_profile_chooses_in_the_file(
    etc: Configuration,
    monkeypatch: pytest.MonkeyPatch,
    given: str | None,
    inherited: str | None,
    seen: str,
    host: str | None,
) -> None:
    etc.add_old_guest("web", GENERATED)
    if inherited:
        monkeypatch.setenv("PROFILE", inherited)
    spec = etc.spec(profile=given)
    assert (spec.profile, spec.hostname) == (seen, host)
    assert dict(spec.init.environment)["PROFILE"] == seen


def test_the_callers_environment_does_not_reach_the_file(
    etc: Configuration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("S_CONTEXT", "77")
    monkeypatch.setenv("BASH_ENV", "/nowhere")
    monkeypatch.setenv("SECRET", "x")
    etc.add_old_guest("web", "S_HOSTNAME=host${SECRET}\nIPROOT=0.0.0.0")
    assert (etc.spec().xid, etc.spec().hostname) == (None, "host")


def test_the_file_may_compute(etc: Configuration) -> None:
    etc.add_old_guest(
        "web7",
        'number=${1#web}\nS_CONTEXT=$((1000 + number))\nS_HOSTNAME=$(echo "$1" | tr a-z A-Z)\n'
        'for n in 1 2; do IPROOT="$IPROOT 10.0.$number.$n"; done\n'
        'test -z "$NOTHING" || S_HOSTNAME=wrong\n[ $2 = stop ] && S_HOSTNAME=wrong',
    )
    spec = etc.spec("web7")
    assert (spec.xid, spec.hostname) == (1007, "WEB7")
    assert [str(address.ip) for address in spec.addresses] == ["10.0.7.1", "10.0.7.2"]


def test_the_ends_of_its_lines_do_not_matter(etc: Configuration) -> None:
    etc.add_old_guest("web", GENERATED.replace("\n", "\r\n").encode().rstrip())
    assert [str(address.ip) for address in etc.spec().addresses] == ["10.0.0.5"]


def test_what_the_file_says_is_shown(etc: Configuration) -> None:
    config = etc.add_old_guest("web", "echo hello\nIPROOT=10.0.0.5\nno-such-program\nS_NICE=3")
    spec = etc.spec()
    assert spec.nice == 3
    assert spec.warnings[0] == f"{config}: says: hello"
    assert spec.warnings[1].startswith(f"{config}: says: {config}: line 3: no-such-program")
    assert len(spec.warnings) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case x in\nprod) IPROOT=1", r"web\.conf: cannot be read by .*/web\.conf: line"),
        ("IPROOT=10.0.0.5\nexit 3", r"web\.conf: ends the shell that reads it, with status 3"),
        ("IPROOT=10.0.0.5\n kill -9 $$", r"web\.conf: ends the shell .* with status -9"),
    ],
)
def test_a_file_that_is_no_fragment_is_named(etc: Configuration, text: str, message: str) -> None:
    etc.add_old_guest("web", text)
    with pytest.raises(ConfigInvalid, match=message):
        etc.spec()


def test_a_file_that_does_not_end_is_ended_with_all_it_started(
    etc: Configuration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(legacy, "_TIMEOUT_S", 5)  # the shell has begun by then
    etc.add_old_guest("web", f"sleep 600 & echo $! > {tmp_path}/pid\nwait")
    with pytest.raises(ConfigInvalid, match=r"web\.conf: still runs after 5 s"):
        etc.spec()
    pid = int((tmp_path / "pid").read_text())
    wait_until(lambda: not is_alive(pid))


# --- its variables


@pytest.mark.parametrize(
    ("iproot", "network"),
    [("", "free"), ("0.0.0.0", "free"), ("ALL", "free"), ("10.0.0.5", "bound")],  # noqa: S104
)
def test_no_address_or_all_of_them_is_no_restriction(
    etc: Configuration, iproot: str, network: Network
) -> None:
    etc.add_old_guest("web", f"IPROOT={iproot}\nIPROOTDEV=lo")
    assert etc.spec().network == network
    assert bool(etc.spec().addresses) == (network == "bound")


def test_addresses_have_devices_masks_and_labels(etc: Configuration) -> None:
    etc.add_old_guest(
        "web",
        'IPROOT="10.0.0.5 eth1:10.0.0.6/255.255.255.0 eth0.231:10.0.0.7/30"\n'
        "IPROOTDEV=eth0\nIPROOTMASK=255.255.0.0\nIPROOTBCAST=10.0.255.255",
    )
    broadcast = IPv4Address("10.0.255.255")
    assert etc.spec().addresses == (
        Address(
            entry="0",
            ip=ip_address("10.0.0.5"),
            prefix=16,
            device="eth0",
            label="eth0:web",
            broadcast=broadcast,
        ),
        Address(
            entry="1",
            ip=ip_address("10.0.0.6"),
            prefix=24,
            device="eth1",
            label="eth1:web1",
            broadcast=broadcast,
        ),
        Address(
            entry="2",
            ip=ip_address("10.0.0.7"),
            prefix=30,
            device="eth0.231",
            label="eth0.231:web2",
            broadcast=broadcast,
            vlan=True,
        ),
    )


@pytest.mark.parametrize(("device", "prefix"), [("lo", 8), ("none0", 32), ("", 32)])
def test_a_mask_that_stands_nowhere_is_the_devices(
    etc: Configuration, device: str, prefix: int
) -> None:
    etc.add_old_guest("web", f"IPROOT=10.0.0.5\nIPROOTDEV={device}")
    assert etc.spec().addresses[0].prefix == prefix


def test_a_label_is_cut_to_what_the_kernel_takes(etc: Configuration) -> None:
    etc.add_old_guest("a-very-long-name", 'IPROOT="10.0.0.5 10.0.0.6"\nIPROOTDEV=eth0')
    labels = [address.label for address in etc.spec("a-very-long-name").addresses]
    assert labels == ["eth0:a-very-lon", "eth0:a-very-lo1"]


@pytest.mark.parametrize(
    ("ulimit", "limits"),
    [
        ("", ()),
        ("-HS -n 1024", ((resource.RLIMIT_NOFILE, 1024, 1024),)),
        ("-n 1024", ((resource.RLIMIT_NOFILE, 1024, 1024),)),
        ("-Sn 1024", ((resource.RLIMIT_NOFILE, 1024, None),)),
        (
            "-H -n 1024 -c 0",
            ((resource.RLIMIT_NOFILE, None, 1024), (resource.RLIMIT_CORE, None, 0)),
        ),
        ("-v 1000", ((resource.RLIMIT_AS, 1_024_000, 1_024_000),)),
        ("-t unlimited", ((resource.RLIMIT_CPU, INFINITE, INFINITE),)),
        ("-u 100", ((resource.RLIMIT_NPROC, 100, 100),)),
        ("2048", ((resource.RLIMIT_FSIZE, 1 << 20, 1 << 20),)),
    ],
)
def test_ulimit_is_read_as_the_shell_does(
    etc: Configuration, ulimit: str, limits: tuple[tuple[int, int | None, int | None], ...]
) -> None:
    etc.add_old_guest("web", f'ULIMIT="{ulimit}"')
    found = etc.spec().rlimits
    assert tuple((limit.resource, limit.soft, limit.hard) for limit in found) == limits
    assert all(isinstance(limit, Rlimit) for limit in found)


def test_a_limit_that_the_kernel_gave_up_is_named(etc: Configuration) -> None:
    config = etc.add_old_guest("web", 'ULIMIT="-m 1000 -n 5"')
    spec = etc.spec()
    assert [limit.name for limit in spec.rlimits] == ["nofile"]
    assert spec.warnings == (f"{config}: ULIMIT: -m: the kernel does not limit it",)


@pytest.mark.parametrize(
    ("ulimit", "most"), [("-u 200", 200), ("-S -u 50", 50), ("-u unlimited", None), ("-n 9", None)]
)
def test_with_nproc_the_guest_is_counted_as_a_whole(
    etc: Configuration, ulimit: str, most: int | None
) -> None:
    etc.add_old_guest("web", f'S_FLAGS="nproc"\nULIMIT="{ulimit}"')
    assert etc.spec().limits.pids_max == most
    assert not any(limit.name == "nproc" for limit in etc.spec().rlimits)


def test_words_names_and_numbers(etc: Configuration) -> None:
    config = etc.add_old_guest(
        "web",
        'S_CAPS="CAP_NET_RAW !CAP_SYS_CHROOT"\nS_FLAGS="lock sched fakeinit"\nS_CONTEXT=77\n'
        "S_HOSTNAME=web.example.org\nS_DOMAINNAME=none\nS_NICE=-5\nONBOOT=yes\nPRIORITY=20",
    )
    spec = etc.spec()
    assert "NET_RAW" in spec.capabilities
    assert "SYS_CHROOT" not in spec.capabilities
    assert (spec.xid, spec.hostname, spec.domainname) == (77, "web.example.org", "(none)")
    assert (spec.nice, spec.nice_is_relative) == (-5, True)
    assert (spec.init.style, spec.init.pid_one) == ("plain", True)
    assert (spec.init.marks, spec.init.priority) == (("default",), 20)
    assert dict(spec.init.environment)["HOSTNAME"] == "web.example.org"
    [warning] = spec.warnings
    assert warning.startswith(f"{config}: S_FLAGS: sched: ")


@pytest.mark.parametrize(
    ("inittab", "runlevel"),
    [
        ("# x\nid:2:initdefault:\nsi::sysinit:/etc/init.d/rcS\n", "2"),
        ("#id:5:initdefault:\nid:3:initdefault:", "3"),
        ("l3:3:wait:/etc/rc.d/rc 3\n", None),
        (None, None),
    ],
)
def test_the_runlevel_is_that_of_the_guests_inittab(
    etc: Configuration, inittab: str | None, runlevel: str | None
) -> None:
    etc.add_old_guest("web", "IPROOT=")
    if inittab is not None:
        (etc.vdirbase / "web/etc").mkdir()
        (etc.vdirbase / "web/etc/inittab").write_text(inittab)
    assert etc.spec().init.runlevel_start == runlevel


def test_an_inittab_that_leads_out_of_the_guest_is_looked_for_inside(
    etc: Configuration, tmp_path: Path
) -> None:
    etc.add_old_guest("web", "IPROOT=")
    (tmp_path / "inittab").write_text("id:5:initdefault:")
    (etc.vdirbase / "web/etc").mkdir()
    (etc.vdirbase / "web/etc/inittab").symlink_to(tmp_path / "inittab")
    assert etc.spec().init.runlevel_start is None


def test_a_program_beside_the_file_is_its_hook(etc: Configuration) -> None:
    etc.add_old_guest("web", "IPROOT=", hook="true")
    etc.add_old_guest("mail", "IPROOT=", hook="true")
    (etc.confdir / "mail.sh").chmod(0o644)
    assert etc.spec().scripts.hook == etc.confdir / "web.sh"
    assert etc.spec("mail").scripts.hook is None
    assert "mail.sh: cannot be executed" in etc.spec("mail").warnings[0]


def test_a_folder_that_is_marked_legacy_gives_way_to_the_file(etc: Configuration) -> None:
    etc.add_guest("web", {"legacy": True, "context": "5", "apps/vshelper/action": "sync"})
    etc.add_old_guest("web", "S_CONTEXT=77")
    assert etc.spec().xid == 77
    assert etc.spec().helper.action == "sync"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("IPROOT=10.0.0.", r"web\.conf: IPROOT: '10\.0\.0\.' is no IP address"),
        ('IPROOT="10.0.0.5 10.0.0.5"', r"web\.conf: IPROOT: '10\.0\.0\.5' is no address .* twice"),
        ("IPROOT=10.0.0.5/255.0.255.0", r"web\.conf: IPROOT: '255\.0\.255\.0' is no network mask"),
        ("IPROOT=10.0.0.5\nIPROOTMASK=x", r"web\.conf: IPROOTMASK: 'x' is no network mask"),
        ("IPROOT=10.0.0.5\nIPROOTBCAST=x", r"web\.conf: IPROOTBCAST: 'x' is no IP address"),
        ("IPROOT=10.0.0.5\nIPROOTBCAST=::1", r"web\.conf: IPROOTBCAST: ::1 is no IPv4 address"),
        ("IPROOT=10.0.0.5\nIPROOTDEV='a b'", r"web\.conf: IPROOTDEV: 'a b' is no network device"),
        ("S_CONTEXT=1", r"web\.conf: S_CONTEXT: 1 is not in the range 2 to 49151"),
        ("S_NICE=high", r"web\.conf: S_NICE: 'high' is no number"),
        ("S_FLAGS=fast", r"web\.conf: S_FLAGS: 'fast' is no context flag"),
        ("S_FLAGS=minit", r"web\.conf: S_FLAGS: minit is not offered"),
        ("S_CAPS=CAP_FLY", r"web\.conf: S_CAPS: 'CAP_FLY' is no capability"),
        ("S_HOSTNAME='a b'", r"web\.conf: S_HOSTNAME: 'a b' is no name"),
        ("ULIMIT='-q 5'", r"web\.conf: ULIMIT: -q is no option of ulimit"),
        ("ULIMIT='-n \"'", r"web\.conf: ULIMIT: .* cannot be split"),
        ("ULIMIT='-n lots'", r"web\.conf: ULIMIT: 'lots' is no number"),
        ("PRIORITY=1000", r"web\.conf: PRIORITY: 1000 is not in the range 0 to 999"),
    ],
)
def test_a_mistake_is_named_with_its_variable(etc: Configuration, text: str, message: str) -> None:
    etc.add_old_guest("web", text)
    with pytest.raises(ConfigInvalid, match=message):
        etc.spec()
