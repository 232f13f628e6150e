"""Every failure that vrun reports: those of vstore, and what a guest's start can meet beside them.

`commands/plain.py` gives them the exit codes of the original.
"""

from vstore.errors import (
    ConfigInvalid,
    FormatUnknown,
    GuestNotFound,
    NoSpace,
    NotPermitted,
    ToolError,
    WrongUsage,
)

__all__ = [
    "ConfigInvalid",
    "FormatUnknown",
    "GuestNotFound",
    "NoSpace",
    "NotPermitted",
    "ToolError",
    "WrongUsage",
]
