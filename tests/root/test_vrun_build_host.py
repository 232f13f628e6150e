"""build -m host: packages come along, and nothing that makes the host itself."""

import hashlib
import os
import stat
from pathlib import Path
from typing import Final

import pytest

from tests.fixtures.builds import build, left, refused
from tests.fixtures.filesystems import Site
from tests.fixtures.probes import on
from tests.fixtures.trees import File, Folder, Link, Row, Symlink, differences, grow, snapshot

pytestmark = on("ext4")

_UNCHANGED: Final = b"defaults only\n"
_CHANGED: Final = b"password = hunter2\n"
_ACCOUNTS: Final = {
    "passwd": "root:x:0:0:root:/root:/bin/bash\nsshd:x:105:65534::/run/sshd:/usr/sbin/nologin\n"
    "nobody:x:65534:65534:nobody:/:/bin/false\nalice:x:1000:1000::/home/alice:/bin/bash\n",
    "shadow": "root:$y$secret:1:0:99999:7:::\nalice:$y$secret:1:0:99999:7:::\n",
    "group": "root:x:0:\nshadow:x:42:\nsudo:x:27:alice,sshd\nalice:x:1000:\nnogroup:x:65534:\n",
    "gshadow": "root:$y$secret::\nsudo:*::alice\n",
}

_UCF: Final = b"".join(
    b"%032d  /etc/%s\n" % (0, name) for name in (b"ucf.conf", b"ssh/sshd_config")
)

_TAKEN: Final = {
    "usr/bin/tool": 0o755,
    "usr/bin/tool too": 0o755,
    "usr/bin/private-tool": 0o750,
    "usr/share/doc/tool/copyright": 0o644,
    "usr/lib/generated.cache": 0o644,
    "etc/tool.conf": 0o644,
    "etc/tool-private.conf": 0o640,
    "etc/ucf.conf": 0o644,
    "etc/nsswitch.conf": 0o644,
    "etc/ld.so.cache": 0o644,
    "etc/apt/sources.list": 0o644,
    "var/lib/dpkg/status": 0o644,
    "var/lib/dpkg/info/tool.list": 0o644,
    "var/lib/tool/shipped": 0o644,
    "opt/tool/x": 0o644,
}
_LEFT: Final = {
    "usr/bin/secret-of-root": 0o700,
    "usr/local/bin/own": 0o755,
    "usr/src/linux/Makefile": 0o644,
    "usr/lib/modules/6.1/x.ko": 0o644,
    "etc/tool-changed.conf": 0o640,
    "etc/ssh/ssh_host_rsa_key": 0o600,
    "etc/ssh/ssh_host_ed25519_key": 0o644,
    "etc/ssl/private/host.key": 0o644,
    "etc/wireguard/wg0.conf": 0o644,
    "etc/letsencrypt/live/key.pem": 0o644,
    "etc/own-key.pem": 0o644,
    "etc/hostname": 0o644,
    "etc/fstab": 0o644,
    "etc/vservers/web/vdir": 0o644,
    "etc/network/interfaces": 0o644,
    "root/.ssh/id_rsa": 0o600,
    "root/.bash_history": 0o644,
    "home/alice/mail": 0o644,
    "srv/data": 0o644,
    "var/log/syslog": 0o644,
    "var/lib/tool/state.db": 0o644,
    "var/lib/dpkg/lock": 0o640,
    "var/spool/mail/alice": 0o644,
    "var/cache/tool/x": 0o644,
    "tmp/x": 0o644,
    "boot/vmlinuz": 0o644,
    "opt/own/x": 0o644,
}
_OWNED_FOLDERS: Final = """
usr usr/bin usr/lib usr/share usr/share/doc usr/share/doc/tool etc etc/apt etc/ssh etc/ssl
etc/ssl/private etc/alternatives etc/systemd etc/systemd/system etc/network home root srv tmp boot
var var/lib var/lib/dpkg var/lib/dpkg/info var/lib/tool var/log var/spool var/cache opt opt/tool
"""


def _host(site: Site) -> Path:
    """A Debian host with one package, an administrator, and secrets in many places."""
    owned = [*_OWNED_FOLDERS.split(), "bin/tool", "usr/bin/tool too", "usr/bin/private-tool"]
    owned += ["usr/share/doc/tool/copyright", "etc/tool.conf", "etc/tool-private.conf"]
    owned += ["etc/tool-changed.conf", "var/lib/tool/shipped", "opt/tool/x"]
    digest = hashlib.md5(_UNCHANGED, usedforsecurity=False).hexdigest()
    conffiles = "".join(
        f" /etc/{name} {digest}\n"
        for name in ("tool.conf", "tool-private.conf", "tool-changed.conf")
    )
    content = {
        "etc/tool-private.conf": _UNCHANGED,
        "etc/tool-changed.conf": _CHANGED,
        "var/lib/dpkg/info/tool.list": "".join(f"/{path}\n" for path in [".", *owned]).encode(),
        "var/lib/dpkg/status": f"Package: tool\nConffiles:\n{conffiles}\n".encode(),
    }
    rows: list[Row] = [
        File(path, content.get(path, b"of " + path.encode()), mode=mode, gid=9)
        for path, mode in {**_TAKEN, **_LEFT}.items()
        if path != "usr/bin/tool too"
    ]
    rows += [
        Link("usr/bin/tool too", "usr/bin/tool"),
        Symlink("bin", "usr/bin"),
        Symlink("etc/alternatives/tool", "/usr/bin/tool"),
        Symlink("etc/systemd/system/multi-user.target.wants/tool.service", "/lib/tool.service"),
        File("etc/ssh/sshd_config", b""),
        Folder("var/log", mode=0o775, gid=4),
        File("var/lib/ucf/hashfile", _UCF),
        File("etc/machine-id", b"0" * 32),
        *(File(f"etc/{name}", text.encode()) for name, text in _ACCOUNTS.items()),
    ]
    return grow(site.filesystem.folder / "host", rows)


