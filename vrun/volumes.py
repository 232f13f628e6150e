"""The lines of a guest's fstab, mounted below its root: sources on the host, targets inside.

A source that lies in the tree of another guest is reached as that guest would see it (sources.py).
Most are mounted by system calls alone. Where a file system has a mount(8) helper (nfs, cifs, fuse),
or the source is a label, a UUID or an image file, mount(8) mounts in a folder of ours, and from
there the mount is moved to the target: no program is ever given a path of the guest's.
"""

import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from vrun import mountcalls, mountfd, sources
from vrun.errors import ToolError
from vrun.spec import Mount
from vstore.guest import rundir
from vstore.record import dataclass

_SET: Final[Mapping[str, int]] = {
    "ro": mountcalls.MOUNT_ATTR_RDONLY,
    "nosuid": mountcalls.MOUNT_ATTR_NOSUID,
    "nodev": mountcalls.MOUNT_ATTR_NODEV,
    "noexec": mountcalls.MOUNT_ATTR_NOEXEC,
    "nodiratime": mountcalls.MOUNT_ATTR_NODIRATIME,
    "nosymfollow": mountcalls.MOUNT_ATTR_NOSYMFOLLOW,
}
_CLEAR: Final[Mapping[str, int]] = {
    "rw": mountcalls.MOUNT_ATTR_RDONLY,
    "suid": mountcalls.MOUNT_ATTR_NOSUID,
    "dev": mountcalls.MOUNT_ATTR_NODEV,
    "exec": mountcalls.MOUNT_ATTR_NOEXEC,
    "diratime": mountcalls.MOUNT_ATTR_NODIRATIME,
    "symfollow": mountcalls.MOUNT_ATTR_NOSYMFOLLOW,
}
_ATIME: Final[Mapping[str, int]] = {
    "atime": mountcalls.MOUNT_ATTR_RELATIME,
    "relatime": mountcalls.MOUNT_ATTR_RELATIME,
    "noatime": mountcalls.MOUNT_ATTR_NOATIME,
    "strictatime": mountcalls.MOUNT_ATTR_STRICTATIME,
}
_PROPAGATION: Final[Mapping[str, int]] = {
    "private": mountcalls.MS_PRIVATE,
    "slave": mountcalls.MS_SLAVE,
    "shared": mountcalls.MS_SHARED,
    "unbindable": mountcalls.MS_UNBINDABLE,
}
_IGNORED: Final = frozenset(
    (
        *("defaults", "auto", "async", "nouser", "user", "users", "group", "owner", "_netdev"),
        *("nofail", "nomtab", "norelatime", "nostrictatime", "loud", "silent", "rec"),
    )
)
_FOR_PROGRAM: Final = frozenset({"loop", "offset", "sizelimit", "encryption", "uhelper", "helper"})
"""Words that only mount(8) understands."""
_LAYERS: Final = frozenset({"lowerdir", "datadir", "upperdir", "workdir"})
"""Options of overlay whose values are paths."""
_HELPERS: Final = ("/sbin", "/usr/sbin")
_TAGS: Final = ("LABEL=", "UUID=", "PARTLABEL=", "PARTUUID=", "ID=")


@dataclass(slots=True)
class Words:
    """The options of a line, sorted by who understands them."""

    attributes: int = 0
    """MOUNT_ATTR_ flags without the kind of atime."""
    atime: int = mountcalls.MOUNT_ATTR_RELATIME
    propagation: int = 0
    bind: bool = False
    recursive: bool = False
    remount: bool = False
    for_filesystem: tuple[str, ...] = ()
    for_program: bool = False
    """Something among them is for mount(8) alone."""


def parse_words(mount: Mount) -> Words:
    """What the options of the line mean. `nodev` holds unless `dev` is said; devpts is exempt.

    Raises ToolError for `move`, which would take a mount away from the host.
    """
    words = Words(attributes=0 if mount.fstype == "devpts" else mountcalls.MOUNT_ATTR_NODEV)
    for word in mount.options:
        if not _take(words, word):
            words.for_filesystem += (word,)
    if "move" in mount.options:
        raise ToolError(f"{mount.where}: option move is not for guests", hint="use bind")
    return words


def _take(words: Words, word: str) -> bool:
    """Note the word; False where it is for the file system."""
    key = word.partition("=")[0]
    if key in _SET:
        words.attributes |= _SET[key]
    elif key in _CLEAR:
        words.attributes &= ~_CLEAR[key]
    elif key in _ATIME:
        words.atime = _ATIME[key]
    elif key.removeprefix("r") in _PROPAGATION:
        words.propagation = _PROPAGATION[key.removeprefix("r")]
    elif key in ("bind", "rbind"):
        words.bind = True
        words.recursive |= key == "rbind"
    else:
        return _take_rest(words, key)
    return True


def _take_rest(words: Words, key: str) -> bool:
    words.recursive |= key == "rec"
    words.remount |= key == "remount"
    words.for_program |= key in _FOR_PROGRAM
    return key in _IGNORED or key in ("remount", "move") or key.startswith(("x-", "X-", "comment"))


def target_of(mount: Mount) -> str:
    """The line's target, absolute and without `.`, `..` and double slashes."""
    return os.path.normpath("/" + mount.target.lstrip("/"))


