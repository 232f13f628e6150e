"""The manifest of a guest's tree, batch by batch, as its sender makes it and as a receiver makes
its own to compare.

An object says in its name what it is, so that a unified guest is listed without reading its files.
Other files are read unless the pool's index knows their digest. What changes while it is read is
listed as it was; whoever sends it looks again.
"""

import errno
import os
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import msgspec
from blake3 import blake3

from vstore import index, inode, lease
from vstore.copy import blocks
from vstore.copy.known import Contents, Digests, Key
from vstore.copy.manifest import Row, can_be_object, digest_of_xattrs, travelling
from vstore.copy.messages import SMALL
from vstore.copy.outline import Outline
from vstore.copy.packing import Listed, Packer
from vstore.copy.shelf import Inodes
from vstore.copy.table import Table
from vstore.digest import digest_content
from vstore.exclude import Excludes
from vstore.folders import Folder, Missed, join, walk_folders
from vstore.pool import Identity, Pool
from vstore.scan import open_below

_MIN_SIZE: Final = 16  # bytes, as vunify
_BLOCKS_AT_MOST: Final = 16 << 20  # bytes of digests of blocks
_UNREADABLE: Final = "cannot be read"
_VANISHED: Final = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ELOOP))
_NO_XATTRS: Final = frozenset((errno.EOPNOTSUPP, errno.ENOTSUP))

Path = bytes
"""Below a guest's root."""


Xattrs = Sequence[tuple[bytes, bytes]]

Firsts = dict[tuple[int, int], int]
"""The rows of the first names of inodes, by number and time of birth (ns): a number is given again
to another inode.
"""


@dataclass(slots=True)
class Found:
    """What a listing counted; `errors` are (path, reason)."""

    files: int = 0
    size: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    errors: list[tuple[Path, str]] = field(default_factory=list)

    def skip(self, reason: str) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + 1


class _Group(msgspec.Struct, array_like=True, gc=False):
    """An inode with several names: its first row, the folder and name of that, when it was made
    (ns), names to come.
    """

    first: int
    folder: bytes
    name: bytes
    birth: int
    names: int


_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(_Group).decode


