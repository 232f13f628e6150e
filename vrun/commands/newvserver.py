"""newvserver: asks what `vserver NAME build` has to know, and builds.

Every question has an option and a default, and in the end the command is shown that does the same.
"""

import gc
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

from vrun import lifecycle, names
from vrun.commands import entry
from vrun.commands.build import METHODS, build_command
from vrun.commands.plain import HEARER, say
from vrun.errors import ToolError
from vrun.guestfiles import parse_interface
from vrun.order import Order
from vstore.cli import version_option
from vstore.guest import confdir, find_guest, list_guests, parse_name

PROGRAM: Final = "newvserver"
_RELEASE: Final = "bookworm"
_OS_RELEASE: Final = Path("/etc/os-release")
_ROUTES: Final = Path("/proc/net/route")

Check = Callable[[str], str]


class _Questions:
    """Asks, or takes the default where nobody is to be asked."""

    def __init__(self, *, is_asking: bool) -> None:
        self._is_asking = is_asking

    def ask(self, text: str, given: str | None, default: str | None, check: Check) -> str:
        """What was given, else the answer, else the default; `check` says what is wrong with it.

        Raises UsageError where there is neither, or it is wrong and was not typed.
        """
        if given is not None or not self._is_asking:
            if given is None and default is None:
                raise click.UsageError(f"{text}? there is no default; say it, or leave --yes out")
            return _checked(check, default or "" if given is None else given)
        while True:
            answer = str(click.prompt(text, default=default, show_default=bool(default)))
            try:
                return _checked(check, answer.strip())
            except click.UsageError as error:
                click.echo(error.message)

    def confirm(self, text: str, given: bool | None, *, default: bool) -> bool:
        """As `ask`, for yes and no."""
        if given is not None or not self._is_asking:
            return default if given is None else given
        return click.confirm(text, default=default)


def _checked(check: Check, text: str) -> str:
    try:
        return check(text)
    except (ToolError, ValueError) as error:
        raise click.UsageError(
            error.message if isinstance(error, ToolError) else str(error)
        ) from None


@click.command(
    PROGRAM,
    context_settings={"max_content_width": 80},
    epilog="Behind `--`: more for the method, as for vserver build.",
)
@click.option("-m", "--method", type=click.Choice(sorted(METHODS)), help="How it is built.")
@click.option("-d", "--distribution", metavar="RELEASE", help="For debootstrap.")
@click.option("-s", "--source", metavar="GUEST|DIR|FILE", help="For clone, rsync, template.")
@click.option("--hostname", metavar="HOST")
@click.option(
    "--interface", "interfaces", multiple=True, metavar="[DEV:]IP[/LENGTH]", help="An address."
)
@click.option("--no-interface", is_flag=True, help="No addresses: do not ask for them.")
@click.option("--boot/--no-boot", default=None, help="Start it with the host (mark default).")
@click.option("--start/--no-start", default=None, help="Start it when it is built.")
@click.option("-y", "--yes", is_flag=True, help="Ask nothing: defaults where nothing is given.")
@version_option
@click.argument("name", required=False)
@click.pass_obj
def command(rest: tuple[str, ...], /, *, name: str | None, yes: bool, **given: Any) -> int:
    """Make a guest: asks what has to be known, and builds it."""
    gc.enable()  # a build takes longer than a start
    questions = _Questions(is_asking=not yes)
    name = questions.ask("Name of the guest", name, None, _new_name)
    words = _method_words(questions, given, rest)
    host = questions.ask("Host name", given["hostname"], name, _not_empty)
    shared = ["--hostname", host, *_address_words(questions, given)]
    boots = questions.confirm("Start it with the host?", given["boot"], default=False)
    starts = questions.confirm("Start it now?", given["start"], default=False)
    build = ["-m", words[0], *shared, *(["--", *words[1:]] if words[1:] else [])]
    say(f"# {shlex.join(['vserver', name, 'build', *build])}")
    if not questions.confirm("Build it?", None, default=True):
        say("nothing is built")
        return 0
    code = build_command(name, build)
    if code:
        return code
    if boots:
        mark = confdir() / name / "apps/init/mark"
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text("default\n")
    if starts:
        lifecycle.start(names.find(name), Order(), HEARER)
        say(f"{name}: started")
    else:
        say(f"{name}: `vserver {name} start` starts it")
    return 0


