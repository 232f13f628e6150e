"""Bytes between the caller and a command: all of them, in order, and none too many."""

import os
import pty
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

import pytest

from vrun.relay import Feed, Flow, Shown, Wanted, plan


@dataclass(slots=True)
class Pipe:
    read_fd: int
    write_fd: int

    def read_now(self) -> bytes:
        """All that is in it."""
        os.set_blocking(self.read_fd, False)
        with suppress(BlockingIOError):
            return os.read(self.read_fd, 1 << 20)
        return b""


@dataclass(slots=True)
class Place:
    """Where a test has its descriptors; they are closed at the end."""

    stack: ExitStack = field(default_factory=ExitStack)

    def pipe(self) -> Pipe:
        made = Pipe(*os.pipe())
        for fd in (made.read_fd, made.write_fd):
            self.stack.callback(_close, fd)
        return made

    def terminal(self) -> int:
        master_fd, slave_fd = pty.openpty()
        for fd in (master_fd, slave_fd):
            self.stack.callback(_close, fd)
        return slave_fd

    def file(self, content: bytes = b"") -> int:
        fd = os.memfd_create("file")
        self.stack.callback(_close, fd)
        os.write(fd, content)
        os.lseek(fd, 0, os.SEEK_SET)
        return fd


def _close(fd: int) -> None:
    with suppress(OSError):
        os.close(fd)


@pytest.fixture
def place() -> Iterator[Place]:
    made = Place()
    with made.stack:
        yield made


def _serve(part: Feed | Flow, rounds: int = 20) -> None:
    """Let the part do what it can."""
    for _ in range(rounds):
        wanted = Wanted()
        part.ask(wanted)
        part.step(wanted.wait(0))


# --- which descriptors become terminals


def test_all_terminals_stay_terminals(place: Place) -> None:
    tty = place.terminal()

    assert plan((tty, tty, tty)) == ("terminal", "terminal", "terminal")


def test_output_to_a_file_is_copied_while_the_terminal_stays(place: Place) -> None:
    tty = place.terminal()

    assert plan((tty, place.file(), tty)) == ("terminal", "pipe", "terminal")


def test_in_a_pipeline_the_terminal_is_left_to_the_others(place: Place) -> None:
    tty = place.terminal()

    assert plan((tty, place.pipe().write_fd, tty)) == ("pipe", "pipe", "pipe")
    assert plan((place.pipe().read_fd, tty, tty)) == ("pipe", "pipe", "pipe")


def test_a_socket_is_never_handed_over(place: Place) -> None:
    one, other = socket.socketpair()
    with one, other:
        assert plan((one.fileno(), one.fileno(), one.fileno())) == ("pipe", "pipe", "pipe")


# --- input


@pytest.fixture(params=["file", "pipe"])
def fed(request: pytest.FixtureRequest, place: Place) -> Callable[[bytes], tuple[int, Feed, Pipe]]:
    """Input of either kind with a content, what feeds a command from it, and the command's end."""

    def make(content: bytes) -> tuple[int, Feed, Pipe]:
        if request.param == "file":
            source_fd = place.file(content)
        else:
            pipe = place.pipe()
            os.write(pipe.write_fd, content)
            os.close(pipe.write_fd)
            source_fd = pipe.read_fd
        inner = place.pipe()
        return source_fd, Feed(source_fd, inner.write_fd), inner

    return make


_Fed = Callable[[bytes], tuple[int, Feed, Pipe]]


def test_a_command_gets_all_input_and_its_end(fed: _Fed) -> None:
    content = os.urandom(30_000)
    _, feed, inner = fed(content)
    got = b""

    for _ in range(20):
        _serve(feed)
        got += inner.read_now()

    assert got == content
    assert os.read(inner.read_fd, 1) == b""  # not EAGAIN: the writing end is closed


def test_input_that_the_command_does_not_read_is_left(fed: _Fed) -> None:
    source_fd, feed, inner = fed(b"first\nsecond\nthird\n")
    _serve(feed)
    assert os.read(inner.read_fd, 6) == b"first\n"

    feed.close()

    assert os.read(source_fd, 100) == b"second\nthird\n"


def test_a_command_that_reads_nothing_takes_nothing(fed: _Fed) -> None:
    source_fd, feed, _ = fed(b"web\nmail\n")
    _serve(feed)

    feed.close()

    assert os.read(source_fd, 100) == b"web\nmail\n"


