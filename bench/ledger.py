"""What there is to gain in a set of trees, counted without the program that is to gain it.

Two files that `hardlink` makes one may be two for `vunify` on purpose. How many bytes that is,
reason by reason, is worked out here from the trees alone, so that a report can say what a smaller
gain is made of.
"""

import hashlib
import os
import stat
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_BLOCK: Final = 512
"""Unit of st_blocks, whatever the file system's own blocks are. See inode(7)."""
_PIECE: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class File:
    """One inode of a guest with all that equality can mean."""

    guest: int
    names: int
    size: int
    allocated: int
    content: bytes
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    xattrs: bytes


@dataclass(frozen=True, slots=True)
class Ledger:
    """A set of trees in numbers; all sizes are bytes."""

    guests: int
    files: int
    """Names of regular files."""
    apparent_bytes: int
    allocated_bytes: int
    linked_files: int
    """Inodes with several names in one guest."""
    twin_files: int
    """Files that equal another one of the same guest."""
    hardlink_bytes: int
    """What making one inode of all that `hardlink` holds equal sets free."""
    linked_bytes: int
    """Of that: inodes with several names in one guest, which stay alone."""
    twin_bytes: int
    """Of the rest: twins, which stay as many inodes as the guest with most of them has."""
    attribute_bytes: int
    """Of the rest: equal but for xattrs or for times that differ by less than a second."""

    @property
    def vunify_bytes(self) -> int:
        """What is left for a program that keeps those apart."""
        return self.hardlink_bytes - self.linked_bytes - self.twin_bytes - self.attribute_bytes


def take_stock(trees: Sequence[Path]) -> Ledger:
    """Read all of `trees` and count; a tree is one guest."""
    with ProcessPoolExecutor() as workers:
        found = workers.map(_list_files, range(len(trees)), trees)
        return count([file for files in found for file in files], guests=len(trees))


def count(files: Sequence[File], *, guests: int) -> Ledger:
    """The ledger of `files`."""
    several = [file for file in files if file.size]
    single = [file for file in several if file.names == 1]
    as_hardlink = _gain(several, _loose_key)
    unlinked = _gain(single, _loose_key)
    untwinned = _gain(single, _loose_key, keeps_twins=True)
    twins = Counter((file.guest, _strict_key(file)) for file in single)
    return Ledger(
        guests=guests,
        files=sum(file.names for file in files),
        apparent_bytes=sum(file.size for file in files),
        allocated_bytes=sum(file.allocated for file in files),
        linked_files=sum(file.names > 1 for file in files),
        twin_files=sum(number for number in twins.values() if number > 1),
        hardlink_bytes=as_hardlink,
        linked_bytes=as_hardlink - unlinked,
        twin_bytes=unlinked - untwinned,
        attribute_bytes=untwinned - _gain(single, _strict_key, keeps_twins=True),
    )


def _loose_key(file: File) -> Hashable:
    """Equal for hardlink(1): it compares times by the second and leaves xattrs alone."""
    return file.content, file.size, file.mode, file.uid, file.gid, file.mtime_ns // 1_000_000_000


def _strict_key(file: File) -> Hashable:
    return file.content, file.size, file.mode, file.uid, file.gid, file.mtime_ns, file.xattrs


def _gain(
    files: Iterable[File], key: Callable[[File], Hashable], *, keeps_twins: bool = False
) -> int:
    """Bytes set free when equal files become one inode, or as many as any one guest has of them."""
    classes: defaultdict[Hashable, list[File]] = defaultdict(list)
    for file in files:
        classes[key(file)].append(file)
    gained = 0
    for equal in classes.values():
        kept = max(Counter(file.guest for file in equal).values()) if keeps_twins else 1
        gained += sum(file.allocated for file in equal) * (len(equal) - kept) // len(equal)
    return gained


def fingerprints(trees: Sequence[Path]) -> list[bytes]:
    """One digest a tree: of every file's name, content, mode, owner, mtime and xattrs."""
    with ProcessPoolExecutor() as workers:
        return list(workers.map(_fingerprint, trees))


def count_files(trees: Sequence[Path]) -> int:
    """Names of regular files in all of `trees`."""
    return sum(1 for tree in trees for _ in _walk(tree))


def allocated(trees: Sequence[Path]) -> int:
    """Bytes that the regular files of all `trees` take up; an inode counts once."""
    blocks = {
        (status.st_dev, status.st_ino): status.st_blocks
        for tree in trees
        for _, status in _walk(tree)
    }
    return sum(blocks.values()) * _BLOCK


def read_all(trees: Sequence[Path]) -> None:
    """Look at every file and read it, so that the caches are warm."""
    with ProcessPoolExecutor() as workers:
        for _ in workers.map(_read_tree, trees):
            pass


def _list_files(guest: int, tree: Path) -> list[File]:
    seen: dict[int, tuple[Path, os.stat_result]] = {}
    names: Counter[int] = Counter()
    for path, status in _walk(tree):
        seen.setdefault(status.st_ino, (path, status))
        names[status.st_ino] += 1
    return [_file(guest, names[inode], *entry) for inode, entry in seen.items()]


def _file(guest: int, names: int, path: Path, status: os.stat_result) -> File:
    return File(
        guest=guest,
        names=names,
        size=status.st_size,
        allocated=status.st_blocks * _BLOCK,
        content=_content(path),
        mode=status.st_mode,
        uid=status.st_uid,
        gid=status.st_gid,
        mtime_ns=status.st_mtime_ns,
        xattrs=_xattrs(path),
    )


def _walk(tree: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Every regular file below `tree`, in a fixed order."""
    for folder, folders, names in os.walk(tree):
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                yield path, status


def _content(path: Path) -> bytes:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").digest()[:20]


def _xattrs(path: Path) -> bytes:
    names = sorted(os.listxattr(path, follow_symlinks=False))
    return b"".join(
        os.fsencode(name) + b"=" + os.getxattr(path, name, follow_symlinks=False) for name in names
    )


def _fingerprint(tree: Path) -> bytes:
    whole = hashlib.blake2b(digest_size=20)
    for path, status in _walk(tree):
        facts = (status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, status.st_size)
        name = os.fsencode(path.relative_to(tree))
        whole.update(b"\0".join((name, repr(facts).encode(), _content(path), _xattrs(path))))
    return whole.digest()


def _read_tree(tree: Path) -> None:
    buffer = bytearray(_PIECE)
    for path, _ in _walk(tree):
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
