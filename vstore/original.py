"""Pools of the original tools:

hash folders below `.defaults/apps/vunify/hash`, whose members may become objects.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from vstore.guest import Guest, confdir

_HASH: Final = ("apps", "vunify", "hash")


def find_original_pools(guests: Sequence[Guest]) -> list[Path]:
    """The original's pool folders that the global configuration and these guests name; see the
    reference, 15.4.
    """
    places = [confdir() / ".defaults" / Path(*_HASH)]
    for guest in guests:
        folder = guest.app_dir("vunify")
        if folder is not None:
            places.append(folder / "hash")
    found = {path.resolve() for place in places for path in _list_pools(place)}
    return sorted(found)


def _list_pools(place: Path) -> Iterator[Path]:
    if place.is_dir():
        for path in sorted(place.iterdir()):
            if not path.name.startswith(".") and path.is_dir():
                yield path


def load_members(pools: Sequence[Path], device: int) -> tuple[dict[int, str], dict[int, int]]:
    """The members on one device that are shared:

    inode number -> path, and inode number -> how many pool names it has.
    """
    paths: dict[int, str] = {}
    names: dict[int, int] = {}
    for pool in pools:
        for folder, _, files in os.walk(pool):
            for name in files:
                path = os.path.join(folder, name)  # noqa: PTH118 - thousands of them, of the host's own
                status = os.lstat(path)
                if status.st_dev == device and stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
                    paths[status.st_ino] = path
                    names[status.st_ino] = names.get(status.st_ino, 0) + 1
    return paths, names
