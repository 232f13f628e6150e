"""The pool: shared inodes that describe themselves by their names.

An inode is an object if it is immutable and a name below `objects` has its number. The name holds
everything that identity means, so the pool needs no other record, and nothing is lost with the
index.
"""

import errno
import fcntl
import logging
import os
import stat
import time
from array import array
from bisect import bisect_left
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

from blake3 import blake3

from vstore import inode
from vstore.errors import (
    FormatUnknown,
    NoSpace,
    NotPermitted,
    PoolBusy,
    PoolCorrupt,
    ToolError,
    WrongUsage,
)

log = logging.getLogger(__name__)

FORMAT: Final = "vserver-tools pool 1\n"
POOL_NAME: Final = ".pool"
WAIT_S: Final = 600.0
_POLL_S: Final = 0.01
FOLDERS: Final = tuple(f"{number:02x}" for number in range(256))
"""Below `objects`."""


class Identity(NamedTuple):
    """What makes two files equal.

    `digest` is BLAKE3 of the content, `xattrs` of the sorted xattrs (empty: none).
    """

    digest: bytes
    size: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    xattrs: bytes

    def name(self, number: int) -> str:
        """The object's path below `objects`.

        That is `3f/<digest>.<size>.<mode>.<uid>.<gid>.<mtime_ns>.<xattrs>-<n>`.
        """
        text = self.digest.hex()
        return f"{text[:2]}/{text}.{state_metadata(*self[1:])}-{number}"


def find_file_system(path: Path) -> str:
    """The kind of file system ("xfs") that `path` is on; see proc_pid_mountinfo(5)."""
    fd = os.open(path, os.O_PATH)
    try:
        mount = str(find_mount_id(fd))
    finally:
        os.close(fd)
    for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
        fields = line.split()
        if fields[0] == mount:
            return fields[fields.index("-") + 1]
    return ""


def parse_object(name: str) -> tuple[Identity, int]:
    """The identity and the number that an object's name (without its folder) states.

    Raises ValueError.
    """
    digest, size, mode, uid, gid, mtime_ns, rest = name.split(".")
    xattrs, number = rest.split("-")
    identity = Identity(
        bytes.fromhex(digest),
        int(size),
        int(mode, 8),
        int(uid),
        int(gid),
        int(mtime_ns),
        b"" if xattrs == "0" else bytes.fromhex(xattrs),
    )
    return identity, int(number)


def state_metadata(size: int, mode: int, uid: int, gid: int, mtime_ns: int, xattrs: bytes) -> str:
    """All of an identity but the content, as an object's name states it."""
    return f"{size}.{mode:o}.{uid}.{gid}.{mtime_ns}.{xattrs.hex() or '0'}"


def find_metadata(name: str) -> str:
    """What an object's name (without its folder) states as `state_metadata` does; "" where it is no
    such name.
    """
    return name.partition(".")[2].rpartition("-")[0]


def load_metadata(fd: int) -> str:
    """What `state_metadata` states of the inode behind `fd`. Raises OSError."""
    status = os.fstat(fd)
    return state_metadata(
        status.st_size,
        status.st_mode,
        status.st_uid,
        status.st_gid,
        status.st_mtime_ns,
        digest_xattrs(fd),
    )


def digest_xattrs(fd: int) -> bytes:
    """BLAKE3 of the sorted extended attributes of the inode behind `fd`; empty when it has none.

    Raises OSError.
    """
    found = inode.load_xattrs(fd)
    if not found:
        return b""
    hasher = blake3()
    for name in sorted(found):
        for part in (name, found[name]):
            hasher.update(len(part).to_bytes(8, "little") + part)
    return hasher.digest()


