"""One pass from the side that gets the copy: what is looked at before, and the last steps.

An existing target is untouched until its tree and the new one change places in one rename. What
goes wrong before that leaves it as it was, and keeps what has arrived for the next try.
"""

import os
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from vstore import exclude, inode, syscalls
from vstore.copy.area import Area, open_area
from vstore.copy.batches import Tally
from vstore.copy.identity import check_free, choose_context, identity_of, wanted_identity
from vstore.copy.landing import Landing, Place, clean_up, drop_if_empty, land_below
from vstore.copy.listing import Listing
from vstore.copy.messages import (
    Below,
    Dialogue,
    End,
    Folders,
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
from vstore.copy.outline import Outline
from vstore.copy.policy import Policy, load_policy
from vstore.copy.receiver import Receiver
from vstore.copy.settings import Drafted, check_settings, collect_settings, draft_settings
from vstore.errors import GuestNotFound, NoSpace, PoolBusy, ToolError, WrongUsage
from vstore.folders import Missed, walk_folders
from vstore.guest import (
    Guest,
    confdir,
    hold_lock,
    list_guests,
    load_guest,
    load_state,
    parse_name,
    vdirbase,
)
from vstore.hold import default_pool
from vstore.pool import Pool, find_mount_id
from vstore.progress import Progress

_MARGIN: Final = 64 << 20  # bytes beside what may arrive
_INODES: Final = 1000
_NAMED: Final = 5
_WARNINGS: Final = 200
_COMPATIBLE: Final = {"x86_64": {"x86_64", "i686", "i586", "i386"}}
"""Whose programs run where."""


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
        place = _find_place(name, request, stack)
        work = _Pass(dialogue, request, progress, source, load_policy(), place)
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


def _find_place(name: str, request: Request, stack: ExitStack) -> Place:
    if load_state(name) is not None:
        _refuse_busy(name)
    guest: Guest | None = None
    with suppress(GuestNotFound):
        guest = load_guest(name)
    path = guest.root if guest is not None else vdirbase() / name
    place = Place(name, path.parent, path.name, guest, -1)
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
    _refuse_others(name, path)
    if os.path.lexists(path):
        _open_base(place, request, stack)
    return place


def _refuse_others(name: str, path: Path) -> None:
    """Another guest may have its tree there, whatever it is called. Raises WrongUsage."""
    ours = path.resolve()
    for other in list_guests(include_disabled=True):
        theirs = other.root.resolve()
        is_apart = not (ours.is_relative_to(theirs) or theirs.is_relative_to(ours))
        if other.name != name and not is_apart:
            raise WrongUsage(
                f"{path}: is or holds the tree of guest {other.name}, or lies in it",
                hint="choose another name",
            )


def _open_base(place: Place, request: Request, stack: ExitStack) -> None:
    try:
        fd = os.open(place.path, inode.OPEN_FOLDER)
    except OSError as error:
        raise WrongUsage(f"{place.path}: is there already, and no folder") from error
    stack.callback(os.close, fd)
    parent_fd = os.open(place.parent, inode.OPEN_FOLDER)
    stack.callback(os.close, parent_fd)
    if find_mount_id(fd) != find_mount_id(parent_fd):
        raise WrongUsage(
            f"{place.path}: something is mounted there, which cannot be exchanged for the copy",
            hint="unmount it first, or choose another name",
        )
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
        place: Place,
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
        self._place = place
        self._landing = Landing(place, place.base_fd)

    def run(self, stack: ExitStack) -> Result:
        self._choose_identity()
        pool = self._open_pool(stack)
        room = self._check_room()
        base = self._list_base(pool, stack)
        is_tight = room < self._source.bytes + _MARGIN or self._inodes < self._source.rows + _INODES
        is_tight &= not self._request.dry_run
        self._dialogue.send(Target(self._wanted, as_text(os.fspath(self._place.path)), is_tight))
        if is_tight:
            result = self._find_out(pool, base, room, stack)
            if result.same:
                return result
            self._dialogue.send(result)
            base = self._list_base(pool, stack)
        if self._request.dry_run or pool is None:
            return self._find_out(pool, base, room, stack)
        if self._is_same(base, stack):
            return self._same()
        return self._receive(pool, base)

    # --- before a byte is sent

    def _choose_identity(self) -> None:
        source, request, place = self._source, self._request, self._place
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
        check_free(
            place.name,
            self._wanted,
            settings=self._settings,
            devices=self._devices,
        )

    def _open_pool(self, stack: ExitStack) -> Pool | None:
        path = default_pool()
        if self._request.dry_run and not os.path.lexists(path / "format"):
            return None
        pool = stack.enter_context(Pool.load(path) if self._request.dry_run else Pool.create(path))
        fd = os.open(self._place.parent, inode.OPEN_FOLDER)
        try:
            if find_mount_id(fd) != find_mount_id(pool.fd) or os.fstat(fd).st_dev != pool.device:
                raise WrongUsage(
                    f"{self._place.parent}: is not on the file system of the pool {path}",
                    hint="guests and pool share files on one file system only",
                )
        finally:
            os.close(fd)
        return pool

    def _check_room(self) -> int:
        """Free bytes. Raises NoSpace where not even the inodes suffice."""
        place = self._place.parent
        while not place.exists():  # a dry run makes nothing
            place = place.parent
        room = os.statvfs(place)
        self._inodes = room.f_favail if room.f_files else 1 << 62
        if room.f_files and room.f_favail < _INODES:
            raise NoSpace(
                f"{self._place.parent}: only {room.f_favail} inodes are free",
                hint="free some, e.g. with: vpool reclaim",
            )
        return room.f_bavail * room.f_frsize

    # --- what is there already

    def _list_base(self, pool: Pool | None, stack: ExitStack) -> Listing | None:
        if self._place.base_fd < 0 or not self._request.refresh:
            return None
        trusted = None if self._request.verify else pool
        base = Listing(
            self._place.base_fd,
            trusted,
            exclude.parse(b"", source=""),
            rewritten={},
            is_still=True,
            keeps_blocks=True,
            outline=Outline(),
        )
        stack.callback(base.close)
        return base

    def _is_same(self, base: Listing | None, stack: ExitStack) -> bool:
        """Whether the tree is just what the sender has. Asked by the sender of a refresh; where it
        is not, it is found out which part of the tree is to be made anew.
        """
        self._landing = Landing(self._place, self._place.base_fd)
        if not self._request.refresh:
            return False
        ours = (b"", 0)
        if base is not None:
            for _ in base.batches():
                pass
            ours = (base.packer.digest.digest(), base.packer.rows)
        theirs = self._dialogue.expect(Sum)
        is_known = base is not None and self._place.guest is not None and not base.found.errors
        is_same = is_known and ours == (theirs.digest, theirs.rows) and not theirs.errors
        self._progress.phase("copy", theirs.bytes, "bytes")
        compares = is_known and not is_same
        self._dialogue.send(Same(is_same, compares))
        if base is not None and is_same:
            self._tally = Tally(files=base.found.files, size=base.found.size)
        elif base is not None and compares and base.outline is not None:
            self._landing = self._find_landing(base.outline, stack)
        if not is_same:
            self._landing.refuse_mounts()
        return is_same

    def _find_landing(self, outline: Outline, stack: ExitStack) -> Landing:
        """Tell the sender which tree is to come: the smallest that has all that differs."""
        folder = outline.compare(self._dialogue.expect_some(Folders, until=lambda some: some.last))
        landing = land_below(self._place, folder, stack)
        while (around := outline.with_all_names(landing.below)) != landing.below:
            landing = land_below(self._place, around, stack)
        outside = outline.measure_outside(landing.below)
        self._dialogue.send(Below(landing.below))
        self._progress.advance(outside.size)
        return replace(landing, outside=outside)

    def _same(self) -> Result:
        return Result(
            files=self._tally.files,
            bytes_total=self._tally.size,
            bytes_already_there=self._tally.size,
            same=True,
            path=as_text(os.fspath(self._place.path)),
            context=self._wanted.context,
        )

    def _find_out(
        self, pool: Pool | None, base: Listing | None, room: int, stack: ExitStack
    ) -> Result:
        """What would be asked for, were it no dry run. Raises NoSpace where there is no room."""
        if self._is_same(base, stack):
            return self._same()
        receiver = self._make_receiver(pool, None, base, room)
        try:
            end = receiver.receive()
        finally:
            receiver.close()
        if receiver.tally.inodes + _INODES > self._inodes:
            raise NoSpace(
                f"{self._place.parent}: {receiver.tally.inodes} inodes are needed, {self._inodes} "
                "are free",
                hint="free some, e.g. with: vpool reclaim",
            )
        return self._result(receiver.tally, end)

    def _make_receiver(
        self, pool: Pool | None, area: Area | None, base: Listing | None, room: int = 1 << 62
    ) -> Receiver:
        landing = self._landing
        outside = landing.outside
        return Receiver(
            self._dialogue,
            pool,
            area,
            self._policy,
            self._progress,
            base_fd=landing.base_fd,
            base=base,
            room=room,
            tally=Tally(landing.below, outside.rows, outside.files, size=outside.size),
        )

    # --- the copy

    def _receive(self, pool: Pool, base: Listing | None) -> Result:
        """There is room for it: by what the sender measured, or by what was found out."""
        if not self._request.refresh:
            self._progress.phase("copy", self._source.bytes, "bytes")
        parent, leaf = self._place.parent, self._place.leaf
        with open_area(parent, leaf, takes_over=not self._policy.prove) as area:
            receiver = self._make_receiver(pool, area, base)
            try:
                end = receiver.receive()
                self._check(receiver.tally, end, area)
                self._put_in_place(area)
            except BaseException:
                drop_if_empty(area)
                raise
            finally:
                receiver.close()
            self._warnings += clean_up(area, pool)
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
        if listing.packer.digest.digest() != end.digest:
            raise ToolError(
                f"{area.path}: what was made is not what was sent; the target is as it was",
                hint="look for damaged objects with: vpool verify --repair; then run this again",
            )

    def _put_in_place(self, area: Area) -> None:
        """Give the copy its name, and its configuration where it has none."""
        syscalls.syncfs(area.fd)
        drafted = None if self._place.guest is not None else self._draft()
        try:
            self._landing.put(area)
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
            self._place.name,
            self._place.path,
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
            path=as_text(os.fspath(self._place.path)),
            context=self._wanted.context,
            warnings=self._warnings[:_WARNINGS],
            torn=[*end.torn, *tally.left_out][:1000],
            errors=[*tally.errors, *end.errors][:1000],
            error_count=tally.error_count + end.error_count,
        )


def _count_others(entries: list["os.DirEntry[str]"]) -> int:
    return sum(1 for entry in entries if not entry.is_dir(follow_symlinks=False))
