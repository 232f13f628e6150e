"""vservers install-unit: init systems take what is installed, and it starts and stops guests."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.probes import need
from tests.fixtures.vservers import SLEEPER, VSERVER, Host, host_for_guests, is_alive, run_installed

VSERVERS = VSERVER.with_name("vservers")
_UNITS = Path("etc/systemd/system")


def install(root: Path, *words: str, code: int = 0) -> str:
    """`vservers install-unit` below `root`, which must end with `code`; what it shows."""
    done = run_installed("vservers", "install-unit", "--root", root, *words, code=code)
    return done.stdout + done.stderr


def files(root: Path) -> dict[str, str]:
    """All that is below `root`: the content of files, where symlinks lead."""
    found = {}
    for path in root.rglob("*"):
        if path.is_symlink():
            found[os.fspath(path.relative_to(root))] = f"-> {path.readlink()}"
        elif path.is_file():
            found[os.fspath(path.relative_to(root))] = path.read_text()
    return found


def _verify(*units: str) -> list[str]:
    """What systemd-analyze(1) says of units of ours."""
    verify = ["systemd-analyze", "verify", "--man=no", *units]
    done = subprocess.run(verify, capture_output=True, text=True, timeout=60)
    return [line for line in done.stderr.splitlines() if "vservers" in line]


@need("systemd_analyze")
def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path) -> None:
    install(tmp_path, "--init", "systemd", "--mark", "default", "--mark", "night")
    folder = tmp_path / _UNITS
    # An instance needs a name: the template itself cannot be verified.
    (folder / "vservers@default.service").write_text((folder / "vservers@.service").read_text())
    checked = ["vservers.service", "vservers@default.service", "vservers-unify.timer"]
    paths = [os.fspath(folder / name) for name in checked]
    assert _verify(*paths) == []
    broken = folder / "vservers-broken.service"
    broken.write_text("[Service]\nExecStart=/no/such/program\n")
    assert _verify(os.fspath(broken)) != []
    wants = folder / "multi-user.target.wants"
    assert sorted(os.listdir(wants)) == [  # noqa: PTH208
        "vservers.service",
        "vservers@default.service",
        "vservers@night.service",
    ]
    assert all(path.exists() for path in [*wants.iterdir(), *folder.glob("timers.*/*")])
    text = (folder / "vservers@.service").read_text()
    assert f"\nExecStart={VSERVERS} start --mark %i " in text
    calendar = next(
        line.partition("=")[2]
        for line in (folder / "vservers-unify.timer").read_text().splitlines()
        if line.startswith("OnCalendar=")
    )
    subprocess.run(["systemd-analyze", "calendar", calendar], check=True, capture_output=True)


def test_a_second_time_nothing_is_to_be_done_and_all_can_be_removed(tmp_path: Path) -> None:
    for init in ("systemd", "sysv"):
        root = tmp_path / init
        for level in "0123456":
            (root / f"etc/rc{level}.d").mkdir(parents=True)
        assert install(root, "--init", init, "-n").count("/etc/") > 3
        assert files(root) == {}
        assert "wrote " in install(root, "--init", init)
        (root / "etc/default/vservers").write_text("# mine\n")
        before = files(root)
        assert install(root, "--init", init) == "nothing to do: all is there\n"
        assert files(root) == before
        install(root, "--init", init, "--remove")
        assert files(root) == {"etc/default/vservers": "# mine\n"}
        assert install(root, "--init", init, "--remove") == "nothing to do: there is nothing\n"


def test_what_is_not_ours_is_not_replaced(tmp_path: Path) -> None:
    script = tmp_path / "etc/init.d/vservers"
    script.parent.mkdir(parents=True)
    script.write_text("#!/bin/sh\n# something else\n")
    assert "is another's" in install(tmp_path, "--init", "sysv", code=1)
    assert list(files(tmp_path)) == ["etc/init.d/vservers"]
    assert "cannot be part" in install(tmp_path, "--init", "systemd", "--mark", "a/b", code=1)
    assert "one mark" in install(tmp_path, "--init", "sysv", "--mark", "other", code=1)
    assert list(files(tmp_path)) == ["etc/init.d/vservers"]


def test_the_nightly_run_can_be_left_out(tmp_path: Path) -> None:
    install(tmp_path, "--init", "systemd", "--no-unify")
    assert not [name for name in files(tmp_path) if "unify" in name]


# --- the sysv script, on guests


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    yield from host_for_guests(tmp_path, monkeypatch)


@need("root")
def test_the_sysv_script_starts_and_stops_the_guests_of_its_mark(
    host: Host, tmp_path: Path
) -> None:
    root = tmp_path / "image"
    for level in "0123456":
        (root / f"etc/rc{level}.d").mkdir(parents=True)
    install(root, "--init", "sysv")
    for name, mark in (("web", "default"), ("db", "default"), ("other", "other")):
        host.add_busybox(name, {**SLEEPER, "apps/init/mark": mark})

    def run(word: str, *, link: str = "rc2.d/S98vservers", level: str = "2") -> tuple[int, str]:
        environment = {**os.environ, "RUNLEVEL": level}
        command: list[str | Path] = [root / "etc" / link, word]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
        return done.returncode, done.stdout or done.stderr

    code, shown = run("start")
    assert (code, shown.endswith("2 guests: 2 started\n")) == (0, True)
    assert run("status")[0] == 0
    assert is_alive(host.init_pid("web"))
    assert host.state("other") == {}
    host.vserver("other", "start")
    host.set_key("other", "disabled", "")
    assert run("stop")[1].endswith("2 guests: 2 stopped\n")
    assert run("status")[0] == 1
    assert is_alive(host.init_pid("other"))
    assert run("restart")[0] == 0
    code, shown = run("stop", link="rc0.d/K02vservers", level="0")
    assert (code, shown.endswith("3 guests: 3 stopped\n")) == (0, True)
    assert run("fly") == (
        2,
        f"usage: {root}/etc/rc2.d/S98vservers start|stop|restart|condrestart|status\n",
    )
