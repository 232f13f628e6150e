"""What an archive is compressed with, found from its first bytes, and its bytes as they come out.

gzip, bzip2, xz, lzma and zstd are read in this process, with bounded memory: no call makes more
than was asked for, and a dictionary or window larger than `MEMORY_AT_MOST` is refused. zstd is read
by the package zstandard and not by zstd(1): it takes that bound as a number and needs no program on
the host. What is rare (lz4, lzip, lzop, compress) goes through the program of that name.
"""

import bz2
import lzma
import os
import subprocess
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from typing import IO, Final, NamedTuple, Protocol, cast

MEMORY_AT_MOST: Final = 1 << 28
"""Bytes that a layer of compression may need for its dictionary or window."""

_CHUNK: Final = 1 << 17
_LAYERS_AT_MOST: Final = 4
_TAR_MAGIC: Final = b"ustar"
_TAR_MAGIC_END: Final = 262


class Source(Protocol):
    """Where bytes come from: `read` gives `size` at most, and none only at the end.

    Raises ValueError with the reason for what cannot be unpacked.
    """

    def read(self, size: int, /) -> bytes: ...


class _Decoder(Protocol):
    """What bz2.BZ2Decompressor offers."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gzip:
    """zlib's decoder with the interface of the others."""

    def __init__(self) -> None:
        self._decoder = zlib.decompressobj(wbits=31)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    @property
    def unused_data(self) -> bytes:
        return self._decoder.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        made = self._decoder.decompress(self._decoder.unconsumed_tail + data, max_length)
        self.needs_input = len(made) < max_length and not self._decoder.unconsumed_tail
        return made


class _Format(NamedTuple):
    """A way to compress: by a decoder of this process, or by a program that writes to stdout."""

    name: str
    magic: bytes
    make: Callable[[], _Decoder] | None = None
    program: tuple[str, ...] = ()


def _make_lzma() -> _Decoder:
    return lzma.LZMADecompressor(memlimit=MEMORY_AT_MOST)


_ZSTD: Final = "zstd"
_FORMATS: Final = (
    _Format("gzip", b"\x1f\x8b", _Gzip),
    _Format("bzip2", b"BZh", bz2.BZ2Decompressor),
    _Format("xz", b"\xfd7zXZ\0", _make_lzma),
    _Format("lzma", b"\x5d\0\0", _make_lzma),
    _Format(_ZSTD, b"\x28\xb5\x2f\xfd"),
    _Format("lz4", b"\x04\x22\x4d\x18", program=("lz4", "-dc")),
    _Format("lzip", b"LZIP", program=("lzip", "-dc")),
    _Format("lzop", b"\x89LZO", program=("lzop", "-dc")),
    _Format("compress", b"\x1f\x9d", program=("gzip", "-dc")),
)


