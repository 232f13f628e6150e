"""One pass from the side that gets the copy: what is looked at before, and the last steps.

An existing target is untouched until its tree and the new one change places in one rename. What
goes wrong before that leaves it as it was, and keeps what has arrived for the next try.
"""

import logging
import os
import stat
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vstore import exclude, inode, syscalls
from vstore.copy.area import Area, open_area
from vstore.copy.batches import Tally
from vstore.copy.identity import check_free, choose_context, identity_of, wanted_identity
from vstore.copy.listing import Listing
from vstore.copy.messages import (
    Dialogue,
    End,
    Identity,
    Request,
    Result,
    Same,
    Setting,
    Source,
    Sum,
    Target,
    as_text,
)
from vstore.copy.policy import Policy, load_policy
from vstore.copy.receiver import Receiver
from vstore.copy.settings import Drafted, check_settings, collect_settings, draft_settings
from vstore.errors import GuestNotFound, NoSpace, PoolBusy, ToolError, WrongUsage
from vstore.folders import Missed, walk_folders
from vstore.guest import (
    Guest,
    confdir,
    hold_lock,
    load_guest,
    load_state,
    parse_name,
    vdirbase,
)
from vstore.hold import default_pool
from vstore.pool import Pool, find_mount_id
from vstore.progress import Progress
from vstore.remove import remove

log = logging.getLogger(__name__)

_MARGIN: Final = 64 << 20  # bytes beside what may arrive
_INODES: Final = 1000
_NAMED: Final = 5
_WARNINGS: Final = 200
_COMPATIBLE: Final = {"x86_64": {"x86_64", "i686", "i586", "i386"}}
"""Whose programs run where."""


@dataclass(slots=True)
class _Place:
    """Where the copy will stand, and what stands there now."""

    name: str
    parent: Path
    leaf: str
    guest: Guest | None  # configured already
    base_fd: int  # of the tree that is there; -1 for none

    @property
    def path(self) -> Path:
        return self.parent / self.leaf


def receive_guest(
    dialogue: Dialogue, request: Request, progress: Progress
) -> tuple[Source, Result]:
    """Receive the guest that the request names; the sender is told the result too.

    Raises PoolBusy, WrongUsage, NoSpace, NotPermitted, Hostile, ConnectionLost, what the sender
    raised.
    """
    name = parse_name(request.target)
    with ExitStack() as stack:
        if not stack.enter_context(hold_lock(name)):
            _refuse_busy(name)
        source = dialogue.expect(Source)
        work = _Pass(dialogue, request, progress, source, load_policy())
        work.place = _find_place(name, request, stack)
        result = work.run(stack)
        dialogue.send(result)
        return source, result


def _refuse_busy(name: str) -> None:
    if load_state(name) is not None:
        raise PoolBusy(
            f"guest {name} runs here, so that its tree cannot be replaced",
            hint=f"stop it first with: vserver {name} stop",
        )
    raise PoolBusy(
        f"guest {name}: another program copies to it, starts, stops or works on it here",
        hint="run the command again when that is done",
    )


def _find_place(name: str, request: Request, stack: ExitStack) -> _Place:
    if load_state(name) is not None:
        _refuse_busy(name)
    guest: Guest | None = None
    with suppress(GuestNotFound):
        guest = load_guest(name)
    path = guest.root if guest is not None else vdirbase() / name
    place = _Place(name, path.parent, path.name, guest, -1)
    for taken in (confdir() / name, confdir() / f"{name}.conf"):
        if guest is None and os.path.lexists(taken):
            raise WrongUsage(
                f"{taken}: is there already, but is no guest that could be brought up to date",
                hint="choose another name, or remove it",
            )
    if guest is not None and not request.refresh:
        raise WrongUsage(
            f"there is a guest {name} already, with the tree {path}",
            hint="choose another name; --refresh brings the guest that is there up to date",
        )
    if os.path.lexists(path):
        _open_base(place, request, stack)
    return place


