"""The shipped exclude list keeps out what it should, shares what it may, and costs nothing."""

import os
import posixpath

import pytest

from vstore import exclude
from vstore.exclude import Excludes

KEPT_OUT = [
    "/dev",
    "/proc",
    "/sys",
    "/run",
    "/tmp",  # noqa: S108
    "/var/tmp",  # noqa: S108
    "/home",
    "/swapfile",
    "/etc/ssh/ssh_host_rsa_key",
    "/etc/ssh/ssh_host_ed25519_key.pub",
    "/etc/ssl/private",
    "/root/.ssh",
    "/root/.gnupg",
    "/root/.bash_history",
    "/etc/machine-id",
    "/var/lib/dbus/machine-id",
    "/etc/hostname",
    "/etc/hosts",
    "/etc/resolv.conf",
    "/etc/mtab",
    "/etc/passwd",
    "/etc/passwd-",
    "/etc/shadow",
    "/etc/shadow-",
    "/etc/group",
    "/etc/group-",
    "/etc/gshadow",
    "/etc/gshadow-",
    "/etc/subuid",
    "/etc/subuid-",
    "/etc/subgid",
    "/etc/subgid-",
    "/etc/adjtime",
    "/etc/ld.so.cache",
    "/var/log",
    "/var/spool",
    "/var/mail",
    "/var/cache/ldconfig",
    "/var/cache/apt/pkgcache.bin",
    "/var/cache/debconf",
    "/var/lib/dpkg/status",
    "/var/lib/dpkg/lock-frontend",
    "/var/lib/apt/extended_states",
    "/var/lib/rpm",
    "/var/lib/mysql",
    "/var/lib/postgresql",
    "/var/lib/redis",
    "/var/lib/mongodb",
    "/var/lib/ldap",
    "/var/lib/systemd/random-seed",
]
SHARED = [
    "/bin",
    "/etc",
    "/etc/ssh",
    "/etc/ssh/sshd_config",
    "/etc/apt/sources.list",
    "/etc/services",
    "/etc/init.d/cron",
    "/root",
    "/root/install.sh",
    "/usr",
    "/usr/lib",
    "/var",
    "/var/lib",
    "/var/lib/dpkg",
    "/var/cache",
    "/var/lib/dpkg/info/bash.list",
    "/var/lib/dpkg/diversions",
    "/var/lib/apt/lists/deb.debian.org_debian_dists_bookworm_main_binary-amd64_Packages",
    "/var/cache/apt",
    "/var/cache/apt/archives",
    "/var/cache/apt/archives/bash_5.2_amd64.deb",
    "/opt/app/bin/app",
    "/srv/www/index.html",
]


@pytest.fixture(scope="module")
def shipped() -> Excludes:
    return exclude.parse(exclude.SHIPPED_LIST.read_bytes(), source="shipped")


@pytest.mark.parametrize("path", KEPT_OUT)
def test_the_shipped_list_keeps_out(shipped: Excludes, path: str) -> None:
    assert shipped.below(os.fsencode(posixpath.dirname(path))).is_excluded(os.fsencode(path))


@pytest.mark.parametrize("path", SHARED)
def test_the_shipped_list_shares(shipped: Excludes, path: str) -> None:
    assert not shipped.is_excluded(os.fsencode(path))


def test_the_shipped_list_asks_nothing_of_most_of_a_tree(shipped: Excludes) -> None:
    assert not shipped.below(b"/usr/share")
    assert not shipped.below(b"/usr/bin")
    assert not shipped.below(b"/var/lib/dpkg/info")


def test_the_shipped_list_has_no_mistakes(caplog: pytest.LogCaptureFixture) -> None:
    text = exclude.SHIPPED_LIST.read_bytes()
    exclude.parse(text, source="shipped")
    assert caplog.text == ""
    lines = [line for line in text.splitlines() if line and not line.startswith(b"#")]
    assert len(lines) == len(set(lines))
    assert all(line == line.strip() and b" " not in line for line in lines)
