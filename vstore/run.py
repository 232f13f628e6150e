"""One run of unifying, from the side of the process that keeps the plan and counts.

Workers do the walking, reading and linking; this process guards their leases meanwhile.
"""

import os
import socket
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain, groupby
from operator import attrgetter
from typing import Any, Final

from vstore import apply, extents, index, reading, scan, syscalls
from vstore.catalog import Catalog, ToRead
from vstore.hand import Hand
from vstore.hold import find_linger_s
from vstore.member import Member
from vstore.order import Options, Target, UnifyResult
from vstore.original import find_original_pools, load_members
from vstore.pace import TimeBudget, batches
from vstore.plan import (
    NAMES_A_BATCH,
    OBJECTS_A_BATCH,
    KnownObject,
    Slot,
    batch_slots,
    plan_group,
)
from vstore.pool import InodeNumbers, Pool, find_file_system
from vstore.progress import Progress
from vstore.recovery import settle_stage
from vstore.tally import Tally, join
from vstore.window import Windows
from vstore.workers import Crew, Worker, core_count, file_limit

NOT_IN_REFSERVER: Final = "not-in-refserver"

_ROUNDS: Final = 4
_NAMES_A_FROZEN_BATCH: Final = 200
_LARGEST_GROUP: Final = 1500  # names; what is larger is read first and linked later
_FILES_A_NAME: Final = 4  # descriptors: itself, its folder, its object twice
_FILES_A_READ: Final = 300
_BYTES_A_READ: Final = 32 << 20
_FOLDERS_A_WALK: Final = 500
_LINKERS: Final = {"btrfs": 1}  # measured: a second one makes btrfs slower, ext4 and xfs faster
_SYNC_MARGIN_NS: Final = 10**9  # a file's clock may lag behind ours by some ticks


