"""Forked workers: answers of any size, bugs and deaths reach the parent."""

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vstore.errors import NoSpace, PoolBusy, ToolError
from vstore.workers import Crew, WorkerDied

_LARGE = 40 << 20


class _Echo:
    def __init__(self, number: int, keeper: socket.socket) -> None:
        self._number = number

    def serve(self, job: Any) -> Iterator[Any]:
        yield self._number, job

    def finish(self) -> None:
        pass


class _Trouble(_Echo):
    def serve(self, job: Any) -> Iterator[Any]:
        if job == "refuse":
            raise PoolBusy("somebody else has it", hint="wait")
        if job == "full":
            raise NoSpace("no room")
        if job == "bug":
            raise ZeroDivisionError("a bug of ours")
        if job == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        yield job


def test_jobs_and_answers_of_any_size_pass_each_other() -> None:
    jobs = [bytes([number]) * _LARGE for number in range(3)]
    with Crew(1, _Echo) as crew:
        answers = [answer for _, answer in crew.map((job, None) for job in jobs)]
    assert [job for _, job in answers] == jobs


def test_every_job_is_answered_once_by_some_worker() -> None:
    with Crew(3, _Echo) as crew:
        answers = list(crew.map((number, -number) for number in range(500)))
    assert sorted(job for _, (_, job) in answers) == list(range(500))
    assert all(context == -job for context, (_, job) in answers)
    assert {number for _, (number, _) in answers} == {0, 1, 2}


def test_a_crew_serves_one_map_after_the_other() -> None:
    with Crew(2, _Echo) as crew:
        for start in (0, 10, 20):
            jobs = ((number, None) for number in range(start, start + 10))
            answers = [job for _, (_, job) in crew.map(jobs)]
            assert sorted(answers) == list(range(start, start + 10))


def test_a_limit_leaves_the_other_workers_alone() -> None:
    with Crew(3, _Echo) as crew:
        answers = list(crew.map(((number, None) for number in range(50)), limit=1))
    assert {number for _, (number, _) in answers} == {0}


def test_jobs_that_are_for_one_worker_go_to_no_other() -> None:
    todo = {0: [1, 2, 3], 1: list(range(4, 300)), 2: []}

    def choose(number: int) -> tuple[int, int] | None:
        return (todo[number].pop(0), number) if todo[number] else None

    with Crew(3, _Echo) as crew:
        answers = list(crew.map_each(choose))
    assert all(number == context for context, (number, _) in answers)
    assert sorted(job for _, (_, job) in answers) == list(range(1, 300))


def test_jobs_are_asked_for_again_when_another_descriptor_can_be_read() -> None:
    wake_fd, news_fd = os.pipe()
    go_fd, start_fd = os.pipe()
    os.write(news_fd, b"1")

    def jobs() -> Iterator[tuple[str, None] | None]:
        yield "wait", None
        yield None
        os.read(wake_fd, 1)
        os.write(start_fd, b"1")
        yield "next", None

    class Waiting(_Echo):
        def serve(self, job: Any) -> Iterator[Any]:
            if job == "wait":
                os.read(go_fd, 1)
            yield job

    with Crew(1, Waiting) as crew:
        answers = [answer for _, answer in crew.map(jobs(), wake_fd=wake_fd)]
    assert answers == ["wait", "next"]
    for fd in (wake_fd, news_fd, go_fd, start_fd):
        os.close(fd)


@pytest.mark.parametrize(("job", "kind"), [("refuse", PoolBusy), ("full", NoSpace)])
def test_what_a_worker_refuses_keeps_its_kind_and_hint(job: str, kind: type[ToolError]) -> None:
    with Crew(1, _Trouble) as crew, pytest.raises(kind) as caught:
        list(crew.map([(job, None)]))
    assert caught.value.hint == ("wait" if job == "refuse" else None)


def test_a_bug_in_a_worker_shows_its_own_traceback() -> None:
    with Crew(1, _Trouble) as crew, pytest.raises(RuntimeError, match="in serve\n"):
        list(crew.map([("bug", None)]))


def test_a_worker_that_dies_is_buried_before_it_is_reported() -> None:
    buried: list[int] = []
    with (
        Crew(2, _Trouble, bury=lambda worker: buried.append(worker.pid)) as crew,
        pytest.raises(WorkerDied),
    ):
        list(crew.map((job, None) for job in ("a", "die", "b")))
    assert len(buried) == 1


def test_nothing_of_a_crew_is_left() -> None:
    before = set(os.listdir("/proc/self/fd"))
    children = _children()
    with Crew(4, _Echo) as crew:
        list(crew.map((number, None) for number in range(20)))
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert _children() == children


def _children() -> str:
    """The children of this process, zombies too; see proc_pid_task(5)."""
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text()