def _open_base(place: _Place, request: Request, stack: ExitStack) -> None:
    try:
        fd = os.open(place.path, inode.OPEN_FOLDER)
    except OSError as error:
        raise WrongUsage(f"{place.path}: is there already, and no folder") from error
    stack.callback(os.close, fd)
    if not request.refresh and os.listdir(fd):  # noqa: PTH208 - by descriptor
        raise WrongUsage(
            f"{place.path}: is there already, and not empty",
            hint="choose another name; --refresh brings the tree that is there up to date",
        )
    place.base_fd = fd


class _Pass:
    """One pass."""

    def __init__(
        self,
        dialogue: Dialogue,
        request: Request,
        progress: Progress,
        source: Source,
        policy: Policy,
    ) -> None:
        self._dialogue = dialogue
        self._request = request
        self._progress = progress
        self._source = source
        self._policy = policy
        self._warnings: list[str] = []
        self._wanted = Identity()
        self._devices: list[str] = []
        self._settings: list[Setting] = []
        self._inodes = 0
        self._tally = Tally()
        self.place: _Place

    def run(self, stack: ExitStack) -> Result:
        self._choose_identity()
        pool = self._open_pool(stack)
        room = self._check_room()
        base = self._list_base(pool, stack)
        is_tight = room < self._source.bytes + _MARGIN or self._inodes < self._source.rows + _INODES
        is_tight &= not self._request.dry_run
        self._dialogue.send(Target(self._wanted, as_text(os.fspath(self.place.path)), is_tight))
        if is_tight:
            result = self._find_out(pool, base, room)
            if result.same:
                return result
            self._dialogue.send(result)
            base = self._list_base(pool, stack)
        if self._request.dry_run or pool is None:
            return self._find_out(pool, base, 1 << 62)
        if self._is_same(base):
            return self._same()
        return self._receive(pool, base)

    # --- before a byte is sent

    def _choose_identity(self) -> None:
        source, request, place = self._source, self._request, self.place
        machine = os.uname().machine
        if source.machine not in _COMPATIBLE.get(machine, {machine}):
            raise WrongUsage(
                f"guest {source.name} has the programs of a {source.machine}, this is a {machine}"
            )
        if place.guest is not None:
            self._wanted = identity_of(collect_settings(place.guest))
            if request.hostname or request.addresses or request.context:
                self._warnings.append(
                    f"guest {place.name} has a configuration here already, which stays as it is"
                )
            return
        self._settings, left = check_settings(source.settings, self._policy)
        self._warnings += [f"configuration: left out: {line}" for line in left]
        was = identity_of(self._settings)
        self._wanted, self._devices = wanted_identity(
            was,
            hostname=request.hostname,
            addresses=request.addresses,
            context=max(0, request.context),
        )
        if request.context < 0:
            self._wanted.context = 0
        check_free(place.name, self._wanted, is_new=True)

    def _open_pool(self, stack: ExitStack) -> Pool | None:
        path = default_pool()
        if self._request.dry_run and not os.path.lexists(path / "format"):
            return None
        pool = stack.enter_context(Pool.load(path) if self._request.dry_run else Pool.create(path))
        fd = os.open(self.place.parent, inode.OPEN_FOLDER)
        try:
            if find_mount_id(fd) != find_mount_id(pool.fd) or os.fstat(fd).st_dev != pool.device:
                raise WrongUsage(
                    f"{self.place.parent}: is not on the file system of the pool {path}",
                    hint="guests and pool share files on one file system only",
                )
        finally:
            os.close(fd)
        return pool

    def _check_room(self) -> int:
        """Free bytes. Raises NoSpace where not even the inodes suffice."""
        room = os.statvfs(self.place.parent)
        self._inodes = room.f_favail if room.f_files else 1 << 62
        if room.f_files and room.f_favail < _INODES:
            raise NoSpace(
                f"{self.place.parent}: only {room.f_favail} inodes are free",
                hint="free some, e.g. with: vpool reclaim",
            )
        return room.f_bavail * room.f_frsize

    # --- what is there already

    def _list_base(self, pool: Pool | None, stack: ExitStack) -> Listing | None:
        if self.place.base_fd < 0 or not self._request.refresh:
            return None
        trusted = None if self._request.verify else pool
        base = Listing(
            self.place.base_fd,
            trusted,
            exclude.parse(b"", source=""),
            rewritten={},
            is_still=True,
            keeps_blocks=True,
        )
        stack.callback(base.close)
        return base

    def _is_same(self, base: Listing | None) -> bool:
        """Whether the tree is just what the sender has. Asked by the sender of a refresh."""
        if not self._request.refresh:
            return False
        ours = (b"", 0)
        if base is not None:
            for _ in base.batches():
                pass
            ours = (base.digest.digest(), base.found.rows)
        theirs = self._dialogue.expect(Sum)
        is_same = ours == (theirs.digest, theirs.rows) and self.place.guest is not None
        self._progress.phase("copy", theirs.bytes, "bytes")
        self._dialogue.send(Same(is_same))
        if is_same and base is not None:
            self._tally = Tally(files=base.found.files, size=base.found.size)
        return is_same

    def _same(self) -> Result:
        return Result(
            files=self._tally.files,
            bytes_total=self._tally.size,
            bytes_already_there=self._tally.size,
            same=True,
            path=as_text(os.fspath(self.place.path)),
            context=self._wanted.context,
        )

    def _find_out(self, pool: Pool | None, base: Listing | None, room: int) -> Result:
        """What would be asked for, were it no dry run."""
        if self._is_same(base):
            return self._same()
        receiver = Receiver(
            self._dialogue,
            pool,
            None,
            self._policy,
            self._progress,
            base_fd=self.place.base_fd,
            base=base,
            room=room,
        )
        try:
            end = receiver.receive()
        finally:
            receiver.close()
        if not self._request.dry_run and receiver.tally.inodes + _INODES > self._inodes:
            raise NoSpace(
                f"{self.place.parent}: {receiver.tally.inodes} inodes are needed, {self._inodes} "
                "are free",
                hint="free some, e.g. with: vpool reclaim",
            )
        return self._result(receiver.tally, end)

    # --- the copy

    def _receive(self, pool: Pool, base: Listing | None) -> Result:
        """There is room for it: by what the sender measured, or by what was found out."""
        if not self._request.refresh:
            self._progress.phase("copy", self._source.bytes, "bytes")
        with open_area(self.place.parent, self.place.leaf) as area:
            receiver = Receiver(
                self._dialogue,
                pool,
                area,
                self._policy,
                self._progress,
                base_fd=self.place.base_fd,
                base=base,
            )
            try:
                end = receiver.receive()
                self._check(receiver.tally, end, area)
                self._put_in_place(area)
            except BaseException:
                _drop_if_empty(area)
                raise
            finally:
                receiver.close()
            _clean_up(area, pool)
            return self._result(receiver.tally, end)

    def _check(self, tally: Tally, end: End, area: Area) -> None:
        """Hold what was made against what was to be made. Raises ToolError."""
        found = sum(
            1 + _count_others(folder.entries) for folder in walk_folders(area.tree_fd, Missed())
        )
        if found != tally.made:
            raise ToolError(
                f"{area.path}: has {found} entries where {tally.made} were to be made",
                hint="the target is as it was; does another program work in that folder?",
            )
        errors = tally.error_count + end.error_count
        if errors and not self._request.keep_going:
            shown = [*tally.errors, *end.errors][:_NAMED]
            named = "; ".join(f"{os.fsdecode(path)}: {reason}" for path, reason in shown)
            raise ToolError(
                f"{errors} of {tally.rows} entries could not be copied, so the target was left as "
                f"it was: {named}",
                hint="--keep-going copies all others",
            )
        if self._request.verify and not errors and not tally.left_out and not end.torn:
            self._verify(area, end)

    def _verify(self, area: Area, end: End) -> None:
        """Read everything that was made once more."""
        listing = Listing(
            area.tree_fd, None, exclude.parse(b"", source=""), rewritten={}, is_still=False
        )
        self._progress.phase("verify", end.rows)
        try:
            for batch in listing.batches():
                self._progress.advance(batch.count)
        finally:
            listing.close()
        if listing.digest.digest() != end.digest:
            raise ToolError(
                f"{area.path}: what was made is not what was sent; the target is as it was",
                hint="look for damaged objects with: vpool verify --repair; then run this again",
            )

    def _put_in_place(self, area: Area) -> None:
        """Give the copy its name, and its configuration where it has none."""
        place = self.place
        syscalls.syncfs(area.fd)
        before = os.fstat(area.tree_fd)
        drafted = None if place.guest is not None else self._draft()
        try:
            if place.base_fd < 0:
                _move(area, place, syscalls.RENAME_NOREPLACE)
            else:
                now = os.stat(place.leaf, dir_fd=area.parent_fd, follow_symlinks=False)
                if not os.path.samestat(now, os.fstat(place.base_fd)):
                    raise ToolError(f"{place.path}: has been replaced by somebody else meanwhile")
                _move(area, place, syscalls.RENAME_EXCHANGE)
            # xfs takes the new way up for a change of the folder itself
            os.utime(area.tree_fd, ns=(before.st_atime_ns, before.st_mtime_ns))
            os.fsync(area.parent_fd)
            if drafted is not None:
                drafted.put_in_place()
        except BaseException:
            if drafted is not None:
                drafted.drop()
            raise

    def _draft(self) -> Drafted:
        if self._request.context < 0:
            self._wanted.context = choose_context()
        return draft_settings(
            self.place.name,
            self.place.path,
            self._settings,
            was=identity_of(self._settings),
            wanted=self._wanted,
            devices=self._devices,
            mark_off=self._request.mark_off,
        )

    def _result(self, tally: Tally, end: End) -> Result:
        return Result(
            files=tally.files,
            files_sent=tally.files_sent,
            bytes_total=tally.size,
            bytes_already_there=tally.size - tally.lacking,
            bytes_lacking=tally.lacking,
            linked=tally.linked,
            path=as_text(os.fspath(self.place.path)),
            context=self._wanted.context,
            warnings=self._warnings[:_WARNINGS],
            torn=[*end.torn, *tally.left_out][:1000],
            errors=[*tally.errors, *end.errors][:1000],
            error_count=tally.error_count + end.error_count,
        )


