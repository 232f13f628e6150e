"""What a way to build is: it fills the root of a guest, and says what it needs for that."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vrun.build.distribution import Distribution
from vstore.progress import SILENT, Progress


@dataclass(frozen=True, slots=True)
class Place:
    """Where a guest is being built."""

    name: str
    root: Path
    """Where its root will be; a folder, empty or not, unless the method makes it itself."""
    config: Path
    """Its configuration directory, which has another name until all is done."""
    distribution: Distribution
    is_used: bool = False
    """There is something in the root already, which may be replaced."""
    progress: Progress = SILENT

    def environment(self) -> dict[str, str]:
        """Ours, and what programs of the administrator's are told of the build."""
        return {
            **os.environ,
            "VSERVER_NAME": self.name,
            "VSERVER_ROOT": os.fspath(self.root),
            "VSERVER_CONFIG": os.fspath(self.config),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to build. `distribution` is the name that was given, if any."""

    name: ClassVar[str]
    is_fresh: ClassVar[bool] = False
    """What it makes is installed, not the copy of a machine with an identity of its own."""
    makes_root: ClassVar[bool] = False
    """It makes the root itself, at once and on disk; else there is a folder to fill."""

    knows_distributions: ClassVar[bool] = False
    """What `distribution` names says something even without settings of that name."""

    distribution: str | None = None

    def check(self, place: Place) -> None:
        """See that it can work, before anything is made. Raises ToolError."""

    def fill(self, place: Place) -> None:
        """Fill the root. What it leaves when it raises, ToolError or OSError, is removed."""

    def finish(self, place: Place) -> None:
        """What it has to do when the tree has all that every guest has."""
