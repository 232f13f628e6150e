"""Unpack a tar archive of anybody's into a folder, and nowhere else.

The tree is entered from its root by descriptor, one component after the other and never through a
symlink or onto another file system, so a name cannot lead out of it. What a system's archive does
not hold is refused, not mended: absolute names, `..`, names below symlinks, hard links to anything
but files, devices unless they are asked for, two members of one name. Memory does not grow with the
archive, and a file for which there is no room is noticed before it is written.

Owners are numbers: what a name means only the guest knows.
"""

import errno
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vrun import acl
from vrun.compression import unpacked
from vrun.errors import ConfigInvalid, NoSpace
from vrun.tarball import Kind, Member, TarReader
from vstore import inode
from vstore.render import show_name
from vstore.scan import open_below

_NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_LOOK: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_LARGE: Final = 16 << 20  # bytes of a file before which it is asked whether there is room
_LONGEST_NAME: Final = 1 << 16
_NO_ROOM: Final = frozenset((errno.ENOSPC, errno.EDQUOT))
_NO_XATTR: Final = frozenset((errno.EOPNOTSUPP, errno.EPERM, errno.EINVAL))
_CAPABILITIES: Final = b"security.capability"


@dataclass(slots=True)
class Unpacked:
    """What an archive held: how many of each kind, bytes of files, what was passed over."""

    counts: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(Kind, 0))
    size: int = 0
    passed_over: dict[str, int] = field(default_factory=dict)
    has_more: bool = False
    """There is something behind the end mark, another archive perhaps; it was not unpacked."""

    def pass_over(self, what: str) -> None:
        self.passed_over[what] = self.passed_over.get(what, 0) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What an archive may do. `without` names folders of the root of which nothing is unpacked."""

    with_devices: bool = False
    may_replace: bool = False  # entries that are there already, but never a folder by anything else
    without: frozenset[bytes] = frozenset()


def unpack(archive: Path, root_fd: int, rules: Rules) -> Unpacked:
    """Unpack `archive`, compressed or not, into the folder behind `root_fd`.

    When it raises, what was unpacked so far is there. Raises ConfigInvalid with the member's name
    for what is refused, NoSpace, OSError for an archive that cannot be opened.
    """
    result = Unpacked()
    member: Member | None = None
    with archive.open("rb", buffering=0) as file:
        try:
            with unpacked(file) as source:
                reader = TarReader(source)
                tree = _Tree(root_fd)
                try:
                    for member in reader.members():
                        _unpack_member(member, reader, tree, rules, result)
                    member = None
                    result.has_more = reader.finish()
                finally:
                    tree.close()
        except (ValueError, OSError) as error:
            raise _refused(archive, member, error) from error
    return result


def _refused(archive: Path, member: Member | None, error: Exception) -> Exception:
    where = f"{archive}: {show_name(member.name)}" if member else f"{archive}"
    if isinstance(error, OSError):
        if error.errno in _NO_ROOM:
            return NoSpace(f"{where}: no room to unpack it: {error.strerror}")
        return ConfigInvalid(f"{where}: cannot be unpacked: {error.strerror}")
    return ConfigInvalid(f"{where}: {error}")


def _unpack_member(
    member: Member, reader: TarReader, tree: "_Tree", rules: Rules, result: Unpacked
) -> None:
    parts = _split(member.name)
    if len(parts) > 1 and parts[0] in rules.without:
        result.pass_over(f"below {os.fsdecode(parts[0])}")
        return
    if not parts:
        if member.kind is not Kind.FOLDER:
            raise ValueError(f"is {member.kind.value} in the place of the root")
        tree.enter(())
        tree.settle_here(member, result)
        return
    if member.kind in (Kind.CHARACTER, Kind.BLOCK) and not rules.with_devices:
        raise ValueError(f"is {member.kind.value}; those are unpacked only when asked for")
    tree.enter(parts[:-1])
    name = parts[-1]
    if member.kind is not Kind.FOLDER:
        tree.make_room_for(name, may_replace=rules.may_replace)
    _MAKERS[member.kind](tree, name, member, reader, result)
    result.counts[member.kind] += 1


def _split(name: bytes) -> tuple[bytes, ...]:
    """The components of a member's name; none for the root. Raises ValueError for a refused one."""
    if not name or len(name) > _LONGEST_NAME:
        raise ValueError(f"has a name of {len(name)} bytes")
    if name.startswith(b"/"):
        raise ValueError("has an absolute name")
    parts = tuple(part for part in name.split(b"/") if part not in (b"", b"."))
    if b".." in parts:
        raise ValueError("has .. in its name")
    return parts


