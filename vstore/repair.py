"""Put right what `verify` found: freeze again, or take out of use and give the guests good content.

A damaged object goes to quarantine. From a good copy - another object, or a file of any guest - a
new object is made whose bytes and metadata are checked against the name, and every guest's name of
the damaged inode becomes a link to it, in a window on both. What cannot be restored stays as it is,
and is named.
"""

import errno
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Final

from vstore import extents, freezer, inode, syscalls
from vstore.digest import digest_content
from vstore.errors import NoSpace
from vstore.folders import Folder, join
from vstore.guest import Guest
from vstore.hold import Held
from vstore.pool import Identity, Pool, digest_xattrs, parse_object
from vstore.progress import SILENT, Progress
from vstore.quarantine import former_name
from vstore.recovery import is_sound
from vstore.scan import open_below
from vstore.undo import guarded_worker
from vstore.verify import Fault, GuestFile, walk_guests
from vstore.window import Windows
from vstore.workers import Crew

_SPARE: Final = "good"
_LIKELY_AT_MOST: Final = 100
_OTHERS_AT_MOST: Final = 1000
_ATTEMPTS: Final = 20  # to freeze a busy guest
_PAUSE_S: Final = 0.05
_RESTORED: Final = ""
_CHANGED: Final = "has become another file meanwhile"


@dataclass(slots=True)
class _Search:
    """What a walk through the guests found for one damaged inode."""

    identity: Identity | None
    uses: dict[tuple[str, bytes], list[bytes]] = field(default_factory=lambda: defaultdict(list))
    likely: list[tuple[str, bytes, bytes]] = field(default_factory=list)  # guest, folder, name
    others: list[tuple[str, bytes, bytes]] = field(default_factory=list)  # equal in size alone


def repair(
    pool: Pool,
    faults: Sequence[Fault],
    guests: Sequence[Guest],
    held: Sequence[Held],
    progress: Progress = SILENT,
) -> None:
    """Put right the faults, each of which says afterwards what became of it.

    Good copies are looked for in all `guests`; names are replaced in those that are `held`. Raises
    PoolBusy, NoSpace.
    """
    with ExitStack() as stack:
        stack.enter_context(pool.exclude())
        roots = {
            guest.name: stack.enter_context(_opened(os.open(guest.root, inode.OPEN_FOLDER)))
            for guest in guests
        }
        crew = stack.enter_context(
            guarded_worker(pool, lambda pool, windows, stage: _Mender(pool, windows, stage))
        )
        progress.phase("repair", len(faults), "objects")
        for fault in faults:
            _settle(crew, fault)
        broken = [fault for fault in faults if not fault.is_repaired and _is_restorable(fault)]
        searches = _search(pool, guests, broken) if broken else {}
        for fault in broken:
            _restore(
                crew, fault, searches[fault.ino], roots, {item.guest.name: item for item in held}
            )
        for fault in broken:
            fault.links = os.stat(fault.path, dir_fd=pool.fd).st_nlink - 1
            fault.is_repaired = not fault.links
        progress.advance(len(faults))