def _method_words(questions: _Questions, given: dict[str, Any], rest: tuple[str, ...]) -> list[str]:
    """The method, and what it has to be told."""
    guests = [guest.name for guest in list_guests()]
    default = "clone" if guests else "debootstrap"
    shown = f"How ({', '.join(sorted(METHODS))})"
    method = questions.ask(shown, given["method"], default, _method)
    if method == "debootstrap":
        release = questions.ask("Release", given["distribution"], _host_release(), _not_empty)
        return [method, "-d", release, *rest]
    if method == "clone":
        first = guests[0] if guests else None
        source = questions.ask("Clone of which guest", given["source"], first, _source)
        return [method, "-s", source, *rest]
    if method == "rsync":
        source = questions.ask("Copy of which folder", given["source"], None, _folder)
        return [method, "-s", source, *rest]
    if method == "template":
        archive = questions.ask("Which tar archive", given["source"], None, _file)
        return [method, "-t", archive, *rest]
    return [method, *rest]


def _address_words(questions: _Questions, given: dict[str, Any]) -> list[str]:
    """Addresses until none is given any more; without a device the one of the default route."""
    found = list(given["interfaces"])
    if not found and not given["no_interface"]:
        device = _default_device()
        example = f"{device}:192.0.2.7/24" if device else "eth0:192.0.2.7/24"
        text = f"Address, such as {example}; empty: no more"
        while address := questions.ask(text, None, "", _address):
            one = parse_interface(address)
            needs_device = device and one.device is None and not one.is_bound_only
            found.append(f"{device}:{address}" if needs_device else address)
    return [word for address in found for word in ("--interface", address)]


# --- what an answer must be


def _new_name(text: str) -> str:
    name = parse_name(text)
    if find_guest(name) or (confdir() / name).exists() or (confdir() / f"{name}.conf").exists():
        raise ValueError(f"guest {name} is there already")
    return name


def _not_empty(text: str) -> str:
    if not text:
        raise ValueError("it cannot be empty")
    return text


def _method(text: str) -> str:
    if text not in METHODS:
        raise ValueError(f"there is no method {text!r}")
    return text


def _source(text: str) -> str:
    if "/" not in text:
        names.find(text)
    return text


def _folder(text: str) -> str:
    if not Path(text).is_dir():
        raise ValueError(f"{text!r} is no folder")
    return text


def _file(text: str) -> str:
    if not Path(text).is_file():
        raise ValueError(f"{text!r} is no file")
    return text


def _address(text: str) -> str:
    """An IPv4 or IPv6 address with or without a device and a length."""
    if text:
        parse_interface(text)
    return text


# --- defaults


def _host_release() -> str:
    """The host's own, if it is Debian."""
    values = dict(line.split("=", 1) for line in _os_release().splitlines() if "=" in line)
    if values.get("ID", "").strip('"') != "debian":
        return _RELEASE
    return values.get("VERSION_CODENAME", "").strip('"') or _RELEASE


def _os_release() -> str:
    try:
        return _OS_RELEASE.read_text()
    except OSError:
        return ""


def _default_device() -> str | None:
    """The device of the host's default route."""
    try:
        lines = _ROUTES.read_text().splitlines()[1:]
    except OSError:
        return None
    fields = (line.split() for line in lines)
    return next((one[0] for one in fields if one[1] == "00000000"), None)


def main() -> None:
    """The console script."""
    entry.run(command, with_rest=True)
