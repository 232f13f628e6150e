"""Forked workers: the cores' share of a long job, and the holders of thaw windows.

The parent keeps the plan and all counting; a worker does one bounded batch after the other and
answers with plain values. Messages are length-prefixed `marshal` (only ever between one program's
own processes). A thread pool would wait for the interpreter's lock; a process costs some
milliseconds once.
"""

import gc
import marshal
import os
import selectors
import signal
import socket
import struct
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar

from vstore.errors import ToolError
from vstore.window import Keeper


class Hand(Protocol):
    """What a worker is after the fork."""

    def serve(self, job: Any) -> Iterable[Any]:
        """Carry one job out; give its answers as they come."""

    def finish(self) -> None:
        """No more jobs come."""


Context = TypeVar("Context")
_LENGTH: Final = struct.Struct("=I")
_BUFFER: Final = 8 << 20  # a job or an answer always fits, so that neither side waits for the other
_SO_SNDBUFFORCE: Final = 32
# A message is an answer, an end, a ToolError, an OSError or a traceback.
_PART, _DONE, _REFUSED, _FAILED, _CRASHED = range(5)
_AHEAD: Final = 2  # jobs given to a worker at a time: one in work, one waiting


def core_count() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0))


@dataclass(slots=True)
class Worker:
    """One forked process:

    its number among its crew, its pid, and the parent's copy of its leases.
    """

    number: int
    pid: int
    channel: socket.socket
    keeper: Keeper
    jobs: deque[Any] = field(default_factory=deque)


class WorkerDied(ToolError):
    """A worker ended before its time; what it held has been settled."""


class Crew:
    """Some workers that serve one kind of job.

    `start` runs in each worker after the fork, with its number and its keeper's socket, and returns
    what serves a job. `bury` runs in the parent when a worker has died inside a job, before
    WorkerDied is raised.
    """

    def __init__(
        self,
        count: int,
        start: Callable[[int, socket.socket], Hand],
        *,
        bury: Callable[[Worker], None] | None = None,
    ) -> None:
        self._bury = bury
        self._workers: list[Worker] = []
        for number in range(count):
            self._workers.append(self._fork(number, start))

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        """Let the workers finish what they have in hand, and wait for them."""
        for worker in self._workers:
            with suppress(OSError):
                worker.channel.shutdown(socket.SHUT_WR)
        for worker in self._workers:
            with suppress(OSError):
                while _receive(worker.channel) is not None:
                    worker.keeper.drain()
            worker.channel.close()
            os.waitpid(worker.pid, 0)
            worker.keeper.close()

    def map(
        self, jobs: Iterable[tuple[Any, Context] | None], *, limit: int | None = None
    ) -> Iterator[tuple[Context, Any]]:
        """Give out jobs, each a (message, context), as workers become free; yield (context, answer)
        for every answer.

        Jobs are taken from the iterable only when a worker can have one; None says that there is
        none for now. At most `limit` workers are used. Raises WorkerDied; ToolError; RuntimeError
        with the worker's traceback for a bug.
        """
        todo = iter(jobs)
        workers = self._workers[:limit]
        with selectors.DefaultSelector() as selector:
            for worker in workers:
                selector.register(worker.channel, selectors.EVENT_READ, worker)
            self._give_out(workers, todo)
            while any(worker.jobs for worker in workers):
                for key, _ in selector.select():
                    verdict, answer = self._take(key.data)
                    context = key.data.jobs[0]
                    if verdict == _DONE:
                        key.data.jobs.popleft()
                    else:
                        yield context, answer
                self._give_out(workers, todo)

    def _give_out(self, workers: list[Worker], todo: Iterator[tuple[Any, Any] | None]) -> None:
        for depth in range(_AHEAD):
            for worker in workers:
                if len(worker.jobs) <= depth:
                    job = next(todo, None)
                    if job is None:
                        return
                    message, context = job
                    worker.jobs.append(context)
                    try:
                        _send(worker.channel, message)
                    except OSError as error:
                        raise self._lost(worker) from error

    def _take(self, worker: Worker) -> tuple[int, Any]:
        message = _receive(worker.channel)
        worker.keeper.drain()
        if message is None:
            raise self._lost(worker)
        verdict, answer = marshal.loads(message)  # noqa: S302 - from our own child
        if verdict == _REFUSED:
            raise _revive(*answer)
        if verdict == _FAILED:
            raise OSError(*answer)
        if verdict == _CRASHED:
            raise RuntimeError(answer)
        return verdict, answer

    def _lost(self, worker: Worker) -> WorkerDied:
        self._workers.remove(worker)
        _, status = os.waitpid(worker.pid, 0)
        worker.channel.close()
        if self._bury:
            self._bury(worker)
        worker.keeper.close()
        code = os.waitstatus_to_exitcode(status)
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        return WorkerDied(
            f"worker process {worker.pid} ended in the middle of its work ({how})",
            hint="what it had in hand was put right; run the command again",
        )

    def _fork(self, number: int, start: Callable[[int, socket.socket], Hand]) -> Worker:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            with suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _BUFFER)
        keeper = Keeper()
        gc.freeze()
        pid = os.fork()
        if pid == 0:
            ours.close()
            keeper.close()
            for sibling in self._workers:
                sibling.channel.close()
                sibling.keeper.close()
            _be_worker(theirs, number, keeper.holder_socket, start)
        theirs.close()
        keeper.holder_socket.close()
        return Worker(number, pid, ours, keeper)


def _be_worker(
    channel: socket.socket,
    number: int,
    keeper: socket.socket,
    start: Callable[[int, socket.socket], Hand],
) -> None:
    """Serve until the parent closes the channel; never returns, so nothing of the parent's runs
    twice.
    """
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears of it and stops giving jobs
        gc.disable()
        hand = start(number, keeper)
        while (job := _receive(channel)) is not None:
            try:
                for answer in hand.serve(marshal.loads(job)):  # noqa: S302 - from our own parent
                    _send(channel, (_PART, answer))
                _send(channel, (_DONE, None))
            except ToolError as error:
                _send(channel, (_REFUSED, (type(error).__name__, error.message, error.hint)))
            except OSError as error:
                _send(channel, (_FAILED, (error.errno, error.strerror, error.filename)))
            except Exception:  # noqa: BLE001 - handed to the parent, which raises it
                _send(channel, (_CRASHED, traceback.format_exc()))
        hand.finish()
        code = 0
    finally:
        os._exit(code)


def _revive(kind: str, message: str, hint: str | None) -> ToolError:
    """The error that a worker met, with its exit code."""
    kinds = {known.__name__: known for known in ToolError.__subclasses__()}
    return kinds.get(kind, ToolError)(message, hint=hint)


def _send(channel: socket.socket, value: Any) -> None:
    message = marshal.dumps(value)
    channel.sendall(_LENGTH.pack(len(message)) + message)


def _receive(channel: socket.socket) -> bytes | None:
    head = _receive_exactly(channel, _LENGTH.size)
    return None if head is None else _receive_exactly(channel, _LENGTH.unpack(head)[0])


def _receive_exactly(channel: socket.socket, count: int) -> bytes | None:
    message = bytearray(count)
    view = memoryview(message)
    done = 0
    while done < count:
        try:
            received = channel.recv_into(view[done:])
        except ConnectionResetError:
            return None
        if received == 0:
            return None
        done += received
    return bytes(message)
