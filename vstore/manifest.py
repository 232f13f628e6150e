"""Manifests: what of a guest is shared with the pool, and its folders, as one file of JSON lines.

With a backup of the guest's own entries it makes the whole tree again. The digests are those in the
objects' names, so saving reads no file. The lines, in this order:

    {"format": 1, "guest": "web"}
    {"folder": "etc", "mode": "755", "uid": 0, "gid": 0, "mtime_ns": 1700000000123456789,
     "xattrs": {"user.note": "00ff"}}                    xattrs in hexadecimal; all on one line
    {"file": "etc/bash.bashrc", "object": "9af1....-0"}  the object's name in the pool
    {"end": 2}                                           how many entries stand above

Paths are relative to the guest's root, which is "". Bytes that are no UTF-8 are lone surrogates, as
Python's surrogateescape makes them. A manifest is checked as a whole before anything is done with
it: who wrote it may be hostile.
"""

import json
import os
import re
import secrets
import stat
from collections.abc import Container, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

from vstore import inode
from vstore.errors import ConfigInvalid, FormatUnknown
from vstore.folders import Listed, Missed, find_shared, walk_folders
from vstore.pool import Pool, parse_object

FORMAT: Final = 1

_OBJECT: Final = re.compile(
    r"[0-9a-f]{64}\.[0-9]{1,19}\.[0-7]{1,6}\.[0-9]{1,10}\.[0-9]{1,10}"
    r"\.-?[0-9]{1,19}\.(0|[0-9a-f]{64})-[0-9]{1,9}"
)
_NAME_LIMIT: Final = 255  # bytes of one component
_ID_LIMIT: Final = (1 << 32) - 1  # the last one stands for none in chown(2)
_TIME_LIMIT: Final = 1 << 63


# --- records


@dataclass(frozen=True, slots=True)
class SavedFolder:
    """A folder's metadata. `mode` is the permission bits."""

    path: bytes
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    xattrs: Mapping[bytes, bytes]

    @classmethod
    def at(cls, path: bytes, fd: int) -> "SavedFolder":
        """Of the folder behind `fd`. Raises OSError."""
        status = os.fstat(fd)
        return cls(
            path,
            stat.S_IMODE(status.st_mode),
            status.st_uid,
            status.st_gid,
            status.st_mtime_ns,
            inode.load_xattrs(fd),
        )

    def as_record(self) -> dict[str, Any]:
        return {
            "folder": os.fsdecode(self.path),
            "mode": f"{self.mode:o}",
            "uid": self.uid,
            "gid": self.gid,
            "mtime_ns": self.mtime_ns,
            "xattrs": {
                os.fsdecode(name): value.hex() for name, value in sorted(self.xattrs.items())
            },
        }


@dataclass(frozen=True, slots=True)
class Manifest:
    """A guest's folders, each before those in it, and its shared files: path -> object's name."""

    guest: str
    folders: list[SavedFolder] = field(default_factory=list)
    files: dict[bytes, str] = field(default_factory=dict)


# --- saving


def find_names(pool: Pool, numbers: Container[int]) -> dict[int, str]:
    """The objects of these inode numbers: number -> name, without its folder."""
    return {number: path[3:] for path, number in pool.list_objects() if number in numbers}


def take_manifest(guest_name: str, root_fd: int, pool: Pool, missed: Missed) -> Manifest:
    """The manifest of the tree behind `root_fd`, which is on the pool's file system."""
    objects = pool.load_numbers()
    manifest = Manifest(guest_name)
    shared: list[Listed] = []
    for folder in walk_folders(root_fd, missed, skip_ino=os.fstat(pool.fd).st_ino):
        try:
            manifest.folders.append(SavedFolder.at(folder.path, folder.fd))
        except OSError as error:
            missed.note(folder.path, error)
        shared += find_shared(folder, objects)
    names = find_names(pool, {item.ino for item in shared})
    for item in shared:
        if item.ino in names:
            manifest.files[item.path] = names[item.ino]
        else:
            missed.errors.append((item.path, "its object left the pool meanwhile"))
    return manifest


