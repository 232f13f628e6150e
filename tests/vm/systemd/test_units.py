"""The units of vservers install-unit, under a systemd that starts and stops guests with them."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.fixtures.guestconfig import write_program
from tests.fixtures.probes import need
from tests.fixtures.vservers import SLEEPER, VSERVER, Host, host_for_guests, is_alive

pytestmark = need("systemd_host")

_VSERVERS: Final = os.fspath(VSERVER.with_name("vservers"))
_SETTINGS: Final = Path("/etc/default/vservers")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """The units are installed, for guests of the test's own."""
    for host in host_for_guests(tmp_path, monkeypatch):
        done = _run(_VSERVERS, "install-unit")
        assert done.returncode == 0, done.stderr
        variables = {**host.etc.environment, "VSERVER_LOGDIR": os.fspath(host.logdir)}
        _SETTINGS.write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
        _run("systemctl", "start", "vservers.service")
        yield host
        _run("systemctl", "stop", "vservers.service", "vservers@default.service")
        _run("systemctl", "reset-failed")
        _run(_VSERVERS, "install-unit", "--remove")
        _SETTINGS.unlink()


def _run(*argv: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)


def _unit(name: str, key: str) -> str:
    return _run("systemctl", "show", "--value", f"--property={key}", name).stdout.strip()


def test_a_unit_starts_guests_in_their_order_and_another_stops_all(host: Host) -> None:
    log = host.logdir.with_name("noted")
    for phase in ("prepre-start", "post-start", "pre-stop", "postpost-stop"):
        script = host.etc.confdir / ".defaults/scripts" / phase
        write_program(script, f"echo {phase} $2 >>{log}")
    host.add_busybox("db", SLEEPER)
    host.add_busybox("web", {**SLEEPER, "apps/init/mark": "default", "apps/init/depends": "db"})
    host.add_busybox("off", {**SLEEPER, "disabled": True})
    done = _run("systemctl", "start", "vservers@default.service")
    assert done.returncode == 0, _run("journalctl", "-u", "vservers@default.service").stdout
    assert _unit("vservers@default.service", "ActiveState") == "active"
    host.vserver("off", "start")
    pids = [host.init_pid(name) for name in host.names]
    assert all(is_alive(pid) for pid in pids)
    for name in host.names:  # at shutdown systemd waits with the scope until the guest was stopped
        scope = f"vservers-{host.state(name)['xid']}.scope"
        assert "vservers.service" in _unit(scope, "Before").split()
    assert _run("systemctl", "stop", "vservers.service").returncode == 0
    assert not any(is_alive(pid) for pid in pids)
    assert _unit("vservers@default.service", "ActiveState") == "inactive"
    noted = log.read_text().splitlines()
    assert noted.index("post-start db") < noted.index("prepre-start web")
    assert noted.index("postpost-stop web") < noted.index("pre-stop db")
    assert host.leftovers() == []


def test_a_guest_that_fails_is_seen_and_the_others_run_and_are_stopped(host: Host) -> None:
    for name in ("good", "bad"):
        host.add_busybox(name, {**SLEEPER, "apps/init/mark": "default"})
    host.set_key("bad", "apps/init/cmd.start", "/no/init")
    assert _run("systemctl", "start", "vservers@default.service").returncode != 0
    assert _unit("vservers@default.service", "ActiveState") == "failed"
    pid = host.init_pid("good")
    assert is_alive(pid)
    _run("systemctl", "stop", "vservers.service")
    assert not is_alive(pid)


def test_the_timer_waits_for_the_night_and_its_service_does_the_work(host: Host) -> None:
    host.add_busybox("one", SLEEPER)
    assert _run("systemctl", "start", "vservers-unify.timer").returncode == 0
    assert _unit("vservers-unify.timer", "NextElapseUSecRealtime")
    assert _run("systemctl", "start", "vservers-unify.service").returncode == 0
    shown = _run("journalctl", "--output=cat", "-u", "vservers-unify.service").stdout
    assert "1 guest unified in " in shown
    _run("systemctl", "stop", "vservers-unify.timer")
