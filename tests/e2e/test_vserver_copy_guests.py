"""The configuration that comes along, and guests that run: moved with a short pause."""

import json
import os
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Tool
from tests.fixtures.filesystems import Site, is_immutable
from tests.fixtures.probes import need, on
from tests.fixtures.sshd import PROGRAM, run_sshd
from tests.fixtures.trees import COPY_MAY_DIFFER, File, differences, snapshot
from tests.fixtures.vservers import Host, host_for_guests
from tests.fixtures.windows import wait_for

pytestmark = [need("root", "immutable", "lease"), on("ext4")]

_HOSTS = "127.0.0.1 localhost\n10.0.0.5 web.example web\n10.0.0.55 webster\n"
_INTERFACES = "iface eth0 inet static\n  address 10.0.0.5\n  gateway 10.0.0.1\n"


def _add(site: Site) -> None:
    site.add_guest(
        "web",
        [
            File("etc/hostname", b"web.example\n"),
            File("etc/hosts", _HOSTS.encode()),
            File("etc/network/interfaces", _INTERFACES.encode()),
            File("etc/other", b"web.example 10.0.0.5\n"),
        ],
    )
    for path, text in {
        "context": "1234\n",
        "uts/nodename": "web.example\n",
        "interfaces/dev": "eth0\n",
        "interfaces/0/ip": "10.0.0.5\n",
        "interfaces/0/prefix": "24\n",
        "apps/init/mark": "default\n",
        "bcapabilities": "NET_RAW\n",
        "scripts/pre-start": "#!/bin/sh\n",
    }.items():
        site.configure("web", path, text)


def _copy(tool: Tool, *arguments: str, code: int = 0) -> str:
    done = tool("vserver-copy", *arguments)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def _key(site: Site, name: str, key: str) -> str:
    return (site.confdir / name / key).read_text().strip()


def test_a_copy_beside_its_source_needs_numbers_of_its_own(site: Site, tool: Tool) -> None:
    _add(site)
    assert "--context" in _copy(tool, "web", "new", code=2)
    assert "10.0.0.5" in _copy(tool, "--context", "auto", "web", "new", code=2)
    assert not site.root("new").exists()
    assert sorted(path.name for path in site.confdir.iterdir()) == ["web"]


def test_name_addresses_and_context_are_changed_also_in_the_guest(site: Site, tool: Tool) -> None:
    _add(site)
    said = _copy(
        tool,
        *("-q", "--context", "auto", "--hostname", "shop.example", "--interface"),
        *("eth1:10.0.0.9/25", "web", "shop"),
    )
    assert "scripts/pre-start" in said
    assert int(_key(site, "shop", "context")) >= 40000
    assert _key(site, "shop", "uts/nodename") == "shop.example"
    assert _key(site, "shop", "interfaces/0/ip") == "10.0.0.9"
    assert _key(site, "shop", "interfaces/0/prefix") == "25"
    assert _key(site, "shop", "interfaces/0/dev") == "eth1"
    assert _key(site, "shop", "bcapabilities") == "NET_RAW"
    assert not (site.confdir / "shop/apps/init/mark").exists()
    assert not (site.confdir / "shop/scripts").exists() or not list(
        (site.confdir / "shop/scripts").iterdir()
    )
    assert (site.confdir / "shop/vdir").readlink() == site.root("shop")
    root = site.root("shop")
    assert (root / "etc/hostname").read_text() == "shop.example\n"
    wanted = _HOSTS.replace("10.0.0.5 web.example web", "10.0.0.9 shop.example shop")
    assert (root / "etc/hosts").read_text() == wanted
    assert "address 10.0.0.9\n" in (root / "etc/network/interfaces").read_text()
    assert (root / "etc/other").read_text() == "web.example 10.0.0.5\n"
    assert "nothing to do" in tool("vserver-copy", "--refresh", "web", "shop").stdout


