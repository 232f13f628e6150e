"""Configuration trees that are fifteen years old: odd files, leftovers, foreign line ends."""

import os
from pathlib import Path

import pytest

from tests.fixtures.guestconfig import Configuration, configure
from vrun.errors import ConfigInvalid


@pytest.fixture
def etc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configuration:
    return configure(tmp_path, monkeypatch)


def test_ends_of_lines_and_files_do_not_matter(etc: Configuration) -> None:
    spec = etc.spec_of(
        {
            "context": b"1001",
            "uts/nodename": b"web.example.org\r\n",
            "nice": b"\xef\xbb\xbf 5 \r\n",
            "bcapabilities": b"# raw sockets\r\n\r\n  CAP_NET_RAW\r\nNET_ADMIN",
            "apps/init/cmd.start": b"/bin/sh\r\n-c\r\nexec /sbin/go",
            "apps/init/mark": b"default",
            "interfaces/0/ip": b"10.0.0.5",
            "interfaces/0/dev": b"\n eth0\t",
            "fstab": b"none /proc proc defaults 0 0\r\nnone /tmp tmpfs",
        }
    )
    assert (spec.xid, spec.hostname, spec.nice) == (1001, "web.example.org", 5)
    assert {"NET_RAW", "NET_ADMIN"} < spec.capabilities
    assert spec.init.cmd_start == ("/bin/sh", "-c", "exec /sbin/go")
    assert spec.init.marks == ("default",)
    assert spec.addresses[0].device == "eth0"
    assert [mount.options for mount in spec.mounts] == [("defaults",), ("defaults",)]


def test_what_editors_and_packages_leave_behind_is_passed_over(etc: Configuration) -> None:
    spec = etc.spec_of(
        {
            "context~": "77",
            "README": "moved here in 2009",
            ".svn/entries": "8",
            "cflags.rpmsave": "fast",
            "interfaces/.0.swp": "x",
            "interfaces/0/ip": "10.0.0.5",
            "interfaces/0/nodev": True,
            "interfaces/0.~1234567890~/ip": "no address",
            "interfaces/1~/ip": "no address",
            "ulimits/nofile": "100",
            "ulimits/nofile~": "no number",
            "cgroup/memory.max.rpmnew": "1",
            "sysctl/0.rpmorig": False,
            "apps/vdevmap/0.cfsaved.2": False,
        }
    )
    assert (spec.xid, len(spec.addresses), len(spec.rlimits)) == (None, 1, 1)
    assert (spec.cgroup.files, spec.sysctls, spec.devices) == ((), (), ())
    assert spec.warnings == ()


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("bcapabilites", "bcapabilities"),
        ("ccapability", "ccapabilities"),
        ("interface/0/ip", "interfaces"),
        ("ulimit/nofile", "ulimits"),
        ("apps/inits/style", "init"),
        ("apps/init/cmd-start", "cmd.start"),
        ("interfaces/prefx", "prefix"),
        ("interfaces/0/no_dev", "nodev"),
    ],
)
def test_a_key_that_is_misspelt_is_named(etc: Configuration, key: str, meant: str) -> None:
    keys = {"interfaces/0/ip": "10.0.0.5", "interfaces/0/dev": "eth0", key: "x"}
    warnings = etc.spec_of(keys).warnings
    assert len(warnings) == 1
    path = etc.confdir / "web" / key
    named = path if meant not in ("interfaces", "ulimits", "init") else path.parent
    named = named.parent if meant == "interfaces" else named
    assert warnings[0] == f"{named}: is no key and not read; is {meant} meant?"


@pytest.mark.parametrize(
    "key", ["README", "apps/own-tool/setting", "interfaces/0/comment", "x", "bcapabilities.old"]
)
def test_notes_beside_the_keys_do_no_harm(etc: Configuration, key: str) -> None:
    keys = {"interfaces/0/ip": "10.0.0.5", "interfaces/0/dev": "eth0", key: "of 2009"}
    assert etc.spec_of(keys).warnings == ()


def test_of_two_places_for_one_thing_the_one_that_is_not_read_is_named(etc: Configuration) -> None:
    spec = etc.spec_of(
        {
            "name": "www",
            "schedule": "1\n2\n3\n4\n5\n6",
            "sched/fill-rate": "1",
            "cflags": "sched_hard",
            "interfaces/prefix": "24",
            "interfaces/0/ip": "10.0.0.5",
            "interfaces/0/nodev": True,
            "interfaces/0/mask": "255.255.0.0",
        }
    )
    folder = etc.confdir / "web"
    assert spec.addresses[0].prefix == 24
    assert set(spec.warnings) == {
        f"{folder}/interfaces/0/mask: is not read, since there is {folder}/interfaces/prefix",
        f"{folder}/schedule: is obsolete and not read, since there is sched/",
        f"{folder}/name: www: the guest is called web, as its folder",
    }


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("cgroup/mnt", "the hierarchies that the host has mounted"),
        ("cgroup/subsys", "the hierarchies that the host has mounted"),
        ("cgroup/per-ss", "the hierarchies that the host has mounted"),
        ("apps/vlogin/disable", "always has a terminal of its own"),
    ],
)
def test_defaults_that_cannot_be_had_are_named(etc: Configuration, key: str, reason: str) -> None:
    folder = etc.set_defaults({key: "x"})
    (warning,) = etc.spec_of({}).warnings
    assert warning.startswith(f"{folder / key}: ")
    assert reason in warning


def test_a_key_that_points_nowhere_counts_as_missing_and_is_named(etc: Configuration) -> None:
    keys = ("context", "noncontext", "cflags", "apps/init/cmd.start")
    spec = etc.spec_of({key: Path("/nowhere") for key in keys})
    assert (spec.xid, spec.network, spec.init.cmd_start) == (None, "bound", None)
    nowhere = "is a symlink that leads nowhere; it counts as missing"
    assert sorted(spec.warnings) == sorted(f"{etc.confdir}/web/{key}: {nowhere}" for key in keys)


def test_keys_may_be_symlinks_to_files_and_folders_elsewhere(
    etc: Configuration, tmp_path: Path
) -> None:
    (tmp_path / "shared/init").mkdir(parents=True)
    (tmp_path / "shared/init/style").write_text("plain\n")
    (tmp_path / "shared/fstab").write_text("none /proc proc\n")
    spec = etc.spec_of({"apps/init": tmp_path / "shared/init", "fstab": tmp_path / "shared/fstab"})
    assert (spec.init.style, len(spec.mounts)) == ("plain", 1)


def test_an_empty_file_is_no_value(etc: Configuration) -> None:
    keys = {key: True for key in ("context", "nice", "uts/nodename", "shell", "cflags", "fstab")}
    assert etc.spec_of(keys).warnings == ()


def test_bytes_that_are_no_text_stay_what_they_are(etc: Configuration) -> None:
    spec = etc.spec_of({"fstab": b"/srv/caf\xe9 /srv none bind"})
    assert spec.mounts[0].source == "/srv/caf\udce9"


def test_a_pipe_does_not_hold_up_the_start(etc: Configuration) -> None:
    os.mkfifo(etc.add_guest("web") / "context")
    with pytest.raises(ConfigInvalid, match="/web/context: is no file"):
        etc.spec()


def test_an_endless_file_is_refused(etc: Configuration) -> None:
    etc.add_guest("web", {"context": Path("/dev/zero")})
    with pytest.raises(ConfigInvalid, match=r"/web/context: is longer than \d+ bytes"):
        etc.spec()