class Listing:
    """Lists the tree behind `root_fd`. `rewritten`: contents that stand in for those of files."""

    def __init__(
        self,
        root_fd: int,
        pool: Pool | None,
        excludes: Excludes,
        *,
        rewritten: Mapping[bytes, bytes],
        is_still: bool,
        keeps_blocks: bool = False,
        keeps_contents: bool = False,
        outline: Outline | None = None,
    ) -> None:
        self.found = Found()
        self.packer = Packer(outline=outline)
        self.outline = outline
        self._root_fd = root_fd
        self._rewritten = rewritten
        self._is_still = is_still  # nothing writes to the tree: digests may be kept
        self._keeps_blocks = keeps_blocks
        self._is_stopped = False
        self._blocks: dict[Key, bytes] = {}  # digests of the blocks of some large files
        self._blocks_bytes = 0
        self._rules = excludes
        device = os.fstat(root_fd).st_dev
        self._pool_ino = os.fstat(pool.fd).st_ino if pool else 0
        has_objects = pool is not None and pool.device == device
        self._objects = Inodes(pool if has_objects else None)
        self._digests = Digests(pool if has_objects else None, root_fd)
        self._contents = Contents() if keeps_contents else None
        # nobody may ever list the other names: they are in a backup, or in other guests
        self._groups: Table[int, bytes] = Table()
        lease.ignore_break_signals()

    def close(self) -> None:
        """Keep the new digests for the next run."""
        self._digests.close()
        self._objects.close()
        self._groups.close()
        if self.outline is not None:
            self.outline.close()

    def stop(self) -> None:
        """What is being listed, in another thread, is of no use: come to an end soon."""
        self._is_stopped = True

    def _is_wanted(self) -> bool:
        return not self._is_stopped

    # --- batches

    def batches(self) -> Iterator[Listed]:
        """The whole tree."""
        missed = Missed()
        for folder in walk_folders(self._root_fd, missed, skip_ino=self._pool_ino):
            yield from self._list_mounts(missed)
            yield from self._list_folder(folder)
        yield from self._list_mounts(missed)
        self.found.errors += missed.errors
        yield from self.packer.end()
        self._digests.store()

    def _list_mounts(self, missed: Missed) -> Iterator[Listed]:
        """What the walk has just passed by: a folder in its place, as the copy has it."""
        while missed.mounts:
            self.found.skip("other-mount")
            row = Row(b"", stat.S_IFDIR | 0o755)
            yield from self.packer.add(missed.mounts.pop(0), row, None, is_shared=False)

    def again(self, path: bytes, firsts: Firsts) -> Iterator[Listed]:
        """The one file at `path` as it is now; nothing where it is gone. The batch comes when it is
        full, as from the packer. `firsts` are those that have been listed again.
        """
        folder, _, name = path.rpartition(b"/")
        try:
            fd = open_below(self._root_fd, folder)
        except OSError:
            return
        try:
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                self.found.errors.append((path, "was a file, and has become a folder meanwhile"))
            elif not stat.S_ISSOCK(status.st_mode):
                yield from self._list_again(fd, folder, name, status, firsts)
        except OSError as error:
            self._note(path, error)
        finally:
            os.close(fd)

    def _list_again(
        self,
        folder_fd: int,
        folder: bytes,
        name: bytes,
        status: os.stat_result,
        firsts: Firsts,
    ) -> Iterator[Listed]:
        has_more = status.st_nlink > 1
        key_of_inode = status.st_ino, inode.birth_time_ns(folder_fd, name) if has_more else 0
        if key_of_inode in firsts:
            link = self.packer.next_row - firsts[key_of_inode]
            row = Row(name, status.st_mode, link=link)
            yield from self.packer.add(folder, row, None, is_shared=False)
            return
        self._digests.load([status.st_ino])
        key = None
        if stat.S_ISREG(status.st_mode):
            row, key = self._list_file(folder_fd, join(folder, name), name, status)
        else:
            row = _row_of_other(folder_fd, name, status)
        if has_more:
            firsts[key_of_inode] = self.packer.next_row
        yield from self.packer.add(folder, row, key, is_shared=False, is_group=has_more)

    # --- rows

    def _list_folder(self, folder: Folder) -> Iterator[Listed]:
        try:
            xattrs = inode.load_xattrs(folder.fd)
        except OSError as error:
            self._note(folder.path, error)
            return
        row = _row_of(b"", folder.status, xattrs)
        row.size = 0
        yield from self.packer.add(folder.path, row, None, is_shared=False)
        rules: Excludes | _All = self._rules.below(b"/" + folder.path)
        if folder.path and self._rules and self._is_below_excluded(folder.path):
            rules = _ALL
        entries = [entry for entry in folder.entries if not entry.is_dir(follow_symlinks=False)]
        objects = [self._objects.find(entry.inode()) for entry in entries]
        pairs = list(zip(entries, objects, strict=True))
        self._digests.load([entry.inode() for entry, identity in pairs if identity is None])
        for entry, identity in pairs:
            yield from self._list_entry(folder, entry, identity, rules)

    def _is_below_excluded(self, path: bytes) -> bool:
        """Whether a folder on the way to `path`, or it itself, is excluded with all it holds."""
        at = len(path)
        while at > 0:
            if self._rules.is_excluded(b"/" + path[:at]):
                return True
            at = path.rfind(b"/", 0, at)
        return False

    def _list_entry(
        self,
        folder: Folder,
        entry: "os.DirEntry[str]",
        identity: Identity | None,
        rules: "Excludes | _All",
    ) -> Iterator[Listed]:
        name = os.fsencode(entry.name)
        path = join(folder.path, name)
        is_rewritten = path in self._rewritten  # and so no name of what it is in the source
        try:
            if identity is not None and not is_rewritten:
                row = self._row_of_object(folder.fd, name, identity)
                yield from self.packer.add(folder.path, row, None, is_shared=True)
                self._count(row)
                return
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISSOCK(status.st_mode):
                self.found.skip("socket")
                return
            birth = inode.birth_time_ns(folder.fd, name) if status.st_nlink > 1 else 0
            link = 0 if is_rewritten else self._find_group(status, birth, folder.path)
            if link:
                row, key = Row(name, status.st_mode, link=link), None
            elif stat.S_ISREG(status.st_mode):
                row, key = self._list_file(folder.fd, path, name, status)
            else:
                row, key = _row_of_other(folder.fd, name, status), None
        except OSError as error:
            self._note(path, error)
            return
        is_group = status.st_nlink > 1 and not link and not is_rewritten
        if is_group:
            group = _Group(self.packer.next_row, folder.path, name, birth, status.st_nlink - 1)
            self._groups.put(index.signed(status.st_ino), _encode(group))
        is_alone = status.st_nlink == 1 and can_be_object(row, min_size=_MIN_SIZE)
        is_shared = is_alone and not rules.is_excluded(b"/" + path)
        yield from self.packer.add(folder.path, row, key, is_shared=is_shared, is_group=is_group)
        self._count(row)

    def _find_group(self, status: os.stat_result, birth: int, folder: bytes) -> int:
        """How many rows back the first name of the same inode is; 0 for the first one."""
        ino = index.signed(status.st_ino)
        packed = self._groups.get(ino) if status.st_nlink > 1 else None
        if packed is None:
            return 0
        group = _decode(packed)
        if group.birth != birth:  # that one is gone, and another inode has its number
            return 0
        group.names -= 1
        if group.names:
            self._groups.put(ino, _encode(group))
        else:
            self._groups.drop(ino)
        if self.outline is not None and group.folder != folder:
            self.outline.tie(group.folder, group.name, folder)
        return self.packer.next_row - group.first

    def _row_of_object(self, folder_fd: int, name: bytes, identity: Identity) -> Row:
        xattrs: list[tuple[bytes, bytes]] = []
        if identity.xattrs:
            fd = os.open(name, inode.OPEN_TO_READ, dir_fd=folder_fd)
            try:
                xattrs = sorted(travelling(inode.load_xattrs(fd)).items())
            finally:
                os.close(fd)
        return Row(
            name,
            identity.mode,
            identity.uid,
            identity.gid,
            identity.mtime_ns,
            identity.size,
            identity.digest,
            xattrs,
        )

    def _list_file(
        self, folder_fd: int, path: bytes, name: bytes, status: os.stat_result
    ) -> tuple[Row, Key]:
        known = self._digests.find(_key_of(status))
        if known and not known.xattrs and path not in self._rewritten:
            row = _row_of(name, status, {})
            row.digest = known.content
            return row, _key_of(status)
        fd = os.open(name, inode.OPEN_TO_READ, dir_fd=folder_fd)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.ENOENT, "another kind of file has taken its place")
            xattrs = inode.load_xattrs(fd)
            row = _row_of(name, status, xattrs)
            if path in self._rewritten:
                content = self._rewritten[path]
                row.size, row.digest = len(content), blake3(content).digest()
            else:
                row.digest = self._digest(fd, status, list(xattrs.items()))
        finally:
            os.close(fd)
        return row, _key_of(status)

    def _digest(self, fd: int, status: os.stat_result, xattrs: Xattrs) -> bytes:
        key = _key_of(status)
        known = self._digests.find(key)
        if known:
            return known.content
        digest = self._digest_anew(fd, status, key, xattrs)
        if self._is_still:
            self._digests.see(key, digest)
        return digest

    def _digest_anew(self, fd: int, status: os.stat_result, key: Key, xattrs: Xattrs) -> bytes:
        is_settled = self._is_still and status.st_ctime_ns + index.SETTLED_NS < time.time_ns()
        is_leased = is_settled and _take_lease(fd)
        try:
            digest, content = self._read(fd, status)
            if _key_of(os.fstat(fd)) != key:
                return digest
            if content and self._contents is not None:
                self._contents.keep(key, content)
            if is_leased and self._is_wanted() and lease.is_unbroken(fd):
                self._digests.keep(key, digest, digest_of_xattrs(xattrs))
        finally:
            if is_leased:
                with suppress(OSError):
                    lease.release(fd)
        return digest

    def _read(self, fd: int, status: os.stat_result) -> tuple[bytes, bytes]:
        """The digest of the content, and that itself where it is likely to be asked for (b"" else);
        of a large file the digests of its blocks are kept on the way.
        """
        is_dense = status.st_blocks * 512 >= status.st_size
        if is_dense and status.st_size <= SMALL and self._contents is not None:
            content = os.pread(fd, status.st_size, 0)
            return blake3(content).digest(), content
        is_large = is_dense and status.st_size > blocks.LARGE
        if not self._keeps_blocks or not is_large or self._blocks_bytes >= _BLOCKS_AT_MOST:
            return digest_content(fd, status, wanted=self._is_wanted), b""
        block = blocks.choose_block(status.st_size)
        found = blocks.digest_both(fd, status.st_size, block, wanted=self._is_wanted)
        digest, self._blocks[_key_of(status)] = found
        self._blocks_bytes += len(found[1])
        return digest, b""

    def take_content(self, key: Key | None) -> bytes | None:
        """What the file with this key had in it when it was listed, if that is still known."""
        return self._contents.take(key) if self._contents is not None else None

    def drop_contents(self, batch: Listed) -> None:
        """The batch has been served."""
        if self._contents is not None:
            self._contents.drop(batch.keys)

    def known_blocks(self, fd: int) -> bytes:
        """The digests of the blocks of the file behind `fd`, of the size that is chosen for it;
        b"" where they were not kept.
        """
        return self._blocks.get(_key_of(os.fstat(fd)), b"")

    def digest_of(self, fd: int) -> bytes:
        """The digest of the file behind `fd`, which is not read again if nothing has touched it."""
        status = os.fstat(fd)
        seen = self._digests.find_seen(_key_of(status))
        if seen:
            return seen
        self._digests.load([status.st_ino])
        return self._digest(fd, status, list(inode.load_xattrs(fd).items()))

    def _count(self, row: Row) -> None:
        if stat.S_ISREG(row.mode):
            self.found.files += 1
            self.found.size += row.size

    def _note(self, path: bytes, error: OSError) -> None:
        if error.errno not in _VANISHED:
            self.found.errors.append((path, f"{_UNREADABLE}: {error.strerror}"))


