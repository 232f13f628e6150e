"""vdlimit: what guests may store, by project quota."""

import os
from pathlib import Path

import click

from vrun import diskquota
from vrun.commands import entry
from vrun.commands.plain import say
from vrun.config import load_spec
from vrun.diskquota import Quota
from vrun.errors import NotPermitted, ToolError, WrongUsage
from vrun.names import find
from vstore.cli import complete_guest, version_option
from vstore.record import replace

_TOTALS = ("space_total", "inodes_total")
_USES = ("space_used", "inodes_used")
_RESERVED = "reserved"
_NONE = -1
_KIB = 1024


@click.command("vdlimit", context_settings=entry.WIDTH)
@click.option(
    "--xid",
    "word",
    metavar="X",
    required=True,
    shell_complete=complete_guest,
    help="The guest, by name or number.",
)
@click.option("-s", "--set", "wanted", metavar="KEY=VALUE", multiple=True, help="Change a limit.")
@click.option("-d", "--remove", is_flag=True, help="Take the limits away.")
@version_option
@click.argument("places", metavar="DIRECTORY...", nargs=-1, required=True)
def command(*, word: str, wanted: tuple[str, ...], remove: bool, places: tuple[str, ...]) -> int:
    """Show or change what a guest may store on the file systems of DIRECTORY.

    Keys that can be set are space_total (KiB) and inodes_total; -1 is no limit. It counts from now
    on, until the guest's next start, which sets what its dlimits/ says.
    """
    if remove and wanted:
        raise WrongUsage("--set and --remove cannot go together")
    project = _number_of(word)
    totals = dict(_parse(text) for text in wanted) if not remove else dict.fromkeys(_TOTALS)
    for place in places:
        fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            quota = _load(fd, place, project)
            if totals:
                _store(fd, place, project, replace(quota, **totals))
            else:
                _show(project, place, quota)
        finally:
            os.close(fd)
    return 0


def _number_of(word: str) -> int:
    if word.isdecimal() and int(word):
        return int(word)
    xid = load_spec(find(word)).xid
    if xid is None:
        raise ToolError(
            f"guest {word}: has no number of its own, and no limits",
            hint="write one into its file context",
        )
    return xid


def _parse(text: str) -> tuple[str, int | None]:
    key, _, value = text.partition("=")
    if key in (*_USES, _RESERVED):
        raise WrongUsage(
            f"{key} cannot be set: the kernel counts what is used, nothing is reserved"
        )
    if key not in _TOTALS:
        raise WrongUsage(f"{text!r}: is none of {', '.join(_TOTALS)}, an equals sign and a number")
    try:
        number = int(value)
    except ValueError:
        number = _NONE - 1
    if number < _NONE or number > 1 << 50:
        raise WrongUsage(f"{text!r}: {value!r} is no number from -1 on")
    if number == _NONE:
        return key, None
    return key, number * _KIB if key == "space_total" else number


def _load(fd: int, place: str, project: int) -> Quota:
    quota = diskquota.load(fd, project)
    if quota is None:
        raise NotPermitted(
            f"{place}: its file system counts no projects", hint="mount it with prjquota"
        )
    return quota


def _store(fd: int, place: str, project: int, quota: Quota) -> None:
    """Less than is used already is refused, as the original does."""
    for total, used in zip(_TOTALS, _USES, strict=True):
        limit = getattr(quota, total)
        if limit is not None and limit < getattr(quota, used):
            raise ToolError(
                f"{Path(place)}: {total} cannot be less than the {getattr(quota, used)} in use"
            )
    if not diskquota.is_enforced(fd):
        raise NotPermitted(
            f"{place}: its file system counts projects, and does not limit them",
            hint="mount it with prjquota",
        )
    diskquota.store(fd, project, quota)


def _show(project: int, place: str, quota: Quota) -> None:
    space, inodes = quota.space_total, quota.inodes_total
    say(f"{project} {place}")
    say(f"space_used={-(-quota.space_used // _KIB)}")
    say(f"space_total={_NONE if space is None else space // _KIB}")
    say(f"inodes_used={quota.inodes_used}")
    say(f"inodes_total={_NONE if inodes is None else inodes}")
    say("reserved=0")


def main() -> None:
    """The console script."""
    entry.run(command)