@contextmanager
def _opened(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def _ask(crew: Crew, *job: Any) -> Any:
    """The one answer to one job."""
    (answer,) = (answer for _, answer in crew.map([(job, None)]))
    return answer


def _settle(crew: Crew, fault: Fault) -> None:
    fault.path, fault.outcome, is_good = _ask(crew, "settle", fault.path)
    fault.is_repaired = is_good or (fault.path.startswith("quarantine/") and not fault.links)


def _is_restorable(fault: Fault) -> bool:
    return fault.path.startswith("quarantine/") and _identity(fault.path) is not None


def _identity(path: str) -> Identity | None:
    with suppress(ValueError):
        return parse_object(former_name(path).rpartition("/")[2])[0]
    return None


def _search(pool: Pool, guests: Sequence[Guest], broken: Sequence[Fault]) -> dict[int, _Search]:
    """Look in all guests, once, for names of the damaged inodes and for copies of their content."""
    searches = {fault.ino: _Search(_identity(fault.path)) for fault in broken}
    by_size: dict[int, list[_Search]] = defaultdict(list)
    for search in searches.values():
        if search.identity is not None:
            by_size[search.identity.size].append(search)
    objects = pool.load_numbers()
    for guest, folder in walk_guests(guests, pool):
        for entry in folder.entries:
            number = entry.inode()
            if number in searches:
                name = os.fsencode(entry.name)
                searches[number].uses[guest.name, folder.path].append(name)
            elif number not in objects and entry.is_file(follow_symlinks=False):
                _note_candidate(by_size, guest, folder, entry)
    return searches


def _note_candidate(
    by_size: dict[int, list[_Search]], guest: Guest, folder: Folder, entry: os.DirEntry[str]
) -> None:
    try:
        status = entry.stat(follow_symlinks=False)
    except OSError:
        return
    for search in by_size.get(status.st_size, ()):
        found, most = search.others, _OTHERS_AT_MOST
        if search.identity is not None and _looks_alike(status, search.identity):
            found, most = search.likely, _LIKELY_AT_MOST
        if len(found) < most:
            found.append((guest.name, folder.path, os.fsencode(entry.name)))


def _looks_alike(status: os.stat_result, identity: Identity) -> bool:
    return (status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns) == (
        identity.mode,
        identity.uid,
        identity.gid,
        identity.mtime_ns,
    )


def _restore(
    crew: Crew, fault: Fault, search: _Search, roots: dict[str, int], held: dict[str, Held]
) -> None:
    """Make a good object and give each name a link to it; says in `fault` what became of it."""
    copies = [(roots[name], *rest) for name, *rest in (*search.likely, *search.others)]
    good = _ask(crew, "rebuild", fault.path, copies)
    fault.names.clear()
    restored = 0
    for (name, folder), files in search.uses.items():
        fault.names += [GuestFile(name, join(folder, file)) for file in files]
        if not good:
            outcomes = ["no good copy was found"] * len(files)
        elif name not in held:
            outcomes = ["the guest could not be held"] * len(files)
        else:
            job = (fault.path, good, held[name].fd, folder, files, held[name].cgroup)
            outcomes = _ask(crew, "replace", *job)
        for file, outcome in zip(files, outcomes, strict=True):
            if outcome in (_RESTORED, _CHANGED):
                restored += outcome == _RESTORED
            else:
                fault.left.append((GuestFile(name, join(folder, file)), outcome))
    fault.outcome = f"put in quarantine; names that have good content again: {restored}"


class _Mender:
    """The worker's side."""

    def __init__(self, pool: Pool, windows: Windows, stage_fd: int) -> None:
        self._pool = pool
        self._windows = windows
        self._stage_fd = stage_fd

    def serve(self, job: tuple[Any, ...]) -> Iterator[Any]:
        kind, *what = job
        if kind == "settle":
            yield self._settle(*what)
        elif kind == "rebuild":
            yield self._rebuild(*what)
        else:
            yield self._replace(*what)

    # --- the damaged inode

    def _settle(self, path: str) -> tuple[str, str, bool]:
        """Freeze it again, or put it in quarantine.

        Returns its path now, what was done, and whether it is good.
        """
        try:
            fd = os.open(path, inode.OPEN_TO_READ, dir_fd=self._pool.fd)
        except OSError as error:
            return path, f"cannot be opened: {error.strerror}", False
        name = former_name(path) if path.startswith("quarantine/") else path.partition("/")[2]
        was_frozen = inode.is_immutable(fd)
        with self._windows.guard([os.dup(fd)]) as refused, _opened(fd):
            if refused and was_frozen:
                return path, "somebody has it open for writing", False
            is_good = not refused and _is_sound(name, fd)
            with self._windows.thawed(fd) if was_frozen else nullcontext():
                path, outcome = self._move(path, name, is_good=is_good)
            if not refused:
                self._windows.freeze(fd)
        return path, outcome, is_good

    def _move(self, path: str, name: str, *, is_good: bool) -> tuple[str, str]:
        is_object = path.startswith("objects/")
        if is_good and is_object:
            return path, "frozen again"
        if is_good:
            return self._put_back(path, name), "sound, so put back"
        if not is_object:
            return path, "still in quarantine"
        return self._pool.quarantine(name, "it is not what its name says"), "put in quarantine"

    def _put_back(self, path: str, name: str) -> str:
        for free in _numbered(name):
            with suppress(FileExistsError):
                syscalls.renameat2(
                    self._pool.fd,
                    os.fsencode(path),
                    self._pool.objects_fd,
                    os.fsencode(free),
                    flags=syscalls.RENAME_NOREPLACE,
                )
                return f"objects/{free}"
        raise AssertionError("numbers do not end")

    # --- a good object

    def _rebuild(self, path: str, copies: list[tuple[int, bytes, bytes]]) -> str:
        """Make an object as the one at `path` was, from any good copy.

        Returns its name; empty when there is no good copy.
        """
        name = former_name(path)
        identity, _ = parse_object(name.rpartition("/")[2])
        for source_fd in self._open_sources(path, identity, copies):
            with _opened(source_fd):
                if self._make_spare(source_fd, path, identity):
                    return self._enter_pool(name)
        return ""

    def _open_sources(
        self, path: str, identity: Identity, copies: list[tuple[int, bytes, bytes]]
    ) -> Iterator[int]:
        """The damaged inode, whose content may be right; objects of the same content; files."""
        with suppress(OSError):
            yield os.open(path, inode.OPEN_TO_READ, dir_fd=self._pool.fd)
        text = identity.digest.hex()
        for entry in self._pool.scan_folder(text[:2]):
            if entry.name.startswith(f"{text}."):
                with suppress(OSError):
                    yield self._pool.open_object(f"{text[:2]}/{entry.name}")
        for root_fd, folder, name in copies:
            with suppress(OSError), _opened(open_below(root_fd, folder)) as folder_fd:
                yield os.open(name, inode.OPEN_TO_READ, dir_fd=folder_fd)

    def _make_spare(self, source_fd: int, path: str, identity: Identity) -> bool:
        """Copy a source to the stage if it is a good one. Raises OSError: ENOSPC."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with _opened(os.open(_SPARE, flags, 0o600, dir_fd=self._stage_fd)) as fd:
            try:
                is_good = self._fill(fd, source_fd, path, identity)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise NoSpace(f"{self._pool.path}: no room for a good copy") from error
                is_good = False
        if not is_good:
            os.unlink(_SPARE, dir_fd=self._stage_fd)
        return is_good

    def _fill(self, fd: int, source_fd: int, path: str, identity: Identity) -> bool:
        """Copy the content and set the metadata that the name states; False for other content."""
        if os.fstat(source_fd).st_size != identity.size:
            return False
        extents.copy_data(source_fd, fd, size=identity.size)
        if digest_content(fd, os.fstat(fd)) != identity.digest:
            return False
        xattrs = self._find_xattrs(source_fd, path, identity)
        if xattrs is None:
            return False
        os.fchown(fd, identity.uid, identity.gid)
        os.fchmod(fd, identity.mode & 0o7777)
        inode.store_xattrs(fd, xattrs)
        os.fchmod(fd, identity.mode & 0o7777)
        os.utime(fd, ns=(identity.mtime_ns, identity.mtime_ns))
        os.fsync(fd)
        return True

    def _find_xattrs(
        self, source_fd: int, path: str, identity: Identity
    ) -> dict[bytes, bytes] | None:
        if not identity.xattrs:
            return {}
        if digest_xattrs(source_fd) == identity.xattrs:
            return inode.load_xattrs(source_fd)
        with _opened(os.open(path, inode.OPEN_TO_READ, dir_fd=self._pool.fd)) as fd:
            return inode.load_xattrs(fd) if digest_xattrs(fd) == identity.xattrs else None

    def _enter_pool(self, name: str) -> str:
        """Give the spare the first free name of its kind in the pool, and freeze it."""
        fd = os.open(_SPARE, inode.OPEN_TO_READ, dir_fd=self._stage_fd)
        with self._windows.guard([fd]):
            for free in _numbered(name):
                with suppress(FileExistsError):
                    syscalls.renameat2(
                        self._stage_fd,
                        os.fsencode(_SPARE),
                        self._pool.objects_fd,
                        os.fsencode(free),
                        flags=syscalls.RENAME_NOREPLACE,
                    )
                    self._windows.freeze(fd)
                    return free
        raise AssertionError("numbers do not end")

    # --- the guests' names

    def _replace(
        self, path: str, good: str, root_fd: int, folder: bytes, names: list[bytes], cgroup: str
    ) -> list[str]:
        """Make the names in a guest's folder links to the good object; returns for each why not."""
        try:
            folder_fd = open_below(root_fd, folder)
        except OSError:
            return [_CHANGED] * len(names)
        with _opened(folder_fd):
            for _ in range(_ATTEMPTS):
                with self._still(cgroup) as is_still:
                    if is_still:
                        return self._replace_in(folder_fd, path, good, names)
                time.sleep(_PAUSE_S)
        return ["its guest could not be held still for a moment"] * len(names)

    @contextmanager
    def _still(self, cgroup: str) -> Iterator[bool]:
        if not cgroup:
            yield True
            return
        with (
            freezer.opened(cgroup) as fd,
            self._windows.holding({cgroup: fd}),
            freezer.frozen(cgroup, fd) as is_still,
        ):
            yield is_still

    def _replace_in(self, folder_fd: int, path: str, good: str, names: list[bytes]) -> list[str]:
        before = os.fstat(folder_fd)
        bad_fd = os.open(path, inode.OPEN_TO_READ, dir_fd=self._pool.fd)
        good_fd = self._pool.open_object(good)
        is_frozen = inode.is_immutable(bad_fd)
        with self._windows.guard([bad_fd, good_fd]) as refused:
            if good_fd in refused or (bad_fd in refused and is_frozen):
                return ["somebody has it open for writing"] * len(names)
            number = os.fstat(bad_fd).st_ino
            with (
                self._windows.thawed(good_fd),
                self._windows.thawed(bad_fd) if is_frozen else nullcontext(),
            ):
                outcomes = [self._replace_one(folder_fd, name, number, good) for name in names]
        with suppress(OSError):
            os.utime(folder_fd, ns=(before.st_atime_ns, before.st_mtime_ns))
        return outcomes

    def _replace_one(self, folder_fd: int, name: bytes, number: int, good: str) -> str:
        try:
            if os.stat(name, dir_fd=folder_fd, follow_symlinks=False).st_ino != number:
                return _CHANGED
            os.link(good, _SPARE, src_dir_fd=self._pool.objects_fd, dst_dir_fd=self._stage_fd)
            try:
                os.rename(_SPARE, name, src_dir_fd=self._stage_fd, dst_dir_fd=folder_fd)
            except OSError:
                os.unlink(_SPARE, dir_fd=self._stage_fd)
                raise
        except FileNotFoundError:
            return _CHANGED
        except OSError as error:
            return f"cannot be replaced: {error.strerror}"
        return _RESTORED


def _numbered(name: str) -> Iterator[str]:
    """The object's name, then the same with every other number from 0."""
    yield name
    stem = name.rpartition("-")[0]
    yield from (f"{stem}-{number}" for number in count())


def _is_sound(name: str, fd: int) -> bool:
    try:
        return is_sound(name, fd)
    except (OSError, ValueError):
        return False
