"""The side that receives a guest: into a folder beside the target, which is not touched.

The sender is taken for hostile: what it sends is held against the manifest, the manifest against
its rules, and every entry is made by a folder's descriptor and a single name. Contents that this
side has already are looked for in the pool, among what arrived when an earlier copy was cut off,
and in the target's version of the same file; only the others are asked for, each once.
"""

import logging
import os
import secrets
import stat
from collections.abc import Iterator
from typing import Final

import msgspec
from blake3 import blake3

from vstore.copy import blocks, placer
from vstore.copy.again import Again
from vstore.copy.area import Area
from vstore.copy.batches import OpenBatch, Tally
from vstore.copy.choice import Chooser, meta_of
from vstore.copy.dressing import Undressed
from vstore.copy.incoming import Incoming
from vstore.copy.jobs import Job, Jobs
from vstore.copy.listing import Listing
from vstore.copy.manifest import Row, unpack_parts
from vstore.copy.messages import (
    BATCHES_AHEAD,
    Batch,
    Contents,
    Dialogue,
    End,
    Gone,
    Hostile,
    Piece,
    Proofs,
    Served,
    Want,
    list_bits,
    set_bits,
)
from vstore.copy.pins import Pins
from vstore.copy.policy import Policy
from vstore.copy.sharing import Sharing
from vstore.copy.staging import Meta, Spot, Staging, explain
from vstore.errors import NoSpace
from vstore.folders import join
from vstore.pool import Pool
from vstore.progress import Progress
from vstore.undo import guarded_worker

log = logging.getLogger(__name__)

_FOLDERS_A_JOB: Final = 500
_MARGIN: Final = 16 << 20  # bytes that stay free
_OTHER_CONTENT: Final = "what arrived is not what the manifest says: its digest is another one"