def test_what_packages_have_comes_along_and_the_rest_stays(site: Site) -> None:
    host, root = _host(site), site.root("web")
    before = snapshot(host)
    build("web", "-m", "host", "--hostname", "web", "--", "--source", host)
    after = snapshot(root)
    taken = {path.encode() for path in _TAKEN}
    assert taken <= after.keys()
    old, new = ({path: tree[path] for path in taken} for tree in (before, after))
    assert differences(old, new) == []
    assert {path for path in _LEFT if (root / path).exists()} == {"etc/hostname"} | {
        path for path in _LEFT if path.startswith("etc/ssh/ssh_host_")
    }
    assert (root / "etc/hostname").read_text() == "web\n"
    assert (root / "bin").readlink() == Path("usr/bin")
    assert (root / "etc/alternatives/tool").is_symlink()
    assert (root / "etc/systemd/system/multi-user.target.wants/tool.service").is_symlink()
    assert stat.S_IMODE((root / "var/log").stat().st_mode) == 0o775
    assert differences(before, snapshot(host)) == []


def test_no_secret_of_the_host_is_anywhere_in_the_guest(site: Site) -> None:
    host = _host(site)
    build("web", "-m", "host", "--", "--source", host)
    secrets = [b"hunter2", b"$y$secret", b"alice", *(b"of " + path.encode() for path in _LEFT)]
    for path in site.root("web").rglob("*"):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            assert [secret for secret in secrets if secret in content] == [], path


def test_accounts_of_the_system_stay_without_passwords(site: Site) -> None:
    build("web", "-m", "host", "--", "--source", _host(site))
    etc = site.root("web") / "etc"
    names = {
        name: [line.partition(":")[0] for line in (etc / name).read_text().splitlines()]
        for name in _ACCOUNTS
    }
    assert names["passwd"] == names["shadow"] == ["root", "sshd", "nobody"]
    assert names["group"] == names["gshadow"] == ["root", "shadow", "sudo", "nogroup"]
    assert "sudo:x:27:sshd\n" in (etc / "group").read_text()
    assert {line.split(":")[1] for line in (etc / "shadow").read_text().splitlines()} == {"*"}
    status = (etc / "shadow").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o640, 42)


def test_a_server_of_ssh_gets_keys_of_its_own(site: Site) -> None:
    build("web", "-m", "host", "--", "--source", _host(site))
    ssh = site.root("web") / "etc/ssh"
    for kind in ("rsa", "ecdsa", "ed25519"):
        assert b"PRIVATE KEY" in (ssh / f"ssh_host_{kind}_key").read_bytes()
    assert len((site.root("web") / "etc/machine-id").read_text().strip("0\n")) > 9


@pytest.mark.parametrize("rows", [[], [File("var/lib/dpkg/status", b"")]])
def test_a_host_without_dpkg_is_refused(site: Site, rows: list[Row]) -> None:
    host = grow(site.filesystem.folder / "host", rows)
    assert "dpkg knows no package" in refused("web", "-m", "host", "--", "--source", host)
    assert left(site) == set()


def test_links_of_a_source_lead_nowhere_outside_it(site: Site) -> None:
    """Another root than the host's, of which a guest may be the author."""
    source = _host(site)
    outside = site.filesystem.folder / "outside"
    grow(outside, [File("passwd", b"canary:x:7:7:::\n"), File("info/x.list", b"/canary\n")])
    (source / "etc/passwd").unlink()
    (source / "etc/passwd").symlink_to(outside / "passwd")
    assert "/etc/passwd of the source: is missing" in refused(
        "web", "-m", "host", "--", "--source", source
    )
    (source / "etc/passwd").unlink()
    os.mkfifo(source / "etc/passwd")
    assert "/etc/passwd of the source: is no file" in refused(
        "web", "-m", "host", "--", "--source", source
    )
    (source / "var/lib/dpkg/info").rename(source / "var/lib/dpkg/old")
    (source / "var/lib/dpkg/info").symlink_to(outside / "info")
    assert "dpkg knows no package" in refused("web", "-m", "host", "--", "--source", source)
    assert left(site) == set()