@pytest.mark.parametrize("is_unified", [False, True])
def test_what_has_more_names_is_changed_in_the_guest_too(
    site: Site, tool: Tool, *, is_unified: bool
) -> None:
    """Names of one inode, of which another comes first; or an object of the pool."""
    _add(site)
    hosts = site.root("web") / "etc/hosts"
    if is_unified:
        site.add_guest("twin", [File("etc/hosts", _HOSTS.encode())])
        for name in ("web", "twin"):
            site.configure(name, "apps/vunify/exclude", "+/etc/*\n")
        assert tool("vunify", "web", "twin").returncode == 0
        assert is_immutable(hosts)
    else:
        for name in ("etc/also", "bin", "srv"):
            (site.root("web") / name).hardlink_to(hosts)
    before = snapshot(site.root("web"))
    _copy(tool, *("-q", "--context", "auto", "--ip", "10.0.0.9", "web", "shop"))
    after = snapshot(site.root("shop"))
    wanted = _HOSTS.replace("10.0.0.5 ", "10.0.0.9 ")
    assert (site.root("shop") / "etc/hosts").read_text() == wanted
    others = (b"bin", b"etc/also", b"srv")
    assert [after[path].digest for path in others if path in after] == [
        before[path].digest for path in others if path in before
    ]
    if not is_unified:
        assert after[b"srv"].group == others
    assert "nothing to do" in tool("vserver-copy", "--refresh", "web", "shop").stdout


def test_an_old_style_guest_stays_one(site: Site, tool: Tool) -> None:
    (site.vdirbase / "mail").mkdir()
    (site.vdirbase / "mail" / "file").write_text("mail")
    conf = 'S_HOSTNAME="mail"\nIPROOT="eth0:10.0.0.7/24 10.0.0.8"\nONBOOT="yes"\nS_CONTEXT=77\n'
    (site.confdir / "mail.conf").write_text(conf)
    options = ["--ip", "10.1.0.7", "--ip", "10.1.0.8/16", "--context", "78", "--hostname", "post"]
    _copy(tool, "-q", *options, "mail", "post")
    text = (site.confdir / "post.conf").read_text()
    assert 'S_HOSTNAME="post"' in text
    assert 'IPROOT="eth0:10.1.0.7/24 10.1.0.8/16"' in text
    assert 'ONBOOT="no"' in text
    assert 'S_CONTEXT="78"' in text
    assert (site.root("post") / "file").read_text() == "mail"


def _add_old_style(site: Site, name: str, conf: str) -> None:
    site.root(name).mkdir()
    (site.confdir / f"{name}.conf").write_text(conf)


def test_comments_of_an_old_style_guest_hide_nothing(site: Site, tool: Tool) -> None:
    conf = "S_HOSTNAME=mail # who\nIPROOT='10.0.0.7' # where\nONBOOT=yes # when\nS_CONTEXT=77 #\n"
    _add_old_style(site, "mail", conf)
    assert "context 77 belongs to guest mail" in _copy(tool, "mail", "post", code=2)
    options = ["--context", "78", "--hostname", "post"]
    assert "10.0.0.7 belongs to guest mail" in _copy(tool, *options, "mail", "post", code=2)
    _copy(tool, "-q", *options, "--ip", "10.0.0.8", "mail", "post")
    wanted = 'S_HOSTNAME="post" # who\nIPROOT="10.0.0.8" # where\nONBOOT="no" # when\n'
    assert (site.confdir / "post.conf").read_text() == f'{wanted}S_CONTEXT="78" #\n'


def test_all_addresses_of_the_host_belong_to_nobody_alone(site: Site, tool: Tool) -> None:
    for name in ("mail", "post"):
        _add_old_style(site, name, 'IPROOT="0.0.0.0"\n')
    _copy(tool, "-q", "mail", "third")
    _copy(tool, "-q", "--ip", "10.0.0.8", "mail", "fourth")
    assert 'IPROOT="10.0.0.8"' in (site.confdir / "fourth.conf").read_text()


def test_an_address_is_taken_in_whichever_way_it_is_written(site: Site, tool: Tool) -> None:
    _add(site)
    site.configure("web", "interfaces/0/ip", "2001:DB8:0::5\n")
    said = _copy(tool, "--context", "auto", "--ip", "2001:db8::5/64", "web", "new", code=2)
    assert "2001:db8::5 belongs to guest web" in said


