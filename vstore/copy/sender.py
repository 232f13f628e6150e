"""The side that sends a guest: its manifest, and the contents that the other side asks for.

It serves rows of its own manifest and nothing else, each once, so that a hostile receiver sees of
this machine what it is sent anyway. Memory is bounded: so many batches may be announced and not yet
served, and blocks of large files are compared one stretch at a time.
"""

import errno
import logging
import os
import time
from collections import deque
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Final

import msgspec
from blake3 import blake3

from vstore import extents, inode
from vstore.copy import blocks
from vstore.copy.again import Again
from vstore.copy.known import Key
from vstore.copy.listing import Firsts, Listing
from vstore.copy.manifest import Row, travelling
from vstore.copy.messages import (
    BATCHES_AHEAD,
    SMALL,
    Base,
    Batch,
    Below,
    Contents,
    Dialogue,
    End,
    Gone,
    Hostile,
    Piece,
    Proofs,
    Result,
    Same,
    Served,
    Sum,
    Want,
    list_bits,
    set_bits,
)
from vstore.copy.packing import Listed, Packer, Spool
from vstore.copy.proof import prove
from vstore.digest import digest_content
from vstore.folders import LastFolder, join
from vstore.progress import Progress

log = logging.getLogger(__name__)

_PACKED: Final = 1 << 20  # bytes of small files in one message, and of a piece of a large one
_FILES_PACKED: Final = 1000
_BASES_AT_MOST: Final = 64 << 20  # bytes of blocks' digests from the other side
_TRIES: Final = 3
_PAUSE_S: Final = 0.2
_TORN_AT_MOST: Final = 200
_NAMED_AT_MOST: Final = 1000
_SHOWN: Final = 4000  # bytes of a path
_CHANGED: Final = "changed while it was read"
_DAMAGED: Final = "is an object of the pool that is not what its name says: vpool verify --repair"


class _Changed(Exception):
    """The file is not what the manifest says any more."""


class _Damaged(Exception):
    """The file is an object of the pool, and not what its name says."""


