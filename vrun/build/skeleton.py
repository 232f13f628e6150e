"""build -m skeleton: an empty root with what every guest has, and a command of the administrator's.

The command runs on the host with the root as working directory; VSERVER_NAME, VSERVER_ROOT and
VSERVER_CONFIG in its environment say what is being built.
"""

from dataclasses import dataclass
from typing import ClassVar

from vrun.build import program
from vrun.build.method import Method, Place
from vrun.errors import ToolError


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton(Method):
    name: ClassVar[str] = "skeleton"
    is_fresh: ClassVar[bool] = True

    with_packages: bool = False
    """Packages are managed inside the guest (--pkgmgmt): noted in apps/pkgmgmt/internal."""
    command: tuple[str, ...] = ()

    def finish(self, place: Place) -> None:
        if self.with_packages:
            mark_internal(place)
        if not self.command:
            return
        try:
            done = program.run(
                self.command, folder=place.root, environment=place.environment(), stdin=None
            )
        except OSError as error:
            raise ToolError(f"{self.command[0]}: cannot be run: {error.strerror}") from error
        if done.returncode:
            raise ToolError(f"{self.command[0]}: ended with {done.returncode}")


def mark_internal(place: Place) -> None:
    """Say in the configuration that the guest manages its packages itself."""
    folder = place.config / "apps" / "pkgmgmt"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "internal").touch()
