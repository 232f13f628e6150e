"""build -m clone: a guest made from another one, in an instant where that is unified.

What the source shares with the pool becomes hard links; the rest is copied, block by block shared
with the source where the file system can.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vrun.build.method import Method, Place
from vrun.errors import NotPermitted, ToolError, WrongUsage
from vrun.removal import find_pool
from vstore.clone import choose_source, clone
from vstore.exclude import Excludes, load_for
from vstore.guest import Guest, list_guests, vdirbase
from vstore.hold import hold_guests
from vstore.hostpath import locate
from vstore.pool import Pool
from vstore.render import show_name
from vstore.targets import choose_pool

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Clone(Method):
    name: ClassVar[str] = "clone"
    makes_root: ClassVar[bool] = True

    source: str = ""
    """The name of a guest, the path of a tree, or of a folder below VDIRBASE."""
    exclude_from: Path | None = None
    """A list of what is left out, as vunify reads it."""

    def check(self, place: Place) -> None:
        if place.is_used:
            raise WrongUsage(
                f"{place.root}: is not empty, and a clone begins with nothing",
                hint="--force renames what is there",
            )
        source = self._find_source()
        self._load_excludes(source)
        if source.root == place.root:
            raise WrongUsage(f"{source.root}: cannot become a clone of itself")

    def fill(self, place: Place) -> None:
        source = self._find_source()
        target = locate(os.fspath(place.root), list_guests(include_disabled=True))
        with (
            self._open_pool(source) as pool,
            hold_guests([source], pool.path, offline=True) as (held,),
        ):
            excludes = self._load_excludes(source)
            result = clone(held, target, pool, place.progress, excludes=excludes)
        for reason, count in sorted(result.skipped.items()):
            log.info("%s: skipped, %s: %d", source.root, reason, count)
        if result.errors:
            path, why = result.errors[0]
            rest = f", and {len(result.errors) - 1} more" if len(result.errors) > 1 else ""
            raise ToolError(f"{show_name(path)}: {why}{rest}")

    def _load_excludes(self, source: Guest) -> Excludes | None:
        return load_for(source, self.exclude_from) if self.exclude_from else None

    def _find_source(self) -> Guest:
        if not self.source:
            raise WrongUsage("no source is named", hint="build -m clone -- --source GUEST")
        below = vdirbase() / self.source
        if "/" not in self.source:
            known = {guest.name for guest in list_guests(include_disabled=True)}
            if self.source.rstrip("/") not in known and below.is_dir():
                return choose_source(f"{below}/")
        return choose_source(self.source)

    def _open_pool(self, source: Guest) -> Pool:
        """The pool of the source; one is made where there is none yet."""
        try:
            return Pool.create(find_pool(source.root) or choose_pool([source], None))
        except NotPermitted as error:
            raise NotPermitted(error.message, hint="build -m rsync copies everything") from error
