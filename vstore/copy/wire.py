"""Frames between two programs: length-prefixed, numbered, checked, compressed, with limits.

    length of the body   u32    at most `FRAME_LIMIT` and a little
    length when plain    u32    at most `FRAME_LIMIT`
    kind                 u8     of the message; 0 only says that the sender lives
    compressed           u8     0, or 1: zstd
    check                8 bytes of BLAKE3 over the frame's number, the fields above and the body
    body

A frame that was changed, dropped, repeated or cut on its way ends the connection. Two threads read
and write, so that nobody waits for the wire while there is something else to do, and so that two
sides that both send never wait for each other. Nothing is taken for true here but lengths: what a
body means is the business of `vstore.copy.messages`.
"""

import logging
import os
import select
import struct
import threading
import time
from collections import deque
from typing import Final

import zstandard
from blake3 import blake3

from vstore.errors import FormatUnknown, ToolError

log = logging.getLogger(__name__)

FRAME_LIMIT: Final = 4 << 20
"""Bytes of a plain body."""
SILENCE_S: Final = 60.0
"""A peer that says nothing for so long is taken for lost."""

_HEAD: Final = struct.Struct(">IIBB")
_NUMBER: Final = struct.Struct(">Q")
_CHECK_BYTES: Final = 8
_ALIVE: Final = 0
_PLAIN, _ZSTD = 0, 1
_SLACK: Final = 1 << 12  # what zstd may add to what it cannot compress
_SMALLEST: Final = 200  # bytes worth compressing
_READ_AHEAD: Final = 24 << 20  # bytes received and not taken yet
_WRITE_AHEAD: Final = 8 << 20  # bytes to be sent
_PULSE_S: Final = 10.0
_STEP: Final = 1 << 18  # bytes a write(2), so that a limited rate is even
_LEVELS: Final = (-1, 1, 3, 5, 8)  # of zstd, for a link that is slower and slower than we
_FRAMES_A_LOOK: Final = 8
_AGAIN: Final = "what arrived is kept: run the command again"
_SLOW: Final = 3.0  # times as long on the wire as in the compressor


class ConnectionLost(ToolError):
    """The other side is gone, or what it sends cannot be what it sent."""