class _All:
    """The rules of a folder that is excluded: nothing in it is shared."""

    def is_excluded(self, path: bytes) -> bool:
        return True


_ALL: Final = _All()


def _take_lease(fd: int) -> bool:
    try:
        return lease.take(fd)
    except OSError:
        return False


def _key_of(status: os.stat_result) -> Key:
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _row_of(name: bytes, status: os.stat_result, xattrs: Mapping[bytes, bytes]) -> Row:
    return Row(
        name,
        status.st_mode,
        status.st_uid,
        status.st_gid,
        status.st_mtime_ns,
        status.st_size,
        b"",
        sorted(travelling(xattrs).items()),
    )


def _row_of_other(folder_fd: int, name: bytes, status: os.stat_result) -> Row:
    """The row of a symlink, device or FIFO."""
    place = b"/proc/self/fd/%d/%s" % (folder_fd, name)
    xattrs: dict[bytes, bytes] = {}
    try:
        for key in os.listxattr(place, follow_symlinks=False):
            xattrs[os.fsencode(key)] = os.getxattr(place, key, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_XATTRS:
            raise
    row = _row_of(name, status, xattrs)
    row.size = 0
    if stat.S_ISLNK(status.st_mode):
        row.text = os.readlink(name, dir_fd=folder_fd)
        row.mode = stat.S_IFLNK | 0o777
    elif stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
        row.rdev = status.st_rdev
    return row


def measure(root_fd: int) -> tuple[int, int]:
    """About how many entries a tree has, and how many bytes of files: at most what may travel."""
    rows = size = 0
    groups: set[int] = set()
    for folder in walk_folders(root_fd, Missed()):
        rows += 1
        for entry in folder.entries:
            if entry.is_dir(follow_symlinks=False):
                continue
            rows += 1
            with suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(status.st_mode) and status.st_ino not in groups:
                    size += min(status.st_size, status.st_blocks * 512)
                    if status.st_nlink > 1:
                        groups.add(status.st_ino)
    return rows, size
