"""vserver NAME build: make a guest.

The command line has two parts. What all methods share stands before `--`, what one method wants
behind it: `vserver web build -m debootstrap --interface eth0:192.0.2.7/24 -- -d bookworm`.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import click

from vrun.build.clone import Clone
from vrun.build.debootstrap import Debootstrap
from vrun.build.host import Host
from vrun.build.method import Method
from vrun.build.options import BuildOptions, load_default_options
from vrun.build.plan import Built, build
from vrun.build.rsync import RSYNC_OPTIONS, Rsync
from vrun.build.skeleton import Skeleton
from vrun.build.template import Template
from vrun.guestfiles import NewGuest
from vstore.cli import version_option
from vstore.guest import parse_name, vdirbase
from vstore.render import ProgressBar, show_text

EXIT_USAGE: Final = 1
"""Of the original's tools, and so of `vserver`: a wrong option."""

_ORIGINAL_METHODS: Final = ("rpm", "yum", "apt-rpm", "urpmi", "fai", "legacy")

_FOLDER: Final = click.Path(path_type=Path)
_distribution = click.option("-d", "distribution", metavar="DIST", help="The distribution's name.")


def build_command(name: str, arguments: Sequence[str], *, quiet: bool = False) -> int:
    """Build the guest `name` as the words behind `build` say; returns the exit code.

    Raises ToolError and OSError for a build that failed.
    """
    shared, own = _split(arguments)
    name = name.removesuffix("/")
    program = f"vserver {name} build"
    try:
        words = [*load_default_options(), *shared]
        chosen = _shared.main(words, program, standalone_mode=False, obj=parse_name(name))
        if not isinstance(chosen, tuple):
            return int(chosen or 0)  # --help, --version
        method_name, options = chosen
        method = METHODS[method_name].main(
            own, f"{program} -m {method_name} --", standalone_mode=False
        )
        if not isinstance(method, Method):
            return int(method or 0)
    except click.UsageError as error:
        error.show()
        return EXIT_USAGE
    with ProgressBar() as bar:
        built = build(options, method, bar)
    for notice in built.notices:
        click.echo(show_text(f"{program}: {notice}"), err=True)
    if not quiet:
        click.echo(show_text(_summary(built, method)))
    return 0


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before the first `--`, and what behind it."""
    words = list(arguments)
    if "--" not in words:
        return words, []
    place = words.index("--")
    return words[:place], words[place + 1 :]


def _summary(built: Built, method: Method) -> str:
    number = f"context {built.xid}" if built.xid is not None else "a context number at each start"
    return (
        f"{built.name}: built by {method.name} in {built.seconds:.1f} s: root {built.root}, "
        f"{number}, init style {built.style or 'sysv'}"
    )


# --- what all methods share


@click.command(
    "build",
    epilog="Methods: clone, debootstrap, host, rsync, skeleton, template.",
)
@click.option("-m", "--method", required=True, metavar="METHOD", help="How; see below.")
@click.option("-n", "--name", metavar="NAME", help="The guest's name, once more.")
@click.option("--force", is_flag=True, help="Rename what is there to X.~EPOCH~.")
@click.option("--i-know-its-there", "may_be_used", is_flag=True, help="Build over a used root.")
@click.option("--keep", is_flag=True, help="Delete nothing when it fails.")
@click.option("--rootdir", type=_FOLDER, metavar="DIR", help="The folder of the guests' roots.")
@click.option("--pkgbase", type=_FOLDER, metavar="DIR", help="Accepted, and not used.")
@click.option("--confdir", type=_FOLDER, metavar="DIR", help="The guest's configuration folder.")
@click.option("--lockfile", type=_FOLDER, metavar="FILE", help="Where the link `run` leads.")
@click.option("--context", type=int, metavar="N", help="Its number for good, 2 to 49151.")
@click.option("--hostname", metavar="HOST")
@click.option("--netdev", metavar="DEVICE", help="The device of all its addresses.")
@click.option("--netmask", metavar="MASK")
@click.option("--netprefix", metavar="LENGTH")
@click.option("--netbcast", metavar="ADDRESS")
@click.option(
    "--interface",
    "interfaces",
    multiple=True,
    metavar="[NAME=][DEV:]IP[/MASK]",
    help="An address; more than once. The device `nodev`: it exists already.",
)
@click.option("--flags", multiple=True, metavar="FLAG,...", help="Context flags.")
@click.option("--cpuset", metavar="NAME")
@click.option("--cpusetcpus", metavar="LIST[:EXCL]")
@click.option("--cpusetmems", metavar="LIST[:EXCL]")
@click.option("--cpusetvirt", is_flag=True)
@click.option("--initstyle", metavar="STYLE", help="Else found out from the tree.")
@click.option("--debug", is_flag=True, help="Say all that is done.")
@version_option
@click.pass_obj
def _shared(guest: str, /, **given: Any) -> tuple[str, BuildOptions]:
    """Make the guest. What the method wants stands behind `--`; see `-m METHOD -- --help`."""
    if given["debug"]:
        for package in ("vstore", "vrun"):
            logging.getLogger(package).setLevel(logging.DEBUG)
    if given["name"] not in (None, guest):
        raise click.UsageError(f"--name {given['name']}: the guest's name is {guest}.")
    if given["pkgbase"]:
        click.echo("--pkgbase: packages are managed inside the guest; not used", err=True)
    return _method_name(given["method"]), BuildOptions(
        guest=_new_guest(guest, given),
        may_rename=given["force"],
        may_be_used=given["may_be_used"],
        keep=given["keep"],
    )


def _method_name(given: str) -> str:
    if given in METHODS:
        return given
    known = ", ".join(sorted(METHODS))
    if given in _ORIGINAL_METHODS:
        raise click.UsageError(f"The method {given} of the original is not there; use {known}.")
    raise click.UsageError(f"There is no method {given!r}; use {known}.")


def _new_guest(name: str, given: dict[str, Any]) -> NewGuest:
    return NewGuest(
        name=name,
        root=(_absolute(given["rootdir"]) or vdirbase()) / name,
        xid=given["context"],
        hostname=given["hostname"],
        net_device=given["netdev"],
        net_mask=given["netmask"],
        net_prefix=given["netprefix"],
        net_broadcast=given["netbcast"],
        interfaces=given["interfaces"],
        flags=given["flags"],
        init_style=given["initstyle"],
        cpuset=given["cpuset"],
        cpuset_cpus=given["cpusetcpus"],
        cpuset_mems=given["cpusetmems"],
        cpuset_virtual=given["cpusetvirt"],
        config=_absolute(given["confdir"]),
        run_link=_absolute(given["lockfile"]),
    )


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else Path(os.path.abspath(path))  # noqa: PTH100 - not resolved


# --- what each method wants


@click.command("skeleton", context_settings={"allow_interspersed_args": False})
@_distribution
@click.option("--pkgmgmt", "with_packages", is_flag=True, help="It manages its own packages.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def _skeleton(*, distribution: str | None, with_packages: bool, command: tuple[str, ...]) -> Method:
    """An empty root with devices and settings; then COMMAND is run on the host, in that root."""
    return Skeleton(distribution=distribution, with_packages=with_packages, command=command)


@click.command("template")
@click.option(
    "-t", "archives", multiple=True, type=_FOLDER, metavar="TARBALL", help="More than once."
)
@_distribution
@click.option("--nodevsanity", "with_devices", is_flag=True, help="Unpack its devices too.")
def _template(
    *, archives: tuple[Path, ...], distribution: str | None, with_devices: bool
) -> Method:
    """Unpack tar archives, however they are compressed, one over the other."""
    return Template(archives=archives, distribution=distribution, with_devices=with_devices)


@click.command("clone")
@click.option("-s", "--source", required=True, metavar="GUEST|DIR", help="A guest that is stopped.")
@_distribution
@click.option(
    "-X",
    "--exclude-from",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A list of paths that are left out.",
)
def _clone(*, source: str, distribution: str | None, exclude_from: Path | None) -> Method:
    """Link what is unified and copy the rest of another guest, or of a tree (with a slash)."""
    return Clone(source=source, distribution=distribution, exclude_from=exclude_from)


@click.command("debootstrap")
@click.option("-d", "distribution", required=True, metavar="RELEASE", help="bookworm, trixie...")
@click.option("-m", "mirror", metavar="MIRROR")
@click.option("-s", "script", metavar="SCRIPT", help="Of debootstrap, for a release it lacks.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def _debootstrap(
    *, distribution: str, mirror: str | None, script: str | None, options: tuple[str, ...]
) -> Method:
    """Install Debian from a mirror. OPTIONS, behind another `--`, are for debootstrap."""
    return Debootstrap(distribution=distribution, mirror=mirror, script=script, options=options)


@click.command("rsync")
@click.option("-s", "--source", required=True, metavar="DIR|GUEST", help="On this machine.")
@_distribution
@click.option("-o", "options", multiple=True, metavar="OPTION", help="For rsync, which then runs.")
@click.argument("more", nargs=-1, type=click.UNPROCESSED)
def _rsync(
    *, source: str, distribution: str | None, options: tuple[str, ...], more: tuple[str, ...]
) -> Method:
    """Copy a tree with all that belongs to it."""
    if more:
        options = (*(options or RSYNC_OPTIONS), *more)
    return Rsync(source=source, distribution=distribution, options=options)


@click.command("host")
@click.option("--source", type=_FOLDER, default="/", metavar="DIR", help="Another root than /.")
@_distribution
def _host(*, source: Path, distribution: str | None) -> Method:
    """Copy the host's packages, without its users, state, keys and passwords."""
    return Host(source=source, distribution=distribution)


METHODS: Final = {
    "clone": _clone,
    "debootstrap": _debootstrap,
    "host": _host,
    "rsync": _rsync,
    "skeleton": _skeleton,
    "template": _template,
}
