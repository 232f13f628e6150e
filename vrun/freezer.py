"""Whether a cgroup is frozen: what joins it stands still too, and answers nobody.

A guest whose init may write its groups (systemd) can freeze itself; the host's administrator can
freeze any, in the v2 hierarchy and in that of the v1 freezer.
"""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

_FILES: Final = {"cgroup.freeze": ("1",), "freezer.state": ("FROZEN", "FREEZING")}
"""v2 and v1, each with the words that mean frozen; cgroup-v2.rst, v1/freezer-subsystem.rst."""


def find_frozen(groups: Iterable[Path]) -> Path | None:
    """The file that holds one of the groups still, its own or one of a group above; None if none.

    A group that is gone holds nobody.
    """
    for group in groups:
        for level in (group, *group.parents):
            for name, words in _FILES.items():
                with suppress(OSError):
                    if (level / name).read_text().strip() in words:
                        return level / name
    return None
