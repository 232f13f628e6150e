"""Forked workers: the cores' share of a long job, and the holders of thaw windows.

The parent keeps the plan and all counting; a worker does one bounded batch after the other and
answers with plain values. Messages are length-prefixed `marshal` (only ever between one program's
own processes). A thread pool would wait for the interpreter's lock; a process costs some
milliseconds once.
"""

import gc
import logging
import marshal
import os
import resource
import select
import selectors
import signal
import socket
import struct
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar, runtime_checkable

from vstore.errors import ToolError
from vstore.heldback import signals_held_back
from vstore.keeper import Keeper

log = logging.getLogger(__name__)


class Hand(Protocol):
    """What a worker is after the fork."""

    def serve(self, job: Any) -> Iterable[Any]:
        """Carry one job out; give its answers as they come."""

    def finish(self) -> None:
        """No more jobs come."""


@runtime_checkable
class IdleHand(Protocol):
    """A hand that has something to do while it waits for a job."""

    def idle(self) -> float | None:
        """Do what is due; returns in how many seconds to ask again, None for not at all."""


Context = TypeVar("Context")
_LENGTH: Final = struct.Struct("=I")
_BUFFER: Final = 8 << 20  # jobs and answers nearly always fit
_SO_SNDBUFFORCE: Final = 32
# A message is an answer, an end, a ToolError, an OSError or a traceback.
_PART, _DONE, _REFUSED, _FAILED, _CRASHED = range(5)
_IGNORED: Final = (
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGTERM,
    signal.SIGQUIT,
    signal.SIGTSTP,
    signal.SIGTTIN,
    signal.SIGTTOU,
)
"""What a terminal or a service manager sends to all of us: the parent hears it and gives no more
jobs, and a worker ends only what it has in hand, for it may be inside a window.
"""
_AHEAD: Final = 2  # jobs given to a worker at a time: one in work, one waiting


def raise_file_limit() -> None:
    """Let this process and its workers have as many descriptors as the system allows them."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def file_limit() -> int:
    """How many descriptors this process and each of its workers may have."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


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
    jobs: deque[Any] = field(default_factory=deque)  # the contexts of those that it was given
    unsent: bytes = b""  # of the last one

    def send(self) -> None:
        """Send what is unsent as far as that goes without waiting. Raises OSError."""
        with suppress(BlockingIOError):
            while self.unsent:
                sent = self.channel.send(self.unsent, socket.MSG_DONTWAIT)
                self.unsent = self.unsent[sent:]


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
        raise_file_limit()
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
            self._see_off(worker)

    def _see_off(self, worker: Worker) -> None:
        with suppress(OSError):
            while _receive(worker.channel) is not None:
                with suppress(ToolError):
                    worker.keeper.drain()
        worker.channel.close()
        status = _wait_for(worker.pid)
        if status:
            log.warning("worker process %d %s", worker.pid, _show_end(status))
            if self._bury:
                self._bury(worker)
        _reap(worker.pid)
        worker.keeper.close()

    def map(
        self,
        jobs: Iterable[tuple[Any, Context] | None],
        *,
        limit: int | None = None,
        ahead: int = _AHEAD,
        wake_fd: int = -1,
    ) -> Iterator[tuple[Context, Any]]:
        """Give out jobs, each a (message, context), as workers become free; yield (context, answer)
        for every answer.

        Jobs are taken from the iterable only when a worker can have one; None says that there is
        none for now; they are asked for again with the next answer, or once `wake_fd` can be read.
        At most `limit` workers are used, and each is given `ahead` jobs at a time. Raises
        WorkerDied; a worker's ToolError or OSError; RuntimeError with the worker's traceback for a
        bug.
        """
        todo = iter(jobs)
        workers = self._workers[:limit]
        yield from self._run(lambda _: next(todo, None), workers, ahead, wake_fd)

    def map_each(
        self, choose: Callable[[int], tuple[Any, Context] | None]
    ) -> Iterator[tuple[Context, Any]]:
        """As `map`, where each worker has jobs of its own: `choose` is asked by its number."""
        yield from self._run(choose, self._workers[:], _AHEAD, -1)

    def _run(
        self,
        choose: Callable[[int], tuple[Any, Context] | None],
        workers: list[Worker],
        ahead: int,
        wake_fd: int,
    ) -> Iterator[tuple[Context, Any]]:
        with selectors.DefaultSelector() as selector:
            for worker in workers:
                selector.register(worker.channel, selectors.EVENT_READ, worker)
            if wake_fd >= 0:
                selector.register(wake_fd, selectors.EVENT_READ)
            self._give_out(workers, choose, selector, ahead)
            while any(worker.jobs for worker in workers):
                for key, events in selector.select():
                    if key.data is None:
                        continue
                    if events & selectors.EVENT_WRITE:
                        self._send_rest(key.data, selector)
                    if not events & selectors.EVENT_READ:
                        continue
                    verdict, answer = self._take(key.data)
                    context = key.data.jobs[0]
                    if verdict == _DONE:
                        key.data.jobs.popleft()
                    else:
                        yield context, answer
                self._give_out(workers, choose, selector, ahead)

    def _give_out(
        self,
        workers: list[Worker],
        choose: Callable[[int], tuple[Any, Any] | None],
        selector: selectors.BaseSelector,
        ahead: int,
    ) -> None:
        for depth in range(ahead):
            for worker in workers:
                if len(worker.jobs) <= depth and not worker.unsent:
                    job = choose(worker.number)
                    if job is None:
                        continue
                    message, context = job
                    worker.jobs.append(context)
                    worker.unsent = _pack(message)
                    self._send(worker)
                    if worker.unsent:
                        both = selectors.EVENT_READ | selectors.EVENT_WRITE
                        selector.modify(worker.channel, both, worker)

    def _send_rest(self, worker: Worker, selector: selectors.BaseSelector) -> None:
        self._send(worker)
        if not worker.unsent:
            selector.modify(worker.channel, selectors.EVENT_READ, worker)

    def _send(self, worker: Worker) -> None:
        # Never waits: the worker may be sending an answer and read nothing until we have taken it.
        try:
            worker.send()
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
        worker.channel.close()
        status = _wait_for(worker.pid)
        try:
            if self._bury:
                self._bury(worker)
        finally:
            _reap(worker.pid)
            worker.keeper.close()
        return WorkerDied(
            f"worker process {worker.pid} {_show_end(status)} in the middle of its work",
            hint="what it had in hand was put right; run the command again",
        )

    def _fork(self, number: int, start: Callable[[int, socket.socket], Hand]) -> Worker:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            with suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _BUFFER)
        keeper = Keeper()
        gc.freeze()
        with signals_held_back() as let_come:
            pid = os.fork()
            if pid == 0:
                for number_of_signal in _IGNORED:
                    signal.signal(number_of_signal, signal.SIG_IGN)
                let_come()
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
        gc.disable()
        hand = start(number, keeper)
        try:
            _serve_all(channel, hand)
        finally:
            hand.finish()  # though nobody is there any more who could be answered
        code = 0
    finally:
        os._exit(code)


