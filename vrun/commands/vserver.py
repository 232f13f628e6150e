"""vserver: start, stop and look into guests.

`vserver [OPTIONS] NAME COMMAND [ARGUMENTS]`. What needs no options is done in plain.py: an
interpreter with click is ready some 20 ms later than one without, and a start takes not much more.
All else is in guestcommands.py.
"""

import gc


def main() -> None:
    """The console script."""
    gc.disable()  # nothing that is imported is garbage, and to find that out takes time
    from vrun.commands import plain

    plain.main()