class Run:
    """The state of a run."""

    def __init__(
        self,
        targets: Sequence[Target],
        pool: Pool | None,
        options: Options,
        progress: Progress,
        result: UnifyResult,
        stack: ExitStack,
    ) -> None:
        self._targets = targets
        self._pool = pool
        self._options = options
        self._rules = options.rules
        self._progress = progress
        self._result = result
        self._stack = stack
        self._budget = TimeBudget(options.time_budget_s)
        self._objects = pool.load_numbers() if pool else InodeNumbers(array("Q"))
        references = {number for target in targets for number in target.references}
        self._trees = [
            scan.Tree(
                target.held.fd,
                target.held.device,
                target.excludes,
                options.min_size,
                skip_ino=os.fstat(pool.fd).st_ino if pool else 0,
                names_shared=number in references,
            )
            for number, target in enumerate(targets)
        ]
        self._original, self._foreign = self._find_original()
        self._file_system = find_file_system(targets[0].held.guest.root) if targets else ""
        self._catalog = Catalog(pool, ignore_mtime=options.rules.ignore_mtime)
        stack.callback(self._catalog.close)
        self._tally = Tally(targets, self._catalog, result)

    def carry_out(self) -> None:
        """Do it all; what was done and found is in the result."""
        workers = self._options.jobs or core_count()
        stages = self._open_stages(workers)
        bury = self._bury(stages)
        crew = self._stack.enter_context(Crew(workers, self._start(stages), bury=bury))
        with self._catalog.filling():
            self._walk(crew)
        for reason, count in self._catalog.drop_linked().items():
            self._result.skip(reason, count)
        if self._options.dry_run or self._pool is None:
            self._choose(0)
            self._read(crew)
            self._pretend()
        else:
            self._unify(crew, self._pool, workers)
        self._result.bytes_reclaimed = self._tally.reclaimed.bytes
        if self._budget.is_spent:
            self._result.count_late()

    def _unify(self, crew: Crew, pool: Pool, workers: int) -> None:
        linkers = min(workers, _LINKERS.get(self._file_system, workers))
        at_once = 0 if self._must_read_first() else _find_largest_group()
        synced_ns = time.time_ns() - _SYNC_MARGIN_NS
        syscalls.syncfs(pool.fd)  # what will be shared is durable before a name depends on it
        for number in range(_ROUNDS):
            self._choose(at_once)
            is_last = number == _ROUNDS - 1
            again = self._read_and_link(crew, linkers, synced_ns, at_once) if at_once else []
            self._read(crew)
            again += self._link(crew, linkers, synced_ns)
            self._tally.store_leftover()
            if not again:
                return
            if is_last:
                self._result.skip(reading.BUSY, len(again))
                return
            self._catalog.keep_only(again)
            at_once = 0

    def _must_read_first(self) -> bool:
        """A guest that runs stands still for linking only; references need to know all contents."""
        return any(target.held.is_running or target.references for target in self._targets)

    # --- workers ---

    def _open_stages(self, count: int) -> list[int]:
        if self._pool is None or self._options.dry_run:
            return []
        return self._stack.enter_context(self._pool.stage(count))

    def _start(self, stages: list[int]) -> Callable[[int, socket.socket], Hand]:
        cgroups = [target.held.cgroup for target in self._targets]

        def start(number: int, keeper: socket.socket) -> Hand:
            hand = Hand(self._trees, self._objects, self._original)
            if stages and self._pool is not None:
                pool, stage = self._pool, stages[number]
                windows = Windows(keeper, pool_fd=pool.fd, stage_fd=stage, linger_s=find_linger_s)
                hand.equip(pool, windows, stage, cgroups, self._rules)
            return hand

        return start

    def _bury(self, stages: list[int]) -> Callable[[Worker], None]:
        def bury(worker: Worker) -> None:
            if self._pool is not None and stages:
                pool, stage = self._pool, stages[worker.number]
                worker.keeper.take_over(lambda leased: settle_stage(pool, stage, leased))

        return bury

    # --- walking and choosing ---

    def _find_original(self) -> tuple[dict[int, str], dict[int, int]]:
        if not self._targets:
            return {}, {}
        pools = find_original_pools([target.held.guest for target in self._targets])
        return load_members(pools, self._targets[0].held.device)

    def _walk(self, crew: Crew) -> None:
        self._progress.phase("walk")
        volumes = [index.volume_of(target.held.fd) for target in self._targets]
        todo: deque[tuple[int, list[bytes]]] = deque(
            (number, [b""]) for number in range(len(self._targets))
        )
        for tree, part in crew.map(_drain(todo)):
            folders, shared, files, skipped, errors, pending, named = part
            for found in folders:
                self._catalog.add_folder(tree, volumes[tree], found)
            self._catalog.add_shared_names(tree, named)
            self._tally.used[tree].frombytes(shared)
            count = files + len(shared) // 8
            self._result.files_seen += count
            self._result.files_already += len(shared) // 8
            for reason, times in skipped.items():
                self._result.skip(reason, times)
            for path, why in errors:
                self._tally.note_error(tree, path, why)
            todo.extend((tree, some) for some in _deal(pending))
            self._progress.advance(count)
        self._catalog.add_foreign_names(self._foreign.items())

    def _choose(self, at_once: int) -> None:
        """Find the files that can have an equal; larger groups than `at_once` are read first."""
        if self._pool is not None:
            self._catalog.load_objects(self._pool, self._tally.full)
        self._catalog.choose(twins=self._rules.link_twins, everything=self._rules.everything)
        self._result.skip(apply.UNIQUE, self._catalog.count_unchosen())
        self._catalog.choose_contents(at_once)

    # --- reading and linking at once ---

    def _read_and_link(self, crew: Crew, linkers: int, synced_ns: int, at_once: int) -> list[int]:
        """Work on the groups of at most `at_once` names; returns the rows to plan again."""
        self._progress.phase("unify", self._catalog.count_chosen())
        used = self._tally.load_used()
        groups = self._budget.spend_on(self._catalog.list_groups(at_once))
        jobs = (self._group_job(batch, synced_ns, used) for batch in _batch_groups(groups))
        again: list[int] = []
        for members, (answers, left, attacks) in crew.map(jobs, limit=linkers):
            self._result.attacks += attacks
            again += self._tally.take_answers(map(Member._make, members), answers)
            self._tally.keep_leftover(map(Member._make, left))
            self._progress.advance(len(answers))
        return again

    def _group_job(
        self,
        batch: list[tuple[list[tuple[Any, ...]], list[KnownObject]]],
        synced_ns: int,
        used: Sequence[InodeNumbers],
    ) -> tuple[tuple[str, Any], list[tuple[Any, ...]]]:
        groups = []
        for members, objects in batch:
            trees = {member[2] for member in members} if objects else ()
            pairs = [(tree, item[4]) for item in objects for tree in trees if item[4] in used[tree]]
            groups.append((members, objects, pairs))
        everyone = [member for members, _ in batch for member in members]
        folders = self._load_folders({(member[4], member[2]) for member in everyone})
        return ("unify", (synced_ns, folders, groups)), everyone

    def _load_folders(self, folders: set[tuple[int, int]]) -> dict[int, apply.JobFolder]:
        return {folder: (tree, *self._catalog.load_folder(folder)) for folder, tree in folders}

    # --- reading first, linking later ---

    def _read(self, crew: Crew) -> None:
        if not self._catalog.has_contents():
            return
        self._progress.phase("read", self._catalog.count_unread(), "bytes")
        unread = batches(
            self._budget.spend_on(self._catalog.list_unread()),
            count=_FILES_A_READ,
            size=_BYTES_A_READ,
            weigh=lambda file: (1, file.size),
        )
        jobs = (
            (("read", [(file.tree, file.path, file.name, file[4:8]) for file in batch]), batch)
            for batch in unread
        )
        for files, answers in crew.map(jobs):
            self._take_contents(files, answers)
            self._progress.advance(sum(file.size for file in files))
        if any(target.references for target in self._targets):
            self._catalog.index_paths()
            for tree, target in enumerate(self._targets):
                if target.references:
                    count = self._catalog.drop_outside_references(tree, target.references)
                    self._result.skip(NOT_IN_REFSERVER, count)

    def _take_contents(self, files: list[ToRead], answers: list[tuple[Any, ...]]) -> None:
        known: list[tuple[ToRead, bytes, bytes, bool]] = []
        for file, (outcome, digest, xattrs, fresh) in zip(files, answers, strict=True):
            if outcome == reading.READ:
                known.append((file, digest, xattrs, fresh))
                continue
            names = self._catalog.drop_inode(file)
            if outcome in reading.REASONS:
                self._result.skip(outcome, names)
            else:
                self._tally.note_error(file.tree, join(file.path, file.name), outcome)
                self._result.skip("error", names - 1)
        self._catalog.add_contents(known)
        if not self._options.dry_run:
            self._tally.keep_read(known)

    def _plan(self) -> Iterator[Slot]:
        used = _UsedPairs(self._tally.load_used())
        for _, members in groupby(self._catalog.list_members(), key=attrgetter("group")):
            first = next(members)
            objects = self._catalog.find_objects(first)
            for slot in plan_group(chain((first,), members), objects, used, self._rules):
                if slot.is_worth_it(self._rules):
                    yield slot
                else:
                    self._result.skip(apply.UNIQUE, len(slot.members))

    def _pretend(self) -> None:
        for slot in self._plan():
            sources = slot.sources()
            if not slot.ino and not sources:
                self._result.skip(reading.CHANGED, len(slot.members))
                continue
            self._result.objects_new += not slot.ino
            self._result.files_unified += len(slot.members)
            for member in slot.members:
                if slot.ino or member.ino != sources[0].ino:
                    self._tally.reclaimed.replace(member, self._count_own(member))

    def _count_own(self, member: Member) -> int:
        """The bytes that the member's inode shares with no other, from the file as it is now."""
        tree = self._trees[member.tree]
        if self._file_system not in extents.CLONING:
            return member.blocks * 512
        try:
            folder_fd = scan.open_below(tree.fd, self._catalog.load_folder(member.folder)[0])
            try:
                fd = reading.open_for_look(folder_fd, member.name)
            finally:
                os.close(folder_fd)
            try:
                return extents.own_bytes(fd, member.blocks * 512)
            finally:
                os.close(fd)
        except (OSError, reading.LeftAlone):
            return 0

    def _link(self, crew: Crew, linkers: int, synced_ns: int) -> list[int]:
        """Link the files whose contents were read before; returns the rows to plan again."""
        if not self._catalog.has_contents():
            return []
        self._progress.phase("link")
        frozen = any(target.held.is_running for target in self._targets)
        names = _NAMES_A_FROZEN_BATCH if frozen else NAMES_A_BATCH
        batches = self._budget.spend_on(batch_slots(self._plan(), names=names))
        again: list[int] = []
        jobs = (self._link_job(slots, synced_ns) for slots in batches)
        for slots, (answers, attacks) in crew.map(jobs, limit=linkers):
            self._result.attacks += attacks
            members = [member for slot in slots for member in slot.members]
            again += self._tally.take_answers(members, answers)
            full_rows = {row for row, outcome, *_ in answers if outcome == apply.FULL}
            for slot in slots:
                if full_rows & {member.row for member in slot.members}:
                    self._tally.full.add(slot.object_name)
            self._progress.advance(len(answers))
        return again

    def _link_job(self, slots: list[Slot], synced_ns: int) -> tuple[tuple[str, Any], list[Slot]]:
        folders = {(member.folder, member.tree) for slot in slots for member in slot.members}
        plain = [
            (
                tuple(slot.identity),
                slot.number,
                slot.ino,
                [tuple(item) for item in slot.members],
            )
            for slot in slots
        ]
        return ("link", (synced_ns, self._load_folders(folders), plain)), slots


