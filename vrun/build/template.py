"""build -m template: unpack tar archives, one over the other, into the root.

What is below their /dev is left out, since a guest gets its devices from the host.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from vrun.archive import Rules, unpack
from vrun.build.method import Method, Place
from vrun.errors import WrongUsage
from vstore import inode

log = logging.getLogger(__name__)

_DEVICES: Final = frozenset({b"dev"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Template(Method):
    name: ClassVar[str] = "template"

    archives: tuple[Path, ...] = ()
    with_devices: bool = False

    def check(self, place: Place) -> None:
        archives = self._find_archives(place)
        if not archives:
            raise WrongUsage("no archive is named", hint="build -m template -- -t TARBALL")
        for path in archives:
            if not path.is_file():
                raise WrongUsage(f"{path}: is no file" if path.exists() else f"{path}: is missing")
            try:
                with path.open("rb"):
                    pass
            except OSError as error:
                raise WrongUsage(f"{path}: cannot be read: {error.strerror}") from error

    def fill(self, place: Place) -> None:
        root_fd = os.open(place.root, inode.OPEN_FOLDER)
        try:
            is_used = place.is_used
            for path in self._find_archives(place):
                rules = Rules(
                    with_devices=self.with_devices,
                    may_replace=is_used,
                    without=frozenset() if self.with_devices else _DEVICES,
                )
                place.progress.phase(path.name)
                result = unpack(path, root_fd, rules)
                for what, count in sorted(result.passed_over.items()):
                    log.info("%s: left out, %s: %d", path, what, count)
                if result.has_more:
                    log.warning("%s: what stands behind its end mark was not unpacked", path)
                is_used = True
        finally:
            os.close(root_fd)

    def _find_archives(self, place: Place) -> list[Path]:
        """Those that are named, after the one of the distribution."""
        known = place.distribution.find("template")
        return [*([known] if known else []), *self.archives]
