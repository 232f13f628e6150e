"""The pool's lock while a guest is received: held together with others for as long as there is
something to do, and given to whoever waits to hold the pool alone.
"""

import time
from contextlib import ExitStack
from typing import Final

from vstore.pool import Pool

_HELD_S: Final = 1.0


class Sharing:
    """The lock of a pool, or of none in a dry run that has no pool."""

    def __init__(self, pool: Pool | None) -> None:
        self._pool = pool
        self._lock = ExitStack()
        self._is_held = False
        self._ask_at = 0.0

    def take(self) -> None:
        """Hold the pool, unless it is held already. Raises PoolBusy."""
        if not self._is_held and self._pool is not None:
            self._lock.enter_context(self._pool.share())
            self._ask_at = time.monotonic() + _HELD_S
            self._is_held = True

    def let_go(self) -> None:
        self._lock.close()
        self._is_held = False

    def is_over(self) -> bool:
        """Whether it has been held for long enough, and somebody else is to have the pool now."""
        now = time.monotonic()
        if not self._is_held or self._pool is None or now < self._ask_at:
            return False
        self._ask_at = now + _HELD_S
        return self._pool.is_waited_for()