class _UsedPairs:
    """Which tree uses which object, asked as (tree, inode number)."""

    def __init__(self, used: Sequence[InodeNumbers]) -> None:
        self._used = used

    def __contains__(self, pair: object) -> bool:
        return isinstance(pair, tuple) and pair[1] in self._used[pair[0]]


def _find_largest_group() -> int:
    """How many names may be read and linked at once, so that there are descriptors for all."""
    return min(_LARGEST_GROUP, file_limit() // 2 // _FILES_A_NAME)


def _drain(todo: deque[tuple[int, list[bytes]]]) -> Iterator[tuple[tuple[str, Any], int] | None]:
    """Walk jobs from a queue that grows while it is emptied; None when it is empty for now."""
    while True:
        if todo:
            tree, starts = todo.popleft()
            yield ("walk", (tree, starts)), tree
        else:
            yield None


def _deal(pending: list[bytes]) -> Iterator[list[bytes]]:
    """Folders that a walk has left over, for two workers and in bounded messages."""
    for part in (pending[::2], pending[1::2]):
        for start in range(0, len(part), _FOLDERS_A_WALK):
            yield part[start : start + _FOLDERS_A_WALK]


def _batch_groups(
    groups: Iterable[tuple[list[tuple[Any, ...]], list[KnownObject]]],
) -> Iterator[list[tuple[list[tuple[Any, ...]], list[KnownObject]]]]:
    batch: list[tuple[list[tuple[Any, ...]], list[KnownObject]]] = []
    names = size = 0
    for members, objects in groups:
        if batch and (names + len(members) > NAMES_A_BATCH or len(batch) >= OBJECTS_A_BATCH):
            yield batch
            batch, names, size = [], 0, 0
        batch.append((members, objects))
        names += len(members)
        size += sum(member[7] for member in members)
        if size >= _BYTES_A_READ:
            yield batch
            batch, names, size = [], 0, 0
    if batch:
        yield batch
