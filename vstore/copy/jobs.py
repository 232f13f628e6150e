"""What the receiver's worker is to do, and how much of it at a time."""

import time
from collections.abc import Iterator, Sequence
from typing import Final

from vstore.copy.placer import Step
from vstore.copy.wire import Channel

_STEPS_A_JOB: Final = 1000
_BYTES_A_JOB: Final = 48 << 20
_STEPS_AT_MOST: Final = 8000  # that wait for the worker
_AHEAD: Final = 2  # given to the worker: one in work, one waiting
_POLL_S: Final = 0.002

Job = tuple[list[Step], list[str]]
"""What the worker has to do, and the pins that are needed until it is done."""


class Jobs:
    """Steps that are ready, and how many jobs the worker has; `channel` brings more meanwhile.

    It gets all that is ready once it has nothing else to do. While it works, and waits for the
    disk, more is taken in.
    """

    ahead: Final = _AHEAD + 1

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._steps: list[Step] = []
        self._bytes = 0
        self._pins: list[str] = []
        self._given = 0  # jobs that the worker has not done

    def put(self, steps: Sequence[Step], *, size: int = 0) -> None:
        """These can be done now; `size`: bytes that have come for them."""
        self._steps += steps
        self._bytes += size

    def put_pins(self, pins: Sequence[str]) -> None:
        """These pins last until what is ready now has been done."""
        self._pins += pins

    @property
    def is_working(self) -> bool:
        """Whether the worker has something to do."""
        return self._given > 0

    @property
    def is_idle(self) -> bool:
        """Whether it has not, and nothing is ready for it."""
        return not (self._given or self._steps)

    def take(self, *, is_waiting: bool) -> Job | None:
        """What is ready, if it is to be given to the worker now."""
        is_enough = len(self._steps) >= _STEPS_A_JOB or self._bytes >= _BYTES_A_JOB
        is_due = is_enough or (is_waiting and not self._given)
        if not self._steps or not is_due or self._given >= _AHEAD:
            return None
        return self.take_all()

    def take_all(self) -> Job:
        job = self._steps, self._pins
        self._steps, self._bytes, self._pins = [], 0, []
        return job

    def count_given(self, jobs: Iterator[Job | None]) -> Iterator[Job | None]:
        for job in jobs:
            self._given += job is not None
            yield job

    def note_done(self) -> None:
        """The worker has done one."""
        self._given -= 1

    def await_room(self) -> Iterator[None]:
        """Where much is ready, wait until the worker can take it."""
        if len(self._steps) > _STEPS_AT_MOST:
            yield from self.await_worker(_AHEAD - 1)

    def await_worker(self, most: int) -> Iterator[None]:
        """A None for each time that it has more than `most` jobs; what comes in meanwhile is not
        looked at.
        """
        while self._given > most:
            yield None
            if self._given > most and self._channel.has_frames:
                time.sleep(_POLL_S)