class InodeNumbers:
    """A set of inode numbers in 8 bytes each, which forked workers share without copying."""

    def __init__(self, numbers: "array[int]") -> None:
        self._numbers = array("Q", sorted(numbers))

    def __len__(self) -> int:
        return len(self._numbers)

    def quick_set(self, limit: int) -> "Container[int]":
        """The same numbers as a frozenset where there are at most `limit`:

        quicker, and ten times as large.
        """
        return frozenset(self._numbers) if len(self._numbers) <= limit else self

    def __contains__(self, number: object) -> bool:
        if not isinstance(number, int):
            return False
        position = bisect_left(self._numbers, number)
        return position < len(self._numbers) and self._numbers[position] == number


class Pool:
    """Shared inodes of one file system.

    .pool/                  0700, root
    ├── format              version; an unknown one is refused
    ├── turn, lock          flocks: everybody passes `turn` before `lock`, which is shared to
    │                       unify and exclusive to reclaim
    ├── windows             byte ranges of it are the locks of objects, by inode number
    ├── index.sqlite        digest cache; can be thrown away at any time
    ├── stage/<random>/     a folder per running program, under its flock: spares, intents
    ├── quarantine/         objects whose bytes or state can no longer be trusted
    └── objects/3f/...      frozen; nlink - 1 is how many guest names use one
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd
        self.objects_fd = os.open("objects", inode.OPEN_FOLDER, dir_fd=fd)
        self.device = os.fstat(self.objects_fd).st_dev

    # --- finding it ---

    @classmethod
    def load(cls, path: Path) -> "Pool":
        """Open the pool at `path`.

        Raises WrongUsage when there is none, FormatUnknown for a newer one.
        """
        try:
            fd = os.open(path, inode.OPEN_FOLDER)
        except OSError as error:
            raise WrongUsage(
                f"{path}: no pool here: {error.strerror}",
                hint="vunify makes one; name another with --pool DIR",
            ) from error
        _check_format(path, fd)
        try:
            return cls(path, fd)
        except OSError as error:
            os.close(fd)
            raise PoolCorrupt(
                f"{path}: the pool cannot be opened: {error.strerror} ({error.filename})"
            ) from error

    @classmethod
    def create(cls, path: Path) -> "Pool":
        """Open the pool at `path`, made first if need be, on a file system that can freeze.

        Raises NotPermitted where files cannot be made immutable; as `load`.
        """
        if not os.path.lexists(path / "format"):
            _make(path)
        return cls.load(path)

    def close(self) -> None:
        for fd in (self.objects_fd, self.fd):
            os.close(fd)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- objects ---

    def list_objects(self) -> Iterator[tuple[str, int]]:
        """Every object's path below `objects` and its inode number, by readdir alone."""
        for folder in FOLDERS:
            for entry in self.scan_folder(folder):
                yield f"{folder}/{entry.name}", entry.inode()

    def scan_folder(self, folder: str) -> list[os.DirEntry[str]]:
        """The entries of one of the 256 folders; an absent one is empty."""
        try:
            fd = os.open(folder, inode.OPEN_FOLDER, dir_fd=self.objects_fd)
        except FileNotFoundError:
            return []
        try:
            with os.scandir(fd) as entries:
                return list(entries)
        finally:
            os.close(fd)

    def load_numbers(self) -> InodeNumbers:
        """The inode numbers of all objects."""
        numbers = array("Q")
        for folder in FOLDERS:
            numbers.extend([entry.inode() for entry in self.scan_folder(folder)])
        return InodeNumbers(numbers)

    def open_object(self, name: str) -> int:
        """A descriptor for reading the object at `name` below `objects`. Raises OSError."""
        return os.open(name, inode.OPEN_TO_READ, dir_fd=self.objects_fd)

    def quarantine(self, name: str, reason: str) -> str:
        """Take the thawed object at `name` out of use:

        nothing is linked to it again. Its guests keep their names. Returns its path below the pool.
        """
        with suppress(FileExistsError):
            os.mkdir("quarantine", 0o700, dir_fd=self.fd)
        target = os.open("quarantine", inode.OPEN_FOLDER, dir_fd=self.fd)
        try:
            kept = name.split("/")[1]
            if kept in os.listdir(target):  # noqa: PTH208 - by descriptor
                # An earlier object of the same name lies there: the number keeps them apart.
                number = os.stat(name, dir_fd=self.objects_fd, follow_symlinks=False).st_ino
                kept = f"{kept}~{number}"
            os.rename(name, kept, src_dir_fd=self.objects_fd, dst_dir_fd=target)
        finally:
            os.close(target)
        log.warning("object %s: %s; put in quarantine", name, reason)
        return f"quarantine/{kept}"

    # --- locks ---

    @contextmanager
    def share(self, *, wait_s: float = WAIT_S) -> Iterator[None]:
        """Hold the pool together with others that unify or copy.

        Raises PoolBusy after `wait_s` seconds.
        """
        with self._locked(fcntl.LOCK_SH, keep_turn=False, wait_s=wait_s):
            yield

    @contextmanager
    def exclude(self, *, wait_s: float = WAIT_S) -> Iterator[None]:
        """Hold the pool alone; whoever comes later waits.

        Raises PoolBusy after `wait_s` seconds.
        """
        with self._locked(fcntl.LOCK_EX, keep_turn=True, wait_s=wait_s):
            yield

    def is_waited_for(self) -> bool:
        """Whether somebody seems to wait for us, who share the pool, to hold it alone."""
        turn = os.open("turn", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=self.fd)
        try:
            fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(turn)
        return False

    @contextmanager
    def _locked(self, kind: int, *, keep_turn: bool, wait_s: float) -> Iterator[None]:
        deadline = time.monotonic() + wait_s
        turn = os.open("turn", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=self.fd)
        lock = os.open("lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=self.fd)
        try:
            self._flock(turn, fcntl.LOCK_EX, deadline)
            self._flock(lock, kind, deadline)
            if not keep_turn:
                fcntl.flock(turn, fcntl.LOCK_UN)
            yield
        finally:
            for fd in (lock, turn):
                fcntl.flock(fd, fcntl.LOCK_UN)  # a forked child may have a copy of the descriptor
                os.close(fd)

    def _flock(self, fd: int, kind: int, deadline: float) -> None:
        while True:
            try:
                fcntl.flock(fd, kind | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise PoolBusy(
                        f"{self.path}: another program holds the pool",
                        hint="wait until it is done; fuser -v on the pool's file `lock` names it",
                    ) from error
                time.sleep(_POLL_S)

    # --- stage ---

    @contextmanager
    def stage(self, count: int = 1) -> Iterator[list[int]]:
        """A folder of this program's own with `count` folders in it, one per worker; yields their
        descriptors.

        The folder's flock says that we live: it is inherited by our workers and gone with the last
        of us. Afterwards the folders are removed, unless something is left in them that `recovery`
        has to look at.
        """
        with self.locked_stage(count) as (_, folders):
            yield folders

    @contextmanager
    def locked_stage(self, count: int) -> Iterator[tuple[int, list[int]]]:
        """As `stage`, with the descriptor of the folder whose flock it is, for a worker that is to
        outlive us.
        """
        name, top = self._make_stage()
        folders: list[int] = []
        try:
            for number in range(count):
                os.mkdir(str(number), 0o700, dir_fd=top)
                folders.append(os.open(str(number), inode.OPEN_FOLDER, dir_fd=top))
            yield top, folders
        finally:
            for number in range(count):
                with suppress(OSError):
                    os.rmdir(str(number), dir_fd=top)
            with suppress(OSError):
                os.rmdir(name, dir_fd=self.fd)
            for fd in (*folders, top):
                os.close(fd)

    def _make_stage(self) -> tuple[str, int]:
        """A new folder below `stage`, under its flock: its name and descriptor.

        Until it has the flock, a program that recovers may take it for a dead one's and remove it.
        """
        with suppress(FileExistsError):
            os.mkdir("stage", 0o700, dir_fd=self.fd)
        while True:
            name = f"stage/{os.urandom(8).hex()}"
            os.mkdir(name, 0o700, dir_fd=self.fd)
            with suppress(FileNotFoundError):
                top = os.open(name, inode.OPEN_FOLDER, dir_fd=self.fd)
                fcntl.flock(top, fcntl.LOCK_EX)
                if _is_at(name, self.fd, top):
                    return name, top
                os.close(top)


def _is_at(name: str, folder_fd: int, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(name, dir_fd=folder_fd), os.fstat(fd))
    except FileNotFoundError:
        return False


def _check_format(path: Path, fd: int) -> None:
    try:
        format_fd = os.open("format", inode.OPEN_TO_READ, dir_fd=fd)
        try:
            found = os.read(format_fd, 256).decode(errors="replace")
        finally:
            os.close(format_fd)
    except FileNotFoundError as error:
        os.close(fd)
        raise WrongUsage(
            f"{path}: no pool here: it has no file `format`",
            hint="name the right folder with --pool DIR; where vunify is just making it, run this "
            "again",
        ) from error
    except OSError as error:
        os.close(fd)
        raise PoolCorrupt(
            f"{path}: not a pool: its file `format` cannot be read: {error.strerror}",
            hint="name the right folder with --pool DIR",
        ) from error
    if found != FORMAT:
        os.close(fd)
        raise FormatUnknown(
            f"{path}: the pool has the format {found.strip()!r}, "
            f"this version knows {FORMAT.strip()!r}",
            hint="use the version that made it, or a newer one",
        )


def _make(path: Path) -> None:
    try:
        path.mkdir(0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
        fd = os.open(path, inode.OPEN_FOLDER)
    except OSError as error:
        raise _not_made(path, error) from error
    try:
        _probe_immutable(path, fd)
        for folder in ("objects", *(f"objects/{name}" for name in FOLDERS)):
            with suppress(FileExistsError):
                os.mkdir(folder, 0o700, dir_fd=fd)
        _write_format(fd)
    except OSError as error:
        raise _not_made(path, error) from error
    finally:
        os.close(fd)


def _not_made(path: Path, error: OSError) -> ToolError:
    kind = NoSpace if error.errno in (errno.ENOSPC, errno.EDQUOT) else WrongUsage
    hint = "free some space" if kind is NoSpace else "name another folder with --pool DIR"
    return kind(f"{path}: the pool cannot be made: {error.strerror}", hint=hint)


def _write_format(fd: int) -> None:
    spare = f"format-{os.urandom(8).hex()}"
    spare_fd = os.open(spare, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=fd)
    try:
        os.write(spare_fd, FORMAT.encode())
        os.fsync(spare_fd)
    finally:
        os.close(spare_fd)
    os.rename(spare, "format", src_dir_fd=fd, dst_dir_fd=fd)


def _probe_immutable(path: Path, folder_fd: int) -> None:
    """Freeze a nameless file: the proof that this file system can protect objects."""
    try:
        fd = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o600, dir_fd=folder_fd)
        try:
            inode.set_immutable(fd)
            frozen = inode.is_immutable(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise NotPermitted(
            f"{path}: files cannot be made immutable here: {error.strerror}",
            hint="put guests and pool on ext4, xfs or btrfs; run as root with CAP_LINUX_IMMUTABLE",
        ) from error
    if not frozen:
        raise NotPermitted(f"{path}: this file system takes the immutable flag and forgets it")


def find_mount_id(fd: int) -> int:
    """The mount that the folder behind `fd` was opened on; links and renames stay within one."""
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text(encoding="ascii").splitlines():
        if line.startswith("mnt_id:"):
            return int(line.split()[1])
    raise OSError(errno.ENOTSUP, "/proc does not say which mount a folder is on")


def is_regular(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode)
