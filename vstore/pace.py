"""How a long job is paced: pieces of bounded size, and nothing new once its time is up."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


class TimeBudget:
    """`seconds` from now on; None is all the time there is."""

    def __init__(self, seconds: float | None) -> None:
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self.is_spent = False
        """Whether something was not begun for want of time."""

    def spend_on(self, steps: Iterable[Item]) -> Iterator[Item]:
        """Give the steps on until the time is up; what is not begun then waits for another run."""
        for step in steps:
            if self._deadline is not None and time.monotonic() > self._deadline:
                self.is_spent = True
                return
            yield step


def batches(
    items: Iterable[Item], *, count: int, size: int, weigh: Callable[[Item], tuple[int, int]]
) -> Iterator[list[Item]]:
    """Gather items; a batch ends with the one that brings it to `count` files or `size` bytes.

    `weigh` tells the files and the bytes of one item.
    """
    batch: list[Item] = []
    files = total = 0
    for item in items:
        batch.append(item)
        more_files, more_bytes = weigh(item)
        files += more_files
        total += more_bytes
        if files >= count or total >= size:
            yield batch
            batch, files, total = [], 0, 0
    if batch:
        yield batch