def _serve_all(channel: socket.socket, hand: Hand) -> None:
    """Raises OSError when the parent is gone."""
    while (job := _await_job(channel, hand)) is not None:
        try:
            for answer in hand.serve(marshal.loads(job)):  # noqa: S302 - from our own parent
                _send(channel, (_PART, answer))
            _send(channel, (_DONE, None))
        except ToolError as error:
            _send(channel, (_REFUSED, (type(error).__name__, error.message, error.hint)))
        except OSError as error:
            log.debug("worker process", exc_info=True)
            _send(channel, (_FAILED, _describe(error)))
        except Exception:  # noqa: BLE001 - handed to the parent, which raises it
            _send(channel, (_CRASHED, traceback.format_exc()))


def _revive(kind: str, message: str, hint: str | None) -> ToolError:
    """The error that a worker met, with its exit code."""
    kinds = {known.__name__: known for known in ToolError.__subclasses__()}
    return kinds.get(kind, ToolError)(message, hint=hint)


def _describe(error: OSError) -> tuple[Any, ...]:
    """The arguments of an equal OSError."""
    reason = error.strerror or str(error)
    if error.filename is None:
        return error.errno or 0, reason
    return error.errno or 0, reason, error.filename


def _await_job(channel: socket.socket, hand: Hand) -> bytes | None:
    if isinstance(hand, IdleHand):
        waiting = select.poll()
        waiting.register(channel, select.POLLIN)
        while (pause_s := hand.idle()) is not None and not waiting.poll(pause_s * 1000 + 1):
            pass
    return _receive(channel)


def _wait_for(pid: int) -> int:
    """The exit code of a worker, negative for a signal; its pid stays taken, for its leases bear
    it.
    """
    end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    if end is None:
        return 0
    return end.si_status if end.si_code == os.CLD_EXITED else -end.si_status


def _reap(pid: int) -> None:
    os.waitpid(pid, 0)


def _show_end(status: int) -> str:
    return f"was killed by signal {-status}" if status < 0 else f"ended with exit code {status}"


def _send(channel: socket.socket, value: Any) -> None:
    channel.sendall(_pack(value))


def _pack(value: Any) -> bytes:
    message = marshal.dumps(value)
    return _LENGTH.pack(len(message)) + message


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
