"""Every failure the tools report to a person.

ToolError ........... 1   the base, when nothing more precise fits
├─ WrongUsage ....... 2   the arguments cannot be carried out together
├─ GuestNotFound .... 3
├─ PoolBusy ......... 4   another program holds the pool or the guest
├─ PoolCorrupt ...... 5   an object's bytes no longer match its name
├─ NotPermitted ..... 6   a capability, a file system feature or a promise is missing
├─ ConfigInvalid .... 7   a configuration file, list or manifest cannot be read as what it should be
├─ FormatUnknown .... 8   written by a newer version
└─ NoSpace .......... 9   the file system has no room for what was asked
"""

import errno
from typing import ClassVar, Final

EXIT_PARTIAL: Final = 20
"""Done, but some files could not be; each is named."""


class ToolError(Exception):
    """A failure with a message for a person, and perhaps a hint what to do about it."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class WrongUsage(ToolError):
    exit_code = 2


class GuestNotFound(ToolError):
    exit_code = 3


class PoolBusy(ToolError):
    exit_code = 4


class PoolCorrupt(ToolError):
    exit_code = 5


class NotPermitted(ToolError):
    exit_code = 6


class ConfigInvalid(ToolError):
    exit_code = 7


class FormatUnknown(ToolError):
    exit_code = 8


class NoSpace(ToolError):
    exit_code = 9


_NO_ROOM: Final = frozenset((errno.ENOSPC, errno.EDQUOT))
_REFUSED: Final = frozenset((errno.EPERM, errno.EACCES))


def kind_of(error: OSError) -> type[ToolError]:
    """The class of what the kernel refused and nobody knows more of."""
    if error.errno in _NO_ROOM:
        return NoSpace
    return NotPermitted if error.errno in _REFUSED else ToolError
