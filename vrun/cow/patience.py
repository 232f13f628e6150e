"""How long a supervisor looks at a call before it gives its life up.

A path may lead to a file system that does not answer: a file server that is gone, a FUSE program
that was stopped. Who goes there waits, and so would the supervisor, in a state that only a signal
which ends a process gets it out of, and with it all calls of its guest. So a timer ends it. Its
successor finds that by the page, and looks once more: a disk may have been slow. When that takes
too long again the next one lets the call go on.
"""

import signal
import time
from typing import Final

from vrun.cow.notifications import Page

LONGEST_S: Final = 3.0
_RENEWED_AFTER_S: Final = 0.5
"""The timer is not set for each call, which would cost it a tenth: a look has this much less."""


class Patience:
    """SIGALRM for this process, unless it is done with looking at calls by then; setitimer(2)."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self.renew_s = 0.0
        """When to begin again if there are calls, by the monotonic clock; 0: it does not run."""
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})

    def begin(self) -> None:
        """Have a whole span from now on."""
        now = time.monotonic()
        self.renew_s = now + _RENEWED_AFTER_S
        self._page.note_due(now + LONGEST_S)
        signal.setitimer(signal.ITIMER_REAL, LONGEST_S)

    def end(self) -> None:
        """What comes now may take its time."""
        if self.renew_s:
            self.renew_s = 0.0
            signal.setitimer(signal.ITIMER_REAL, 0)
            self._page.note_due(0.0)
