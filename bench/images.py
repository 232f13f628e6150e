"""Throw-away file systems in image files, each program's trees on a fresh one.

Nothing is left behind however a run ends: an image has no name in any folder, its loop device
detaches itself with the last unmount, and the mounts live in a mount namespace of this process. A
tree that `vunify` froze needs no thawing either: it vanishes with its image.
"""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Final

from bench.calls import call

log = logging.getLogger(__name__)

_IN_NAMESPACE: Final = "VBENCH_MOUNTS"
_UNMOUNT_TRIES: Final = 50

FILE_SYSTEMS: Final = ("xfs", "ext4", "btrfs")

# What a first mount would do in the background, in the middle of a timed run, is done by mkfs.
_MKFS: Final = {
    "xfs": ["mkfs.xfs", "-q", "-f"],
    "ext4": ["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
}
_OPTIONS: Final = {"xfs": "loop,noatime,nouuid", "ext4": "loop,noatime", "btrfs": "loop,noatime"}


@dataclass(frozen=True, slots=True)
class Image:
    """An image file without a name; closing `fd` frees it."""

    fd: int
    file_system: str


def enter_mount_namespace(arguments: list[str]) -> None:
    """Start this program again below unshare(1), unless that was done; then return.

    exec keeps the process number, so the number in the environment tells the second start from a
    child's first.
    """
    if os.environ.get(_IN_NAMESPACE) == str(os.getpid()):
        return
    os.environ[_IN_NAMESPACE] = str(os.getpid())
    again = [sys.executable, "-m", "bench", *arguments]
    private = ["unshare", "--mount", "--propagation", "private"]
    os.execvp(private[0], [*private, *again])  # noqa: S606 (a shell is what we do not want)


@contextmanager
def new_image(
    work: Path, file_system: str, *, size: int, inodes: int
) -> Iterator[tuple[Image, Path]]:
    """An empty file system of `size` bytes, and where it is mounted while the block runs.

    The image outlives the block; close its descriptor when done.
    """
    with TemporaryFile(dir=work) as file:
        file.truncate(size)
        inode_option = ["-N", str(inodes)] if file_system == "ext4" else []
        call(*_MKFS[file_system], *inode_option, _name(file.fileno()))
        with _mounted(file.fileno(), work, file_system) as root:
            yield Image(os.dup(file.fileno()), file_system), root


@contextmanager
def fresh_copy(image: Image, work: Path, *, is_cold: bool = False) -> Iterator[Path]:
    """Mount a copy of `image`, and give where. `is_cold`: nothing of it is in the page cache."""
    with TemporaryFile(dir=work) as file:
        _copy_image(image.fd, file.fileno(), is_cold=is_cold)
        with _mounted(file.fileno(), work, image.file_system) as root:
            yield root


def _name(fd: int) -> str:
    """What another program can open a file of ours by that has no name."""
    return f"/proc/{os.getpid()}/fd/{fd}"


def _copy_image(source_fd: int, fd: int, *, is_cold: bool) -> None:
    for start, end in _extents(source_fd):
        while start < end:
            start += os.copy_file_range(source_fd, fd, end - start, start, start)
    os.ftruncate(fd, os.fstat(source_fd).st_size)
    os.fsync(fd)
    if is_cold:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _extents(fd: int) -> Iterator[tuple[int, int]]:
    """Where the file has data: (first byte, byte after the last)."""
    end = 0
    with suppress(OSError):  # ENXIO: no data after `end`
        while True:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
            yield start, end


@contextmanager
def _mounted(fd: int, work: Path, file_system: str) -> Iterator[Path]:
    root = work / "trees"
    root.mkdir(mode=0o700)
    try:
        if file_system == "btrfs":  # copies share a UUID; an older one than known is refused
            call("btrfs", "device", "scan", "--forget")
        call("mount", "-t", file_system, "-o", _OPTIONS[file_system], _name(fd), root)
        try:
            yield root
        finally:
            _unmount(root)
    finally:
        root.rmdir()


def _unmount(root: Path) -> None:
    for _ in range(_UNMOUNT_TRIES):
        # Away from the terminal, so that Ctrl-C there does not stop the clean-up.
        command = ["umount", os.fspath(root)]
        if not subprocess.run(
            command, stderr=subprocess.DEVNULL, start_new_session=True, check=False
        ).returncode:
            return
        time.sleep(0.1)
    log.warning("the image is still in use; it is detached once that ends")
    call("umount", "--lazy", root)


def flush(root: Path) -> None:
    """Write all that is dirty on the file system at `root`. See syncfs(2)."""
    call("sync", "--file-system", root)


def free_bytes(root: Path) -> int:
    """Free bytes of the file system at `root`, once all is written and deferred frees are done."""
    flush(root)
    before = -1
    for _ in range(25):
        state = os.statvfs(root)
        free = state.f_bfree * state.f_frsize
        if free == before:
            break
        before = free
        time.sleep(0.2)
    return before
