"""Signals that wait while a process forks.

Python runs hooks of its modules around fork(2), and drops what a signal handler raises in one of
them: whoever asked the command to end would not have been heard. And in the child it would be
raised in the middle of what its parent was doing, and undo that.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def signals_held_back() -> Iterator[Callable[[], None]]:
    """No signal is heard in the block, in which a process is forked and noted.

    Gives what the child is to call where a signal may end it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())

    def let_come() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    try:
        yield let_come
    finally:
        let_come()
