"""apps/init, apps/vshelper and scripts/: how a guest starts, stops and starts again."""

import signal
from pathlib import Path

import pytest

from tests.fixtures.guestconfig import Configuration, Keys, configure, write_program
from vrun.errors import ConfigInvalid
from vrun.spec import ENVIRONMENT, MTAB, Helper, Scripts


@pytest.fixture
def etc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configuration:
    return configure(tmp_path, monkeypatch)


# --- apps/init


@pytest.mark.parametrize(
    ("style", "flags", "command", "is_process_one"),
    [
        ("sysv", "", "/sbin/init", False),
        ("SysV", "", "", False),
        ("openrc", "", "", False),
        ("plain", "", "", True),
        ("systemd", "", "", True),
        ("sysv", "fakeinit", "/sbin/init", True),
        ("", "lock,fakeinit", "/sbin/init", True),
        ("sysv", "fakeinit\n~fakeinit", "/sbin/init", False),
    ],
)
def test_styles_with_a_real_init_have_it_as_process_one(
    etc: Configuration, style: str, flags: str, command: str, is_process_one: bool
) -> None:
    keys: dict[str, str | bool] = {"apps/init/style": style, "cflags": flags}
    spec = etc.spec_of({**keys, "apps/init/cmd.start": command} if command else keys)
    assert spec.init.pid_one == is_process_one
    assert spec.init.style == (style.lower() or "sysv")
    assert not spec.warnings


@pytest.mark.parametrize("key", ["cflags", "flags"])
def test_rc_scripts_are_never_process_one_since_the_guest_would_end_with_them(
    etc: Configuration, key: str
) -> None:
    folder = etc.add_guest("web", {key: "lock\nfakeinit"})
    spec = etc.spec()
    assert not spec.init.pid_one
    assert spec.warnings == (
        f"{folder / key}: fakeinit: the rc scripts of sysv are not process 1, "
        "but an init of ours is",
    )


@pytest.mark.parametrize(
    ("style", "hint"),
    [
        ("minit", "use plain"),
        ("gentoo", "use openrc"),
        ("arch", "use systemd"),
        ("rescue", "start --rescue"),
        ("upstart", "known are sysv, plain, systemd, openrc"),
    ],
)
def test_a_style_that_cannot_be_started_says_what_can(
    etc: Configuration, style: str, hint: str
) -> None:
    etc.add_guest("web", {"apps/init/style": style})
    with pytest.raises(ConfigInvalid, match=f"/web/apps/init/style:1: '{style}'") as caught:
        etc.spec()
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("keys", "start"),
    [
        ({}, None),
        ({"runlevel": "2"}, "2"),
        ({"runlevel.start": "4"}, "4"),
        ({"runlevel": "2", "runlevel.start": "4"}, "4"),
        ({"runlevel": "default"}, "default"),
    ],
)
def test_the_more_exact_runlevel_wins(
    etc: Configuration, keys: dict[str, str], start: str | None
) -> None:
    keys = {f"apps/init/{key}": text for key, text in keys.items()}
    assert etc.spec_of(keys).init.runlevel_start == start


def test_a_command_has_one_argument_a_line(etc: Configuration) -> None:
    init = etc.spec_of(
        {
            "apps/init/cmd.start": "/bin/sh\n-c\necho two words; sleep 1\n",
            "apps/init/cmd.stop": "# not yet\n/sbin/halt\n\n-p",
            "apps/init/cmd.start-sync": "/sbin/wait-up",
            "apps/init/cmd.stop-sync": "/sbin/wait-down",
            "apps/init/cmd.prepare": "/bin/true",
        }
    ).init
    assert init.cmd_start == ("/bin/sh", "-c", "echo two words; sleep 1")
    assert init.cmd_stop == ("/sbin/halt", "-p")
    assert (init.cmd_start_sync, init.cmd_stop_sync) == (("/sbin/wait-up",), ("/sbin/wait-down",))
    assert init.cmd_prepare == ("/bin/true",)


@pytest.mark.parametrize(
    ("text", "signals"),
    [
        ("15 5 9", ((0, signal.SIGTERM), (5, signal.SIGKILL))),
        ("15\n30\n9", ((0, signal.SIGTERM), (30, signal.SIGKILL))),
        ("TERM 1 sigint 0 KILL", ((0, 15), (1, 2), (0, 9))),
        ("9", ((0, 9),)),
        ("# nothing", ((0, 15), (5, 9))),
    ],
)
def test_a_kill_sequence_is_signals_and_waits(
    etc: Configuration, text: str, signals: tuple[tuple[int, int], ...]
) -> None:
    assert etc.spec_of({"apps/init/killseq": text}).init.kill_signals == signals


@pytest.mark.parametrize(
    ("keys", "environment"),
    [
        ({}, (("A", "common"),)),
        ({"apps/init/environment": "B=x=y\nC=\nD=a b"}, (("B", "x=y"), ("C", ""), ("D", "a b"))),
        ({"apps/init/environment": True}, ()),
    ],
)
def test_the_environment_is_the_guests_else_the_common_one(
    etc: Configuration, keys: Keys, environment: tuple[tuple[str, str], ...]
) -> None:
    etc.set_defaults({"apps/init/environment": "A=common"})
    assert etc.spec_of(keys).init.environment == environment


def test_without_any_file_the_environment_is_a_path(etc: Configuration) -> None:
    assert etc.spec_of({}).init.environment == ENVIRONMENT


def test_the_mtab_is_looked_for_in_three_places(etc: Configuration) -> None:
    etc.add_guest("first")
    assert etc.spec("first").init.mtab == MTAB
    etc.set_defaults({"init/mtab": "common"})
    assert etc.spec("first").init.mtab == "common\n"
    etc.add_guest("second", {"apps/init/mtab": "own"})
    assert etc.spec("second").init.mtab == "own\n"


