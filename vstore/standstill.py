"""Guests that run are held still while names in them are replaced: for some milliseconds, never two
times in a row without having run for as long.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Final

from vstore import freezer
from vstore.plan import Slot
from vstore.window import Windows

_SPAN_S: Final = 0.01
"""How long a guest shall stand still at most; a slow disk or a busy machine makes it longer."""
_FIRST_PIECE: Final = 30  # names
_SMALLEST_PIECE: Final = 4
_LARGEST_PIECE: Final = 150


class Standstill:
    """Holds the guests of a batch still. `cgroups` are those of the run's trees, "" for a tree
    whose guest does not run.
    """

    def __init__(self, cgroups: Sequence[str], windows: Windows) -> None:
        self._cgroups = cgroups
        self._windows = windows
        self._restless: set[str] = set()  # guests that could not be held are put off to another run
        self._piece = float(_FIRST_PIECE)
        self._began_s = 0.0
        self._names = 0
        self.moving: set[int] = set()
        """Trees whose guests run, and could not be held still."""

    def is_running(self, tree: int) -> bool:
        return bool(self._cgroups[tree])

    def pieces(self, slots: Sequence[Slot]) -> Iterator[Sequence[Slot]]:
        """Cut slots into pieces of so many names as can be replaced while a guest stands still; all
        at once where none runs.
        """
        if not any(self.is_running(member.tree) for slot in slots for member in slot.members):
            yield slots
            return
        start = 0
        while start < len(slots):
            end, names = start, 0
            while end < len(slots) and (end == start or names < self._piece):
                names += len(slots[end].members)
                end += 1
            self._names = names
            yield slots[start:end]
            start = end

    def hold(self, trees: set[int], stack: ExitStack) -> None:
        """Hold the guests of these trees still until the stack unwinds; those that cannot be are in
        `moving`. Raises PoolBusy, NoSpace.
        """
        paths = sorted({self._cgroups[tree] for tree in trees} - {""} - self._restless)
        cgroups: dict[str, int] = {}
        for path in paths:
            with suppress(OSError):  # the guest has just stopped
                cgroups[path] = stack.enter_context(freezer.opened(path))
        if cgroups:
            stack.enter_context(self._windows.holding(cgroups))
            stack.callback(self._let_breathe)  # before another program may hold them
        still = self._freeze_all(cgroups, stack)
        self._restless |= cgroups.keys() - still
        self.moving = {
            tree for tree in trees if self._cgroups[tree] and self._cgroups[tree] not in still
        }

    def _freeze_all(self, cgroups: Mapping[str, int], stack: ExitStack) -> set[str]:
        """Hold guests still, all or after some tries those that can be; returns their cgroups."""
        for turn in range(freezer.TRIES):
            if turn:
                time.sleep(freezer.BREATH_S)
            self._began_s = time.monotonic()
            attempt = ExitStack()
            still = {
                path for path, fd in cgroups.items() if freezer.hold(path, fd, attempt, tries=1)
            }
            if len(still) == len(cgroups) or turn == freezer.TRIES - 1:
                break
            attempt.close()
        stack.push(attempt)
        return still

    def _let_breathe(self) -> None:
        """Let the guests run for as long as they stood still, and learn from how long that was."""
        span_s = time.monotonic() - self._began_s
        if span_s > _SPAN_S:
            self._piece = max(_SMALLEST_PIECE, self._piece * _SPAN_S / span_s)
        elif span_s < _SPAN_S / 2 and self._names >= self._piece:
            self._piece = min(_LARGEST_PIECE, self._piece * 1.5)
        time.sleep(min(span_s, freezer.BREATH_S))
