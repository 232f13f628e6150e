"""What the two sides say to each other. Nothing that comes from the other side is used before it
has passed `decode` and, for rows, `vstore.copy.manifest`.

One side sends a guest, the other receives it; which of them the person sits at makes no
difference. The order of one pass:

    client -> server   Hello, then Request (what to do, who sends)
    server -> client   Hello
    sender             Source: the guest, its configuration, how large it is at most
    receiver           Target: it can be received; or Failure
    sender             Sum, where a copy is brought up to date; the receiver answers with Same
    sender             Folders ...        where it is not, and there is something to compare with
    receiver           Below              the smallest tree that has all that differs
    sender             Batch ...          the manifest, some hundred rows a time
    receiver           Want for each      which contents it lacks; Base before it: blocks it has
    sender             Contents, Piece, Gone, Proofs; Served at the end of each batch
    sender             End                how much it was, and the manifest's own digest
    receiver           Result             it stands there, or what is missing
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Annotated, Any, Final, TypeVar

import msgspec
from msgspec import Meta

from vstore.copy.wire import Channel, ConnectionLost
from vstore.errors import FormatUnknown, ToolError

PROTOCOL: Final = 2
SMALL: Final = 512 << 10
"""Files (bytes) that are read, and sent, in one piece."""
ROWS_A_BATCH: Final = 500
BATCHES_AHEAD: Final = 64
"""So many batches may be announced whose contents have not been served."""

_NUMBER_LIMIT: Final = (1 << 63) - 1
_ROWS_AT_MOST: Final = 1 << 26

Count = Annotated[int, Meta(ge=0, le=_NUMBER_LIMIT)]
RowNumber = Annotated[int, Meta(ge=0, le=_ROWS_AT_MOST)]
Text = Annotated[str, Meta(max_length=4096)]
Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
Addresses = Annotated[list[Text], Meta(max_length=4096)]
_Paths = Annotated[
    list[tuple[Annotated[bytes, Meta(max_length=1 << 16)], Text]], Meta(max_length=1000)
]


class Hello(msgspec.Struct, array_like=True):
    """The first word of each side."""

    protocol: Count
    program: Text
    host: Text


class Identity(msgspec.Struct, array_like=True):
    """What makes a machine of a guest: empty where it has none."""

    hostname: Text = ""
    addresses: Addresses = []
    context: Annotated[int, Meta(ge=0, le=1 << 31)] = 0


class Request(msgspec.Struct, array_like=True):
    """What the client asks for. `task`: receive, send, start, stop or end."""

    task: Text
    source: Text = ""
    target: Text = ""
    refresh: bool = False
    dry_run: bool = False
    verify: bool = False
    keep_going: bool = False
    mark_off: bool = True  # the copy does not start by itself at boot
    compress: Annotated[int, Meta(ge=-1, le=22)] = -1  # -1: adapt
    rate: Count = 0
    hostname: Text = ""
    interface: Text = ""  # DEV of --interface
    addresses: Addresses = []
    context: Annotated[int, Meta(ge=-1, le=1 << 31)] = 0  # -1: auto; 0: as it is


class Setting(msgspec.Struct, array_like=True):
    """A file, symlink or folder of a guest's configuration; `path` relative, "" is the guest's."""

    path: Text
    kind: Annotated[str, Meta(max_length=1)]  # f, l or d
    mode: Annotated[int, Meta(ge=0, le=0o7777)] = 0o644
    content: Annotated[bytes, Meta(max_length=1 << 20)] = b""


class Source(msgspec.Struct, array_like=True):
    """The guest that is sent."""

    name: Text
    machine: Text
    old_style: bool
    is_running: bool
    identity: Identity
    rows: Count  # about, as it was a moment ago
    bytes: Count
    settings: Annotated[list[Setting], Meta(max_length=5000)]


class Target(msgspec.Struct, array_like=True):
    """The receiver is ready. `identity`: what the copy is to be, where it is not the source's."""

    identity: Identity
    path: Text
    is_tight: bool  # more might arrive than there is room for: find out first how much


class Sum(msgspec.Struct, array_like=True):
    """Of the manifest; `errors` entries that cannot be read are not in it."""

    digest: Digest
    rows: Count
    bytes: Count
    errors: Count = 0


class Same(msgspec.Struct, array_like=True):
    """`compares`: Folders are to come, to find out where the two differ."""

    same: bool
    compares: bool = False