def _count_others(entries: list["os.DirEntry[str]"]) -> int:
    return sum(1 for entry in entries if not entry.is_dir(follow_symlinks=False))


def _move(area: Area, place: _Place, flags: int) -> None:
    try:
        syscalls.renameat2(area.fd, b"tree", area.parent_fd, os.fsencode(place.leaf), flags=flags)
    except OSError as error:
        raise ToolError(
            f"{place.path}: the copy cannot be put in place: {error.strerror}",
            hint=f"it is complete in {area.path}; run the command again",
        ) from error


def _drop_if_empty(area: Area) -> None:
    """Remove an area in which nothing has come to be."""
    with suppress(OSError):
        for name in area.list_arrived():
            if len(name) != 64:
                os.unlink(name, dir_fd=area.arrived_fd)
        os.rmdir("arrived", dir_fd=area.fd)
        with suppress(OSError):
            os.rmdir("tree", dir_fd=area.fd)
            os.rmdir(area.name, dir_fd=area.parent_fd)
            return
        os.mkdir("arrived", 0o700, dir_fd=area.fd)


def _clean_up(area: Area, pool: Pool) -> None:
    """Remove what a copy leaves: names of contents, the old tree, areas of earlier copies."""
    try:
        for name in area.list_arrived():
            os.unlink(name, dir_fd=area.arrived_fd)
        os.rmdir("arrived", dir_fd=area.fd)
        trees = [old.as_tree() for old in area.leftovers]
        if _has_tree(area):
            trees.append(area.as_tree())
        else:
            os.rmdir(area.name, dir_fd=area.parent_fd)
        left = remove(trees, pool).errors if trees else []
        for path, reason in left[:_NAMED]:
            log.warning("%s: is left: %s", path, reason)
    except (OSError, ToolError) as error:
        log.warning("%s: the old version is left: %s; delete it with: vpool rm", area.path, error)


def _has_tree(area: Area) -> bool:
    with suppress(FileNotFoundError):
        return stat.S_ISDIR(os.stat("tree", dir_fd=area.fd, follow_symlinks=False).st_mode)
    return False
