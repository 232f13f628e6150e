"""`vservers install-unit`: guests start with the machine, and are unified at night."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import cast

import click

from vrun import unitfiles
from vrun.commands.plain import say, show
from vrun.commands.vservers import PROGRAM
from vrun.systemd import is_init
from vrun.unitfiles import Init, Units

_FOLDER = click.Path(path_type=Path, file_okay=False)


@click.command("install-unit", context_settings={"max_content_width": 80})
@click.option(
    "--init", type=click.Choice(["systemd", "sysv"]), help="For which; else what is there."
)
@click.option(
    "--mark",
    "marks",
    metavar="M",
    multiple=True,
    default=("default",),
    show_default=True,
    help="Guests to start; more than once (systemd).",
)
@click.option(
    "--root", type=_FOLDER, default="/", metavar="DIR", help="Install below DIR, as into an image."
)
@click.option(
    "--program",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The command `vservers` to call; this one if not given.",
)
@click.option("--no-unify", is_flag=True, help="Without the nightly run.")
@click.option("--remove", is_flag=True, help="Remove what was installed.")
@click.option("-n", "--dry-run", is_flag=True, help="Only say which files that are.")
def command(
    *,
    init: str | None,
    marks: tuple[str, ...],
    root: Path,
    program: Path | None,
    no_unify: bool,
    remove: bool,
    dry_run: bool,
) -> int:
    """Install what starts guests at boot and unifies them every night."""
    root = root.absolute()
    units = Units(
        cast(Init, init) if init else unitfiles.find_init(root),
        marks,
        program.absolute() if program else _this_program(),
        root,
        with_unify=not no_unify,
    )
    if dry_run:
        for item in unitfiles.items(units):
            say(f"{root / item.path}{f' -> {item.target}' if item.target else ''}")
        return 0
    changed = unitfiles.remove(units) if remove else unitfiles.install(units)
    for place in changed:
        say(f"{'removed' if remove else 'wrote'} {place}")
    if not changed:
        say("nothing to do: there is nothing" if remove else "nothing to do: all is there")
    elif root == Path("/"):
        _tell_init(units, is_removed=remove)
    return 0


def _this_program() -> Path:
    """The command that was called, where boot scripts find it."""
    found = shutil.which(sys.argv[0]) or sys.argv[0]
    return Path(found).absolute()


def _tell_init(units: Units, *, is_removed: bool) -> None:
    """Have the init system look at what has changed, and say what is next."""
    if units.init == "systemd":
        if is_init():
            _run("systemctl", "daemon-reload")
        if not is_removed:
            say(f"now: systemctl start {' '.join(f'vservers@{mark}' for mark in units.marks)}")
    elif shutil.which("update-rc.d"):
        _run("update-rc.d", PROGRAM, *(["remove"] if is_removed else ["defaults"]))
    elif shutil.which("chkconfig") and not is_removed:
        _run("chkconfig", "--add", PROGRAM)


def _run(*argv: str) -> None:
    done = subprocess.run(argv, check=False, stdin=subprocess.DEVNULL)  # noqa: S603
    if done.returncode:
        show(f"{' '.join(argv)} ended with status {done.returncode}", start=PROGRAM)
