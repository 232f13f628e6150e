"""vrpm: rpm in many guests at once, and the files that it brought shared again."""

import re
from typing import Final

from vrun.commands import entry
from vrun.commands.packages import Arguments, package_command

PROGRAM: Final = "vrpm"
_ASKING: Final = re.compile(r"-[A-Za-z]*[qVK][A-Za-z]*|--(query|verify|checksig|test|eval|version)")


def _argv(arguments: Arguments) -> Arguments:
    return ("rpm", *arguments)


def _changes(arguments: Arguments) -> bool:
    return not any(map(_ASKING.fullmatch, arguments))


command = package_command(PROGRAM, argv=_argv, changes=_changes)


def main() -> None:
    """The console script."""
    entry.run(command, with_rest=True)
