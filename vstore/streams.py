"""Standard input, output and error: there, whatever the caller has closed."""

import os
import sys


def fill_standard() -> None:
    """Open descriptors 0 to 2, and the streams on them, to nowhere where the caller closed them.

    To be called before a program opens anything that it keeps: the lowest free number is taken, so
    that a line of output would be written into a guest's file. Programs that are started get them
    too.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    # Without a descriptor at its start the interpreter has made no stream.
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - for as long as the program runs
    if sys.stdout is None:
        sys.stdout = open(1, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
