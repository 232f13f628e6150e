"""The command line of `vserver NAME build` and the settings that it reads."""

import os
import stat
from pathlib import Path

import click
import pytest

from vrun.build.distribution import DEVICES, Device, Distribution
from vrun.build.options import load_default_options
from vrun.commands import build
from vrun.commands.build import METHODS, build_command
from vrun.errors import ConfigInvalid, ToolError, WrongUsage


@pytest.fixture
def confdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("CONFDIR", "VDIRBASE", "RUNDIR"):
        monkeypatch.setenv(f"VSERVER_{name}", os.fspath(tmp_path / name))
    (tmp_path / "CONFDIR").mkdir()
    return tmp_path / "CONFDIR"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["-m"],
        ["-m", "nothing"],
        ["-m", "yum"],
        ["-m", "skeleton", "word"],
        ["-m", "skeleton", "--nothing"],
        ["-m", "skeleton", "-n", "db"],
        ["-m", "skeleton", "--context", "many"],
        ["-m", "clone"],
        ["-m", "clone", "--", "--nothing"],
        ["-m", "debootstrap", "--", "-m", "file:///nowhere"],
    ],
)
def test_wrong_options_end_with_1_and_make_nothing(
    confdir: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert build_command("web", words) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert "Error: " in told.err
    assert list(confdir.parent.rglob("web*")) == []


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "template"],
        ["-m", "template", "--", "-t", "/nowhere.tar"],
        ["-m", "rsync", "--", "-s", "other:/srv"],
        ["-m", "rsync", "--", "-s", "/nowhere/"],
        ["-m", "clone", "--", "-s", "nobody"],
        ["-m", "debootstrap", "--", "-d", "no-such-release"],
        ["-m", "skeleton", "--", "-d", "../web"],
        ["-m", "skeleton", "--context", "1"],
        ["-m", "skeleton", "--hostname", "two words"],
        ["-m", "skeleton", "--interface", "eth0:10.0.0.300"],
        ["-m", "skeleton", "--initstyle", "nothing"],
        ["-m", "skeleton", "--flags", "nothing"],
        ["-m", "host", "--", "--source", "/nowhere"],
    ],
)
def test_what_cannot_be_meant_is_said_before_anything_is_made(
    confdir: Path, words: list[str]
) -> None:
    with pytest.raises(ToolError):
        build_command("web", words)
    assert [path.name for path in confdir.iterdir() if path.name != ".defaults"] == []
    assert not (confdir.parent / "VDIRBASE").exists()


@pytest.mark.parametrize("method", METHODS)
def test_each_method_helps(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert build_command("web", ["-m", method, "--", "--help"]) == 0
    told = capsys.readouterr().out
    assert max(len(line) for line in told.splitlines()) <= 80
    assert f"build -m {method} --" in told


def test_the_help_names_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert build_command("web", ["--help"]) == 0
    told = capsys.readouterr().out
    assert f"Methods: {', '.join(sorted(METHODS))}." in told
    assert max(len(line) for line in told.splitlines()) <= 80


def test_every_option_of_the_original_is_taken() -> None:
    """Reference 13.1."""
    known = {word for option in build._shared.params for word in option.opts}
    wanted = "force i-know-its-there keep rootdir pkgbase confdir lockfile context hostname netdev"
    wanted += " netmask netprefix netbcast interface flags cpuset cpusetcpus cpusetmems cpusetvirt"
    wanted += " initstyle debug version method name"
    assert {f"--{word}" for word in wanted.split()} | {"-m", "-n"} <= known
    assert all(isinstance(option, click.Option) for option in build._shared.params)


# --- settings


def test_default_options_stand_one_a_line(confdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(confdir / ".defaults/apps/build/options", "# all of ours\n--netdev\n\n  eth0\n--force")
    assert load_default_options() == ["--netdev", "eth0", "--force"]
    monkeypatch.setenv("NO_DEFAULT_OPTS", "1")
    assert load_default_options() == []


def test_without_a_table_a_guest_has_the_usual_devices(confdir: Path) -> None:
    assert Distribution("bookworm").devices() == DEVICES
    assert {device.name for device in DEVICES} >= {"null", "zero", "full", "urandom", "tty", "shm"}


def test_a_table_of_devices_replaces_the_usual_ones(confdir: Path) -> None:
    table = (
        "null c 1 3 666\n# a comment\nloop0 b 7 0 0640\nfd l /proc/self/fd\nshm d 1777\nlog f 600"
    )
    _write(confdir / ".distributions/mine/devs", table)
    assert Distribution("mine").devices() == (
        Device("null", stat.S_IFCHR, 0o666, os.makedev(1, 3)),
        Device("loop0", stat.S_IFBLK, 0o640, os.makedev(7, 0)),
        Device("fd", stat.S_IFLNK, target="/proc/self/fd"),
        Device("shm", stat.S_IFDIR, 0o1777),
        Device("log", stat.S_IFREG, 0o600),
    )


@pytest.mark.parametrize(
    "row", ["null", "null c 1 3", "null c one 3 666", "../null c 1 3 666", "/x d 755", "x q 1"]
)
def test_a_row_that_is_none_is_named_by_file_and_line(confdir: Path, row: str) -> None:
    _write(confdir / ".distributions/mine/devs", f"zero c 1 5 666\n{row}\n")
    with pytest.raises(ConfigInvalid, match=r"devs:2: "):
        Distribution("mine").devices()


@pytest.mark.parametrize("name", ["..", "a/b", "", ".defaults", "a b"])
def test_a_distribution_is_named_by_a_word(name: str) -> None:
    with pytest.raises(WrongUsage):
        Distribution(name)


def test_files_of_a_distribution_come_before_those_for_all(confdir: Path) -> None:
    _write(confdir / ".defaults/files/hosts", "all")
    _write(confdir / ".defaults/files/resolv.conf", "all")
    _write(confdir / ".distributions/mine/files/hosts", "mine")
    found = {name: Distribution("mine").find_file(name) for name in ("hosts", "resolv.conf", "x")}
    assert {name: path.read_text() for name, path in found.items() if path} == {
        "hosts": "mine",
        "resolv.conf": "all",
    }
