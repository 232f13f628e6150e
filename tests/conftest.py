"""The folder gives the marker, probes say what can run, and each test gets a site of its own."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.fixtures import guests
from tests.fixtures.filesystems import (
    KINDS,
    Filesystem,
    Images,
    Site,
    fresh_folder,
    make_site,
    scratch,
)
from tests.fixtures.probes import Probes, is_soak, need, own_cgroup, required

_HERE = Path(__file__).parent
_FOLDERS = ("unit", "root", "e2e", "soak", "vm")
_FOLDER_NEEDS = {"root": ("root",), "soak": ("root", "soak"), "vm": ("root", "vm")}
_images = pytest.StashKey[Images]()
_probes = pytest.StashKey[Probes]()
_required = pytest.StashKey[frozenset[str]]()

settings.register_profile(
    "slow machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("slow machine")

Tool = Callable[..., subprocess.CompletedProcess[str]]


def pytest_configure(config: pytest.Config) -> None:
    images = Images()
    config.add_cleanup(images.close)
    config.stash[_images] = images
    config.stash[_probes] = Probes(images)
    config.stash[_required] = required(dict(os.environ))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = _folder_of(item)
        item.add_marker(folder)
        for word in (*_FOLDER_NEEDS.get(folder, ()), *_fixture_needs(item)):
            item.add_marker(need(word))


def _folder_of(item: pytest.Item) -> str:
    parts = item.path.relative_to(_HERE).parts if item.path.is_relative_to(_HERE) else ("",)
    if parts[0] not in _FOLDERS:
        raise pytest.UsageError(f"{item.nodeid}: tests stand in tests/{{{','.join(_FOLDERS)}}}/")
    return parts[0]


def _fixture_needs(item: pytest.Item) -> Iterator[str]:
    if isinstance(item, pytest.Function):
        if "cgroup" in item.fixturenames:
            yield "cgroup_freezer"
        if "fs" in item.fixturenames:
            yield str(item.callspec.params["fs"])


def pytest_report_header(config: pytest.Config) -> list[str]:
    words = config.stash[_required]
    forms = "long" if is_soak() else "short"
    return [
        f"required: {' '.join(sorted(words)) or 'nothing'}",
        f"forms: {forms}; images below {scratch()}",
    ]


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    """Which of the abilities that the chosen tests ask for are on and off."""
    if config.option.collectonly:
        return []
    words = sorted({word for item in items for word in _words(item)})
    if "debootstrap" in words and guests.missing(guests.SMALL):
        config.get_terminal_writer().line("building guests for the cache; this takes minutes")
    reasons = {word: config.stash[_probes].missing(word) for word in words}
    lines = [f"on: {' '.join(word for word in words if not reasons[word]) or 'nothing'}"]
    return lines + [f"OFF: {word}: {reason}" for word, reason in reasons.items() if reason]


def _words(item: pytest.Item) -> Iterator[str]:
    for marker in item.iter_markers("need"):
        yield from marker.args


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    for word in _words(item):
        if reason := item.config.stash[_probes].missing(word):
            if word in item.config.stash[_required]:
                pytest.fail(f"needs {word}, which is required here: {reason}", pytrace=False)
            pytest.skip(f"needs {word}: {reason}")


@pytest.fixture(params=KINDS)
def fs(request: pytest.FixtureRequest) -> Iterator[Filesystem]:
    """A fresh folder on ext4, xfs and btrfs in turn; `@on("xfs")` chooses."""
    with fresh_folder(request.config.stash[_images], request.param) as filesystem:
        yield filesystem


@pytest.fixture
def site(fs: Filesystem, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A place for guests and pool on `fs`, which the environment names to the tools."""
    made = make_site(fs)
    monkeypatch.setenv("VSERVER_CONFDIR", os.fspath(made.confdir))
    monkeypatch.setenv("VSERVER_VDIRBASE", os.fspath(made.vdirbase))
    monkeypatch.setenv("VSERVER_RUNDIR", os.fspath(made.rundir))
    return made


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup (v2) of the test's own; what still runs in it at the end is killed."""
    with own_cgroup() as group:
        yield group


@pytest.fixture(scope="session")
def tool() -> Tool:
    """Run an installed command: `tool("vunify", "--all").returncode`.

    stdout and stderr are what was written, byte for byte: os.fsencode() gives the bytes back.
    """

    def run(
        name: str, *arguments: str | bytes | Path, stdin: bytes = b"", timeout_s: float = 100
    ) -> subprocess.CompletedProcess[str]:
        command = [Path(sys.executable).parent / name, *arguments]
        done = subprocess.run(
            command, input=stdin, capture_output=True, timeout=timeout_s, check=False
        )
        return subprocess.CompletedProcess(
            done.args, done.returncode, os.fsdecode(done.stdout), os.fsdecode(done.stderr)
        )

    return run