def test_what_is_left_is_exact_after_many_pages(fed: _Fed) -> None:
    content = os.urandom(20_000)
    source_fd, feed, inner = fed(content)
    got = b""
    while len(got) < 9_000:
        _serve(feed)
        got += os.read(inner.read_fd, 1_000)

    feed.close()

    assert got + os.read(source_fd, 1 << 20) == content


def test_a_command_that_closes_its_input_leaves_the_rest(fed: _Fed) -> None:
    source_fd, feed, inner = fed(b"web\nmail\n")
    _serve(feed)
    os.close(inner.read_fd)

    _serve(feed)

    assert os.read(source_fd, 100) == b"web\nmail\n"
    wanted = Wanted()
    feed.ask(wanted)
    assert wanted.wait(0) == {}


def test_a_command_that_has_ended_takes_nothing(fed: _Fed) -> None:
    source_fd, feed, inner = fed(b"web\nmail\n")
    os.close(inner.read_fd)

    _serve(feed)

    assert os.read(source_fd, 100) == b"web\nmail\n"


def test_input_at_its_end_ends_at_once(fed: _Fed) -> None:
    _, feed, inner = fed(b"")

    _serve(feed)

    assert os.read(inner.read_fd, 1) == b""


# --- output


def test_output_arrives_whole(place: Place) -> None:
    inner, outer = place.pipe(), place.pipe()
    flow = Flow(inner.read_fd, outer.write_fd, "standard output", owned=True)
    content = os.urandom(60_000)
    os.write(inner.write_fd, content)
    os.close(inner.write_fd)
    got = b""

    while flow.is_open:
        _serve(flow)
        got += outer.read_now()

    assert got + outer.read_now() == content


def test_last_words_are_passed_on_though_a_daemon_keeps_the_pipe(place: Place) -> None:
    inner, outer = place.pipe(), place.pipe()
    os.set_blocking(inner.read_fd, False)
    flow = Flow(inner.read_fd, outer.write_fd, "standard output", owned=True)
    os.write(inner.write_fd, b"last words\n")

    flow.finish()

    assert outer.read_now() == b"last words\n"


def test_the_command_notices_that_nobody_reads_its_output(place: Place) -> None:
    inner, outer = place.pipe(), place.pipe()
    flow = Flow(inner.read_fd, outer.write_fd, "standard output", owned=True)
    os.close(outer.read_fd)
    os.write(inner.write_fd, b"lost")

    _serve(flow)

    with pytest.raises(BrokenPipeError):
        os.write(inner.write_fd, b"more")


def test_a_reader_that_is_slow_holds_the_command_back(place: Place) -> None:
    inner, outer = place.pipe(), place.pipe()
    flow = Flow(inner.read_fd, outer.write_fd, "standard output", owned=True)
    os.set_blocking(inner.write_fd, False)
    written = 0

    with suppress(BlockingIOError):
        for _ in range(1_000):
            written += os.write(inner.write_fd, bytes(4096))
            _serve(flow)

    assert written < 400_000
    assert not outer.read_now().strip(b"\0")


# --- a terminal that nobody inside has open


def _turn(flow: Flow) -> None:
    wanted = Wanted()
    flow.ask(wanted)
    flow.step(wanted.wait(1000))


def _show(flow: Flow, shown: Pipe, count: int) -> bytes:
    """What is shown, once it is so many bytes: a terminal may hand a line over in pieces."""
    got = b""
    while len(got) < count:
        _turn(flow)
        got += shown.read_now()
    return got


def test_a_terminal_open_nowhere_for_a_while_goes_on_being_shown(place: Place) -> None:
    shown = place.pipe()
    master_fd, slave_fd = pty.openpty()
    place.stack.callback(os.close, master_fd)
    path = os.ttyname(slave_fd)
    os.set_blocking(master_fd, False)
    flow = Shown(master_fd, shown.write_fd, "the terminal", owned=False)
    os.write(slave_fd, b"one\n")
    assert _show(flow, shown, 5) == b"one\r\n"

    os.close(slave_fd)
    for _ in range(3):
        _turn(flow)
    assert flow.is_open
    slave_fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
    os.write(slave_fd, b"two\n")
    assert _show(flow, shown, 5) == b"two\r\n"

    os.close(slave_fd)
    flow.finish()
    flow.close()
    assert not flow.is_open