def test_what_the_guest_calls_itself_is_changed_where_its_configuration_has_no_name(
    site: Site, tool: Tool
) -> None:
    _add(site)
    (site.confdir / "web/uts/nodename").unlink()
    options = ["-q", "--context", "auto", "--ip", "10.0.0.9"]
    _copy(tool, *options, "--hostname", "shop", "web", "shop")
    root = site.root("shop")
    assert _key(site, "shop", "uts/nodename") == "shop"
    assert (root / "etc/hostname").read_text() == "shop\n"
    wanted = "127.0.0.1 localhost\n10.0.0.9 shop shop\n10.0.0.55 webster\n"
    assert (root / "etc/hosts").read_text() == wanted
    assert (root / "etc/other").read_text() == "web.example 10.0.0.5\n"
    assert "nothing to do" in tool("vserver-copy", "--refresh", "web", "shop").stdout


@pytest.mark.parametrize("text", ["localhost\n", "", "two names\n", "-x\n", "/etc\n"])
def test_what_is_no_name_of_the_guest_is_left(site: Site, tool: Tool, text: str) -> None:
    _add(site)
    (site.confdir / "web/uts/nodename").unlink()
    (site.root("web") / "etc/hostname").write_text(text)
    options = ["-q", "--context", "auto", "--ip", "10.0.0.9"]
    _copy(tool, *options, "--hostname", "shop", "web", "shop")
    root = site.root("shop")
    assert (root / "etc/hostname").read_text() == text
    assert (root / "etc/hosts").read_text() == _HOSTS.replace("10.0.0.5 ", "10.0.0.9 ")


def test_a_name_is_not_read_through_a_symlink_out_of_the_guest(site: Site, tool: Tool) -> None:
    _add(site)
    (site.confdir / "web/uts/nodename").unlink()
    (site.vdirbase / "outside").write_text("web\n")
    path = site.root("web") / "etc/hostname"
    path.unlink()
    path.symlink_to("../../outside")
    options = ["-q", "--context", "auto", "--ip", "10.0.0.9"]
    _copy(tool, *options, "--hostname", "shop", "web", "shop")
    wanted = _HOSTS.replace("10.0.0.5 ", "10.0.0.9 ")
    assert (site.root("shop") / "etc/hosts").read_text() == wanted


