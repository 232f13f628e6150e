"""vhalt: stop guests from the host, or the guest that it is called in."""

from vrun import syscalls
from vrun.commands import entry
from vrun.commands.powering import power_command

command = power_command(
    "vhalt", word="stop", inside=("poweroff", "halt"), number=syscalls.RB_POWER_OFF
)


def main() -> None:
    """The console script."""
    entry.run(command)
