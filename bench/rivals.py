"""The programs that are compared: `vunify` and those that link equal files as it does.

Each sees the same trees, all of their files, and does what an administrator would type.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final


@dataclass(frozen=True, slots=True)
class Place:
    """What one run works on."""

    trees: Sequence[Path]
    pool: Path
    empty_list: Path
    """An exclude list without a line, so that all programs see the same files."""
    scratch: Path
    """Where a program runs and may leave its own notes."""

    def tree_names(self) -> list[str]:
        return [os.fspath(tree) for tree in self.trees]


@dataclass(frozen=True, slots=True)
class Program:
    """One program of the comparison."""

    name: str
    shown: str
    """The command as a report shows it."""
    arguments: Callable[[Place], list[str]]
    executable: str
    version_option: str
    package: str
    """Which Debian package has it."""

    def find(self) -> str | None:
        """The path of the program; None where it is not installed."""
        if self.name == VUNIFY:
            own = Path(sys.executable).parent / self.executable
            return os.fspath(own) if os.access(own, os.X_OK) else None
        return shutil.which(self.executable)

    def find_version(self) -> str | None:
        """What the program says of itself; None where it is not installed or does not tell."""
        found = self.find()
        if found is None:
            return None
        done = subprocess.run(
            [found, self.version_option], capture_output=True, text=True, check=False, timeout=30
        )
        lines = done.stdout.strip().splitlines()
        return lines[0].removeprefix("This is ") if lines and not done.returncode else None

    def command(self, place: Place) -> list[str]:
        """What to run. Raises FileNotFoundError where it is not installed."""
        found = self.find()
        if found is None:
            raise FileNotFoundError(self.executable)
        return [found, *self.arguments(place)]


VUNIFY: Final = "vunify"
HARDLINK: Final = "hardlink"


def _vunify(place: Place) -> list[str]:
    roots = [word for tree in place.tree_names() for word in ("--root", tree)]
    pool = ["--pool", os.fspath(place.pool), "--exclude-from", os.fspath(place.empty_list)]
    return ["--offline", *roots, *pool, "--min-size", "1", "--json"]


def _jdupes(place: Place) -> list[str]:
    return ["-r", "-L", *place.tree_names()]


def _hardlink(place: Place) -> list[str]:
    return place.tree_names()


def _hardlink_any_time(place: Place) -> list[str]:
    return ["-t", *place.tree_names()]


def _rdfind(place: Place) -> list[str]:
    return ["-makehardlinks", "true", *place.tree_names()]


PROGRAMS: Final = (
    Program(
        VUNIFY,
        "vunify --offline --root TREE... --pool POOL --exclude-from EMPTY --min-size 1 --json",
        _vunify,
        "vunify",
        "--version",
        "vserver-tools",
    ),
    Program("jdupes -L", "jdupes -r -L TREE...", _jdupes, "jdupes", "-v", "jdupes"),
    Program(HARDLINK, "hardlink TREE...", _hardlink, "hardlink", "-V", "util-linux"),
    Program(
        "hardlink -t", "hardlink -t TREE...", _hardlink_any_time, "hardlink", "-V", "util-linux"
    ),
    Program(
        "rdfind", "rdfind -makehardlinks true TREE...", _rdfind, "rdfind", "--version", "rdfind"
    ),
)


def find_program(name: str) -> Program:
    """The program of that name in the table. Raises KeyError."""
    return {program.name: program for program in PROGRAMS}[name]
