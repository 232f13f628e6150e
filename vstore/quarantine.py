"""The pool's quarantine: inodes that were objects and can no longer be trusted.

    quarantine/<object's name>, with ~<inode number> for a second one of that name

Nothing is linked to them again. Guests that use one keep their names until they get good content
back.
"""

import os
from typing import Final

from vstore.pool import Pool

FOLDER: Final = "quarantine"


def list_quarantine(pool: Pool) -> list[tuple[str, int]]:
    """Every inode in quarantine: its path below the pool, and its number."""
    try:
        with os.scandir(pool.path / FOLDER) as entries:
            return sorted((f"{FOLDER}/{entry.name}", entry.inode()) for entry in entries)
    except FileNotFoundError:
        return []


def load_quarantined(pool: Pool) -> frozenset[int]:
    """The numbers of the inodes in quarantine."""
    return frozenset(number for _, number in list_quarantine(pool))


def former_name(path: str) -> str:
    """The name below `objects` that a quarantined inode had, from its path below the pool."""
    name = path.rpartition("/")[2].partition("~")[0]
    return f"{name[:2]}/{name}"