class _Peeked:
    """A source whose next bytes can be looked at, and put back."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._ahead = b""

    def peek(self, size: int) -> bytes:
        """The next `size` bytes, fewer only at the end; they are still to be read."""
        while len(self._ahead) < size and (more := self._source.read(_CHUNK)):
            self._ahead += more
        return self._ahead[:size]

    def put_back(self, data: bytes) -> None:
        self._ahead = data + self._ahead

    def read(self, size: int, /) -> bytes:
        if not self._ahead:
            return self._source.read(size)
        taken, self._ahead = self._ahead[:size], self._ahead[size:]
        return taken

    def skip_zeros(self) -> None:
        while first := self.peek(1):
            if first != b"\0":
                return
            self._ahead = self._ahead.lstrip(b"\0")


class _Unpacked:
    """What a decoder makes of a source. Streams that follow each other are read as one; what
    follows them is not ours, as for gzip(1).
    """

    def __init__(self, source: _Peeked, form: _Format, make: Callable[[], _Decoder]) -> None:
        self._source = source
        self._form = form
        self._make = make
        self._decoder: _Decoder | None = make()

    def read(self, size: int, /) -> bytes:
        while self._decoder is not None:
            if self._decoder.eof:
                self._decoder = self._next_decoder(self._decoder.unused_data)
                continue
            try:
                made = self._decode(self._decoder, size)
            except (zlib.error, lzma.LZMAError, OSError, EOFError) as error:
                raise ValueError(f"its {self._form.name} data cannot be read: {error}") from error
            if made:
                return made
        return b""

    def _decode(self, decoder: _Decoder, size: int) -> bytes:
        data = self._source.read(_CHUNK) if decoder.needs_input else b""
        if decoder.needs_input and not data:
            raise EOFError("it is cut short")
        return decoder.decompress(data, size)

    def _next_decoder(self, rest: bytes) -> _Decoder | None:
        self._source.put_back(rest)
        self._source.skip_zeros()
        magic = self._form.magic
        return self._make() if self._source.peek(len(magic)) == magic else None


class _Zstd:
    """zstd frames, read by the package zstandard."""

    def __init__(self, source: Source) -> None:
        import zstandard  # 6 ms, for archives of this kind only

        decoder = zstandard.ZstdDecompressor(max_window_size=MEMORY_AT_MOST)
        self._reader = decoder.stream_reader(
            cast("IO[bytes]", source),
            read_across_frames=True,  # of which it calls only read
        )
        self._error = zstandard.ZstdError

    def read(self, size: int, /) -> bytes:
        try:
            return self._reader.read(size)
        except self._error as error:
            raise ValueError(f"its zstd data cannot be read: {error}") from error


@contextmanager
def unpacked(file: FileIO) -> Iterator[Source]:
    """What is in `file` once every layer of compression is off it.

    Raises ValueError for what cannot be unpacked, here and from the source's `read`.
    """
    source = _Peeked(file)
    running: subprocess.Popen[bytes] | None = None
    try:
        for layer in range(_LAYERS_AT_MOST + 1):
            form = _find_format(source.peek(_TAR_MAGIC_END))
            if form is None:
                break
            if layer == _LAYERS_AT_MOST:
                raise ValueError(f"it is compressed more than {_LAYERS_AT_MOST} times")
            if form.program:
                if layer:
                    raise ValueError(f"it is compressed with {form.name} below another layer")
                running = _start(form, file)
                source = _Peeked(_Output(running, form))
            else:
                source = _Peeked(_decoded(source, form))
        yield source
    finally:
        if running is not None:
            _end(running)


def _find_format(first: bytes) -> _Format | None:
    if first.endswith(_TAR_MAGIC):  # whatever its first member is called
        return None
    return next((form for form in _FORMATS if first.startswith(form.magic)), None)


def _decoded(source: _Peeked, form: _Format) -> Source:
    return _Unpacked(source, form, form.make) if form.make else _Zstd(source)


# --- by a program


def _start(form: _Format, file: FileIO) -> subprocess.Popen[bytes]:
    os.lseek(file.fileno(), 0, os.SEEK_SET)
    try:
        return subprocess.Popen(  # noqa: S603 - from the table above
            form.program, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    except OSError as error:
        raise ValueError(
            f"it is compressed with {form.name}, and {form.program[0]} cannot be run: "
            f"{error.strerror}"
        ) from error


class _Output:
    """What a program writes; that it ends well is known at the end only."""

    def __init__(self, process: subprocess.Popen[bytes], form: _Format) -> None:
        self._process = process
        self._form = form

    def read(self, size: int, /) -> bytes:
        assert self._process.stdout is not None  # noqa: S101 - as it was started
        data = self._process.stdout.read(size)
        if not data and self._process.wait():
            raise ValueError(
                f"its {self._form.name} data cannot be read: "
                f"{self._form.program[0]} ended with {self._process.returncode}"
            )
        return data


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.stdout is not None:
        process.stdout.close()
    process.kill()
    process.wait()
