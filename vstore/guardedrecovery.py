"""Recovery as a command does it: by a worker, whose leases this process keeps.

Who is killed inside one of recovery's own windows lets nobody in, then. These windows make no notes
of their own, so that a full disk keeps nothing from being put right: the notes that were found stay
until the last lease is given up.
"""

import logging
import socket
from collections.abc import Iterator, Sequence

from vstore import lease
from vstore.hold import find_linger_s
from vstore.pool import Pool
from vstore.recovery import Leftover, close_windows, leftovers
from vstore.window import Windows
from vstore.workers import Crew, Worker

log = logging.getLogger(__name__)


def recover_guarded(pool: Pool) -> bool:
    """As `recover`, for a program that has no windows yet. Raises WorkerDied besides."""
    if not lease.are_all_seen():
        log.warning(
            "this is not the host's namespace of processes: should this program be killed, nobody "
            "can see who waits to write to the shared files that it worked on; run it on the host "
            "if guests run meanwhile"
        )
    with leftovers(pool) as found:
        if not found:
            return True

        def start(_: int, keeper: socket.socket) -> _Hand:
            return _Hand(pool, keeper, found)

        def bury(worker: Worker) -> None:
            worker.keeper.take_over(lambda leased: close_windows(pool, leased))

        with Crew(1, start, bury=bury) as crew:
            answers = [answer for _, answer in crew.map([(None, None)])]
    return bool(answers[-1])


class _Hand:
    def __init__(self, pool: Pool, keeper: socket.socket, found: Sequence[Leftover]) -> None:
        self._found = found
        self._windows = Windows(keeper, pool_fd=pool.fd, stage_fd=None, linger_s=find_linger_s)

    def serve(self, job: object) -> Iterator[bool]:
        """Answers after every object, so that the keeper takes in what it is told; last, whether
        all is settled.
        """
        for left in self._found:
            for _ in left.settle(self._windows):
                yield False
        self._windows.let_all_go()
        yield not self._windows.has_doubts and all([left.remove() for left in self._found])

    def finish(self) -> None:
        self._windows.close()