def test_the_terminal_is_the_guests_else_the_common_one(etc: Configuration) -> None:
    defaults = etc.set_defaults({"apps/init/tty": Path("/dev/null")})
    etc.add_guest("first")
    folder = etc.add_guest("second", {"apps/init/tty": "a file"})
    assert etc.spec("first").init.tty == defaults / "apps/init/tty"
    assert etc.spec("second").init.tty == folder / "apps/init/tty"


def test_marks_and_dependencies_are_lists(etc: Configuration) -> None:
    init = etc.spec_of({"apps/init/mark": "default\nnight", "apps/init/depends": "db\nldap dns"})
    assert init.init.marks == ("default", "night")
    assert init.init.depends == ("db", "ldap", "dns")


# --- apps/vshelper


def test_programs_come_from_the_delegate_the_guest_or_all(etc: Configuration) -> None:
    folder, defaults = etc.add_guest("web"), etc.set_defaults({})
    own, common = folder / "apps/vshelper", defaults / "apps/vshelper"
    for program in (own / "restart", common / "restart", common / "oom", common / "halt"):
        write_program(program, "true")
    write_program(defaults / "apps/vshelper-delegate/halt", "true")
    assert etc.spec().helper.programs == (
        ("restart", own / "restart"),
        ("halt", defaults / "apps/vshelper-delegate/halt"),
        ("oom", common / "oom"),
    )


def test_an_action_of_the_guest_comes_before_common_programs(etc: Configuration) -> None:
    write_program(etc.set_defaults({}) / "apps/vshelper/restart", "true")
    assert etc.spec_of({"apps/vshelper/action": "sync"}).helper == Helper(action="sync")


def test_a_method_is_a_program(etc: Configuration) -> None:
    method = write_program(etc.set_defaults({}) / "apps/vshelper-methods/page", "true")
    helper = etc.spec_of({"apps/vshelper/action": "page"}).helper
    assert (helper.action, helper.method) == ("page", method)


def test_settings_of_all_count_where_the_guest_has_none(etc: Configuration) -> None:
    etc.set_defaults(
        {
            "apps/vshelper/sync-timeout": "60",
            "apps/vshelper/action": "async",
            "apps/vshelper/logfile": "/var/log/vshelper",
            "apps/vshelper/disabled": True,
        }
    )
    helper = etc.spec_of({"apps/vshelper/sync-timeout": "0"}).helper
    assert helper == Helper(
        action="async", disabled=True, stop_timeout_s=0, logfile=Path("/var/log/vshelper")
    )


def test_a_program_that_cannot_be_executed_is_named(etc: Configuration) -> None:
    spec = etc.spec_of({"apps/vshelper/halt": "#!/bin/sh"})
    assert spec.helper.programs == ()
    assert "/web/apps/vshelper/halt: is no program" in spec.warnings[0]


# --- scripts/


def test_scripts_are_the_guests_and_those_of_all(etc: Configuration) -> None:
    folder = etc.add_guest("web", {"scripts/pre-start.d/10-mount": "true"})
    assert etc.spec().scripts == Scripts(folder=folder / "scripts")
    defaults = etc.set_defaults({"scripts/post-stop": "true"})
    assert etc.spec().scripts == Scripts(folder=folder / "scripts", fallback=defaults / "scripts")
    assert etc.spec().warnings == ()


def test_a_script_of_no_phase_is_named(etc: Configuration) -> None:
    spec = etc.spec_of(
        {"scripts/prestart": "true", "scripts/start.d/1": "x", "scripts/pre-start~": "old"}
    )
    assert [line.rpartition("/")[2].split(":")[0] for line in spec.warnings] == [
        "prestart",
        "start.d",
    ]


MISTAKES: list[tuple[Keys, str]] = [
    ({"apps/init/runlevel": "-x"}, r"/web/apps/init/runlevel:1: '-x' is no runlevel"),
    ({"apps/init/runlevel.stop": "6 now"}, r"/web/apps/init/runlevel.stop:1"),
    ({"apps/init/cmd.start": "# none"}, r"/web/apps/init/cmd.start: names no command"),
    ({"apps/init/killseq": "15 5"}, r"/web/apps/init/killseq:1: the sequence ends without"),
    ({"apps/init/killseq": "15 x 9"}, r"/web/apps/init/killseq:1: 'x' is no number"),
    ({"apps/init/killseq": "15\n5\nKIL"}, r"/web/apps/init/killseq:3: 'KIL' is no signal"),
    ({"apps/init/killseq": "0"}, r"/web/apps/init/killseq:1: 0 is not in the range"),
    ({"apps/init/environment": "A=1\nPATH"}, r"/environment:2: 'PATH' is not of the form"),
    ({"apps/init/environment": "=1"}, r"/web/apps/init/environment:1"),
    ({"apps/init/depends": "db\n../x"}, r"/web/apps/init/depends:2: '../x' cannot be a guest's"),
    ({"apps/vshelper/sync-timeout": "soon"}, r"/web/apps/vshelper/sync-timeout:1: 'soon'"),
    ({"apps/vshelper/action": "../../x"}, r"/web/apps/vshelper/action:1: '../../x' is no action"),
]


@pytest.mark.parametrize(("keys", "message"), MISTAKES)
def test_a_mistake_is_named_with_its_file_and_line(
    etc: Configuration, keys: Keys, message: str
) -> None:
    etc.add_guest("web", keys)
    with pytest.raises(ConfigInvalid, match=message):
        etc.spec()
