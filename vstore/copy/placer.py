"""A worker's part of receiving: entries of the tree that grows, made by folder and single name.

Nothing here replaces anything: an entry that is there already, or whose folder is none that we have
made, ends in an error of that row. Objects enter the pool under a name that says what they are,
after their bytes are on disk, and get their first link in the same window.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

from vstore import extents, inode, syscalls
from vstore.copy.area import Area
from vstore.copy.dressing import dress, dress_object
from vstore.copy.staging import Meta, Spot, explain
from vstore.folders import LastFolder, join
from vstore.pool import Pool
from vstore.scan import open_below
from vstore.window import Windows

Origin = tuple[str, Any]
"""Where a content is: ("arrived", digest in hex), ("object", name) or ("base", (path, name))."""
Step = tuple[Any, ...]
"""What to make, first its kind, then its Spot; the methods of `Placer` say the rest."""
Answer = tuple[int, list[tuple[bytes, str]], int, bool]
"""How many links to objects were made, (path, why not) of what could not be made, how many of these
stand there all the same, and whether the job is done."""

_New = tuple[int, Spot, str, str, Meta]
"""What is to be an object: its descriptor, spot, name in `arrived` ("" where it stands at its spot
already), path below `objects`, and what it is to be like.
"""
_Twin = tuple[Spot, Origin, str, Meta]
"""What is to be an object with a content that another file has: its spot, where the content is, the
object's name, and what it is to be like.
"""

SYMLINK, NODE, EMPTY, LINK, NEW, ENTER, OWN, NAME, RELINK, FINISH = range(10)

_OBJECTS_A_WINDOW: Final = 120
_HEX: Final = 64  # of a digest, with which an object's name begins
_PROC_FDS: Final = "/proc/self/fd"
_NEW_FILE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_GONE: Final = "its object left the pool meanwhile; run the command again"


class Placer:
    """Makes entries; a holder of windows for `guarded_worker`."""

    def __init__(self, pool: Pool, windows: Windows, area: Area, base_fd: int) -> None:
        os.umask(0)
        self._pool = pool
        self._windows = windows
        self._area = area
        self._base_fd = base_fd
        self._proc_fd = os.open(_PROC_FDS, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._folder = LastFolder(area.tree_fd)
        self._links: list[tuple[Spot, str]] = []
        self._news: list[_New] = []
        self._twins: list[_Twin] = []
        self._errors: list[tuple[bytes, str]] = []
        self._linked = 0
        self._standing = 0
        self._windows_opened = False
        self._make: dict[int, Callable[..., None]] = {
            SYMLINK: self._make_symlink,
            NODE: self._make_node,
            EMPTY: self._make_empty,
            LINK: self._note_link,
            NEW: self._note_new,
            ENTER: self._note_staged,
            OWN: self._make_own,
            NAME: self._make_name,
            RELINK: self._relink,
            FINISH: self._finish_folder,
        }

    def serve(self, job: list[Step]) -> Iterator[Answer]:
        """Carry the steps out, in their order. Our parent holds the pool."""
        if any(step[0] == ENTER or (step[0] == NEW and step[2][0] == "arrived") for step in job):
            syscalls.syncfs(self._area.fd)
        for kind, spot, *what in job:
            try:
                self._make[kind](spot, *what)
            except OSError as error:
                self._note(spot, error)
            if self._windows_opened:  # the parent takes notice of leases with each answer
                yield self._answer(is_done=False)
        for _ in self._flush():
            yield self._answer(is_done=False)
        self._folder.close()
        yield self._answer(is_done=True)

    def _answer(self, *, is_done: bool) -> Answer:
        answer = self._linked, self._errors, self._standing, is_done
        self._linked, self._errors, self._standing, self._windows_opened = 0, [], 0, False
        return answer

    def _note(self, spot: Spot, error: OSError) -> None:
        self._errors.append((join(spot[1], spot[2]), explain(self._area, spot, error)))

    def _finish_folder(self, spot: Spot, meta: Meta) -> None:
        try:
            dress(self._folder.open(spot[1]), meta)
        except OSError as error:
            self._note(spot, error)
            self._standing += 1

    @contextmanager
    def _undone(self, spot: Spot) -> Iterator[None]:
        """What was just made at `spot` goes again where it cannot be finished."""
        try:
            yield
        except OSError:
            self._unlink(spot)
            raise

    def _unlink(self, spot: Spot) -> None:
        try:
            os.unlink(spot[2], dir_fd=self._folder.open(spot[1]))
        except PermissionError:  # frozen already
            self._standing += 1

    # --- entries without content

    def _make_symlink(self, spot: Spot, text: bytes, meta: Meta, is_group: bool) -> None:
        os.symlink(text, spot[2], dir_fd=self._folder.open(spot[1]))
        with self._undone(spot):
            self._dress_place(spot, meta)
            self._begin_group(spot, is_group)

    def _make_node(self, spot: Spot, rdev: int, meta: Meta, is_group: bool) -> None:
        kind = stat.S_IFMT(meta[0]) | 0o600
        os.mknod(spot[2], kind, rdev, dir_fd=self._folder.open(spot[1]))
        with self._undone(spot):
            self._dress_place(spot, meta)
            self._begin_group(spot, is_group)

    def _dress_place(self, spot: Spot, meta: Meta) -> None:
        """Owner, mode, xattrs and times of what cannot be opened; we have just made it."""
        mode, uid, gid, mtime_ns, xattrs = meta
        place = b"%s/%d/%s" % (_PROC_FDS.encode(), self._folder.open(spot[1]), spot[2])
        os.chown(place, uid, gid, follow_symlinks=False)
        if not stat.S_ISLNK(mode):
            os.chmod(place, stat.S_IMODE(mode))  # noqa: PTH101 - by descriptor
        for key, value in xattrs:
            os.setxattr(place, key, value, follow_symlinks=False)
        os.utime(place, ns=(mtime_ns, mtime_ns), follow_symlinks=False)

    def _make_empty(self, spot: Spot, meta: Meta, is_group: bool) -> None:
        fd = os.open(spot[2], _NEW_FILE, 0o600, dir_fd=self._folder.open(spot[1]))
        with self._undone(spot):
            try:
                dress(fd, meta)
            finally:
                os.close(fd)
            self._begin_group(spot, is_group)

    # --- files of the guest's own

    def _make_own(self, spot: Spot, origin: Origin, meta: Meta, is_group: bool) -> None:
        kind, where = origin
        if kind == "object" and (self._news or self._twins):
            self._enter_all()
        if kind == "arrived" and self._link_arrived(spot, where, meta):
            self._begin_group(spot, is_group)
            return
        source_fd = self._open_origin(origin)
        try:
            self._copy(source_fd, self._folder.open(spot[1]), spot[2], meta)
        finally:
            os.close(source_fd)
        self._begin_group(spot, is_group)

    def _link_arrived(self, spot: Spot, name: str, meta: Meta) -> bool:
        """Make what has arrived the guest's file; False where it is one already."""
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(name, flags, dir_fd=self._area.arrived_fd)
        except FileNotFoundError:
            return False
        try:
            if os.fstat(fd).st_nlink > 1:
                return False
            folder_fd = self._folder.open(spot[1])
            os.link(
                name,
                spot[2],
                src_dir_fd=self._area.arrived_fd,
                dst_dir_fd=folder_fd,
                follow_symlinks=False,
            )
            with self._undone(spot):
                dress(fd, meta)
        finally:
            os.close(fd)
        return True

    def _copy(self, source_fd: int, folder_fd: int, name: bytes | str, meta: Meta) -> None:
        fd = os.open(name, _NEW_FILE, 0o600, dir_fd=folder_fd)
        try:
            extents.copy_data(source_fd, fd, size=os.fstat(source_fd).st_size)
            dress(fd, meta)
        except OSError:
            os.unlink(name, dir_fd=folder_fd)
            raise
        finally:
            os.close(fd)

    def _open_origin(self, origin: Origin) -> int:
        kind, where = origin
        if kind == "arrived":
            with suppress(FileNotFoundError):
                return os.open(where, inode.OPEN_TO_READ, dir_fd=self._area.arrived_fd)
            raise OSError(errno.ENOENT, "its content is not here any more")
        if kind == "object":
            try:
                return self._pool.open_object(f"{where[:2]}/{where}")
            except FileNotFoundError:
                with suppress(FileNotFoundError):
                    return os.open(where[:_HEX], inode.OPEN_TO_READ, dir_fd=self._area.arrived_fd)
            raise OSError(errno.ESTALE, _GONE)
        return self._open_base(*where)

    def _open_base(self, path: bytes, name: bytes) -> int:
        folder_fd = open_below(self._base_fd, path)
        try:
            return os.open(name, inode.OPEN_TO_READ, dir_fd=folder_fd)
        finally:
            os.close(folder_fd)

    def _relink(self, spot: Spot, ino: int) -> None:
        """A file that is equal in all to the target's version becomes another name of that."""
        _, path, name = spot
        base_fd = open_below(self._base_fd, path)
        try:
            if os.stat(name, dir_fd=base_fd, follow_symlinks=False).st_ino != ino:
                raise OSError(errno.ESTALE, "the target has changed meanwhile")
            os.link(
                name,
                name,
                src_dir_fd=base_fd,
                dst_dir_fd=self._folder.open(path),
                follow_symlinks=False,
            )
        finally:
            os.close(base_fd)

    # --- several names of one inode

    def _begin_group(self, spot: Spot, is_group: bool) -> None:
        if is_group:
            os.link(
                spot[2],
                f"group-{spot[0]}",
                src_dir_fd=self._folder.open(spot[1]),
                dst_dir_fd=self._area.arrived_fd,
                follow_symlinks=False,
            )

    def _make_name(self, spot: Spot, first: int, mode: int) -> None:
        folder_fd = self._folder.open(spot[1])
        group = f"group-{first}"
        fd = self._area.arrived_fd
        try:
            found = os.stat(group, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError as error:
            raise OSError(errno.ENOENT, "its first name is missing") from error
        if stat.S_IFMT(found.st_mode) != stat.S_IFMT(mode):
            raise OSError(errno.EINVAL, "its first name is of another kind")
        os.link(group, spot[2], src_dir_fd=fd, dst_dir_fd=folder_fd, follow_symlinks=False)

    # --- objects

    def _note_link(self, spot: Spot, name: str) -> None:
        self._links.append((spot, name))

    def _note_new(self, spot: Spot, origin: Origin, name: str, meta: Meta) -> None:
        """Make the content an object of that name: it must be just what the name says then."""
        fd = self._open_spare(origin[1]) if origin[0] == "arrived" else -1
        if fd < 0:
            self._twins.append((spot, origin, name, meta))
            return
        self._note_opened(fd, spot, origin[1], name, meta)

    def _note_staged(self, spot: Spot, name: str, meta: Meta) -> None:
        """Make the file that stands there an object, as `_note_new`."""
        fd = os.open(spot[2], inode.OPEN_TO_READ, dir_fd=self._folder.open(spot[1]))
        self._note_opened(fd, spot, "", name, meta)

    def _note_opened(self, fd: int, spot: Spot, spare: str, name: str, meta: Meta) -> None:
        self._news.append((fd, spot, spare, f"{name[:2]}/{name}", meta))
        if len(self._news) >= _OBJECTS_A_WINDOW:
            self._enter_news()

    def _open_spare(self, name: str) -> int:
        """What has arrived; -1 where it is a file of the guest's own already, or gone."""
        try:
            fd = os.open(name, inode.OPEN_TO_READ, dir_fd=self._area.arrived_fd)
        except FileNotFoundError:
            return -1
        if os.fstat(fd).st_nlink == 1:
            return fd
        os.close(fd)
        return -1

    def _flush(self) -> Iterator[None]:
        """Make all that is noted; yields after each batch of windows."""
        if self._news or self._twins:
            self._enter_all()
            yield
        links, self._links = self._links, []
        for start in range(0, len(links), _OBJECTS_A_WINDOW):
            self._link_all(links[start : start + _OBJECTS_A_WINDOW])
            yield

    def _enter_all(self) -> None:
        """Let all that is to be an object be one. Twins come last, since the others are what they
        are copied from; and all of them are on disk before one has its name.
        """
        self._enter_news()
        twins, self._twins = self._twins, []
        copied = self._copy_twins(twins)
        if copied:
            syscalls.syncfs(self._area.fd)
        for spot, name, spare, meta in copied:
            try:
                fd = os.open(spare, inode.OPEN_TO_READ, dir_fd=self._area.arrived_fd)
            except OSError as error:
                self._note(spot, error)
                continue
            self._note_opened(fd, spot, spare, name, meta)
        self._enter_news()

    def _copy_twins(self, twins: Sequence[_Twin]) -> list[tuple[Spot, str, str, Meta]]:
        """Spot, the object's name, the copy's name in `arrived` and what it is like, of each that
        could be made.
        """
        spares: dict[str, str] = {}
        copied = []
        for spot, origin, name, meta in twins:
            spare = f"object-{spot[0]}"
            known = spares.get(origin[1]) if origin[0] == "object" else None
            try:
                source_fd = self._open_origin(origin if known is None else ("arrived", known))
                try:
                    self._copy(source_fd, self._area.arrived_fd, spare, meta)
                finally:
                    os.close(source_fd)
            except OSError as error:
                self._note(spot, error)
                continue
            spares[name] = spare
            copied.append((spot, name, spare, meta))
        return copied

    def _enter_news(self) -> None:
        news, self._news = self._news, []
        if news:
            self._links += self._enter_pool(news)
            self._windows_opened = True

    def _enter_pool(self, news: Sequence[_New]) -> list[tuple[Spot, str]]:
        """Give the files their names in the pool, a first link, and the immutable flag.

        Returns those whose name another program was quicker to take: links are made to that.
        """
        taken = []
        with self._windows.guard([fd for fd, *_ in news]) as refused:
            for fd, spot, spare, path, meta in news:
                try:
                    if fd in refused:
                        raise OSError(errno.EBUSY, "somebody has it open for writing")
                    dress_object(fd, path[3:], meta)
                    if not self._enter_one(fd, spot, spare, path):
                        taken.append((spot, path[3:]))
                except OSError as error:
                    self._note(spot, error)
                    if not spare:
                        self._set_aside(spot, path)
        return taken

    def _enter_one(self, fd: int, spot: Spot, spare: str, path: str) -> bool:
        try:
            if spare:
                self._name_spare(spare, path)
            else:
                self._name_staged(spot, path)
        except FileExistsError:
            self._drop(spot, spare)
            return False
        try:
            if spare:
                self._link_one(spot, path)
            else:
                self._linked += 1
        finally:
            self._windows.freeze(fd)
        return True

    def _name_spare(self, spare: str, path: str) -> None:
        syscalls.renameat2(
            self._area.arrived_fd,
            os.fsencode(spare),
            self._pool.objects_fd,
            os.fsencode(path),
            flags=syscalls.RENAME_NOREPLACE,
        )

    def _name_staged(self, spot: Spot, path: str) -> None:
        os.link(
            spot[2],
            path,
            src_dir_fd=self._folder.open(spot[1]),
            dst_dir_fd=self._pool.objects_fd,
            follow_symlinks=False,
        )

    def _drop(self, spot: Spot, spare: str) -> None:
        if spare:
            os.unlink(spare, dir_fd=self._area.arrived_fd)
        else:
            self._unlink(spot)

    def _set_aside(self, spot: Spot, path: str) -> None:
        """Others may wait for the content of what cannot be an object."""
        try:
            os.rename(
                spot[2],
                path[3 : 3 + _HEX],
                src_dir_fd=self._folder.open(spot[1]),
                dst_dir_fd=self._area.arrived_fd,
            )
        except PermissionError:  # frozen already
            self._standing += 1

    def _link_all(self, links: Sequence[tuple[Spot, str]]) -> None:
        """Make links to objects in one window for each of them."""
        spots: dict[str, list[Spot]] = {}
        for spot, name in links:
            spots.setdefault(f"{name[:2]}/{name}", []).append(spot)
        opened = {}
        for path, wanting in spots.items():
            try:
                opened[path] = self._pool.open_object(path)
            except FileNotFoundError:
                self._errors += [(join(spot[1], spot[2]), _GONE) for spot in wanting]
        with self._windows.guard(list(opened.values())) as refused:
            for path, fd in opened.items():
                for spot in spots[path]:
                    try:
                        self._link_object(spot, path, fd, is_refused=fd in refused)
                    except OSError as error:
                        self._note(spot, error)

    def _link_object(self, spot: Spot, path: str, fd: int, *, is_refused: bool) -> None:
        """A link; a private copy where the object is busy or takes no more links."""
        if not is_refused and inode.is_immutable(fd):
            try:
                with self._windows.thawed(fd):
                    self._link_one(spot, path)
                return
            except OSError as error:
                if error.errno not in (errno.EMLINK, errno.EXDEV):
                    raise
        status = os.fstat(fd)
        xattrs = sorted(inode.load_xattrs(fd).items())
        meta = (status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, xattrs)
        self._copy(fd, self._folder.open(spot[1]), spot[2], meta)

    def _link_one(self, spot: Spot, path: str) -> None:
        os.link(
            path,
            spot[2],
            src_dir_fd=self._pool.objects_fd,
            dst_dir_fd=self._folder.open(spot[1]),
            follow_symlinks=False,
        )
        self._linked += 1