@pytest.mark.parametrize("owned", [(), ("rundir",), ("rundir", "vdirbase", "confdir")])
def test_who_may_not_copy_is_told_so(site: Site, owned: tuple[str, ...]) -> None:
    """Who can read all, since the program may lie in a folder that is root's."""
    _add(site)
    site.rundir.mkdir(exist_ok=True)
    for name in owned:
        os.chown(getattr(site, name), 65534, 65534)
    may_read = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
    nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", *may_read]
    command = [*nobody, f"{PROGRAM}", "--context", "auto", "--ip", "10.0.0.9", "web", "new"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 6, done.stderr
    assert "run as root" in done.stderr
    assert not site.root("new").exists()


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_copy_is_made_whatever_the_caller_has_closed(site: Site, tool: Tool, closed: str) -> None:
    _add(site)
    options = ["--context", "auto", "--ip", "10.0.0.9", "web", "new"]
    command = f"exec {PROGRAM} {shlex.join(options)} {closed}"
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert "copy new" in done.stdout or ">&-" in closed.split()
    assert "nothing to do" in tool("vserver-copy", "--refresh", "web", "new").stdout


def test_a_loopback_address_belongs_to_nobody_alone(site: Site, tool: Tool) -> None:
    _add(site)
    site.configure("web", "interfaces/0/ip", "127.0.0.3\n")
    site.configure("web", "interfaces/1/ip", "::1\n")
    _copy(tool, "-q", "--context", "auto", "web", "new")
    assert _key(site, "new", "interfaces/0/ip") == "127.0.0.3"


def _copy_on_host_with(address: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """vserver-copy on a machine that has this one address."""
    setup = f"ip address add {address} dev lo && exec {PROGRAM} {shlex.join(arguments)}"
    return subprocess.run(
        ["unshare", "--net", "sh", "-c", setup],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def test_an_address_that_the_machine_has_itself_is_refused(site: Site) -> None:
    _add(site)
    options = ["-q", "--context", "auto", "--ip", "10.0.0.9/24"]
    done = _copy_on_host_with("10.0.0.9/25", *options, "web", "new")
    assert done.returncode == 2
    assert "address 10.0.0.9 is this machine's own, on lo" in done.stderr
    assert "--interface DEV:A/P, or take it from" in done.stderr
    assert "ip address del 10.0.0.9/25 dev lo" in done.stderr
    assert not site.root("new").exists()
    done = _copy_on_host_with("10.0.0.5/24", "--context=auto", "web", "new")
    assert "10.0.0.5 belongs to guest web" in done.stderr  # which runs, and has it there
    assert _copy_on_host_with("10.0.0.8/24", *options, "web", "new").returncode == 0


def test_a_device_that_is_asked_for_is_one_to_add_the_address_to(site: Site, tool: Tool) -> None:
    _add(site)
    site.configure("web", "interfaces/0/nodev", "")
    _copy(tool, "-q", "--context", "auto", "--interface", "eth1:10.0.0.9/24", "web", "new")
    assert _key(site, "new", "interfaces/0/dev") == "eth1"
    assert not (site.confdir / "new/interfaces/0/nodev").exists()


@pytest.mark.parametrize(
    "options", [["--ip", "nonsense"], ["--context", "1"], ["--hostname", "a b"], ["--bwlimit", "x"]]
)
def test_values_that_cannot_be_are_refused(site: Site, tool: Tool, options: list[str]) -> None:
    _add(site)
    _copy(tool, *options, "web", "new", code=2)
    assert not site.root("new").exists()


@pytest.mark.parametrize("kind", ["file", "folder", "symlink"])
def test_a_setting_whose_name_cannot_travel_is_named(site: Site, tool: Tool, kind: str) -> None:
    _add(site)
    path = site.confdir / "web" / os.fsdecode(b"caf\xe9")
    if kind == "file":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("context")
    assert "its name is no UTF-8" in _copy(tool, "web", "new", code=7)


def test_a_guest_of_many_addresses_is_copied(site: Site, tool: Tool) -> None:
    _add(site)
    for number in range(1, 400):
        site.configure(
            "web", f"interfaces/{number:03}/ip", f"10.1.{number // 250}.{number % 250}\n"
        )
    asked = [f"--ip=10.2.{number // 250}.{number % 250}" for number in range(400)]
    _copy(tool, "-q", "--context", "auto", *asked, "web", "new")
    assert _key(site, "new", "interfaces/399/ip") == "10.2.1.149"


def test_a_configuration_too_large_to_travel_is_refused(site: Site, tool: Tool) -> None:
    _add(site)
    for number in range(5):
        site.configure("web", f"backup/{number}", "x" * (1 << 20))
    assert f"{site.confdir}/web: has 5" in _copy(tool, "web", "new", code=7)
    assert not site.root("new").exists()


@pytest.fixture
def host(site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    folder = site.filesystem.folder / "host"
    folder.mkdir()
    yield from host_for_guests(folder, monkeypatch)


@need("cgroup_freezer")
def test_a_guest_that_runs_is_moved_and_its_downtime_said(host: Host, tool: Tool) -> None:
    source = host.add_busybox("web")
    host.vserver("web", "start")
    host.names.append("new")
    done = tool("vserver-copy", "--json", "--stop", "--start", "--context", "auto", "web", "new")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert 0 < report["downtime_seconds"] < 60
    assert report["bytes_already_there"] + report["bytes_lacking"] == report["bytes_total"]
    host.vserver("web", "running", code=1)
    host.vserver("new", "running")
    assert host.inside("new", "hostname").strip() == "web"
    host.vserver("new", "stop")
    found = differences(
        snapshot(source), snapshot(host.etc.vdirbase / "new"), ignoring=COPY_MAY_DIFFER
    )
    assert [line for line in found if "mtime" not in line] == []


@need("cgroup_freezer")
def test_who_interrupts_the_last_pass_is_told_that_the_guest_is_stopped(
    host: Host, tool: Tool
) -> None:
    root = host.add_busybox("web")
    (root / "large").write_bytes(os.urandom(4 << 20))
    host.vserver("web", "start")
    host.names.append("new")
    options = ["--stop", "--hostname", "shop", "--context", "auto", "--bwlimit", "4M"]
    with subprocess.Popen(
        [PROGRAM, "-q", *options, "web", "new"], stderr=subprocess.PIPE, text=True
    ) as copying:
        wait_for(lambda: any(host.etc.vdirbase.glob("new.copy-*")))
        (root / "later").mkdir()
        (root / "later/large").write_bytes(os.urandom(20 << 20))
        wait_for((host.etc.confdir / "new").exists)
        wait_for(lambda: any(host.etc.vdirbase.glob("new.copy-*/arrived/part-*")))
        copying.send_signal(signal.SIGINT)
        said = copying.communicate()[1]
    assert copying.returncode == 130
    assert "guest web was stopped, and nothing else was done to it; go on with --refresh" in said
    done = tool("vserver-copy", *options, "--refresh", "web", "new")
    assert done.returncode == 0, done.stderr
    host.vserver("web", "start")


@need("cgroup_freezer")
def test_the_last_pass_does_not_warn_of_what_the_first_has_done(host: Host, tool: Tool) -> None:
    log = host.add_busybox("web") / "log"
    host.vserver("web", "start")
    host.names.append("new")
    with subprocess.Popen(["sh", "-c", f"while :; do date +%s%N >{log}; sleep 0.01; done"]) as date:
        try:
            options = ["-q", "--stop", "--hostname", "shop", "--context", "auto"]
            assert _copy(tool, *options, "web", "new") == ""
        finally:
            date.kill()
    assert (host.etc.confdir / "new/uts/nodename").read_text() == "shop\n"


@need("cgroup_freezer", "sshd")
def test_stop_and_start_reach_the_machine_that_the_guest_is_on(host: Host, tool: Tool) -> None:
    """Over ssh, to this same machine: pulled from where it runs, then pushed to where it is to."""
    host.add_busybox("web")
    host.vserver("web", "start")
    host.names += ["near", "far"]
    folder = host.etc.vdirbase.parent / "sshd"
    places = ("CONFDIR", "VDIRBASE", "RUNDIR")
    words = [f"VSERVER_{key}={os.environ[f'VSERVER_{key}']}" for key in places]
    with run_sshd(folder) as server:
        reach: list[str | Path] = ["-p", f"{server.port}", "-i", server.key, "-F", os.devnull]
        reach += ["--known-hosts", server.known_hosts()]
        reach += ["--remote-command", f"env {shlex.join(words)} {PROGRAM}"]
        move = [*reach, "--json", "--stop", "--start", "--context", "auto"]
        pulled = tool("vserver-copy", *move, "127.0.0.1:web", "near")
        assert pulled.returncode == 0, pulled.stderr
        assert 0 < json.loads(pulled.stdout)["downtime_seconds"] < 120
        host.vserver("web", "running", code=1)
        host.vserver("near", "running")
        assert host.inside("near", "hostname").strip() == "web"
        pushed = tool("vserver-copy", *move, "near", "127.0.0.1:far")
        assert pushed.returncode == 0, pushed.stderr
        host.vserver("near", "running", code=1)
        host.vserver("far", "running")
        assert not (host.etc.confdir / "far/apps/init/mark").exists()
        host.vserver("far", "stop")
        (host.etc.vdirbase / "far/bin").rename(host.etc.vdirbase / "far/elsewhere")
        failing = tool("vserver-copy", *reach, "--start", "--refresh", "far", "127.0.0.1:near")
        assert failing.returncode == 1
        assert "the copy is there, but cannot be started" in failing.stderr


@need("cgroup_freezer")
def test_a_target_that_runs_is_refused(host: Host, tool: Tool) -> None:
    host.add_busybox("web")
    _copy(tool, "-q", "--context", "auto", "web", "new")
    host.names.append("new")
    host.vserver("new", "start")
    before = (host.etc.vdirbase / "new").stat().st_ino
    assert "runs here" in _copy(tool, "--refresh", "web", "new", code=4)
    assert (host.etc.vdirbase / "new").stat().st_ino == before


def test_an_address_that_no_start_adds_may_be_the_machines(site: Site) -> None:
    _add(site)
    site.configure("web", "interfaces/0/nodev", "")
    options = ["-q", "--context", "auto", "--ip", "10.0.0.9/24", "web", "new"]
    assert _copy_on_host_with("10.0.0.9/24", *options).returncode == 0
    options[3:5] = ["--interface", "eth1:10.0.0.9/24"]
    assert _copy_on_host_with("10.0.0.9/24", *options[:-1], "two").returncode == 2
