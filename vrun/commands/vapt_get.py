"""vapt-get: apt-get in many guests at once, and the files that it brought shared again."""

import os
from typing import Final

from vrun.commands import entry
from vrun.commands.packages import Arguments, package_command
from vrun.keys import key_names

PROGRAM: Final = "vapt-get"
_NOBODY_ANSWERS: Final = (
    *("-o", "APT::Get::Assume-Yes=true"),
    *("-o", "Dpkg::Options::=--force-confdef"),
    *("-o", "Dpkg::Options::=--force-confold"),
)
"""Go on; of a configuration file that was changed in the guest, keep the guest's."""
_CHANGING: Final = key_names(
    "upgrade dist-upgrade full-upgrade dselect-upgrade install reinstall remove purge autoremove "
    "auto-remove autopurge build-dep satisfy"
)
_ONLY_SAID: Final = key_names(
    "-s --simulate --just-print --dry-run --recon --no-act -d --download-only"
)


def _argv(arguments: Arguments) -> Arguments:
    return ("apt-get", *_NOBODY_ANSWERS, *arguments)


def _changes(arguments: Arguments) -> bool:
    given = set(arguments)
    return bool(given & _CHANGING) and not given & _ONLY_SAID


command = package_command(PROGRAM, argv=_argv, changes=_changes)


def main() -> None:
    """The console script."""
    os.environ.setdefault("DEBIAN_FRONTEND", "noninteractive")  # is passed on into guests
    entry.run(command, with_rest=True)
