"""What a caller may do: the supervisor takes his rights for a moment, and the kernel decides.

Whatever is done for a caller beyond letting his own call go on is done with his fsuid, fsgid,
groups and capabilities. Whether he may change a frozen file cannot be asked of the file itself,
since the kernel says EPERM to everybody: it is asked of a nameless twin that has the same owner,
mode, ACL and attributes.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from vrun import syscalls
from vrun.cow import kernel
from vstore.record import dataclass

_OWN_NAMESPACE: Final = "self/ns/user"


@dataclass(frozen=True, slots=True)
class Credentials:
    """Of a thread, as the kernel looks at them when it opens files; see credentials(7)."""

    fsuid: int
    fsgid: int
    groups: tuple[int, ...]
    effective: int
    """Capabilities, one bit each."""


@dataclass(frozen=True, slots=True)
class Status:
    """What /proc/TID/status tells of a thread."""

    credentials: Credentials
    tgids: tuple[int, ...]
    """The numbers of its process in each pid namespace, ours first."""
    tids: tuple[int, ...]


def load_status(proc_fd: int, tid: int) -> Status:
    """Of the thread `tid`; `proc_fd` is the host's /proc. Raises OSError where it is gone."""
    fields = {}
    for line in _read(proc_fd, f"{tid}/status").split(b"\n"):
        key, _, value = line.partition(b":")
        fields[key] = value
    effective = int(fields[b"CapEff"], 16)
    if not _is_in_our_namespace(proc_fd, tid):
        effective = 0  # capabilities over its own namespace are none over ours
    return Status(
        Credentials(
            int(fields[b"Uid"].split()[3]),
            int(fields[b"Gid"].split()[3]),
            tuple(int(word) for word in fields[b"Groups"].split()),
            effective,
        ),
        tuple(int(word) for word in fields.get(b"NStgid", b"%d" % tid).split()),
        tuple(int(word) for word in fields.get(b"NSpid", b"%d" % tid).split()),
    )


def _is_in_our_namespace(proc_fd: int, tid: int) -> bool:
    return (
        os.stat(f"{tid}/ns/user", dir_fd=proc_fd).st_ino
        == os.stat(_OWN_NAMESPACE, dir_fd=proc_fd).st_ino
    )


def _read(proc_fd: int, path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc_fd)
    try:
        text = b""
        while block := os.read(fd, 1 << 16):
            text += block
        return text
    finally:
        os.close(fd)


class Own:
    """The rights of this process, which has one thread."""

    def __init__(self) -> None:
        self._groups = os.getgroups()
        self._effective, self._permitted, self._inheritable = syscalls.capget()

    @contextmanager
    def given_up_for(self, credentials: Credentials) -> Iterator[None]:
        """Inside, this process may do with files what the caller may, and nothing more.

        Raises PermissionError where the caller's ids cannot be taken.
        """
        try:
            self._give_up(credentials)
            yield
        finally:
            self._take_back()

    @contextmanager
    def resumed(self, credentials: Credentials) -> Iterator[None]:
        """Inside `given_up_for` these credentials: have the own rights back for a moment."""
        self._take_back()
        try:
            yield
        finally:
            self._give_up(credentials)

    def _give_up(self, credentials: Credentials) -> None:
        os.setgroups(credentials.groups)
        kernel.set_filesystem_ids(uid=credentials.fsuid, gid=credentials.fsgid)
        self._set_effective(credentials.effective & self._permitted)

    def _take_back(self) -> None:
        self._set_effective(self._effective)
        kernel.set_filesystem_ids(uid=0, gid=0)
        os.setgroups(self._groups)

    def _set_effective(self, effective: int) -> None:
        syscalls.capset(
            effective=effective, permitted=self._permitted, inheritable=self._inheritable
        )


def check_access(proc_fd: int, fd: int, mode: int) -> None:
    """Raise PermissionError unless this process, with the rights that it has now, may read, write
    or search (os.R_OK, os.W_OK, os.X_OK) the inode behind `fd`.
    """
    if not os.access(f"self/fd/{fd}", mode, dir_fd=proc_fd, effective_ids=True):
        raise PermissionError(13, os.strerror(13))