FolderSum = tuple[
    Annotated[bytes, Meta(max_length=1 << 20)],
    Annotated[bytes, Meta(min_length=16, max_length=16)],
    Annotated[int, Meta(ge=0, le=1 << 30)],
]
"""A folder's path, a digest of its rows, and of how many names the path of the folder is whose tree
has all names of the inodes in it.
"""


class Folders(msgspec.Struct, array_like=True):
    """The folders of the sender's tree, in no order."""

    folders: Annotated[list[FolderSum], Meta(max_length=4096)]
    last: bool = False


class Below(msgspec.Struct, array_like=True):
    """The tree that is to be sent: that of this folder."""

    path: Annotated[bytes, Meta(max_length=1 << 20)]


class Batch(msgspec.Struct, array_like=True):
    """Rows of the manifest: `parts` is what `vstore.copy.manifest` packs."""

    number: RowNumber
    first: RowNumber
    parts: msgspec.Raw
    shared: Annotated[bytes, Meta(max_length=1024)]  # a bit a row: may become an object
    groups: Annotated[bytes, Meta(max_length=1024)]  # a bit a row: others will link to it


class Want(msgspec.Struct, array_like=True):
    """Which rows' contents are to be sent, a bit a row; which are to be proven, with what; and for
    which the content waits that another row brings.
    """

    batch: RowNumber
    wanted: Annotated[bytes, Meta(max_length=1024)]
    proven: Annotated[bytes, Meta(max_length=1024)] = b""
    nonce: Annotated[bytes, Meta(max_length=32)] = b""
    waiting: Annotated[bytes, Meta(max_length=1024)] = b""


class Base(msgspec.Struct, array_like=True):
    """Digests (8 bytes each) of the blocks of the target's version of a row's file, in order."""

    row: RowNumber
    block: Annotated[int, Meta(ge=4096, le=1 << 30)]
    digests: Annotated[bytes, Meta(max_length=1 << 20)]
    size: Count


class Contents(msgspec.Struct, array_like=True):
    """Whole files, each small."""

    files: Annotated[list[tuple[RowNumber, bytes]], Meta(max_length=4096)]


class Piece(msgspec.Struct, array_like=True):
    """Bytes of a large file; `last` ends it. What no piece covers is a hole, or as in the base."""

    row: RowNumber
    at: Count
    data: bytes
    last: bool = False


class Gone(msgspec.Struct, array_like=True):
    """This row's file cannot be sent as it was announced; it may come again under another row."""

    row: RowNumber
    reason: Text
    is_error: bool


class Proofs(msgspec.Struct, array_like=True):
    batch: RowNumber
    proofs: Annotated[list[Digest], Meta(max_length=ROWS_A_BATCH)]


class Served(msgspec.Struct, array_like=True):
    batch: RowNumber


class End(msgspec.Struct, array_like=True):
    """`digest` is over all batches; `torn` are files that changed while they were read."""

    batches: RowNumber
    rows: RowNumber
    digest: Digest
    torn: _Paths = []
    errors: _Paths = []
    error_count: Count = 0


class Result(msgspec.Struct, array_like=True):
    """What the receiver made."""

    files: Count = 0
    files_sent: Count = 0
    bytes_total: Count = 0
    bytes_already_there: Count = 0
    bytes_lacking: Count = 0
    linked: Count = 0
    same: bool = False
    path: Text = ""
    context: Count = 0
    warnings: Annotated[list[Text], Meta(max_length=200)] = []
    torn: _Paths = []
    errors: _Paths = []
    error_count: Count = 0


class Failure(msgspec.Struct, array_like=True):
    """A ToolError of the other side."""

    kind: Text
    message: Text
    hint: Text = ""


class Done(msgspec.Struct, array_like=True):
    """A guest was started or stopped."""

    status: Annotated[int, Meta(ge=0, le=255)]
    said: Text = ""


_KINDS: Final[tuple[type[msgspec.Struct], ...]] = (
    Hello, Request, Source, Target, Sum, Same, Batch, Want, Base, Contents, Piece, Gone, Proofs,
    Served, End, Result, Failure, Done, Folders, Below,
)  # fmt: skip
_NUMBERS: Final = {kind: number for number, kind in enumerate(_KINDS, start=1)}
_DECODERS: Final[tuple[msgspec.msgpack.Decoder[Any], ...]] = tuple(
    msgspec.msgpack.Decoder(kind) for kind in _KINDS
)
_encoder: Final = msgspec.msgpack.Encoder()

_Message = TypeVar("_Message", bound=msgspec.Struct)


def encode(message: msgspec.Struct) -> tuple[int, bytes]:
    """The kind of the message's frame, and its body."""
    return _NUMBERS[type(message)], _encoder.encode(message)


