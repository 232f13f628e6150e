"""Real guests for the comparison: debootstrap's, made different from each other as real ones are.

How they are built, and where the built ones are kept, stands in tests/fixtures/guests.py.
"""

import hashlib
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.calls import BenchError
from tests.fixtures.guests import (
    SMALL,
    WEB,
    CannotBuild,
    Recipe,
    build_all,
    cache_folder,
    cannot_build,
    personalise,
    unpack,
)

_NEWER_EVERY: Final = 120
_NEWER_BELOW: Final = ("usr/share", "usr/lib", "var/lib")
_DAY_NS: Final = 86_400 * 1_000_000_000
_EPOCH_NS: Final = 1_700_000_000_000_000_000


@dataclass(frozen=True, slots=True)
class Herd:
    """So many guests that were installed alike."""

    recipe: Recipe
    guests: int


def _application(release: str) -> Recipe:
    """A guest that runs Java: some 200 MB in few files."""
    packages = ("iputils-ping", "openssh-server", "default-jre-headless")
    return Recipe(release, "application", packages, variant="minbase")


_SMALL: Final = {(one.release, one.role): one for one in SMALL}

CORPORA: Final = {
    # Two releases, five sets of packages, 12 guests: some 90,000 files, 4 GB.
    "full": (
        Herd(WEB, 2),
        Herd(_SMALL["bookworm", "small-web"], 2),
        Herd(_SMALL["trixie", "small-db"], 3),
        Herd(_application("bookworm"), 2),
        Herd(_application("trixie"), 3),
    ),
    "small": (Herd(_SMALL["bookworm", "small-web"], 2), Herd(_SMALL["trixie", "small-web"], 2)),
}


def prepare(corpus: Sequence[Herd]) -> None:
    """Build what the cache lacks, in minutes. Raises BenchError where it cannot be built."""
    recipes = [herd.recipe for herd in corpus]
    reason = cannot_build(recipes)
    if reason:
        raise BenchError(f"the guests cannot be built: {reason}")
    try:
        build_all(recipes)
    except CannotBuild as error:
        raise BenchError(f"the guests cannot be built: {error}") from error


def lay_out(corpus: Sequence[Herd], root: Path) -> list[Path]:
    """Put the corpus's guests below `root`; gives their trees."""
    return list(lay_out_one_by_one(corpus, root))


def lay_out_one_by_one(corpus: Sequence[Herd], root: Path) -> Iterator[Path]:
    """Put one guest after the other below `root`, each when it is asked for."""
    recipes = [herd.recipe for herd in corpus for _ in range(herd.guests)]
    for number, recipe in enumerate(recipes, start=1):
        yield _make_guest(recipe, root, number)


def _make_guest(recipe: Recipe, root: Path, number: int) -> Path:
    tree = unpack(recipe, root / f"{recipe.release}-{recipe.role}-{number}")
    _keep_packages(tree, cache_folder() / "packages" / recipe.release)
    personalise(tree, tree.name, number)
    _make_some_newer(tree, number)
    return tree


def _keep_packages(tree: Path, packages: Path) -> None:
    """Leave the package files that the guest was installed from, as apt-get does."""
    target = tree / "var/cache/apt/archives"
    for name in _package_files((tree / "var/lib/dpkg/status").read_text()):
        if (packages / name).exists():
            shutil.copy2(packages / name, target / name)


def _package_files(status: str) -> Iterator[str]:
    """The names of the package files of a dpkg status file. See deb-control(5)."""
    for stanza in status.split("\n\n"):
        lines = (line.partition(": ") for line in stanza.splitlines())
        fields = {key: value for key, _, value in lines}
        if "Version" in fields:
            version = fields["Version"].replace(":", "%3a")
            yield f"{fields['Package']}_{version}_{fields['Architecture']}.deb"


def _make_some_newer(tree: Path, number: int) -> None:
    """Change nothing but the time of a few files, as installing a package again does."""
    for folder in _NEWER_BELOW:
        for path in _chosen(tree / folder, f"{number}/{folder}"):
            when = _EPOCH_NS + number * _DAY_NS
            os.utime(path, ns=(when, when))


def _chosen(folder: Path, seed: str) -> Iterator[Path]:
    """Some of the folder's files, picked by name and seed: the same ones in every run."""
    for directory, _, names in os.walk(folder):
        for name in names:
            path = Path(directory, name)
            word = f"{seed}/{path.relative_to(folder)}"
            digest = hashlib.blake2b(os.fsencode(word), digest_size=4).digest()
            is_chosen = int.from_bytes(digest, "little") % _NEWER_EVERY == 0
            if is_chosen and stat.S_ISREG(path.lstat().st_mode):
                yield path
