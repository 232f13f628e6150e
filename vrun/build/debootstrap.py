"""build -m debootstrap: install Debian, or a relative of it, from a mirror.

debootstrap runs in mount, pid, ipc and uts namespaces of its own: what it mounts below the root and
every program that a package starts is gone when it ends, however it ends.
"""

import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar, Final

from vrun.build import program
from vrun.build.distribution import default_setting
from vrun.build.inside import GuestTree
from vrun.build.method import Method, Place
from vrun.build.skeleton import mark_internal
from vrun.errors import NotPermitted, ToolError, WrongUsage

log = logging.getLogger(__name__)

_UNSHARE: Final = (
    "unshare",
    "--mount",
    "--propagation=slave",
    "--pid",
    "--fork",
    "--kill-child",
    "--ipc",
    "--uts",
    "--",
)
_ARCHIVES: Final = "var/cache/apt/archives"
_SHOWN_LINES: Final = 3
_READ: Final = 4096  # bytes of the end of what it said


@dataclass(frozen=True, slots=True, kw_only=True)
class Debootstrap(Method):
    name: ClassVar[str] = "debootstrap"
    is_fresh: ClassVar[bool] = True
    knows_distributions: ClassVar[bool] = True

    mirror: str | None = None
    script: str | None = None
    options: tuple[str, ...] = ()

    def check(self, place: Place) -> None:
        if not self.distribution:
            raise WrongUsage("no release is named", hint="build -m debootstrap -- -d bookworm")
        if not shutil.which("debootstrap", path=_search_path()):
            raise NotPermitted("debootstrap is not installed", hint="apt-get install debootstrap")
        script = self._find_script(place) or self.distribution
        if not (_scripts() / script).exists():  # an absolute path stays what it is
            raise WrongUsage(
                f"debootstrap has no script {_scripts() / script}",
                hint="for a release newer than debootstrap, -s sid often does",
            )

    def fill(self, place: Place) -> None:
        place.progress.phase(f"install {self.distribution}")
        log.info("debootstrap of %s into %s", self.distribution, place.root)
        environment = {
            **os.environ,
            "PATH": _search_path(),
            "LC_ALL": "C",
            "DEBIAN_FRONTEND": "noninteractive",
        }
        with tempfile.TemporaryFile() as output:
            done = program.run(
                [*_UNSHARE, *self._command(place)],
                stdout=output,
                stderr=subprocess.STDOUT,
                environment=environment,
            )
            if done.returncode:
                raise ToolError(
                    f"debootstrap ended with {done.returncode}: {_find_reason(output, place)}",
                    hint=self._hint(place),
                )

    def finish(self, place: Place) -> None:
        mark_internal(place)
        with GuestTree(place.root) as tree:
            for name in tree.list(_ARCHIVES):
                if name.endswith(".deb"):
                    tree.remove(f"{_ARCHIVES}/{name}")

    def _command(self, place: Place) -> Iterator[str]:
        yield "debootstrap"
        settings = place.distribution.value("debootstrap.options") or default_setting(
            "apps/debootstrap/options"
        )
        yield from (settings or "").split()
        yield from self.options
        yield self.distribution or ""
        yield os.fspath(place.root)
        mirror = self._find_mirror(place)
        script = self._find_script(place)
        if mirror or script:
            yield mirror or ""
        if script:
            yield script

    def _find_mirror(self, place: Place) -> str | None:
        return (
            self.mirror
            or place.distribution.value("debootstrap.mirror")
            or default_setting("apps/debootstrap/mirror")
        )

    def _find_script(self, place: Place) -> str | None:
        script = self.script or place.distribution.value("debootstrap.script")
        return os.path.abspath(script) if script and "/" in script else script  # noqa: PTH100

    def _hint(self, place: Place) -> str:
        mirror = self._find_mirror(place) or "debootstrap's own mirror"
        return f"see that {mirror} answers and has {self.distribution}; -m names another one"


def _search_path() -> str:
    """Where programs are looked for: a root shell of su(1) may lack the folders of root's."""
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


def _scripts() -> Path:
    return Path(os.environ.get("DEBOOTSTRAP_DIR") or "/usr/share/debootstrap") / "scripts"


def _find_reason(output: IO[bytes], place: Place) -> str:
    """What debootstrap said last of errors; where that is nothing, how its log in the root ends."""
    output.seek(0, os.SEEK_END)
    output.seek(max(0, output.tell() - _READ))
    lines = os.fsdecode(output.read()).splitlines()
    told = [line for line in lines if line.startswith(("E:", "W:"))]
    with GuestTree(place.root) as tree:
        kept = os.fsdecode(tree.load("debootstrap/debootstrap.log") or b"").splitlines()
    chosen = told[-_SHOWN_LINES:] + kept[-_SHOWN_LINES:] or lines[-_SHOWN_LINES:]
    return "; ".join(line.strip() for line in chosen if line.strip())
