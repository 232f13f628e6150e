"""One pass from the side of the guest that is copied."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vstore import exclude
from vstore.copy.identity import identity_of, rewrite_files
from vstore.copy.listing import Listing, measure
from vstore.copy.messages import Dialogue, Request, Result, Source, Target
from vstore.copy.sender import Sender
from vstore.copy.settings import collect_settings, is_old_style
from vstore.errors import ToolError
from vstore.guest import Guest, load_guest
from vstore.hold import Held, hold_guests
from vstore.pool import Pool
from vstore.progress import Progress
from vstore.targets import choose_pool


def send_guest(dialogue: Dialogue, request: Request, progress: Progress) -> tuple[Source, Result]:
    """Send the guest that the request names; returns what it is, and what became of it there.

    Raises GuestNotFound, PoolBusy, ConfigInvalid, ConnectionLost, what the receiver raised.
    """
    guest = load_guest(request.source)
    pool_path = choose_pool([guest], None)
    with (
        hold_guests([guest], pool_path, offline=True) as (held,),
        _opened(pool_path, is_dry=request.dry_run) as pool,
    ):
        source = _describe(guest, held)
        dialogue.send(source)
        target = dialogue.expect(Target)
        rewritten = rewrite_files(held.fd, source.identity, target.identity)
        result = Result()
        for _ in range(2 if target.is_tight else 1):
            progress.phase("copy", source.bytes, "bytes")
            listing = Listing(
                held.fd,
                pool,
                exclude.load_for(guest),
                rewritten=rewritten,
                is_still=not held.is_running,
                keeps_blocks=request.refresh,
            )
            try:
                sender = Sender(dialogue, held.fd, listing, rewritten, progress)
                result = sender.send(is_refresh=request.refresh)
            finally:
                listing.close()
            if result.same:
                break
        return source, result


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