@dataclass(slots=True)
class _Level:
    """A folder on the way down: its name, its identity, and the times it gets back when left."""

    name: bytes
    key: tuple[int, int]
    times: tuple[int, int]


class _Tree:
    """A place in the tree that grows: one descriptor, and what lies above it."""

    def __init__(self, root_fd: int) -> None:
        self.fd = os.open(".", inode.OPEN_FOLDER, dir_fd=root_fd)
        self._root_fd = root_fd
        self._device = os.fstat(root_fd).st_dev
        self._levels = [self._level(b"")]

    def _level(self, name: bytes) -> _Level:
        status = os.fstat(self.fd)
        return _Level(
            name, (status.st_dev, status.st_ino), (status.st_atime_ns, status.st_mtime_ns)
        )

    def close(self) -> None:
        """Leave every folder; their times are what the archive says."""
        with suppress(ValueError):
            self.enter(())
        os.utime(self.fd, ns=self._levels[0].times)
        os.close(self.fd)

    def enter(self, parts: Sequence[bytes]) -> None:
        """Go to the folder of this path, made where it is missing.

        Raises ValueError where a symlink or anything else that is no folder stands in the way.
        """
        here = [level.name for level in self._levels[1:]]
        shared = 0
        for ours, theirs in zip(here, parts, strict=False):
            if ours != theirs:
                break
            shared += 1
        for _ in range(len(here) - shared):
            self._go_up()
        for name in parts[shared:]:
            self._go_down(name)

    def _go_up(self) -> None:
        os.utime(self.fd, ns=self._levels.pop().times)
        above = os.open("..", inode.OPEN_FOLDER, dir_fd=self.fd)
        os.close(self.fd)
        self.fd = above
        if self._level(b"").key != self._levels[-1].key:
            raise ValueError("its folder was moved while it was unpacked")

    def _go_down(self, name: bytes) -> None:
        fd = self._open_folder(name)
        os.close(self.fd)
        self.fd = fd
        self._levels.append(self._level(name))

    def _open_folder(self, name: bytes) -> int:
        """The folder `name` of the present one, made where it is missing."""
        is_new = True
        try:
            os.mkdir(name, 0o700, dir_fd=self.fd)
        except FileExistsError:
            is_new = False
        try:
            fd = os.open(name, inode.OPEN_FOLDER, dir_fd=self.fd)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                raise
            raise ValueError(f"{show_name(name)} is no folder, but a symlink or a file") from error
        if is_new:
            os.fchmod(fd, 0o755)  # whatever our umask is
        elif os.fstat(fd).st_dev != self._device:
            os.close(fd)
            raise ValueError(f"{show_name(name)} is another file system")
        return fd

    def make_room_for(self, name: bytes, *, may_replace: bool) -> None:
        """See that nothing has the name. Raises ValueError where something keeps it."""
        try:
            mode = os.stat(name, dir_fd=self.fd, follow_symlinks=False).st_mode
        except FileNotFoundError:
            return
        if stat.S_ISDIR(mode):
            raise ValueError("has the name of a folder that is there already")
        if not may_replace:
            raise ValueError("comes twice")
        try:
            os.unlink(name, dir_fd=self.fd)
        except PermissionError as error:
            raise ValueError(
                "cannot take the place of a file that is frozen, as those are that guests share"
            ) from error

    # --- one of each kind

    def make_file(self, name: bytes, member: Member, reader: TarReader, result: Unpacked) -> None:
        if member.size >= _LARGE:
            self._check_room(reader.stored)
        fd = os.open(name, _NEW_FILE, 0o600, dir_fd=self.fd)
        try:
            end = 0
            for offset, data in reader.pieces():
                _write_all(fd, data, offset)
                end = offset + len(data)
            if end < member.size:
                os.ftruncate(fd, member.size)
            _settle(fd, member, result)
        finally:
            os.close(fd)
        result.size += member.size

    def make_folder(self, name: bytes, member: Member, reader: TarReader, result: Unpacked) -> None:
        fd = self._open_folder(name)
        try:
            _settle(fd, member, result)
        finally:
            os.close(fd)

    def make_link(self, name: bytes, member: Member, reader: TarReader, result: Unpacked) -> None:
        """A second name for a file that is there. The target is found without following links."""
        try:
            *parents, last = _split(member.link) or (b".",)
        except ValueError as error:
            raise ValueError(_no_target(member, f"it {error}")) from error
        try:
            folder_fd = open_below(self._root_fd, b"/".join(parents))
        except OSError as error:
            raise ValueError(_no_target(member, error.strerror)) from error
        try:
            mode = os.stat(last, dir_fd=folder_fd, follow_symlinks=False).st_mode
            if not stat.S_ISREG(mode):
                raise ValueError(_no_target(member, "it is no regular file"))
            os.link(last, name, src_dir_fd=folder_fd, dst_dir_fd=self.fd, follow_symlinks=False)
        except OSError as error:
            raise ValueError(_no_target(member, error.strerror)) from error
        finally:
            os.close(folder_fd)

    def make_symlink(
        self, name: bytes, member: Member, reader: TarReader, result: Unpacked
    ) -> None:
        if not member.link:
            raise ValueError("is a symlink to nothing")
        os.symlink(member.link, name, dir_fd=self.fd)
        os.chown(name, member.uid, member.gid, dir_fd=self.fd, follow_symlinks=False)
        times = (member.mtime_ns, member.mtime_ns)
        os.utime(name, ns=times, dir_fd=self.fd, follow_symlinks=False)

    def make_special(
        self, name: bytes, member: Member, reader: TarReader, result: Unpacked
    ) -> None:
        kind = {Kind.CHARACTER: stat.S_IFCHR, Kind.BLOCK: stat.S_IFBLK}.get(
            member.kind, stat.S_IFIFO
        )
        os.mknod(name, kind | 0o600, os.makedev(*member.device), dir_fd=self.fd)
        os.chown(name, member.uid, member.gid, dir_fd=self.fd, follow_symlinks=False)
        fd = os.open(name, _LOOK, dir_fd=self.fd)
        try:
            os.chmod(f"/proc/self/fd/{fd}", member.mode)  # noqa: PTH101 - what we have just made
        finally:
            os.close(fd)
        times = (member.mtime_ns, member.mtime_ns)
        os.utime(name, ns=times, dir_fd=self.fd, follow_symlinks=False)

    # --- metadata

    def settle_here(self, member: Member, result: Unpacked) -> None:
        """Give the present folder the owner, mode and times of its member."""
        _settle(self.fd, member, result)
        self._levels[-1].times = (member.mtime_ns, member.mtime_ns)

    def _check_room(self, size: int) -> None:
        status = os.fstatvfs(self.fd)
        if size > status.f_bavail * status.f_frsize:
            raise OSError(errno.ENOSPC, f"it has {size} bytes, more than are free")


