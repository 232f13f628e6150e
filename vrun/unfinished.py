"""What a build or delete that was killed leaves, and how the next of that name clears it away.

    CONFDIR/
    ├── .build-web/            the configuration of a guest that is being built
    │   ├── vdir -> VDIRBASE/web
    │   └── .own-root          the build made the root (`folder`), or all that is in it (`content`)
    ├── ..build-web.0f1e2d3c/  the same, while it is written
    └── .delete-web/           the configuration of a guest whose tree is gone
    VDIRBASE/
    └── web.clone-0f1e2d3c/    the root, while it is a clone that grows

All of it belongs to who holds the guest's lock.
"""

import fcntl
import logging
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal

from vrun.errors import ToolError
from vrun.removal import Kept, remove_folder, remove_tree
from vstore import inode
from vstore.render import show_name

log = logging.getLogger(__name__)

NOT_CONTENT: Final = frozenset({"lost+found"})
"""What an empty root may have in it: a file system of its own begins with it."""

SPARE: Final = ".vrun-"
"""How the name begins of what a build needs for a while at the top of a root."""

_MARK: Final = ".own-root"
_RANDOM: Final = "[0-9a-f]{8}"

Own = Literal["folder", "content"]
"""What of a root is the build's: the folder itself, or all that is in one that was there before."""


def build_place(folder: Path, name: str) -> Path:
    """The configuration of the guest while it is built; `folder` is that of all configurations."""
    return folder / f".build-{name}"


def delete_place(folder: Path, name: str) -> Path:
    """The configuration of the guest while it is deleted."""
    return folder / f".delete-{name}"


def choose_spare(place: Path) -> Path:
    """A name for what becomes `place` when it is complete."""
    return place.with_name(f".{place.name}.{secrets.token_hex(4)}")


def mark_root(place: Path, own: Own) -> None:
    """Note what of the root is the build's, before it is made."""
    (place / _MARK).write_text(own)


def unmark_root(config: Path) -> None:
    """The root is the guest's from now on."""
    (config / _MARK).unlink(missing_ok=True)


def find_own_root(place: Path) -> Path | None:
    """The root of a build, if there is something in it that is the build's."""
    link = place / "vdir"
    if not (place / _MARK).exists() or not link.is_symlink():
        return None
    root = place / link.readlink()
    if not os.path.lexists(root) or (_own(place) == "content" and not _content(root)):
        return None
    return root


def _own(place: Path) -> str:
    return (place / _MARK).read_text().strip()


def find_left(folder: Path, name: str) -> list[Path]:
    """The configurations of the guest in `folder`, that of all, of builds and deletes that were
    killed.
    """
    places = [build_place(folder, name), delete_place(folder, name)]
    found = [path for path in places if path.is_dir()]
    return found + _matching(folder, f".{places[0].name}.", _RANDOM)


def clear_away(folder: Path, name: str) -> None:
    """Remove what a build and a delete of the guest left in `folder`, that of all configurations.

    Raises ToolError where something of a root cannot be removed: the next call finds it again.
    """
    place = build_place(folder, name)
    if (place / _MARK).exists() and (place / "vdir").is_symlink():
        for clone in _dead_clones(place / (place / "vdir").readlink()):
            log.warning("%s: left by a build that was killed; it is removed", clone)
            _must_go(remove_tree(clone))
    root = find_own_root(place)
    if root is not None:
        log.warning("%s: left by a build that was killed; it is removed", root)
        _must_go(remove_tree(root) if _own(place) != "content" else empty(root))
    elif (place / "vdir").is_symlink():
        for spare in _matching(place / (place / "vdir").readlink(), SPARE, _RANDOM * 2):
            if spare.is_dir() and not spare.is_symlink():
                _must_go(remove_folder(spare))
    for left in find_left(folder, name):
        _must_go(remove_folder(left))


def empty(root: Path) -> Kept:
    """Remove all that is in a root that stays."""
    kept: Kept = []
    for path in _content(root):
        if path.is_dir() and not path.is_symlink():
            kept += remove_tree(path)
        else:
            path.unlink()
    return kept


def _content(root: Path) -> list[Path]:
    with suppress(FileNotFoundError, NotADirectoryError):
        return [path for path in root.iterdir() if path.name not in NOT_CONTENT]
    return []


def _must_go(kept: Kept) -> None:
    if kept:
        path, reason = kept[0]
        rest = f", and {len(kept) - 1} more" if len(kept) > 1 else ""
        raise ToolError(
            f"{show_name(path)}: is left by a build that was killed, and cannot be removed: "
            f"{reason}{rest}"
        )


def _matching(folder: Path, start: str, rest: str) -> list[Path]:
    """The entries of `folder` whose names are `start` and what the expression `rest` matches."""
    expression = re.compile(re.escape(start) + rest)
    with suppress(FileNotFoundError, NotADirectoryError):
        return [path for path in folder.iterdir() if expression.fullmatch(path.name)]
    return []


def _dead_clones(root: Path) -> Iterator[Path]:
    """Clones that were to become `root`, of which nobody has the lock any more."""
    for path in _matching(root.parent, f"{root.name}.clone-", _RANDOM):
        with suppress(OSError):
            fd = os.open(path, inode.OPEN_FOLDER)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            finally:
                os.close(fd)
            yield path
