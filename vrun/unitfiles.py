"""What starts guests at boot and unifies them at night: the files for systemd, or for sysv scripts.

    ETC/systemd/system/vservers.service, vservers@.service, vservers-unify.service and .timer
    ETC/init.d/vservers, ETC/rc?.d/, ETC/cron.daily/vservers-unify
    ETC/default/vservers    kept where it is there: it is the administrator's

Each file is shipped in vrun/data, with the place of `vservers` still to be filled in.
"""

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

from vrun.errors import NotPermitted, ToolError, WrongUsage
from vstore.record import dataclass

Init = Literal["systemd", "sysv"]

_DATA: Final = Path(__file__).parent / "data"
_SYSTEMD: Final = Path("etc/systemd/system")
_PLACE: Final = "@VSERVERS@"
_START: Final = "S98vservers"
_STOP: Final = "K02vservers"
_LEVELS: Final = {"0": _STOP, "1": _STOP, "6": _STOP, **dict.fromkeys("2345", _START)}


@dataclass(frozen=True, slots=True)
class Item:
    """A file or a symlink to be installed."""

    path: Path
    """Below the root."""
    source: str = ""
    """The shipped file."""
    mode: int = 0o644
    target: str = ""
    """Where the symlink leads; empty for a file."""
    is_kept: bool = False
    """If it is there it stays as it is, also when all is removed."""


@dataclass(frozen=True, slots=True)
class Units:
    """What is wanted."""

    init: Init
    marks: tuple[str, ...]
    program: Path
    """The command `vservers`, as it is called at boot."""
    root: Path = Path("/")
    with_unify: bool = True


def find_init(root: Path) -> Init:
    """What starts the system in `root`: systemd where it is installed."""
    places = ("run/systemd/system", "usr/lib/systemd/systemd", "lib/systemd/systemd")
    return "systemd" if any((root / place).exists() for place in places) else "sysv"


def items(units: Units) -> Iterator[Item]:
    """All that belongs to it. Raises WrongUsage for marks that cannot be had."""
    yield Item(Path("etc/default/vservers"), "vservers.default", is_kept=True)
    if units.init == "systemd":
        yield from _for_systemd(units)
    else:
        yield from _for_sysv(units)


def _for_systemd(units: Units) -> Iterator[Item]:
    services = ["vservers.service", "vservers@.service"]
    timers = ["vservers-unify.service", "vservers-unify.timer"] if units.with_unify else []
    for name in (*services, *timers):
        yield Item(_SYSTEMD / name, name)
    for mark in units.marks:
        if not mark or any(char in mark for char in "/%\\ \n@"):
            raise WrongUsage(f"mark {mark!r}: cannot be part of a unit's name")
    wants = _SYSTEMD / "multi-user.target.wants"
    yield Item(wants / "vservers.service", target="../vservers.service")
    for mark in units.marks:
        yield Item(wants / f"vservers@{mark}.service", target="../vservers@.service")
    if timers:
        place = _SYSTEMD / "timers.target.wants/vservers-unify.timer"
        yield Item(place, target="../vservers-unify.timer")


def _for_sysv(units: Units) -> Iterator[Item]:
    if units.marks != ("default",):
        raise WrongUsage(
            "the sysv script starts the guests of one mark",
            hint="write MARK=... to etc/default/vservers, or copy the script for another group",
        )
    yield Item(Path("etc/init.d/vservers"), "vservers.init", 0o755)
    for level, name in _LEVELS.items():
        if (units.root / f"etc/rc{level}.d").is_dir():
            yield Item(Path(f"etc/rc{level}.d") / name, target="../init.d/vservers")
    if units.with_unify:
        yield Item(Path("etc/cron.daily/vservers-unify"), "vservers-unify.cron", 0o755)


def install(units: Units) -> list[Path]:
    """Write all of it; the places that have changed.

    Raises NotPermitted for what cannot be written, and ToolError for a file of another's.
    """
    if units.root == Path("/") and not os.access(units.program, os.X_OK):
        raise ToolError(
            f"{units.program}: is no program that could be called at boot",
            hint="name the installed command with --program",
        )
    wanted = list(items(units))
    for item in wanted:
        if not item.is_kept:
            _check_ours(units.root / item.path)
    return [units.root / item.path for item in wanted if _write(item, units)]


def remove(units: Units) -> list[Path]:
    """Remove what `install` writes, of every mark; the places where something was."""
    places = [units.root / item.path for item in items(units) if not item.is_kept]
    wants = units.root / _SYSTEMD / "multi-user.target.wants"
    if units.init == "systemd":
        places += sorted(wants.glob("vservers@*.service"))
    gone = []
    for place in dict.fromkeys(places):
        if os.path.lexists(place):
            _check_ours(place)
            place.unlink()
            gone.append(place)
    return gone


def _check_ours(place: Path) -> None:
    """Raises ToolError for a file that is neither ours nor a symlink."""
    if place.is_symlink() or not place.exists():
        return
    if not place.is_file() or b"vservers" not in place.read_bytes():
        raise ToolError(f"{place}: is another's; it is not replaced", hint="move it away")


def _write(item: Item, units: Units) -> bool:
    """Whether something was to be done."""
    place = units.root / item.path
    if item.is_kept and os.path.lexists(place):
        return False
    spare = place.with_name(f".{place.name}.new")
    try:
        place.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if item.target:
            if place.is_symlink() and os.fspath(place.readlink()) == item.target:
                return False
            spare.unlink(missing_ok=True)
            spare.symlink_to(item.target)
        else:
            text = read_shipped(item.source, units.program)
            if place.is_file() and not place.is_symlink() and place.read_text() == text:
                return False
            spare.write_text(text)
            spare.chmod(item.mode)
        spare.replace(place)
    except OSError as error:
        raise NotPermitted(f"{place}: cannot be written: {error.strerror}") from error
    return True


def read_shipped(name: str, program: Path) -> str:
    """A shipped file, with the place of the command filled in."""
    quoted = shlex.quote(os.fspath(program))
    return (_DATA / name).read_text().replace(_PLACE, quoted)
