"""vreboot: restart guests from the host, or the guest that it is called in."""

from vrun import syscalls
from vrun.commands import entry
from vrun.commands.powering import power_command

command = power_command("vreboot", word="restart", inside=("reboot",), number=syscalls.RB_AUTOBOOT)


def main() -> None:
    """The console script."""
    entry.run(command)
