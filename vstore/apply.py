"""A worker's part of unifying: adopt objects, replace names by links. One bounded batch a call.

A name is replaced by a link made in our own stage folder and renamed over it: it points at full
content at every moment, and nothing of ours ever stands in a guest's folder. Before the object's
window opens a read lease on the old inode proves that nobody writes to it, and all that its digest
was keyed by is compared under the lease; inside the window there is only link and rename.
"""

import errno
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

from vstore import extents, inode, lease, reading
from vstore.errors import NoSpace, ToolError
from vstore.member import Member
from vstore.plan import KnownObject, Rules, Slot, plan_group, take_turns
from vstore.pool import Pool, find_file_system
from vstore.reading import LeftAlone
from vstore.recovery import is_put_right, is_sound
from vstore.scan import Tree, open_below
from vstore.standstill import Standstill
from vstore.window import Windows

# What became of a file; else one of reading.REASONS, or an error's text.
UNIFIED: Final = "unified"
ADOPTED: Final = "adopted"  # it is the object now
ALREADY: Final = "already"
UNIQUE: Final = "unique"
FULL: Final = "full"  # the object takes no more links: another one is needed
RETRY: Final = "retry"  # the object is not what the plan took it for: plan again

_CONTENT: Final = attrgetter("digest", "xattrs")
_PROC_FDS: Final = "/proc/self/fd"
_SPARE: Final = "spare"
_CHANGED: Final = (reading.CHANGED, 0, 0)
_LONGEST_READ: Final = 1 << 20  # bytes, while a guest stands still

JobFolder = tuple[int, bytes, int, int]
"""A folder of a batch: its tree, path, atime and mtime (ns) at the walk."""
Group = tuple[list[tuple[Any, ...]], list[KnownObject], list[tuple[int, int]]]
"""Files that may be equal (fields of Member), the objects that they may equal, and which trees use
which of these already: (tree, inode number)."""
Answer = tuple[int, str, int, int]
"""A row, its outcome, the object's inode number, and the bytes that the old inode alone had."""


@dataclass(slots=True)
class _Object:
    """A slot of a batch on its way: the object's descriptor, and the files to be linked to it."""

    slot: Slot
    fd: int
    ino: int
    adopted: Member | None  # the member that becomes the object; None: it exists
    name: str
    members: list[Member] = field(default_factory=list)  # open, leased and compared


