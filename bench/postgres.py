"""PostgreSQL in a tree of Debian: fetched by this machine's apt, installed by the tree's dpkg.

    CACHE/packages/bookworm-postgresql/     the .deb files; CACHE as tests/fixtures/guests.py has it

Neither a cluster is made nor a server started: who measures does that, in a folder of his own.
"""

import os
import platform
import shutil
from pathlib import Path
from typing import Final

from bench.calls import BenchError, call
from tests.fixtures import guests

_PACKAGE: Final = "postgresql-15"
_TIMEOUT_S: Final = 600.0
_NO_CLUSTER: Final = "create_main_cluster = false\n"
_NO_START: Final = "#!/bin/sh\nexit 101\n"


def install(root: Path, release: str) -> None:
    """Into a tree of that release, which is this machine's own. Raises BenchError."""
    here = platform.freedesktop_os_release().get("VERSION_CODENAME")
    if here != release:
        raise BenchError(f"PostgreSQL: this machine's apt is for {here}, the tree is {release}")
    packages = root / "var/cache/postgresql"
    packages.mkdir()
    try:
        for path in _fetch(root, guests.cache_folder() / "packages" / f"{release}-postgresql"):
            shutil.copy2(path, packages)
        settings, policy = root / "etc/postgresql-common", root / "usr/sbin/policy-rc.d"
        settings.mkdir(exist_ok=True)
        (settings / "createcluster.conf").write_text(_NO_CLUSTER)
        policy.write_text(_NO_START)
        policy.chmod(0o755)
        try:
            names = [f"/{path.relative_to(root)}" for path in packages.iterdir()]
            _run("chroot", root, "dpkg", "--force-confold", "-i", *names)
        finally:
            policy.unlink()
    except (OSError, BenchError) as error:
        raise BenchError(f"PostgreSQL cannot be installed: {error}") from error
    finally:
        shutil.rmtree(packages)


def _fetch(root: Path, kept: Path) -> list[Path]:
    """The newest file of each package that this tree lacks."""
    (kept / "partial").mkdir(parents=True, exist_ok=True)
    places = (f"Dir::State::status={root}/var/lib/dpkg/status", f"Dir::Cache::archives={kept}")
    settings = (*places, "Dir::Cache::pkgcache=", "Dir::Cache::srcpkgcache=")
    options = [word for setting in settings for word in ("-o", setting)]
    how = ("--no-install-recommends", "--download-only", "--yes")
    _run("apt-get", "-qq", *options, *how, "install", _PACKAGE)
    newest: dict[str, Path] = {}
    for path in sorted(kept.glob("*.deb"), key=lambda path: path.stat().st_mtime_ns):
        newest[path.name.partition("_")[0]] = path
    return list(newest.values())


def _run(*command: str | Path) -> None:
    call(
        *command,
        env=os.environ | {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"},
        timeout_s=_TIMEOUT_S,
    )
