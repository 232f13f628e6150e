"""One pass from the side of the guest that is copied."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Self

from vstore import exclude
from vstore.copy.ahead import Ahead
from vstore.copy.identity import identity_of, rewrite_files
from vstore.copy.listing import Listing, measure
from vstore.copy.messages import BATCHES_AHEAD, Dialogue, Request, Result, Source, Target
from vstore.copy.outline import Outline
from vstore.copy.packing import Listed
from vstore.copy.sender import Sender
from vstore.copy.settings import collect_settings, is_old_style
from vstore.errors import ToolError
from vstore.guest import Guest, hold_lock, load_guest, load_state
from vstore.hold import Held, hold_guests
from vstore.pool import Pool
from vstore.progress import Progress
from vstore.targets import choose_pool


class Outgoing:
    """The guest that a request names, held for one pass. A context manager, which may be entered
    twice: the first exit lets everything go.

    Raises GuestNotFound, PoolBusy, ConfigInvalid.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._guest = load_guest(request.source)
        self._stack = ExitStack()
        try:
            pool_path = choose_pool([self._guest], None)
            holding = hold_guests([self._guest], pool_path, offline=True)
            (self._held,) = self._stack.enter_context(holding)
            opened = _opened(pool_path, is_dry=request.dry_run)
            self._pool = self._stack.enter_context(opened)
            self._source = _describe(self._guest, self._held)
        except BaseException:
            self._stack.close()
            raise
        self._listing: Listing | None = None
        self._ahead: Ahead[Listed] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def list_ahead(self) -> None:
        """Begin to list, as far as memory allows: the other side is not there yet."""
        self._ahead = Ahead(self._list({}).batches(), BATCHES_AHEAD)
        self._stack.callback(self._stop)

    def _list(self, rewritten: dict[bytes, bytes]) -> Listing:
        listing = Listing(
            self._held.fd,
            self._pool,
            exclude.load_for(self._guest),
            rewritten=rewritten,
            is_still=not self._held.is_running,
            keeps_blocks=self._request.refresh,
            keeps_contents=not self._request.dry_run,
            outline=Outline() if self._request.refresh else None,
        )
        self._stack.callback(listing.close)
        self._listing = listing
        return listing

    def _stop(self) -> None:
        """What was listed ahead is of no use."""
        if self._ahead is not None and self._listing is not None:
            self._listing.stop()
            self._ahead.close()
            self._ahead = None

    def send(self, dialogue: Dialogue, progress: Progress) -> tuple[Source, Result]:
        """Send it all; returns what the guest is, and what became of it there.

        Raises ConnectionLost, Hostile, what the receiver raised.
        """
        source = self._source
        dialogue.send(source)
        target = dialogue.expect(Target)
        rewritten = rewrite_files(self._held.fd, source.identity, target.identity)
        result = Result()
        for turn in range(2 if target.is_tight else 1):
            progress.phase("copy", source.bytes, "bytes")
            if turn or rewritten:
                self._stop()
            if self._ahead is not None and self._listing is not None:
                listing, batches = self._listing, iter(self._ahead)
            else:
                listing = self._list(rewritten)
                batches = listing.batches()
            sender = Sender(dialogue, self._held.fd, listing, rewritten, progress)
            result = sender.send(batches, is_refresh=self._request.refresh)
            if result.same:
                break
        return source, result


def is_free(name: str) -> bool:
    """Whether the guest can be held at once. Raises GuestNotFound, NotPermitted."""
    load_guest(name)
    if load_state(name) is not None:
        return True
    with hold_lock(name) as is_ours:
        return is_ours


@contextmanager
def _opened(path: Path, *, is_dry: bool) -> Iterator[Pool | None]:
    """The pool: what it knows need not be read. Where there is none one is made, if that can be,
    to keep the digests for the next time.
    """
    pool: Pool | None = None
    if os.path.lexists(path / "format"):
        pool = Pool.load(path)
    elif not is_dry:
        with suppress(ToolError):
            pool = Pool.create(path)
    try:
        yield pool
    finally:
        if pool is not None:
            pool.close()


def _describe(guest: Guest, held: Held) -> Source:
    settings = collect_settings(guest)
    rows, size = measure(held.fd)
    return Source(
        guest.name,
        os.uname().machine,
        is_old_style(guest),
        held.is_running,
        identity_of(settings),
        rows,
        size,
        settings,
    )
