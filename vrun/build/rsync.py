"""build -m rsync: a guest made from a copy of a tree on this machine.

We copy it ourselves, as rsync -aHAXSx would; options that are given with -o are for rsync(1), which
then does it. A tree on another machine is fetched by vserver-copy.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from vrun.build import program
from vrun.build.method import Method, Place
from vrun.build.replica import Copier
from vrun.errors import ToolError, WrongUsage
from vstore import inode
from vstore.clone import choose_source
from vstore.errors import PoolBusy
from vstore.guest import Guest
from vstore.hold import default_pool, hold_guests

RSYNC_OPTIONS: Final = ("-aHAXSx", "--numeric-ids")
"""What we do ourselves, for rsync(1) when it is to do more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rsync(Method):
    name: ClassVar[str] = "rsync"

    source: str = ""
    """The path of a tree, or the name of a guest."""
    options: tuple[str, ...] = ()
    """For rsync(1)."""

    def check(self, place: Place) -> None:
        self._find_source(place)
        if self.options and not shutil.which("rsync"):
            raise ToolError(
                "options for rsync are given, and rsync is not installed",
                hint="install it, or leave the options away: it is not needed then",
            )

    def fill(self, place: Place) -> None:
        source = self._find_source(place)
        place.progress.phase("copy")
        with _held(source):
            if self.options:
                _run_rsync(source.root, place.root, self.options)
            else:
                _copy(source.root, place)

    def _find_source(self, place: Place) -> Guest:
        if not self.source:
            raise WrongUsage("no source is named", hint="build -m rsync -- --source DIR")
        if ":" in self.source.partition("/")[0]:
            raise WrongUsage(
                f"{self.source}: is on another machine",
                hint="vserver-copy fetches guests from there",
            )
        source = choose_source(self.source)
        if place.root.is_relative_to(source.root) or source.root.is_relative_to(place.root):
            raise WrongUsage(
                f"{source.root}: it and the new root {place.root} lie in each other",
                hint="-m host makes a guest of the host's packages",
            )
        return source


@contextmanager
def _held(source: Guest) -> Iterator[None]:
    """Keep a guest from starting while it is copied. Raises PoolBusy for one that runs."""
    with hold_guests([source], default_pool(), offline=True) as (held,):
        if held.is_running:
            raise PoolBusy(
                f"the guest {source.name} runs, so its copy would not be of one moment",
                hint="stop it first",
            )
        yield


def _copy(source: Path, place: Place) -> None:
    source_fd = os.open(source, inode.OPEN_FOLDER)
    root_fd = os.open(place.root, inode.OPEN_FOLDER)
    try:
        with Copier(root_fd, may_replace=place.is_used, progress=place.progress) as copier:
            copier.copy_tree(source_fd)
        copier.check()
    finally:
        os.close(root_fd)
        os.close(source_fd)


def _run_rsync(source: Path, root: Path, options: tuple[str, ...]) -> None:
    command = ["rsync", *options, "--", f"{source}/", f"{root}/"]
    done = program.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode:
        said = os.fsdecode(done.stderr).strip().splitlines()
        raise ToolError(f"rsync ended with {done.returncode}: {said[0] if said else ''}")
