"""The numbers that guests have for good: `context` files, and the next one that is handed out.

CONFDIR/.defaults/
├── context.dynamic   there: new guests get no number of their own
├── context.next      the next number to try; 40000 where it is missing
└── context.lock      flock: held while a number is chosen
"""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Final

from vrun.errors import ConfigInvalid, NotPermitted, ToolError, WrongUsage
from vrun.keys import Keys
from vstore.guest import LEFTOVER, confdir

XIDS: Final = range(2, 49152)
"""The numbers that a guest can have for good; higher ones are handed out at start."""
FIRST: Final = 40000
"""The first one that is handed out."""

_S_CONTEXT: Final = re.compile(r"^[ \t]*S_CONTEXT=[\"']?([0-9]+)", re.M)


def allocate_xid() -> int | None:
    """A number that no configured guest has, never the same twice; None with context.dynamic.

    Writes context.next. Raises NotPermitted where it cannot be written, ConfigInvalid where it
    holds no number, ToolError when all numbers are taken.
    """
    defaults = confdir() / ".defaults"
    if (defaults / "context.dynamic").exists():
        return None
    with hold_numbers():
        keys = Keys(defaults, [])
        following = keys.number("context.next", least=XIDS[0], most=XIDS.stop) or FIRST
        taken = {xid for _, xid in configured_xids()}
        order = chain(range(following, XIDS.stop), range(FIRST, following), range(XIDS[0], FIRST))
        xid: int | None = next((xid for xid in order if xid not in taken), None)
        if xid is None:
            raise ToolError(f"all numbers from {XIDS[0]} to {XIDS[-1]} belong to guests")
        _write_next(defaults, xid + 1)
    return xid


def check_xid(xid: int, *, name: str) -> None:
    """Raises WrongUsage where a guest other than `name` has the number, or no guest can have it."""
    if xid not in XIDS:
        raise WrongUsage(f"context {xid}: is not in the range {XIDS[0]} to {XIDS[-1]}")
    for owner, taken in configured_xids():
        if taken == xid and owner != name:
            raise WrongUsage(
                f"context {xid}: belongs to guest {owner}",
                hint="without --context a free number is chosen",
            )


def configured_xids() -> Iterator[tuple[str, int]]:
    """Each guest that has a number of its own, with it; a file that holds none is passed over.

    An old-style file is not run: what stands behind S_CONTEXT= at a line's beginning counts.
    """
    try:
        entries = sorted(entry for entry in confdir().iterdir() if not LEFTOVER.search(entry.name))
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.suffix == ".conf" and entry.is_file():
            for text in _S_CONTEXT.findall(entry.read_text(errors="surrogateescape")):
                yield entry.stem, int(text)
        elif (xid := _xid_in(entry)) is not None:
            yield entry.name, xid


def _xid_in(folder: Path) -> int | None:
    try:
        return Keys(folder, []).number("context", least=XIDS[0], most=XIDS[-1])
    except ConfigInvalid:
        return None


@contextmanager
def hold_numbers() -> Iterator[None]:
    """Keep others from giving a guest a number for good. Raises NotPermitted."""
    defaults = confdir() / ".defaults"
    path = defaults / "context.lock"
    try:
        defaults.mkdir(mode=0o755, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise NotPermitted(f"{path}: cannot be made: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _write_next(defaults: Path, xid: int) -> None:
    path = defaults / "context.next"
    spare = path.with_name(f".{path.name}.new")
    try:
        spare.write_text(f"{xid}\n")
        spare.replace(path)
    except OSError as error:
        raise NotPermitted(f"{path}: cannot be written: {error.strerror}") from error