class Sender:
    """Sends the tree that `listing` lists."""

    def __init__(
        self,
        dialogue: Dialogue,
        root_fd: int,
        listing: Listing,
        rewritten: Mapping[bytes, bytes],
        progress: Progress,
    ) -> None:
        self._dialogue = dialogue
        self._root_fd = root_fd
        self._listing = listing
        self._rewritten = rewritten
        self._progress = progress
        self._unserved: deque[Listed] = deque()
        self._bases: dict[int, tuple[Base, bytearray]] = {}
        self._base_bytes = 0
        self._changed: list[bytes] = []
        self._again = Again()
        self._torn: list[tuple[bytes, str]] = []
        self._copies: dict[bytes, int] = {}  # path -> descriptor of a copy that stays as it is
        self._small: list[tuple[int, bytes]] = []
        self._small_bytes = 0
        self._folder = LastFolder(root_fd)
        self._files = self._saved = 0  # bytes that need not be sent
        self.files_sent = 0

    def send(self, batches: Iterator[Listed], *, is_refresh: bool) -> Result:
        """Send the listing's batches; returns what the receiver made of them.

        Raises ConnectionLost, Hostile, and what the receiver raised.
        """
        try:
            with Spool() as spool:
                if not is_refresh:
                    self._send_all(batches)
                elif not (answer := self._ask_whether_same(batches, spool)).same:
                    self._send_all(self._compare(spool) if answer.compares else spool.take())
            return self._dialogue.expect(Result)
        finally:
            self._folder.close()
            self._again.close()
            for fd in self._copies.values():
                os.close(fd)

    def _send_all(self, batches: Iterator[Listed]) -> None:
        for batch in batches:
            self._announce(batch)
            self._serve_what_is_asked(BATCHES_AHEAD)
        self._serve_what_is_asked(0)
        self._send_again()
        self._end()

    def _ask_whether_same(self, batches: Iterator[Listed], spool: Spool) -> Same:
        """Whether the other side has just this tree already. The batches go to the spool."""
        for batch in batches:
            spool.put(batch)
        packer = self._listing.packer
        packer.outline = None  # of the tree as it was found: some may be listed again
        found = self._listing.found
        digest = packer.digest.digest()
        self._dialogue.send(Sum(digest, packer.rows, found.size, len(found.errors)))
        return self._dialogue.expect(Same)

    def _compare(self, spool: Spool) -> Iterator[Listed]:
        """The batches that the other side wants, once it has seen where the two trees differ."""
        outline = self._listing.outline
        if outline is None:
            raise Hostile("a wish to compare what is sent for the first time")
        for message in outline.messages():
            self._dialogue.send(message)
        folder = self._dialogue.expect(Below).path
        outside = outline.measure_outside(folder)
        self._files += outside.files
        self._saved += outside.size
        self._progress.advance(outside.size)
        if not folder:
            return spool.take()
        if outside.rows == self._listing.packer.rows:
            raise Hostile("a wish for a folder that is not there")
        self._listing.packer = Packer(folder)
        return spool.take_below(folder, self._listing.packer)

    def _announce(self, batch: Listed) -> None:
        self._dialogue.send(
            Batch(
                batch.number,
                batch.first,
                msgspec.Raw(batch.packed),
                set_bits(batch.shared, batch.count),
                set_bits(batch.groups, batch.count),
            )
        )
        self._unserved.append(batch)

    # --- serving

    def _serve_what_is_asked(self, most: int) -> None:
        """Serve what has been asked for; wait where more than `most` batches are unserved."""
        while self._unserved:
            is_full = len(self._unserved) > most
            message = self._dialogue.receive() if is_full else self._dialogue.poll()
            if message is None:
                return
            if isinstance(message, Base):
                self._take_base(message)
            elif isinstance(message, Want):
                self._serve(self._unserved.popleft(), message)
            else:
                raise Hostile(f"{type(message).__name__} while contents are sent")

    def _take_base(self, message: Base) -> None:
        self._base_bytes += len(message.digests)
        if self._base_bytes > _BASES_AT_MOST:
            raise Hostile("more digests of blocks than can be")
        base, digests = self._bases.setdefault(message.row, (message, bytearray()))
        if (base.block, base.size) != (message.block, message.size):
            raise Hostile("digests of blocks that do not belong together")
        digests += message.digests

    def _serve(self, batch: Listed, want: Want) -> None:
        if want.batch != batch.number:
            raise Hostile(f"a choice from batch {want.batch} where {batch.number} is next")
        wanted = frozenset(list_bits(want.wanted, batch.count))
        proven = frozenset(list_bits(want.proven, batch.count))
        rows = list(batch.rows())
        proofs = [self._prove(*rows[place], want.nonce) for place in sorted(proven)]
        for place in sorted(wanted, key=lambda place: (_rank(rows[place][1]), place)):
            path, row = rows[place]
            if not row.is_file:
                raise Hostile("a wish for the content of what is no file")
            self._send_row(batch, place, path, row)
        self._send_small()
        self._note_dependent(batch, rows, frozenset(list_bits(want.waiting, batch.count)))
        if proofs:
            self._dialogue.send(Proofs(batch.number, proofs))
        self._dialogue.send(Served(batch.number))
        self._listing.drop_contents(batch)
        size = sum(row.size for _, row in rows)
        self._files += sum(row.is_file for _, row in rows)
        self._saved += size - sum(rows[place][1].size for place in wanted)
        self._progress.note(self._files, self._saved)
        self._progress.advance(size)

    def _note_dependent(
        self, batch: Listed, rows: Sequence[tuple[bytes, Row]], waiting: Container[int]
    ) -> None:
        """Rows that need what another was to bring, which could not be sent, come again."""
        firsts = frozenset(batch.groups)
        for place, (path, row) in enumerate(rows):
            if (row.link or place in waiting) and self._again.takes(
                batch.first + place, row, is_first=place in firsts
            ):
                self._changed.append(join(path, row.name))

    def _send_row(self, batch: Listed, place: int, path: bytes, row: Row) -> None:
        number, key = batch.first + place, batch.keys[place]
        full = join(path, row.name)
        base, digests = self._bases.pop(number, (None, bytearray()))
        self._base_bytes -= len(digests)
        try:
            if full in self._rewritten:
                self._put_small(number, self._rewritten[full])
            elif full in self._copies:
                self._send_file(number, self._copies[full], row.size)
            else:
                self._send_unchanged(number, path, row, key, base, bytes(digests))
            self.files_sent += 1
            self._again.note_sent(row)
            return
        except _Damaged:
            gone = Gone(number, _DAMAGED, is_error=True)
        except _Changed:
            self._changed.append(full)
            gone = Gone(number, _CHANGED, is_error=False)
        except OSError as error:
            is_error = error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
            gone = Gone(number, f"cannot be read: {error.strerror}", is_error)
            if not is_error:  # something else may stand there now
                self._changed.append(full)
        self._again.note_gone(number, row, is_first=place in batch.groups and not gone.is_error)
        self._send_small()
        self._dialogue.send(gone)

    def _send_unchanged(
        self,
        number: int,
        path: bytes,
        row: Row,
        key: Key | None,
        base: Base | None,
        digests: bytes,
    ) -> None:
        content = self._listing.take_content(key)
        if content is not None:
            self._put_small(number, content)
            return
        fd = self._open(path, row.name)
        try:
            if not _is_as_listed(fd, row, key):
                raise _Changed
            status = os.fstat(fd)
            is_dense = status.st_blocks * 512 >= status.st_size
            if status.st_size <= SMALL and is_dense:
                content = os.pread(fd, row.size, 0)
                _check(fd, row, key, blake3(content).digest())
                self._put_small(number, content)
                return
            if base is not None:
                self._send_blocks(number, fd, row, base, digests)
            else:
                found = self._send_pieces(number, fd, row.size)
                _check(fd, row, key, found if is_dense else row.digest)
            if not _is_as_listed(fd, row, key):
                raise _Changed
            self._dialogue.send(Piece(number, row.size, b"", last=True))
        finally:
            os.close(fd)

    def _send_file(self, number: int, fd: int, size: int) -> None:
        self._send_pieces(number, fd, size)
        self._dialogue.send(Piece(number, size, b"", last=True))

    def _send_pieces(self, number: int, fd: int, size: int) -> bytes:
        """Send all but the holes; gives the digest of what was sent."""
        self._send_small()
        hasher = blake3()
        for start, end in extents.data_ranges(fd, size):
            for at in range(start, end, _PACKED):
                data = os.pread(fd, min(_PACKED, end - at), at)
                hasher.update(data)
                self._dialogue.send(Piece(number, at, data))
        return hasher.digest()

    def _send_blocks(self, number: int, fd: int, row: Row, base: Base, digests: bytes) -> None:
        if len(digests) != blocks.count_blocks(base.size, base.block) * blocks.DIGEST_BYTES:
            raise Hostile("digests of blocks that are not all there")
        self._send_small()
        own = self._listing.known_blocks(fd)
        if base.block != blocks.choose_block(row.size):
            own = b""
        if own:
            found = blocks.differing_known(fd, row.size, base.block, own, digests, base.size)
        else:
            found = blocks.differing(fd, row.size, base.block, digests, base.size)
        for at, data in found:
            if own and not blocks.are_as(data, own, at, base.block):
                raise _Changed
            for start in range(0, len(data), _PACKED):
                self._dialogue.send(Piece(number, at + start, data[start : start + _PACKED]))

    def _put_small(self, number: int, content: bytes) -> None:
        self._small.append((number, content))
        self._small_bytes += len(content)
        if self._small_bytes >= _PACKED or len(self._small) >= _FILES_PACKED:
            self._send_small()

    def _send_small(self) -> None:
        if self._small:
            self._dialogue.send(Contents(self._small))
            self._small, self._small_bytes = [], 0

    def _prove(self, path: bytes, row: Row, nonce: bytes) -> bytes:
        """BLAKE3, keyed with the nonce, over the content: only who has it can tell."""
        if not row.is_file or len(nonce) != 32:
            raise Hostile("a wish for a proof that cannot be")
        if join(path, row.name) in self._rewritten:
            return blake3(self._rewritten[join(path, row.name)], key=nonce).digest()
        try:
            fd = self._open(path, row.name)
        except OSError:
            return bytes(32)
        try:
            return prove(fd, nonce)
        finally:
            os.close(fd)

    def _open(self, path: bytes, name: bytes) -> int:
        """A file of the guest."""
        return os.open(name, inode.OPEN_TO_READ, dir_fd=self._folder.open(path))

    # --- what changed meanwhile

    def _send_again(self) -> None:
        """List and send what changed once more; what goes on changing as one read saw it."""
        for attempt in range(_TRIES):
            paths, self._changed = self._changed, []
            if not paths:
                return
            self._folder.close()
            time.sleep(_PAUSE_S * attempt)
            firsts: Firsts = {}
            for path in paths:
                for batch in self._listing.again(path, firsts):
                    self._announce(batch)
                    self._serve_what_is_asked(BATCHES_AHEAD)
            for batch in self._listing.packer.end():
                self._announce(batch)
            self._serve_what_is_asked(0)
        torn: Firsts = {}
        for path in self._changed:
            self._send_torn(path, torn)

    def _send_torn(self, path: bytes, firsts: Firsts) -> None:
        """As one read sees it; `firsts` are the rows of inodes that were sent so."""
        if len(self._copies) >= _TORN_AT_MOST:
            self._listing.found.errors.append((path, _CHANGED))
            return
        try:
            row, is_group = self._row_of_torn(path, firsts)
        except FileNotFoundError:
            return
        except OSError as error:
            reason = f"{_CHANGED}, and cannot be copied aside: {error.strerror}"
            self._listing.found.errors.append((path, reason))
            return
        self._torn.append((path[:_SHOWN], _CHANGED))
        packer = self._listing.packer
        folder = path.rpartition(b"/")[0]
        added = packer.add(folder, row, None, is_shared=False, is_group=is_group)
        for batch in (*added, *packer.end()):
            self._announce(batch)
            self._serve_what_is_asked(0)

    def _row_of_torn(self, path: bytes, firsts: Firsts) -> tuple[Row, bool]:
        """The file's row, and whether more names of its inode may follow. Raises OSError."""
        folder, _, name = path.rpartition(b"/")
        number = self._listing.packer.next_row
        fd = self._open(folder, name)
        try:
            status = os.fstat(fd)
            has_more = status.st_nlink > 1
            key = status.st_ino, inode.birth_time_ns(fd)
            if has_more and key in firsts:
                return Row(name, status.st_mode, link=number - firsts[key]), False
            row = self._copy_torn(fd, path, status)
        finally:
            os.close(fd)
        if has_more:
            firsts[key] = number
        return row, has_more

    def _copy_torn(self, source_fd: int, path: bytes, status: os.stat_result) -> Row:
        """The row of a copy, which stays as it is until it has been sent."""
        fd = _copy_now(source_fd, status.st_size, self._root_fd)
        self._copies[path] = fd
        return Row(
            path.rpartition(b"/")[2],
            status.st_mode,
            status.st_uid,
            status.st_gid,
            status.st_mtime_ns,
            status.st_size,
            digest_content(fd, os.fstat(fd)),
            sorted(travelling(inode.load_xattrs(source_fd)).items()),
        )

    def _end(self) -> None:
        found, packer = self._listing.found, self._listing.packer
        self._dialogue.send(
            End(
                packer.batches,
                packer.rows,
                packer.digest.digest(),
                self._torn,
                [(path[:_SHOWN], reason) for path, reason in found.errors[:_NAMED_AT_MOST]],
                len(found.errors),
            )
        )


