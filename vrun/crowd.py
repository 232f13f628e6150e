"""Many guests at once: the same work on each, so many at a time, and none held up by another.

Each guest has a process of its own, forked from one that has loaded all that is needed, so that
whatever happens to one guest (a lock that another program holds, a script that hangs, a bug of
ours) stays with it. It tells how it goes over a pair of sockets, as a monitor does (control.py).
What has to wait for another guest's end, or its success, begins when that is there (graph.py).
"""

import gc
import os
import select
import signal
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from typing import NoReturn

from vrun import control, syscalls
from vrun.control import Connection, Outcome
from vrun.errors import ToolError
from vrun.graph import Before, Key, Schedule
from vrun.lifecycle import Hearer
from vstore.heldback import signals_held_back
from vstore.record import dataclass

Work = Callable[[str, Hearer], Outcome]
"""What is done to the guest of that name, and how it went. Raises ToolError."""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one step."""

    key: Key
    outcome: Outcome
    """What the work has given, or of a failure the exit code, its words and its hint."""
    blocked_by: Key | None = None
    """It was not done, since it needs this step, which has failed."""

    @property
    def name(self) -> str:
        """The guest's."""
        return self.key[1]


def _ignore(names: Collection[str]) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Crowd:
    """How the work is done."""

    jobs: int
    """So many guests at a time, at least 1."""
    say: Callable[[str, str], None]
    warn: Callable[[str, str], None]
    """Get the guest's name and a line about it."""
    show_busy: Callable[[Collection[str]], None] = _ignore
    """Gets the names of those that are being worked on, whenever that changes."""

    def do(self, steps: Mapping[Key, Before], works: Mapping[str, Work]) -> Iterator[Result]:
        """Do each step, by the work of its word; yields each result as it comes.

        However this ends, no process of ours is left: those that work are told to end, and what
        they began is taken back by the guests' monitors.
        """
        gc.freeze()  # what is there need not be looked through in each process, nor be copied
        schedule, running = Schedule(steps), _Running()
        try:
            while True:
                while len(running.workers) < self.jobs and (key := schedule.take()):
                    running.begin(key, works[key[0]])
                self.show_busy(running.names())
                if not running.workers:
                    return
                for result in running.hear(self):
                    yield result
                    for key, needed in schedule.end(result.key, well=result.outcome.code == 0):
                        yield Result(key, _needs(key, needed), blocked_by=needed)
        finally:
            running.end()


def _needs(key: Key, needed: Key) -> Outcome:
    return Outcome(1, f"not {key[0]}ed: it needs guest {needed[1]}, which failed")


class _Worker:
    """One guest's process, as its parent sees it."""

    def __init__(self, key: Key, connection: Connection, pid: int) -> None:
        self.key = key
        self.name = key[1]
        self.connection = connection
        self.pid = pid
        self.outcome: Outcome | None = None


class _Running:
    """Those that work at the moment."""

    def __init__(self) -> None:
        self.workers: dict[int, _Worker] = {}
        self._poll = select.poll()

    def names(self) -> list[str]:
        """The guests, the one that has begun first first."""
        return [worker.name for worker in self.workers.values()]

    def begin(self, key: Key, work: Work) -> None:
        near, far = control.pair()
        fd = near.socket.fileno()
        with signals_held_back() as let_come:
            pid = os.fork()
            if pid == 0:
                _be_worker(key[1], work, far, let_come)
            self.workers[fd] = _Worker(key, near, pid)
            self._poll.register(fd, select.POLLIN)
        far.close()

    def hear(self, crowd: Crowd) -> Iterator[Result]:
        """Pass on what is told until something is; yields the results of those that have ended."""
        for fd, _ in self._poll.poll():
            worker = self.workers[fd]
            match worker.connection.receive():
                case ["say", text]:
                    crowd.say(worker.name, text)
                case ["warn", text]:
                    crowd.warn(worker.name, text)
                case ["end", code, message, hint]:
                    worker.outcome = Outcome(int(code), message, hint or None)
                case None:
                    self._forget(fd)
                    yield Result(worker.key, worker.outcome or _killed(worker.name))

    def end(self) -> None:
        """Have all end that work, and wait for them."""
        for worker in self.workers.values():
            os.kill(worker.pid, signal.SIGTERM)
        for fd in list(self.workers):
            self._forget(fd)

    def _forget(self, fd: int) -> None:
        worker = self.workers.pop(fd)
        self._poll.unregister(fd)
        os.waitpid(worker.pid, 0)
        worker.connection.close()


def _killed(name: str) -> Outcome:
    return Outcome(
        1, f"guest {name}: the process that worked on it was killed", f"see vserver {name} status"
    )


def _be_worker(name: str, work: Work, parent: Connection, let_come: Callable[[], None]) -> NoReturn:
    """Do the work, tell how it went, and end; a signal ends it as it ends a command."""
    try:
        let_come()
        syscalls.set_parent_death_signal(signal.SIGTERM)
        hearer = Hearer(say=parent.say, warn=parent.warn, out=_drop)
        parent.end(work(name, hearer))
    except ToolError as error:
        parent.end(Outcome(error.exit_code, error.message, error.hint))
    except OSError as error:
        place = f"{error.filename}: " if isinstance(error.filename, str) else ""
        parent.end(Outcome(1, f"guest {name}: {place}{error.strerror or error}"))
    except KeyboardInterrupt:
        parent.end(Outcome(1, f"guest {name}: interrupted"))
    except Exception:  # noqa: BLE001 (a bug of ours must reach a person too)
        import traceback

        parent.end(Outcome(1, f"guest {name}: {traceback.format_exc()}"))
    finally:
        with suppress(OSError):
            parent.close()
        os._exit(0)


def _drop(data: bytes) -> None:
    """Consoles of many guests at once are for nobody to read; each has its log."""