class Channel:
    """Frames over two descriptors, which are the channel's from now on.

    `level`: of zstd; 0 sends all plain; None adapts to the link. `rate`: bytes a second at most; 0
    is no limit.
    """

    def __init__(
        self,
        read_fd: int,
        write_fd: int,
        *,
        peer: str,
        level: int | None = None,
        silence_s: float = SILENCE_S,
    ) -> None:
        self.peer = peer
        self.level = level
        self.rate = 0
        self.bytes_sent = 0
        self.bytes_received = 0
        self._silence_s = silence_s
        self._fds = (read_fd, write_fd)
        self._lock = threading.Condition()
        self._inbox: deque[tuple[int, bytes]] = deque()
        self._inbox_bytes = 0
        self._outbox: deque[tuple[int, bytes]] = deque()
        self._outbox_bytes = 0
        self.inbox_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Can be read while `poll` has something to give, or to raise."""
        self._is_idle = True  # nothing is being written
        self._failure: ToolError | None = None  # nothing can be sent any more
        self._last_word: ToolError | None = None  # nothing more is read
        self._is_closed = False
        self._threads = 2
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._writer = threading.Thread(target=self._write, daemon=True)
        self._reader.start()
        self._writer.start()

    # --- the side of the program

    def send(self, kind: int, body: bytes) -> None:
        """Queue a frame; waits while much is queued. Raises ConnectionLost."""
        if len(body) > FRAME_LIMIT:
            raise ValueError(f"a frame of {len(body)} bytes")
        with self._lock:
            while self._outbox_bytes > _WRITE_AHEAD and not self._failure:
                self._lock.wait()
            self._raise_failure()
            self._outbox.append((kind, body))
            self._outbox_bytes += len(body)
            self._lock.notify_all()

    def receive(self) -> tuple[int, bytes]:
        """The next frame; waits for it. Raises ConnectionLost."""
        with self._lock:
            while not self._inbox:
                self._raise_last_word()
                self._lock.wait()
            return self._take()

    def poll(self) -> tuple[int, bytes] | None:
        """The next frame if there is one already. Raises ConnectionLost."""
        with self._lock:
            if self._inbox:
                return self._take()
            self._raise_last_word()
            return None

    @property
    def has_frames(self) -> bool:
        """Whether a frame is there."""
        return bool(self._inbox)

    def flush(self) -> None:
        """Wait until all that is queued has been written. Raises ConnectionLost."""
        with self._lock:
            while (self._outbox or not self._is_idle) and not self._failure:
                self._lock.wait()
            if self._outbox:
                self._raise_failure()

    def close(self, *, wait_s: float = 5.0) -> None:
        """Write what is queued, as far as that goes in some seconds, and end. Harmless twice."""
        deadline = time.monotonic() + wait_s
        with self._lock:
            if self._is_closed:
                return
            while (self._outbox or not self._is_idle) and not self._failure:
                if not self._lock.wait(max(0.0, deadline - time.monotonic())):
                    break
            self._is_closed = True
            self._failure = self._failure or ConnectionLost(
                f"{self.peer}: the connection is closed"
            )
            self._lock.notify_all()
            os.close(self.inbox_fd)
        self._writer.join(1)

    def _leave(self) -> None:
        """A thread ends; the last one closes the descriptors."""
        with self._lock:
            self._threads -= 1
            if not self._threads:
                for fd in set(self._fds):
                    os.close(fd)

    def _take(self) -> tuple[int, bytes]:
        frame = self._inbox.popleft()
        self._inbox_bytes -= len(frame[1])
        if not (self._inbox or self._last_word or self._is_closed):
            os.eventfd_read(self.inbox_fd)
        self._lock.notify_all()
        return frame

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _raise_last_word(self) -> None:
        if self._last_word is not None:
            raise self._last_word

    def _fail(self, failure: ToolError, *, is_read: bool) -> None:
        """Note the end of one way. Who cannot send may still be told why."""
        with self._lock:
            self._failure = self._failure or failure
            if is_read:
                self._last_word = self._last_word or failure
                self._show_inbox()
            self._lock.notify_all()

    def _cut(self, error: OSError) -> ConnectionLost:
        """Whoever ends with bytes of ours unread gives no end of the stream, but ECONNRESET."""
        what = f"{self.peer}: the connection was cut: {error.strerror}"
        return ConnectionLost(what, hint=_AGAIN)

    def _show_inbox(self) -> None:
        """Something is to be taken now. Under the lock."""
        if not self._is_closed:
            os.eventfd_write(self.inbox_fd, 1)

    # --- reading

    def _read(self) -> None:
        decompressor = zstandard.ZstdDecompressor()
        number = 0
        try:
            while True:
                kind, body = self._read_frame(number, decompressor)
                number += 1
                if kind != _ALIVE:
                    self._put(kind, body)
        except ToolError as failure:
            self._fail(failure, is_read=True)
        except OSError as error:
            self._fail(self._cut(error), is_read=True)
        except zstandard.ZstdError as error:
            damaged = ConnectionLost(f"{self.peer}: sent a damaged frame: {error}", hint=_AGAIN)
            self._fail(damaged, is_read=True)
        finally:
            self._leave()

    def _put(self, kind: int, body: bytes) -> None:
        with self._lock:
            while self._inbox_bytes > _READ_AHEAD and not self._is_closed:
                self._lock.wait()
            if not self._inbox:
                self._show_inbox()
            self._inbox.append((kind, body))
            self._inbox_bytes += len(body)
            self._lock.notify_all()

    def _read_frame(
        self, number: int, decompressor: zstandard.ZstdDecompressor
    ) -> tuple[int, bytes]:
        head = self._read_exactly(_HEAD.size + _CHECK_BYTES)
        length, plain, kind, packing = _HEAD.unpack_from(head)
        if number == 0 and (length > FRAME_LIMIT + _SLACK or packing > _ZSTD):
            raise FormatUnknown(
                f"{self.peer}: what answers is no vserver-copy: it begins with {head[:40]!r}",
                hint="does a start-up file of the login shell there print something?",
            )
        if length > FRAME_LIMIT + _SLACK or plain > FRAME_LIMIT or packing > _ZSTD:
            raise ConnectionLost(f"{self.peer}: sent a frame that is too long, or damaged")
        body = self._read_exactly(length)
        if check_of(number, head[: _HEAD.size], body) != head[_HEAD.size :]:
            raise ConnectionLost(
                f"{self.peer}: a frame was changed, lost or repeated on its way",
                hint="what arrived before it is kept: run the command again",
            )
        self.bytes_received += len(head) + length
        return kind, unpack(body, plain, packing, decompressor)

    def _read_exactly(self, count: int) -> bytes:
        found = bytearray(count)
        view = memoryview(found)
        done = 0
        waiting = select.poll()
        waiting.register(self._fds[0], select.POLLIN)
        silent_since = time.monotonic()
        while done < count:
            if self._is_closed:
                raise ConnectionLost(f"{self.peer}: the connection is closed")
            if not waiting.poll(100 if count else 0):
                if time.monotonic() - silent_since > self._silence_s:
                    raise ConnectionLost(
                        f"{self.peer}: nothing came for {self._silence_s:.0f} seconds",
                        hint=_AGAIN,
                    )
                continue
            got = os.readv(self._fds[0], [view[done:]])
            if got == 0:
                raise ConnectionLost(
                    f"{self.peer}: the connection was cut",
                    hint=_AGAIN,
                )
            done += got
            silent_since = time.monotonic()
        return bytes(found)

    # --- writing

    def _write(self) -> None:
        packer = _Packer()
        number = 0
        try:
            while True:
                frame = self._next_frame()
                if frame is None:
                    return
                packing, body = packer.pack(frame[1], self.level)
                head = _HEAD.pack(len(body), len(frame[1]), frame[0], packing)
                began = time.monotonic()
                self._write_all(head + check_of(number, head, body) + body)
                packer.note_write(time.monotonic() - began)
                number += 1
                with self._lock:
                    self._is_idle = True
                    self._outbox_bytes -= len(frame[1])
                    self._lock.notify_all()
        except OSError as error:
            self._fail(self._cut(error), is_read=False)
        except ToolError as failure:
            self._fail(failure, is_read=False)
        finally:
            self._leave()

    def _next_frame(self) -> tuple[int, bytes] | None:
        """The next frame to write, a sign of life after a pause; None at the end."""
        with self._lock:
            deadline = time.monotonic() + _PULSE_S
            while not self._outbox:
                if self._is_closed or self._failure:
                    return None
                if not self._lock.wait(max(0.0, deadline - time.monotonic())):
                    return _ALIVE, b""
            self._is_idle = False
            return self._outbox.popleft()

    def _write_all(self, data: bytes) -> None:
        view = memoryview(data)
        began = time.monotonic()
        done = 0
        waiting = select.poll()
        waiting.register(self._fds[1], select.POLLOUT)
        while done < len(view):
            if self._is_closed or (self._failure and not self._outbox_bytes):
                raise ConnectionLost(f"{self.peer}: the connection is closed")
            if not waiting.poll(100):
                continue
            done += os.write(self._fds[1], view[done : done + _STEP])
            if self.rate:
                time.sleep(max(0.0, began + done / self.rate - time.monotonic()))
        self.bytes_sent += len(view)


class _Packer:
    """Compresses bodies, the harder the longer the wire takes for what comes out.

    The wire may take long because this machine has more to do than it can: the other side may be
    waiting for a core that we use. So it counts by how much the compressor itself was kept waiting.
    """

    def __init__(self) -> None:
        self._compressors: dict[int, zstandard.ZstdCompressor] = {}
        self._at = 0
        self._packed_s = self._worked_s = self._written_s = 0.0
        self._frames = 0

    def pack(self, body: bytes, level: int | None) -> tuple[int, bytes]:
        if level == 0 or len(body) < _SMALLEST:
            return _PLAIN, body
        wanted = _LEVELS[self._at] if level is None else level
        if wanted not in self._compressors:
            self._compressors[wanted] = zstandard.ZstdCompressor(level=wanted)
        began, worked = time.monotonic(), time.thread_time()
        packed = self._compressors[wanted].compress(body)
        self._packed_s += time.monotonic() - began
        self._worked_s += time.thread_time() - worked
        return (_ZSTD, packed) if len(packed) < len(body) else (_PLAIN, body)

    def note_write(self, seconds: float) -> None:
        self._written_s += seconds
        self._frames += 1
        if self._frames >= _FRAMES_A_LOOK:
            kept_waiting = self._packed_s / max(self._worked_s, 1e-6)
            if self._written_s > _SLOW * self._packed_s * kept_waiting:
                self._at = min(self._at + 1, len(_LEVELS) - 1)
            elif self._written_s < self._packed_s:
                self._at = max(self._at - 1, 0)
            self._frames, self._packed_s, self._worked_s, self._written_s = 0, 0.0, 0.0, 0.0


def check_of(number: int, head: bytes, body: bytes) -> bytes:
    """What proves that a body is the one that was sent in this place."""
    hasher = blake3(_NUMBER.pack(number))
    hasher.update(head)
    hasher.update(body)
    return hasher.digest(length=_CHECK_BYTES)


def unpack(
    body: bytes, plain: int, packing: int, decompressor: zstandard.ZstdDecompressor
) -> bytes:
    """The plain body; what it says of its length is looked at before room is made for it.

    Raises ConnectionLost, ZstdError.
    """
    found = len(body) if packing == _PLAIN else zstandard.frame_content_size(body)
    if found != plain:
        raise ConnectionLost("a frame is not as long as it says")
    return body if packing == _PLAIN else decompressor.decompress(body, max_output_size=plain)
