"""Reads how a guest starts, stops and restarts: apps/init, apps/vshelper and scripts/."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Final, cast

from vrun.errors import ConfigInvalid
from vrun.keys import Keys, Line, first_of, key_names, parse_number
from vrun.netvalues import parse_guest
from vrun.spec import ENVIRONMENT, MTAB, Helper, InitSpec, Scripts, Style

STYLES: Final = ("sysv", "plain", "systemd", "openrc")
_OTHER_STYLES: Final = {
    "minit": "minit is not offered; use plain with apps/init/cmd.start",
    "gentoo": "baselayout-1 is not offered; use openrc",
    "arch": "rc.multi is not offered; use systemd, or plain with apps/init/cmd.start",
    "rescue": "rescue is chosen for one start: `vserver NAME start --rescue`",
}
_KEYS: Final = key_names(
    "style runlevel runlevel.start runlevel.stop cmd.start cmd.stop cmd.start-sync cmd.stop-sync "
    "cmd.prepare sync killseq mtab tty mark depends environment"
)
_REAL_INITS: Final = frozenset({"plain", "systemd"})
_EVENTS: Final = (
    "restart",
    "halt",
    "poweroff",
    "swsusp",
    "restart2",
    "oom",
    "startup",
    "shutdown",
    "netup",
    "netdown",
)
ACTIONS: Final = frozenset({"restart", "sync", "async"})
_MOST_SECONDS: Final = 24 * 3600
_PHASES: Final = (
    "initialize",
    "prepre-start",
    "pre-start",
    "post-start",
    "pre-stop",
    "post-stop",
    "postpost-stop",
)


def load_init(guest: Keys, defaults: Keys, *, is_fake_init: bool) -> InitSpec:
    """What apps/init says; `is_fake_init`: the guest's cflags name fakeinit.

    Raises ConfigInvalid with the file.
    """
    init = guest / "apps" / "init"
    common = defaults / "apps" / "init"
    init.warn_misspelt(_KEYS)
    style = _style(init)
    command = init.arguments("cmd.start")
    if is_fake_init and command is None and style not in _REAL_INITS:
        # rc scripts end when all is up: as process 1 they would take the guest with them
        reason = f"fakeinit: the rc scripts of {style} are not process 1, but an init of ours is"
        guest.warn("cflags" if guest.has("cflags") else "flags", reason)
    return InitSpec(
        style=style,
        runlevel_start=_runlevel(init, "runlevel.start") or _runlevel(init, "runlevel"),
        runlevel_stop=_runlevel(init, "runlevel.stop"),
        cmd_start=command,
        cmd_stop=init.arguments("cmd.stop"),
        cmd_start_sync=init.arguments("cmd.start-sync"),
        cmd_stop_sync=init.arguments("cmd.stop-sync"),
        cmd_prepare=init.arguments("cmd.prepare"),
        kill_signals=_kill_signals(init),
        environment=_environment(init, common),
        tty=_tty(init, common),
        sync=init.has("sync"),
        marks=tuple(line.text for line in init.items("mark")),
        depends=load_depends(init),
        mtab=_mtab(init, defaults),
        pid_one=style in _REAL_INITS or (is_fake_init and command is not None),
    )


def _style(init: Keys) -> Style:
    line = init.scalar("style")
    if line is None:
        return "sysv"
    style = line.text.lower()
    if style not in STYLES:
        raise ConfigInvalid(
            f"{line.where}: {line.text!r} is no init style that can be started",
            hint=_OTHER_STYLES.get(style, f"known are {', '.join(STYLES)}"),
        )
    return cast(Style, style)


def _runlevel(init: Keys, key: str) -> str | None:
    line = init.scalar(key)
    if line and (len(line.text.split()) > 1 or line.text.startswith("-")):
        raise ConfigInvalid(f"{line.where}: {line.text!r} is no runlevel")
    return line.text if line else None


def _kill_signals(init: Keys) -> tuple[tuple[int, int], ...]:
    """killseq: a signal, then pairs of seconds and signal."""
    words = [Line(line.where, word) for line in init.items("killseq") for word in line.text.split()]
    if not words:
        return InitSpec().kill_signals
    if len(words) % 2 == 0:
        raise ConfigInvalid(
            f"{words[-1].where}: the sequence ends without a signal",
            hint="write a signal, then pairs of seconds and a signal: 15 5 9",
        )
    waits = [0, *(parse_number(word, least=0, most=_MOST_SECONDS) for word in words[1::2])]
    return tuple(zip(waits, map(parse_signal, words[::2]), strict=True))


def parse_signal(line: Line) -> int:
    """The signal that the line is: 15, TERM or SIGTERM; raises ConfigInvalid with file and line."""
    if line.text.isdigit():
        return parse_number(line, least=1, most=signal.NSIG - 1)
    try:
        return signal.Signals["SIG" + line.text.upper().removeprefix("SIG")]
    except KeyError as error:
        raise ConfigInvalid(f"{line.where}: {line.text!r} is no signal") from error


def _environment(init: Keys, common: Keys) -> tuple[tuple[str, str], ...]:
    source = first_of("environment", init, common)
    return ENVIRONMENT if source is None else tuple(source.pairs("environment"))


def _tty(init: Keys, common: Keys) -> Path | None:
    source = first_of("tty", init, common)
    return None if source is None else source.path / "tty"


def load_depends(init: Keys) -> tuple[str, ...]:
    """The guests that the folder apps/init says are started before; raises ConfigInvalid."""
    return tuple(
        parse_guest(Line(line.where, word))
        for line in init.items("depends")
        for word in line.text.split()
    )


def _mtab(init: Keys, defaults: Keys) -> str:
    source = first_of("mtab", init, defaults / "init", defaults / "apps" / "init")
    return MTAB if source is None else source.text("mtab") or ""


# --- apps/vshelper


def load_helper(guest: Keys, defaults: Keys) -> Helper:
    """What happens when the guest reboots or ends; raises ConfigInvalid with the file."""
    own, common = guest / "apps" / "vshelper", defaults / "apps" / "vshelper"
    methods = (guest / "apps" / "vshelper-methods", defaults / "apps" / "vshelper-methods")
    for folder in (own, common):
        if folder.has("debug"):
            folder.warn("debug", "there is no script to trace; the monitor logs what it does")
    source = first_of("action", own, common)
    line = source.scalar("action") if source else None
    timeout = first_of("sync-timeout", own, common)
    seconds = timeout.number("sync-timeout", least=0, most=_MOST_SECONDS) if timeout else None
    logfile = common.value("logfile")
    return Helper(
        programs=tuple(_programs(own, common, defaults / "apps" / "vshelper-delegate")),
        action=line.text if line else "restart",
        method=_method(line, *methods) if line and line.text not in ACTIONS else None,
        disabled=own.has("disabled") or common.has("disabled"),
        stop_timeout_s=Helper().stop_timeout_s if seconds is None else seconds,
        logfile=Path(logfile) if logfile else None,
    )


def _programs(own: Keys, common: Keys, delegates: Keys) -> Iterator[tuple[str, Path]]:
    """A delegate before all; the guest's program; the common one unless the guest has an action."""
    folders = [delegates, own] if own.has("action") else [delegates, own, common]
    for event in _EVENTS:
        source = first_of(event, *folders)
        if source and _is_program(source, event):
            yield event, source.path / event


def _is_program(folder: Keys, key: str) -> bool:
    path = folder.path / key
    if path.is_file() and os.access(path, os.X_OK):
        return True
    folder.warn(key, "is no program that can be executed; it is not run")
    return False


def _method(line: Line, *folders: Keys) -> Path:
    source = first_of(line.text, *folders)
    if source is None or not _is_program(source, line.text):
        raise ConfigInvalid(
            f"{line.where}: {line.text!r} is no action and no program of apps/vshelper-methods",
            hint=f"known are {' '.join(sorted(ACTIONS))}",
        )
    return source.path / line.text


# --- scripts/


def load_scripts(guest: Keys, defaults: Keys) -> Scripts:
    """Where the programs of the phases are; the folders are looked into when a phase comes."""
    own, common = guest / "scripts", defaults / "scripts"
    for folder in (own, common):
        for name in (*folder.files(), *folder.entries()):
            if name.removesuffix(".d") not in _PHASES:
                folder.warn(name, "is no phase of a start or stop; it is not run")
    return Scripts(
        folder=own.path if own.exists else None,
        fallback=common.path if common.exists else None,
    )