def decode(kind: int, body: bytes) -> msgspec.Struct:
    """The message of a frame. Raises Hostile for what is none."""
    if not 1 <= kind <= len(_DECODERS):
        raise Hostile(f"a message of unknown kind {kind}")
    try:
        message: msgspec.Struct = _DECODERS[kind - 1].decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        name = _KINDS[kind - 1].__name__
        raise Hostile(f"a message {name} that is none: {error}") from error
    return message


class Hostile(ToolError):
    """What the other side sent breaks the protocol, or would break out of the guest's tree."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"the other side sent {what}; the copy was stopped",
            hint="nothing was changed: is the program there of this version, and to be trusted?",
        )


class Dialogue:
    """Messages over a channel. A Failure of the other side is raised here."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    def send(self, message: msgspec.Struct) -> None:
        """Queue the message. Raises ConnectionLost, or what the other side ended with."""
        try:
            self.channel.send(*encode(message))
        except ConnectionLost:
            self.hear_out()
            raise

    def hear_out(self) -> None:
        """Raise what the other side said last, where that is why it does not listen any more."""
        with suppress(ConnectionLost, Hostile):
            while True:
                self._checked(*self.channel.receive())

    def receive(self) -> msgspec.Struct:
        """The next message. Raises ConnectionLost, Hostile, the other side's ToolError."""
        return self._checked(*self.channel.receive())

    def poll(self) -> msgspec.Struct | None:
        """The next message if it is there. Raises as `receive`."""
        frame = self.channel.poll()
        return None if frame is None else self._checked(*frame)

    def expect(self, kind: type[_Message]) -> _Message:
        """The next message, which must be of this kind. Raises as `receive`."""
        message = self.receive()
        if not isinstance(message, kind):
            raise Hostile(f"{type(message).__name__} where {kind.__name__} belongs")
        return message

    def expect_some(
        self, kind: type[_Message], *, until: Callable[[_Message], bool]
    ) -> Iterator[_Message]:
        """The next messages, all of this kind, to that one which `until` is true of."""
        while True:
            message = self.expect(kind)
            yield message
            if until(message):
                return

    def fail(self, error: ToolError) -> None:
        """Tell the other side why we end, as far as it still listens."""
        message, hint = as_text(error.message), as_text(error.hint or "")
        self.send(Failure(type(error).__name__, message[:4000], hint[:4000]))

    def _checked(self, kind: int, body: bytes) -> msgspec.Struct:
        message = decode(kind, body)
        if isinstance(message, Failure):
            raise revive(message, self.channel.peer)
        return message


def is_plain(kind: type[ToolError]) -> bool:
    """Whether it is one of those in `vstore.errors`, made of a message and a hint."""
    return kind.__module__ == ToolError.__module__


def revive(failure: Failure, peer: str) -> ToolError:
    """The other side's error, with its exit code."""
    kinds = {kind.__name__: kind for kind in ToolError.__subclasses__() if is_plain(kind)}
    kind = kinds.get(failure.kind, ToolError)
    return kind(f"{peer}: {failure.message}", hint=failure.hint or None)


def greet(dialogue: Dialogue, program: str, host: str) -> Hello:
    """Say who we are and hear who answers. Raises FormatUnknown for another protocol."""
    dialogue.send(Hello(PROTOCOL, program, host))
    hello = dialogue.expect(Hello)
    if hello.protocol != PROTOCOL:
        raise FormatUnknown(
            f"{dialogue.channel.peer}: vserver-copy {hello.program} there speaks protocol "
            f"{hello.protocol}, this one ({program}) {PROTOCOL}",
            hint="install the same version on both machines",
        )
    return hello


def as_text(text: str) -> str:
    """The text as it can travel: bytes of names that are no UTF-8 become question marks."""
    return text.encode("utf-8", "replace").decode()


def set_bits(numbers: list[int], count: int) -> bytes:
    """`count` bits, those of `numbers` set."""
    bits = bytearray((count + 7) // 8)
    for number in numbers:
        bits[number >> 3] |= 1 << (number & 7)
    return bytes(bits)


def list_bits(bits: bytes, count: int) -> list[int]:
    """The numbers of the bits that are set, which must be below `count`. Raises Hostile."""
    found = [
        index * 8 + bit
        for index, byte in enumerate(bits)
        if byte
        for bit in range(8)
        if byte >> bit & 1
    ]
    if found and found[-1] >= count:
        raise Hostile("a choice of rows that are not there")
    return found
