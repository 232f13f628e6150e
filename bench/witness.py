"""A witness that shares no code with what it is to speak for: what is in some trees, as one digest.

It walks with os.scandir and reads with open(2); nothing of vstore or vrun takes part.
"""

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path


def digest_trees(roots: Sequence[Path]) -> str:
    """SHA-256, in hex, over everything that is in the trees and that a guest can see: names, kinds,
    modes, owners, sizes, mtimes in ns, device numbers, targets, xattrs (ACLs are some), contents.

    What unifying and reading change is left out: inode numbers, link counts, other times. The bytes
    of an inode are read once, however many names it has.
    """
    whole = hashlib.sha256()
    contents: dict[tuple[int, int], bytes] = {}
    for root in roots:
        for path, status in _walk(os.fsencode(root)):
            kind = stat.S_IFMT(status.st_mode)
            size = status.st_size if kind == stat.S_IFREG else 0
            fields = (status.st_mode, status.st_uid, status.st_gid, size, status.st_mtime_ns)
            whole.update(repr((path[len(os.fsencode(root)) :], *fields, status.st_rdev)).encode())
            for name in sorted(os.listxattr(path, follow_symlinks=False)):
                value = os.getxattr(path, name, follow_symlinks=False)
                whole.update(repr((name, value)).encode())
            if kind == stat.S_IFLNK:
                whole.update(os.readlink(path))  # noqa: PTH115 (bytes)
            elif kind == stat.S_IFREG:
                inode = (status.st_dev, status.st_ino)
                if inode not in contents:
                    contents[inode] = _digest_file(path)
                whole.update(contents[inode])
    return whole.hexdigest()


def _walk(folder: bytes) -> Iterator[tuple[bytes, os.stat_result]]:
    """Everything below the folder, and itself, in the order of the names."""
    yield folder, os.lstat(folder)
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path)
        else:
            yield entry.path, entry.stat(follow_symlinks=False)


def _digest_file(path: bytes) -> bytes:
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123 (bytes)
        return hashlib.file_digest(file, "sha256").digest()
