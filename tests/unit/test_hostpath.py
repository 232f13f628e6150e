"""Where a path that a host administrator names leads."""

import os
from pathlib import Path

import pytest

from vstore.errors import ToolError, WrongUsage
from vstore.guest import Guest
from vstore.hostpath import HostPath, locate, open_parent


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A host with two guests, of which `web` is full of links that lead out."""
    top = Path(os.path.realpath(tmp_path))
    for folder in ("guests/web/etc", "guests/db/etc", "host/etc"):
        (top / folder).mkdir(parents=True)
    (top / "host/short").symlink_to("../guests")
    (top / "host/inside").symlink_to("short/web/etc")
    (top / "host/loop").symlink_to("loop")
    (top / "guests/web/out").symlink_to(top / "host")
    (top / "guests/web/up").symlink_to("../../../host")
    (top / "guests/web/settings").symlink_to("/etc")
    return top


def find(base: Path, path: str) -> HostPath:
    guests = [Guest(name, base / "guests" / name, None) for name in ("web", "db")]
    return locate(f"{base}/{path}", guests)


def leads_to(base: Path, path: str) -> tuple[str, bytes, bytes]:
    place = find(base, path)
    return (place.guest.name if place.guest else "", place.parent, place.name)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("guests/web/etc/conf", ("web", b"etc", b"conf")),
        ("guests/web/conf", ("web", b"", b"conf")),
        ("guests/web/out/etc/conf", ("web", b"out/etc", b"conf")),
        ("host/short/db/etc/conf", ("db", b"etc", b"conf")),
        ("host/inside/conf", ("web", b"etc", b"conf")),
        ("host/../guests//db/./conf/", ("db", b"", b"conf")),
        ("guests/web/../db/etc/conf", ("web", b"../db/etc", b"conf")),
    ],
)
def test_a_path_into_a_guest_is_the_guests_own(
    base: Path, path: str, expected: tuple[str, bytes, bytes]
) -> None:
    assert leads_to(base, path) == expected


@pytest.mark.parametrize(
    ("path", "parent", "name"),
    [
        ("host/etc/conf", "host/etc", b"conf"),
        ("host/short/web", "guests", b"web"),
        ("guests/web", "guests", b"web"),
        ("host/short", "host", b"short"),
        ("nowhere/at/all", "nowhere/at", b"all"),
    ],
)
def test_all_else_is_the_hosts(base: Path, path: str, parent: str, name: bytes) -> None:
    assert leads_to(base, path) == ("", os.fsencode(base / parent), name)


def test_a_relative_path_begins_where_we_are(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base / "guests/web/etc")
    place = locate("conf", [Guest("web", base / "guests/web", None)])
    assert (place.guest is not None, place.parent, place.name) == (True, b"etc", b"conf")


@pytest.mark.parametrize("path", ["guests/web/..", "guests/web/etc/..", "host/.."])
def test_a_path_without_a_last_component_is_refused(base: Path, path: str) -> None:
    with pytest.raises(WrongUsage):
        find(base, path)


def test_the_root_has_no_last_component() -> None:
    with pytest.raises(WrongUsage):
        locate("/", [])


def test_a_loop_of_links_is_refused(base: Path) -> None:
    with pytest.raises(ToolError, match="symbolic links"):
        find(base, "host/loop/conf")


@pytest.mark.parametrize("path", ["out/etc/conf", "up/etc/conf"])
def test_no_link_leads_out_of_the_guest(base: Path, path: str) -> None:
    place = find(base, f"guests/web/{path}")
    root_fd = os.open(base / "guests/web", os.O_RDONLY)
    try:
        with pytest.raises(FileNotFoundError):
            open_parent(place.parent, root_fd)
        settings = find(base, "guests/web/settings/conf")
        folder_fd = open_parent(settings.parent, root_fd)
        assert os.path.samestat(os.fstat(folder_fd), (base / "guests/web/etc").stat())
        os.close(folder_fd)
    finally:
        os.close(root_fd)