def mount_line(root_fd: int, mount: Mount) -> None:
    """Mount one line on its target inside the tree at `root_fd`, in this mount namespace.

    Raises ToolError that names the line. Leaves nothing half mounted.
    """
    words = parse_words(mount)
    with _naming(mount):
        if words.remount:
            _change(root_fd, target_of(mount), words)
            return
        mount_fd = _make(mount, words)
        try:
            mountfd.attach(mount_fd, root_fd, target_of(mount))
        finally:
            os.close(mount_fd)


def make_line(mount: Mount) -> int:
    """The mount of one line, mounted nowhere yet; its descriptor. Raises ToolError as mount_line.

    Not for the option remount, which makes none.
    """
    words = parse_words(mount)
    with _naming(mount):
        return _make(mount, words)


@contextmanager
def _naming(mount: Mount) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ToolError(
            f"{mount.where}: cannot mount {mount.source} on {target_of(mount)} of the guest: "
            f"{error.strerror}",
            hint=mountfd.hint(error, target_of(mount)),
        ) from error


def _make(mount: Mount, words: Words) -> int:
    """The mount of the line, mounted nowhere."""
    if words.bind or mount.fstype in ("bind", "rbind"):
        mount_fd = _bind(mount, words)
    elif _needs_program(mount, words):
        _refuse_guests(mount)
        mount_fd = _mount_by_program(mount)
    else:
        _refuse_guests(mount)
        ro = ("ro",) if words.attributes & mountcalls.MOUNT_ATTR_RDONLY else ()
        options = (*words.for_filesystem, *ro)
        mount_fd = mountfd.make(mount.fstype, options=options, source=mount.source)
    try:
        _set_attributes(mount_fd, words, recursive=words.recursive)
    except OSError:
        os.close(mount_fd)
        raise
    return mount_fd


def _bind(mount: Mount, words: Words) -> int:
    recursive = words.recursive or mount.fstype == "rbind"
    source = sources.open_source(mount.source)
    try:
        return mountfd.copy(source.fd, recursive=recursive)
    finally:
        os.close(source.fd)


def _set_attributes(mount_fd: int, words: Words, *, recursive: bool) -> None:
    known = 0
    for bit in _SET.values():
        known |= bit
    mountcalls.mount_setattr(
        mount_fd,
        attr_set=words.attributes | words.atime,
        attr_clr=(known & ~words.attributes) | mountcalls.MOUNT_ATTR__ATIME,
        propagation=words.propagation or mountcalls.MS_PRIVATE,
        recursive=recursive,
    )


def _change(root_fd: int, target: str, words: Words) -> None:
    """Change the attributes of what is mounted on the target already (option remount)."""
    target_fd = mountfd.open_inside(root_fd, target)
    try:
        _set_attributes(target_fd, words, recursive=words.recursive)
    finally:
        os.close(target_fd)


# --- mount(8)


def _needs_program(mount: Mount, words: Words) -> bool:
    return (
        words.for_program
        or mount.fstype in ("auto", "")
        or mount.source.startswith(_TAGS)
        or any(Path(folder, f"mount.{mount.fstype}").exists() for folder in _HELPERS)
        or _is_image(mount.source)
    )


def _is_image(source: str) -> bool:
    return source.startswith("/") and kind_of(source) == stat.S_IFREG


def kind_of(source: str) -> int | None:
    """S_IFDIR and so on of what the host's path leads to; None where there is nothing."""
    try:
        found = sources.open_source(source)
    except OSError:
        return None
    try:
        return found.kind
    finally:
        os.close(found.fd)


def _refuse_guests(mount: Mount) -> None:
    """A device, an image or a layer is mounted by its path, whatever that leads to by then."""
    for path in (mount.source, *_layers(mount)):
        with suppress(FileNotFoundError, NotADirectoryError):
            source = sources.open_source(path) if path.startswith("/") else None
            if source is not None:
                os.close(source.fd)
            if source is not None and source.is_in_guest:
                raise ToolError(
                    f"{mount.where}: {path} lies in a guest's tree, whose root can put anything "
                    "in its place",
                    hint="move it to a folder of the host's, or bind it",
                )


def _layers(mount: Mount) -> Iterator[str]:
    """The folders that an overlay is made of."""
    for word in mount.options:
        key, _, value = word.partition("=")
        if key.rstrip("+") in _LAYERS:
            yield from re.split(r"(?<!\\):+", value)


def _mount_by_program(mount: Mount) -> int:
    """Let mount(8) mount in a folder of ours, and take the mount from there."""
    import subprocess  # 10 ms that few guests need

    folder = rundir() / ".mount"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    words = [word for word in mount.options if word not in ("nomtab", "rec")] or ["defaults"]
    command = ["mount", "-n", "-t", mount.fstype or "auto", "-o", ",".join(words), "--"]
    done = subprocess.run(  # noqa: S603 # the administrator's words, and no shell
        [*command, mount.source, os.fspath(folder)], capture_output=True, check=False
    )
    if done.returncode:
        said = os.fsdecode(done.stderr).strip() or f"mount(8) ended with {done.returncode}"
        raise ToolError(f"{mount.where}: cannot mount {mount.source}: {said}")
    folder_fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return mountfd.copy(folder_fd, recursive=True)
    finally:
        os.close(folder_fd)
        mountcalls.umount2(os.fsencode(folder), mountcalls.MNT_DETACH)
