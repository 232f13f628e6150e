"""setattr: set and clear the attributes of files."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import click

from vstore import cli
from vstore.attributes import NONE, Attribute, Reach, change, parse_attributes, plan_immutable
from vstore.errors import ToolError, WrongUsage
from vstore.render import show_text

log = logging.getLogger(__name__)

_BOTH: Final = Attribute.IUNLINK | Attribute.IMMUTABLE
_NAMES: Final = {
    "immutable": Attribute.IMMUTABLE,
    "immu": _BOTH,
    "iunlink": _BOTH,
    "iunlink-but-not-immutable": Attribute.IUNLINK,
    "ixunlink": Attribute.IUNLINK,
    "barrier": Attribute.BARRIER,
    "admin": Attribute.ADMIN,
    "watch": Attribute.WATCH,
    "hide": Attribute.HIDE,
    "write": Attribute.WRITE,
    "cow": Attribute.COW,
}

_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])


@dataclass
class _Wishes:
    """What the command line asks for."""

    wanted: Attribute = NONE
    unwanted: Attribute = NONE

    def add(self, attribute: Attribute, *, clear: bool) -> None:
        if clear:
            self.unwanted |= attribute
        else:
            self.wanted |= attribute


def _attribute_option(name: str, *, clear: bool) -> Callable[[_Decorated], _Decorated]:
    """--NAME, or --~NAME and --!NAME; those that a stock kernel has not are not in the help."""

    def note(context: click.Context, parameter: click.Parameter, given: bool) -> None:
        if given:
            context.ensure_object(_Wishes).add(_NAMES[name], clear=clear)

    return click.option(
        *((f"--~{name}", f"--!{name}") if clear else (f"--{name}",)),
        f"{'clear' if clear else 'set'}_{name.replace('-', '_')}",
        is_flag=True,
        expose_value=False,
        hidden=Attribute.IMMUTABLE not in _NAMES[name],
        callback=note,
        help=f"{'Clear' if clear else 'Set'} {'both' if _NAMES[name] == _BOTH else 'immutable'}.",
    )


def _number_option(*, clear: bool) -> Callable[[_Decorated], _Decorated]:
    """--flags N, or --~flags N and --!flags N."""

    def note(context: click.Context, parameter: click.Parameter, text: str | None) -> None:
        if text is not None:
            context.ensure_object(_Wishes).add(parse_attributes(text), clear=clear)

    return click.option(
        *(("--~flags", "--!flags") if clear else ("--flags",)),
        "clear_flags" if clear else "set_flags",
        metavar="N",
        expose_value=False,
        callback=note,
        help=f"{'Clear' if clear else 'Set'} the attributes with these numbers.",
    )


def _attribute_options(function: _Decorated) -> _Decorated:
    function = _number_option(clear=False)(_number_option(clear=True)(function))
    for name in reversed(_NAMES):
        function = _attribute_option(name, clear=True)(function)
        function = _attribute_option(name, clear=False)(function)
    return function


@click.command("setattr")
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@_attribute_options
@click.option("-R", "recursive", is_flag=True, help="Change all that is below directories too.")
@click.option("-x", "one_filesystem", is_flag=True, help="Stay on the file system of each FILE.")
@cli.verbose_option
@cli.version_option
@click.pass_context
def command(
    context: click.Context, *, files: tuple[str, ...], recursive: bool, one_filesystem: bool
) -> int:
    """Set or clear the attributes of each FILE.

    Where one attribute is to be both set and cleared, it is cleared. A stock kernel has the
    immutable flag alone; with it, both (iunlink and immutable) are the same. The other names
    of the original are known: to set them is refused, to clear them does nothing.

    Objects, which guests share, are never changed: see vpool break.
    """
    wishes = context.ensure_object(_Wishes)
    if not wishes.wanted | wishes.unwanted:
        raise WrongUsage("no attribute is named", hint="say for example: setattr --immutable FILE")
    immutable = plan_immutable(wishes.wanted, wishes.unwanted)
    if immutable is None:
        log.info("nothing to do: no file has what is to be cleared")
        return 0
    reach = Reach(contents=recursive, recursive=recursive, one_filesystem=one_filesystem)
    return _change_all(files, reach, immutable=immutable)


def _change_all(files: tuple[str, ...], reach: Reach, *, immutable: bool) -> int:
    done = failed = 0
    last_error: ToolError | None = None
    for start in files:
        for changed in change(os.fsencode(start), reach, immutable=immutable):
            if changed.error is None:
                done += 1
                log.info("%s: %s", os.fsdecode(changed.path), "set" if immutable else "cleared")
            else:
                failed += 1
                last_error = changed.error
                click.echo(show_text(f"setattr: {changed.error.message}"), err=True)
    if last_error and last_error.hint:
        click.echo(show_text(f"hint: {last_error.hint}"), err=True)
    return cli.exit_code(done=done, failed=failed, error=last_error)


def main() -> None:
    """The console script."""
    cli.run(command)