class Linker:
    """Replaces names by links to objects."""

    def __init__(
        self,
        pool: Pool,
        trees: Sequence[Tree],
        cgroups: Sequence[str],
        windows: Windows,
        stage_fd: int,
        original: Mapping[int, str],
        rules: Rules,
    ) -> None:
        self._pool = pool
        self._trees = trees
        self._windows = windows
        self._standstill = Standstill(cgroups, windows)
        self._stage_fd = stage_fd
        self._original = original
        self._rules = rules
        self._proc_fd = os.open(_PROC_FDS, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._spares = 0
        self._can_clone = find_file_system(pool.path) in extents.CLONING
        self._begin(0)

    def _begin(self, synced_ns: int) -> None:
        self._synced_ns = synced_ns
        self._answers: dict[int, tuple[str, int, int]] = {}
        self._open: dict[int, int] = {}  # row -> descriptor, leased and compared
        self._folders: dict[int, int] = {}  # folder -> descriptor
        self._touched: set[int] = set()  # folders in which names were replaced
        self._is_running = False
        self._sound: set[int] = set()  # inode numbers of objects that were read and are good
        self._own: dict[int, int] = {}  # row -> bytes that its inode shares with no other

    # --- the two kinds of batch ---

    def link(
        self, synced_ns: int, folders: Mapping[int, JobFolder], slots: Sequence[Slot]
    ) -> list[Answer]:
        """Carry slots out whose contents are known. What was written before `synced_ns` is durable.

        Raises NoSpace.
        """
        self._begin(synced_ns)
        self._examine_objects(slots)  # may take long: before any guest stands still
        for piece in self._standstill.pieces(slots):
            wanted = {member.folder for slot in piece for member in slot.members}
            with ExitStack() as stack:
                self._enter({folder: folders[folder] for folder in wanted}, stack)
                self._link_slots(piece)
        return [
            (member.row, *self._answers.get(member.row, _CHANGED))
            for slot in slots
            for member in slot.members
        ]

    def read_and_link(
        self, synced_ns: int, folders: Mapping[int, JobFolder], groups: Sequence[Group]
    ) -> tuple[list[Answer], list[Member]]:
        """Read the files of each group, plan, and carry the plan out under one lease a file.

        For guests that do not run. Returns the answers, and the members that were read and are no
        links now. Raises NoSpace.
        """
        self._begin(synced_ns)
        found: list[Member] = []
        with ExitStack() as stack:
            self._enter(folders, stack)
            slots: list[Slot] = []
            for members, objects, used in groups:
                known = self._read_group([Member._make(member) for member in members])
                found += known
                slots += self._plan(known, objects, used)
            self._examine_objects(slots)
            self._link_slots(slots)
        rows = [member[3] for members, _, _ in groups for member in members]
        answers = [(row, *self._answers.get(row, _CHANGED)) for row in rows]
        left = [
            member
            for member in found
            if self._answers.get(member.row, _CHANGED)[0] not in (UNIFIED, ADOPTED)
        ]
        return answers, left

    # --- reading and planning a group ---

    def _read_group(self, members: list[Member]) -> list[Member]:
        """The members whose content is known now; those that were read stay open and leased."""
        began = time.time_ns()
        recognizer = reading.Recognizer()
        known = []
        for member in members:
            if member.digest is not None:
                known.append(member)
                continue
            try:
                fd = self._open_for_look(member)
                status = reading.lease_unchanged(fd, member.key)
                digest, xattrs = recognizer.read(fd, status, self._original, self._windows.idle)
            except LeftAlone as reason:
                self._answers[member.row] = (reason.outcome, 0, 0)
            except OSError as error:
                self._answers[member.row] = (f"cannot be read: {error.strerror}", 0, 0)
            else:
                fresh = reading.is_fresh(member.ctime, began)
                known.append(Member(*member[:16], digest, xattrs, int(fresh)))
        return known

    def _plan(
        self, known: list[Member], objects: list[KnownObject], used: list[tuple[int, int]]
    ) -> list[Slot]:
        slots = []
        taken = frozenset(used)
        known.sort(key=_CONTENT)
        for content, equal in groupby(known, key=_CONTENT):
            members = list(equal)
            same = [item for item in objects if item[:2] == content]
            for slot in plan_group(take_turns(members), same, taken, self._rules):
                if slot.is_worth_it(self._rules):
                    slots.append(slot)
                else:
                    self._answer(slot.members, UNIQUE)
        return slots

    # --- what a batch holds open ---

    def _enter(self, folders: Mapping[int, JobFolder], stack: ExitStack) -> None:
        """Freeze the guests that run and open the folders, but for guests that do not stand still.

        When the stack unwinds, leases are given up, folders have their times back and guests run;
        then descriptors are closed, as the last one of a replaced file takes its bytes along.
        """
        trees = {tree for tree, *_ in folders.values()}
        self._is_running = any(map(self._standstill.is_running, trees))
        self._windows.make_room()
        stack.callback(self._close_members)
        self._standstill.hold(trees, stack)
        for folder, (tree, path, *times) in folders.items():
            if tree in self._standstill.moving:
                continue
            with suppress(OSError):
                fd = open_below(self._trees[tree].fd, path)
                if self._standstill.is_running(tree):  # two workers may be in one folder, but not
                    now = os.fstat(fd)  # in one guest
                    times = [now.st_atime_ns, now.st_mtime_ns]
                stack.callback(self._leave_folder, folder, fd, *times)
                self._folders[folder] = fd
        if self._is_running:
            stack.callback(self._release_members)

    def _leave_folder(self, folder: int, fd: int, atime: int, mtime: int) -> None:
        if folder in self._touched:
            with suppress(OSError):
                os.utime(fd, ns=(atime, mtime))
        del self._folders[folder]
        os.close(fd)

    def _release_members(self) -> None:
        """No guest that runs again waits for us at a file that was left as it is."""
        for fd in self._open.values():
            with suppress(OSError):
                lease.release(fd)

    def _close_members(self) -> None:
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()

    def _open_for_look(self, member: Member) -> int:
        """The member's file; it stays open until the batch ends. Raises LeftAlone."""
        if member.tree in self._standstill.moving:
            raise LeftAlone(reading.NOT_FROZEN)
        fd = reading.open_for_look(self._folders.get(member.folder, -1), member.name)
        self._open[member.row] = fd
        return fd

    def _ready_member(self, member: Member, item: _Object) -> int:
        """The member's file, leased and as it was when its content became known.

        Raises LeftAlone; OSError.
        """
        fd = self._open.get(member.row)
        if fd is not None:
            return fd  # read under the lease that we still hold
        fd = self._open_for_look(member)
        if item.adopted is None and os.fstat(fd).st_ino == item.ino:
            raise LeftAlone(ALREADY)
        status = reading.lease_unchanged(fd, member.key)
        if member.fresh:
            if self._is_running and member.size > _LONGEST_READ:
                raise LeftAlone(reading.RECENT)
            known = (member.digest, member.xattrs)
            if reading.read_content(fd, status, self._original) != known:
                raise LeftAlone(reading.CHANGED)
        return fd

    # --- carrying slots out ---

    def _examine_objects(self, slots: Sequence[Slot]) -> None:
        """Read the frozen objects that slots shall be linked to; note those that are sound.

        No object that is frozen changes afterwards.
        """
        for slot in slots:
            if not slot.ino:
                continue
            self._windows.idle()
            if slot.identity.size > _LONGEST_READ:
                self._windows.let_all_go()
            with suppress(OSError):
                fd = self._pool.open_object(slot.object_name)
                try:
                    if inode.is_immutable(fd) and is_sound(slot.object_name, fd):
                        self._sound.add(os.fstat(fd).st_ino)
                finally:
                    os.close(fd)

    def _link_slots(self, slots: Sequence[Slot]) -> None:
        objects: list[_Object] = []
        numbers: set[int] = set()
        for slot in slots:
            item = self._open_slot(slot)
            if item is not None and item.ino in numbers:  # a lease and a lock are taken once
                self._answer(slot.members, RETRY)
                os.close(item.fd)
            elif item is not None:
                numbers.add(item.ino)
                objects.append(item)
        for item in objects:
            self._ready_members(item)
        try:
            with self._windows.guard([item.fd for item in objects]) as refused:
                for item in objects:
                    if item.fd in refused:
                        self._answer(item.slot.members, reading.BUSY)
                    else:
                        self._link_object(item)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace(
                    f"{self._pool.path}: no room for the notes that make linking safe: "
                    f"{error.strerror}",
                    hint="free some space; names that are links already stay so",
                ) from error
            for item in objects:
                self._answer(item.slot.members, _explain(error))

    def _open_slot(self, slot: Slot) -> _Object | None:
        name = slot.object_name
        try:
            fd = self._pool.open_object(name)
        except FileNotFoundError:
            if slot.ino:
                self._answer(slot.members, RETRY)
                return None
            return self._open_source(slot, name)
        except OSError as error:
            self._answer(slot.members, f"object {name}: {error.strerror}")
            return None
        return _Object(slot, fd, os.fstat(fd).st_ino, None, name)

    def _open_source(self, slot: Slot, name: str) -> _Object | None:
        for member in slot.sources():
            item = _Object(slot, -1, member.ino, member, name)
            try:
                fd = self._ready_member(member, item)
                self._check_source(fd, member)
            except LeftAlone as reason:
                self._answers[member.row] = (reason.outcome, 0, 0)
            except OSError as error:
                self._answers[member.row] = (_explain(error), 0, 0)
            else:
                item.fd = self._open.pop(member.row)  # with its lease
                return item
        self._answer(slot.members, RETRY)
        return None

    def _check_source(self, fd: int, member: Member) -> None:
        """All names of the inode are known, it has no quota, and its bytes are on disk."""
        links = os.fstat(fd).st_nlink - (member.ino in self._original)
        if links != member.nlink:
            raise LeftAlone(reading.CHANGED)
        if inode.project_id(fd):
            raise LeftAlone(reading.PROJECT)
        if member.ctime >= self._synced_ns:
            if self._is_running:
                raise LeftAlone(reading.RECENT)
            os.fdatasync(fd)

    def _ready_members(self, item: _Object) -> None:
        for member in item.slot.members:
            if member.row in self._answers or member.ino == item.ino:
                continue
            try:
                self._ready_member(member, item)
            except LeftAlone as reason:
                self._answers[member.row] = (reason.outcome, item.ino, 0)
            except OSError as error:
                self._answers[member.row] = (_explain(error), 0, 0)
            else:
                self._own[member.row] = self._count_own(member)
                item.members.append(member)

    def _link_object(self, item: _Object) -> None:
        try:
            if item.adopted is not None:
                self._adopt(item)
            elif self._is_good(item):
                with self._windows.thawed(item.fd):
                    self._link_members(item)
        except OSError as error:
            self._answer(item.slot.members, _explain(error))
        except ToolError as error:  # an attack that could not be fended off: this object's trouble
            self._answer(item.slot.members, error.message)

    def _is_good(self, item: _Object) -> bool:
        """Whether the object is what its name says; a good one that was left thawed is frozen."""
        if not item.members:
            return False
        if item.ino in self._sound or is_sound(item.name, item.fd):
            if not inode.is_immutable(item.fd):
                self._windows.freeze(item.fd)
            return True
        reason = "its content or metadata are not what its name says"
        if not inode.is_immutable(item.fd):  # the host's root has lifted the flag to change it
            self._pool.quarantine(item.name, reason)
        elif is_put_right(self._windows, item.name, item.fd):
            return True
        else:
            with self._windows.thawed(item.fd):
                self._pool.quarantine(item.name, reason)
        self._answer(item.slot.members, RETRY)
        return False

    def _adopt(self, item: _Object) -> None:
        if item.ino in self._original:  # frozen by the original's tools
            with self._windows.thawed(item.fd):
                if self._enter_pool(item):
                    self._leave_original_pool(item.ino)
                    self._link_adopted(item)
        elif self._enter_pool(item):
            try:
                self._link_adopted(item)
            finally:
                self._windows.freeze(item.fd)

    def _enter_pool(self, item: _Object) -> bool:
        """Give the inode that we hold its name in the pool; False where that name is taken."""
        try:
            os.link(
                str(item.fd),
                item.name,
                src_dir_fd=self._proc_fd,
                dst_dir_fd=self._pool.objects_fd,
            )
        except FileExistsError:
            self._answer(item.slot.members, RETRY)
            return False
        return True

    def _link_adopted(self, item: _Object) -> None:
        for member in item.slot.members:
            if member.ino == item.ino:
                self._answers[member.row] = (ADOPTED, item.ino, 0)
        self._link_members(item)

    def _leave_original_pool(self, ino: int) -> None:
        former = self._original.get(ino)
        if former is not None and os.lstat(former).st_ino == ino:
            Path(former).unlink()

    def _link_members(self, item: _Object) -> None:
        for position, member in enumerate(item.members):
            try:
                self._touched.add(member.folder)
                self._replace(self._folders[member.folder], member.name, item.name)
            except OSError as error:
                if error.errno == errno.EMLINK:
                    self._answer(item.members[position:], FULL)
                    return
                self._answers[member.row] = (_explain(error), 0, 0)
            else:
                self._answers[member.row] = (UNIFIED, item.ino, self._own[member.row])

    def _count_own(self, member: Member) -> int:
        """The bytes that the member's inode shares with no other, where inodes can share blocks."""
        if not self._can_clone:
            return member.blocks * 512
        with suppress(OSError):
            return extents.own_bytes(self._open[member.row], member.blocks * 512)
        return 0

    def _replace(self, folder_fd: int, name: bytes, object_name: str) -> None:
        stage_fd = self._stage_fd
        spare = f"{_SPARE}{self._spares}"
        os.link(object_name, spare, src_dir_fd=self._pool.objects_fd, dst_dir_fd=stage_fd)
        try:
            os.rename(spare, name, src_dir_fd=stage_fd, dst_dir_fd=folder_fd)
        except OSError:
            self._spares += 1  # another name, should this one stay
            os.unlink(spare, dir_fd=stage_fd)
            raise

    def _answer(self, members: Sequence[Member], outcome: str) -> None:
        for member in members:
            self._answers.setdefault(member.row, (outcome, 0, 0))


def _explain(error: OSError) -> str:
    if error.errno == errno.EXDEV:
        return reading.PROJECT  # a folder whose project the object does not belong to
    if error.errno == errno.EPERM:
        return reading.IMMUTABLE
    return f"cannot be replaced: {error.strerror}"