def _rank(row: Row) -> int:
    """Of what is asked for the large files go first, the largest before all; small ones go together
    in their order.
    """
    return -row.size if row.size > SMALL else 0


def _is_as_listed(fd: int, row: Row, key: Key | None) -> bool:
    status = os.fstat(fd)
    if key is None:  # an object: no link of it changes what its name says
        return (status.st_size, status.st_mode, status.st_mtime_ns) == (
            row.size,
            row.mode,
            row.mtime_ns,
        )
    return (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns) == key


def _check(fd: int, row: Row, key: Key | None, digest: bytes) -> None:
    """Hold what was read against the manifest: a store through a mapping leaves all times as they
    are.
    """
    if digest != row.digest:
        raise _Damaged if key is None and inode.is_immutable(fd) else _Changed


def _copy_now(fd: int, size: int, root_fd: int) -> int:
    """A nameless copy, on the guest's file system, of a file that goes on changing; holes stay
    holes, and where the file system can clone, all of it is of one moment.
    """
    copy_fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=root_fd)
    try:
        is_cloned = extents.clone(fd, copy_fd)
        os.ftruncate(copy_fd, size)
        for start, end in extents.data_ranges(fd, 0 if is_cloned else size):
            for at in range(start, end, _PACKED):
                os.pwrite(copy_fd, os.pread(fd, min(_PACKED, end - at), at), at)
    except OSError:
        os.close(copy_fd)
        raise
    return copy_fd
