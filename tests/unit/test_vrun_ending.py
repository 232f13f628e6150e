"""What a guest's end means, and what starts and stops each init style."""

import signal
from pathlib import Path

import pytest

from vrun import ending, styles
from vrun.errors import ConfigInvalid
from vrun.order import Rescue
from vrun.spec import GuestSpec, Helper, InitSpec


@pytest.mark.parametrize(
    ("status", "how", "number"),
    [
        (0, "exited", 0),
        (7 << 8, "exited", 7),
        (int(signal.SIGHUP), "restarted", None),
        (int(signal.SIGINT), "halted", None),
        (int(signal.SIGSEGV), "killed", 11),
        (50, "killed", 50),
        (None, "unknown", None),
    ],
)
def test_the_wait_status_of_a_guests_init(status: int | None, how: str, number: int | None) -> None:
    ended = ending.describe(status, was_asked=False)
    assert (ended.how, ended.status) == (how, number)


def test_a_stop_that_was_asked_for_is_one_however_it_ended() -> None:
    for status in (0, int(signal.SIGHUP), int(signal.SIGKILL), None):
        assert ending.describe(status, was_asked=True).how == "stopped"


def test_a_killed_init_of_another_monitor_may_have_rebooted() -> None:
    assert ending.describe(9, was_asked=False, is_ours=False).how == "unknown"


def test_only_a_reboot_starts_it_again_and_only_where_that_is_wanted() -> None:
    rebooted = ending.describe(int(signal.SIGHUP), was_asked=False)
    halted = ending.describe(int(signal.SIGINT), was_asked=False)
    assert ending.wants_restart(rebooted, Helper())
    assert not ending.wants_restart(halted, Helper())
    assert not ending.wants_restart(rebooted, Helper(action="sync"))
    assert not ending.wants_restart(rebooted, Helper(disabled=True))
    own = Helper(programs=(("restart", Path("/own")),))
    assert not ending.wants_restart(rebooted, own)
    assert ending.end_program(rebooted, own) == ["/own", "restart"]
    assert ending.end_program(halted, own) is None


# --- init styles


def _spec(**init: object) -> GuestSpec:
    return GuestSpec(name="web", root=Path("/srv/web"), init=InitSpec(**init))  # type: ignore[arg-type]


def _has(*paths: str) -> styles.Resolve:
    return lambda path: path if path in paths else ""


def test_sysv_runs_the_last_rc_script_that_there_is() -> None:
    both = _has("/etc/init.d/rc", "/etc/rc.d/rc")
    program = styles.start_program(_spec(), None, both)
    assert program.argv == ("/etc/rc.d/rc", "3")
    assert dict(program.environment) == {"PREVLEVEL": "N", "RUNLEVEL": "3"}
    stop = styles.stop_program(_spec(), None, _has("/etc/init.d/rc"))
    assert stop is not None
    assert stop.argv == ("/etc/init.d/rc", "6")
    with pytest.raises(ConfigInvalid, match=r"/etc/init\.d/rc"):
        styles.start_program(_spec(), None, _has())


def test_runlevels_of_the_configuration_count() -> None:
    spec = _spec(runlevel_start="2", runlevel_stop="0")
    assert styles.start_program(spec, None, _has("/etc/init.d/rc")).argv[1] == "2"
    stop = styles.stop_program(spec, None, _has("/etc/init.d/rc"))
    assert stop is not None
    assert (stop.argv[1], dict(stop.environment)["PREVLEVEL"]) == ("0", "2")


def test_plain_is_stopped_by_a_signal_and_systemd_by_its_own() -> None:
    plain = _spec(style="plain", pid_one=True)
    assert styles.start_program(plain, None, _has()).argv == ("/sbin/init",)
    assert styles.stop_program(plain, None, _has()) is None
    assert styles.stop_signal(plain, _has("/sbin/init")) == signal.SIGINT
    of_systemd = lambda path: "/guests/web/lib/systemd/systemd"  # noqa: E731
    assert styles.stop_signal(plain, of_systemd) == signal.SIGRTMIN + 3
    program = styles.start_program(_spec(style="systemd", pid_one=True), None, _has())
    assert "container" in dict(program.environment)


def test_commands_of_the_configuration_replace_those_of_the_style() -> None:
    spec = _spec(cmd_start=("/bin/a", "b c"), cmd_stop=("/bin/d",))
    assert styles.start_program(spec, None, _has()).argv == ("/bin/a", "b c")
    stop = styles.stop_program(spec, None, _has())
    assert stop is not None
    assert stop.argv == ("/bin/d",)


def test_a_rescue_replaces_everything() -> None:
    spec = _spec(cmd_start=("/bin/a",))
    assert styles.start_program(spec, Rescue(), _has()).argv == ("/bin/sleep", "900")
    assert styles.start_program(spec, Rescue(("/bin/sh",)), _has()).argv == ("/bin/sh",)
    assert styles.is_pid_one(spec, Rescue(("/bin/sh",), is_init=True))
    assert not styles.is_pid_one(_spec(style="plain", pid_one=True), Rescue())


def test_openrc_goes_through_its_runlevels() -> None:
    spec = _spec(style="openrc")
    old = styles.start_program(spec, None, _has("/lib/rc/sh/init-vserver.sh"))
    assert old.argv == ("/lib/rc/sh/init-vserver.sh", "default")
    new = styles.start_program(spec, None, _has("/sbin/openrc"))
    assert new.argv[-1] == "default"
    assert "sysinit" in new.argv[2]
    with pytest.raises(ConfigInvalid, match="openrc"):
        styles.start_program(spec, None, _has())
