"""Users of a guest: what its own /etc/passwd and /etc/group say.

The host's name services are never asked: a library that they load would come from the guest. The
files are reached by the descriptor of the guest's root, where every link means what it means
inside, and nothing but a regular file is opened. What the guest's own name services know beside
(LDAP, systemd-homed) is not seen.
"""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from vrun.errors import ToolError
from vrun.mountfd import open_inside
from vstore.record import dataclass

_ACCOUNTS: Final = "etc/passwd"
_GROUPS: Final = "etc/group"
_MOST_BYTES: Final = 16 << 20
_MOST_GROUPS: Final = 65_536  # NGROUPS_MAX of linux/limits.h
_NO_ID: Final = 0xFFFF_FFFF  # (uid_t) -1: setresuid(2) would leave the id as it is


@dataclass(frozen=True, slots=True)
class User:
    """Whom a command runs as inside a guest."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    """The supplementary groups, for setgroups(2)."""
    home: str
    shell: str


ROOT: Final = User("root", 0, 0, (0,), "/root", "/bin/sh")
"""The guest's root, whatever is left of its files."""


@dataclass(frozen=True, slots=True)
class _Account:
    """A line of /etc/passwd."""

    name: str
    uid: int
    gid: int
    home: str
    shell: str


@dataclass(frozen=True, slots=True)
class _Group:
    """A line of /etc/group."""

    name: str
    gid: int
    members: frozenset[str]


def find_user(root_fd: int, wanted: str) -> User:
    """Whom `wanted`, USER or USER:GROUP, means in the guest whose root is behind `root_fd`.

    Both are names or numbers; a name of digits goes before the number. With a GROUP that one alone
    counts, else the user's own groups. Raises ToolError, worded as what the guest is or has, for
    what it does not know: a number without an account needs a GROUP.
    """
    user, colon, group = wanted.partition(":")
    account = _find_account(root_fd, user)
    groups = tuple(_groups(root_fd))
    if colon:
        gid = _find_gid(groups, group)
        taken: tuple[int, ...] = (gid,)
    elif account.gid != _NO_ID:
        gid = account.gid
        taken = _groups_of(groups, account)
    else:
        raise ToolError(
            f"has no user {user}, so it is not known which group goes with the number",
            hint=f"name one: {user}:GROUP",
        )
    return User(account.name, account.uid, gid, taken, account.home, account.shell)


def _find_account(root_fd: int, user: str) -> _Account:
    accounts = tuple(_accounts(root_fd))
    for account in accounts:
        if account.name == user:
            return account
    uid = _parse_id(user)
    if uid is None:
        raise ToolError(
            f"has no user {user!r}",
            hint="users are looked for in the guest's own /etc/passwd",
        )
    for account in accounts:
        if account.uid == uid:
            return account
    return _Account(user, uid, _NO_ID, "/", "/bin/sh")


def _find_gid(groups: tuple[_Group, ...], wanted: str) -> int:
    for group in groups:
        if group.name == wanted:
            return group.gid
    gid = _parse_id(wanted)
    if gid is None:
        raise ToolError(
            f"has no group {wanted!r}",
            hint="groups are looked for in the guest's own /etc/group",
        )
    return gid


def _groups_of(groups: tuple[_Group, ...], account: _Account) -> tuple[int, ...]:
    others = (group.gid for group in groups if account.name in group.members)
    found = tuple(dict.fromkeys((account.gid, *others)))
    if len(found) > _MOST_GROUPS:
        raise ToolError(
            f"its user {account.name!r} is in {len(found)} groups of its /etc/group; "
            f"the kernel takes {_MOST_GROUPS}"
        )
    return found


def _accounts(root_fd: int) -> Iterator[_Account]:
    for fields in _records(root_fd, _ACCOUNTS):
        if len(fields) == 7:
            name, _, uid, gid, _, home, shell = fields
            if (uid_number := _parse_id(uid)) is not None and (
                gid_number := _parse_id(gid)
            ) is not None:
                yield _Account(name, uid_number, gid_number, home or "/", shell or "/bin/sh")


def _groups(root_fd: int) -> Iterator[_Group]:
    for fields in _records(root_fd, _GROUPS):
        if len(fields) == 4 and (gid := _parse_id(fields[2])) is not None:
            yield _Group(fields[0], gid, frozenset(fields[3].split(",")))


def _records(root_fd: int, path: str) -> Iterator[list[str]]:
    """The fields of each line that can be one: comments and NIS lines (`+`, `-`) are none."""
    for line in os.fsdecode(_read(root_fd, path)).split("\n"):
        if line and line[0] not in "#+-: ":
            yield line.split(":")


def _parse_id(text: str) -> int | None:
    """The id that a decimal number says; None for anything else, and for the id that is none."""
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        return None
    number = int(text)
    return number if number < _NO_ID else None


def _read(root_fd: int, path: str) -> bytes:
    """The content of a file of the guest; empty where there is none. Raises ToolError."""
    try:
        path_fd = open_inside(root_fd, path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return b""
        raise _cannot_read(path, error.strerror or "") from error
    try:
        return _read_regular(path_fd, path)
    except OSError as error:
        raise _cannot_read(path, error.strerror or "") from error
    finally:
        os.close(path_fd)


def _read_regular(path_fd: int, path: str) -> bytes:
    """What the file behind an O_PATH descriptor holds: opening a FIFO or a device would do harm."""
    status = os.fstat(path_fd)
    if not stat.S_ISREG(status.st_mode):
        raise _cannot_read(path, "is no regular file")
    if status.st_size > _MOST_BYTES:
        raise _cannot_read(path, f"has {status.st_size} bytes, more than the {_MOST_BYTES} allowed")
    with Path(f"/proc/self/fd/{path_fd}").open("rb") as file:
        return file.read(_MOST_BYTES)


def _cannot_read(path: str, reason: str) -> ToolError:
    return ToolError(f"cannot read its /{path}: {reason}")