class Receiver:
    """Receives into `area`; without one (a dry run) it only finds out what would be asked for.

    `base_fd`: the target's version of the tree, -1 where there is none; `base` lists it, or more of
    the target. `tally` has counted what is there and stays.
    """

    def __init__(
        self,
        dialogue: Dialogue,
        pool: Pool | None,
        area: Area | None,
        policy: Policy,
        progress: Progress,
        *,
        base_fd: int = -1,
        base: Listing | None = None,
        room: int = 1 << 62,
        tally: Tally,
    ) -> None:
        self._dialogue = dialogue
        self._pool = pool
        self._area = area
        self._policy = policy
        self._progress = progress
        self._base_fd = base_fd
        self._room = room
        self._chooser = Chooser(dialogue, pool, area, base_fd, base)
        self._open: dict[int, OpenBatch] = {}
        self._digest = blake3()
        self._next_row = 0
        self._next_batch = 0
        self._again = Again()
        self._jobs = Jobs(dialogue.channel)
        self._staging = None if area is None else Staging(area)
        self._incoming: Incoming | None = None
        if area is not None and self._staging is not None:
            self._incoming = Incoming(area, self._staging, self._chooser)
        self._pins: Pins | None = None
        self._sharing = Sharing(pool)
        self._folders = Undressed()
        self.tally = tally
        self.end: End | None = None

    def close(self) -> None:
        self._sharing.let_go()
        self._chooser.close()
        self._again.close()
        self._folders.close()
        if self._incoming is not None:
            self._incoming.close()
        if self._staging is not None:
            self._staging.close()

    # --- the run

    def receive(self) -> End:
        """Take everything that the sender has, to its End.

        Raises ConnectionLost, Hostile, NoSpace, what the sender raised.
        """
        if self._area is None or self._pool is None:
            for _ in self._find_jobs():
                pass
        else:
            self._receive_into(self._area, self._pool)
        if self.end is None:
            raise Hostile("no end")
        return self.end

    # --- the pool's lock, which the worker works under too

    def _let_go(self) -> Iterator[None]:
        """Let the pool go once the worker is done: a None for each time that it is not.

        Nobody waits for the lock while the worker waits for us: its leases go through our hands.
        """
        yield from self._jobs.await_worker(0)
        self._sharing.let_go()

    def _receive_into(self, area: Area, pool: Pool) -> None:
        with pool.stage(1) as (pin_fd,):
            self._pins = Pins(pin_fd)
            try:
                with pool.share():
                    worker = guarded_worker(
                        pool,
                        lambda pool, windows, _: placer.Placer(pool, windows, area, self._base_fd),
                    )
                    crew = worker.__enter__()
                try:
                    answers = crew.map(
                        self._jobs.count_given(self._find_jobs()),
                        ahead=Jobs.ahead,
                        wake_fd=self._dialogue.channel.inbox_fd,
                    )
                    for pins, answer in answers:
                        self._take_answer(pins, answer)
                except BaseException as error:
                    worker.__exit__(type(error), error, error.__traceback__)
                    raise
                worker.__exit__(None, None, None)
            finally:
                self._sharing.let_go()
                self._pins.drop_all()

    def _take_answer(self, pins: list[str], answer: placer.Answer) -> None:
        linked, errors, standing, is_done = answer
        self.tally.linked += linked
        for path, reason in errors:
            self.tally.note_error(path, reason)
        self.tally.made -= len(errors) - standing
        if self._pins is not None and is_done:
            self._jobs.note_done()
            self._pins.drop(pins)

    def _find_jobs(self) -> Iterator[Job | None]:
        """What the worker has to do, as it comes; None where there is nothing for it now."""
        while self.end is None:
            message = self._dialogue.poll()
            if message is None and not self._jobs.is_idle:
                yield self._jobs.take(is_waiting=True)
                continue
            if message is None or self._sharing.is_over():
                yield from self._let_go()
            if message is None:
                message = self._dialogue.receive()
            self._sharing.take()
            if isinstance(message, Batch):
                self._take_batch(message)
            elif isinstance(message, Served):
                self._close_batch(message.batch)
            else:
                self._take_other(message)
            yield from self._jobs.await_room()
            job = self._jobs.take(is_waiting=False)
            if job is not None or self._jobs.is_working:
                yield job
        yield from self._finish_jobs()
        yield from self._let_go()

    def _take_other(self, message: msgspec.Struct) -> None:
        if isinstance(message, Contents):
            self._take_contents(message)
        elif isinstance(message, Piece):
            self._take_piece(message)
        elif isinstance(message, Gone):
            self._take_gone(message)
        elif isinstance(message, Proofs):
            self._take_proofs(message)
        elif isinstance(message, End):
            self._take_end(message)
        else:
            raise Hostile(f"{type(message).__name__} while a guest is received")

    def _finish_jobs(self) -> Iterator[Job]:
        if self._area is None:
            return
        yield self._jobs.take_all()
        steps: list[placer.Step] = []
        for path, meta in self._folders.take():
            steps.append((placer.FINISH, (0, path, b""), meta))
            if len(steps) >= _FOLDERS_A_JOB:
                yield steps, []
                steps = []
        yield steps, []

    def _take_end(self, message: End) -> None:
        if self._open:
            raise Hostile("an end before everything was served")
        told = (message.batches, message.rows, message.digest)
        if told != (self._next_batch, self._next_row, self._digest.digest()):
            raise Hostile("a manifest that is not the one that it has just ended")
        self.end = message

    # --- the manifest

    def _take_batch(self, message: Batch) -> None:
        if message.number != self._next_batch or message.first != self._next_row:
            raise Hostile(f"batch {message.number} where {self._next_batch} is next")
        if len(self._open) > BATCHES_AHEAD + 1:
            raise Hostile("more of a manifest than it serves")
        packed = bytes(message.parts)
        parts = unpack_parts(packed, message.first)
        rows = [(path, row) for path, some in parts for row in some]
        if not message.first and (not rows or rows[0][0] or rows[0][1].name):
            raise Hostile("a manifest that does not begin with the guest's root")
        self._digest.update(packed)
        message.parts = msgspec.Raw(b"")
        batch = OpenBatch(
            message,
            rows,
            frozenset(list_bits(message.shared, len(rows))),
            frozenset(list_bits(message.groups, len(rows))),
        )
        self._open[message.number] = batch
        self._next_batch += 1
        self._next_row += len(rows)
        self.tally.rows += len(rows)
        steps = self._decide_all(batch)
        self._send_want(batch)
        if self._area is not None:
            self._jobs.put(steps)
            if not batch.proven:
                self._pass_pins(batch)

    def _pass_pins(self, batch: OpenBatch) -> None:
        self._jobs.put_pins(batch.pins)
        batch.pins = []

    def _decide_all(self, batch: OpenBatch) -> list[placer.Step]:
        """What can be made at once; the batch notes what is wanted, and what comes later."""
        steps = []
        pinned: list[int] = []
        for place, (path, row) in enumerate(batch.rows):
            step = self._decide(batch, place, path, row, pinned)
            if step is not None:
                steps.append(step)
            self.tally.inodes += not row.link and (step is None or step[0] != placer.LINK)
        self._pin(batch, pinned)
        return steps

    def _send_want(self, batch: OpenBatch) -> None:
        count = len(batch.rows)
        asked = sorted(batch.wanted) if self._area is not None else []
        proven = [place for place, _ in batch.proven]
        batch.nonce = secrets.token_bytes(32) if proven else b""
        bits = set_bits(proven, count) if proven else b""
        batch.waiting = frozenset(place for place in batch.later if not batch.rows[place][1].link)
        waiting = set_bits(sorted(batch.waiting), count) if batch.waiting else b""
        number = batch.message.number
        self._dialogue.send(Want(number, set_bits(asked, count), bits, batch.nonce, waiting))

    def _decide(
        self, batch: OpenBatch, place: int, path: bytes, row: Row, pinned: list[int]
    ) -> placer.Step | None:
        spot = (batch.first + place, path, row.name)
        meta = meta_of(row)
        is_group = place in batch.groups
        self.tally.made += 1
        if stat.S_ISDIR(row.mode):
            self._make_folder(spot, meta)
            return None
        if row.link:
            self.tally.files += stat.S_ISREG(row.mode)
            batch.later.append(place)
            return None
        if stat.S_ISLNK(row.mode):
            return (placer.SYMLINK, spot, row.text, meta, is_group)
        if not stat.S_ISREG(row.mode):
            return self._decide_node(spot, row, meta, is_group)
        self.tally.files += 1
        self.tally.size += row.size
        if row.size == 0:
            return (placer.EMPTY, spot, meta, is_group)
        return self._decide_file(batch, place, row, pinned)

    def _make_folder(self, spot: Spot, meta: Meta) -> None:
        """At once: files that arrive are put into it."""
        if self._area is None or self._staging is None:
            return
        try:
            self._staging.make_folder(spot[1])
        except OSError as error:
            self.tally.note_error(spot[1], explain(self._area, spot, error))
            self.tally.made -= 1
        else:
            self._folders.put(spot[1], meta)

    def _decide_node(self, spot: Spot, row: Row, meta: Meta, is_group: bool) -> placer.Step | None:
        if not stat.S_ISFIFO(row.mode) and not self._policy.allows_device(row.mode, row.rdev):
            self.tally.made -= 1
            number = f"{os.major(row.rdev)}:{os.minor(row.rdev)}"
            reason = f"left out: a device node {number}; the policy can allow it: `devices`"
            self.tally.note_left_out(join(spot[1], spot[2]), reason)
            return None
        return (placer.NODE, spot, row.rdev, meta, is_group)

    # --- where a file's content comes from

    def _decide_file(
        self, batch: OpenBatch, place: int, row: Row, pinned: list[int]
    ) -> placer.Step | None:
        wish = batch.wish(place)
        known = self._chooser.find_object(row, pinned)
        is_proof_due = self._policy.prove and self._area is not None
        if known and is_proof_due and not self._chooser.is_ours(known):
            batch.proven.append((place, known))
            return None
        if known:
            return self._chooser.step(wish, ("object", known), pinned)
        if self._chooser.has_arrived(row):
            return self._chooser.step(wish, ("arrived", row.digest.hex()), pinned)
        step = self._chooser.find_in_base(wish, pinned)
        if step is not None:
            return step
        if not self._chooser.ask(row.digest):
            batch.later.append(place)
            return None
        self.tally.lacking += row.size
        self.tally.files_sent += 1
        if self.tally.lacking + _MARGIN > self._room:
            raise NoSpace(
                f"at least {self.tally.lacking} bytes are to arrive, {self._room} are free",
                hint="free some space, e.g. with: vpool reclaim",
            )
        batch.wanted.add(place)
        if row.size > blocks.LARGE and self._area is not None:
            self._chooser.offer_blocks(wish.spot)
        return None

    # --- contents

    def _row(self, number: int) -> tuple[OpenBatch, int]:
        """The batch and place of a row that was asked for and has not come. Raises Hostile."""
        for batch in self._open.values():
            place = number - batch.first
            if 0 <= place < len(batch.rows):
                if place in batch.wanted:
                    return batch, place
                break
        raise Hostile(f"row {number}, for which nobody asked")

    def _take_contents(self, message: Contents) -> None:
        for number, content in message.files:
            batch, place = self._row(number)
            batch.wanted.discard(place)
            row = batch.rows[place][1]
            self._again.note_sent(row)
            if len(content) == row.size and blake3(content).digest() == row.digest:
                self._note_arrival(batch, place, content)
            else:
                self._fail_row(batch, place, _OTHER_CONTENT)

    def _take_piece(self, message: Piece) -> None:
        batch, place = self._row(message.row)
        is_good = self._its_incoming.take(message, *batch.rows[place])
        if is_good is None:
            return
        batch.wanted.discard(place)
        self._again.note_sent(batch.rows[place][1])
        if is_good:
            self._note_arrival(batch, place, None)
        else:
            self._fail_row(batch, place, _OTHER_CONTENT)

    def _note_arrival(self, batch: OpenBatch, place: int, content: bytes | None) -> None:
        """Let the file be made; `content` is not kept anywhere yet, unless it came in pieces."""
        row = batch.rows[place][1]
        pinned: list[int] = []
        step = self._chooser.step(batch.wish(place), ("arrived", row.digest.hex()), pinned)
        if content is not None:
            step = self._its_incoming.keep(step, row, content)
        self._jobs.put([step], size=row.size)
        self._pin(batch, pinned)

    def _fail_row(self, batch: OpenBatch, place: int, reason: str) -> None:
        self._note_failed(batch, place, reason)
        self._chooser.forget(batch.rows[place][1].digest)

    def _note_failed(self, batch: OpenBatch, place: int, reason: str) -> None:
        path, row = batch.rows[place]
        self.tally.note_error(join(path, row.name), reason)
        self.tally.made -= 1

    def _take_gone(self, message: Gone) -> None:
        batch, place = self._row(message.row)
        path, row = batch.rows[place]
        batch.wanted.discard(place)
        self._its_incoming.drop(message.row)
        self._chooser.forget(row.digest)
        self.tally.take_back(row.size)
        self.tally.files_sent -= 1
        self.tally.lacking -= row.size
        is_first = place in batch.groups and not message.is_error
        self._again.note_gone(message.row, row, is_first=is_first)
        if message.is_error:
            self.tally.note_error(join(path, row.name), message.reason)

    def _take_proofs(self, message: Proofs) -> None:
        batch = self._open.get(message.batch)
        if batch is None or batch.are_proven or not 0 < len(message.proofs) == len(batch.proven):
            raise Hostile("proofs that nobody asked for")
        for (place, name), proof in zip(batch.proven, message.proofs, strict=True):
            if not self._chooser.is_proven(name, batch.nonce, proof):
                path, row = batch.rows[place]
                raise Hostile(f"the digest of {join(path, row.name)!r} without having its content")
        batch.are_proven = True
        batch.later += [place for place, _ in batch.proven]

    def _close_batch(self, number: int) -> None:
        batch = self._open.get(number)
        if batch is None or number != min(self._open):
            raise Hostile(f"the end of batch {number}, which is not the next one")
        is_dry = self._area is None
        if (batch.wanted and not is_dry) or (batch.proven and not batch.are_proven):
            raise Hostile("less than was asked for")
        del self._open[number]
        if not is_dry:
            pinned: list[int] = []
            for place in sorted(batch.later):
                step = self._decide_later(batch, place, pinned)
                self._jobs.put([step] if step is not None else [])
            self._pin(batch, pinned)
            self._pass_pins(batch)
        self._progress.note(self.tally.files, self.tally.size - self.tally.lacking)
        self._progress.advance(sum(row.size for _, row in batch.rows))

    def _decide_later(self, batch: OpenBatch, place: int, pinned: list[int]) -> placer.Step | None:
        path, row = batch.rows[place]
        spot = (batch.first + place, path, row.name)
        is_first = place in batch.groups
        if (row.link or place in batch.waiting) and self._again.takes(
            spot[0], row, is_first=is_first
        ):
            self.tally.take_back(row.size)
            return None
        if row.link:
            return (placer.NAME, spot, spot[0] - row.link, row.mode)
        known = self._chooser.find_object(row, pinned)
        if known:
            return self._chooser.step(batch.wish(place), ("object", known), pinned)
        if self._chooser.has_arrived(row):
            return self._chooser.step(batch.wish(place), ("arrived", row.digest.hex()), pinned)
        reason = "its content was to come with another file, which changed meanwhile"
        self._note_failed(batch, place, reason)  # another row may have asked for it again
        return None

    @property
    def _its_incoming(self) -> Incoming:
        if self._incoming is None:
            raise Hostile("contents while only a list was asked for")
        return self._incoming

    def _pin(self, batch: OpenBatch, numbers: list[int]) -> None:
        if self._pins is not None and numbers:
            batch.pins += self._pins.set(numbers)