def save_manifest(manifest: Manifest, path: Path) -> None:
    """Write the manifest to the file at `path` (mode 0600), whole or not at all.

    A symlink is followed; a pipe or device is written to. Raises OSError.
    """
    if path.exists() and not path.is_file():
        with path.open("wb") as stream:
            _write(manifest, stream)
        return
    target = Path(os.path.realpath(path))
    spare = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}")
    fd = os.open(spare, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as stream:
            _write(manifest, stream)
            stream.flush()
            os.fsync(stream.fileno())
        spare.rename(target)
    except BaseException:
        with suppress(FileNotFoundError):
            spare.unlink()
        raise


def _write(manifest: Manifest, stream: BinaryIO) -> None:
    count = 0
    for record in _list_records(manifest):
        stream.write(json.dumps(record).encode("ascii") + b"\n")
        count += 1
    stream.write(json.dumps({"end": count - 1}).encode("ascii") + b"\n")


def _list_records(manifest: Manifest) -> Iterator[dict[str, Any]]:
    yield {"format": FORMAT, "guest": manifest.guest}
    for folder in manifest.folders:
        yield folder.as_record()
    for path, name in manifest.files.items():
        yield {"file": os.fsdecode(path), "object": name}


# --- loading


def load_manifest(path: Path) -> Manifest:
    """The manifest in the file at `path`, checked to its end.

    Raises ConfigInvalid for what is none, is cut short, or names paths that are not below a root;
    FormatUnknown for a newer one; OSError.
    """
    parser = _Parser()
    with path.open("rb") as stream:
        try:
            return parser.parse(stream)
        except _BadLine as error:
            raise ConfigInvalid(
                f"{path}: line {parser.line}: {error}",
                hint="nothing was done; is this what `vfiles --save` wrote?",
            ) from error
        except FormatUnknown as error:
            raise FormatUnknown(f"{path}: {error.message}", hint=error.hint) from error


class _BadLine(ValueError):
    """What is wrong with a line."""


class _Parser:
    """Reads the lines of one manifest."""

    def __init__(self) -> None:
        self._folders: dict[bytes, SavedFolder] = {}
        self._files: dict[bytes, str] = {}
        self._guest: str | None = None
        self._is_over = False
        self.line = 0

    def parse(self, stream: BinaryIO) -> Manifest:
        for line in stream:
            self.line += 1
            self._take(_parse_line(line))
        if not self._is_over:
            raise _BadLine("the manifest ends here, before its last line")
        folders = sorted(self._folders.values(), key=lambda folder: folder.path)
        return Manifest(self._guest or "", folders, self._files)

    def _take(self, record: dict[str, Any]) -> None:
        if self._is_over:
            raise _BadLine("something stands after the last line")
        if self._guest is None:
            self._take_head(record)
        elif "folder" in record:
            folder = _parse_folder(record)
            self._check_new(folder.path)
            self._folders[folder.path] = folder
        elif "file" in record:
            path = parse_path(_text(record, "file"))
            self._check_new(path)
            self._files[path] = _parse_object_name(_text(record, "object"))
        else:
            self._is_over = True
            if _number(record, "end", 0, _TIME_LIMIT) != len(self._folders) + len(self._files):
                raise _BadLine("entries are missing")

    def _take_head(self, record: dict[str, Any]) -> None:
        if "format" not in record:
            raise _BadLine("no manifest: the key `format` is missing")
        if record["format"] != FORMAT:
            raise FormatUnknown(
                f"the manifest has format {record['format']!r}, this version knows {FORMAT}",
                hint="use the version that saved it, or a newer one",
            )
        self._guest = _text(record, "guest")

    def _check_new(self, path: bytes) -> None:
        if path in self._folders or path in self._files:
            raise _BadLine(f"the path {os.fsdecode(path)!r} stands there twice")


def _parse_line(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _BadLine(f"no JSON: {error}") from error
    if not isinstance(record, dict):
        raise _BadLine("no JSON object")
    return record


def _parse_folder(record: dict[str, Any]) -> SavedFolder:
    text = _text(record, "folder")
    mode = _text(record, "mode")
    if not re.fullmatch(r"[0-7]{1,4}", mode):
        raise _BadLine(f"`mode` is {mode!r}")
    return SavedFolder(
        parse_path(text) if text else b"",
        int(mode, 8),
        _number(record, "uid", 0, _ID_LIMIT),
        _number(record, "gid", 0, _ID_LIMIT),
        _number(record, "mtime_ns", -_TIME_LIMIT, _TIME_LIMIT),
        _parse_xattrs(record.get("xattrs")),
    )


def _parse_xattrs(value: object) -> dict[bytes, bytes]:
    if not isinstance(value, dict):
        raise _BadLine("`xattrs` is no object")
    try:
        found = {os.fsencode(name): bytes.fromhex(content) for name, content in value.items()}
    except (TypeError, ValueError) as error:
        raise _BadLine(f"`xattrs`: {error}") from error
    if any(not name or b"\0" in name for name in found):
        raise _BadLine("`xattrs`: a name that cannot be")
    return found


def _parse_object_name(text: str) -> str:
    """An object's name, spelled as we spell it, of a regular file."""
    if not _OBJECT.fullmatch(text):
        raise _BadLine(f"`object` is {text!r}, no object's name")
    identity, number = parse_object(text)
    if identity.name(number)[3:] != text or not stat.S_ISREG(identity.mode):
        raise _BadLine(f"`object` is {text!r}, no object's name")
    return text


def parse_path(text: str) -> bytes:
    """A path below a root: names that can be, between single slashes. Raises ValueError."""
    try:
        path = os.fsencode(text)
    except UnicodeEncodeError as error:
        raise _BadLine(f"the path {text!r} is no file name") from error
    for name in path.split(b"/"):
        if name in (b"", b".", b"..") or b"\0" in name or len(name) > _NAME_LIMIT:
            raise _BadLine(f"the path {text!r} is not one below a guest's root")
    return path


def _text(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise _BadLine(f"the key `{key}` is missing or no text")
    return value


def _number(record: dict[str, Any], key: str, least: int, limit: int) -> int:
    value = record.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < limit:
        raise _BadLine(f"the key `{key}` is missing or no number that can be")
    return value