_MAKERS: Final = {
    Kind.FILE: _Tree.make_file,
    Kind.FOLDER: _Tree.make_folder,
    Kind.HARD_LINK: _Tree.make_link,
    Kind.SYMLINK: _Tree.make_symlink,
    Kind.CHARACTER: _Tree.make_special,
    Kind.BLOCK: _Tree.make_special,
    Kind.FIFO: _Tree.make_special,
}


def _no_target(member: Member, reason: str | None) -> str:
    return f"cannot be a link to {show_name(member.link)}: {reason}"


def _write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def _settle(fd: int, member: Member, result: Unpacked) -> None:
    """Owner, mode, attributes and times, in the order that keeps them: a change of owner takes
    setuid bits and file capabilities away.
    """
    os.fchown(fd, member.uid, member.gid)
    os.fchmod(fd, member.mode)
    _put_xattrs(fd, member, result)
    os.utime(fd, ns=(member.mtime_ns, member.mtime_ns))


def _put_xattrs(fd: int, member: Member, result: Unpacked) -> None:
    for name in os.listxattr(fd):
        if os.fsencode(name) in (acl.ACCESS, acl.DEFAULT):  # those that the folder above handed on
            os.removexattr(fd, name)
            os.fchmod(fd, member.mode)
    for key, value in _wanted_xattrs(member, result).items():
        try:
            os.setxattr(fd, key, value)
        except OSError as error:
            if error.errno not in _NO_XATTR:
                raise
            result.pass_over(f"attribute {os.fsdecode(key)}")


def _wanted_xattrs(member: Member, result: Unpacked) -> dict[bytes, bytes]:
    """ACLs, file capabilities and what users set; labels and `trusted` ones are the host's own."""
    wanted = {}
    for key, value in member.xattrs.items():
        if key.startswith(b"user.") or key in (_CAPABILITIES, acl.ACCESS, acl.DEFAULT):
            wanted[key] = value
        else:
            result.pass_over(f"attribute {show_name(key)}")
    for key, text in member.acls.items():
        name = acl.ACCESS if key == b"access" else acl.DEFAULT
        if name in wanted or (key == b"default" and member.kind is not Kind.FOLDER):
            continue
        packed = acl.pack_acl(text)
        if packed is None:
            result.pass_over("ACL with names")
        else:
            wanted[name] = packed
    return wanted
