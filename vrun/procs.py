"""All processes of the machine, each with its context: one pass over /proc.

What a process is called is the guest's own choice: it is bytes of a stranger, to be shown through
vstore.render alone.
"""

import os
from collections.abc import Iterator
from typing import Final

from vrun.membership import HOST, Contexts
from vstore.record import dataclass

TICKS: Final = os.sysconf("SC_CLK_TCK")
PAGE: Final = os.sysconf("SC_PAGE_SIZE")

_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_READ: Final = os.O_RDONLY | os.O_CLOEXEC
_STAT_BYTES: Final = 4096
_IO_BYTES: Final = 1024
_PF_KTHREAD: Final = 0x00200000
"""A thread of the kernel's own, linux/sched.h: no guest has one, and there are many."""


@dataclass(frozen=True, slots=True)
class Process:
    """One process as /proc/PID/stat has it, see proc(5); times are in clock ticks."""

    pid: int
    xid: int
    name: str
    state: str
    parent: int
    user: int
    system: int
    reaped_user: int
    """Of children that have ended and were waited for; as the next."""
    reaped_system: int
    nice: int
    threads: int
    start: int
    """Since boot."""
    virtual: int
    """Bytes of addresses."""
    resident: int
    """Bytes of memory, shared ones included."""
    moved: int | None = None
    """Bytes read from and written to disks; None where it was not asked for or is kept back."""


def list_processes(contexts: Contexts, *, io: bool = False) -> Iterator[Process]:
    """Each process there is, the host's included; with `io` what guests' processes moved too.

    One that ends meanwhile is left out.
    """
    with os.scandir("/proc") as entries:
        numbers = [entry.name for entry in entries if entry.name.isdecimal()]
    for number in numbers:
        try:
            folder_fd = os.open(f"/proc/{number}", _FOLDER)
        except (FileNotFoundError, ProcessLookupError):
            continue
        try:
            yield _look_at(folder_fd, contexts, io=io)
        except (FileNotFoundError, ProcessLookupError):
            continue
        finally:
            os.close(folder_fd)


def _look_at(folder_fd: int, contexts: Contexts, *, io: bool) -> Process:
    """By the folder's descriptor all files are of one process, whatever becomes of the number."""
    text = _read(folder_fd, "stat", _STAT_BYTES)
    number, _, rest = text.partition(b" (")
    name, _, after = rest.rpartition(b") ")
    fields = after.split()
    xid = HOST if int(fields[6]) & _PF_KTHREAD else _find_xid(folder_fd, contexts)
    return Process(
        pid=int(number),
        xid=xid,
        name=os.fsdecode(name),
        state=chr(fields[0][0]),
        parent=int(fields[1]),
        user=int(fields[11]),
        system=int(fields[12]),
        reaped_user=int(fields[13]),
        reaped_system=int(fields[14]),
        nice=int(fields[16]),
        threads=int(fields[17]),
        start=int(fields[19]),
        virtual=int(fields[20]),
        resident=int(fields[21]) * PAGE,
        moved=_moved(folder_fd) if io and xid else None,
    )


def _find_xid(folder_fd: int, contexts: Contexts) -> int:
    fd = os.open("cgroup", _READ, dir_fd=folder_fd)
    try:
        return contexts.xid_of_file(fd)
    finally:
        os.close(fd)


def _moved(folder_fd: int) -> int | None:
    try:
        lines = _read(folder_fd, "io", _IO_BYTES).splitlines()
    except PermissionError:
        return None
    wanted = (b"read_bytes:", b"write_bytes:")
    return sum(int(line.split()[1]) for line in lines if line.startswith(wanted))


def _read(folder_fd: int, name: str, size: int) -> bytes:
    fd = os.open(name, _READ, dir_fd=folder_fd)
    try:
        return os.read(fd, size)
    finally:
        os.close(fd)
