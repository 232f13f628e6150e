"""Manifests: what is written comes back, and what nobody wrote is refused whole."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fixtures.hostile import NAMES, deep_path
from vstore.errors import ConfigInvalid, FormatUnknown
from vstore.manifest import Manifest, SavedFolder, load_manifest, parse_path, save_manifest
from vstore.pool import Identity

OBJECT = Identity(bytes(range(32)), 5, 0o100644, 0, 0, 1_700_000_000_123_456_789, b"").name(0)[3:]
LABELLED = Identity(bytes(32), 5, 0o104755, 9, 1 << 31, -5, bytes(32)).name(12)[3:]
ROOT = SavedFolder(b"", 0o755, 0, 0, 0, {})
HEAD = {"format": 1, "guest": "web"}


def folder(path: bytes, **changes: Any) -> SavedFolder:
    values: dict[str, Any] = {
        "mode": 0o2750,
        "uid": 3,
        "gid": 4,
        "mtime_ns": -1,
        "xattrs": {},
    } | changes
    return SavedFolder(path, **values)


def there_and_back(manifest: Manifest, path: Path) -> Manifest:
    save_manifest(manifest, path)
    return load_manifest(path)


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def refused(path: Path, *records: object) -> str:
    """Why a manifest of these lines is refused."""
    with pytest.raises(ConfigInvalid) as caught:
        load_manifest(write(path / "manifest", *records))
    assert os.fspath(path) in caught.value.message
    return caught.value.message


# --- there and back


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    folders = [ROOT, folder(b"etc", xattrs={b"user.note": b"\0\xff", b"user.\xff": b""})]
    manifest = Manifest("web", folders, {b"etc/conf": OBJECT, b"etc/other": LABELLED})
    assert there_and_back(manifest, tmp_path / "manifest") == manifest


def test_odd_names_come_back(tmp_path: Path) -> None:
    manifest = Manifest("web", [ROOT])
    for name in sorted(NAMES):
        manifest.folders.append(folder(name))
        manifest.files[name + b"/" + name] = OBJECT
    manifest.files[deep_path() + b"/end"] = OBJECT
    assert there_and_back(manifest, tmp_path / "manifest") == manifest


names = st.binary(min_size=1, max_size=255).filter(
    lambda name: not set(b"/\0") & set(name) and name not in (b".", b"..")
)
paths = st.lists(names, min_size=1, max_size=5).map(b"/".join)


@given(files=st.dictionaries(paths, st.sampled_from([OBJECT, LABELLED]), max_size=20))
def test_any_path_comes_back(
    files: dict[bytes, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    manifest = Manifest("web", [ROOT], files)
    path = tmp_path_factory.getbasetemp() / "any"
    assert there_and_back(manifest, path) == manifest


def test_each_line_is_ascii_and_an_object(tmp_path: Path) -> None:
    manifest = Manifest("web", [ROOT, folder(b"caf\xc3\xa9\n\xff")], {b"\x1b": OBJECT})
    save_manifest(manifest, tmp_path / "manifest")
    lines = (tmp_path / "manifest").read_bytes().splitlines()
    assert all(line.isascii() and b"\x1b" not in line for line in lines)
    records = [json.loads(line) for line in lines]
    assert records[0] == HEAD
    assert records[2]["folder"] == "caf\u00e9\n\udcff"
    assert records[2]["mode"] == "2750"
    assert records[3] == {"file": "\x1b", "object": OBJECT}
    assert records[-1] == {"end": 3}


def test_folders_come_before_what_is_in_them(tmp_path: Path) -> None:
    manifest = Manifest("web", [folder(b"a/b/c"), folder(b"a-b"), folder(b"a"), folder(b"a/b")])
    found = [item.path for item in there_and_back(manifest, tmp_path / "manifest").folders]
    assert found == [b"a", b"a-b", b"a/b", b"a/b/c"]


# --- the file


def test_only_the_owner_may_read_it_and_the_old_one_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "manifest"
    path.write_text("old")
    path.chmod(0o644)
    save_manifest(Manifest("web", [ROOT]), path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_manifest(path).folders == [ROOT]
    assert [entry.name for entry in tmp_path.iterdir()] == ["manifest"]


def test_a_symlink_is_followed(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/manifest")
    save_manifest(Manifest("web", [ROOT]), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert load_manifest(tmp_path / "folder" / "manifest").folders == [ROOT]


def test_a_device_is_not_replaced(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    save_manifest(Manifest("web", [ROOT]), Path(f"/proc/self/fd/{writer}"))
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        assert len(stream.read().splitlines()) == 3


def test_nothing_is_left_where_it_cannot_be_written(tmp_path: Path) -> None:
    broken = Manifest("web", [ROOT], {b"file": OBJECT, "no bytes": OBJECT})  # type: ignore[dict-item]  # so that it fails
    broken.files[3] = OBJECT  # type: ignore[index]  # as above
    with pytest.raises(TypeError):
        save_manifest(broken, tmp_path / "manifest")
    assert list(tmp_path.iterdir()) == []


# --- what is refused


@pytest.mark.parametrize(
    "path",
    [
        *("", "/", "/etc", "etc/", "a//b", ".", "..", "./a", "a/.", "a/..", "../a", "a/../b"),
        *("a\0b", "x" * 256, "a/" + "\u00e9" * 128, "\ud800"),
    ],
)
def test_a_path_that_is_not_below_the_root_is_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="path"):
        parse_path(path)
    assert "line 2: the path" in refused(tmp_path, HEAD, {"file": path, "object": OBJECT})
    if path:
        record = folder(b"x").as_record() | {"folder": path}
        assert "line 2: the path" in refused(tmp_path, HEAD, record)


@pytest.mark.parametrize(
    "name",
    [
        *("", "x", "../../etc/passwd", f"../{OBJECT}", f"ab/{OBJECT}", OBJECT + "\n", OBJECT[:-2]),
        *(OBJECT.upper(), OBJECT.replace("-0", "-00"), OBJECT.replace("-0", "--1")),
        *(OBJECT.replace(".5.", ".05."), OBJECT.replace("100644", "40755")),
        OBJECT.replace("0", "\u0660"),  # a digit, but not one of ours
    ],
)
def test_what_is_no_objects_name_is_refused(name: str, tmp_path: Path) -> None:
    assert "no object's name" in refused(tmp_path, HEAD, {"file": "etc/conf", "object": name})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("mode", "800"), ("mode", 493), ("mode", "10755"), ("mode", ""), ("folder", 7)),
        *(("uid", -1), ("uid", 1 << 32), ("uid", (1 << 32) - 1), ("gid", "0"), ("gid", True)),
        *(("mtime_ns", 1.5), ("mtime_ns", 1 << 63), ("mtime_ns", None), ("xattrs", None)),
        *(("xattrs", []), ("xattrs", {"user.a": "xy"}), ("xattrs", {"user.a": 1})),
        *(("xattrs", {"": ""}), ("xattrs", {"a\0b": ""})),
    ],
)
def test_a_folder_that_cannot_be_is_refused(key: str, value: object, tmp_path: Path) -> None:
    record = folder(b"etc").as_record() | {key: value}
    message = refused(tmp_path, HEAD, record, {"end": 1})
    assert f"line 2: the key `{key}`" in message or f"line 2: `{key}`" in message


def test_a_path_that_stands_there_twice_is_refused(tmp_path: Path) -> None:
    file = {"file": "etc", "object": OBJECT}
    for other in (file, folder(b"etc").as_record()):
        assert "line 3: the path 'etc' stands there twice" in refused(tmp_path, HEAD, file, other)


def test_a_manifest_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "manifest"
    save_manifest(Manifest("web", [ROOT], {b"a": OBJECT, b"b": OBJECT}), path)
    whole = path.read_bytes()
    for length in range(len(whole) - 1):  # the last newline alone is not missed
        path.write_bytes(whole[:length])
        with pytest.raises(ConfigInvalid):
            load_manifest(path)


def test_missing_and_further_lines_are_refused(tmp_path: Path) -> None:
    file = {"file": "etc", "object": OBJECT}
    assert "entries are missing" in refused(tmp_path, HEAD, file, {"end": 2})
    assert "after the last line" in refused(tmp_path, HEAD, file, {"end": 1}, file)


@pytest.mark.parametrize(
    "text", ["", "\n", "[1]", "1", "{}", "nonsense", "\xff", "[" * 100_000, '{"format": 1}']
)
def test_what_is_no_manifest_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "manifest"
    path.write_text(text + "\n", encoding="latin-1")
    with pytest.raises(ConfigInvalid):
        load_manifest(path)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatUnknown, match="format 2"):
        load_manifest(write(tmp_path / "manifest", HEAD | {"format": 2}))
