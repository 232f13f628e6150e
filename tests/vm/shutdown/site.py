"""What the boots of one machine have in common: its guests, and what they leave for the next boot.

The guests need each other as front -> (web, app) -> db; `old` and `older` are of long ago, by
PRIORITY; `slow` takes its time to stop; `byhand` has no mark and is disabled: the administrator
starts it.
"""

import subprocess
from pathlib import Path
from typing import Final

from tests.fixtures.guestconfig import Configuration, write_keys, write_program
from tests.fixtures.vservers import Host, grow_busybox

_PLACES: Final = Configuration(
    Path("/etc/vservers"), Path("/var/lib/vservers"), Path("/run/vservers")
)
_NEEDS: Final = {"db": (), "web": ("db",), "app": ("db",), "front": ("web", "app"), "slow": ()}
_PRIORITIES: Final = {"older": 10, "old": 20}
BY_HAND: Final = "byhand"
MARKED: Final = (*_NEEDS, *_PRIORITIES)
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_NOTED: Final = Path("/var/noted")
_LEFT: Final = "left"
"""A file in each guest's root: its own init says there that it went down, and in which boot."""
_INITTAB: Final = f"""\
::respawn:/bin/sleep 100000
::shutdown:/bin/sh -c "sleep {{seconds}}; cat {BOOT_ID} >>/{_LEFT}; sync"
"""
_SLOW_S: Final = 10
PATIENCE_S: Final = 500
"""For whatever a machine without KVM has to do beside others."""
_PHASES: Final = ("prepre-start", "post-start", "pre-stop", "postpost-stop")
UNITS: Final = ("vservers@default.service", "vservers.service")


def open_host() -> Host:
    """The guests of this machine, in the usual places."""
    return Host(_PLACES, Path("/var/log/vservers"))


def grow() -> Host:
    """Make all guests, and have each phase of their starts and stops noted."""
    for folder in (_PLACES.confdir, _PLACES.vdirbase):
        folder.mkdir()
    _PLACES.vdirbase.chmod(0o700)
    for phase in _PHASES:
        script = _PLACES.confdir / ".defaults/scripts" / phase
        write_program(script, f'echo "$(cat {BOOT_ID}) {phase} $2" >>{_NOTED}')
    write_keys(_PLACES.confdir / ".defaults", {"apps/vshelper/sync-timeout": str(PATIENCE_S)})
    host = open_host()
    for name, needed in _NEEDS.items():
        _add(host, name, {"apps/init/mark": "default"}, needed)
    _add(host, BY_HAND, {"disabled": ""})
    for name, priority in _PRIORITIES.items():
        grow_busybox(_PLACES.vdirbase / name)
        _write_inittab(name)
        text = f"ONBOOT=yes\nPRIORITY={priority}\nS_FLAGS=fakeinit\nIPROOT=0.0.0.0\n"
        _PLACES.add_old_guest(name, text)
    return host


def _add(host: Host, name: str, keys: dict[str, str], needed: tuple[str, ...] = ()) -> None:
    depends = {"apps/init/depends": "\n".join(needed)} if needed else {}
    host.add_busybox(name, {"apps/init/style": "plain", **keys, **depends})
    _write_inittab(name, seconds=_SLOW_S if name == "slow" else 0)


def _write_inittab(name: str, *, seconds: int = 0) -> None:
    text = "::ctrlaltdel:/sbin/reboot\n" + _INITTAB.format(seconds=seconds)
    (_PLACES.vdirbase / name / "etc/inittab").write_text(text)


def this_boot() -> str:
    return BOOT_ID.read_text().strip()


def last_boot() -> str:
    """The id of the boot before this one, as the journal has it."""
    shown = _run("journalctl", "--boot=-1", "--lines=1", "--output=export")
    line = next(line for line in shown.splitlines() if line.startswith("_BOOT_ID="))
    return line.removeprefix("_BOOT_ID=")


def noted_in(boot: str) -> list[tuple[str, str]]:
    """(phase, guest) in their order, of the boot with that id."""
    lines = [line.split() for line in _NOTED.read_text().splitlines()]
    return [(phase, name) for noted, phase, name in lines if noted.replace("-", "") == boot]


def went_down_in(name: str) -> list[str]:
    """The boots in which the guest's own init went down and said so."""
    path = _PLACES.vdirbase / name / _LEFT
    return path.read_text().replace("-", "").split() if path.exists() else []


def assert_started_in_order(boot: str) -> None:
    noted = noted_in(boot)
    pairs = [(need, name) for name, needed in _NEEDS.items() for need in needed]
    for first, then in [*pairs, ("older", "old")]:
        assert noted.index(("post-start", first)) < noted.index(("prepre-start", then)), noted


def assert_stopped_in_order(boot: str) -> None:
    """Each guest once, those that others need after these; the one of nobody's mark last."""
    noted = noted_in(boot)
    for name in (*MARKED, BY_HAND):
        assert [noted.count((phase, name)) for phase in _PHASES] == [1, 1, 1, 1], (name, noted)
    pairs = [(name, need) for name, needed in _NEEDS.items() for need in needed]
    for first, then in [*pairs, ("old", "older"), *((name, BY_HAND) for name in MARKED)]:
        assert noted.index(("postpost-stop", first)) < noted.index(("pre-stop", then)), noted


def assert_stopped_cleanly(boot: str) -> None:
    """Every guest's init ended by itself, the units ended well, and the disk was left in order."""
    for name in (*MARKED, BY_HAND):
        assert went_down_in(name).count(boot) == 1, (name, went_down_in(name))
        assert "is killed now" not in open_host().console(name)
    journal = _run("journalctl", "--boot=-1", "--output=cat")
    for unit in UNITS:
        about = [line for line in journal.splitlines() if line.startswith(f"{unit}: ")]
        assert f"{unit}: Deactivated successfully." in about, about
        assert not [line for line in about if "Failed" in line or "Killing" in line], about
    scopes = [line for line in journal.splitlines() if line.startswith("vservers-")]
    wrong = ("Killing", "timed out", "Failed")
    assert not [line for line in scopes if any(word in line for word in wrong)], scopes
    said = _run("journalctl", "--boot=-1", "--output=cat", *(f"--unit={unit}" for unit in UNITS))
    assert f"{len(MARKED)} guests: {len(MARKED)} stopped" in said.splitlines(), said
    assert f"{BY_HAND}: stopped" in said.splitlines(), said
    assert "recovery" not in _run("journalctl", "--dmesg", "--output=cat", "--grep=EXT4-fs .nvme0")


def _run(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, (argv, done.stdout, done.stderr)
    return done.stdout
