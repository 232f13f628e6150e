"""Configurations of fifteen years ago are started as they are, and do what they say."""

import itertools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.fixtures.guestconfig import Keys, write_program
from tests.fixtures.probes import need
from tests.fixtures.vservers import (
    Host,
    grow_busybox,
    host_for_guests,
    kill,
)

pytestmark = need("root")

_RC: Final = """\
echo rc $1 $PREVLEVEL >>/etc/rc.log
case $1 in
3) setsid sleep 1000 >/dev/null 2>&1 & until pidof sleep; do :; done ;;
6) kill $(pidof sleep) ;;
esac
"""
_numbers = itertools.count(1 + os.getpid() % 200)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    yield from host_for_guests(tmp_path, monkeypatch)


@pytest.fixture
def network() -> Iterator[str]:
    """The beginning of addresses of which the loopback device has none, before and after."""
    start = f"10.77.{next(_numbers)}"
    yield start
    assert _addresses(start) == []


def _addresses(start: str) -> list[str]:
    """What ip(8) shows of the addresses that begin like this."""
    shown = subprocess.run(["ip", "-4", "addr", "show", "lo"], capture_output=True, text=True)
    return [line.strip() for line in shown.stdout.splitlines() if f"inet {start}." in line]


def _add_tree(host: Host, name: str) -> Path:
    """A tree whose rc scripts start one daemon."""
    root = host.etc.vdirbase / name
    grow_busybox(root)
    (root / "bin/pidof").symlink_to("busybox")
    write_program(root / "etc/init.d/rc", _RC)
    (root / "etc/inittab").write_text("id:3:initdefault:\n")
    return root


def _old_keys(host: Host, network: str) -> Keys:
    """What stood in a guest's folder, with one line end or another."""
    return {
        "name": "web",
        "nice": "5",
        "fstab": b"none\t/proc\t\tproc\tdefaults\t\t0 0\n"
        b"none\t/tmp\t\ttmpfs\tsize=16m,mode=1777\t0 0\n"
        b"none\t/dev/pts\tdevpts\tgid=5,mode=620\t\t0 0\n# /dev/vg/h\xf6me /home ext3 noauto 0 2",
        "bcapabilities": "CAP_NET_RAW\n~KILL\n",
        "ccapabilities": "RAW_ICMP\nUTSNAME",
        "flags": b"lock\r\nvirt_uptime\r\nnproc\r\nsched_hard\r\nsched_prio\r\nfakeinit",
        "nflags": "hide_netif",
        "uts/nodename": "www.example.com",
        "uts/domainname": "(none)",
        "uts/machine": "i686",
        "schedule": "30\n100\n200\n100\n500\n5\n",
        "interfaces/dev": "lo",
        "interfaces/prefix": "32",
        "interfaces/bcast": f"{network}.255",
        "interfaces/0/ip": f"{network}.9",
        "interfaces/0/name": "web",
        "interfaces/10/ip": f"{network}.10",
        "interfaces/2/ip": f"{network}.2",
        "interfaces/2/disabled": True,
        "rlimits/rss.hard": "50K",
        "rlimits/nproc.hard": "200",
        "rlimits/as": "100000",
        "ulimits/nofile": "4096",
        "ulimits/core.soft": "0",
        "apps/init/mark": "default",
        "apps/init/tty": Path("/dev/null"),
        "apps/pkgmgmt/style": "debian",
        "apps/vunify/hash": False,
        "cpuset": False,
        "scripts/pre-start.d/10-note": f"touch {host.logdir}.pre-start-$1-$2",
        "scripts/pre-start.d/10-note~": "exit 1",
        "dlimits/0/directory": "/vservers/web",
        "dlimits/0/space_total": "1000000",
        "dlimits/0/inodes_total": "100000",
        "dlimits/0/reserved": "5",
        "ionice/class": "2",
        "ionice/priority": "5",
        "shell": "/bin/sh",
    }


def test_a_folder_with_all_that_was_usual(host: Host, network: str) -> None:
    root = _add_tree(host, "web")
    host.etc.set_defaults({"vdirbase": host.etc.vdirbase, "cachebase": host.etc.rundir / "cache"})
    link = host.etc.confdir / ".defaults/vdirbase/web"
    host.add("web", link, _old_keys(host, network))
    done = host.vserver("web", "start")
    warned = [line for line in done.stderr.splitlines() if "/conf/web/" in line]
    named = ("nflags:1: hide_netif", "flags: fakeinit", "flags:5: sched_prio")
    for word in (*named, "schedule: is obsolete", "dlimits/0: ", "rlimits/as: ", "apps/pkgmgmt: "):
        assert any(f"/conf/web/{word}" in line for line in warned), word
    assert (host.logdir.parent / "log.pre-start-pre-start-web").exists()
    look = (
        "hostname; ulimit -n; cut -d' ' -f19 /proc/self/stat; uname -m; "
        "grep CapBnd /proc/self/status; cat /etc/rc.log"
    )
    said = host.inside("web", "sh", "-c", look)
    hostname, files, nice, machine, capabilities, log = said.splitlines()
    assert (hostname, files, nice, machine) == ("www.example.com", "4096", "5", "i686")
    assert int(capabilities.split()[1], 16) & (1 << 13 | 1 << 5) == 1 << 13
    assert log == "rc 3 N"
    assert [line.split()[1] for line in _addresses(network)] == [
        f"{network}.9/32",
        f"{network}.10/32",
    ]
    assert _addresses(network)[0].endswith(f"brd {network}.255 scope global lo:web")
    host.vserver("web", "stop")
    assert (root / "etc/rc.log").read_text().splitlines() == ["rc 3 N", "rc 6 3"]


_OLD_FILE: Final = """\
# Shop, f\xfcr Kunden
if [ "$PROFILE" = "" ] ; then
        PROFILE=prod
fi
IPROOTMASK=255.255.255.255
IPROOTDEV=lo
ONBOOT=yes
S_NICE=
S_FLAGS="lock nproc"
ULIMIT="-HS -u 300"
S_CAPS="CAP_NET_RAW"
case $PROFILE in
prod)
        IPROOT="@NET@.20 lo:@NET@.21/255.255.255.254"
        S_HOSTNAME=shop.example.com
        ;;
backup)
        IPROOT=@NET@.22
        S_HOSTNAME=shop-backup
        ;;
esac
"""


def test_an_old_file_with_a_profile_and_hooks(host: Host, network: str) -> None:
    _add_tree(host, "shop")
    text = _OLD_FILE.replace("@NET@", network).encode("latin-1")
    notes = host.logdir.parent / "phases"
    host.etc.add_old_guest("shop", text, hook=f'echo "$1 $2" >>{notes}')
    host.names.append("shop")
    host.vserver("shop", "start")
    assert host.inside("shop", "hostname") == "shop.example.com\n"
    assert [line.split()[1:] for line in _addresses(network)] == [
        [f"{network}.20/32", "scope", "global", "lo:shop"],
        [f"{network}.21/31", "scope", "global", "lo:shop1"],
    ]
    host.vserver("--profile", "backup", "shop", "restart")
    assert host.inside("shop", "hostname") == "shop-backup\n"
    assert [line.split()[1] for line in _addresses(network)] == [f"{network}.22/32"]
    host.vserver("shop", "stop")
    phases = ["pre-start", "post-start", "pre-stop", "post-stop"]
    assert notes.read_text().splitlines() == [f"{phase} shop" for phase in phases * 2]


def test_a_monitor_that_takes_over_reads_the_profile_that_was_started(host: Host) -> None:
    _add_tree(host, "shop")
    text = "case $PROFILE in backup) S_HOSTNAME=shop;; *) exit 3;; esac\n"
    host.etc.add_old_guest("shop", text)
    host.names.append("shop")
    host.vserver("--profile", "backup", "shop", "start")
    kill(host.monitor_pid("shop"))
    assert host.vserver("shop", "stop").stderr == ""
